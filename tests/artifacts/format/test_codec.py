import time
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from subspec.artifacts.common.bounds import Below, Between, Count, Length, Matching
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.codec import dump_json, load_dataclass, parse_json


@dataclass(frozen=True)
class Inner:
    count: int
    share: float = 0.5


@dataclass(frozen=True)
class Round:
    radius: float
    kind: Literal["round"] = "round"


@dataclass(frozen=True)
class Square:
    side: float
    inner: Inner | None = None
    kind: Literal["square"] = "square"


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    flag: bool
    items: tuple[Inner, ...]
    table: dict[str, float]
    shapes: tuple[Round | Square, ...]
    by_kind: dict[Literal["a", "b"], Inner]
    limit: int | None = None
    shape: Round | Square | None = None


EXAMPLE = Outer(
    "x",
    "b",
    True,
    (Inner(1), Inner(2, 0.25)),
    {"y": 1.0, "é": 2.5},
    (Square(2.0, Inner(3)), Round(1.0), Square(4.0)),
    {"b": Inner(4)},
    3,
    Round(0.5),
)


def load(value: object) -> Outer:
    return load_dataclass(Outer, value, "file.json")


def changed(**change: object) -> dict[str, object]:
    value = parse_json(dump_json(EXAMPLE), "file.json")
    return {**value, **change}


def test_json_has_literal_bytes() -> None:
    assert dump_json({"b": [1, 2.5], "a": "é"}) == '{\n "a": "é",\n "b": [\n  1,\n  2.5\n ]\n}\n'


def test_a_dataclass_comes_back_as_it_was() -> None:
    assert load(parse_json(dump_json(EXAMPLE), "file.json")) == EXAMPLE


def test_a_field_left_out_takes_its_default_and_a_whole_number_is_a_float() -> None:
    value = changed(items=[{"count": 1}], table={"y": 7})
    del value["limit"]
    loaded = load(value)
    assert loaded.items == (Inner(1, 0.5),)
    assert type(loaded.table["y"]) is float
    assert loaded.limit is None


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"name": 1}, "file.json.name"),
        ({"kind": "c"}, "file.json.kind"),
        ({"kind": ["a"]}, "file.json.kind"),
        ({"flag": 1}, "file.json.flag"),
        ({"items": {}}, "file.json.items"),
        ({"items": [{"count": True}]}, "file.json.items[0].count"),
        ({"items": [{"count": 1.0}]}, "file.json.items[0].count"),
        ({"items": [{"count": 1, "other": 2}]}, "'other'"),
        ({"items": [{"share": 1.0}]}, "'count'"),
        ({"items": [3]}, "file.json.items[0]"),
        ({"table": {"y": "1"}}, "file.json.table.y"),
        ({"table": {"y": 10**400}}, "file.json.table.y"),
        ({"table": []}, "file.json.table"),
        ({"limit": "3"}, "file.json.limit"),
        ({"shapes": [{"side": 1.0}]}, "file.json.shapes[0].kind"),
        ({"shapes": [{"side": 1.0, "kind": "oval"}]}, "file.json.shapes[0].kind"),
        ({"shapes": [{"side": 1.0, "kind": ["square"]}]}, "file.json.shapes[0].kind"),
        ({"shapes": [{"side": 1.0, "kind": "round"}]}, "file.json.shapes[0]"),
        ({"shapes": [{"side": 1, "kind": "square", "inner": 2}]}, "file.json.shapes[0].inner"),
        ({"shapes": ["square"]}, "file.json.shapes[0].kind"),
        ({"shape": {"radius": "1", "kind": "round"}}, "file.json.shape.radius"),
        ({"shape": 1.0}, "file.json.shape.kind"),
        ({"by_kind": {"c": {"count": 1}}}, "file.json.by_kind: a key"),
        ({"by_kind": {"a": {"count": "1"}}}, "file.json.by_kind.a.count"),
        ({"more": 1}, "'more'"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], path: str) -> None:
    with pytest.raises(SubspecError) as caught:
        load(changed(**change))
    assert caught.value.exit_code == Exit.CORRUPT
    assert path in caught.value.message


def test_of_several_dataclasses_the_kind_chooses_and_none_is_none() -> None:
    value = changed(
        shape=None, shapes=[{"kind": "round", "radius": 2}, {"kind": "square", "side": 1}]
    )
    loaded = load(value)
    assert loaded.shape is None and loaded.shapes == (Round(2.0), Square(1.0))


def test_a_dictionary_has_the_keys_that_its_type_names_or_fewer() -> None:
    assert load(changed(by_kind={})).by_kind == {}
    with pytest.raises(SubspecError, match="a key is 'c', expected one of 'a', 'b'"):
        load(changed(by_kind={"c": {"count": 1}}))


@pytest.mark.parametrize("value", [None, 3, "x", []])
def test_what_is_not_an_object_is_refused(value: object) -> None:
    with pytest.raises(SubspecError, match="expected an object"):
        load(value)


MANY = ",".join(f'"{number}":0' for number in range(100_000))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "b": 1}}',
        b"[NaN]",
        b"[Infinity]",
        b"[-1e400]",
        b"[1e400]",
        b"[" * 1_000_000,
        b'{"a":' * 100_000,
        b'["\\ud800"]',
        b'{"\\udfff": 1}',
        b'\xef\xbb\xbf{"a": 1}',
        b'["\xff"]',
        b"[" + b"9" * 5000 + b"]",
        b"[1] 2",
        ("{" + MANY + ',"0":0}').encode(),
    ],
    ids=lambda text: repr(text[:16]),
)
def test_hostile_json_is_refused_at_once_with_the_files_name(text: bytes) -> None:
    start = time.monotonic()
    with pytest.raises(SubspecError) as caught:
        parse_json(text, "file.json")
    assert time.monotonic() - start < 1
    assert caught.value.exit_code == Exit.CORRUPT
    assert caught.value.message.startswith("file.json is not valid JSON")
    assert len(caught.value.message) < 300


def test_escaped_characters_beyond_the_basic_plane_are_read() -> None:
    assert parse_json(b'["\\ud83d\\ude00\\u00e9"]', "file.json") == ["😀é"]


# Bounds


@dataclass(frozen=True)
class Bounded:
    width: Annotated[int, Between(1, 256)] = 1
    share: Annotated[float, Between(0, 1), Below(1)] = 0.0
    counts: Annotated[tuple[Count, ...], Length(1, 3)] = (1,)
    digest: Annotated[str, Matching("[0-9a-f]{4}", "4 hex digits")] | None = None
    table: dict[str, Count] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 0}, "f.json.width is 0, expected 1 to 256"),
        ({"width": 257}, "f.json.width is 257, expected 1 to 256"),
        ({"width": 1.0}, "f.json.width is 1.0, expected int"),
        ({"share": 1}, "f.json.share is 1.0, expected a number below 1"),
        ({"share": -0.5}, "f.json.share is -0.5, expected 0 to 1"),
        ({"counts": []}, "f.json.counts is a list of 0 entries, expected 1 to 3 entries"),
        ({"counts": [1] * 4}, "f.json.counts is a list of 4 entries, expected 1 to 3 entries"),
        ({"counts": [1, -2]}, "f.json.counts[1] is -2, expected 0 to 4.61169e+18"),
        ({"digest": "ab\u0663d"}, "f.json.digest is 'ab\u0663d', expected 4 hex digits"),
        ({"digest": "abcde"}, "f.json.digest is 'abcde', expected 4 hex digits"),
        ({"table": {"a": -1}}, "f.json.table.a is -1, expected 0 to 4.61169e+18"),
    ],
)  # fmt: skip
def test_a_value_beyond_its_bounds_is_named_with_what_is_expected(
    given: dict[str, object], message: str
) -> None:
    with pytest.raises(SubspecError) as caught:
        load_dataclass(Bounded, given, "f.json")
    assert caught.value.exit_code == Exit.CORRUPT and caught.value.message == message


def test_values_at_their_bounds_are_read() -> None:
    for given in (
        Bounded(),
        Bounded(256, 0.999, (0, 0, 1 << 62), "00ff", {"a": 0}),
    ):
        assert load_dataclass(Bounded, parse_json(dump_json(given), "f"), "f") == given
