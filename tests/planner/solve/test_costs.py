"""Bytes of a candidate, against values worked out by hand."""

import pytest
from toys import make_spec

from subspec.artifacts.model import ModelSpec, parts, resident_tensors
from subspec.planner.solve.costs import (
    GUARD_BYTES,
    Shape,
    ledger,
    model_bytes,
    substitutes_bytes,
)
from subspec.planner.solve.storage import raw_storage

SHAPE = Shape(256, 16, 3, 128, 1 << 20, 2, 0, 2)


def exact_bytes(spec: ModelSpec) -> int:
    return raw_storage(spec).num_bytes


def test_exact_and_small_tensors_are_the_whole_model() -> None:
    spec = make_spec()
    small = sum(
        shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in resident_tensors(spec).values()
    )
    assert model_bytes(spec) == exact_bytes(spec) + 2 * small
    assert exact_bytes(spec) == sum(part.num_bytes for part in parts(spec))  # whole pages


def test_substitutes_take_a_little_more_than_a_quarter() -> None:
    """4 bits, and 32 for each group of 64, against 16."""
    assert substitutes_bytes(make_spec(), "aten") == exact_bytes(make_spec()) * 4.5 / 16


def test_a_ledger_names_every_purpose_once() -> None:
    spec = make_spec()
    purposes = ledger(spec, "cpu", "w4a8", SHAPE, 1000, 10**9)
    assert purposes["cache"] == 320 * spec.kv_bytes_per_token  # 256 + 16 + 1 slots, by 64
    assert purposes["staging"] == 2 << 20
    assert purposes["overhead"] == 1000
    assert purposes["guard"] == 10**7
    assert ledger(spec, "cpu", "w4a8", SHAPE, 0, 1)["guard"] == GUARD_BYTES


def test_plain_decoding_pays_for_no_draft() -> None:
    spec = make_spec(dtype="float32")
    plain = ledger(spec, "cpu", "w4a8", Shape(256, 16, 0, 128, 1 << 20, 2, 0, 2), 0, 10**9)
    drafted = ledger(spec, "cpu", "w4a8", SHAPE, 0, 10**9)
    assert plain["substitutes"] == 0
    assert plain["tables"] < drafted["tables"]


def test_plain_decoding_of_residuals_needs_their_substitutes() -> None:
    plain = ledger(
        make_spec(), "cpu", "w4a8", Shape(256, 16, 0, 128, 1 << 20, 2, 1 << 18, 2), 0, 10**9
    )
    assert plain["substitutes"] == substitutes_bytes(make_spec(), "aten")
    assert plain["scratch"] == 1 << 18


@pytest.mark.parametrize(
    "larger",
    [
        Shape(512, 16, 3, 128, 1 << 20, 2, 0, 2),
        Shape(256, 32, 3, 128, 1 << 20, 2, 0, 2),
        Shape(256, 16, 8, 128, 1 << 20, 2, 0, 2),
        Shape(256, 16, 3, 512, 1 << 20, 2, 0, 2),
        Shape(256, 16, 3, 128, 2 << 20, 2, 0, 2),
        Shape(256, 16, 3, 128, 1 << 20, 3, 0, 2),
        Shape(256, 16, 3, 128, 1 << 20, 2, 1 << 18, 2),
        Shape(256, 16, 3, 128, 1 << 20, 2, 0, 8),
    ],
)
def test_more_of_anything_never_takes_less_memory(larger: Shape) -> None:
    for device in ("cpu", "cuda"):
        small = ledger(make_spec(), device, "aten", SHAPE, 0, 10**9)  # type: ignore[arg-type]
        large = ledger(make_spec(), device, "aten", larger, 0, 10**9)  # type: ignore[arg-type]
        assert all(large[purpose] >= small[purpose] for purpose in small)
        assert sum(large.values()) >= sum(small.values())
