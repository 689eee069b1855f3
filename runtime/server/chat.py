"""ChatRequest -> ChatEvents: render the template, tokenize, submit, parse the answer."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.model.constraint import Constraint
from subspec.runtime.model.sampling import TokenLogprobs
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.server.answer_parser import AnswerParser
from subspec.runtime.server.chat_events import (
    ChatEnd,
    ChatEvent,
    ChatRequest,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
)
from subspec.runtime.server.generation import (
    Generation,
    GenerationRequest,
    Generator,
    Outcome,
    Piece,
    PromptTooLong,
)
from subspec.runtime.server.template_messages import template_messages
from subspec.runtime.server.tools.formats import ToolFormat, choose_tool_format
from subspec.runtime.text.chat_template import TemplateWorker
from subspec.runtime.text.detokenizer import Unstopped
from subspec.runtime.text.reasoning import (
    ReasoningFormat,
    choose_reasoning,
    ends_in_reasoning,
    has_ended_reasoning,
)
from subspec.runtime.text.template_caps import TemplateCaps, find_caps
from subspec.runtime.text.tokenizer import (
    MAX_COUNTED,
    ChatTokenizer,
    Conversation,
    special_tokens,
)

Result = TypeVar("Result")
NUM_THREADS = 2  # for rendering and tokenizing; the worker renders one prompt at a time


@dataclass(frozen=True)
class ChatModel:
    """A model's chat template, tokenizer, formats and threads. Close it."""

    tokenizer: ChatTokenizer
    context: int
    vocab_size: int
    end_tokens: frozenset[int]
    caps: TemplateCaps
    reasoning: ReasoningFormat | None
    tool_format: ToolFormat | None
    special_tokens: tuple[str, ...]
    worker: TemplateWorker
    threads: ThreadPoolExecutor

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)
        self.worker.close()


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt. reasoning: format of the answer's reasoning, if it may have one;
    in_reasoning: the prompt has opened it."""

    ids: tuple[int, ...]
    reasoning: ReasoningFormat | None
    in_reasoning: bool


# (request, the model's call format, prompt) -> constraint. Runs in a thread, up to a second. Raises
# SubspecError(USAGE) for what cannot be enforced.
MakeConstraint = Callable[[ChatRequest, ToolFormat | None, Prompt], Awaitable[Constraint | None]]


def open_chat_model(
    tokenizer: ChatTokenizer, context: int, vocab_size: int, end_tokens: frozenset[int]
) -> ChatModel:
    """Open the model for chats. Renders probes, which takes about 0.1 s."""
    worker = TemplateWorker()
    template = tokenizer.template or ""
    try:
        caps = find_caps(tokenizer, worker)
    except BaseException:
        worker.close()
        raise
    return ChatModel(
        tokenizer,
        context,
        vocab_size,
        end_tokens,
        caps,
        choose_reasoning(template),
        choose_tool_format(template),
        tuple(special_tokens(tokenizer.tokenizer).values()),
        worker,
        ThreadPoolExecutor(NUM_THREADS, "chat"),
    )


async def chat(
    request: ChatRequest,
    model: ChatModel,
    generator: Generator,
    make_constraint: MakeConstraint | None = None,
) -> "ModelAnswer":
    """Submit a chat request and return its answer. make_constraint: called for requests with a
    constraint.

    Raises SubspecError: USAGE for what the client can change, PromptTooLong included, and what
        `Generator.submit` raises.
    """
    check_tools(request, model)
    if model.caps.supports_tool_calls and not model.caps.supports_parallel_tool_calls:
        request = replace(request, parallel_tool_calls=False)  # the model was trained on one
    prompt = await in_thread(model, lambda: make_prompt(request, model))
    tool_format = model.tool_format if offered_tools(request) else None
    constraint = None
    if make_constraint is not None:
        constraint = await make_constraint(request, tool_format, prompt)
    elif request.output_format is not None or request.tool_choice not in ("auto", "none"):
        what = "output_format" if request.output_format is not None else "tool_choice"
        raise SubspecError(Exit.USAGE, f"{what} cannot be honoured without grammars")
    room = model.context - len(prompt.ids)
    params = GenerationParams(
        max_tokens=room if request.max_tokens is None else request.max_tokens,
        sampling=request.sampling,
        stop_token_ids=frozenset() if request.ignore_end else model.end_tokens,
        constraint=constraint,
        logprobs=request.logprobs,
    )
    generation = generator.submit(
        GenerationRequest(
            prompt.ids,
            params,
            request.stop,
            shown_tokens(model, tool_format),
            tuple(unstopped(prompt, tool_format)),
        )
    )
    tools = offered_tools(request)
    parser = AnswerParser(model.reasoning, prompt.in_reasoning, tool_format, tools)
    form, tokenizer = model.reasoning, model.tokenizer.tokenizer
    return ModelAnswer(
        generation,
        len(prompt.ids),
        parser,
        tokenizer.token_to_id(form.end) if form is not None else None,
        params.stop_token_ids,
        request.parallel_tool_calls,
    )


async def count_tokens(request: ChatRequest, model: ChatModel) -> int:
    """Number of tokens of the prompt that `chat` would submit, even if it exceeds the context."""
    check_tools(request, model)
    roomy = replace(model, context=max(model.context, MAX_COUNTED))
    try:
        return len((await in_thread(model, lambda: make_prompt(request, roomy))).ids)
    except PromptTooLong as error:
        message = f"the prompt has more than {roomy.context} tokens, the maximum that is counted"
        raise SubspecError(Exit.USAGE, message, error.hint) from None


async def in_thread(model: ChatModel, work: Callable[[], Result]) -> Result:
    return await asyncio.get_running_loop().run_in_executor(model.threads, work)


def offered_tools(request: ChatRequest) -> tuple[dict[str, Any], ...]:
    """Tools that are shown to the model."""
    return () if request.tool_choice == "none" else request.tools


def without_strict(tool: dict[str, Any]) -> dict[str, Any]:
    """Return the tool without `strict`, which templates do not know."""
    function = {key: value for key, value in tool["function"].items() if key != "strict"}
    return {**tool, "function": function}


def check_tools(request: ChatRequest, model: ChatModel) -> None:
    """Raise SubspecError(USAGE) for tools that the template cannot show, and for required calls in
    a format that is not known: other calls are shown as text."""
    tools = offered_tools(request)
    if not tools:
        return
    if not model.caps.supports_tools:
        message = "tools cannot be honoured: the model's chat template has no place for them"
        raise SubspecError(Exit.USAGE, message, "leave tools out, or use another model")
    is_strict = any(tool["function"].get("strict") for tool in tools)
    if model.tool_format is None and (is_strict or request.tool_choice != "auto"):
        what = "tool_choice" if request.tool_choice != "auto" else "a strict tool"
        message = f"{what} cannot be honoured: the form of this model's tool calls is not known"
        raise SubspecError(Exit.USAGE, message, "use tool_choice auto, and no strict tools")


def make_prompt(request: ChatRequest, model: ChatModel) -> Prompt:
    """Render and tokenize the prompt. Takes a few ms: not for the event loop."""
    tokenizer, form = model.tokenizer, model.tool_format
    short_ids = form is not None and form.kind in ("mistral list", "mistral args")
    messages = template_messages(request.messages, model.caps, short_ids)
    if tokenizer.template is None:
        ids, text = tokenizer.chat_ids(messages), ""
    else:
        conversation = Conversation(
            messages,
            [without_strict(tool) for tool in offered_tools(request)],
            request.enable_thinking,
            request.reasoning_effort,
        )
        variables = tokenizer.template_variables(conversation)
        text = model.worker.render(tokenizer.template, variables)
        if tokenizer.is_longer(text, model.context):
            raise PromptTooLong(None, model.context)
        ids = tokenizer.rendered_ids(text)
    tokenizer.check_known(ids, model.vocab_size)
    if len(ids) >= model.context:
        raise PromptTooLong(len(ids), model.context)
    reasoning = model.reasoning
    if reasoning is None or has_ended_reasoning(text, reasoning):
        return Prompt(tuple(ids), None, False)
    return Prompt(tuple(ids), reasoning, ends_in_reasoning(text, reasoning))


def shown_tokens(model: ChatModel, tool_format: ToolFormat | None) -> frozenset[str]:
    """Special tokens that must be decoded for the answer to be parsed."""
    marks = [mark for form in (model.reasoning, tool_format) if form for mark in form.marks]
    return frozenset(
        token for token in model.special_tokens if any(token in mark for mark in marks)
    )


def unstopped(prompt: Prompt, tool_format: ToolFormat | None) -> list[Unstopped]:
    """Spans in which stop texts do not count: reasoning and marked calls."""
    found, form = list[Unstopped](), prompt.reasoning
    if form is not None:
        found.append(Unstopped("" if prompt.in_reasoning else form.begin, form.end, leads=True))
    if tool_format is not None and tool_format.end is not None:
        begin, end = tool_format.begins[0], tool_format.end
        found.append(Unstopped(begin, end, follows=tool_format.follows))
    return found


class ModelAnswer:
    """Events of a submitted answer. Iterate it to the end, or cancel it.

    reasoning_end: the token of that mark, if it is a single one. parallel: return all calls;
        otherwise only the first.
    """

    def __init__(
        self,
        generation: Generation,
        num_prompt_tokens: int,
        parser: AnswerParser,
        reasoning_end: int | None,
        end_tokens: frozenset[int],
        parallel: bool,
    ) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.num_tokens = 0  # decoded so far
        self._generation = generation
        self._parser = parser
        self._reasoning_end = reasoning_end
        self._end_tokens = end_tokens
        self._parallel = parallel
        self._reasoning_tokens = 0
        self._logprobs: list[TokenLogprobs] = []  # of the answer's text, not yet returned

    @property
    def queue_position(self) -> int:
        return self._generation.queue_position

    def cancel(self) -> None:
        self._generation.cancel()

    async def __aiter__(self) -> AsyncIterator[ChatEvent]:
        """Raises SubspecError if the engine fails. Leaving the loop cancels the answer."""
        try:
            async for piece in self._generation:
                for event in self._events(piece):
                    yield event
            outcome = self._generation.outcome
            for event in self._last_events(outcome):
                yield event
        finally:
            self._generation.cancel()

    def _events(self, piece: Piece) -> list[ChatEvent]:
        self.num_tokens += len(piece.token_ids)
        was_reasoning = self._parser.is_reasoning
        events = self._parser.feed(piece.text)
        count = self._num_reasoning(piece.token_ids, was_reasoning)
        self._reasoning_tokens += count
        said = (one for one in piece.logprobs[count:] if one.token not in self._end_tokens)
        self._logprobs += said
        return self._with_logprobs(events)

    def _num_reasoning(self, ids: tuple[int, ...], was_reasoning: bool) -> int:
        """Number of a piece's tokens that belong to the reasoning, marks included."""
        if self._parser.is_reasoning:
            return len(ids)
        begun = was_reasoning or (self._parser.has_reasoned and not self._reasoning_tokens)
        if begun and self._reasoning_end in ids:
            return ids.index(self._reasoning_end) + 1
        return len(ids) if was_reasoning else 0

    def _with_logprobs(self, events: list[ChatEvent]) -> list[ChatEvent]:
        """Attach log probabilities to text only: clients expect none for calls."""
        given = list[ChatEvent]()
        for event in events:
            if isinstance(event, TextDelta):
                event = TextDelta(event.text, tuple(self._logprobs))
            if not isinstance(event, ReasoningDelta):
                self._logprobs = []
            if isinstance(event, ToolCallStart | ToolCallDelta) and event.index > 0:
                if not self._parallel:
                    continue
            given.append(event)
        return given

    def _last_events(self, outcome: Outcome) -> list[ChatEvent]:
        events = self._with_logprobs(self._parser.finish())
        if self._logprobs:
            events.append(TextDelta("", tuple(self._logprobs)))
        reason: Literal["stop", "length", "tool_calls"] = "stop"
        if outcome.reason in ("length", "context"):
            reason = "length"
        elif self._parser.num_calls:
            reason = "tool_calls"
        stats = outcome.stats
        return [
            *events,
            ChatEnd(
                reason,
                outcome.stop_text,
                stats.prompt_tokens,
                stats.cached_tokens,
                stats.generated_tokens,
                self._reasoning_tokens,
                outcome,
            ),
        ]
