"""y = x W^T in bf16 on CPUs without instructions for it, by bf16.cpp: torch takes several times as
long for rows of bf16 as for rows of f32 there.

T = rows of activations, N = output features, K = input features
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.native import cpp

SOURCE = Path(__file__).with_name("bf16.cpp")
LANES = 8  # that add up a row's products
STEP = 2 * LANES  # a divisor of K


@cache
def is_native() -> bool:
    """Return True if torch multiplies bf16 by instructions for it (AVX-512, or Arm's)."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def unavailable() -> str | None:
    """Why `product` cannot be used, or None if it can. Builds bf16.cpp if needed."""
    return cpp.unavailable(SOURCE, _declare)


def product(x: Tensor, weight: Tensor, out: Tensor, num_threads: int) -> None:
    """x bf16 [T, K], weight bf16 [N, K] -> `out`, bf16 [T, N], which may be a column range of a
    wider tensor.

    Sums are f32, rounded once. The bits of a row depend neither on the other rows nor on
    num_threads. K is a multiple of STEP. Needs unavailable() to be None.
    """
    (num_tokens, num_columns), num_rows = x.shape, len(weight)
    x = x.contiguous()
    assert x.dtype == weight.dtype == out.dtype == torch.bfloat16
    assert weight.is_contiguous() and weight.shape[1] == num_columns and num_columns % STEP == 0
    assert out.shape == (num_tokens, num_rows) and (out.stride(1) == 1 or num_rows == 1)
    cpp.loaded(SOURCE, _declare).subspec_bf16_product(
        num_tokens,
        num_columns,
        x.data_ptr(),
        num_rows,
        weight.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        num_threads,
    )


def product_plainly(x: Tensor, weight: Tensor) -> Tensor:
    """Plain twin of `product`, in its order of summation: -> bf16 [T, N]."""
    sums = torch.zeros(len(x), len(weight), LANES)
    pairs_of_x, pairs = (one.float().unflatten(1, (-1, LANES, 2)) for one in (x, weight))
    for k in range(pairs.shape[1]):
        for place in range(2):
            sums += pairs_of_x[:, None, k, :, place] * pairs[:, k, :, place]
    while sums.shape[2] > 1:
        half = sums.shape[2] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0].bfloat16()


def _declare(library: ctypes.CDLL) -> None:
    number, size, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.subspec_bf16_product.restype = None
    library.subspec_bf16_product.argtypes = (
        *(size, size, address),  # rows, columns, x
        *(size, address),  # rows of W, W
        *(address, size, number),  # out, its stride, threads
    )
