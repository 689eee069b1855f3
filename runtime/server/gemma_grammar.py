"""The Lark grammar of arguments in Gemma 4's and FunctionGemma's form: {key:value,...}.

Keys are bare and sorted, as in the models' chat templates (`dictsort`); strings stand between
quotes that are one special token, without escapes; numbers, true, false and null are JSON's.
Sources: the chat templates of Gemma 4 and FunctionGemma.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.server.tools.schema_types import referred

JSONValue = Any
MAX_DEPTH = 64  # nested schemas
MAX_VALUES = 10_000  # schemas and enumerated values, counted at each use
BARE_KEY = re.compile(r"[\w$@./-]{1,256}")
ANY_KEY = r"[A-Za-z_][A-Za-z0-9_.-]{0,63}"
SAYS_NOTHING = ("title", "description", "default", "examples", "deprecated")
BESIDE_REF = (*SAYS_NOTHING, "$ref", "$defs", "definitions", "$schema", "$id", "x-guidance")
SCALARS = ("integer", "number", "boolean", "null")
KINDS = ("string", *SCALARS, "array", "object")
# Keywords of JSON Schema that are not enforced here.
NOT_ENFORCED = (
    *("not", "if", "then", "else", "patternProperties", "propertyNames", "minProperties"),
    *("maxProperties", "uniqueItems", "contains", "minContains", "maxContains"),
    *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems"),
    *("unevaluatedProperties", "$dynamicRef"),
)


@dataclass(frozen=True)
class _Rules:
    """The rules generated so far for one tool's schema."""

    name: str  # name of the arguments' rule and prefix of all others
    whole: JSONValue  # the schema that a $ref refers to
    lenient: bool  # skip what cannot be enforced
    quote: str  # Lark of the special token around a string
    quoted: str  # its name, which never occurs in text
    lines: list[str] = field(default_factory=list)
    schemas: dict[str, JSONValue] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # $ref -> rule
    terminals: dict[str, str] = field(default_factory=dict)  # body -> name
    values: Iterator[int] = field(default_factory=count)

    def add(self, body: str) -> str:
        name = f"{self.name}_{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name

    def terminal(self, body: str) -> str:
        if body not in self.terminals:
            name = self.terminals[body] = f"{self.name.upper()}_{len(self.lines)}"
            self.lines.append(f"{name}: {body}")
        return self.terminals[body]


def gemma_arguments(
    rule: str, schema: JSONValue, quote: str, special: dict[str, int]
) -> tuple[list[str], dict[str, JSONValue]]:
    """Return the rule of a tool's arguments with its subrules, and the JSON schemas that they refer
    to as @name. Patterns and formats of strings are not enforced. Raises SubspecError(USAGE)."""
    if quote not in special:
        raise SubspecError(
            Exit.USAGE,
            f"tool calls cannot be constrained: {quote} is not a token of this model",
            "use tool_choice auto, and no strict tools",
        )
    whole = schema if isinstance(schema, dict) else {}
    if not any(key in whole for key in ("type", "$ref", "anyOf", "oneOf", "allOf")):
        whole = {**whole, "type": "object"}
    lenient = whole.get("x-guidance", {}).get("lenient") is not False
    rules = _Rules(rule, whole, lenient, f"<[{special[quote]}]>", quote)
    start = _value(rules, whole, MAX_DEPTH)
    return [f"{rule}: {start}", *rules.lines], rules.schemas


def _value(rules: _Rules, schema: JSONValue, deepest: int) -> str:
    """Return the Lark expression of a value allowed by the schema. Raises SubspecError(USAGE)."""
    _count(rules)
    if deepest == 0:
        raise _unusable("it is nested too deeply")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise _unusable(f"{json.dumps(schema)[:80]} is not a schema that any value satisfies")
    if not rules.lenient and (found := [key for key in NOT_ENFORCED if key in schema]):
        raise _unusable(f"{found[0]} cannot be enforced")
    if "const" in schema:
        return _literal(rules, schema["const"])
    if "enum" in schema:
        values = _list_of(schema, "enum")
        return _either([_literal(rules, value) for value in values])
    if "$ref" in schema:
        if not rules.lenient and (others := sorted(set(schema) - set(BESIDE_REF))):
            raise _unusable(f"{others[0]} beside a $ref cannot be enforced")
        return _reference(rules, schema["$ref"], deepest)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            # Keywords beside the alternatives apply to each of them.
            beside = {name: value for name, value in schema.items() if name != key}
            options = [_merged(rules, beside, one) for one in _list_of(schema, key)]
            return _either([_value(rules, one, deepest - 1) for one in options])
    if "allOf" in schema:
        return _value(rules, _all_of(rules, schema), deepest - 1)
    kinds = schema.get("type", list(KINDS))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise _unusable(f"the type {json.dumps(unknown[0])[:80]} is not one of {', '.join(KINDS)}")
    if "type" not in schema and not set(schema) & {"properties", "items", "required"}:
        return _reference(rules, "", deepest)  # any value
    return _either([_of_kind(rules, kind, schema, deepest) for kind in dict.fromkeys(kinds)])


def _of_kind(rules: _Rules, kind: str, schema: dict[str, JSONValue], deepest: int) -> str:
    if kind == "string":
        low, high = _bounds(schema, "minLength", "maxLength")
        count = "*" if (low, high) == (0, None) else f"{{{low},{'' if high is None else high}}}"
        text = _string_text(rules, f"/(.|\\n){count}/")
        return f"{rules.quote} {text} {rules.quote}"
    if kind == "array":
        return _array(rules, schema, deepest)
    if kind == "object":
        return _object(rules, schema, deepest)
    name = f"schema_{rules.name}_{len(rules.schemas)}"
    keywords = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
    rules.schemas[name] = {
        "type": kind,
        **{key: schema[key] for key in keywords if key in schema},
        "x-guidance": {"whitespace_flexible": False, "lenient": rules.lenient},
    }
    return f"@{name}"


def _string_text(rules: _Rules, text: str) -> str:
    """A terminal: text that does not contain the quote, where a parser would end it."""
    quote = re.escape(rules.quoted).replace("/", r"\/")
    return rules.terminal(f"{text} & ~/(.|\\n)*{quote}(.|\\n)*/")


def _array(rules: _Rules, schema: dict[str, JSONValue], deepest: int) -> str:
    low, high = _bounds(schema, "minItems", "maxItems")
    first = schema.get("prefixItems", [])
    if first and not rules.lenient:
        raise _unusable("prefixItems cannot be enforced")
    items = schema.get("items", True)
    if high == 0 or items is False:
        return '"[" "]"'
    item = rules.add(_value(rules, items, deepest - 1))
    most = "" if high is None else high - 1
    some = f'"[" {item} ("," {item}){{{max(low - 1, 0)},{most}}} "]"'
    return some if low else f'({some} | "[" "]")'


def _object(rules: _Rules, schema: dict[str, JSONValue], deepest: int) -> str:
    """Members sorted by name. Properties that the schema does not name are allowed if it names none
    or has a schema for them."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise _unusable("properties must be an object and required a list")
    more = schema.get("additionalProperties", not properties)
    if missing := [name for name in required if name not in properties]:
        if schema.get("additionalProperties") is False:
            raise _unusable(f"{json.dumps(missing[0])[:80]} is required, but not in properties")
        extra = schema.get("additionalProperties", True)
        properties = {**properties, **dict.fromkeys(map(str, missing), extra)}
    names = sorted(properties, key=lambda name: (name.lower(), name))
    members = [
        (rules.add(f"{_key(rules, name)} {_value(rules, properties[name], deepest - 1)}"), name)
        for name in names
    ]
    # `rest`: what may follow a member; `none`: the same where there is no member yet.
    rest, none = _more_members(rules, more, names, deepest)
    for member, name in reversed(members):
        if name in required:
            rest, none = f'"," {member} {rest}', f"{member} {rest}"
        else:
            rest, none = f'("," {member})? {rest}', f"({member} {rest} | {none})"
        rest, none = rules.add(rest), rules.add(none)
    return f'"{{" {none} "}}"'


def _more_members(
    rules: _Rules, schema: JSONValue, names: Sequence[str], deepest: int
) -> tuple[str, str]:
    if schema is False:
        return '""', '""'
    taken = "|".join(re.escape(name) for name in names if re.fullmatch(ANY_KEY, name))
    key = rules.terminal(f"/{ANY_KEY}/" + (f" & ~/({taken})/" if taken else ""))
    member = rules.add(f'{key} ":" {_value(rules, schema, deepest - 1)}')
    return f'("," {member})*', f'({member} ("," {member})*)?'


def _key(rules: _Rules, name: str) -> str:
    """Return the key, in quotes if it would otherwise be ambiguous."""
    if BARE_KEY.fullmatch(name):
        return json.dumps(f"{name}:")
    return f'{_quoted(rules, name)} ":"'


def _literal(rules: _Rules, value: JSONValue) -> str:
    """Lark expression of one value."""
    _count(rules)
    if isinstance(value, str):
        return _quoted(rules, value)
    if isinstance(value, list):
        return _between("[", [_literal(rules, one) for one in value], "]")
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: (name.lower(), name))
        return _between("{", [f"{_key(rules, n)} {_literal(rules, value[n])}" for n in names], "}")
    return json.dumps(json.dumps(value))


def _between(begin: str, parts: list[str], end: str) -> str:
    members = ' "," '.join(parts)
    return f'"{begin}" {members} "{end}"'


def _quoted(rules: _Rules, text: str) -> str:
    if rules.quoted in text:
        raise _unusable(f"{json.dumps(text)[:80]} has {rules.quoted} in it")
    return " ".join([rules.quote, *([json.dumps(text)] if text else []), rules.quote])


def _reference(rules: _Rules, ref: JSONValue, deepest: int) -> str:
    """The rule of a $ref into the same schema, which may be recursive; for "": any value."""
    if not isinstance(ref, str):
        raise _unusable("a $ref is no text")
    if ref not in rules.refs:
        name = rules.refs[ref] = f"{rules.name}_ref_{len(rules.refs)}"
        if ref:
            body = _value(rules, _found(rules.whole, ref), deepest - 1)
        else:
            body = _either([_of_kind(rules, kind, {}, deepest) for kind in KINDS])
        if body == name:
            raise _unusable(f"the $ref {json.dumps(ref)[:80]} refers to itself")
        rules.lines.append(f"{name}: {body}")
    return rules.refs[ref]


def _found(whole: JSONValue, ref: str) -> JSONValue:
    if not ref.startswith("#"):
        raise _unusable(f"the $ref {json.dumps(ref)[:80]} is not within the schema")
    value = referred(whole, ref)
    if value is None:
        raise _unusable(f"the $ref {json.dumps(ref)[:80]} has no target")
    return value


def _all_of(rules: _Rules, schema: dict[str, JSONValue]) -> JSONValue:
    merged: JSONValue = {key: value for key, value in schema.items() if key != "allOf"}
    for part in _list_of(schema, "allOf"):
        merged = _merged(rules, merged, part)
    return merged


def _merged(rules: _Rules, beside: JSONValue, schema: JSONValue) -> JSONValue:
    """Combine two schemas that must both hold. Raises SubspecError(USAGE) if their keywords
    conflict."""
    if not isinstance(schema, dict) or not isinstance(beside, dict):
        return schema
    merged = {**beside, **schema}
    for key in beside.keys() & schema.keys():
        mine, other = beside[key], schema[key]
        if key == "required" and isinstance(mine, list) and isinstance(other, list):
            merged[key] = [*mine, *other]
        elif key == "properties" and isinstance(mine, dict) and isinstance(other, dict):
            merged[key] = {**mine, **other}
        elif mine != other and key not in SAYS_NOTHING and not rules.lenient:
            raise _unusable(f"two of its parts have conflicting values of {key}")
    return merged


def _bounds(schema: dict[str, JSONValue], low: str, high: str) -> tuple[int, int | None]:
    least, most = schema.get(low, 0), schema.get(high)
    for name, value in ((low, least), (high, most)):
        if value is not None and (type(value) is not int or value < 0):
            raise _unusable(f"{name} is {json.dumps(value)[:80]}, expected a number of 0 or more")
    if most is not None and most < least:
        raise _unusable(f"{high} is less than {low}")
    return least or 0, most


def _list_of(schema: dict[str, JSONValue], key: str) -> list[JSONValue]:
    found = schema[key]
    if not isinstance(found, list) or not found:
        raise _unusable(f"{key} is not a list, or empty")
    return found


def _count(rules: _Rules) -> None:
    if next(rules.values) >= MAX_VALUES:
        raise _unusable("it is too large")


def _either(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"({' | '.join(options)})"


def _unusable(why: str) -> SubspecError:
    return SubspecError(Exit.USAGE, f"the schema of a tool cannot be used: {why}")
