"""Which types a value may have is found in any schema, in a bounded time."""

import time
from typing import Any

import pytest

from subspec.runtime.server.tools.schema_types import MAX_ALTERNATIVES, alternatives, types_in

DEFS: dict[str, Any] = {
    "Loop": {"$ref": "#/$defs/Loop"},
    "Tree": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Tree"}]},
    "a/b": {"type": "integer"},
    **{
        f"D{index}": {"anyOf": [{"$ref": f"#/$defs/D{index + 1}"}] * 2, "allOf": [{}] * 50}
        for index in range(60)
    },
}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, [{"string"}]),
        ({"type": ["integer", "null"]}, [{"integer", "null"}]),
        (
            {"enum": ["a", 1, 1.5, True, None, [], {}]},
            [{*"string integer number".split(), *"boolean null array object".split()}],
        ),
        ({"type": "string", "enum": ["a", None]}, [{"string"}]),
        ({"type": "object", "oneOf": [{"required": ["a"]}, {}]}, [{"object"}, {"object"}]),
        ({"$ref": "#/$defs/a~1b"}, [{"integer"}]),
        ({"$ref": "#/$defs/Loop"}, [set()]),
        ({"$ref": "#/$defs/Tree"}, [{"string"}, set()]),
        ({"$ref": "#/$defs/none"}, [set()]),
        ({"$ref": "elsewhere.json"}, [set()]),
        ({"type": 7, "enum": 8, "anyOf": 9, "allOf": [1], "$ref": 2}, [set()]),
        (True, [set()]),
    ],
)
def test_types_are_those_that_the_schema_leads_to(schema: Any, expected: list[set[str]]) -> None:
    found = alternatives(schema, {"$defs": DEFS})
    assert [set(types_in(one)) for one in found] == expected


def test_of_a_schema_with_very_many_alternatives_nothing_is_known_and_that_at_once() -> None:
    began = time.monotonic()
    found = alternatives({"$ref": "#/$defs/D0"}, {"$defs": DEFS})
    assert not any(found) and len(found) <= MAX_ALTERNATIVES
    wide = {"allOf": [{"anyOf": [{"type": "string"}] * 90}] * 90}
    assert alternatives(wide, {}) == [{}]
    assert time.monotonic() - began < 5
