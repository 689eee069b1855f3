"""Tool calls that a request asks for are calls, in the model's own form, and nothing else."""

import json
import re
from functools import partial

import pytest
from grammars import allowed_ids, demo_tokens, qwen_tokens, random_answer, spell, text_of

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.server.answer_grammar import constraint_for
from subspec.runtime.server.answer_parser import AnswerParser
from subspec.runtime.server.call_grammar import (
    HERMES,
    LLAMA,
    MISTRAL_ARGS,
    MISTRAL_LIST,
    QWEN_XML,
)
from subspec.runtime.server.chat_events import NamedTool, OutputFormat, ToolCallDelta
from subspec.runtime.server.tools.formats import XML

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}


def tool(name: str, parameters=WEATHER, strict: bool = True) -> dict:
    return {
        "type": "function",
        "function": {"name": name, "parameters": parameters, "strict": strict},
    }


TOOLS = [tool("get_weather"), tool("nothing", {"type": "object", "additionalProperties": False})]
asking = partial(constraint_for, tools=TOOLS)


def check_arguments(name: str, arguments: dict) -> None:
    if name == "nothing":
        assert arguments == {}
        return
    assert name == "get_weather"
    assert {"city", "unit"} <= set(arguments) <= {"city", "unit", "days"}
    assert isinstance(arguments["city"], str)
    assert arguments["unit"] in ("celsius", "fahrenheit")
    assert arguments.get("days", 1) in range(1, 10)


def read_calls(form, text: str) -> list[tuple[str, dict]]:
    """By the book, so that a call that is nearly right fails."""
    if form is HERMES:
        whole = r"<tool_call>\n(.*?)\n</tool_call>"
        parts = re.split(r"(?<=</tool_call>)\n(?=<tool_call>)", text)
        calls = [json.loads(re.fullmatch(whole, part, re.DOTALL).group(1)) for part in parts]
    elif form is MISTRAL_LIST:
        assert text.startswith("[TOOL_CALLS]")
        calls = json.loads(text.removeprefix("[TOOL_CALLS]"))
    else:
        assert form is LLAMA
        calls, rest = [], text
        while rest:
            call, end = json.JSONDecoder().raw_decode(rest)
            calls.append({"name": call["name"], "arguments": call["parameters"]})
            assert rest[end : end + 2] in ("", "; ")
            rest = rest[end + 2 :]
    assert all(list(call) == ["name", "arguments"] for call in calls)
    return [(call["name"], call["arguments"]) for call in calls]


@pytest.mark.parametrize("form", [HERMES, LLAMA, MISTRAL_LIST])
@pytest.mark.parametrize("parallel", [False, True])
def test_required_calls_are_calls_of_the_tools(form, parallel):
    model, counts, names = qwen_tokens(), set(), set()
    for seed in range(12):
        one = asking(model, tool_choice="required", call_form=form, parallel_tool_calls=parallel)
        ids = random_answer(one, model, seed)
        assert ids is not None
        calls = read_calls(form, text_of(model, ids))
        counts.add(len(calls))
        for name, arguments in calls:
            names.add(name)
            check_arguments(name, arguments)
    assert names == {"get_weather", "nothing"}
    assert (max(counts) > 1) == parallel
    assert min(counts) == 1


def test_a_named_tool_is_called_once_and_no_other_one():
    model = demo_tokens()
    for seed in range(5):
        one = asking(model, tool_choice=NamedTool("nothing"), call_form=HERMES)
        ids = random_answer(one, model, seed)
        assert ids is not None
        assert [name for name, _ in read_calls(HERMES, text_of(model, ids))] == ["nothing"]


def test_tags_that_are_tokens_are_said_as_tokens():
    model = qwen_tokens()
    one = asking(model, tool_choice="required", call_form=HERMES, parallel_tool_calls=False)
    assert allowed_ids(one) == [model.special["<tool_call>"]]
    ids = random_answer(one, model, 0)
    assert ids is not None
    assert ids[-1] == model.special["</tool_call>"]


def test_calls_in_elements_have_values_of_the_right_kinds():
    model = qwen_tokens()
    value = r"<parameter={}>\n(.*?)\n</parameter>\n"
    form = re.compile(
        r"<tool_call>\n<function=get_weather>\n"
        + value.format("city")
        + value.format("unit")
        + f"(?:{value.format('days')})?"
        + r"</function>\n</tool_call>",
        re.DOTALL,
    )
    ended = 0
    for seed in range(12):
        one = asking(
            model,
            tool_choice=NamedTool("get_weather"),
            call_form=QWEN_XML,
            parallel_tool_calls=False,
        )
        start = "<tool_call>\n<function=get_weather>\n<parameter=city>\nOs lo\n</parameter>\n"
        first = spell(model, start)
        for token in first:
            assert token in allowed_ids(one)
            one.push(token)
        ids = random_answer(one, model, seed)
        assert ids is not None
        found = form.fullmatch(text_of(model, first + ids))
        assert found
        city, unit, days = found.groups()
        check_arguments("get_weather", {"city": city, "unit": unit, "days": int(days or 1)})
        ended += days is not None
    assert 0 < ended < 12


COLOR = {"type": "string", "enum": ["red", "light blue"]}
SIZE = {"type": "integer"}


@pytest.mark.parametrize(
    ("schema", "values", "refused"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ["Os lo", '"', None], []),
        ({"type": ["string", "null"]}, ["Os lo", None], []),
        ({"$ref": "#/$defs/Color"}, ["red", "light blue"], ['"red"', "green", "null"]),
        ({"allOf": [{"$ref": "#/$defs/Color"}], "default": "red"}, ["red"], ['"red"', "1"]),
        (
            {"anyOf": [{"$ref": "#/$defs/Color"}, {"type": "null"}]},
            ["light blue", None],
            ['"red"', "green", "1"],
        ),
        (
            {"anyOf": [COLOR, {"$ref": "#/$defs/Size"}, {"type": "array", "items": SIZE}]},
            ["red", 12, [1, 2]],
            ['"red"', "1.5", '["a"]', "null"],
        ),
        ({"enum": ["a", None, 3]}, ["a", None, 3], ['"a"', "4"]),
        ({"const": "a"}, ["a"], ['"a"', "b"]),
        ({"$ref": "#/$defs/Size"}, [1], ['"1"', "x"]),
        ({"anyOf": [SIZE, {"type": "null"}]}, [1, None], ["x", '"x"']),
        ({"description": "without a type"}, ["Paris", '"Paris"', ["a"]], []),
        (True, ["Paris"], []),
    ],
)
def test_a_string_in_an_element_stands_as_it_is_wherever_its_schema_says_so(
    schema, values, refused
):
    """What the grammar lets a model write is read as the value that was meant."""
    parameters = {
        "type": "object",
        "properties": {"q": schema},
        "required": ["q"],
        "$defs": {"Color": COLOR, "Size": SIZE},
    }
    tools = [tool("f", parameters)]
    model = qwen_tokens()

    def written(text: str) -> str | None:
        call = f"<tool_call>\n<function=f>\n<parameter=q>\n{text}\n</parameter>\n"
        call += "</function>\n</tool_call>"
        one = constraint_for(model, tools=tools, tool_choice=NamedTool("f"), call_form=QWEN_XML)
        for token in spell(model, call):
            if token not in allowed_ids(one):
                return None
            one.push(token)
        return call

    for value in values:
        call = written(value if isinstance(value, str) else json.dumps(value))
        assert call is not None, value
        parser = AnswerParser(None, False, XML, tools)
        events = [*parser.feed(call), *parser.finish()]
        said = "".join(one.arguments for one in events if isinstance(one, ToolCallDelta))
        assert json.loads(said) == {"q": value}
    assert [text for text in refused if written(text)] == []


def test_the_newer_mistral_form_has_names_and_arguments():
    model = demo_tokens()
    one = asking(model, tool_choice="required", call_form=MISTRAL_ARGS, parallel_tool_calls=False)
    ids = random_answer(one, model, 0)
    assert ids is not None
    found = re.fullmatch(r"\[TOOL_CALLS\](\w+)\[ARGS\](.*)", text_of(model, ids), re.DOTALL)
    assert found
    check_arguments(found[1], json.loads(found[2]))


@pytest.mark.parametrize(("form", "tokens"), [(HERMES, qwen_tokens), (LLAMA, demo_tokens)])
def test_a_call_of_a_strict_tool_in_free_text_is_held_to_its_schema(form, tokens):
    """The tag is a token of one model, and text of the other."""
    model = tokens()
    one = asking(model, call_form=form)
    for token in spell(model, 'Let me see, { "a": 1 }. ' + form.begin):
        assert token in allowed_ids(one)
        one.push(token)
    wrong = one.allowed()[spell(model, "x")[0]]
    assert not wrong
    rest = random_answer(one, model, 3)
    assert rest is None or '"' in text_of(model, rest)


def test_tools_that_are_not_strict_leave_an_answer_free():
    assert constraint_for(demo_tokens(), tools=[tool("a", strict=False)], call_form=HERMES) is None
    assert constraint_for(demo_tokens(), tools=TOOLS) is None
    assert asking(demo_tokens(), tool_choice="none", call_form=HERMES) is None
    assert constraint_for(demo_tokens()) is None


def test_with_an_output_format_the_answer_has_it_or_is_a_call():
    model, kinds = qwen_tokens(), set()
    for seed in range(12):
        one = asking(model, OutputFormat("regex", "yes|no"), call_form=HERMES)
        ids = random_answer(one, model, seed)
        assert ids is not None
        text = text_of(model, ids)
        kinds.add(text in ("yes", "no"))
        if text not in ("yes", "no"):
            assert read_calls(HERMES, text)
    assert kinds == {True, False}


def test_a_loose_tool_may_have_keywords_that_are_not_enforced():
    loose = tool("a", {"type": "object", "properties": {"b": {"not": {}}}}, strict=False)
    strict = tool("a", {"type": "object", "properties": {"b": {"not": {}}}})
    form = {"tool_choice": "required", "call_form": HERMES}
    assert constraint_for(demo_tokens(), tools=[loose], **form) is not None
    with pytest.raises(SubspecError, match="the schema of a tool cannot be used: .*not"):
        constraint_for(demo_tokens(), tools=[strict], **form)


@pytest.mark.parametrize(
    ("choice", "form", "tools", "words"),
    [
        ("required", None, TOOLS, "there is no grammar for this model's tool calls"),
        ("required", HERMES, [], "tool_choice is required, but there are no tools"),
        (NamedTool("x"), HERMES, TOOLS, "'x', expected one of: get_weather, nothing"),
    ],
)
def test_a_choice_that_cannot_be_honoured_is_a_sentence(choice, form, tools, words):
    with pytest.raises(SubspecError, match=words) as caught:
        constraint_for(demo_tokens(), tools=tools, tool_choice=choice, call_form=form)
    assert caught.value.exit_code == Exit.USAGE


@pytest.mark.parametrize("parameters", [{"properties": [1]}, {"required": "a"}])
def test_a_schema_that_is_none_is_refused_in_elements_too(parameters):
    with pytest.raises(SubspecError, match="the schema of a tool cannot be used"):
        constraint_for(
            demo_tokens(),
            tools=[tool("a", parameters)],
            tool_choice="required",
            call_form=QWEN_XML,
        )
