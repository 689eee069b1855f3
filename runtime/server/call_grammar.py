"""The Lark grammar of tool calls in a model's own form."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.server.gemma_grammar import gemma_arguments
from subspec.runtime.server.tools.json_text import as_json
from subspec.runtime.server.tools.schema_types import (
    Alternative,
    alternatives,
    types_in,
    values_in,
)

JSONValue = Any
ANY_TEXT = "/(.|\\n)*/"
FOOT = "\n</parameter>\n"
SHARED = ("$defs", "definitions", "x-guidance")  # keys of the whole schema that its parts refer to


@dataclass(frozen=True)
class CallForm:
    """A model's call syntax: `before`, then for each call `begin`, the tool's name, `middle`, the
    arguments and `end`, with `between` between two calls, then `after`. arguments: a JSON object,
    an element <parameter=NAME> for each, or Gemma's {key:value,...}, whose strings stand between
    quotes that are a single token, `quote`."""

    begin: str
    middle: str
    end: str
    between: str
    before: str = ""
    after: str = ""
    arguments: Literal["json", "xml", "gemma"] = "json"
    quote: str = ""


HERMES = CallForm('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n")
QWEN_XML = CallForm(
    "<tool_call>\n<function=", ">\n", "</function>\n</tool_call>", "\n", arguments="xml"
)
LLAMA = CallForm('{"name": "', '", "parameters": ', "}", "; ")
MISTRAL_LIST = CallForm('{"name": "', '", "arguments": ', "}", ", ", "[TOOL_CALLS][", "]")
MISTRAL_ARGS = CallForm("[TOOL_CALLS]", "[ARGS]", "", "")
GEMMA_4 = CallForm("<|tool_call>call:", "", "<tool_call|>", "", arguments="gemma", quote='<|"|>')
FUNCTION_GEMMA = CallForm(
    *("<start_function_call>call:", "", "<end_function_call>", ""),
    arguments="gemma",
    quote="<escape>",
)
FORMS = {  # by ToolFormat.kind
    "hermes": HERMES,
    "xml": QWEN_XML,
    "llama": LLAMA,
    "mistral list": MISTRAL_LIST,
    "mistral args": MISTRAL_ARGS,
    "gemma": GEMMA_4,
    "function gemma": FUNCTION_GEMMA,
}


@dataclass(frozen=True)
class Tool:
    name: str
    parameters: JSONValue  # a JSON schema


@dataclass(frozen=True)
class Grammar:
    """Lark rules, and the JSON schemas that they refer to as @name."""

    rules: tuple[str, ...]
    schemas: dict[str, JSONValue]


def calls_grammar(
    form: CallForm, tools: Sequence[Tool], parallel: bool, special: dict[str, int]
) -> Grammar:
    """Return the rule `calls`: one call, or one or more. special: ids of special tokens that may
    occur in the form's texts."""
    spoken = _Spoken(special)
    more = f"({spoken(form.between)} call)*" if parallel else ""
    rules = [
        f"calls: {spoken(form.before)} call {more} {spoken(form.after)}",
        f"call: {spoken(form.begin)} rest",
        *_rests(form, tools, spoken),
    ]
    schemas = dict[str, JSONValue]()
    for index, tool in enumerate(tools):
        if form.arguments == "json":
            rules.append(f"arguments_{index}: @schema_{index}")
            schemas[f"schema_{index}"] = tool.parameters
        elif form.arguments == "gemma":
            lines, parts = gemma_arguments(
                f"arguments_{index}", tool.parameters, form.quote, special
            )
            rules += lines
            schemas |= parts
        else:
            rules += _elements(f"arguments_{index}", tool.parameters, schemas)
    return Grammar(tuple(rules), schemas)


def optional_calls_grammar(
    form: CallForm, tools: Sequence[Tool], parallel: bool, special: dict[str, int]
) -> Grammar:
    """Return the rule `start`: any text with optional calls; text that begins as a call must be
    one."""
    calls = calls_grammar(form, tools, parallel, special)
    spoken = _Spoken(special)
    text = f"TEXT: {ANY_TEXT}"
    if spoken.parts(form.before + form.begin)[0].startswith("<["):
        again = "*" if parallel else "?"
        return Grammar((f"start: TEXT (calls TEXT){again}", text, *calls.rules), calls.schemas)
    # The shortest text with the mark in it, and from there on a call.
    if form.before:
        more = f"({spoken(form.between)} call)*" if parallel else ""
        start = f"start: (head call {more} {spoken(form.after)})? TEXT"
    else:
        start = f"start: (head rest){'*' if parallel else '?'} TEXT"
    head = f"head[lazy]: TEXT {json.dumps(form.before or form.begin)}"
    return Grammar((start, head, text, *calls.rules[1:]), calls.schemas)


def _rests(form: CallForm, tools: Sequence[Tool], spoken: "_Spoken") -> list[str]:
    """Rules for what follows `begin`, one per tool."""
    names = " | ".join(f"rest_{index}" for index in range(len(tools)))
    return [f"rest: {names}"] + [
        f"rest_{index}: {json.dumps(tool.name)} {spoken(form.middle)} arguments_{index} "
        f"{spoken(form.end)}"
        for index, tool in enumerate(tools)
    ]


def _elements(rule: str, schema: JSONValue, schemas: dict[str, JSONValue]) -> list[str]:
    """Rules for <parameter=NAME> elements in the order of the schema's properties. Raises
    SubspecError(USAGE) for an invalid schema."""
    whole = schema if isinstance(schema, dict) else {}
    properties, required = whole.get("properties", {}), whole.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise SubspecError(
            Exit.USAGE,
            "the schema of a tool cannot be used: properties must be an object and required a list",
        )
    rules, elements = list[str](), list[str]()
    for index, (name, value) in enumerate(properties.items()):
        inner = f"{rule}_{index}"
        elements.append(inner if name in required else f"{inner}?")
        head = json.dumps(f"<parameter={name}>\n")
        if any(_is_text(one) for one in alternatives(value, whole)):
            # Length limits and patterns of strings are not enforced.
            rules.append(f"{inner}: {head} {inner}_text")
            rules.append(f"{inner}_text[suffix={json.dumps(FOOT)}]: {ANY_TEXT}")
        else:
            some = " | ".join(_values(f"schema_{inner}", value, whole, schemas))
            rules.append(f"{inner}: {head} ({some}) {json.dumps(FOOT)}")
    return [f"{rule}: {' '.join(elements)}" if elements else f'{rule}: ""', *rules]


def _is_text(one: Alternative) -> bool:
    """Return True if the value may be any string: it stands in an element without quotes."""
    types = types_in(one)
    return "enum" not in one and (not types or "string" in types)


def _values(
    part: str, schema: JSONValue, whole: dict[str, JSONValue], schemas: dict[str, JSONValue]
) -> list[str]:
    """Alternatives for a value other than any string: enumerated strings bare, the rest as JSON."""
    shared = {key: whole[key] for key in SHARED if key in whole}
    options = alternatives(schema, whole)
    listed = [value for one in options if "enum" in one for value in values_in(one)]
    if not any(isinstance(value, str) for value in listed):
        schemas[part] = {**schema, **shared} if isinstance(schema, dict) else schema
        return [f"@{part}"]
    said = [json.dumps(value if isinstance(value, str) else as_json(value)) for value in listed]
    if others := {kind for one in options if "enum" not in one for kind in types_in(one)}:
        schemas[part] = {**shared, "allOf": [schema], "type": sorted(others)}
        said.append(f"@{part}")
    return said


class _Spoken:
    """Convert text to Lark: special tokens by id, the rest as strings."""

    def __init__(self, special: dict[str, int]) -> None:
        names = sorted(special, key=len, reverse=True)
        self._special = special
        self._pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    def __call__(self, text: str) -> str:
        return " ".join(self.parts(text))

    def parts(self, text: str) -> list[str]:
        pieces = self._pattern.split(text) if self._pattern else [text]
        spoken = {name: f"<[{index}]>" for name, index in self._special.items()}
        return [spoken.get(piece) or json.dumps(piece) for piece in pieces if piece]
