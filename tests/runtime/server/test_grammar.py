"""What a grammar allows is what it says, forwards and backwards, and hostile ones end quickly."""

import asyncio
import json
import random
import time

import pytest
from grammars import (
    END,
    allowed_ids,
    demo_tokens,
    qwen_tokens,
    random_answer,
    sentencepiece_tokens,
    text_of,
)

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.model.constraint import ConstraintFollower
from subspec.runtime.server import grammar
from subspec.runtime.server.answer_grammar import constraint_for
from subspec.runtime.server.chat_events import OutputFormat
from subspec.runtime.server.grammar import (
    COMPILE_SECONDS,
    GrammarConstraint,
    GrammarThreads,
    compile_grammar,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["celsius", "fahrenheit", None]},
        "count": {"type": "integer", "minimum": -3, "maximum": 120},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "unit", "count", "tags"],
    "additionalProperties": False,
    "$defs": {"tag": {"anyOf": [{"type": "boolean"}, {"const": "x y"}]}},
}
FORMATS = {
    "schema": OutputFormat("json_schema", SCHEMA),
    "object": OutputFormat("json_object"),
    "regex": OutputFormat("regex", "(ab|c)+-[0-9]{2,4}"),
    "lark": OutputFormat("lark", 'start: term ("+" term)*\nterm: /[0-9]+/ | "(" start ")"'),
}


def constraint(tokens, output_format) -> GrammarConstraint:
    made = constraint_for(tokens, output_format)
    assert isinstance(made, GrammarConstraint)
    return made


def check_value(value) -> None:
    """What SCHEMA says, by hand."""
    assert list(value) == ["name", "unit", "count", "tags"]
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 8
    assert value["unit"] in ("celsius", "fahrenheit", None)
    assert type(value["count"]) is int
    assert -3 <= value["count"] <= 120
    assert 1 <= len(value["tags"]) <= 3
    assert all(tag in (True, False, "x y") for tag in value["tags"])


@pytest.mark.parametrize("tokens", [demo_tokens, qwen_tokens, sentencepiece_tokens])
def test_every_random_answer_satisfies_its_schema(tokens):
    model = tokens()
    texts = set()
    for seed in range(25):
        ids = random_answer(constraint(model, FORMATS["schema"]), model, seed)
        assert ids is not None
        texts.add(text_of(model, ids))
        check_value(json.loads(text_of(model, ids)))
    assert len(texts) == 25


def test_every_random_json_object_is_one():
    model, ended = demo_tokens(), 0
    for seed in range(20):
        ids = random_answer(constraint(model, FORMATS["object"]), model, seed)
        if ids is not None:
            ended += 1
            assert isinstance(json.loads(text_of(model, ids)), dict)
    assert ended >= 10


def test_at_the_end_only_end_tokens_are_left_or_more_where_the_grammar_goes_on():
    model = qwen_tokens()
    done = constraint(model, OutputFormat("regex", "a"))
    done.push(allowed_ids(done)[0])
    assert allowed_ids(done) == [0, END]
    more = constraint(model, OutputFormat("regex", "a+"))
    more.push(allowed_ids(more)[0])
    assert {0, END} < set(allowed_ids(more))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_pop_undoes_push_exactly(name, seed):
    """Against a fresh matcher at every state."""
    model, chance = demo_tokens(), random.Random(seed)
    walked, said = constraint(model, FORMATS[name]), list[int]()
    for _ in range(120):
        if said and chance.random() < 0.4:
            count = chance.randint(0, min(len(said), 12))
            walked.rollback(count)
            said = said[: len(said) - count]
        else:
            if chance.random() < 0.7:  # a push is right whether the mask was asked for or not
                walked.allowed()
            fresh = constraint(model, FORMATS[name])
            for token in said:
                fresh.push(token)
            others = [token for token in allowed_ids(fresh) if token not in model.ends]
            if others:
                said.append(chance.choice(others))
                walked.push(said[-1])
        fresh = constraint(model, FORMATS[name])
        for token in said:
            fresh.push(token)
        assert allowed_ids(walked) == allowed_ids(fresh), said


def test_a_token_that_was_not_allowed_is_refused_and_changes_nothing():
    one = constraint(demo_tokens(), FORMATS["schema"])
    one.push(allowed_ids(one)[0])
    before = allowed_ids(one)
    wrong = next(token for token in range(3, 2048) if token not in before)
    with pytest.raises(ValueError, match="is not allowed by the JSON schema"):
        one.push(wrong)
    assert allowed_ids(one) == before
    with pytest.raises(ValueError, match="it ends the answer"):
        one.push(END)
    assert allowed_ids(one) == before
    with pytest.raises(ValueError, match="pop of 2 tokens"):
        one.rollback(2)


def test_a_mask_is_kept_until_the_state_changes_and_is_never_overwritten():
    one = constraint(demo_tokens(), FORMATS["schema"])
    first = one.allowed()
    assert one.allowed() is first
    copy = first.clone()
    one.push(first.nonzero().flatten().tolist()[0])
    assert one.allowed() is not first
    assert first.equal(copy)


def test_a_state_that_is_too_complex_is_a_sentence_and_can_be_left():
    model = demo_tokens()
    late = OutputFormat("regex", "[b-d]{40}((a{1000}){1000}){1000}")
    one = constraint(model, late)
    b = next(token for token in allowed_ids(one) if model.contents[token] == b"b")
    count = 0
    with pytest.raises(SubspecError, match="the regex cannot be followed further") as caught:
        for count in range(41):  # noqa: B007
            one.allowed()
            one.push(b)
    assert caught.value.exit_code == Exit.USAGE
    assert count > 20
    one.rollback(count - 10)
    fresh = constraint(model, late)
    for _ in range(10):
        fresh.push(b)
    assert allowed_ids(one) == allowed_ids(fresh)


def test_a_grammar_that_has_failed_is_compiled_once_more_for_who_goes_on(monkeypatch):
    model, compiled = demo_tokens(), list[str]()
    make = grammar._matcher
    monkeypatch.setattr(
        grammar, "_matcher", lambda tokens, text: compiled.append(text) or make(tokens, text)
    )
    one = constraint(model, OutputFormat("regex", "[b-d]{20}((a{1000}){1000}){1000}"))
    b = next(token for token in allowed_ids(one) if model.contents[token] == b"b")
    count = 0
    with pytest.raises(SubspecError, match="cannot be followed further"):
        for count in range(21):  # noqa: B007
            one.allowed()
            one.push(b)
    assert len(compiled) == 1, "nobody has gone on yet"
    one.rollback(count - 10)
    for _ in range(3):
        assert b in allowed_ids(one)
        one.push(b)
    assert len(compiled) == 2


def test_a_grammar_that_gets_slower_and_slower_is_given_up(monkeypatch):
    monkeypatch.setattr("subspec.runtime.model.constraint.ANSWER_SECONDS", 0.1)
    model = demo_tokens()
    one = constraint(model, OutputFormat("lark", 'start: s\ns: s s s | s s | "a" | "aa" | '))
    a = next(token for token in allowed_ids(one) if model.contents[token] == b"a")
    answer = ConstraintFollower(one, model.ends)
    begin = time.process_time()
    with pytest.raises(SubspecError, match="takes too long to follow"):
        for _ in range(3000):
            answer.allowed(len(model.contents))
            answer.push(a)
    assert time.process_time() - begin < 5


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED = {
    "a remote $ref": (
        OutputFormat("json_schema", {"$ref": "http://127.0.0.1:9/x"}),
        "\\$ref|fetch",
    ),
    "a file": (OutputFormat("json_schema", {"$ref": "file:///etc/passwd"}), "not fetch"),
    "a missing $ref": (OutputFormat("json_schema", {"$ref": "#/$defs/no"}), "cannot be used"),
    "a $ref to itself": (OutputFormat("json_schema", {"$ref": "#"}), "nothing can satisfy it"),
    "depth 800": (OutputFormat("json_schema", nested(800)), "recursion|too deep"),
    "depth 100k": (OutputFormat("json_schema", nested(100_000)), "nested too deeply"),
    "100k names": (OutputFormat("json_schema", {"enum": [*map(str, range(100_000))]}), "bytes"),
    "maxLength": (
        OutputFormat("json_schema", {"type": "string", "maxLength": 10**12}),
        "decimal literal",
    ),
    "5k properties": (
        OutputFormat(
            "json_schema", {"properties": {f"p{n}": {"type": "string"} for n in range(5000)}}
        ),
        "too big|too complex",
    ),
    "a keyword": (OutputFormat("json_schema", {"not": {"type": "string"}}), 'keys: \\["not"\\]'),
    "a type": (OutputFormat("json_schema", {"type": "strin"}), "Invalid type: strin"),
    "a format": (OutputFormat("json_schema", {"type": "string", "format": "zip"}), "format: zip"),
    "no value": (
        OutputFormat("json_schema", {"type": "string", "minLength": 5, "maxLength": 2}),
        "Unsatisfiable",
    ),
    "false": (OutputFormat("json_schema", False), "Unsatisfiable"),
    "no schema": (OutputFormat("json_schema", ["a"]), "is a list, expected an object"),
    "not finite": (OutputFormat("json_schema", {"const": float("nan")}), "is no JSON"),
    "a huge integer": (OutputFormat("json_schema", {"maximum": 10**5000}), "is no JSON"),
    "lookaround": (OutputFormat("regex", "(?=a)b"), "look-around"),
    "a bracket": (OutputFormat("regex", "(a"), "unclosed"),
    "100k brackets": (OutputFormat("regex", "(" * 100_000 + ")" * 100_000), "the regex cannot"),
    "nested repeats": (OutputFormat("regex", "((a{1000}){1000}){1000}"), "too complex|cannot"),
    "no text": (OutputFormat("regex", {"a": 1}), "the regex is a dict, expected a text"),
    "an unknown name": (OutputFormat("lark", "start: a"), 'unknown name: "a"'),
    "no lark": (OutputFormat("lark", ""), "the Lark grammar cannot be used"),
    "an import": (OutputFormat("lark", "%import os.path\nstart: path"), "the Lark grammar cannot"),
    "what cannot go back": (OutputFormat("lark", 'start: x "b"\nx[stop="q"]: /.*/'), "rollback"),
    "50k brackets": (OutputFormat("lark", "start: " + "(" * 50_000 + '"a"'), "nested"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_quickly_in_a_sentence(name):
    output_format, words = REFUSED[name]
    tokens, begin = demo_tokens(), time.process_time()
    with pytest.raises(SubspecError, match=words) as caught:
        constraint_for(tokens, output_format)
    assert time.process_time() - begin < 3 * COMPILE_SECONDS  # on a slow machine
    assert caught.value.exit_code == Exit.USAGE
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "output_format",
    [
        OutputFormat("regex", "^(a+)+$"),
        OutputFormat("regex", "(a|b)*a(a|b){40}"),
        OutputFormat("regex", "(.*a.*b.*c.*){20}"),
        OutputFormat("json_schema", {"type": "string", "pattern": "^(a+)+$"}),
        OutputFormat("json_schema", {"enum": [f"value {n}" for n in range(5000)]}),
        OutputFormat("json_schema", nested(40)),
        OutputFormat("json_schema", True),
        OutputFormat("json_schema", {"type": "array", "maxItems": 10**12}),
        OutputFormat("json_schema", {"x-guidance": {"lenient": True}, "type": "null"}),
    ],
)
def test_what_looks_hostile_and_is_not_is_quick(output_format):
    begin = time.process_time()
    one = constraint(demo_tokens(), output_format)
    chance = random.Random(0)
    for _ in range(60):
        if others := [token for token in allowed_ids(one) if token != END]:
            one.push(chance.choice(others))
    assert time.process_time() - begin < 3


def test_a_schema_cannot_change_how_it_is_read():
    lenient = {"x-guidance": {"lenient": True}, "not": {"type": "string"}}
    with pytest.raises(SubspecError, match="not"):
        constraint_for(demo_tokens(), OutputFormat("json_schema", lenient))


def test_grammars_are_compiled_in_threads_and_a_slow_one_is_given_up():
    threads = GrammarThreads()

    async def both() -> tuple[float, str]:
        begin = time.monotonic()
        slow = asyncio.create_task(threads.run(lambda: time.sleep(4), "the regex"))
        quick = await threads.run(lambda: constraint(demo_tokens(), FORMATS["regex"]), "the regex")
        assert allowed_ids(quick)
        with pytest.raises(SubspecError, match="takes more than") as caught:
            await slow
        return time.monotonic() - begin, caught.value.message

    seconds, message = asyncio.run(both())
    threads.close()
    assert seconds < 3.5
    assert message.startswith("the regex takes more than")


def test_errors_of_work_in_a_thread_arrive():
    threads = GrammarThreads()
    work = threads.run(lambda: compile_grammar(demo_tokens(), "start: a", "the grammar"), "it")
    with pytest.raises(SubspecError, match="unknown name"):
        asyncio.run(work)
    threads.close()
