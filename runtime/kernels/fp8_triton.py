"""FP8 weights on CUDA: their codes, or residuals and the 4-bit kernel's codes -> exact weights.

The fast twin of artifacts/format/fp8.py and of `decode` in fp8_residual.py, which describe the
formats; tests compare them. Imports triton, so only code for CUDA may import this module. One
program works on one tile, and one lane on four weights, a "quad", which share one number. The
windows of the 16 codes of a row are made once and looked up. What residual_triton.py says about
conversions between integers and floats applies here.

N, K = rows and columns of the whole matrix, R = rows of the part, G = K / 64 groups
"""

# mypy: allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from subspec.artifacts.format import fp8_residual
from subspec.artifacts.format.fp8 import Scales
from subspec.artifacts.format.tiles import TILE_COLUMNS, TILE_ROWS, TILE_WEIGHTS
from subspec.artifacts.plan import Int4Kernel
from subspec.runtime.kernels.tiles_triton import (
    NUM_WARPS,
    QUADS,
    ROW_QUADS,
    ROWS,
    TWO_23,
    TWO_23_PATTERN,
    check_rows,
    inverse,
    payload_words,
    to_f32,
    two_words,
)

MAX_WORDS = 1 << 29  # four times as many bytes have to fit an int32

# Triton kernels can only use module constants that are constexpr.
_KEPT = tl.constexpr(fp8_residual.KEPT)
_SMALLEST = tl.constexpr(fp8_residual.MIN_DIVISOR)
_LARGEST = tl.constexpr(fp8_residual.MAX_DIVISOR)


def decode_into(
    out: Tensor,
    stored: Tensor,
    codes: Tensor,
    qparams: Tensor,
    scales: Scales,
    layout: Int4Kernel,
    mismatches: Tensor,
) -> None:
    """Decode the rows of a matrix that `scales` begin at into out bf16 [R, K]; all tensors on one
    CUDA device. Everything else is as in residual_triton.decode_into. Raises SubspecError(CORRUPT)
    if the length of `stored` is impossible."""
    assert out.dtype == torch.bfloat16
    check_rows(out, codes, qparams, scales.first_row, mismatches)
    num_words = payload_words(out, stored, 0, MAX_WORDS)
    num_groups, whole_rows = qparams.shape[:2]
    _decode_tile[(out.numel() // TILE_WEIGHTS,)](
        out.view(torch.int64),
        stored.view(torch.int32),
        stored.view(torch.int8),
        codes,
        qparams.view(torch.int32),
        *_fields(scales),
        mismatches,
        scales.first_row,
        whole_rows,
        num_groups,
        num_words,
        LANE_WORDS=codes.shape[3] if layout == "aten" else 0,
        num_warps=NUM_WARPS,
    )


def dequantize_into(out: Tensor, codes: Tensor, scales: Scales) -> None:
    """Fill out bf16 [R, K] with what fp8.dequantize returns for the FP8 codes uint8 [R, K]."""
    num_rows, num_columns = out.shape
    assert out.dtype == torch.bfloat16 and codes.dtype == torch.uint8 and out.shape == codes.shape
    assert out.is_contiguous() and codes.is_contiguous()
    assert num_rows % TILE_ROWS == 0 and num_columns % TILE_COLUMNS == 0
    _widen_tile[(out.numel() // TILE_WEIGHTS,)](
        out.view(torch.int64),
        codes.view(torch.int32),
        *_fields(scales),
        scales.first_row,
        num_columns // TILE_COLUMNS,
        num_warps=NUM_WARPS,
    )


def _fields(scales: Scales) -> tuple[Tensor, int, int, int]:
    assert scales.values.dtype == torch.float32 and scales.values.is_contiguous()
    groups = scales.columns // TILE_COLUMNS
    return scales.values, scales.values.shape[1], scales.rows, groups


# These differ from part to part, and would compile again in the middle of a generation.
@triton.jit(
    do_not_specialize=[
        "scale_columns", "block_rows", "block_groups", "first_row", "num_groups", "num_words",
    ],
    do_not_specialize_on_alignment=["words", "bytes_"],
)  # fmt: skip
def _decode_tile(
    out: tl.tensor,  # int64 [R K / 4]
    words: tl.tensor,  # int32: the stored bytes
    bytes_: tl.tensor,  # int8: the stored bytes once more, for the escapes
    codes: tl.tensor,  # int32
    qparams: tl.tensor,  # int32 [G, N]: scale in the low half, zero_point in the high one
    scales: tl.tensor,  # f32 [.., scale_columns], of blocks
    scale_columns: tl.tensor,
    block_rows: tl.tensor,
    block_groups: tl.tensor,
    mismatches: tl.tensor,  # int32 [1]
    first_row: tl.tensor,
    whole_rows: tl.tensor,  # N
    num_groups: tl.tensor,
    num_words: tl.tensor,  # without the guard
    LANE_WORDS: tl.constexpr,  # int32 per lane in ATen's layout: 2 or 4; 0 is GemLite's layout
) -> None:
    tile = tl.program_id(0)
    num_tiles = tl.num_programs(0)
    band = tile // num_groups
    group = tile % num_groups
    quad = tl.arange(0, QUADS)
    row = quad // ROW_QUADS
    row_quad = quad % ROW_QUADS
    whole_row = first_row + band * ROWS

    # 1. The windows of the 16 codes of every row, and those of the quad's weights.
    own_row = whole_row + tl.arange(0, ROWS)
    pair = tl.load(qparams + group.to(tl.int64) * whole_rows + own_row)
    scale = (pair << 16).to(tl.float32, bitcast=True)
    zero_point = (pair & -65536).to(tl.float32, bitcast=True)
    fp8_scale = _scale_at(scales, own_row, group, scale_columns, block_rows, block_groups)
    divides = (fp8_scale >= _SMALLEST) & (fp8_scale <= _LARGEST)
    r = tl.where(divides, tl.div_rn(1.0, tl.where(divides, fp8_scale, 1.0)), 1.0)
    start_word = tl.load(words + tile)
    start = tl.minimum(tl.maximum(start_word, 0), num_words)
    payload = words + num_tiles + 1
    everywhere = tl.load(payload + start) & 1
    code = tl.arange(0, 16)[None, :]
    windows = _window(code, scale[:, None], zero_point[:, None], r[:, None], everywhere)
    if LANE_WORDS == 0:
        place = codes + (group.to(tl.int64) * 8) * whole_rows + whole_row
        word = tl.load(place + row_quad // 2 * whole_rows + row) >> (row_quad % 2 * 16)
        floor0, positive0, both0, size0 = _look_up(windows, word)
        floor1, positive1, both1, size1 = _look_up(windows, word >> 4)
        floor2, positive2, both2, size2 = _look_up(windows, word >> 8)
        floor3, positive3, both3, size3 = _look_up(windows, word >> 12)
    else:
        # As in residual_triton.py.
        columns_32 = group * 2 + row_quad // 8
        block = (whole_row // 8 + row // 8).to(tl.int64) * (num_groups * 64)
        block += columns_32 // LANE_WORDS * (32 * LANE_WORDS)
        lane = row % 8 * 4 + row_quad % 2 * 2
        place = codes + block + lane * LANE_WORDS + columns_32 % LANE_WORDS
        nibble = row_quad % 8 // 2 * 4
        word01 = tl.load(place) >> nibble
        word23 = tl.load(place + LANE_WORDS) >> nibble
        floor0, positive0, both0, size0 = _look_up(windows, word01)
        floor1, positive1, both1, size1 = _look_up(windows, word01 >> 16)
        floor2, positive2, both2, size2 = _look_up(windows, word23)
        floor3, positive3, both3, size3 = _look_up(windows, word23 >> 16)

    # 2. The number of bits of the quad, and their position.
    size01 = size0 * size1
    most = size01 * (size2 * size3) - 1  # below 2^24; its half is below 2^23
    half = to_f32(most >> 1).to(tl.int32, bitcast=True)
    bits = tl.where(most > 1, (half >> 23) - 125, most)
    bits_end = tl.cumsum(bits, 0) + 1
    bits_first = bits_end - bits
    bit_words = (tl.sum(bits, 0) + 32) >> 5

    # 3. Fetch them: at most 24 at any alignment, so within two words. A position beyond the
    # payload, possible only with a damaged index, is replaced by that of the guard.
    place = payload + tl.minimum(start + (bits_first >> 5), num_words)
    both_words = tl.load(place).to(tl.uint32, bitcast=True).to(tl.uint64)
    both_words |= tl.load(place + 1).to(tl.uint32, bitcast=True).to(tl.uint64) << 32
    value = (both_words >> (bits_first & 31).to(tl.uint64)).to(tl.int32) & ((1 << bits) - 1)

    # 4. Split them into four entries.
    value23, value01 = _divide(value, size01)
    entry1, entry0 = _divide_small(value01, size0)
    entry3, entry2 = _divide_small(value23, size2)

    # 5. Entries to FP8 codes; escaped ones follow the bits, in weight order.
    escaped0 = entry0 >= both0
    escaped1 = entry1 >= both1
    escaped2 = entry2 >= both2
    escaped3 = entry3 >= both3
    escapes0 = escaped0.to(tl.int32)
    escapes01 = escapes0 + escaped1.to(tl.int32)
    escapes012 = escapes01 + escaped2.to(tl.int32)
    escapes = escapes012 + escaped3.to(tl.int32)
    num_escapes = tl.sum(escapes, 0)
    slot = (start + bit_words) * 4 + tl.cumsum(escapes, 0) - escapes
    slot = tl.minimum(slot, num_words * 4)  # plus at most three, which is within the guard
    place = bytes_ + (num_tiles + 1) * 4
    code0 = _code(entry0, floor0, positive0, escaped0, place + slot)
    code1 = _code(entry1, floor1, positive1, escaped1, place + (slot + escapes0))
    code2 = _code(entry2, floor2, positive2, escaped2, place + (slot + escapes01))
    code3 = _code(entry3, floor3, positive3, escaped3, place + (slot + escapes012))

    # 6. Check the tile's length against its codes and escapes, and the ends of the index.
    end_word = tl.load(words + tile + 1)
    is_wrong = end_word - start != bit_words + ((num_escapes + 3) >> 2)
    is_wrong |= (start_word != start) | ((tile == 0) & (start_word != 0))
    is_wrong |= (tile == num_tiles - 1) & (end_word != num_words)
    tl.atomic_add(mismatches, 1, mask=is_wrong, sem="relaxed")

    # 7. The exact weights.
    s = _scale_at(scales, whole_row + row, group, scale_columns, block_rows, block_groups)
    target = (band.to(tl.int64) * ROWS * num_groups + group) * ROW_QUADS
    target += row * (num_groups * ROW_QUADS) + row_quad
    tl.store(out + target, _four(code0, code1, code2, code3, s))


@triton.jit(
    do_not_specialize=["scale_columns", "block_rows", "block_groups", "first_row", "num_groups"],
    do_not_specialize_on_alignment=["codes"],
)
def _widen_tile(
    out: tl.tensor,  # int64 [R K / 4]
    codes: tl.tensor,  # int32 [R K / 4]: FP8
    scales: tl.tensor,
    scale_columns: tl.tensor,
    block_rows: tl.tensor,
    block_groups: tl.tensor,
    first_row: tl.tensor,
    num_groups: tl.tensor,
) -> None:
    tile = tl.program_id(0)
    band = tile // num_groups
    group = tile % num_groups
    quad = tl.arange(0, QUADS)
    row = quad // ROW_QUADS
    whole_row = first_row + band * ROWS + row
    s = _scale_at(scales, whole_row, group, scale_columns, block_rows, block_groups)
    place = (band.to(tl.int64) * ROWS * num_groups + group) * ROW_QUADS
    place += row * (num_groups * ROW_QUADS) + quad % ROW_QUADS
    word = tl.load(codes + place)
    tl.store(out + place, _four(word, word >> 8, word >> 16, word >> 24, s))


@triton.jit
def _scale_at(
    scales: tl.tensor,
    row: tl.tensor,
    group: tl.tensor,
    scale_columns: tl.tensor,
    block_rows: tl.tensor,
    block_groups: tl.tensor,
) -> tl.tensor:
    return tl.load(scales + (row // block_rows) * scale_columns + group // block_groups)


@triton.jit
def _window(
    code: tl.tensor, scale: tl.tensor, zero_point: tl.tensor, r: tl.tensor, everywhere: tl.tensor
) -> tl.tensor:
    """Window of a code: floor, entries with sign +, those of both signs, and its size; each is
    below 128, in one byte."""
    step = to_f32(code)
    low = _ordinal(((step - 8.5) * scale + zero_point) * r)
    high = _ordinal(((step - 7.5) * scale + zero_point) * r)
    bottom = tl.maximum(tl.maximum(low, -high), 0)
    floor = tl.maximum(bottom, tl.maximum(high, -low) - _KEPT)
    positive = tl.maximum(high - floor, 0)
    both = positive + tl.maximum(-low - floor, 0)
    escape = (floor > bottom) | (code == 0) | (code == 15) | (everywhere != 0)
    size = tl.maximum(both + escape.to(tl.int32), 1)
    return floor | (positive << 8) | (both << 16) | (size << 24)


@triton.jit
def _ordinal(x: tl.tensor) -> tl.tensor:
    """The smallest ordinal of an FP8 number >= x, f32, which is never -0."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    below = bits >> 31
    # Floor or ceiling of 512 y <= 8 from the nearest integer, and on which side of it 512 y is.
    y = tl.minimum(magnitude, 121 << 23).to(tl.float32, bitcast=True)
    near = tl.fma(y, 512.0, TWO_23)
    error = tl.fma(y, 512.0, -(near - TWO_23))
    tiny = near.to(tl.int32, bitcast=True) - TWO_23_PATTERN
    tiny += ((error > 0.0) & (below == 0)).to(tl.int32)
    tiny -= ((error < 0.0) & (below != 0)).to(tl.int32)
    above_bias = magnitude - (120 << 23) + (0xFFFFF & ~below)
    normal = tl.minimum(above_bias >> 20, 127 + below)
    return tl.maximum(tiny, normal) ^ below  # of numbers below 2^-6 `tiny` is larger, else not


@triton.jit
def _look_up(windows: tl.tensor, code: tl.tensor) -> tl.tensor:
    """windows int32 [32, 16], lowest four bits of int32 [512] -> what `_window` packs."""
    index = tl.reshape(code & 15, (ROWS, ROW_QUADS))
    found = tl.reshape(tl.gather(windows, index, 1), (QUADS,))
    return found & 255, (found >> 8) & 255, (found >> 16) & 255, found >> 24


@triton.jit
def _divide(value: tl.tensor, divisor: tl.tensor) -> tl.tensor:
    """int32 0 <= value < 2^24, divisor and quotient <= 3969 -> quotient, remainder; exact. The
    guess is off by one at most."""
    whole = to_f32(value >> 1) * 2.0 + to_f32(value & 1)  # exact
    guess = tl.fma(whole, inverse(divisor), TWO_23 - 0.5)
    quotient = guess.to(tl.int32, bitcast=True) - TWO_23_PATTERN
    rest = value - quotient * divisor
    is_above = (rest < 0).to(tl.int32)
    is_below = (rest >= divisor).to(tl.int32)
    return quotient + is_below - is_above, rest + (is_above - is_below) * divisor


@triton.jit
def _divide_small(value: tl.tensor, divisor: tl.tensor) -> tl.tensor:
    """int32 0 <= value < 2^13, divisor <= 63 -> quotient, remainder; exact, as (value + 1/2) /
    divisor is at least 1/126 away from every integer."""
    scaled = tl.fma(to_f32(value) + 0.5, inverse(divisor), -0.5)
    rounded = (scaled + 1.5 * TWO_23).to(tl.int32, bitcast=True)
    quotient = rounded - (TWO_23_PATTERN + (1 << 22))
    return quotient, value - quotient * divisor


@triton.jit
def _code(
    entry: tl.tensor, floor: tl.tensor, positive: tl.tensor, escaped: tl.tensor, escape: tl.tensor
) -> tl.tensor:
    inside = floor + entry + tl.where(entry >= positive, 128 - positive, 0)
    stored = tl.load(escape, mask=escaped, other=0).to(tl.int32)
    return tl.where(escaped, stored, inside)


@triton.jit
def _weight(code: tl.tensor, s: tl.tensor) -> tl.tensor:
    """Lowest 8 bits of int32: an FP8 code, which is not NaN -> the 16 bits of bf16(code * s)."""
    m = code & 127
    normal = ((m << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(m < 8, to_f32(m) * 0.001953125, normal)
    bits = (value * s).to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest even
    return (rounded ^ ((code & 128) << 8)) & 0xFFFF


@triton.jit
def _four(
    code0: tl.tensor, code1: tl.tensor, code2: tl.tensor, code3: tl.tensor, s: tl.tensor
) -> tl.tensor:
    """Four codes -> an int64 of their weights, the first one lowest."""
    low = _weight(code0, s) | (_weight(code1, s) << 16)
    return two_words(low, _weight(code2, s) | (_weight(code3, s) << 16))
