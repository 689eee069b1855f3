"""y = x W^T for exact and 4-bit weights: chooses the kernel of each device and format.

T = rows of activations, N = output features, K = input features, G = K / GROUP_SIZE
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.footprint import PRODUCT_ROWS
from subspec.artifacts.format.packing import dequantize, pack_nibbles, unpack_nibbles
from subspec.artifacts.model import GROUP_SIZE
from subspec.artifacts.plan import DeviceKind, Int4Kernel
from subspec.runtime.kernels import bf16, gemlite_kernel, int4

PIECE_BYTES = 1 << 20  # of codes, read and packed at a time: temporaries of a few MB
MIN_CAPABILITY = 8, 0  # of ATen's 4-bit kernels on GPUs
ROWS_PER_TILE = {"AVX512": 64, "AVX2": 32}  # ATen's packed bytes differ per instruction set


# Ranges of a pass's rows, one after the other: what a call of the kernel computes together. A row's
# bits may depend on their sizes, and on nothing else of the pass.
GemmRanges = Sequence[slice]


def gemm_ranges(sizes: Iterable[int]) -> GemmRanges:
    """Ranges of these numbers of rows; one of more than PRODUCT_ROWS is divided, to bound
    temporaries."""
    found, end = list[slice](), 0
    for size in sizes:
        first, end = end, end + size
        for start in range(first, end, PRODUCT_ROWS):
            found.append(slice(start, min(start + PRODUCT_ROWS, end)))
    return found


def exact_product(x: Tensor, weight: Tensor, out: Tensor, calls: GemmRanges) -> None:
    """out [T, N] = x [T, K] @ weight [N, K]^T; `out` may be a column range of a wider tensor."""
    for rows in calls:
        multiply(x[rows], weight, out[rows])


def exact_product_into(x: Tensor, weight: Tensor, gate: Tensor, calls: GemmRanges) -> None:
    """gate [T, N] *= x [T, K] @ weight [N, K]^T, without a second [T, N]."""
    for rows in calls:
        some = x[rows]
        out = some.new_empty(len(some), len(weight))
        multiply(some, weight, out)
        gate[rows] *= out


def multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [T, N] = x [T, K] @ weight [N, K]^T, by our kernel where torch's is slow."""
    if torch_is_slow(weight) and bf16.unavailable() is None:
        bf16.product(x, weight, out, torch.get_num_threads())
    else:
        torch.mm(x, weight.t(), out=out)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[T, N] = x [T, K] @ weight [N, K]^T + bias [N] in the matrix' dtype, for drafts: not
    batch-invariant."""
    if not torch_is_slow(weight) or bf16.unavailable() is not None:
        return F.linear(x, weight, bias)
    out = x.new_empty(len(x), len(weight))
    bf16.product(x, weight, out, torch.get_num_threads())
    return out if bias is None else out.add_(bias)


def torch_is_slow(weight: Tensor) -> bool:
    """Return True if bf16.cpp multiplies by this matrix [N, K] faster than torch."""
    slow = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not bf16.is_native()
    return slow and weight.shape[1] % bf16.STEP == 0 and weight.is_contiguous()


@contextmanager
def single_row_kernels() -> Iterator[None]:
    """Use ATen's bf16 matrix-vector kernel instead of oneDNN's, which is 1.8x slower at one row."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TF32 acceleration", category=UserWarning)
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def check_capability(device: torch.device) -> None:
    """Raise SubspecError(WRONG_MACHINE) for a GPU that is too old for the 4-bit kernels."""
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        raise SubspecError(
            Exit.WRONG_MACHINE,
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, "
            f"expected {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or more (Ampere)",
            "plan with --device cpu",
        )


@dataclass(frozen=True)
class Int4Weight:
    """A substitute [N, K] in the layout of one kernel; made by `pack`, used by `int4_product`."""

    kernel: Int4Kernel
    device: DeviceKind
    packed: Any  # Tensor, or GemliteWeight
    qparams: Tensor  # bf16 [G, N, 2], as stored


def cpu_tile_rows(num_rows: int, kernel: Int4Kernel = "aten") -> int | None:
    """Rows per tile of the packed 4-bit codes on this machine's CPU, for a matrix of num_rows rows:
    16 for w4a8; 64 or 32 for ATen, see `_pack_cpu`. None if the matrix is not a whole number of
    tiles, or the CPU has neither AVX-512 nor AVX2: ATen then uses another layout."""
    if kernel == "w4a8":
        return int4.BLOCK_ROWS
    tile = ROWS_PER_TILE.get(torch.backends.cpu.get_cpu_capability())
    return tile if tile is not None and num_rows % tile == 0 else None


def read_codes(weight: Int4Weight, first_row: int, num_rows: int) -> tuple[Tensor, int]:
    """Bytes uint8 [num_rows, K / 2] of some rows (whole tiles of 64) of a packed substitute on the
    CPU, and the rows per tile of their layout. Raises SubspecError(WRONG_MACHINE) for a layout that
    is not supported: plans made on such a machine store all weights raw."""
    num_bytes_per_row = weight.packed.shape[1]
    tile_rows = cpu_tile_rows(weight.packed.shape[0], weight.kernel)
    if tile_rows is None:
        raise SubspecError(
            Exit.WRONG_MACHINE,
            "residuals cannot be decoded with ATen's 4-bit layout on this CPU, which lacks AVX2",
            "re-plan on this machine, or build the artifact with --encoding raw",
        )
    bytes_of_rows = slice(first_row * num_bytes_per_row, (first_row + num_rows) * num_bytes_per_row)
    return weight.packed.view(-1)[bytes_of_rows].view(num_rows, -1), tile_rows


def unpack(packed: Tensor, tile_rows: int) -> Tensor:
    """Bytes from `read_codes` -> nibble pairs uint8 [R, K / 2], as stored."""
    return int4.unpack(packed) if tile_rows == int4.BLOCK_ROWS else unpack_cpu(packed, tile_rows)


def inner_tiles(num_columns: int) -> int:
    """Tiles of 16 columns per row of ATen's CUDA layout: 8 if 128 divides K, else 4, which works
    for every K of whole groups."""
    return 8 if num_columns % 128 == 0 else 4


def empty_weight(
    num_rows: int, num_columns: int, kernel: Int4Kernel, room: Sequence[Tensor]
) -> Int4Weight:
    """A substitute [N, K] in the layout of `kernel`, to be filled by pack_rows and pack_qparams.
    room: uint8 tensors in fast memory with the sizes of `packed_bytes`."""
    codes, kept, *more = room
    qparams = kept.view(torch.bfloat16).view(num_columns // GROUP_SIZE, num_rows, 2)
    on_cpu = codes.device.type == "cpu"
    if kernel == "gemlite":
        own = gemlite_kernel.empty(num_rows, num_columns, codes, more[0])
        return Int4Weight(kernel, "cuda", own, qparams)
    if not on_cpu:
        inner = inner_tiles(num_columns)
        shape = (num_rows // 8, num_columns // (16 * inner), 32, inner // 2)
        return Int4Weight(kernel, "cuda", codes.view(torch.int32).view(shape), qparams)
    return Int4Weight(kernel, "cpu", codes.view(num_rows, num_columns // 2), qparams)


def pack_rows(weight: Int4Weight, first_row: int, codes: Tensor) -> None:
    """Pack stored codes uint8 [R, K / 2], on the host, into the rows from `first_row`, a multiple
    of `piece_rows`."""
    rows = slice(first_row, first_row + len(codes))
    if weight.kernel == "gemlite":
        gemlite_kernel.pack_rows(weight.packed, first_row, codes)
    elif weight.device == "cuda":
        unpacked = unpack_nibbles(codes.to(weight.packed.device))
        pairs = unpacked[:, ::2] << 4 | unpacked[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, inner_tiles(2 * codes.shape[1]))
        weight.packed[first_row // 8 : first_row // 8 + len(packed)] = packed
    elif weight.kernel == "w4a8":
        int4.pack(codes, weight.packed[rows])
    else:
        _pack_cpu(codes, weight.packed[rows], cpu_tile_rows(len(weight.packed)))


def pack_qparams(weight: Int4Weight, qparams: Tensor) -> None:
    """Pack stored qparams bf16 [G, N, 2], on the host."""
    weight.qparams.copy_(qparams)
    if weight.kernel == "gemlite":
        gemlite_kernel.pack_qparams(weight.packed, qparams)


def piece_rows(weight: Int4Weight) -> int:
    """Number of rows to pack at a time: whole tiles of any layout, temporaries of a few MB."""
    _, num_rows, _ = weight.qparams.shape
    if weight.kernel == "aten" and weight.device == "cpu" and cpu_tile_rows(num_rows) is None:
        return num_rows
    half = weight.qparams.shape[0] * GROUP_SIZE // 2
    return max(64, PIECE_BYTES // half // 64 * 64)


def pack(codes: Tensor, qparams: Tensor, kernel: Int4Kernel, *room: Tensor) -> Int4Weight:
    """Pack a whole substitute: codes uint8 [N, K / 2] and qparams bf16 [G, N, 2] on the host."""
    weight = empty_weight(codes.shape[0], 2 * codes.shape[1], kernel, room)
    step = piece_rows(weight)
    for first in range(0, len(codes), step):
        pack_rows(weight, first, codes[first : first + step])
    pack_qparams(weight, qparams)
    return weight


def int4_product(x: Tensor, weight: Int4Weight) -> Tensor:
    """x bf16 [T, K] -> bf16 [T, N] = x @ weight^T by the weight's 4-bit kernel."""
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
    """Plain twin of pack + int4_product: x [T, K], codes uint8 [N, K / 2], qparams bf16 [G, N, 2]
    -> f32 [T, N]."""
    return x.float() @ dequantize(unpack_nibbles(codes), qparams).t()


def _pack_cpu(codes: Tensor, out: Tensor, tile: int | None) -> None:
    """uint8 [R, K / 2] of nibble pairs -> ATen's CPU layout uint8 [R, K / 2]; tile None: all rows
    of the matrix at once, by ATen itself.

    Per tile of 64 (AVX-512) or 32 (AVX2) rows: byte (k, r) holds row r in its low nibble and row
    r + tile / 2 in its high one. Vectorized; a test compares it with ATen's own packing.
    """
    num_rows, half = codes.shape
    if tile is None:
        unpacked = unpack_nibbles(codes).to(torch.int32)
        out.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpacked, 1))
        return
    halves = unpack_nibbles(codes).view(-1, 2, tile // 2, half * 2)
    flat = out.view(num_rows // tile, half * 2, tile // 2)
    flat.copy_((halves[:, 0] | (halves[:, 1] << 4)).transpose(1, 2))


def unpack_cpu(packed: Tensor, tile_rows: int) -> Tensor:
    """The inverse of `_pack_cpu` for R rows, whole tiles of them: uint8 [R, K / 2] in ATen's layout
    -> nibble pairs uint8 [R, K / 2]."""
    num_rows, half = packed.shape
    tiles = packed.view(num_rows // tile_rows, half * 2, tile_rows // 2).transpose(1, 2)
    codes = torch.cat((tiles & 15, tiles >> 4), dim=1)
    return pack_nibbles(codes.reshape(num_rows, half * 2))
