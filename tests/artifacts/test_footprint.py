"""Bytes of fast memory, against values worked out by hand."""

from dataclasses import fields, replace
from math import prod
from typing import Any

import pytest
from toys import make_spec

from subspec.artifacts.footprint import (
    ALLOCATOR_BYTES,
    GUARD_BYTES,
    MAX_GUARD_BYTES,
    Ring,
    Shape,
    cache_bytes,
    cache_slots,
    draft_copies_bytes,
    make_ledger,
    model_bytes,
    norms_bytes,
    packed_bytes,
    padded_vocabulary,
    substitutes_bytes,
    tables_bytes,
    workspace_bytes,
)
from subspec.artifacts.model import Dense, LayerSpec, ModelSpec, Rope
from subspec.artifacts.plan import DeviceKind, Ledger

SPEC = make_spec()
SHAPE = Shape(
    context=256,
    num_sequences=1,
    verify_width=16,
    draft_width=3,
    prefill_chunk_tokens=128,
    num_threads=2,
    head_rows=8,
    ring=Ring(1 << 20, 2),
)
DEVICES: list[DeviceKind] = ["cpu", "cuda"]


def exact_bytes(spec: ModelSpec) -> int:
    return sum(part.num_bytes for part in spec.parts)


def ledger(shape: Shape = SHAPE, spec: ModelSpec = SPEC, device: DeviceKind = "cpu") -> Ledger:
    return make_ledger(spec, device, "w4a8", shape, 0, 10**9)


def test_exact_and_small_tensors_and_an_untied_embedding_are_the_whole_model() -> None:
    small = sum(prod(shape) for shape in SPEC.resident_shapes.values()) * 2
    assert model_bytes(SPEC) == exact_bytes(SPEC) + small + 2048 * 256 * 2
    tied = replace(SPEC, tie_word_embeddings=True)
    assert model_bytes(tied) == exact_bytes(SPEC) + small


def test_substitutes_take_a_little_more_than_a_quarter() -> None:
    """4 bits, and 32 for each group of 64, against 16."""
    assert substitutes_bytes(SPEC, "aten") == exact_bytes(SPEC) * 4.5 / 16
    assert substitutes_bytes(SPEC, "gemlite") == exact_bytes(SPEC) * 5 / 16


def test_a_matrix_without_a_substitute_counts_as_small_and_is_exact() -> None:
    odd = make_spec(intermediate_size=72)
    norms_and_biases = 2 * 256 + (256 + 128 + 128)
    assert norms_bytes(odd) == (8 * (3 * 72 * 256 + norms_and_biases) + 256) * 2
    assert substitutes_bytes(odd, "aten") < substitutes_bytes(SPEC, "aten")


def test_the_codes_and_qparams_of_a_matrix_are_asked_for_by_kernel() -> None:
    assert packed_bytes(48, 192, "aten") == packed_bytes(48, 192, "w4a8") == (4608, 576)
    assert packed_bytes(48, 192, "gemlite") == (4608, 576, 576)


def test_a_ledger_names_every_purpose_once() -> None:
    purposes = make_ledger(SPEC, "cpu", "w4a8", SHAPE, 1000, 10**9)
    kv_sizes = sum(one.kv_size for one in SPEC.attentions)
    assert purposes.cache == 320 * 2 * kv_sizes * 2  # 256 + 16 + 1 slots, by 64
    assert purposes.tables == 2 * 320 * 64 * 2  # cos and sin of one rope, bf16
    assert purposes.norms == (8 * (2 * 256 + 512) + 256) * 2
    assert purposes.staging == 2 << 20
    assert purposes.overhead == 1000
    assert purposes.guard == 10**7
    assert purposes.resident == purposes.residuals == purposes.scratch == 0
    assert make_ledger(SPEC, "cpu", "w4a8", SHAPE, 0, 1).guard == GUARD_BYTES
    on_gpu = [make_ledger(SPEC, "cuda", "aten", SHAPE, 0, size).guard for size in (10**9, 10**11)]
    assert on_gpu == [10**7, MAX_GUARD_BYTES]
    assert purposes.total_bytes == sum(getattr(purposes, one.name) for one in fields(Ledger))


def test_arenas_are_what_is_allocated_when_a_model_is_opened() -> None:
    purposes = make_ledger(SPEC, "cpu", "w4a8", SHAPE, 1000, 10**9)
    left = {"workspace", "overhead", "guard"}
    assert {one.name for one in fields(Ledger)} - set(purposes.arenas) == left
    others = purposes.workspace + purposes.overhead + purposes.guard
    assert sum(purposes.arenas.values()) == purposes.total_bytes - others


def test_plain_decoding_pays_for_no_draft() -> None:
    spec = make_spec(dtype="float32")
    plain, drafted = ledger(replace(SHAPE, draft_width=None), spec), ledger(SHAPE, spec)
    assert plain.substitutes == 0 and drafted.substitutes == substitutes_bytes(spec, "w4a8")
    assert plain.tables < drafted.tables


def test_plain_decoding_of_residuals_needs_their_substitutes() -> None:
    plain = ledger(replace(SHAPE, draft_width=None, scratch_bytes=1 << 18, decodes_residuals=True))
    assert plain.substitutes == substitutes_bytes(SPEC, "w4a8")
    assert plain.scratch == 1 << 18


def test_what_does_not_stream_needs_no_staging() -> None:
    assert ledger(replace(SHAPE, ring=None)).staging == 0


def test_the_cache_is_that_of_every_attention_and_every_sequence() -> None:
    one = make_spec(num_layers=1).layers[0]
    [attention] = one.attentions
    other = replace(attention, num_kv_heads=1, head_size=48)
    narrow = LayerSpec((replace(one.blocks[0], body=other), one.blocks[1]))
    spec = make_spec(layers=(one, narrow))
    slots = cache_slots(256, 16)
    assert slots == 320
    assert cache_bytes(spec, SHAPE) == 2 * 2 * slots * (2 * 64 + 48)
    assert cache_bytes(spec, replace(SHAPE, num_sequences=5)) == 5 * cache_bytes(spec, SHAPE)


def test_tables_are_one_pair_for_each_rope_and_the_drafts_copies() -> None:
    layers = make_spec(num_layers=2).layers
    [attention] = layers[1].attentions
    small = replace(attention, rope=Rope(500.0, 32))
    mixed = (layers[0], LayerSpec((replace(layers[1].blocks[0], body=small), layers[1].blocks[1])))
    assert tables_bytes(make_spec(layers=mixed), SHAPE) == 2 * 320 * (64 + 32) * 2
    none = replace(attention, rope=None)
    nope = (LayerSpec((replace(layers[1].blocks[0], body=none), layers[1].blocks[1])),)
    assert tables_bytes(make_spec(layers=nope), SHAPE) == 0
    assert tables_bytes(make_spec(rope_in_f32=True), SHAPE) == 2 * 320 * 64 * 4
    f32 = make_spec(dtype="float32")
    assert draft_copies_bytes(f32) == (8 * (2 * 256 + 512) + 256) * 2  # norms and biases in bf16
    assert tables_bytes(f32, SHAPE) == 2 * 320 * 64 * (4 + 2) + draft_copies_bytes(f32)
    exact = replace(f32, rope_in_f32=True)  # the draft rotates by the same tables
    assert tables_bytes(exact, SHAPE) == 2 * 320 * 64 * 4 + draft_copies_bytes(exact)


def test_a_gpu_is_granted_what_its_libraries_take() -> None:
    plain = replace(SHAPE, draft_width=None)
    assert workspace_bytes(SPEC, "cuda", plain) >= ALLOCATOR_BYTES
    assert workspace_bytes(SPEC, "cuda", SHAPE) > workspace_bytes(SPEC, "cpu", SHAPE)


def test_logits_are_counted_with_the_heads_padding() -> None:
    assert padded_vocabulary(make_spec(vocab_size=2000)) == 2048


MORE: list[dict[str, Any]] = [
    {"context": 512},
    {"num_sequences": 2},
    {"num_sequences": 4},
    {"verify_width": 32},
    {"draft_width": 8},
    {"prefill_chunk_tokens": 512},
    {"num_threads": 8},
    {"ring": Ring(2 << 20, 2)},
    {"ring": Ring(1 << 20, 3)},
    {"scratch_bytes": 1 << 18},
]


@pytest.mark.parametrize("changes", MORE, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_more_of_anything_never_takes_less_memory(
    changes: dict[str, Any], device: DeviceKind
) -> None:
    for spec in (SPEC, make_spec(dtype="float32", qk_norm=True)):
        small, large = (ledger(shape, spec, device) for shape in (SHAPE, replace(SHAPE, **changes)))
        assert all(vars(large)[purpose] >= size for purpose, size in vars(small).items())
        assert large.total_bytes >= small.total_bytes


@pytest.mark.parametrize("device", DEVICES)
def test_the_layer_that_takes_most_decides_the_workspace(device: DeviceKind) -> None:
    wide = replace(SPEC.layers[3], blocks=(SPEC.layers[3].blocks[0], replace(
        SPEC.layers[3].blocks[1], body=Dense(8192))))  # fmt: skip
    one_wide = replace(SPEC, layers=(*SPEC.layers[:3], wide, *SPEC.layers[4:]))
    all_wide = replace(SPEC, layers=(wide,) * 8)
    found = [workspace_bytes(spec, device, SHAPE) for spec in (SPEC, one_wide, all_wide)]
    assert found[0] < found[1] == found[2]
