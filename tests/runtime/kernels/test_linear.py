"""Products: packed layouts against ATen's own, kernels against their plain twin."""

import pytest
import torch
from torch import Tensor

from subspec.artifacts.footprint import PRODUCT_ROWS, packed_bytes
from subspec.artifacts.format.packing import dequantize, pack_nibbles, unpack_nibbles
from subspec.artifacts.plan import Int4Kernel
from subspec.planner.build.quantize import quantize
from subspec.runtime.kernels import linear
from subspec.runtime.kernels.linear import (
    Int4Weight,
    cpu_tile_rows,
    empty_weight,
    exact_product,
    exact_product_into,
    gemm_ranges,
    inner_tiles,
    int4_product,
    int4_product_plainly,
    pack,
    pack_qparams,
    pack_rows,
    piece_rows,
    read_codes,
    unpack,
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


# ---- packing in pieces --------------------------------------------------------------------------


def room_for(num_rows: int, num_columns: int, kernel: Int4Kernel) -> list[Tensor]:
    """Full of ones, so that what is not written is seen."""
    sizes = packed_bytes(num_rows, num_columns, kernel)
    return [torch.full((size,), 0xFF, dtype=torch.uint8) for size in sizes]


def packed_at_once(codes: Tensor, qparams: Tensor, kernel: Int4Kernel) -> list[Tensor]:
    room = room_for(len(codes), 2 * codes.shape[1], kernel)
    weight = empty_weight(len(codes), 2 * codes.shape[1], kernel, room)
    pack_rows(weight, 0, codes)
    pack_qparams(weight, qparams)
    return room


SHAPES = [(64, 64), (192, 128), (704, 192), (1088, 64), (48, 64), (80, 64)]  # N, K
KERNELS: list[Int4Kernel] = ["aten", "w4a8", "gemlite"]  # the last: its layout, on the host


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "shape", [(64, 64), (192, 128), (704, 192), (1088, 64), (48, 64), (80, 64)]
)
def test_a_matrix_packed_in_pieces_has_the_bytes_of_one_packed_at_once(
    shape: tuple[int, int], kernel: Int4Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last piece is smaller than the others, or no whole tile."""
    monkeypatch.setattr(linear, "PIECE_BYTES", 1)  # the smallest pieces that there are
    codes, qparams = stored(*shape)
    room = room_for(*shape, kernel)
    weight = pack(codes, qparams, kernel, *room)
    step = piece_rows(weight)
    tiles = kernel == "aten" and cpu_tile_rows(shape[0]) is None
    assert step == (shape[0] if tiles else 64)
    for got, expected in zip(room, packed_at_once(codes, qparams, kernel), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_pieces_may_be_packed_in_any_order(kernel: Int4Kernel) -> None:
    codes, qparams = stored(320, 128)
    room = room_for(320, 128, kernel)
    weight = empty_weight(320, 128, kernel, room)
    pack_qparams(weight, qparams)
    for first in (192, 0, 64):
        count = {192: 128, 0: 64, 64: 128}[first]
        pack_rows(weight, first, codes[first : first + count])
    for got, expected in zip(room, packed_at_once(codes, qparams, kernel), strict=True):
        assert torch.equal(got, expected)


def test_a_piece_is_about_a_megabyte_of_whole_tiles() -> None:
    for shape in ((4096, 4096), (4096, 2**19), (17_000, 1088)):
        codes = torch.empty(0, dtype=torch.uint8)
        qparams = torch.empty(shape[1] // 64, shape[0], 2, dtype=torch.bfloat16, device="meta")
        step = piece_rows(Int4Weight("w4a8", "cpu", codes, qparams))
        assert step % 64 == 0 and (step == 64 or step * shape[1] // 2 <= linear.PIECE_BYTES)


@pytest.mark.parametrize("kernel", ["aten", "w4a8"])
def test_the_codes_of_some_rows_are_read_back_as_stored(kernel: Int4Kernel) -> None:
    codes, qparams = stored(320, 192)
    weight = pack(codes, qparams, kernel, *room_for(320, 192, kernel))
    if cpu_tile_rows(320, kernel) is None:
        pytest.skip("this CPU has no tiles")
    for first, count in ((0, 320), (64, 128), (256, 64)):
        assert torch.equal(unpack(*read_codes(weight, first, count)), codes[first : first + count])


# ---- exact products -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, PRODUCT_ROWS + 3])
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_products_in_pieces_equal_one_product(rows: int, size: int) -> None:
    sizes = [min(size, rows - first) for first in range(0, rows, size)]
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 64, generator=generator), torch.randn(32, 64, generator=generator)
    wide = torch.zeros(rows, 48)
    exact_product(x, weight, wide[:, 8:40], gemm_ranges(sizes))
    torch.testing.assert_close(wide[:, 8:40], x @ weight.t())
    assert wide[:, :8].abs().sum() + wide[:, 40:].abs().sum() == 0
    gate = torch.full((rows, 32), 2.0)
    exact_product_into(x, weight, gate, gemm_ranges(sizes))
    torch.testing.assert_close(gate, 2.0 * (x @ weight.t()))


def test_a_call_has_no_more_rows_than_a_piece() -> None:
    assert gemm_ranges([2, 3, 1]) == [slice(0, 2), slice(2, 5), slice(5, 6)]
    assert gemm_ranges([]) == []
    most = PRODUCT_ROWS
    ends = [(0, most), (most, most + 9), (most + 9, 2 * most + 9), (2 * most + 9, 2 * most + 18)]
    assert gemm_ranges([most + 9, most + 9]) == [slice(*pair) for pair in ends]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 8, 24, PRODUCT_ROWS + 8])
def test_the_rows_of_several_sequences_have_the_bits_of_separate_calls(
    width: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(96, 320, generator=generator).to(dtype)
    alone = [torch.randn(width, 320, generator=generator).to(dtype) for _ in range(3)]
    together = torch.cat(alone)
    out, gate = torch.empty(3 * width, 96, dtype=dtype), torch.ones(3 * width, 96, dtype=dtype)
    exact_product(together, weight, out, gemm_ranges([width] * 3))
    exact_product_into(together, weight, gate, gemm_ranges([width] * 3))
    for x, got, gated in zip(alone, out.split(width), gate.split(width), strict=True):
        expected, expected_gate = (torch.ones(width, 96, dtype=dtype) for _ in range(2))
        exact_product(x, weight, expected, gemm_ranges([width]))
        exact_product_into(x, weight, expected_gate, gemm_ranges([width]))
        assert torch.equal(got, expected) and torch.equal(gated, expected_gate)
