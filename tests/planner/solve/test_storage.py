"""How weights may be stored, and what of them is held decoded: names and bytes."""

from dataclasses import replace

import pytest
from toys import make_spec

from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.model import HEAD
from subspec.planner.solve.storage import (
    NUM_SHARES,
    Storage,
    evenly_raw,
    held_decoded,
    raw_storage,
    storages,
    usual_storages,
)

SPEC = make_spec()
CODED, *_, RAW = usual_storages(SPEC)


def raw_bytes(storage: Storage, names: tuple[str, ...]) -> int:
    return sum(part.part.num_bytes for part in storage.parts if part.name in names)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_a_share_of_the_bytes_is_spread_evenly(share: float) -> None:
    """Of every stretch, to within the largest matrix."""
    every = SPEC.parts
    chosen = set(evenly_raw(every, share))
    largest = max(part.num_bytes for part in every)
    so_far = due = 0.0
    for part in every:
        due += share * part.num_bytes
        so_far += part.num_bytes if part in chosen else 0
        assert abs(due - so_far) <= largest / 2
    assert (len(chosen) == 0) == (share == 0) and (len(chosen) == len(every)) == (share == 1)


def test_a_matrix_that_can_be_no_residual_is_raw_whatever_the_share() -> None:
    odd = make_spec(intermediate_size=528)
    chosen = set(evenly_raw(odd.parts, 0.0))
    assert chosen == {part for part in odd.parts if part.linear.out_features == 528}


@pytest.mark.parametrize("stored", usual_storages(SPEC), ids=range(len(usual_storages(SPEC))))
def test_what_is_held_decoded_neither_streams_nor_is_decoded_again(stored: Storage) -> None:
    for storage in held_decoded(stored):
        decoded = set(storage.decoded)
        others = [part for part in stored.parts if part.name not in decoded]
        coded = [part for part in others if part.encoding == "residual"]
        assert storage.parts == stored.parts and storage.residuals == stored.residuals
        assert storage.bits_per_residual == stored.bits_per_residual
        assert list(storage.as_stored) == others
        assert storage.num_bytes == sum(part.padded_bytes for part in others)
        assert storage.coded_weights == sum(part.part.num_weights for part in coded)
        assert storage.scratch_bytes == max((p.part.padded_bytes for p in coded), default=0)
        assert storage.decoded_bytes == raw_bytes(stored, storage.decoded)
        assert sorted(p.name for layer in storage.layers for p in layer) == sorted(
            part.name for part in others if part.part.linear.name != HEAD
        )


def test_the_shares_go_from_none_to_all_in_execution_order() -> None:
    found = held_decoded(CODED)
    assert found[0] is CODED and len(found) == NUM_SHARES + 1
    order = [part.name for part in CODED.parts]
    whole = raw_bytes(CODED, CODED.residuals)
    for number, storage in enumerate(found):
        assert list(storage.decoded) == sorted(storage.decoded, key=order.index)
        share = storage.decoded_bytes / whole
        assert share == pytest.approx(number / NUM_SHARES, abs=0.05)
    assert found[-1].decoded == CODED.residuals
    assert found[-1].num_bytes == found[-1].largest_part == found[-1].layer_bytes == 0


def test_only_residuals_are_decoded() -> None:
    mixed = usual_storages(SPEC)[3]
    assert 0 < len(mixed.residuals) < len(mixed.parts)
    last = held_decoded(mixed)[-1]
    assert last.decoded == mixed.residuals
    assert {part.encoding for part in last.as_stored} == {"raw"}
    assert held_decoded(RAW) == (RAW,)


def test_few_residuals_give_each_choice_once() -> None:
    two = Storage(CODED.parts[:2])
    found = [storage.decoded for storage in held_decoded(two)]
    assert len(found) == len(set(found)) and found[-1] == two.residuals


def test_the_same_storages_are_found_again_for_the_same_artifact() -> None:
    """They are keys of what is worked out once."""
    stored = replace(CODED)
    assert all(a is b for a, b in zip(held_decoded(stored), held_decoded(stored), strict=True))


def test_a_new_artifact_may_hold_residuals_decoded_only_if_it_must_have_residuals() -> None:
    found = storages(SPEC, "auto", decodes=True)
    assert [(s.parts, s.decoded) for s in found] == [(s.parts, ()) for s in usual_storages(SPEC)]
    forced = storages(SPEC, "residual", decodes=True)
    expected = held_decoded(CODED)
    assert [(s.parts, s.decoded) for s in forced] == [(s.parts, s.decoded) for s in expected]
    assert storages(SPEC, "raw", decodes=True) == (raw_storage(SPEC),)
    assert storages(SPEC, "auto", decodes=False) == (raw_storage(SPEC),)
    with pytest.raises(SubspecError):
        storages(SPEC, "residual", decodes=False)


def test_what_is_held_is_spread_over_the_layers() -> None:
    """A matrix of every second layer first, then of those between."""
    first = [part for part in RAW.resident_first if part.part.linear.name.endswith("q_proj")]
    assert RAW.resident_first[: len(first)] == first
    layers = [part.part.linear.layer for part in first]
    assert layers[: (len(layers) + 1) // 2] == sorted(
        range(0, len(layers), 2), key=lambda layer: layers.index(layer)
    )
    assert sorted(RAW.resident_first, key=RAW.parts.index) == list(RAW.parts)
