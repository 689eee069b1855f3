"""The format of residuals: literal bytes, a second decoder, all patterns, hostile streams."""

import hashlib
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from residual_parts import DTYPES, KINDS, bits_of, every_pattern, random_part, random_qparams
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format import residual
from subspec.artifacts.format.packing import pack_nibbles

ALL = torch.arange(65536)
BF16, FP16, F32 = DTYPES


def round_trip(weight: Tensor, codes: Tensor, qparams: Tensor) -> Tensor:
    stored = residual.encode(weight, pack_nibbles(codes), qparams)
    return residual.decode(stored, pack_nibbles(codes), qparams, weight.dtype)


def test_a_worked_example_has_these_literal_bytes() -> None:
    # scale s = 2^-7, zero_point s / 2; of every four weights the last one is minus zero, an escape.
    # code  low, high   floor  window         weight, pattern  entry
    #   10  2 s, 3 s    3C80   65 + 0 + 1      0.02     3CA4      36
    #    7   -s, 0      3901   0 + 768 + 1    -0.001    BA83     386
    #   11  3 s, 4 s    3CC0   65 + 0 + 1      0.025    3CCD      13
    #    8    0, s      3901   768 + 0 + 1    -0.0      8000     768
    # 36 + 66 (386 + 769 (13 + 66 * 768)) = 0x99618102, and 66 * 769 * 66 * 769 needs 32 bits
    weight = torch.tensor([0.02, -0.001, 0.025, -0.0]).repeat(32, 16).bfloat16()
    codes = torch.tensor([10, 7, 11, 8], dtype=torch.uint8).repeat(32, 16)
    qparams = torch.tensor([2.0**-7, 2.0**-8]).expand(1, 32, 2).bfloat16()
    number = 36 + 66 * (386 + 769 * (13 + 66 * 768))
    expected = (
        bytes.fromhex("00000000 00030000")  # tile 0 is words 0 to 768
        + number.to_bytes(4, "little") * 512
        + bytes.fromhex("00800080") * 256  # 512 escapes
        + bytes(12)
    )
    stored = residual.encode(weight, pack_nibbles(codes), qparams)
    assert stored.numpy().tobytes() == expected
    exact = weight.float() + 2.0**-20  # f32: the same, then the lower halves
    lower = bits_of(exact).numpy().astype("<u4") & 0xFFFF
    upper = (bits_of(exact) >> 16).short().view(BF16)
    stored = residual.encode(exact, pack_nibbles(codes), qparams)
    assert stored.numpy().tobytes() == (
        residual.encode(upper, pack_nibbles(codes), qparams).numpy().tobytes()
        + lower.astype("<u2").tobytes()
    )


DIGESTS = {BF16: "e9c3078fad137f95", FP16: "7e7dfb17142ad39e", F32: "7864b8e6f62b5075"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_stream_has_this_literal_digest(dtype: torch.dtype) -> None:
    """All inputs come from exact arithmetic, so that no library version can change them."""
    num_rows, num_columns = 96, 320
    noise = (torch.arange(num_rows * num_columns) * 2654435761 + 12345) % 2**32 >> 7
    noise = noise.view(num_rows, num_columns)
    codes = noise % 16
    group = torch.arange(num_columns // 64)[:, None] * num_rows + torch.arange(num_rows)
    scale, zero_point = group * 37 % 64 + 64, group * 29 % 121 - 60  # in 2^-14 and 2^-10
    qparams = torch.stack((scale * 2.0**-14, zero_point * 2.0**-10), -1).bfloat16()
    spread = (x.t().repeat_interleave(64, 1) for x in (scale, zero_point))
    eighths = (codes - 8) * 8 + noise // 16 % 8 - 4
    weight = (eighths * next(spread) + 128 * next(spread)) * 2.0**-17
    bits = bits_of(weight.to(dtype))
    bits = torch.where(noise // 128 % 16 == 0, (noise * 40503).to(bits.dtype), bits)
    stored = residual.encode(bits.view(dtype), pack_nibbles(codes.to(torch.uint8)), qparams)
    assert hashlib.sha256(stored.numpy().tobytes()).hexdigest()[:16] == DIGESTS[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bit_serial_decoder_reads_the_same_weights(kind: str, dtype: torch.dtype) -> None:
    weight, codes, qparams = random_part(kind, 64, 64, dtype)
    stored = residual.encode(weight, pack_nibbles(codes), qparams).numpy().tobytes()
    assert decode_bit_by_bit(stored, codes, qparams, dtype) == [
        int(bits) % (1 << 8 * dtype.itemsize) for bits in bits_of(weight).flatten()
    ]


def decode_bit_by_bit(
    stored: bytes, codes: Tensor, qparams: Tensor, dtype: torch.dtype
) -> list[int]:
    """Written from the specification alone: one bit at a time, no shared code."""
    num_rows, num_columns = codes.shape
    num_groups, f = num_columns // 64, np.float32
    fraction, together = (10, 2) if dtype == FP16 else (7, 4)

    def magnitude(x: np.float32) -> int:
        bits = int(np.array([x], f).view(np.uint32)[0]) & 0x7FFFFFFF
        if fraction == 7:
            return min(bits >> 16, 0x7F7F)
        return min(max(bits - (112 << 23), 0) >> 13, 0x7BFF)

    def window(row: int, column: int) -> tuple[int, int, int]:
        scale, zero_point = (f(x) for x in qparams[column // 64, row].tolist())
        step = f(int(codes[row, column]) - 8)
        low, high = (step - f(0.5)) * scale + zero_point, (step + f(0.5)) * scale + zero_point
        top_positive = magnitude(high) if high >= 0 else -1
        top_negative = magnitude(low) if low < 0 else -1
        bottom = magnitude(low) if low >= 0 else magnitude(high) if high < 0 else 0
        floor = max(bottom, max(top_positive, top_negative) - 6 * 2**fraction + 1)
        return floor, max(top_positive - floor + 1, 0), max(top_negative - floor + 1, 0)

    def word(i: int) -> int:
        return int.from_bytes(stored[4 * i : 4 * i + 4], "little")

    num_tiles = num_rows // 32 * num_groups
    out: dict[tuple[int, int], int] = {}
    for tile in range(num_tiles):
        start, position, escaped = num_tiles + 1 + word(tile), 0, []
        rows, columns = tile // num_groups * 32, tile % num_groups * 64
        places = [(rows + r, columns + k) for r in range(32) for k in range(64)]
        for first in range(0, 2048, together):
            members = [(place, window(*place)) for place in places[first : first + together]]
            width = (math.prod(a + b + 1 for _, (_, a, b) in members) - 1).bit_length()
            value = 0
            for bit in range(width):
                at = position + bit
                value |= (word(start + at // 32) >> at % 32 & 1) << bit
            position += width
            for place, (floor, a, b) in members:
                value, entry = divmod(value, a + b + 1)
                if entry == a + b:
                    escaped.append(place)
                else:
                    out[place] = floor + entry if entry < a else 0x8000 | floor + entry - a
        for i, place in enumerate(escaped):
            out[place] = word(start + (position + 31) // 32 + i // 2) >> 16 * (i % 2) & 0xFFFF
    patterns = [out[r, k] for r in range(num_rows) for k in range(num_columns)]
    if dtype != F32:
        return patterns
    lower = np.frombuffer(stored[-2 * codes.numel() :], "<u2")
    return [upper << 16 | int(half) for upper, half in zip(patterns, lower, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pattern_survives(kind: str, dtype: torch.dtype) -> None:
    _, codes, qparams = random_part(kind, 64, 1024, dtype)
    weight = every_pattern(dtype)
    assert torch.equal(bits_of(round_trip(weight, codes, qparams)), bits_of(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_do_not_depend_on_each_other(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, codes, qparams = random_part("typical", 96, 192, dtype)
    stored = residual.encode(weight, pack_nibbles(codes), qparams)
    index, payload, _ = residual.sections(stored, 96, 192, dtype)
    for t in range(9):
        rows = slice(t // 3 * 32, t // 3 * 32 + 32)
        columns = slice(t % 3 * 64, t % 3 * 64 + 64)
        own_codes, own_qparams = pack_nibbles(codes[rows, columns]), qparams[t % 3 :][:1, rows]
        own = residual.encode(weight[rows, columns].contiguous(), own_codes, own_qparams)
        own_payload = residual.sections(own, 32, 64, dtype).payload
        assert torch.equal(payload[index[t] : index[t + 1]], own_payload[:-3])
    monkeypatch.setattr(residual, "CHUNK_TILES", 2)  # leaves no trace
    assert torch.equal(residual.encode(weight, pack_nibbles(codes), qparams), stored)
    assert torch.equal(bits_of(round_trip(weight, codes, qparams)), bits_of(weight))


def test_a_part_may_be_rows_of_a_larger_grid() -> None:
    weight, codes, qparams = random_part("typical", 64, 128, BF16)
    whole = random_qparams("extreme", 2, 256, torch.Generator().manual_seed(1))
    whole[:, 96:160] = qparams
    stored = residual.encode(weight, pack_nibbles(codes), qparams)
    assert torch.equal(residual.encode(weight, pack_nibbles(codes), whole[:, 96:160]), stored)
    back = residual.decode(stored, pack_nibbles(codes), whole[:, 96:160], BF16)
    assert torch.equal(bits_of(back), bits_of(weight))


@pytest.mark.parametrize(("dtype", "most"), [(BF16, 7.15), (FP16, 10.25), (F32, 23.1)], ids=str)
def test_normal_weights_take_about_seven_bits(dtype: torch.dtype, most: float) -> None:
    """A change that costs size is a bug too: nearest codes on a minimum-to-maximum qparams."""
    weight = (torch.randn(512, 512, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    groups = weight.float().view(512, -1, 64)
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / 15).bfloat16()
    zero_point = (low + 8 * scale.float()).bfloat16()
    steps = (groups - zero_point.float()[..., None]) / scale.float()[..., None]
    codes = (steps.round() + 8).clamp(0, 15).to(torch.uint8).view(512, 512)
    qparams = torch.stack((scale, zero_point), -1).transpose(0, 1).contiguous()
    stored = residual.encode(weight, pack_nibbles(codes), qparams)
    assert 8 * stored.numel() / weight.numel() < most


# ---- windows ------------------------------------------------------------------------------------


def windows_of(kind: str, fraction_bits: int) -> list[tuple[residual.Windows, float, float, int]]:
    """For 4 groups and all codes: (window of 1 weight, scale, zero_point, code)."""
    qparams = random_qparams(kind, 1, 4, torch.Generator().manual_seed(0))[0].float()
    found = []
    for scale, zero_point in qparams:
        for code in range(16):
            tensors = (
                torch.tensor([[[code]]]).byte(),
                scale.view(1, 1, 1),
                zero_point.view(1, 1, 1),
            )
            window = residual.Windows(
                *map(torch.flatten, residual._windows(*tensors, fraction_bits))
            )
            found.append((window, float(scale), float(zero_point), code))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fraction_bits", [7, 10])
def test_entries_and_patterns_of_a_window_invert_each_other(kind: str, fraction_bits: int) -> None:
    for window, _, _, _ in windows_of(kind, fraction_bits):
        size = int(window.size())
        assert 2 <= size <= (12 << fraction_bits) + 1 and int(window.floor) >= 0
        entries = torch.arange(size)
        patterns, escaped = residual._patterns(entries, window)
        assert escaped.tolist() == [False] * (size - 1) + [True]
        assert len(patterns[:-1].unique()) == size - 1
        back, outside = residual._entries(patterns[:-1], window)
        assert torch.equal(back, entries[:-1]) and not outside.any()
        assert int((~residual._entries(ALL, window)[1]).sum()) == size - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_holds_all_of_its_interval_down_to_its_floor(kind: str) -> None:
    values = ALL.short().view(BF16).double()
    for window, scale, zero_point, code in windows_of(kind, 7):
        low, high = (code - 8.5) * scale + zero_point, (code - 7.5) * scale + zero_point
        member = (values >= low) & (values <= high) & ((ALL & 0x7FFF) >= window.floor)
        assert not (member & residual._entries(ALL, window)[1]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_interval_ends_are_what_every_machine_computes(kind: str) -> None:
    """The product is exact, so that one rounding or two give the same; nothing is subnormal."""
    qparams = random_qparams(kind, 1, 40, torch.Generator().manual_seed(0))[0].float()
    for scale, zero_point in qparams:
        for half_step in range(-17, 17, 2):
            product = half_step / 2 * scale
            assert Fraction(float(product)) == Fraction(half_step, 2) * Fraction(float(scale))
            exact = Fraction(float(product)) + Fraction(float(zero_point))
            end = float(product + zero_point)
            assert end == float(np.float32(0)) if exact == 0 else abs(end) >= 2.0**-126
            error = abs(Fraction(end) - exact)
            for way in (-np.inf, np.inf):
                neighbour = np.nextafter(np.float32(end), np.float32(way))
                if np.isfinite(neighbour):
                    assert error <= abs(Fraction(float(neighbour)) - exact)


def test_magnitudes_are_truncated_and_finite() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -1.00001, 65504.0, 7e4, 6.2e-5, 6e-5, 2.9e-8, 3e38, math.inf])
    bf16 = [0, 0, 0x3F80, 0x3F80, 0x477F, 0x4788, 0x3882, 0x387B, 0x32F9, 0x7F61, 0x7F7F]
    fp16 = [0, 0, 0x3C00, 0x3C00, 0x7BFF, 0x7BFF, 0x0410, 0x03DD, 0, 0x7BFF, 0x7BFF]
    assert residual._magnitude(x, 7).tolist() == bf16
    assert residual._magnitude(x, 10).tolist() == fp16


# ---- malformed streams --------------------------------------------------------------------------


def changed(word: int, by: int) -> Callable[[Tensor], Tensor]:
    def change(stored: Tensor) -> Tensor:
        stored.view(torch.int32)[word] += by
        return stored

    return change


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored[:0],
        lambda stored: stored[:20],
        lambda stored: stored[:-4],
        lambda stored: stored[:-1],
        lambda stored: torch.cat((stored, stored[:4])),
        lambda stored: torch.zeros_like(stored),
        changed(0, 1),
        changed(0, -1),
        changed(2, 1),  # the tile before becomes longer, the one behind shorter
        changed(2, -1),
        changed(2, 1 << 30),
        changed(2, -(1 << 31)),
        changed(4, 1),
        changed(4, -1),
        changed(4, 1 << 30),
    ],
)
def test_a_malformed_stream_is_refused(
    dtype: torch.dtype, damage: Callable[[Tensor], Tensor]
) -> None:
    weight, codes, qparams = random_part("typical", 64, 128, dtype)
    stored = damage(residual.encode(weight, pack_nibbles(codes), qparams).clone())
    with pytest.raises(SubspecError, match="residual") as caught:
        residual.decode(stored, pack_nibbles(codes), qparams, dtype)
    assert caught.value.exit_code == Exit.CORRUPT and caught.value.hint


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_escape_that_the_stream_has_no_room_for_is_refused(dtype: torch.dtype) -> None:
    weight, codes, qparams = random_part("typical", 32, 64, dtype, stray=0)
    stored = residual.encode(weight, pack_nibbles(codes), qparams)
    words = residual.sections(stored, 32, 64, dtype).payload
    words[: len(words) // 2] = -1  # numbers beyond the largest: escapes all
    with pytest.raises(SubspecError, match="escapes"):
        residual.decode(stored, pack_nibbles(codes), qparams, dtype)
