from dataclasses import replace

import pytest

from subspec.artifacts.model import (
    PART_BYTES,
    Linear,
    ModelSpec,
    Rope,
    linears,
    norms,
    parts,
    resident_tensors,
)

TINY = ModelSpec(
    family="llama",
    dtype="bfloat16",
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    vocab_size=96,
    norm_epsilon=1e-6,
    max_positions=128,
    rope=Rope(10000.0),
    tied_head=False,
)
# gate is 2624 rows of 64 KiB: 2.6 parts, which are not equal in whole 64 rows.
LARGE = replace(TINY, dtype="float32", hidden_size=16384, intermediate_size=2624, num_layers=1)


@pytest.mark.parametrize("spec", [TINY, LARGE])
def test_parts_cover_every_row_of_every_matrix_once_and_in_order(spec: ModelSpec) -> None:
    covered: dict[str, list[int]] = {}
    order = []
    for part in parts(spec):
        rows = range(part.first_row, part.first_row + part.num_rows)
        covered.setdefault(part.linear.name, []).extend(rows)
        order.append((part.linear, part.first_row))
    for linear in linears(spec):
        assert covered[linear.name] == list(range(linear.out_features))
    place = {linear: index for index, linear in enumerate(linears(spec))}
    assert order == sorted(order, key=lambda key: (place[key[0]], key[1]))


def test_matrices_come_in_the_order_of_execution_with_the_head_last() -> None:
    kinds = [linear.kind for linear in linears(TINY)]
    assert kinds == ["q", "k", "v", "o", "gate", "up", "down"] * 2 + ["head"]
    assert linears(TINY)[7].name == "model.layers.1.self_attn.q_proj"
    assert linears(TINY)[-1] == Linear("lm_head", "head", 2, 96, 64, False)


def test_a_large_matrix_is_split_into_about_equal_parts_of_whole_64_rows() -> None:
    gate = [part for part in parts(LARGE) if part.linear.kind == "gate"]
    assert [part.num_rows for part in gate] == [896, 896, 832]
    assert gate[1].name == "model.layers.0.mlp.gate_proj[896:1792]"
    assert all(part.num_bytes == part.num_rows * 16384 * 4 for part in gate)
    assert all(part.num_bytes <= PART_BYTES for part in gate)


def test_the_names_of_parts_are_unique_and_a_whole_matrix_keeps_its_name() -> None:
    names = [part.name for part in parts(LARGE)]
    assert len(set(names)) == len(names)
    assert {part.name for part in parts(TINY)} == {linear.name for linear in linears(TINY)}


def test_a_part_is_padded_to_whole_pages() -> None:
    head = parts(TINY)[-1]
    assert head.num_bytes == 96 * 64 * 2 == 3 * 4096
    assert head.padded_bytes == head.num_bytes
    odd = parts(replace(TINY, vocab_size=112))[-1]
    assert (odd.num_bytes, odd.padded_bytes) == (14336, 4 * 4096)


def test_the_embedding_is_resident_and_an_untied_head_streams() -> None:
    assert resident_tensors(TINY)["model.embed_tokens.weight"] == (96, 64)
    assert "lm_head.weight" not in resident_tensors(TINY)
    assert parts(TINY)[-1].linear.kind == "head"


def test_a_tied_head_is_neither_streamed_nor_held_twice() -> None:
    tied = replace(TINY, tied_head=True)
    assert all(part.linear.kind != "head" for part in parts(tied))
    assert "lm_head.weight" not in resident_tensors(tied)
    assert linears(tied)[-1].kind == "head"


def test_a_matrix_that_the_4_bit_format_cannot_hold_is_resident() -> None:
    spec = replace(TINY, intermediate_size=72)  # 72 inputs are not groups of 64, nor 16 x rows
    resident = resident_tensors(spec)
    assert resident["model.layers.0.mlp.down_proj.weight"] == (64, 72)
    assert resident["model.layers.1.mlp.gate_proj.weight"] == (72, 64)
    assert {part.linear.kind for part in parts(spec)} == {"q", "k", "v", "o", "head"}


def test_every_weight_is_a_part_or_resident_but_never_both() -> None:
    for spec in (TINY, replace(TINY, tied_head=True), replace(TINY, intermediate_size=72)):
        streamed = {f"{part.linear.name}.weight" for part in parts(spec)}
        resident = set(resident_tensors(spec))
        assert not streamed & resident
        wanted = {f"{linear.name}.weight" for linear in linears(spec)}
        if spec.tied_head:
            wanted.remove("lm_head.weight")
        assert wanted <= streamed | resident


def test_biases_and_norms_are_resident_with_their_lengths() -> None:
    spec = replace(TINY, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True)
    resident = resident_tensors(spec)
    layer = "model.layers.1"
    assert resident[f"{layer}.self_attn.q_proj.bias"] == (64,)
    assert resident[f"{layer}.self_attn.k_proj.bias"] == (32,)
    assert resident[f"{layer}.self_attn.o_proj.bias"] == (64,)
    assert resident[f"{layer}.mlp.up_proj.bias"] == (128,)
    assert resident[f"{layer}.self_attn.q_norm.weight"] == (16,)
    assert resident["model.norm.weight"] == (64,)
    assert len(norms(spec)) == 2 * 4 + 1
    assert len(norms(TINY)) == 2 * 2 + 1


def test_a_substitute_takes_four_and_a_half_bits_per_weight() -> None:
    assert Linear("x", "q", 0, 64, 128, False).substitute_bytes == 64 * 128 * 4.5 / 8
    assert Linear("x", "q", 0, 16, 64, False).substitute_bytes == 512 + 64


def test_kv_bytes_count_keys_and_values_of_every_layer() -> None:
    assert TINY.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
