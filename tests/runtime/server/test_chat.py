"""A chat: from messages to the engine's request, and from its text to events."""

import asyncio
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from chat_templates import (
    FUNCTION_GEMMA,
    GEMMA4,
    LLAMA3,
    MISTRAL,
    NO_SYSTEM,
    QWEN3,
    QWEN35,
    QWEN35_NOW,
    family_tokenizer,
)
from scripted_generator import Script, ScriptedGenerator

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.footprint import TOKENS_BEHIND_CHECKPOINT
from subspec.runtime.model.constraint import Constraint
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.server.chat import ChatModel, Prompt, chat, count_tokens, open_chat_model
from subspec.runtime.server.chat_events import (
    ChatEnd,
    ChatEvent,
    ChatRequest,
    NamedTool,
    OutputFormat,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
)
from subspec.runtime.server.generation import PromptTooLong, QueueFull
from subspec.runtime.server.tools.formats import HERMES, ToolFormat
from subspec.runtime.text.reasoning import THINK
from subspec.runtime.text.tokenizer import ChatTokenizer

CONTEXT = 4096
HI = ({"role": "user", "content": "Hi"},)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
STRICT: dict[str, Any] = {**TOOL, "function": {**TOOL["function"], "strict": True}}
UNKNOWN_FORM = "{{ tools }}{{ messages }}"
ARGUMENTS = '{"city": "Paris"}'
JSON_CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
GEMMA_CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
Opened = Callable[..., ChatModel]


@pytest.fixture(scope="module")
def opened() -> Iterator[Opened]:
    """Opens models with a template, each of them once, and closes them."""
    models = dict[str | None, ChatModel]()

    def open_model(template: str | None = QWEN3, context: int = CONTEXT) -> ChatModel:
        if template not in models:
            tokenizer = family_tokenizer(template)
            end = tokenizer.tokenizer.token_to_id("<|im_end|>")
            size = tokenizer.tokenizer.get_vocab_size()
            models[template] = open_chat_model(tokenizer, CONTEXT, size, frozenset({end}))
        return replace(models[template], context=context)

    yield open_model
    for model in models.values():
        model.close()


def asked(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    return ChatRequest(messages or HI, SamplingParams(), **fields)


def generator_of(model: ChatModel, *scripts: str | Script, seed: int = 0) -> ScriptedGenerator:
    return ScriptedGenerator(model.tokenizer, scripts or ("ok",), model.context, seed)


async def events_of(
    request: ChatRequest, model: ChatModel, generator: ScriptedGenerator
) -> list[ChatEvent]:
    return [event async for event in await chat(request, model, generator)]


def answered(
    request: ChatRequest, model: ChatModel, *scripts: str | Script, seed: int = 0
) -> list[ChatEvent]:
    return asyncio.run(events_of(request, model, generator_of(model, *scripts, seed=seed)))


def text_of(events: list[ChatEvent], kind: type = TextDelta) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def calls_of(events: list[ChatEvent]) -> list[tuple[str, Any]]:
    found = []
    for one in (event for event in events if isinstance(event, ToolCallStart)):
        deltas = (d for d in events if isinstance(d, ToolCallDelta) and d.index == one.index)
        found.append((one.name, json.loads("".join(delta.arguments for delta in deltas))))
    return found


def end_of(events: list[ChatEvent]) -> ChatEnd:
    assert isinstance(events[-1], ChatEnd)
    assert not any(isinstance(event, ChatEnd) for event in events[:-1])
    return events[-1]


def prompt_of(request: ChatRequest, model: ChatModel) -> str:
    generator = generator_of(model)
    asyncio.run(events_of(request, model, generator))
    ids = generator.requests[0].prompt_ids
    text = model.tokenizer.tokenizer.decode([*ids], skip_special_tokens=False)
    assert isinstance(text, str)
    return text


# The request


def test_an_answer_is_the_models_text(opened: Opened) -> None:
    for seed in range(3):
        model = opened()
        events = answered(asked(), model, "Good day. 🙂\n", seed=seed)
        assert text_of(events) == "Good day. 🙂\n"
        end = end_of(events)
        assert (end.reason, end.stop_text, end.reasoning_tokens) == ("stop", None, 0)
        assert end.completion_tokens == end.outcome.stats.generated_tokens > 1
        assert end.prompt_tokens == end.outcome.stats.prompt_tokens > 3


def test_the_engine_is_asked_for_what_the_client_asks(opened: Opened) -> None:
    model, sampling = opened(), SamplingParams(0.5, seed=7)
    generator = generator_of(model)
    request = replace(asked(), sampling=sampling, max_tokens=9, stop=("x",), logprobs=2)
    asyncio.run(events_of(request, model, generator))
    asyncio.run(events_of(asked(ignore_end=True), model, generator))
    first, second = generator.requests
    assert first.params.max_tokens == 9 and first.stop == ("x",) and first.params.logprobs == 2
    assert first.params.sampling == sampling and first.params.stop_token_ids == model.end_tokens
    assert second.params.max_tokens == CONTEXT - len(second.prompt_ids)
    assert second.params.stop_token_ids == frozenset()
    assert list(first.prompt_ids) == model.tokenizer.chat_ids([*HI])


def test_a_model_without_a_template_continues_the_messages(opened: Opened) -> None:
    assert prompt_of(asked(), opened(None)) == "Hi"


def test_a_prompt_beyond_the_context_is_told_with_both_numbers(opened: Opened) -> None:
    model = opened(context=20)
    generator = generator_of(model)
    long = asked({"role": "user", "content": "word " * 50})
    with pytest.raises(PromptTooLong, match="tokens, expected at most 19") as failed:
        asyncio.run(events_of(long, model, generator))
    assert failed.value.context == 20 and failed.value.num_tokens is None
    assert failed.value.exit_code == Exit.USAGE and not generator.requests
    assert asyncio.run(count_tokens(long, model)) > 50
    shorter = asked({"role": "user", "content": "word " * 14})
    with pytest.raises(PromptTooLong) as failed:
        asyncio.run(events_of(shorter, model, generator))
    assert failed.value.num_tokens == asyncio.run(count_tokens(shorter, model))
    endless = asked({"role": "user", "content": "word " * 600_000})
    with pytest.raises(SubspecError, match="more than 262144 tokens, the maximum that is counted"):
        asyncio.run(count_tokens(endless, model))


def test_calls_and_results_reach_the_template_as_it_takes_them(opened: Opened) -> None:
    call = {"id": "call_0123456789", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
    messages = (
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0123456789", "content": "sunny"},
    )
    prompt = prompt_of(asked(*messages, tools=(TOOL,)), opened(QWEN3))
    assert JSON_CALL in prompt and "sunny" in prompt and '"description": "Weather' in prompt
    prompt = prompt_of(asked(*messages, tools=(TOOL,)), opened(MISTRAL))
    assert f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}</s>" in prompt
    assert '<|"|>Paris<|"|>}<tool_call|>' in prompt_of(asked(*messages), opened(GEMMA4))


def call(identifier: str, name: str) -> dict[str, Any]:
    return {"id": identifier, "function": {"name": name, "arguments": "{}"}}


def result(identifier: str, **fields: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identifier, "content": "seen", **fields}


def test_a_result_has_the_name_of_its_call(opened: Opened) -> None:
    messages = (
        *HI,
        {"role": "assistant", "tool_calls": [call("a", "one"), call("b", "two")]},
        *(result("b"), result("a"), result("unknown", name="three")),
        {"role": "assistant", "tool_calls": [call("a", "four")]},
        result("a"),
    )
    prompt = prompt_of(asked(*messages), opened(FUNCTION_GEMMA))
    assert re.findall("response:([a-z]+)", prompt) == ["two", "one", "three", "four"]


def test_calls_of_one_turn_are_told_one_by_one_where_the_template_refuses_several(
    opened: Opened,
) -> None:
    calls = [call("a", "one"), call("b", "two"), call("c", "three")]
    messages = (
        *HI,
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        *(result(one, content=f"of {one}") for one in ("c", "a", "x", "b")),
        *HI,
        {"role": "assistant", "tool_calls": calls[:2]},
        *HI,
    )
    prompt = prompt_of(asked(*messages, tools=(TOOL,)), opened(LLAMA3))
    said = re.findall(r"I look\.|of \w|(?<=\{\"name\": \")\w+|Hi", prompt.partition("[")[0])
    assert said == [
        *("Hi", "I look.", "one", "of a", "two", "of b", "three", "of c", "of x"),
        *("Hi", "one", "two", "Hi"),
    ]


def test_what_a_user_says_after_a_result_ends_it_where_the_template_refuses_that_turn(
    opened: Opened,
) -> None:
    def prompt(model: ChatModel) -> str:
        return prompt_of(asked(*messages, tools=(TOOL,)), model)

    messages = (
        *HI,
        {"role": "assistant", "tool_calls": [call("a", "one"), call("b", "two")]},
        *(result("a"), result("b", content=""), *HI, *HI),
        {"role": "assistant", "content": "Yes."},
        *HI,
    )
    assert prompt(opened(MISTRAL)).endswith(
        "[TOOL_RESULTS]seen[/TOOL_RESULTS][TOOL_RESULTS]Hi\n\nHi[/TOOL_RESULTS]"
        "Yes.</s>[INST]Hi[/INST]"
    )
    assert "tool\nseen<|im_end|>\n<|im_start|>tool\n<|im_end|>\n<|im_start|>user\nHi" in prompt(
        opened(QWEN3)
    )


def test_a_model_whose_template_refuses_several_calls_makes_one(opened: Opened) -> None:
    seen = list[ChatRequest]()

    async def make(request: ChatRequest, form: ToolFormat | None, prompt: Prompt) -> None:
        seen.append(request)

    async def ask() -> list[ChatEvent]:
        request = asked(tools=(TOOL,), tool_choice="required")
        return [event async for event in await chat(request, model, generator, make)]

    model = opened(LLAMA3)
    one = f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}'
    generator = generator_of(model, f"{one}; {one}")
    assert calls_of(asyncio.run(ask())) == [("get_weather", {"city": "Paris"})]
    assert not seen[0].parallel_tool_calls


def test_calls_of_a_form_that_is_not_known_are_text(opened: Opened) -> None:
    model, call = opened(UNKNOWN_FORM), '<use tool="get_weather">Paris</use>'
    assert "get_weather" in prompt_of(asked(tools=(TOOL,)), model)
    events = answered(asked(tools=(TOOL,)), model, call)
    assert text_of(events) == call and end_of(events).reason == "stop"


def test_a_call_that_was_cut_off_may_be_sent_back(opened: Opened) -> None:
    call = {"id": "c", "function": {"name": "get_weather", "arguments": '{"city": "Par'}}
    messages = (*HI, {"role": "assistant", "content": None, "tool_calls": [call]}, *HI)
    prompt = prompt_of(asked(*messages, tools=(TOOL,)), opened(QWEN3))
    assert r'"arguments": {"unfinished_arguments": "{\"city\": \"Par"}}' in prompt


def test_tools_are_not_told_if_none_may_be_called(opened: Opened) -> None:
    model = opened()
    request = asked(tools=(TOOL,), tool_choice="none")
    assert "get_weather" not in prompt_of(request, model)
    assert text_of(answered(request, model, JSON_CALL)) == JSON_CALL


def test_the_template_does_not_see_that_a_tool_is_strict(opened: Opened) -> None:
    model = opened()
    assert prompt_of(asked(tools=(STRICT,)), model) == prompt_of(asked(tools=(TOOL,)), model)


def test_thinking_is_chosen_by_the_request(opened: Opened) -> None:
    model = opened(QWEN35)
    assert prompt_of(asked(), model).endswith("<think>\n")
    closed = prompt_of(asked(enable_thinking=False), model)
    assert closed.endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("thinking", [True, False])
def test_a_turn_without_the_thinking_of_the_last_one_begins_behind_a_checkpoint(
    opened: Opened, thinking: bool
) -> None:
    """Of the states of delta nets, which cannot be taken back token by token."""
    model = opened(QWEN35_NOW)
    said = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm, hm."}
    more = {"role": "user", "content": "And now?"}
    first, second = (
        model.tokenizer.rendered_ids(prompt_of(asked(*turns, enable_thinking=thinking), model))
        for turns in (HI, (*HI, said, more))
    )
    shared = len(os.path.commonprefix([first, second]))
    assert len(first) - TOKENS_BEHIND_CHECKPOINT <= shared < len(first)


@pytest.mark.parametrize(
    ("template", "request_", "word"),
    [
        (NO_SYSTEM, asked(tools=(TOOL,)), "^tools cannot be honoured: the model's chat template"),
        (
            UNKNOWN_FORM,
            asked(tools=(TOOL,), tool_choice="required"),
            "^tool_choice cannot .* is not known",
        ),
        (UNKNOWN_FORM, asked(tools=(STRICT,)), "^a strict tool cannot .* is not known"),
        (NO_SYSTEM, asked({"role": "system", "content": "x"}, *HI), r"messages\[0\] has the role"),
        (NO_SYSTEM, asked({"role": "tool", "content": "x"}), r"messages\[0\] belongs to a tool"),
        (QWEN3, asked({"role": "wizard", "content": "x"}), r"messages\[0\].role is 'wizard'"),
        (QWEN3, asked(output_format=OutputFormat("json_object")), "output_format cannot be"),
        (QWEN3, asked(tools=(TOOL,), tool_choice=NamedTool("a")), "tool_choice cannot be"),
        (QWEN3, asked({"role": "user", "content": "\ud800"}), "half of a surrogate pair"),
        ("{{ raise_exception('No.') }}", asked(), "refuses this: No."),
    ],
)
def test_what_cannot_be_honoured_is_named(
    opened: Opened, template: str, request_: ChatRequest, word: str
) -> None:
    model = opened(template)
    generator = generator_of(model)
    with pytest.raises(SubspecError, match=word) as failed:
        asyncio.run(events_of(request_, model, generator))
    assert failed.value.exit_code == Exit.USAGE and not generator.requests


def test_a_full_queue_and_a_failing_engine_reach_the_caller(opened: Opened) -> None:
    model = opened()
    generator = generator_of(model, Script("ab", error=SubspecError(Exit.RESOURCES, "disk gone")))
    with pytest.raises(SubspecError, match="disk gone"):
        asyncio.run(events_of(asked(), model, generator))
    generator.full = QueueFull(8, 17)
    with pytest.raises(QueueFull):
        asyncio.run(events_of(asked(), model, generator))


def test_a_constraint_is_made_from_the_request_and_reaches_the_engine(opened: Opened) -> None:
    class Anything:
        def allowed(self) -> None: ...
        def push(self, token: int) -> None: ...
        def rollback(self, num_tokens: int) -> None: ...

    model, seen = opened(), list[tuple[ChatRequest, ToolFormat | None, Prompt]]()
    constraint = Anything()

    async def make(
        request: ChatRequest, form: ToolFormat | None, prompt: Prompt
    ) -> Constraint | None:
        seen.append((request, form, prompt))
        return constraint

    async def ask(request: ChatRequest) -> None:
        async for _ in await chat(request, model, generator, make):
            pass

    generator = generator_of(model)
    request = asked(tools=(TOOL,), tool_choice="required", enable_thinking=False)
    asyncio.run(ask(request))
    assert generator.requests[0].params.constraint is constraint
    assert seen[0][:2] == (request, HERMES)
    assert seen[0][2].reasoning is None and not seen[0][2].in_reasoning
    asyncio.run(ask(asked()))
    assert seen[1][1] is None and seen[1][2].reasoning == THINK


# The answer


@pytest.mark.parametrize("seed", range(3))
def test_reasoning_comes_apart_and_its_tokens_are_counted(opened: Opened, seed: int) -> None:
    for template, text in (
        (QWEN35, "Hm, hm.\n</think>\n\nYes."),
        (QWEN3, "<think>\nHm, hm.\n</think>\n\nYes."),
        (MISTRAL, "[THINK]Hm, hm.[/THINK]Yes."),
        (GEMMA4, "<|channel>thought\nHm, hm.<channel|>Yes."),
    ):
        model = opened(template)
        request = asked(logprobs=0, enable_thinking=True)
        events = answered(request, model, text, seed=seed)
        assert text_of(events, ReasoningDelta) == "Hm, hm." and text_of(events) == "Yes."
        encode = model.tokenizer.tokenizer.encode
        thought = text.removesuffix("Yes.").rstrip()
        count = len(encode(thought, add_special_tokens=False).ids)
        assert end_of(events).reasoning_tokens == count
        given = [one for e in events if isinstance(e, TextDelta) for one in e.logprobs]
        assert len(given) == end_of(events).completion_tokens - count - 1  # without the end token


def test_stop_texts_are_for_the_answer_not_for_reasoning_and_calls(opened: Opened) -> None:
    model = opened(QWEN35)
    call = JSON_CALL.replace("Paris", "stop")
    script = f"I stop?\n</think>\n\nLook. {call} then stop it"
    events = answered(asked(stop=("no", "stop"), tools=(TOOL,)), model, script)
    assert text_of(events, ReasoningDelta) == "I stop?" and text_of(events) == "Look.then "
    assert calls_of(events) == [("get_weather", {"city": "stop"})]
    assert end_of(events).stop_text == "stop"
    direct = answered(asked(stop=("stop",), enable_thinking=False), model, "Do stop it")
    assert text_of(direct) == "Do " and end_of(direct).reason == "stop"


def test_an_answer_that_speaks_of_marks_is_still_stopped(opened: Opened) -> None:
    for mark in ("<think>", "<tool_call>"):
        request = asked(stop=("Observation:",), tools=(TOOL,))
        said = f"<think>a</think>Use the {mark} tag. Observation: x. more"
        events = answered(request, opened(QWEN3), said)
        assert text_of(events) == f"Use the {mark} tag. "
        assert end_of(events).stop_text == "Observation:"


@pytest.mark.parametrize("seed", range(3))
def test_calls_are_told_as_calls(opened: Opened, seed: int) -> None:
    expected = ("get_weather", {"city": "Paris"})
    for template, script in (
        (QWEN3, f"Let me look.\n{JSON_CALL}\n{JSON_CALL}"),
        (
            QWEN35,
            "Hm.</think>Let me look.\n"
            + "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
            "</function>\n</tool_call>\n" * 2,
        ),
        (MISTRAL, "Let me look." + f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}" * 2),
        (
            GEMMA4,
            "Let me look." + '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>' * 2,
        ),
    ):
        model = opened(template)
        events = answered(asked(tools=(TOOL,)), model, script, seed=seed)
        assert calls_of(events) == [expected, expected]
        assert text_of(events) == "Let me look." and end_of(events).reason == "tool_calls"
        one = answered(asked(tools=(TOOL,), parallel_tool_calls=False), model, script, seed=seed)
        assert calls_of(one) == [expected]


def test_an_answer_that_is_cut_off_says_length(opened: Opened) -> None:
    model = opened()
    cut = answered(asked(tools=(TOOL,), max_tokens=30), model, JSON_CALL)
    assert end_of(cut).reason == "length" and end_of(cut).completion_tokens == 30
    context = answered(asked(), opened(context=30), "many words, " * 20)
    assert end_of(context).reason == "length"


@pytest.mark.parametrize("seed", range(4))
def test_every_tokens_logprobs_come_once_with_the_text(opened: Opened, seed: int) -> None:
    model, text = opened(), "Some text 🙂, a stop too."
    events = answered(asked(logprobs=1, stop=("nothing",)), model, text, seed=seed)
    ids = [one.token for e in events if isinstance(e, TextDelta) for one in e.logprobs]
    assert ids == model.tokenizer.tokenizer.encode(text, add_special_tokens=False).ids


def test_leaving_an_answer_cancels_it(opened: Opened) -> None:
    model = opened()
    generator = generator_of(model, Script("a b c d e f g h i", largest_round=1))

    async def leave() -> None:
        answer = await chat(asked(), model, generator)
        events = aiter(answer)
        await anext(events)
        await events.aclose()  # type: ignore[attr-defined]
        other = await chat(asked(), model, generator)
        other.cancel()
        assert other.queue_position == 0

    asyncio.run(leave())
    assert all(generation.cancelled for generation in generator.generations)


def test_a_slow_template_does_not_hold_up_the_event_loop(opened: Opened) -> None:
    busy = "{% for i in range(99999) %}{% for j in range(6) %}{% endfor %}{% endfor %}"
    model = opened(busy + QWEN3)
    longest = 0.0

    async def beat(done: asyncio.Event) -> None:
        nonlocal longest
        while not done.is_set():
            before = time.monotonic()
            await asyncio.sleep(0.005)
            longest = max(longest, time.monotonic() - before)

    async def both() -> None:
        done = asyncio.Event()
        beating = asyncio.create_task(beat(done))
        started = time.monotonic()
        await events_of(asked(), model, generator_of(model))
        waited = time.monotonic() - started
        done.set()
        await beating
        assert longest < waited / 2

    asyncio.run(both())


def test_closing_a_model_ends_its_threads_and_its_child() -> None:
    before = {*threading.enumerate()}
    tokenizer: ChatTokenizer = family_tokenizer(QWEN3)
    model = open_chat_model(tokenizer, CONTEXT, 4096, frozenset())
    asyncio.run(count_tokens(asked(), model))
    assert {*threading.enumerate()} - before
    model.close()
    assert not {*threading.enumerate()} - before
