"""Gemma's tool calls are said in its own form, and are what the schemas allow.

The templates' macro `format_argument` (Gemma 4) is re-stated in `as_gemma_writes`: grammar and
reader are compared with it, not with each other alone.
"""

import json
from functools import cache, partial

import pytest
from grammars import END, allowed_ids, demo_tokenizer, qwen_tokens, random_answer, spell, text_of
from tokenizers import AddedToken

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.server.answer_grammar import constraint_for
from subspec.runtime.server.answer_parser import AnswerParser
from subspec.runtime.server.call_grammar import FUNCTION_GEMMA, GEMMA_4
from subspec.runtime.server.chat_events import NamedTool, OutputFormat, ToolCallDelta, ToolCallStart
from subspec.runtime.server.grammar_tokens import GrammarTokens, read_grammar_tokens
from subspec.runtime.server.tools import formats

MARKS = {
    GEMMA_4: ["<|tool_call>", "<tool_call|>", '<|"|>'],
    FUNCTION_GEMMA: ["<start_function_call>", "<end_function_call>", "<escape>"],
}
READS = {GEMMA_4: formats.GEMMA_4, FUNCTION_GEMMA: formats.FUNCTION_GEMMA}
NESTED = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 1, "maxLength": 5},
        "Kind": {"enum": ["a b", "c,}", 3, None, True, ["x"], {"k": "v"}]},
        "stops": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {"$ref": "#/$defs/stop"},
        },
        "days": {"type": ["integer", "null"], "minimum": 1, "maximum": 9},
        "two words": {"type": "boolean"},
    },
    "required": ["title", "stops"],
    "additionalProperties": False,
    "$defs": {
        "stop": {
            "type": "object",
            "properties": {"city": {"const": "Oslo"}, "next": {"$ref": "#/$defs/stop"}},
            "required": ["city"],
            "additionalProperties": False,
        }
    },
}


@cache
def gemma_tokens(form=GEMMA_4) -> GrammarTokens:
    tokenizer = demo_tokenizer()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS[form]])
    return read_grammar_tokens(tokenizer, tokenizer.get_vocab_size(), (END,))


def tool(name: str, parameters, strict: bool = True) -> dict:
    return {
        "type": "function",
        "function": {"name": name, "parameters": parameters, "strict": strict},
    }


TOOLS = [tool("plan", NESTED), tool("nothing", {"type": "object", "additionalProperties": False})]
asking = partial(constraint_for, tools=TOOLS, tool_choice="required", call_form=GEMMA_4)


def as_gemma_writes(value, quote: str = '<|"|>') -> str:
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: key.lower())
        names = {key: f"{quote}{key}{quote}" if " " in key else key for key in keys}
        members = (f"{names[key]}:{as_gemma_writes(value[key], quote)}" for key in keys)
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(as_gemma_writes(one, quote) for one in value) + "]"
    return json.dumps(value)


def call_of(name: str, arguments: dict, form=GEMMA_4) -> str:
    return f"{form.begin}{name}{as_gemma_writes(arguments, form.quote)}{form.end}"


def read_calls(text: str, form=GEMMA_4) -> list[tuple[str, dict]]:
    parser = AnswerParser(None, False, READS[form], TOOLS)
    events = [*parser.feed(text), *parser.finish()]
    names, arguments = [], []
    for event in events:
        if isinstance(event, ToolCallStart):
            names.append(event.name)
            arguments.append("")
        else:
            assert isinstance(event, ToolCallDelta), event
            arguments[-1] += event.arguments
    return [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]


def takes(constraint, tokens: GrammarTokens, text: str) -> bool:
    """Whether the whole text may be said, and the answer may end after it."""
    for token in spell(tokens, text):
        if token not in (allowed_ids(constraint) or []):
            return False
        constraint.push(token)
    return END in (allowed_ids(constraint) or [])


def check_plan(arguments: dict) -> None:
    assert {"title", "stops"} <= set(arguments) <= set(NESTED["properties"])
    assert 1 <= len(arguments["title"]) <= 5
    assert arguments.get("Kind", 3) in NESTED["properties"]["Kind"]["enum"]
    assert arguments.get("days") in (None, *range(1, 10))
    assert isinstance(arguments.get("two words", True), bool)
    assert 1 <= len(arguments["stops"]) <= 2
    for stop in arguments["stops"]:
        while stop is not None:
            assert stop["city"] == "Oslo"
            assert set(stop) <= {"city", "next"}
            stop = stop.get("next")


@pytest.mark.parametrize("form", [GEMMA_4, FUNCTION_GEMMA])
def test_required_calls_are_what_the_template_would_write_of_them(form):
    tokens, names, counts = gemma_tokens(form), set(), set()
    for seed in range(12):
        ids = random_answer(asking(tokens, call_form=form), tokens, seed)
        assert ids is not None
        text = text_of(tokens, ids)
        calls = read_calls(text, form)
        assert text == "".join(call_of(name, arguments, form) for name, arguments in calls)
        counts.add(len(calls))
        for name, arguments in calls:
            names.add(name)
            if name == "plan":
                check_plan(arguments)
            else:
                assert arguments == {}
    assert names == {"plan", "nothing"}
    assert max(counts) > 1


GOOD = {"title": "Fjord", "stops": [{"city": "Oslo", "next": {"city": "Oslo"}}], "days": 3}
BAD = [
    {**GOOD, "title": ""},
    {**GOOD, "title": "Fjords"},
    {**GOOD, "days": 10},
    {**GOOD, "days": "3"},
    {**GOOD, "stops": []},
    {**GOOD, "stops": [{"city": "Rome"}]},
    {**GOOD, "stops": [{"city": "Oslo", "x": 1}]},
    {**GOOD, "Kind": "c"},
    {**GOOD, "more": 1},
    {"title": "Fjord"},
]


def test_arguments_that_the_schema_forbids_cannot_be_said():
    tokens = gemma_tokens()
    assert takes(asking(tokens), tokens, call_of("plan", GOOD))
    assert takes(asking(tokens), tokens, call_of("plan", {**GOOD, "Kind": {"k": "v"}}))
    assert takes(asking(tokens), tokens, call_of("plan", {**GOOD, "two words": True}))
    assert not takes(asking(tokens), tokens, call_of("other", {}))
    for arguments in BAD:
        assert not takes(asking(tokens), tokens, call_of("plan", arguments)), arguments


def test_one_call_where_one_is_asked_for():
    tokens, twice = gemma_tokens(), call_of("nothing", {}) * 2
    assert takes(asking(tokens), tokens, twice)
    assert not takes(asking(tokens, parallel_tool_calls=False), tokens, twice)
    named = asking(tokens, tool_choice=NamedTool("nothing"))
    assert not takes(named, tokens, twice)
    ids = random_answer(asking(tokens, tool_choice=NamedTool("plan")), tokens, 1)
    assert ids is not None
    assert [name for name, _ in read_calls(text_of(tokens, ids))] == ["plan"]


def test_a_string_holds_any_text_but_the_quote():
    tokens = gemma_tokens()
    say = [tool("say", {"type": "object", "properties": {"it": {"type": "string"}}})]
    text = '}{,:"\n\\ <|tool_ ✓'
    assert takes(asking(tokens, tools=say), tokens, call_of("say", {"it": text}))
    assert read_calls(call_of("say", {"it": text})) == [("say", {"it": text})]
    one = asking(tokens, tools=say)
    for token in spell(tokens, '<|tool_call>call:say{it:<|"|>'):
        one.push(token)
    for token in tokens.tokenizer.tokenize_str('<|"|'):  # spelled, not the token
        one.push(token)
    assert spell(tokens, ">")[0] not in allowed_ids(one)


def test_objects_without_properties_may_have_any():
    tokens, free = gemma_tokens(), [tool("f", {"type": "object"})]
    value = {"a": 1, "b": {"c": ["x", None, -2.5e3]}, "d": True}
    assert takes(asking(tokens, tools=free), tokens, call_of("f", value))
    assert takes(asking(tokens, tools=free), tokens, call_of("f", {}))
    some = {"type": "object", "properties": {"a": {"type": "integer"}}}
    mixed = [tool("f", {**some, "additionalProperties": {"type": "string"}})]
    assert takes(asking(tokens, tools=mixed), tokens, call_of("f", {"a": 1, "b": "x"}))
    assert not takes(asking(tokens, tools=mixed), tokens, call_of("f", {"b": 1}))
    again = call_of("f", {"a": 1}).replace("{a:1}", '{a:1,a:<|"|>x<|"|>}')
    assert not takes(asking(tokens, tools=mixed), tokens, again)


def test_alternatives_and_parts_are_put_together():
    tokens = gemma_tokens()
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        "additionalProperties": False,
    }
    one_of_it = {"allOf": [{"$ref": "#/$defs/x"}], "description": "x"}
    parts = {"properties": {"a": one_of_it}, "$defs": {"x": {"type": "string", "maxLength": 1}}}
    for parameters, good, bad in [
        (schema, [{"a": 1}, {"a": 1, "b": 2}, {"b": 2}], [{}]),
        (parts, [{"a": "x"}, {}], [{"a": "xy"}]),
    ]:
        tools = [tool("f", parameters)]
        for value in good:
            assert takes(asking(tokens, tools=tools), tokens, call_of("f", value)), value
        for value in bad:
            assert not takes(asking(tokens, tools=tools), tokens, call_of("f", value)), value


def test_a_strict_tool_in_free_text_is_held_to_its_schema():
    tokens = gemma_tokens()
    one = constraint_for(tokens, tools=TOOLS, call_form=GEMMA_4)
    for token in spell(tokens, "Let me see: {a:1}. <|tool_call>"):
        one.push(token)
    assert spell(tokens, "x")[0] not in allowed_ids(one)
    assert takes(one, tokens, call_of("plan", GOOD).removeprefix("<|tool_call>") + " Done.")


def test_with_an_output_format_the_answer_has_it_or_is_a_call():
    tokens = gemma_tokens()
    for text, good in [("yes", True), (call_of("plan", GOOD), True), ("maybe", False)]:
        yes = OutputFormat("regex", "yes|no")
        assert takes(asking(tokens, yes, tool_choice="auto"), tokens, text) == good


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"properties": [1]}, "properties must be an object"),
        ({"type": "thing"}, '"thing" is not one of string, integer'),
        ({"properties": {"a": {"not": {}}}}, "not cannot be enforced"),
        ({"properties": {"a": {"enum": []}}}, "enum is not a list, or empty"),
        ({"properties": {"a": {"enum": ['<|"|>']}}}, "in it"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "has no target"),
        ({"properties": {"a": {"$ref": "http://x"}}}, "not within the schema"),
        ({"properties": {"a": {"minLength": "1"}}, "required": "a"}, "required a list"),
        ({"properties": {"a": {"type": "string", "minLength": "1"}}}, "minLength is .1"),
        ({"properties": {"a": {"type": "array", "minItems": 2, "maxItems": 1}}}, "is less than"),
        (
            {"required": ["a"], "additionalProperties": False},
            '"a" is required, but not in properties',
        ),
        ({"$ref": "#"}, "refers to itself"),
        ({"properties": {"a": {"$ref": "#", "minLength": 1}}}, "minLength beside a .ref"),
    ],
)
def test_a_schema_that_cannot_be_used_is_a_sentence(parameters, words):
    with pytest.raises(SubspecError, match=words) as caught:
        asking(gemma_tokens(), tools=[tool("a", parameters)])
    assert caught.value.exit_code == Exit.USAGE
    assert str(caught.value).startswith("the schema of a tool cannot be used: ")


def test_a_tool_that_is_not_strict_may_have_keywords_that_are_not_enforced():
    loose = tool("a", {"type": "object", "properties": {"b": {"not": {}}}}, strict=False)
    assert asking(gemma_tokens(), tools=[loose]) is not None


def test_deep_and_large_schemas_are_refused_or_quick():
    deep = {"type": "string"}
    for _ in range(80):
        deep = {"type": "object", "properties": {"a": deep}}
    with pytest.raises(SubspecError, match="nested too deeply"):
        asking(gemma_tokens(), tools=[tool("a", deep)])
    options = {"properties": {"a": {"enum": list(range(1000))}}, "anyOf": [{}] * 1000}
    with pytest.raises(SubspecError, match="too large"):
        asking(gemma_tokens(), tools=[tool("a", options)])
    wide = {"properties": {f"p{i}": {"type": "string"} for i in range(100)}}
    assert asking(gemma_tokens(), tools=[tool("a", wide)]) is not None


def test_a_model_without_the_quote_gets_no_grammar():
    with pytest.raises(SubspecError, match="is not a token of this model"):
        asking(qwen_tokens())
