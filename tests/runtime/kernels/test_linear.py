"""Products: packed layouts against ATen's own, kernels against their plain twin."""

import pytest
import torch
from torch import Tensor

from subspec.artifacts.format.packing import dequantize, pack_nibbles, unpack_nibbles
from subspec.planner.build.quantize import quantize
from subspec.runtime.kernels.linear import (
    ROWS_PER_CALL,
    Int4Weight,
    cpu_tile_rows,
    exact_product,
    exact_product_into,
    inner_tiles,
    int4_product,
    int4_product_plainly,
    pack,
    packed_bytes,
    unpack_cpu,
)


def stored(n: int, k: int) -> tuple[Tensor, Tensor]:
    """codes uint8 [N, K / 2], qparams bf16 [G, N, 2]"""
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(16, (n, k), dtype=torch.uint8, generator=generator)
    scale = torch.rand(k // 64, n, generator=generator) * 0.01 + 0.001
    zero_point = (torch.rand(k // 64, n, generator=generator) * 15 - 7) * scale
    return pack_nibbles(codes), torch.stack((scale, zero_point), dim=-1).bfloat16()


def packed_in_room(codes: Tensor, qparams: Tensor) -> tuple[Int4Weight, list[Tensor]]:
    sizes = packed_bytes(codes.shape[0], codes.shape[1] * 2, "aten")
    room = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    return pack(codes, qparams, "aten", *room), room


@pytest.mark.parametrize("shape", [(64, 64), (128, 256), (704, 128), (48, 64), (2048, 192)])
def test_packing_equals_atens_own_layout(shape: tuple[int, int]) -> None:
    codes, qparams = stored(*shape)
    weight, room = packed_in_room(codes, qparams)
    unpacked = unpack_nibbles(codes).int()
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpacked, 1)
    assert torch.equal(weight.packed, expected)
    assert torch.equal(weight.qparams, qparams)
    assert weight.packed.data_ptr() == room[0].data_ptr()
    assert weight.qparams.data_ptr() == room[1].data_ptr()


@pytest.mark.parametrize("shape", [(64, 64), (192, 256)])
def test_codes_read_back_from_tiles_are_the_stored_ones(shape: tuple[int, int]) -> None:
    num_rows = shape[0]
    tile = cpu_tile_rows(num_rows)
    if tile is None:
        pytest.skip("this CPU has no tiles")
    codes, qparams = stored(*shape)
    packed = packed_in_room(codes, qparams)[0].packed
    assert torch.equal(unpack_cpu(packed, tile), codes)
    half = packed[num_rows // 2 :] if num_rows // 2 % tile == 0 else packed  # rows lie together
    assert torch.equal(unpack_cpu(half, tile), codes[-len(half) :])


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("AVX512", (64, 64, None)), ("AVX2", (32, 32, 32)), ("DEFAULT", (None, None, None))],
)
def test_tiles_are_those_of_the_cpu_where_they_hold_the_whole_matrix(
    monkeypatch: pytest.MonkeyPatch, capability: str, expected: tuple[int | None, ...]
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert tuple(cpu_tile_rows(num_rows) for num_rows in (64, 640, 96)) == expected
    assert cpu_tile_rows(48) is None


def test_tiles_on_cuda_divide_every_row_of_whole_groups() -> None:
    assert [inner_tiles(num_columns) for num_columns in (128, 5120)] == [8, 8]
    assert [inner_tiles(num_columns) for num_columns in (64, 192, 4928)] == [4, 4, 4]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_4_bit_kernel_agrees_with_its_plain_twin(rows: int) -> None:
    codes, qparams = stored(256, 512)
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = int4_product(x, packed_in_room(codes, qparams)[0]).float()
    expected = int4_product_plainly(x, codes, qparams)
    # The kernel adds up in f32, in another order, and rounds the sum to bf16.
    torch.testing.assert_close(got, expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("shape", [(256, 512), (48, 192)])
def test_the_4_bit_kernel_computes_with_exactly_what_is_stored(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * 0.02
    weight[:, :64] += 0.3  # a zero_point far from 0
    substitute = quantize(weight.bfloat16(), "cpu")
    one_hot = torch.eye(shape[1], dtype=torch.bfloat16)  # row k picks column k of the weight
    kernel = packed_in_room(substitute.codes, substitute.qparams)[0]
    got = torch.cat([int4_product(some, kernel) for some in one_hot.split(8)])
    expected = dequantize(unpack_nibbles(substitute.codes), substitute.qparams)
    assert torch.equal(got, expected.t().bfloat16())


@pytest.mark.parametrize("rows", [1, 5, ROWS_PER_CALL + 3])
def test_products_in_pieces_equal_one_product(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 64, generator=generator), torch.randn(32, 64, generator=generator)
    wide = torch.zeros(rows, 48)
    exact_product(x, weight, wide[:, 8:40])
    torch.testing.assert_close(wide[:, 8:40], x @ weight.t())
    assert wide[:, :8].abs().sum() + wide[:, 40:].abs().sum() == 0
    gate = torch.full((rows, 32), 2.0)
    exact_product_into(x, weight, gate)
    torch.testing.assert_close(gate, 2.0 * (x @ weight.t()))
