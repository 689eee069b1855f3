"""Residuals of exact FP8 weights given their 4-bit substitutes, about 3 bits per weight.

The idea, tiles and numbers are those of residual.py. A code with the scale and zero point of its
group, divided by the FP8 scale of the block, confines a weight to a *window* of FP8 codes. The
windows of a group's 16 codes follow one another without gaps, and an artifact's 4-bit code is the
one whose window holds the weight: so only windows that are cut need an escape. This module is the
plain form of the format, on any device; fp8.cpp and runtime/kernels/fp8_triton.py are its fast
twins.

    tile     one bit: 1 = every window of the tile has an escape; then one number per 4 consecutive
             weights, e0 + n0 (e1 + n1 (e2 + n2 e3)), in the bit length of n0 n1 n2 n3 - 1, lowest
             bit first, zero-filled to a word; then the FP8 codes of its escaped weights in order,
             four to a word, zero-filled.
    ordinal  of an FP8 code: its magnitude m, or -1 - m with the sign set: the order of the values.

R = rows of one part of a matrix, K = its columns, G = K / 64 groups, t = tiles of a chunk,
m = numbers of a chunk. Integers are int64 tensors unless said otherwise.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from subspec.artifacts.format.fp8 import ROWS_AT_ONCE, Scales
from subspec.artifacts.format.packing import pack_nibbles, unpack_nibbles
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

RADIX = 4  # weights that share one number, which is below 63^4 < 2^24
KEPT = 31  # largest magnitudes of each sign that a window keeps; smaller weights are escaped
MIN_DIVISOR, MAX_DIVISOR = 2.0**-50, 2.0**50  # beyond these a scale does not divide


class Windows(NamedTuple):
    """Entries, in order: magnitudes from `floor` with sign + (`positive` of them), the same with
    sign - (`negative` of them), and the escape, if the window has one."""

    floor: Tensor
    positive: Tensor
    negative: Tensor
    is_cut: Tensor  # bool: it has an escape in any case


def encode(weight: Tensor, codes: Tensor, qparams: Tensor, scales: Scales) -> Tensor:
    """weight: FP8 codes uint8 [R, K]; codes uint8 [R, K / 2] of nibble pairs, qparams bf16 [G, R,
    2] of (scale, zero_point) -> uint8 [bytes]. R is a multiple of TILE_ROWS, all on one device."""
    tiled_weight = tiled(weight)
    ends, payload = [torch.zeros(1, dtype=torch.long, device=weight.device)], []
    for place, windows in _chunks(codes, qparams, scales):
        code = tiled_weight[place].reshape(-1, TILE_WEIGHTS).long()
        entries, inside = _entries(code, windows)
        everywhere = (~inside & ~windows.is_cut).any(1)
        sizes, bits, offsets = _layout(windows, windows.is_cut | everywhere[:, None])
        bit_words = _bit_words(bits)
        num_words = bit_words + (~inside).sum(1).add(3).bitwise_right_shift(2)
        end = torch.cumsum(num_words, 0)
        first = end - num_words
        words = code.new_zeros(int(end[-1]) + GUARD_WORDS)
        words.scatter_add_(0, first, everywhere.long())
        position = ((first << 5)[:, None] + offsets).flatten()
        put_bits(words, position, join(entries.view(-1, RADIX), sizes))
        slot = _escape_slots(first + bit_words, ~inside)
        words.scatter_add_(0, slot >> 2, code[~inside] << ((slot & 3) << 3))
        payload.append(words[:-GUARD_WORDS].int())  # keeps the low word: u32 as int32
        ends.append(ends[-1][-1] + end)
    assert ends[-1][-1] < 1 << 31, "the index is int32"
    guard = payload[0].new_zeros(GUARD_WORDS)
    return torch.cat((torch.cat(ends).int(), *payload, guard)).view(torch.uint8)


def decode(stored: Tensor, codes: Tensor, qparams: Tensor, scales: Scales) -> Tensor:
    """Inverse of encode: stored uint8 [bytes] -> FP8 codes uint8 [R, K].

    Raises SubspecError(CORRUPT) for bytes whose structure does not fit these codes, qparams and
    scales. Whether they are the right bytes only a digest can tell.
    """
    num_rows, num_columns = codes.shape[0], codes.shape[1] * 2
    index, payload = index_and_payload(stored, num_rows, num_columns)
    out = torch.empty(num_rows, num_columns, dtype=torch.uint8, device=stored.device)
    tiled_out, first_tile = tiled(out), 0
    for place, windows in _chunks(codes, qparams, scales):
        own = index[first_tile : first_tile + len(windows.floor) + 1].long()
        words = payload[int(own[0]) : int(own[-1]) + GUARD_WORDS].long() & 0xFFFF_FFFF
        first, num_words = own[:-1] - own[0], own.diff()
        if (num_words < 1).any():
            raise corrupt("a tile is empty")
        everywhere = (words[first] & 1).bool()
        sizes, bits, offsets = _layout(windows, windows.is_cut | everywhere[:, None])
        bit_words = _bit_words(bits)
        if (bit_words > num_words).any():
            raise corrupt("a tile ends before the bits of its weights")
        position = ((first << 5)[:, None] + offsets).flatten()
        entries = split(get_bits(words, position, bits.flatten()), sizes).view(-1, TILE_WEIGHTS)
        code, escaped = _codes(entries, windows)
        if (bit_words + (escaped.sum(1) + 3 >> 2) != num_words).any():
            raise corrupt("a tile's length does not fit the escapes in it")
        slot = _escape_slots(first + bit_words, escaped)
        code[escaped] = words[slot >> 2] >> ((slot & 3) << 3)
        tiled_out[place] = (code & 255).to(torch.uint8).view(-1, TILE_ROWS, TILE_COLUMNS)
        first_tile += len(code)
    return out


def codes_by_windows(weight: Tensor, qparams: Tensor, scales: Scales) -> Tensor:
    """FP8 codes uint8 [R, K], qparams bf16 [G, R, 2] -> the packed 4-bit codes [R, K / 2] whose
    windows hold the weights; up to rounding at their ends, the nearest codes."""
    packed = []
    for first in range(0, len(weight), ROWS_AT_ONCE):
        some = weight[first : first + ROWS_AT_ONCE]
        scale, zero_point = qparams[:, first : first + len(some)].float().transpose(0, 1).unbind(2)
        ends = _ends(scale, zero_point, scales.from_row(first).by_group(*scale.shape))  # [R, G, 17]
        ordinals = _ordinals(some).view(len(some), -1, TILE_COLUMNS)
        found = torch.searchsorted(ends[..., 1:16].contiguous(), ordinals, right=True)
        packed.append(pack_nibbles(found.view(some.shape).to(torch.uint8)))
    return torch.cat(packed)


def _ordinals(code: Tensor) -> Tensor:
    """uint8 -> int32 -128 to 127: -0 is just below +0, and the NaNs are at both ends."""
    wide = code.int()
    return torch.where(wide >= 128, ~(wide & 127), wide)


def _ends(scale: Tensor, zero_point: Tensor, fp8_scale: Tensor) -> Tensor:
    """f32 [...] each -> int32 [..., 17]: code c's window are the ordinals from end c to end c + 1.

    In f32, rounded to nearest even, with r = 1 / fp8_scale, or 1 beyond the bounds of a divisor:
    x(c) = ((c - 8.5) * scale + zero_point) * r, of which the first product is exact, so a fused
    multiply-add gives the same; end c is the smallest ordinal of a number >= x(c), or 127. No
    nonzero result is subnormal. Do not rewrite these expressions.
    """
    divides = (fp8_scale >= MIN_DIVISOR) & (fp8_scale <= MAX_DIVISOR)
    r = torch.where(divides, 1 / fp8_scale, torch.ones_like(fp8_scale))
    step = torch.arange(17, device=scale.device, dtype=torch.float32) - 8.5
    x = (step * scale[..., None] + zero_point[..., None]) * r[..., None]
    magnitude = x.abs()
    # Of a normal FP8 number the magnitude is bits 20 to 26 of the f32's, less the exponents' bias.
    above_bias = magnitude.view(torch.int32) - (120 << 23)
    tiny = (magnitude * 512).clamp(max=8)  # in steps of the subnormal FP8 numbers
    is_tiny = magnitude < 2.0**-6
    up = torch.where(is_tiny, tiny.ceil().int(), (above_bias + 0xFFFFF) >> 20)
    down = torch.where(is_tiny, tiny.floor().int(), above_bias >> 20)
    return torch.where(x >= 0, up.clamp(max=127), -1 - down.clamp(max=126))


def _chunks(
    codes: Tensor, qparams: Tensor, scales: Scales
) -> Iterator[tuple[tuple[Tensor, Tensor], Windows]]:
    """CHUNK_TILES tiles at a time: (band, column) [t] in a tiled matrix, and windows [t, 2048]."""
    num_rows, num_groups = codes.shape[0], qparams.shape[0]
    assert qparams.shape == (codes.shape[1] * 2 // TILE_COLUMNS, num_rows, 2)
    tiled_codes = codes.view(-1, TILE_ROWS, num_groups, TILE_COLUMNS // 2).transpose(1, 2)
    tiled_qparams = qparams.unflatten(1, (-1, TILE_ROWS)).transpose(0, 1)  # [R / 32, G, 32, 2]
    tiled_scales = scales.by_group(num_rows, num_groups)
    tiled_scales = tiled_scales.unflatten(0, (-1, TILE_ROWS)).transpose(1, 2)  # [R / 32, G, 32]
    num_tiles = codes.numel() * 2 // TILE_WEIGHTS
    for first in range(0, num_tiles, CHUNK_TILES):
        tile = torch.arange(first, min(first + CHUNK_TILES, num_tiles), device=codes.device)
        place = (tile // num_groups, tile % num_groups)
        chosen = unpack_nibbles(tiled_codes[place].flatten(0, 1)).view(-1, TILE_ROWS, TILE_COLUMNS)
        scale, zero_point = tiled_qparams[place].float().unbind(-1)  # [t, 32]
        yield place, _windows(chosen, _ends(scale, zero_point, tiled_scales[place]))


def _windows(codes: Tensor, ends: Tensor) -> Windows:
    """codes uint8 [t, 32, 64], ends int32 [t, 32, 17] -> windows [t, 2048]."""
    code = codes.long()
    low = torch.gather(ends, 2, code).flatten(1).long()
    high = torch.gather(ends, 2, code + 1).flatten(1).long()  # the first that is not in it
    bottom = torch.maximum(low, -high).clamp(min=0)
    floor = torch.maximum(bottom, torch.maximum(high, -low) - KEPT)
    positive, negative = (high - floor).clamp(min=0), (-low - floor).clamp(min=0)
    code = code.flatten(1)
    return Windows(floor, positive, negative, (floor > bottom) | (code == 0) | (code == 15))


def _entries(code: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """FP8 codes -> (entries of their windows, bool: the code is inside, so not escaped)."""
    sign, distance = code >> 7, (code & 127) - windows.floor
    count = torch.where(sign == 1, windows.negative, windows.positive)
    inside = (distance >= 0) & (distance < count)
    escape = windows.positive + windows.negative
    return torch.where(inside, distance + windows.positive * sign, escape), inside


def _codes(entries: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Inverse of _entries, except for escaped codes. In a damaged stream an entry may be beyond
    the escape, or in a window without one; it counts as an escape."""
    sign = (entries >= windows.positive).long()
    code = windows.floor + entries - windows.positive * sign + (sign << 7)
    return code, entries >= windows.positive + windows.negative


def _layout(windows: Windows, escape: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """windows [t, 2048], bool [t, 2048] -> (sizes [m, RADIX], bits of each number [t, 512], their
    first bit within the tile)."""
    sizes = (windows.positive + windows.negative + escape).clamp(min=1).view(-1, RADIX)
    bits = bit_length(sizes.prod(1) - 1).view(-1, TILE_WEIGHTS // RADIX)
    return sizes, bits, torch.cumsum(bits, 1) - bits + 1  # behind the tile's first bit


def _bit_words(bits: Tensor) -> Tensor:
    """bits [t, 512] -> u32 words that the bits of each tile take [t], its first bit included."""
    return bits.sum(1) + 1 + 31 >> 5


def _escape_slots(first_word: Tensor, escaped: Tensor) -> Tensor:
    """first word of each tile's escapes [t], escaped [t, 2048] -> positions of the escaped codes in
    the payload, in bytes."""
    return (4 * first_word[:, None] + torch.cumsum(escaped.long(), 1) - 1)[escaped]
