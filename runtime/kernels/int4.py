"""y = x W^T for 4-bit weights and few rows on CPUs, by int4.cpp with 8-bit activations.

T = rows of activations, N = output features, K = input features, G = K / GROUP_SIZE
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.format.packing import ZERO_POINT_CODE, unpack_nibbles
from subspec.artifacts.model import GROUP_SIZE
from subspec.artifacts.native import cpp

SOURCE = Path(__file__).with_name("int4.cpp")
BLOCK_ROWS = 16  # rows of W whose codes are interleaved; a divisor of N
MAX_VALUE = 127  # of an 8-bit activation
MIN_GROUP = 2.0**-100  # a group of activations that are all smaller counts as zeros


def unavailable() -> str | None:
    """Why `product` cannot be used, or None if it can. Builds int4.cpp if needed."""
    return cpp.unavailable(SOURCE, _declare)


def pack(codes: Tensor, out: Tensor) -> None:
    """Stored codes uint8 [N, K / 2], nibble pairs -> the layout of `product` in out, of the same
    size.

    [N / 16, K / 8, 16, 4] bytes: 4 bytes of codes (8 columns) of each of 16 rows, then the next 4.
    """
    half = codes.shape[1]
    words = codes.view(torch.int32).view(-1, BLOCK_ROWS, half // 4)
    out.view(torch.int32).view(-1, half // 4, BLOCK_ROWS).copy_(words.transpose(1, 2))


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `pack` for R rows, whole blocks: uint8 [R, K / 2] -> nibble pairs uint8 [R, K /
    2]."""
    half = packed.shape[1]
    codes = torch.empty_like(packed)
    blocks = packed.view(torch.int32).view(-1, half // 4, BLOCK_ROWS)
    codes.view(torch.int32).view(-1, BLOCK_ROWS, half // 4).copy_(blocks.transpose(1, 2))
    return codes


def product(
    x: Tensor, packed: Tensor, qparams: Tensor, num_threads: int, out: Tensor | None = None
) -> Tensor:
    """x bf16 [T, K] -> `out`, bf16 [T, N], which may be a column range of a wider tensor.

    packed: the N * K / 2 bytes that `pack` wrote; qparams bf16 [G, N, 2] as stored. Every group of
    64 activations is rounded to multiples of 1 / 127 of its largest one, which changes a result by
    0.6 %, or by 2 % if one activation in 500 is 100 times larger than the others; 4-bit weights
    change it by 9 %. Apart from that only f32 sums and the result are rounded. The bits of a row
    depend neither on the other rows nor on num_threads. A row with an infinity or NaN becomes NaN.
    Needs unavailable() to be None.
    """
    num_tokens, num_columns = x.shape
    num_groups, num_rows, _ = qparams.shape
    if out is None:
        out = x.new_empty(num_tokens, num_rows)
    x = x.contiguous()
    assert x.dtype == qparams.dtype == out.dtype == torch.bfloat16
    assert num_columns == num_groups * GROUP_SIZE and num_rows % BLOCK_ROWS == 0
    assert out.shape == (num_tokens, num_rows) and out.stride(1) == 1
    assert packed.is_contiguous() and packed.numel() * 2 == num_rows * num_columns
    assert qparams.is_contiguous()
    cpp.loaded(SOURCE, _declare).subspec_int4_product(
        num_tokens,
        num_columns,
        x.data_ptr(),
        num_rows,
        packed.data_ptr(),
        qparams.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        num_threads,
    )
    return out


def product_plainly(x: Tensor, codes: Tensor, qparams: Tensor) -> Tensor:
    """Plain twin of pack + product: x bf16 [T, K], codes uint8 [N, K / 2] and qparams bf16
    [G, N, 2] as stored -> f32 [T, N], which `product` rounds to bf16."""
    values, x_scale = _quantize(x)
    steps = unpack_nibbles(codes).view(codes.shape[0], -1, GROUP_SIZE).float() - ZERO_POINT_CODE
    sums = torch.einsum("tgk,ngk->gtn", values, steps)  # integers below 2**16: exact
    scale, zero_point = qparams.float()[:, None].unbind(-1)  # [G, 1, N] each
    of_center = values.sum(-1).t()[..., None]  # [G, T, 1]
    total = torch.zeros(sums.shape[1:])
    for g in range(len(qparams)):  # in the kernel's order of summation
        total += x_scale[:, g] * (scale[g] * sums[g] + zero_point[g] * of_center[g])
    return total


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x bf16 [T, K] -> integers as f32 [T, G, 64] and their scale f32 [T, G, 1]."""
    groups = x.float().view(x.shape[0], -1, GROUP_SIZE)
    largest = groups.abs().amax(-1, keepdim=True)
    usable = largest.isfinite() & (largest >= MIN_GROUP)
    # A tensor, because number / tensor would multiply by a reciprocal.
    steps = torch.full_like(largest, MAX_VALUE) / largest
    values = torch.where(usable, torch.round(groups * steps), 0.0)
    beyond = torch.where(largest.isfinite(), 0.0, torch.nan)
    return values, torch.where(usable, largest / MAX_VALUE, beyond)


def _declare(library: ctypes.CDLL) -> None:
    number, size, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.subspec_int4_product.restype = None
    library.subspec_int4_product.argtypes = (
        *(size, size, address),  # rows, columns, x
        *(size, address, address),  # rows of W, codes, qparams
        *(address, size, number),  # out, its stride, threads
    )
