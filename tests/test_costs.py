"""Bytes and seconds of a candidate, against values worked out by hand."""

from dataclasses import replace

import pytest
from toys import make_profile, make_spec

from subspec.artifacts.model import ModelSpec, parts, resident_tensors
from subspec.planner.costs import (
    GUARD_BYTES,
    Candidate,
    Shape,
    expected_tokens,
    ledger,
    model_bytes,
    predict,
    substitutes_bytes,
)
from subspec.planner.storage import raw_storage, usual_storages

SHAPE = Shape(256, 16, 3, 128, 1 << 20, 2, 0, 2)
CODED, *_, RAW = usual_storages(make_spec())
CHAIN = Candidate(RAW, 1, 4, 8, 1 << 20, 2)
PLAIN = Candidate(RAW, 0, 0, 8, 1 << 20, 2)
LINK = 100e6  # bytes per second of the toy's link at 1 MiB


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
    assert substitutes_bytes(make_spec()) == exact_bytes(make_spec()) * 4.5 / 16


def test_a_ledger_names_every_purpose_once() -> None:
    spec = make_spec()
    purposes = ledger(spec, "cpu", SHAPE, 1000, 10**9)
    assert purposes["cache"] == 320 * spec.kv_bytes_per_token  # 256 + 16 + 1 slots, by 64
    assert purposes["staging"] == 2 << 20
    assert purposes["overhead"] == 1000
    assert purposes["guard"] == 10**7
    assert ledger(spec, "cpu", SHAPE, 0, 1)["guard"] == GUARD_BYTES


def test_plain_decoding_pays_for_no_draft() -> None:
    spec = make_spec(dtype="float32")
    plain = ledger(spec, "cpu", Shape(256, 16, 0, 128, 1 << 20, 2, 0, 2), 0, 10**9)
    drafted = ledger(spec, "cpu", SHAPE, 0, 10**9)
    assert plain["substitutes"] == 0
    assert plain["tables"] < drafted["tables"]


def test_plain_decoding_of_residuals_needs_their_substitutes() -> None:
    plain = ledger(make_spec(), "cpu", Shape(256, 16, 0, 128, 1 << 20, 2, 1 << 18, 2), 0, 10**9)
    assert plain["substitutes"] == substitutes_bytes(make_spec())
    assert plain["scratch"] == 1 << 18


def test_decoding_is_paid_by_every_weight_that_is_a_residual() -> None:
    profile = make_profile(decode_rate=1e8)
    found = predict(make_spec(), profile, replace(CHAIN, storage=CODED), 0, 0.5, 128, 0)
    raw = predict(make_spec(), profile, CHAIN, 0, 0.5, 128, 0)
    assert found.decode_seconds == pytest.approx(exact_bytes(make_spec()) / 2 / 1e8)
    assert found.compute_seconds == pytest.approx(raw.compute_seconds + found.decode_seconds)
    assert raw.decode_seconds == 0


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
        small = ledger(make_spec(), device, SHAPE, 0, 10**9)  # type: ignore[arg-type]
        large = ledger(make_spec(), device, larger, 0, 10**9)  # type: ignore[arg-type]
        assert all(large[purpose] >= small[purpose] for purpose in small)
        assert sum(large.values()) >= sum(small.values())


def test_expected_tokens_count_the_exact_models_own() -> None:
    assert expected_tokens(0.5, 0) == 1
    assert expected_tokens(0.5, 3) == 1 + 0.5 + 0.25 + 0.125
    assert expected_tokens(1.0, 5) == 6


def test_a_round_on_a_slow_link_lasts_as_long_as_the_link() -> None:
    """10 MiB stream, 2 MiB of them arrive while the draft runs; one block of compute is left."""
    profile, streamed = make_profile(draft_head=make_profile().exact_head), 10 << 20
    found = predict(make_spec(), profile, CHAIN, streamed, 0.5, 128, 0)
    assert found.draft_seconds == pytest.approx(4 * (8 * 5e-5 + 1e-4))
    assert found.compute_seconds == pytest.approx(8 * 2e-4 + 1e-4 + 7 / 63 * 3e-4)
    ahead = found.draft_seconds * LINK
    assert ahead < 2 << 20
    link = (streamed - ahead) / LINK
    assert found.verify_seconds == pytest.approx(link + found.compute_seconds / 10 + 1e-4)
    assert found.tokens_per_round == 1.9375
    total = found.draft_seconds + found.verify_seconds
    assert found.tokens_per_second == pytest.approx(1.9375 / total)


def test_no_more_than_the_ring_crosses_the_link_ahead() -> None:
    slow = make_profile(draft_layer=tuple(make_profile().draft_layer[-1:]))
    deep = Candidate(RAW, 8, 100, 8, 1 << 20, 2)
    found = predict(make_spec(), slow, deep, 10 << 20, 0.5, 128, 0)
    assert found.draft_seconds * LINK > 2 << 20
    link = (8 << 20) / LINK
    assert found.verify_seconds == pytest.approx(link + found.compute_seconds / 10 + 1e-4)


def test_plain_decoding_is_one_unpadded_pass() -> None:
    found = predict(make_spec(), make_profile(), PLAIN, 0, 0.5, 128, 0)
    assert found.draft_seconds == found.stream_seconds == 0
    assert found.compute_seconds == pytest.approx(8 * 8e-5 + 1e-4)
    assert found.verify_seconds == pytest.approx(found.compute_seconds + 1e-4)


def test_a_prompt_in_two_pieces_streams_the_weights_twice() -> None:
    whole = predict(make_spec(), make_profile(), PLAIN, 10**8, 0.5, 128, 0)
    halves = predict(make_spec(), make_profile(), PLAIN, 10**8, 0.5, 64, 0)
    extra = halves.time_to_first_token_seconds - whole.time_to_first_token_seconds
    assert extra == pytest.approx(10**8 / LINK)


@pytest.mark.parametrize("candidate", [CHAIN, PLAIN])
@pytest.mark.parametrize("layer_seconds", [1e-5, 1e-3, 1e-1])
def test_a_byte_less_to_stream_is_never_slower(candidate: Candidate, layer_seconds: float) -> None:
    """Also where a whole number of blocks begins, and on either side of link = compute."""
    timing = make_profile().exact_layer[:1]
    profile = make_profile(
        plain_layer_seconds=layer_seconds,
        exact_layer=tuple(type(t)(t.width, layer_seconds) for t in timing),
    )
    seconds = [
        predict(make_spec(), profile, candidate, streamed, 0.9, 128, 0).verify_seconds
        for streamed in range(0, 20 << 20, 99_991)
    ]
    assert seconds == sorted(seconds)
