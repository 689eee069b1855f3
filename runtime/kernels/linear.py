"""y = x W^T for exact and 4-bit weights; the only file that knows kernels.

T = rows of activations, N = output features, K = input features, G = K / GROUP_SIZE
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.packing import dequantize, pack_nibbles, unpack_nibbles
from subspec.artifacts.model import GROUP_SIZE
from subspec.artifacts.plan import DeviceKind, Int4Kernel
from subspec.runtime.kernels import gemlite_kernel, int4

ROWS_PER_CALL = 256  # a long prompt goes through a matrix in pieces, so that temporaries stay small
PIECE_BYTES = 1 << 20  # of codes that are packed for CUDA at a time: temporaries of a few MB
ROWS_PER_TILE = {"AVX512": 64, "AVX2": 32}  # ATen's packed bytes differ per instruction set


def exact_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [T, N] = x [T, K] @ weight [N, K]^T; `out` may be a column range of a wider tensor."""
    for first in range(0, x.shape[0], ROWS_PER_CALL):
        rows = slice(first, first + ROWS_PER_CALL)
        torch.mm(x[rows], weight.t(), out=out[rows])


def exact_product_into(x: Tensor, weight: Tensor, gate: Tensor) -> None:
    """gate [T, N] *= x [T, K] @ weight [N, K]^T, without a second [T, N]."""
    for first in range(0, x.shape[0], ROWS_PER_CALL):
        rows = slice(first, first + ROWS_PER_CALL)
        gate[rows] *= F.linear(x[rows], weight)


@contextmanager
def single_row_kernels() -> Iterator[None]:
    """ATen's own bf16 matrix-vector kernel instead of oneDNN's, which is 1.8x slower at one row."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TF32 acceleration", category=UserWarning)
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@dataclass(frozen=True)
class Int4Weight:
    """A substitute in the layout of one kernel; made by `pack`, consumed by `int4_product`."""

    kernel: Int4Kernel
    device: DeviceKind
    packed: Any  # Tensor, or GemliteWeight
    qparams: Tensor  # bf16 [G, N, 2], as stored


def packed_bytes(num_rows: int, num_columns: int, kernel: Int4Kernel) -> tuple[int, ...]:
    """Of the codes, and of the qparams as it is stored: residuals are decoded by it, and ATen's
    kernels read it. gemlite wants one of its own."""
    qparams = num_rows * num_columns // GROUP_SIZE * 4
    return (num_rows * num_columns // 2, qparams, *((qparams,) if kernel == "gemlite" else ()))


def cpu_tile_rows(num_rows: int, kernel: Int4Kernel = "aten") -> int | None:
    """Rows per tile of the packed 4-bit codes on this machine's CPU, for a matrix of num_rows rows:
    16 of w4a8's; 64 or 32 of ATen's, see `_pack_cpu`, and None where no whole number of those
    holds it, or the CPU has neither AVX-512 nor AVX2: ATen then packs in another way."""
    if kernel == "w4a8":
        return int4.BLOCK_ROWS
    tile = ROWS_PER_TILE.get(torch.backends.cpu.get_cpu_capability())
    return tile if tile is not None and num_rows % tile == 0 else None


def read_codes(weight: Int4Weight, first_row: int, num_rows: int) -> tuple[Tensor, int]:
    """The bytes of some rows inside a packed substitute on the CPU, and the rows per tile of their
    layout. Rows come in whole tiles of 64. Raises SubspecError(WRONG_MACHINE) for a layout that is
    unknown to us: plans that are made on such a machine keep all weights raw."""
    num_bytes_per_row = weight.packed.shape[1]
    tile_rows = cpu_tile_rows(weight.packed.shape[0], weight.kernel)
    if tile_rows is None:
        raise SubspecError(
            Exit.WRONG_MACHINE,
            "on this CPU, which lacks AVX2, residuals cannot be decoded over ATen's 4-bit layout",
            "plan again on this machine, or build the artifact with --encoding raw",
        )
    bytes_of_rows = slice(first_row * num_bytes_per_row, (first_row + num_rows) * num_bytes_per_row)
    return weight.packed.view(-1)[bytes_of_rows].view(num_rows, -1), tile_rows


def unpack(packed: Tensor, tile_rows: int) -> Tensor:
    """What `read_codes` returns -> nibble pairs uint8 [R, K / 2], as stored."""
    return int4.unpack(packed) if tile_rows == int4.BLOCK_ROWS else unpack_cpu(packed, tile_rows)


def inner_tiles(num_columns: int) -> int:
    """Tiles of 16 columns in a row of ATen's CUDA layout: 8 where they divide K, else 4, which
    divide every K of whole groups."""
    return 8 if num_columns % 128 == 0 else 4


def pack(
    codes: Tensor, qparams: Tensor, kernel: Int4Kernel, codes_out: Tensor, *qparams_out: Tensor
) -> Int4Weight:
    """Stored substitute -> kernel layout inside the byte ranges of fast memory that `packed_bytes`
    asks for. codes uint8 [N, K / 2] and qparams bf16 [G, N, 2] on the host."""
    kept = qparams_out[0].view(torch.bfloat16).view(qparams.shape).copy_(qparams)
    if kernel == "gemlite":
        own = gemlite_kernel.pack(codes, qparams, codes_out, qparams_out[1])
        return Int4Weight(kernel, "cuda", own, kept)
    if codes_out.device.type == "cuda":
        return Int4Weight(kernel, "cuda", _pack_cuda(codes, codes_out), kept)
    packed = codes_out.view(codes.shape)
    (int4.pack if kernel == "w4a8" else _pack_cpu)(codes, packed)
    return Int4Weight(kernel, "cpu", packed, kept)


def int4_product(x: Tensor, weight: Int4Weight) -> Tensor:
    """x bf16 [T, K] -> bf16 [T, N]."""
    if weight.kernel == "w4a8":
        return int4.product(x, weight.packed, weight.qparams, torch.get_num_threads())
    if weight.kernel == "gemlite":
        return gemlite_kernel.product(x, weight.packed)
    if weight.device == "cpu":
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        product = torch.ops.aten._weight_int4pack_mm
    return product(x, weight.packed, GROUP_SIZE, weight.qparams)  # type: ignore[no-any-return]


def int4_product_plainly(x: Tensor, codes: Tensor, qparams: Tensor) -> Tensor:
    """The plain twin of pack + int4_product: x [T, K] -> f32 [T, N]."""
    return x.float() @ dequantize(unpack_nibbles(codes), qparams).t()


def _pack_cuda(codes: Tensor, out: Tensor) -> Tensor:
    """uint8 [N, K / 2] of nibble pairs on the host -> ATen's CUDA layout int32 [N / 8, K / (16 I),
    32, I / 2] in `out`, in pieces of few rows."""
    num_rows, half = codes.shape
    inner = inner_tiles(2 * half)
    target = out.view(torch.int32).view(num_rows // 8, 2 * half // (16 * inner), 32, inner // 2)
    some = max(8, PIECE_BYTES // half // 8 * 8)
    for first in range(0, num_rows, some):
        unpacked = unpack_nibbles(codes[first : first + some].to(out.device))
        pairs = unpacked[:, ::2] << 4 | unpacked[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, inner)
        target[first // 8 : first // 8 + len(packed)] = packed
    return target


def _pack_cpu(codes: Tensor, out: Tensor) -> None:
    """uint8 [N, K / 2] of nibble pairs -> ATen's CPU layout uint8 [N, K / 2].

    Per tile of 64 (AVX-512) or 32 (AVX2) rows: byte (k, r) holds row r in its low nibble and row
    r + tile / 2 in its high one. Vectorised, and equal to ATen's own packing (tested).
    """
    num_rows, half = codes.shape
    tile = cpu_tile_rows(num_rows)
    if tile is None:
        unpacked = unpack_nibbles(codes).to(torch.int32)
        out.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpacked, 1))
        return
    tiles = max(1, (1 << 20) // (tile * half))  # tiles at a time: temporaries of a few MB
    flat = out.view(num_rows // tile, half * 2, tile // 2)
    for first in range(0, num_rows // tile, tiles):
        some = unpack_nibbles(codes[first * tile : (first + tiles) * tile])
        halves = some.view(-1, 2, tile // 2, half * 2)
        flat[first : first + tiles] = (halves[:, 0] | (halves[:, 1] << 4)).transpose(1, 2)


def unpack_cpu(packed: Tensor, tile_rows: int) -> Tensor:
    """The inverse of `_pack_cpu` for R rows, whole tiles of them: uint8 [R, K / 2] in ATen's layout
    -> nibble pairs uint8 [R, K / 2]."""
    num_rows, half = packed.shape
    tiles = packed.view(num_rows // tile_rows, half * 2, tile_rows // 2).transpose(1, 2)
    codes = torch.cat((tiles & 15, tiles >> 4), dim=1)
    return pack_nibbles(codes.reshape(num_rows, half * 2))
