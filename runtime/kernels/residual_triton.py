"""Residual decoder on CUDA: stored bytes and the codes of the 4-bit kernel -> exact weights.

The fast twin of `decode` in artifacts/format/residual.py, which describes the format; tests compare
the two. Imports triton, so only code for CUDA may import this module. One program decodes one tile,
and one lane four weights, a "quad", which are also one or two radix groups. Two prefix sums within
the tile give each lane the positions of its bits and of its escapes.

The code is written for a low instruction count. Adding an integer below 2^(p + 1) to the pattern of
2^p, where p is such that the last fraction bit counts as one, turns it into a float without a
conversion instruction, which runs at a quarter of the speed or less; subtracting 2^p leaves the
integer.

N, K = rows and columns of the whole matrix, R = rows of the part, G = K / 64 groups
"""

# mypy: allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from subspec.artifacts.format import residual
from subspec.artifacts.format.tiles import GUARD_WORDS, TILE_WEIGHTS
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

MAX_WORDS = 1 << 30  # twice as many half-words have to fit an int32

# Triton kernels can only use module constants that are constexpr.
_BINADES = tl.constexpr(residual.BINADES)
_GUARD = tl.constexpr(GUARD_WORDS)
_FLIP = tl.constexpr(-0x8000)  # xor: changes the sign of a 16-bit pattern widened to an int32


def decode_into(
    out: Tensor,
    stored: Tensor,
    codes: Tensor,
    qparams: Tensor,
    first_row: int,
    layout: Int4Kernel,
    mismatches: Tensor,
) -> None:
    """Decode rows first_row .. first_row + R of a matrix into out; all tensors on one CUDA device.

    out [R, K] bf16, fp16 or f32, contiguous, at a multiple of 8 bytes. stored uint8 [bytes] of
    these rows, at a multiple of 4 bytes. qparams bf16 [G, N, 2] and codes belong to the whole
    matrix, the codes in the layout of the 4-bit kernel that computes with them:
    "aten": int32 [N / 8, K / (16 I), 32, I / 2], from torch's _convert_weight_to_int4pack
    "gemlite": int32 [K / 8, N], column 8 r + j in nibble j of row r

    Does not wait for the device. mismatches int32 [1] grows by the number of tiles whose length
    does not fit their codes, for which the plain twin would raise: the caller checks later that it
    is still 0. Nothing outside of `stored` is read, whatever it contains. Raises
    SubspecError(CORRUPT) if the length of `stored` is impossible.
    """
    is_f32 = out.dtype == torch.float32
    check_rows(out, codes, qparams, first_row, mismatches)
    num_words = payload_words(out, stored, 2 * out.numel() if is_f32 else 0, MAX_WORDS)
    num_groups, whole_rows = qparams.shape[:2]
    even = stored[: stored.numel() // 4 * 4]  # lower halves are an even number
    _decode_tile[(out.numel() // TILE_WEIGHTS,)](
        out.view(torch.int64),
        even.view(torch.int32),
        even.view(torch.int16),
        codes,
        qparams.view(torch.int32),
        mismatches,
        first_row,
        whole_rows,
        num_groups,
        num_words,
        FRACTION_BITS=residual.FRACTION_BITS[out.dtype],
        IS_F32=is_f32,
        LANE_WORDS=codes.shape[3] if layout == "aten" else 0,
        num_warps=NUM_WARPS,
    )


# These differ from part to part: specializing on a length or an address that 16 divides would
# compile again in the middle of a generation, which costs more than it gains.
@triton.jit(
    do_not_specialize=["first_row", "num_groups", "num_words"],
    do_not_specialize_on_alignment=["words", "halves"],
)
def _decode_tile(
    out: tl.tensor,  # int64 [R K / 4], f32: [R K / 2]
    words: tl.tensor,  # int32: the stored bytes
    halves: tl.tensor,  # int16: the stored bytes once more, for the escapes
    codes: tl.tensor,  # int32
    scales: tl.tensor,  # int32 [G, N]: scale in the low half, zero_point in the high one
    mismatches: tl.tensor,  # int32 [1]
    first_row: tl.tensor,
    whole_rows: tl.tensor,  # N
    num_groups: tl.tensor,
    num_words: tl.tensor,  # without the guard
    FRACTION_BITS: tl.constexpr,
    IS_F32: tl.constexpr,
    LANE_WORDS: tl.constexpr,  # int32 per lane in ATen's layout: 2 or 4; 0 is GemLite's layout
) -> None:
    tile = tl.program_id(0)
    num_tiles = tl.num_programs(0)
    band = tile // num_groups
    group = tile % num_groups
    quad = tl.arange(0, QUADS)
    row = quad // ROW_QUADS
    row_quad = quad % ROW_QUADS

    # 1. The windows of the quad's weights, from the codes alone.
    whole_row = first_row + band * ROWS
    pair = tl.load(scales + group.to(tl.int64) * whole_rows + whole_row + row)
    scale = (pair << 16).to(tl.float32, bitcast=True)
    zero_point = (pair & -65536).to(tl.float32, bitcast=True)
    if LANE_WORDS == 0:
        place = codes + (group.to(tl.int64) * 8) * whole_rows + whole_row
        word01 = _rotate(tl.load(place + row_quad // 2 * whole_rows + row), row_quad % 2 * 16)
        word23 = word01
        floor0, positive0, last0 = _window(word01, 1, scale, zero_point, FRACTION_BITS)
        floor1, positive1, last1 = _window(word01, 5, scale, zero_point, FRACTION_BITS)
        floor2, positive2, last2 = _window(word23, 9, scale, zero_point, FRACTION_BITS)
        floor3, positive3, last3 = _window(word23, 13, scale, zero_point, FRACTION_BITS)
    else:
        # Blocks of 8 rows x 32 LANE_WORDS columns; there, column k of row n belongs to lane
        # 4 (n % 8) + k % 8 / 2, word k / 32, nibble k % 32 / 8, plus 4 in an odd column.
        columns_32 = group * 2 + row_quad // 8
        block = (whole_row // 8 + row // 8).to(tl.int64) * (num_groups * 64)
        block += columns_32 // LANE_WORDS * (32 * LANE_WORDS)
        lane = row % 8 * 4 + row_quad % 2 * 2
        place = codes + block + lane * LANE_WORDS + columns_32 % LANE_WORDS
        nibble = row_quad % 8 // 2 * 4
        word01 = _rotate(tl.load(place), nibble)
        word23 = _rotate(tl.load(place + LANE_WORDS), nibble)
        floor0, positive0, last0 = _window(word01, 1, scale, zero_point, FRACTION_BITS)
        floor1, positive1, last1 = _window(word01, 17, scale, zero_point, FRACTION_BITS)
        floor2, positive2, last2 = _window(word23, 1, scale, zero_point, FRACTION_BITS)
        floor3, positive3, last3 = _window(word23, 17, scale, zero_point, FRACTION_BITS)

    # 2. The number of bits of the quad, and their position.
    pair01 = (last0 + 1) * (last1 + 1)  # below 2^22, fp16: 2^28
    pair23 = (last2 + 1) * (last3 + 1)
    if FRACTION_BITS == 7:
        bits = _bit_length(pair01.to(tl.int64) * pair23.to(tl.int64) - 1)
    else:
        bits01 = _bit_length(pair01.to(tl.int64) - 1)
        bits = bits01 + _bit_length(pair23.to(tl.int64) - 1)
    bits_end = tl.cumsum(bits, 0)
    bits_first = bits_end - bits
    bit_words = (tl.sum(bits, 0) + 31) >> 5

    # 3. Fetch them: at most 56 at any alignment, so within three words. A position beyond the
    # payload, possible only with a damaged index, is replaced by that of the guard.
    stated = tl.load(words + tile)
    stated_end = tl.load(words + tile + 1)
    start = tl.minimum(tl.maximum(stated, 0), num_words)
    payload = words + num_tiles + 1
    place = payload + tl.minimum(start + (bits_first >> 5), num_words)
    shift = (bits_first & 31).to(tl.uint64)
    first = _load_word(place)
    second = _load_word(place + 1)
    third = _load_word(place + 2)
    lower_half = ((first | (second << 32)) >> shift) & 0xFFFFFFFF
    upper_half = ((second | (third << 32)) >> shift) & 0xFFFFFFFF
    value = _lowest(lower_half | (upper_half << 32), bits)

    # 4. Split them into four entries.
    if FRACTION_BITS == 7:
        value23, value01 = _divide(value, pair01)
        entry1, entry0 = _divide_small(value01, last0 + 1)
        entry3, entry2 = _divide_small(value23, last2 + 1)
    else:
        entry1, entry0 = _divide(_lowest(value, bits01), last0 + 1)
        entry3, entry2 = _divide(value >> bits01.to(tl.int64), last2 + 1)

    # 5. Entries to patterns; escaped patterns follow the bits, in weight order.
    escaped0 = entry0 >= last0
    escaped1 = entry1 >= last1
    escaped2 = entry2 >= last2
    escaped3 = entry3 >= last3
    escapes0 = escaped0.to(tl.int32)
    escapes01 = escapes0 + escaped1.to(tl.int32)
    escapes012 = escapes01 + escaped2.to(tl.int32)
    escapes = escapes012 + escaped3.to(tl.int32)
    num_escapes = tl.sum(escapes, 0)
    slot = (start + bit_words) * 2 + tl.cumsum(escapes, 0) - escapes
    slot = tl.minimum(slot, num_words * 2)  # plus at most three, which is within the guard
    halves += (num_tiles + 1) * 2
    pattern0 = _pattern(entry0, floor0, positive0, escaped0, halves + slot)
    pattern1 = _pattern(entry1, floor1, positive1, escaped1, halves + (slot + escapes0))
    pattern2 = _pattern(entry2, floor2, positive2, escaped2, halves + (slot + escapes01))
    pattern3 = _pattern(entry3, floor3, positive3, escaped3, halves + (slot + escapes012))

    # 6. Check the tile's length against its codes and escapes, and the ends of the index.
    is_wrong = stated_end - start != bit_words + ((num_escapes + 1) >> 1)
    is_wrong |= (stated != start) | ((tile == 0) & (stated != 0))
    is_wrong |= (tile == num_tiles - 1) & (stated_end != num_words)
    tl.atomic_add(mismatches, 1, mask=is_wrong, sem="relaxed")

    target = (band.to(tl.int64) * ROWS * num_groups + group) * ROW_QUADS
    target += row * (num_groups * ROW_QUADS) + row_quad
    if IS_F32:
        place = payload + num_words + _GUARD + target * 2
        lower01 = tl.load(place)
        lower23 = tl.load(place + 1)
        first = two_words(
            (lower01 & 0xFFFF) | (pattern0 << 16), ((lower01 >> 16) & 0xFFFF) | (pattern1 << 16)
        )
        second = two_words(
            (lower23 & 0xFFFF) | (pattern2 << 16), ((lower23 >> 16) & 0xFFFF) | (pattern3 << 16)
        )
        half = tl.arange(0, 2)
        tl.store(out + target[:, None] * 2 + half[None, :], tl.join(first, second))
    else:
        first = pattern0 | (pattern1 << 16)
        tl.store(out + target, two_words(first, pattern2 | (pattern3 << 16)))


@triton.jit
def _window(
    word: tl.tensor,
    POSITION: tl.constexpr,
    scale: tl.tensor,
    zero_point: tl.tensor,
    FRACTION_BITS: tl.constexpr,
) -> tl.tensor:
    """Window of the code at bit POSITION >= 1 of `word` -> floor, entries with sign +, the
    escape."""
    exact = ((word & (15 << POSITION)) | ((150 - POSITION) << 23)).to(tl.float32, bitcast=True)
    low = (exact - (2.0 ** (23 - POSITION) + 8.5)) * scale + zero_point
    high = (exact - (2.0 ** (23 - POSITION) + 7.5)) * scale + zero_point
    low = _signed_pattern(low, FRACTION_BITS)
    high = _signed_pattern(high, FRACTION_BITS)
    # As integers, patterns with the wanted sign are magnitudes, those with the other are negative.
    # Neither end is -0: no product here is zero, and x - x is +0.
    bottom = tl.maximum(tl.maximum(low, high ^ _FLIP), 0)
    top = tl.maximum(high, low ^ _FLIP)
    floor = tl.maximum(bottom, top - (_BINADES << FRACTION_BITS) + 1)
    positive = tl.maximum(high - floor + 1, 0)
    negative = tl.maximum((low ^ _FLIP) - floor + 1, 0)
    return floor, positive, positive + negative


@triton.jit
def _signed_pattern(x: tl.tensor, FRACTION_BITS: tl.constexpr) -> tl.tensor:
    """f32 -> the 16-bit pattern of its truncation, widened to an int32.

    The plain twin clamps magnitudes to finite ones; in bf16 the bounds of qparams ensure that.
    """
    bits = x.to(tl.int32, bitcast=True)
    if FRACTION_BITS == 7:
        return bits >> 16
    else:
        magnitude = tl.maximum((bits & 0x7FFFFFFF) - (112 << 23), 0) >> 13
        return tl.minimum(magnitude, 0x7BFF) | ((bits >> 31) & _FLIP)


@triton.jit
def _divide(value: tl.tensor, divisor: tl.tensor) -> tl.tensor:
    """int64 0 <= value < 2^43, int32 divisor, quotient < 2^22.2 -> quotient, remainder; exact.

    With u = 2^-24: `near` is within a relative u, the inverse within 1.3 u, and one rounding, by at
    most 1/2, follows. So `guess` is in (x - 1 - e, x + e) for the real quotient x and e = 2^22.2 *
    2.3 u < 0.7: it is off by one at most. A fused multiply-add that rounds twice, as in Triton's
    interpreter, leaves e < 0.7 for the quotients of an intact stream, which are below 1537^2.
    """
    high = (value >> 20).to(tl.int32)
    low = (value & 0xFFFFF).to(tl.int32)
    near = to_f32(high) * 1048576.0 + to_f32(low)
    guess = tl.fma(near, inverse(divisor), TWO_23 - 0.5)
    quotient = guess.to(tl.int32, bitcast=True) - TWO_23_PATTERN
    remainder = (value - quotient.to(tl.int64) * divisor.to(tl.int64)).to(tl.int32)
    is_above = remainder < 0
    is_below = remainder >= divisor
    quotient += is_below.to(tl.int32) - is_above.to(tl.int32)
    remainder += tl.where(is_above, divisor, 0) - tl.where(is_below, divisor, 0)
    return quotient, remainder


@triton.jit
def _divide_small(value: tl.tensor, divisor: tl.tensor) -> tl.tensor:
    """int32 0 <= value < 2^23, 2 <= divisor <= 1537, quotient < 3075 -> quotient, remainder; exact.

    (value + 1/2) / divisor is at least 1 / (2 * 1537) = 3.2e-4 away from every integer, and what
    is rounded here moves it by less: 3075 * 1.3 * 2^-24 = 2.4e-4, or 3.1e-4 in an intact stream,
    its quotients being below 1537, where a fused multiply-add rounds twice. Less 1/2, it becomes
    the quotient by rounding to the nearest integer.
    """
    centered = (value | TWO_23_PATTERN).to(tl.float32, bitcast=True) - (TWO_23 - 0.5)
    centered = tl.fma(to_f32(divisor), -0.5, centered)  # exact
    rounded = tl.fma(centered, inverse(divisor), 1.5 * TWO_23)
    quotient = rounded.to(tl.int32, bitcast=True) - (TWO_23_PATTERN + (1 << 22))
    return quotient, value - quotient * divisor


@triton.jit
def _bit_length(x: tl.tensor) -> tl.tensor:
    """Bit length of an int64 1 <= x < 2^43, from the exponent of its upper or lower part as f32."""
    high = (x >> 20).to(tl.int32)
    part = tl.where(high > 0, high, x.to(tl.int32))
    exponent = to_f32(part).to(tl.int32, bitcast=True) >> 23
    return exponent + tl.where(high > 0, 20 - 126, -126)


@triton.jit
def _rotate(word: tl.tensor, nibble: tl.tensor) -> tl.tensor:
    """int32 -> uint32 with bit `nibble`, a multiple of 4 below 32, moved to bit 1 (not 0, as 2^22 +
    1/2 is an f32, but 2^23 + 1/2 is not)."""
    bits = word.to(tl.uint32, bitcast=True)
    right = ((nibble + 31) & 31).to(tl.uint32)
    return (bits >> right) | (bits << (32 - right))


@triton.jit
def _load_word(place: tl.tensor) -> tl.tensor:
    return tl.load(place).to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def _lowest(value: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Lowest `count` < 63 bits of an int64 or uint64, as an int64."""
    mask = (tl.full(value.shape, 1, tl.int64) << count.to(tl.int64)) - 1
    return value.to(tl.int64, bitcast=True) & mask


@triton.jit
def _pattern(
    entry: tl.tensor,
    floor: tl.tensor,
    positive: tl.tensor,
    escaped: tl.tensor,
    escape: tl.tensor,
) -> tl.tensor:
    inside = floor + entry + tl.where(entry >= positive, 0x8000 - positive, 0)
    stored = tl.load(escape, mask=escaped, other=0).to(tl.int32) & 0xFFFF
    return tl.where(escaped, stored, inside)
