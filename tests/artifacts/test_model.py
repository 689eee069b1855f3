"""A decoder as data: its matrices, their parts, and what is always resident."""

from dataclasses import replace

import pytest
from toys import make_spec

from subspec.artifacts.format.codec import dump_json, load_dataclass, parse_json
from subspec.artifacts.model import (
    PART_BYTES,
    Attention,
    Block,
    Dense,
    LayerSpec,
    Linear,
    ModelSpec,
    NormStyle,
    QueryGrowth,
    Rope,
    StoredPart,
)

TINY = make_spec(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    intermediate_size=128,
    hidden_size=64,
    vocab_size=128,
    qkv_bias=False,
)
# gate is 2624 rows of 64 KiB: 2.6 parts, which are not equal in whole 64 rows.
LARGE = make_spec(
    num_layers=1, head_size=16, intermediate_size=2624, hidden_size=16384, dtype="float32"
)
# 72 inputs are not groups of 64, nor 16 x rows.
UNEVEN = make_spec(num_layers=2, head_size=16, intermediate_size=72, hidden_size=64, vocab_size=128)
# Layers that differ: an attention of other sizes and norms, a bias, two attentions in one layer.
MIXED = replace(
    TINY,
    layers=(
        TINY.layers[0],
        LayerSpec(
            (
                Block(
                    Attention(
                        6, 1, 32, 0.3, Rope(500.0, 8, interleaved=True), window=20,
                        output_bias=True, qk_norm="all_heads", query_growth=QueryGrowth(0.1, 64),
                        name="mixer",
                    ),
                    None,
                    "behind",
                    0.5,
                ),
                Block(
                    Attention(
                        2, 2, 16, 0.25, None, qk_norm="head", value_norm=True
                    ),
                    "before",
                    "after",
                ),
                Block(Dense(192, bias=True, activation="gelu_tanh", name="ffn"), "second"),
            ),
            "layer_scalar",
        ),
    ),
)  # fmt: skip
SPECS = {"tiny": TINY, "large": LARGE, "uneven": UNEVEN, "mixed": MIXED}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_parts_cover_every_row_of_every_matrix_once_and_in_order(spec: ModelSpec) -> None:
    covered: dict[str, list[int]] = {}
    order = []
    for part in spec.parts:
        rows = range(part.first_row, part.first_row + part.num_rows)
        covered.setdefault(part.linear.name, []).extend(rows)
        order.append((part.linear.layer, part.linear.place, part.first_row))
    for linear in spec.linears:
        if linear.has_substitute:
            assert covered[linear.name] == list(range(linear.out_features))
    assert order == sorted(order)


def test_matrices_come_in_the_order_of_execution_with_the_head_last() -> None:
    attention = [f"self_attn.{letter}_proj" for letter in "qkvo"]
    dense = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    expected = [f"model.layers.{n}.{name}" for n in (0, 1) for name in attention + dense]
    assert [linear.name for linear in TINY.linears] == [*expected, "lm_head"]
    assert [(one.layer, one.place) for one in TINY.linears[6:9]] == [(0, 6), (1, 0), (1, 1)]
    assert TINY.linears[-1] == Linear("lm_head", 2, 0, 128, 64, False)


def test_a_layer_has_the_matrices_of_its_own_blocks() -> None:
    own = {linear.name: linear for linear in MIXED.linears if linear.layer == 1}
    shapes = {name: (one.out_features, one.in_features, one.has_bias) for name, one in own.items()}
    assert shapes == {
        "model.layers.1.mixer.q_proj": (192, 64, False),
        "model.layers.1.mixer.k_proj": (32, 64, False),
        "model.layers.1.mixer.v_proj": (32, 64, False),
        "model.layers.1.mixer.o_proj": (64, 192, True),
        "model.layers.1.self_attn.q_proj": (32, 64, False),
        "model.layers.1.self_attn.k_proj": (32, 64, False),
        "model.layers.1.self_attn.v_proj": (32, 64, False),
        "model.layers.1.self_attn.o_proj": (64, 32, False),
        "model.layers.1.ffn.gate_proj": (192, 64, True),
        "model.layers.1.ffn.up_proj": (192, 64, True),
        "model.layers.1.ffn.down_proj": (64, 192, True),
    }
    assert [one.place for one in own.values()] == list(range(11))


def test_a_large_matrix_is_split_into_about_equal_parts_of_whole_64_rows() -> None:
    gate = [part for part in LARGE.parts if part.linear.name.endswith("gate_proj")]
    assert [part.num_rows for part in gate] == [896, 896, 832]
    assert gate[1].name == "model.layers.0.mlp.gate_proj[896:1792]"
    assert all(part.num_bytes == part.num_rows * 16384 * 4 for part in gate)
    assert all(part.num_bytes <= PART_BYTES for part in gate)


def test_the_head_of_a_large_vocabulary_needs_no_more_staging_than_the_layers() -> None:
    spec = make_spec(num_layers=1, hidden_size=576, intermediate_size=1536, vocab_size=49_152)
    *layers, head = spec.linears
    largest = max(one.num_weights for one in layers) * spec.item_bytes
    parts = [part for part in spec.parts if part.linear is head]
    assert sum(part.num_rows for part in parts) == 49_152
    assert max(part.num_bytes for part in parts) <= largest
    small = make_spec(num_layers=1, hidden_size=64, intermediate_size=64, vocab_size=49_152)
    assert max(part.num_bytes for part in small.parts) == 1 << 20


def test_the_names_of_parts_are_unique_and_a_whole_matrix_keeps_its_name() -> None:
    names = [part.name for part in LARGE.parts]
    assert len(set(names)) == len(names)
    assert {part.name for part in TINY.parts} == {linear.name for linear in TINY.linears}


def test_a_part_is_padded_to_whole_pages() -> None:
    head = TINY.parts[-1]
    assert head.num_bytes == 128 * 64 * 2 == 4 * 4096
    assert head.padded_bytes == head.num_bytes
    odd = make_spec(num_layers=1, intermediate_size=320, hidden_size=16)
    down = next(part for part in odd.parts if part.linear.name.endswith("down_proj"))
    assert down.num_bytes == 16 * 320 * 2 == 2.5 * 4096
    assert down.padded_bytes == 3 * 4096
    assert StoredPart(down, "residual", 5000).padded_bytes == 2 * 4096


@pytest.mark.parametrize("vocab_size", [65, 96, 127, 128])
def test_a_head_of_any_vocabulary_is_padded_to_whole_tiles(vocab_size: int) -> None:
    head = replace(TINY, vocab_size=vocab_size).linears[-1]
    assert head.out_features == 128 and head.padding_rows == 128 - vocab_size
    assert head.has_substitute
    assert all(linear.padding_rows == 0 for linear in TINY.linears)


def test_the_head_streams_tied_or_not_and_the_embedding_is_never_resident() -> None:
    for tied in (False, True):
        spec = replace(TINY, tie_word_embeddings=tied)
        assert spec.parts[-1].linear.name == "lm_head"
        assert not [name for name in spec.resident_shapes if "embed" in name or "head" in name]
        assert spec.embedding_bytes == 128 * 64 * 2


def test_a_matrix_that_the_4_bit_format_cannot_hold_is_resident() -> None:
    assert UNEVEN.resident_shapes["model.layers.0.mlp.down_proj.weight"] == (64, 72)
    assert UNEVEN.resident_shapes["model.layers.1.mlp.gate_proj.weight"] == (72, 64)
    names = {part.linear.name.rpartition(".")[2] for part in UNEVEN.parts}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_weight_is_a_part_or_resident_but_never_both(spec: ModelSpec) -> None:
    streamed = {f"{part.linear.name}.weight" for part in spec.parts}
    resident = {name for name, shape in spec.resident_shapes.items() if len(shape) == 2}
    assert not streamed & resident
    assert streamed | resident == {f"{linear.name}.weight" for linear in spec.linears}


def test_biases_and_norms_are_resident_with_their_lengths() -> None:
    spec = make_spec(
        num_layers=2, head_size=16, intermediate_size=128, hidden_size=64, qkv_bias=True,
        output_bias=True, mlp_bias=True, qk_norm=True,
    )  # fmt: skip
    resident, layer = spec.resident_shapes, "model.layers.1"
    assert resident[f"{layer}.self_attn.q_proj.bias"] == (64,)
    assert resident[f"{layer}.self_attn.k_proj.bias"] == (32,)
    assert resident[f"{layer}.self_attn.o_proj.bias"] == (64,)
    assert resident[f"{layer}.mlp.up_proj.bias"] == (128,)
    assert resident[f"{layer}.self_attn.q_norm.weight"] == (16,)
    assert resident["model.norm.weight"] == (64,)
    assert len(spec.norm_sizes) == 2 * 4 + 1
    assert len(TINY.norm_sizes) == 2 * 2 + 1


def test_norms_are_those_that_the_blocks_name_in_execution_order() -> None:
    layer = "model.layers.1"
    own = {name: n for name, n in MIXED.norm_sizes.items() if name.startswith(layer)}
    assert list(own.items()) == [
        (f"{layer}.mixer.q_norm", 192),  # over all heads together
        (f"{layer}.mixer.k_norm", 32),
        (f"{layer}.behind", 64),
        (f"{layer}.before", 64),
        (f"{layer}.self_attn.q_norm", 16),
        (f"{layer}.self_attn.k_norm", 16),
        (f"{layer}.after", 64),
        (f"{layer}.second", 64),
    ]
    assert list(MIXED.norm_sizes)[-1] == "model.norm"


def test_residuals_need_whole_tiles_of_rows() -> None:
    spec = make_spec(num_layers=1, num_kv_heads=1, head_size=16, hidden_size=64)
    able = {part.linear.name: part.can_be_residual for part in spec.parts}
    assert not able["model.layers.0.self_attn.k_proj"] and able["model.layers.0.self_attn.q_proj"]


def test_values_that_are_keys_have_no_matrix_but_slots_in_the_cache() -> None:
    [first, *others] = TINY.layers
    keys = replace(first.attentions[0], values_are_keys=True)
    spec = replace(
        TINY, layers=(replace(first, blocks=(replace(first.blocks[0], body=keys),)), *others)
    )
    names = [linear.name for linear in spec.linears if linear.layer == 0]
    assert [name.rpartition(".")[2] for name in names] == ["q_proj", "k_proj", "o_proj"]
    assert [one.kv_size for one in spec.attentions] == [one.kv_size for one in TINY.attentions]


def test_scalars_are_resident_and_the_last_of_what_is() -> None:
    assert MIXED.scalar_names == (None, "model.layers.1.layer_scalar")
    assert list(MIXED.resident_shapes.items())[-1] == ("model.layers.1.layer_scalar", (1,))


def test_ropes_and_bodies_are_the_distinct_ones() -> None:
    assert len(make_spec(num_layers=5).ropes) == 1
    assert MIXED.ropes == (Rope(10_000.0, 16), Rope(500.0, 8, interleaved=True))
    assert len(MIXED.bodies) == 5 and len(TINY.bodies) == 2
    windows = make_spec(num_layers=4, window=8, windowed_layers=(1, 2))
    assert len(windows.bodies) == 3 and len(windows.ropes) == 1


def test_specs_that_differ_in_a_layer_are_not_the_same() -> None:
    """What is worked out once for a model is looked up by it."""
    first = TINY.layers[0].blocks[0]
    other = replace(
        TINY.layers[0], blocks=(replace(first, multiplier=0.5), *TINY.layers[0].blocks[1:])
    )
    changed = replace(TINY, layers=(other, TINY.layers[1]))
    assert hash(TINY) == hash(changed) and TINY != changed
    assert replace(TINY, norm=NormStyle(1e-5)) != TINY


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_spec_comes_back_from_json_as_it_was(spec: ModelSpec) -> None:
    written = dump_json(spec)
    assert load_dataclass(ModelSpec, parse_json(written, "model.json"), "model.json") == spec
