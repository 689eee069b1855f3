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

from subspec.artifacts.model import GROUP_SIZE
from subspec.artifacts.packing import dequantize, unpack_nibbles
from subspec.artifacts.plan import DeviceKind, Int4Kernel

ROWS_PER_CALL = 256  # a long prompt goes through a matrix in pieces, so that temporaries stay small
ROWS_PER_TILE = {"AVX512": 64, "AVX2": 32}  # ATen's packed bytes differ per instruction set
CUDA_INNER_TILES = 8  # a layout constant of ATen's CUDA int4 kernel


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
    packed: Any  # Tensor, or gemlite's layer
    scale_zero: Tensor  # bf16 [G, N, 2]


def packed_bytes(num_rows: int, num_columns: int) -> tuple[int, int]:
    """Bytes of (codes, scales and zeros) in ATen's layouts, the same on cpu and cuda."""
    return num_rows * num_columns // 2, num_rows * num_columns // GROUP_SIZE * 4


def pack(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    kernel: Int4Kernel,
    codes_out: Tensor,
    sz_out: Tensor,
) -> Int4Weight:
    """Stored substitute -> kernel layout inside the given byte ranges of fast memory.

    codes uint8 [N, K / 2], scale and zero fp16 [N, G] on the host; codes_out uint8 [N * K / 2] and
    sz_out uint8 [N * G * 4] on the device. ATen computes (code - 8) * scale + zero', HQQ
    (code - zero) * scale: zero' = (8 - zero) * scale.
    """
    num_rows, num_columns = codes.shape[0], codes.shape[1] * 2
    scale, zero = scale.float(), zero.float()
    pair = torch.stack((scale, (8.0 - zero) * scale), -1).transpose(0, 1)
    scale_zero = sz_out.view(torch.bfloat16).view(-1, num_rows, 2)
    scale_zero.copy_(pair)
    if codes_out.device.type == "cpu":
        packed = codes_out.view(num_rows, num_columns // 2)
        _pack_cpu(codes, packed)
        return Int4Weight(kernel, "cpu", packed, scale_zero)
    if kernel == "gemlite":
        return Int4Weight(kernel, "cuda", _pack_gemlite(codes, scale, zero), scale_zero)
    unpacked = unpack_nibbles(codes.to(codes_out.device))
    nibbles = unpacked[:, ::2] << 4 | unpacked[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, CUDA_INNER_TILES)
    target = codes_out.view(torch.int32).view(packed.shape)
    target.copy_(packed)
    return Int4Weight(kernel, "cuda", target, scale_zero)


def int4_product(x: Tensor, weight: Int4Weight) -> Tensor:
    """x bf16 [T, K] -> bf16 [T, N]."""
    if weight.kernel == "gemlite":
        return weight.packed(x)  # type: ignore[no-any-return]
    if weight.device == "cpu":
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        product = torch.ops.aten._weight_int4pack_mm
    return product(x, weight.packed, GROUP_SIZE, weight.scale_zero)  # type: ignore[no-any-return]


def int4_product_plainly(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The plain twin of pack + int4_product: x [T, K] -> f32 [T, N]."""
    return x.float() @ dequantize(unpack_nibbles(codes), scale, zero).t()


def _pack_cpu(codes: Tensor, out: Tensor) -> None:
    """uint8 [N, K / 2] of nibble pairs -> ATen's CPU layout uint8 [N, K / 2].

    Per tile of 64 (AVX-512) or 32 (AVX2) rows: byte (k, r) holds row r in its low nibble and row
    r + tile / 2 in its high one. Vectorised, and equal to ATen's own packing (tested).
    """
    num_rows, half = codes.shape
    tile = ROWS_PER_TILE.get(torch.backends.cpu.get_cpu_capability())
    if tile is None or num_rows % tile:
        unpacked = unpack_nibbles(codes).to(torch.int32)
        out.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpacked, 1))
        return
    tiles = max(1, (1 << 20) // (tile * half))  # tiles at a time: temporaries of a few MB
    flat = out.view(num_rows // tile, half * 2, tile // 2)
    for first in range(0, num_rows // tile, tiles):
        some = unpack_nibbles(codes[first * tile : (first + tiles) * tile])
        halves = some.view(-1, 2, tile // 2, half * 2)
        flat[first : first + tiles] = (halves[:, 0] | (halves[:, 1] << 4)).transpose(1, 2)


def _pack_gemlite(codes: Tensor, scale: Tensor, zero: Tensor) -> Any:
    """gemlite cannot be imported without a GPU, so its import stays in here (docs/LOG.md)."""
    from gemlite.helper import A16W4_HQQ_INT

    quantized = unpack_nibbles(codes).cuda()
    layer = A16W4_HQQ_INT(device="cuda", dtype=torch.bfloat16)
    return layer.from_weights(quantized, scale.cuda().view(-1, 1), zero.cuda().view(-1, 1))
