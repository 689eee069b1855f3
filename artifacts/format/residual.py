"""Residuals: exact weights as their difference to 4-bit substitutes, about 7 bits per weight.

A code with its group's scale and zero point confines a weight to a *window* of 16-bit patterns.
Encoder and decoder derive the window from these alone; the stream says which entry of it the weight
is. The number of bits is known before any bit is read: bit positions are prefix sums of known
widths, no lengths are stored, and all weights decode in parallel. This module is the plain form of
the format, on any device; residual.cpp and runtime/kernels/residual_triton.py are its fast twins.

    part     index int32 [tiles + 1] | tiles | 3 zero words | f32 only: lower halves u16 [R, K]
             index: first word of each tile; last, the words of all. Little-endian u32 words.
    tile     32 rows x 64 columns, tiles and the weights in them row-major. Its bits, zero-filled to
             a word; then the patterns of its escaped weights in order, two per word, first one low.
    bits     one number per 4 (fp16: 2) consecutive weights, e0 + n0 (e1 + n1 (e2 + n2 e3)) for
             entries e in windows of n, in the bit length of n0 n1 n2 n3 - 1; lowest bit first.
    pattern  a weight's 16 bits; of an f32 weight the upper ones, which are a bf16 pattern.

R = rows of one part of a matrix, K = its columns, G = K / 64 groups, t = tiles of a chunk,
m = numbers of a chunk. Integers are int64 tensors unless said otherwise.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from subspec.artifacts.format.packing import unpack_nibbles
from subspec.artifacts.format.tiles import (
    CHUNK_TILES,
    GUARD_WORDS,
    TILE_COLUMNS,
    TILE_ROWS,
    TILE_WEIGHTS,
    bit_length,
    corrupt,
    get_bits,
    index_and_payload,
    join,
    put_bits,
    split,
    tiled,
)
from subspec.artifacts.model import GROUP_SIZE

BINADES = 6  # kept below the top of a window that reaches zero; smaller weights are escaped

# The upper halves of f32 weights are encoded as bf16 patterns; the lower halves are stored as is.
FRACTION_BITS = {torch.bfloat16: 7, torch.float32: 7, torch.float16: 10}
RADIX = {torch.bfloat16: 4, torch.float32: 4, torch.float16: 2}  # weights that share one number


class Windows(NamedTuple):
    """Entries, in order: magnitudes from `floor` with sign + (`positive` of them), the same with
    sign - (`negative` of them), and the escape: "the pattern is stored elsewhere"."""

    floor: Tensor
    positive: Tensor
    negative: Tensor

    def size(self) -> Tensor:
        return self.positive + self.negative + 1


class Sections(NamedTuple):
    """The stored bytes of one part, checked for structure."""

    tile_index: Tensor  # int32 [tiles + 1], first word of each tile; last, the words of all
    payload: Tensor  # int32 [words + GUARD_WORDS]
    lower: Tensor  # int16 [R, K], the lower halves of f32 weights; else empty


def encode(weight: Tensor, codes: Tensor, qparams: Tensor) -> Tensor:
    """weight [R, K] bf16, fp16 or f32, codes uint8 [R, K / 2] of nibble pairs, qparams bf16
    [G, R, 2] of (scale, zero_point) -> uint8 [bytes]. R is a multiple of TILE_ROWS, all on one
    device."""
    fraction_bits, radix = FRACTION_BITS[weight.dtype], RADIX[weight.dtype]
    halves = weight.view(torch.int16).view(*weight.shape, -1)  # [R, K, 1 or 2], the lower one first
    tiled_patterns = tiled(halves[..., -1])
    ends, payload = [torch.zeros(1, dtype=torch.long, device=weight.device)], []
    for place, windows in _chunks(codes, qparams, fraction_bits):
        patterns = tiled_patterns[place].view(-1, TILE_WEIGHTS).long() & 0xFFFF  # [t, 2048]
        entries, escaped = _entries(patterns, windows)
        sizes, bits, offsets = _layout(windows, radix)
        num_words = _bit_words(bits) + (escaped.sum(1) + 1 >> 1)
        end = torch.cumsum(num_words, 0)
        first = end - num_words
        words = patterns.new_zeros(int(end[-1]) + GUARD_WORDS)
        position = ((first << 5)[:, None] + offsets).flatten()
        put_bits(words, position, join(entries.view(-1, radix), sizes))
        slot = _escape_slots(first, bits, escaped)
        words.scatter_add_(0, slot >> 1, patterns[escaped] << ((slot & 1) << 4))
        payload.append(words[:-GUARD_WORDS].int())  # keeps the low word: u32 as int32
        ends.append(ends[-1][-1] + end)
    assert ends[-1][-1] < 1 << 31, "the index is int32"
    index, guard = torch.cat(ends).int(), payload[0].new_zeros(GUARD_WORDS)
    stream = torch.cat((index, *payload, guard)).view(torch.uint8)
    if weight.dtype != torch.float32:
        return stream
    return torch.cat((stream, halves[..., 0].contiguous().view(torch.uint8).flatten()))


def decode(stored: Tensor, codes: Tensor, qparams: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of encode: stored uint8 [bytes] -> [R, K] of `dtype`, bit for bit.

    Raises SubspecError(CORRUPT) for bytes whose structure does not fit these codes and qparams.
    Whether they are the right bytes only a digest can tell.
    """
    fraction_bits, radix = FRACTION_BITS[dtype], RADIX[dtype]
    num_rows, num_columns = codes.shape[0], codes.shape[1] * 2
    index, payload, lower = sections(stored, num_rows, num_columns, dtype)
    out = torch.empty(num_rows, num_columns, dtype=torch.int16, device=stored.device)
    tiled_out, first_tile = tiled(out), 0
    for place, windows in _chunks(codes, qparams, fraction_bits):
        own = index[first_tile : first_tile + len(windows.floor) + 1].long()
        words = payload[int(own[0]) : int(own[-1]) + GUARD_WORDS].long() & 0xFFFF_FFFF
        first, num_words = own[:-1] - own[0], own.diff()
        sizes, bits, offsets = _layout(windows, radix)
        if (_bit_words(bits) > num_words).any():
            raise corrupt("a tile ends before the bits of its weights")
        position = ((first << 5)[:, None] + offsets).flatten()
        entries = split(get_bits(words, position, bits.flatten()), sizes).view(-1, TILE_WEIGHTS)
        patterns, escaped = _patterns(entries, windows)
        if (_bit_words(bits) + (escaped.sum(1) + 1 >> 1) != num_words).any():
            raise corrupt("a tile's length does not fit the escapes in it")
        slot = _escape_slots(first, bits, escaped)
        patterns[escaped] = words[slot >> 1] >> ((slot & 1) << 4)
        tiled_out[place] = patterns.short().view(-1, TILE_ROWS, TILE_COLUMNS)
        first_tile += len(patterns)
    if dtype == torch.float32:
        return torch.stack((lower, out), -1).view(dtype)[..., 0]
    return out.view(dtype)


def sections(stored: Tensor, num_rows: int, num_columns: int, dtype: torch.dtype) -> Sections:
    """stored uint8 [bytes], at an address that 4 divides -> views of its three sections. Raises
    SubspecError(CORRUPT) as `index_and_payload` does."""
    lower_bytes = 2 * num_rows * num_columns if dtype == torch.float32 else 0
    end = max(0, stored.numel() - lower_bytes)
    index, payload = index_and_payload(stored[:end], num_rows, num_columns)
    lower = stored[end:].view(torch.int16)
    return Sections(index, payload, lower.view(num_rows, num_columns) if lower_bytes else lower)


def _chunks(
    codes: Tensor, qparams: Tensor, fraction_bits: int
) -> Iterator[tuple[tuple[Tensor, Tensor], Windows]]:
    """CHUNK_TILES tiles at a time: (band, column) [t] in a tiled matrix, and windows [t, 2048]."""
    num_groups = qparams.shape[0]
    assert qparams.shape == (codes.shape[1] * 2 // GROUP_SIZE, codes.shape[0], 2)
    tiled_codes = codes.view(-1, TILE_ROWS, num_groups, TILE_COLUMNS // 2).transpose(1, 2)
    tiled_qparams = qparams.unflatten(1, (-1, TILE_ROWS)).transpose(0, 1)  # [R / 32, G, 32, 2]
    num_tiles = codes.numel() * 2 // TILE_WEIGHTS
    for first in range(0, num_tiles, CHUNK_TILES):
        tile = torch.arange(first, min(first + CHUNK_TILES, num_tiles), device=codes.device)
        place = (tile // num_groups, tile % num_groups)
        chosen = unpack_nibbles(tiled_codes[place].flatten(0, 1)).view(-1, TILE_ROWS, TILE_COLUMNS)
        scale, zero_point = tiled_qparams[place].float()[..., None, :].unbind(-1)  # [t, 32, 1]
        yield place, _windows(chosen, scale, zero_point, fraction_bits)


def _windows(codes: Tensor, scale: Tensor, zero_point: Tensor, fraction_bits: int) -> Windows:
    """codes uint8 [t, 32, 64], scale and zero_point f32 [t, 32, 1] -> windows [t, 2048].

    The only floating-point operations of the format, in f32 and rounded to nearest even: the
    product has at most 5 + 8 significant bits and is exact, so a fused multiply-add gives the same
    result; with scale in [2^-59, 2^59] no nonzero result is subnormal, so flushing subnormals does
    not matter either. Do not rewrite these expressions.
    """
    step = codes.float() - 8
    low = ((step - 0.5) * scale + zero_point).flatten(1)
    high = ((step + 0.5) * scale + zero_point).flatten(1)
    low_magnitude, high_magnitude = _magnitude(low, fraction_bits), _magnitude(high, fraction_bits)
    top_positive = torch.where(high >= 0, high_magnitude, -1)  # -1: no value of this sign
    top_negative = torch.where(low < 0, low_magnitude, -1)
    bottom = torch.where(low >= 0, low_magnitude, torch.where(high < 0, high_magnitude, 0))
    top = torch.maximum(top_positive, top_negative)
    floor = torch.maximum(bottom, top - (BINADES << fraction_bits) + 1)
    positive, negative = (top_positive - floor + 1), (top_negative - floor + 1)
    return Windows(floor, positive.clamp(min=0), negative.clamp(min=0))


def _magnitude(x: Tensor, fraction_bits: int) -> Tensor:
    """f32 -> 15-bit magnitude in the order of the 16-bit format, truncated, finite."""
    bits = x.view(torch.int32).long() & 0x7FFF_FFFF
    if fraction_bits == 7:  # bf16 is the upper half of an f32
        return (bits >> 16).clamp(max=0x7F7F)
    # fp16's exponent bias is 15 instead of 127; below 2^-14 any monotone function works.
    return ((bits - (112 << 23)).clamp(min=0) >> 13).clamp(max=0x7BFF)


def _entries(patterns: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """16-bit patterns -> (entries of their windows, bool: the pattern is outside, so escaped)."""
    sign, distance = patterns >> 15, (patterns & 0x7FFF) - windows.floor
    count = torch.where(sign == 1, windows.negative, windows.positive)
    inside = (distance >= 0) & (distance < count)
    entries = torch.where(inside, distance + windows.positive * sign, windows.size() - 1)
    return entries, ~inside


def _patterns(entries: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Inverse of _entries, except for escaped patterns. In a damaged stream an entry may be beyond
    the escape; it counts as an escape."""
    sign = (entries >= windows.positive).long()
    patterns = windows.floor + entries - windows.positive * sign + (sign << 15)
    return patterns, entries >= windows.size() - 1


def _layout(windows: Windows, radix: int) -> tuple[Tensor, Tensor, Tensor]:
    """windows [t, 2048] -> (sizes [m, radix], bits of each radix group [t, 2048 / radix], their
    first bit within the tile)."""
    sizes = windows.size().view(-1, radix)
    bits = bit_length(sizes.prod(1) - 1).view(-1, TILE_WEIGHTS // radix)
    return sizes, bits, torch.cumsum(bits, 1) - bits


def _bit_words(bits: Tensor) -> Tensor:
    """bits [t, 2048 / radix] -> u32 words that the bits of each tile take [t]."""
    return bits.sum(1) + 31 >> 5


def _escape_slots(first: Tensor, bits: Tensor, escaped: Tensor) -> Tensor:
    """first word of each tile [t], escaped [t, 2048] -> positions of escaped patterns in the
    payload, in half-words; they follow the tile's bits, in weight order."""
    area = 2 * (first + _bit_words(bits))
    return (area[:, None] + torch.cumsum(escaped.long(), 1) - 1)[escaped]
