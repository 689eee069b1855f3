"""Whatever a model writes where calls may be, what is told of it can be sent to a client."""

import json
import random
import re
from typing import Any

import pytest

from subspec.runtime.server.answer_parser import AnswerParser
from subspec.runtime.server.chat_events import ChatEvent, ToolCallDelta, ToolCallStart
from subspec.runtime.server.responses_tools import custom_input
from subspec.runtime.server.tools.formats import (
    GEMMA_4,
    HERMES,
    LLAMA,
    MISTRAL_ARGS,
    MISTRAL_LIST,
    XML,
    ToolFormat,
)
from subspec.runtime.server.tools.json_text import MAX_DEPTH, arguments_object
from subspec.runtime.text.reasoning import THINK

FORMATS = (HERMES, XML, LLAMA, MISTRAL_LIST, MISTRAL_ARGS, GEMMA_4)
PROPERTIES = {"s": {"type": "string"}, "n": {"type": "number"}, "o": {"type": "object"}, "any": {}}
PARAMETERS = {"type": "object", "properties": PROPERTIES}
TOOLS = ({"type": "function", "function": {"name": "f", "parameters": PARAMETERS}},)
HALVES = ("\\ud83d", "\\uDE42", "\\ud83d\\ude42")
JUNK = (
    *HALVES, "\\", "\\u", "\\ud8", "\\\\ud83d", '"', '"', "{", "}", "[", "]", ":", ",", " ", "\n",
    "NaN", "Infinity", "-Infinity", "1e999", "-1", "00", "true", "None", "null", "é🙂", "\x00", "x",
    "9" * 70, "[" * 120, '{"a":' * 120, "call:", "call:f{", "s:", "o:", '"s": ', '"s": 1, "s": 2,',
    '{"name": "f", "arguments": {', '{"arguments": {"s": "', '{"name": "', '"arguments": ',
    '"parameters": {', "f", "<function=f>", "<parameter=s>", "<parameter=o>\n", "<parameter=n>",
    "</parameter>", "</function>", "f[ARGS]{", "f{", "[CALL_ID]1", "<think>", "</think>", "```json",
)  # fmt: skip

BEGUN = {
    "hermes": '<tool_call>{"name": "f", "arguments": {',
    "xml": "<function=f><parameter=o>\n",
    "llama": '{"name": "f", "parameters": {',
    "mistral list": '[TOOL_CALLS][{"name": "f", "arguments": {',
    "mistral args": "[TOOL_CALLS]f[ARGS]{",
    "gemma": "<|tool_call>call:f{",
}


def events_of(form: ToolFormat, text: str, chance: random.Random) -> list[ChatEvent]:
    parser = AnswerParser(THINK, False, form, TOOLS)
    events, at = list[ChatEvent](), 0
    while at < len(text):
        size = chance.choice((1, 2, 7, 40, 5000))
        events += parser.feed(text[at : at + size])
        at += size
    return events + parser.finish()


def arguments_in(events: list[ChatEvent]) -> list[str]:
    found = list[str]()
    for event in events:
        if isinstance(event, ToolCallStart):
            found.append("")
        elif isinstance(event, ToolCallDelta):
            found[event.index] += event.arguments
    return found


def sent(value: Any) -> bytes:
    """As starlette's JSONResponse does."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.kind)
def test_nothing_that_a_model_writes_breaks_a_response(form: ToolFormat) -> None:
    chance, num_calls = random.Random(form.kind), 0
    own = (*form.marks, *form.begins, *form.begins, form.end or "")
    for _ in range(250):
        pieces = chance.choices((*JUNK, *own * 4), k=chance.randint(1, 30))
        text = chance.choice(("", form.begins[0], BEGUN[form.kind])) + "".join(pieces)
        events = events_of(form, text, chance)
        for event in events:
            sent(event.__dict__)
        for arguments in arguments_in(events):
            num_calls += 1
            sent(arguments_object(arguments))
            sent(custom_input(arguments))
        again = arguments_in(events_of(form, text, chance))
        assert again == arguments_in(events), "it depends on where the text was cut"
    assert num_calls > 50


def nasty_value(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.choice(("text", "number", "word", "list", "object")[: 5 if depth < 3 else 3])
    if kind == "text":
        return "".join(chance.choices(["\ud83d", "\ude42", "é", "\n", '"', "\\", "</x>"], k=4))
    if kind == "number":
        return chance.choice((0, -3, 2.5, 1e300, 10**30))
    if kind == "word":
        return chance.choice((True, False, None))
    inner = [nasty_value(chance, depth + 1) for _ in range(chance.randint(0, 3))]
    return inner if kind == "list" else {f"k{n}\ud83d": one for n, one in enumerate(inner)}


def without_halves(value: Any) -> Any:
    """By another way than the parsers'."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "�", json.loads(json.dumps(value)))
    if isinstance(value, dict):
        return {without_halves(key): without_halves(one) for key, one in value.items()}
    return [without_halves(one) for one in value] if isinstance(value, list) else value


WRITTEN = {
    "hermes": (HERMES, '<tool_call>{{"name": "f", "arguments": {0}}}</tool_call>'),
    "hermes, the name last": (HERMES, '<tool_call>{{"arguments": {0}, "name": "f"}}</tool_call>'),
    "hermes, as a text": (HERMES, '<tool_call>{{"name": "f", "arguments": {1}}}</tool_call>'),
    "xml": (XML, "<function=f><parameter=o>\n{0}\n</parameter></function>"),
    "llama": (LLAMA, '{{"name": "f", "parameters": {0}}}'),
    "mistral": (MISTRAL_ARGS, "[TOOL_CALLS]f[ARGS]{0}"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_arguments_are_json_that_has_what_was_written_but_no_half_characters(name: str) -> None:
    form, pattern = WRITTEN[name]
    chance = random.Random(name)
    for _ in range(150):
        value = {"a": nasty_value(chance), "b": nasty_value(chance)}
        written = json.dumps(value)
        text = pattern.format(written, json.dumps(written))
        [arguments] = arguments_in(events_of(form, text, chance))
        found = json.loads(arguments)
        assert (found["o"] if name == "xml" else found) == without_halves(value)
        assert sent(arguments_object(arguments)) == sent(found)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_number_that_json_has_not_is_never_made_one(name: str, number: str) -> None:
    form, pattern = WRITTEN[name]
    written = f'{{"a": {number}}}'
    text = pattern.format(written, json.dumps(written))
    events = events_of(form, text, random.Random(0))
    assert events, "nothing is lost"
    for arguments in arguments_in(events):
        sent(arguments_object(arguments))


def test_of_two_values_for_one_name_the_last_one_counts() -> None:
    for form, text in (
        (HERMES, '<tool_call>{"name": "f", "arguments": {"s": "1", "s": "2"}}</tool_call>'),
        (XML, "<function=f><parameter=s>1</parameter><parameter=s>2</parameter></function>"),
        (GEMMA_4, '<|tool_call>call:f{s:<|"|>1<|"|>,s:<|"|>2<|"|>}<tool_call|>'),
    ):
        [arguments] = arguments_in(events_of(form, text, random.Random(0)))
        assert arguments_object(arguments) == {"s": "2"}


@pytest.mark.parametrize("depth", [MAX_DEPTH - 2, MAX_DEPTH + 1, 3000, 200_000])
def test_what_is_nested_too_deep_is_given_as_a_text(depth: int) -> None:
    value = '{"o":' + "[" * depth + "]" * depth + "}"
    found = arguments_object(value)
    assert (found == json.loads(value)) if depth < MAX_DEPTH else ("unfinished_arguments" in found)
    sent(found)
