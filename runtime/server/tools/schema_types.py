"""Types that a tool's JSON schema allows for a value, which models may write without quotes."""

from typing import Any

JSONValue = Any
Alternative = dict[str, JSONValue]  # the schema's `type` and `enum`, if present
MAX_ALTERNATIVES = 1000  # alternatives; with more, any value is allowed
MAX_DEPTH = 32  # nested references and alternatives


def alternatives(schema: JSONValue, whole: JSONValue) -> list[Alternative]:
    """Resolve $ref, allOf, anyOf and oneOf to alternatives, one of which a value must fit. {}: any
    value. whole: the schema that references refer to."""
    return _alternatives(schema, whole, {}, MAX_DEPTH)


def types_in(one: Alternative) -> frozenset[str]:
    """Types that the alternative allows; empty if it does not restrict them."""
    if "enum" in one:
        return frozenset(kind for value in values_in(one) for kind in kinds_of(value))
    return _types(one.get("type"))


def values_in(one: Alternative) -> list[JSONValue]:
    """Enumerated values of the allowed types."""
    types = _types(one.get("type"))
    values = one["enum"] if isinstance(one["enum"], list) else []
    return [value for value in values if not types or types & kinds_of(value)]


def kinds_of(value: JSONValue) -> frozenset[str]:
    """JSON Schema types of a JSON value."""
    if value is None:
        return frozenset({"null"})
    if isinstance(value, bool):
        return frozenset({"boolean"})
    kinds = {int: {"integer", "number"}, float: {"number"}, str: {"string"}, list: {"array"}}
    return frozenset(kinds.get(type(value), {"object"}))


def referred(whole: JSONValue, ref: str) -> JSONValue:
    """Resolve a $ref into the same schema; None if it has no target."""
    value = whole
    for part in ref.removeprefix("#").split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        value = value.get(part) if isinstance(value, dict) else None
    return value if ref.startswith("#") else None


def _types(kind: JSONValue) -> frozenset[str]:
    listed = kind if isinstance(kind, list) else [kind]
    return frozenset(one for one in listed if isinstance(one, str))


def _alternatives(
    schema: JSONValue, whole: JSONValue, known: dict[str, list[Alternative]], deepest: int
) -> list[Alternative]:
    """known: results by $ref; a recursive one is unrestricted meanwhile."""
    if not isinstance(schema, dict) or deepest == 0:
        return [{}]

    def of(options: list[JSONValue]) -> list[Alternative]:
        return [one for part in options for one in _alternatives(part, whole, known, deepest - 1)]

    parts = [of(schema[key]) for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list)]
    parts += [of([one]) for one in schema["allOf"]] if isinstance(schema.get("allOf"), list) else []
    if isinstance(ref := schema.get("$ref"), str):
        if ref not in known:
            known[ref] = [{}]
            known[ref] = of([referred(whole, ref)])
        parts.append(known[ref])
    said = {key: schema[key] for key in ("type", "enum") if key in schema}
    found = [said | ({"enum": [schema["const"]]} if "const" in schema else {})]
    for part in parts:
        if len(found) * len(part) > MAX_ALTERNATIVES:
            return [{}]
        found = [one | other for one in found for other in part]
    return found
