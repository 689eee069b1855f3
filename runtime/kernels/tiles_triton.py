"""Code that the Triton decoders of residual_triton.py and fp8_triton.py share: the sizes of their
tiles, and conversions between integers and floats by bit patterns, because Triton's take more
instructions and its interpreter rounds differently.

Imports triton, so only code for CUDA may import this module.
"""

# mypy: allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from subspec.artifacts.format.tiles import (
    GUARD_WORDS,
    TILE_COLUMNS,
    TILE_ROWS,
    TILE_WEIGHTS,
    corrupt,
)

NUM_WARPS = 4  # 128 threads of 4 quads each

# Triton kernels can only use module constants that are constexpr.
ROWS = tl.constexpr(TILE_ROWS)
ROW_QUADS = tl.constexpr(TILE_COLUMNS // 4)
QUADS = tl.constexpr(TILE_WEIGHTS // 4)
TWO_23 = tl.constexpr(2.0**23)
TWO_23_PATTERN = tl.constexpr(150 << 23)


def check_rows(
    out: Tensor, codes: Tensor, qparams: Tensor, first_row: int, mismatches: Tensor
) -> None:
    """Assert what the decoders rely on: shapes and dtypes as in residual_triton.decode_into."""
    num_rows, num_columns = out.shape
    num_groups, whole_rows = qparams.shape[:2]
    assert num_rows % TILE_ROWS == 0 and first_row % TILE_ROWS == 0, (num_rows, first_row)
    assert first_row + num_rows <= whole_rows and num_columns == num_groups * TILE_COLUMNS
    assert out.is_contiguous() and codes.is_contiguous() and qparams.is_contiguous()
    assert codes.dtype == torch.int32 and codes.numel() == whole_rows * num_columns // 8
    assert qparams.dtype == torch.bfloat16 and mismatches.dtype == torch.int32


def payload_words(out: Tensor, stored: Tensor, lower_bytes: int, most_words: int) -> int:
    """Words of the tiles in stored uint8 [bytes], the residual of out [R, K], between its index and
    its guard. lower_bytes: of what follows these. Raises SubspecError(CORRUPT) if there are
    `most_words` or more, or the length is impossible."""
    index_bytes = 4 * (out.numel() // TILE_WEIGHTS + 1)
    num_words, rest = divmod(stored.numel() - lower_bytes - index_bytes, 4)
    num_words -= GUARD_WORDS
    if rest or not 0 <= num_words < most_words:
        shape = " x ".join(map(str, out.shape))
        raise corrupt(f"it is {stored.numel()} bytes for {shape} weights")
    return num_words


@triton.jit
def inverse(divisor: tl.tensor) -> tl.tensor:
    """int32 1 <= divisor < 2^23 -> f32 1 / divisor within a relative 1.3 * 2^-24.

    A guess within 5.1 % by subtracting patterns, whose exponents and, roughly, fractions are
    logarithms; then its error cubed, 1.3e-4, squared, 1.7e-8, and one rounding. Every step has the
    same bits on every machine with fused multiply-adds, and it is shorter than Triton's division.
    """
    x = to_f32(divisor)
    inverse = (0x7EF311C7 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    error = tl.fma(-x, inverse, 1.0)
    inverse = tl.fma(inverse, tl.fma(error, error, error), inverse)
    return tl.fma(inverse, tl.fma(-x, inverse, 1.0), inverse)


@triton.jit
def to_f32(x: tl.tensor) -> tl.tensor:
    """int32 0 <= x < 2^23 -> f32, exactly."""
    return (x | TWO_23_PATTERN).to(tl.float32, bitcast=True) - TWO_23


@triton.jit
def two_words(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Two int32 -> an int64 that begins with `low` in memory."""
    low = low.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = high.to(tl.uint32, bitcast=True).to(tl.uint64)
    return (low | (high << 32)).to(tl.int64, bitcast=True)
