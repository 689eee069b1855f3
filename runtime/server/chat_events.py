"""A chat request and the events of its answer, in one form for every API. openai_chat.py,
responses.py and messages.py convert their JSON to and from these; chat.py produces them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from subspec.runtime.model.sampling import SamplingParams, TokenLogprobs
from subspec.runtime.server.generation import Outcome

JSONValue = Any  # what json.loads returns


@dataclass(frozen=True)
class NamedTool:
    """A tool_choice that forces this tool."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedTool


@dataclass(frozen=True)
class OutputFormat:
    """Required form of the answer's text."""

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    value: JSONValue = None  # the schema, or the grammar's text


@dataclass(frozen=True)
class ChatRequest:
    """A request in one form for all APIs.

    messages: in OpenAI's chat format; contents are str or None, text parts already joined. tools:
        {"type": "function", "function": {"name", "description", "parameters"}}.
    """

    messages: tuple[dict[str, JSONValue], ...]
    sampling: SamplingParams
    max_tokens: int | None = None  # None: the rest of the context
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    tools: tuple[dict[str, JSONValue], ...] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    output_format: OutputFormat | None = None
    reasoning_effort: str | None = None  # as the template knows it
    enable_thinking: bool | None = None  # None: the template's own default
    # Whether special tokens are part of the text: one at the end of the answer, and all others.
    ignore_end: bool = False


@dataclass(frozen=True)
class ReasoningDelta:
    """Text of the model's thinking, without its tags."""

    text: str


@dataclass(frozen=True)
class TextDelta:
    """Text of the answer. logprobs: of the tokens decoded since the last delta, if requested."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class ToolCallStart:
    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of the call's arguments; together they are a JSON object."""

    index: int
    arguments: str


@dataclass(frozen=True)
class ChatEnd:
    reason: Literal["stop", "length", "tool_calls"]
    stop_text: str | None  # which of the request's stop texts ended it
    prompt_tokens: int
    cached_tokens: int  # of the prompt
    completion_tokens: int
    reasoning_tokens: int
    outcome: Outcome


ChatEvent = ReasoningDelta | TextDelta | ToolCallStart | ToolCallDelta | ChatEnd


class ChatAnswer(Protocol):
    """Answer to a submitted chat request. Iterate it to the end, or cancel it."""

    def __aiter__(self) -> AsyncIterator[ChatEvent]:
        """Yield events. Raises SubspecError if the engine fails."""
        ...

    @property
    def queue_position(self) -> int:
        """As `Generation.queue_position`."""
        ...

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """Number of the answer's tokens decoded so far."""
        ...

    def cancel(self) -> None:
        """As `Generation.cancel`."""
        ...


# Renders the template, tokenizes, compiles a grammar and submits. Raises SubspecError (USAGE for
# what the client can change) and QueueFull.
Chat = Callable[[ChatRequest], Awaitable[ChatAnswer]]
CountTokens = Callable[[ChatRequest], Awaitable[int]]
