"""Frozen dataclasses <-> JSON, strictly: unknown, missing and mistyped keys, and values out of
bounds (`artifacts/common/bounds.py`), are errors that name the key."""

import dataclasses
import json
import math
import types
import typing
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from subspec.artifacts.common.bounds import Bound
from subspec.artifacts.common.errors import Exit, SubspecError

T = TypeVar("T")


def dump_json(value: Any) -> str:
    """Dataclass, dict or list -> canonical JSON text: sorted keys, indented, final newline."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def parse_json(text: bytes | str, where: str) -> Any:
    """JSON text -> value. Raises SubspecError(CORRUPT), also for duplicate keys, NaN,
    infinities."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise ValueError(f"key {key[:60]!r} is given twice")
            found[key] = value
        return found

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not allowed")

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"number {digits} is too large")
        return value

    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            decoded, object_pairs_hook=pairs, parse_constant=constant, parse_float=number
        )
        if "\\u" in decoded:  # half a surrogate pair can be parsed, but not be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        raise SubspecError(Exit.CORRUPT, f"{where} is not valid JSON: nested too deep") from None
    except ValueError as error:
        raise SubspecError(Exit.CORRUPT, f"{where} is not valid JSON: {error}") from None


def load_dataclass(kind: type[T], value: Any, where: str) -> T:
    """Value from JSON -> `kind`, checked field by field; `where` names file and path in errors.

    Raises SubspecError(CORRUPT).
    """
    converted = _convert(kind, value, where)
    return typing.cast(T, converted)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _within(_convert(args[0], value, where), args[1:], where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(
            _chosen([a for a in args if a is not type(None)], value, where), value, where
        )
    if origin is typing.Literal:
        if value not in args:
            raise _mismatch(where, f"one of {', '.join(map(repr, args))}", value)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _mismatch(where, "a list", value)
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        return {
            _convert(args[0], key, f"{where}: a key"): _convert(args[1], item, f"{where}.{key}")
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _convert_fields(kind, value, where)
    if kind is float and type(value) is int and abs(value) <= 1 << 1000:  # float() cannot overflow
        return float(value)
    if type(value) is not kind:
        raise _mismatch(where, f"{kind.__name__}", value)
    return value


def _chosen(kinds: list[Any], value: Any, where: str) -> Any:
    """The dataclass whose `kind` the object names."""
    if len(kinds) == 1:
        return kinds[0]
    by_name = {get_args(typing.get_type_hints(kind)["kind"])[0]: kind for kind in kinds}
    name = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in by_name:
        raise _mismatch(f"{where}.kind", f"one of {', '.join(map(repr, by_name))}", name)
    return by_name[name]


def _convert_fields(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(where, "an object", value)
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise SubspecError(Exit.CORRUPT, f"{where} has an unknown key {key[:60]!r}")
    missing = dataclasses.MISSING
    given = {}
    for name, field in fields.items():
        if name in value:
            given[name] = _convert(hints[name], value[name], f"{where}.{name}")
        elif field.default is missing and field.default_factory is missing:
            raise SubspecError(Exit.CORRUPT, f"{where} lacks the key {name!r}")
    return kind(**given)


def _within(value: Any, bounds: tuple[Bound, ...], where: str) -> Any:
    for bound in bounds:
        if not bound.holds(value):
            got = f"a list of {len(value)} entries" if isinstance(value, tuple) else None
            raise _mismatch(where, str(bound), value, got)
    return value


def _mismatch(where: str, expected: str, got: Any, as_text: str | None = None) -> SubspecError:
    shown = as_text or repr(got)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return SubspecError(Exit.CORRUPT, f"{where} is {shown}, expected {expected}")
