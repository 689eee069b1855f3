"""Residuals of FP8 weights: every code under every window, literal bytes, sizes, damage."""

import math

import pytest
import torch
from fp8_parts import KINDS, adversarial_part, own_part, quantized
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format import fp8, fp8_residual
from subspec.artifacts.format.fp8 import Scales
from subspec.artifacts.format.packing import dequantize, pack_nibbles, unpack_nibbles
from subspec.artifacts.format.tiles import TILE_WEIGHTS

ALL = torch.arange(256, dtype=torch.uint8)
VALUES = ALL.view(torch.float8_e4m3fn).double()
FINITE = ~VALUES.isnan()


def test_ordinals_are_the_order_of_the_values() -> None:
    ordinals = fp8_residual._ordinals(ALL)
    assert sorted(ordinals.tolist()) == list(range(-128, 128))
    in_order = VALUES[ordinals.argsort()]
    assert in_order[0].isnan() and in_order[-1].isnan()
    assert bool((in_order[1:-1].diff() >= 0).all())


def test_an_end_is_the_first_ordinal_at_or_above_its_number() -> None:
    """At every value, between them, and beside both."""
    values = VALUES[FINITE].unique()
    exact = torch.cat((values, (values[1:] + values[:-1]) / 2, torch.tensor([449.0, -449, 1e30])))
    x = exact.float()
    x = torch.cat([x] + [torch.nextafter(x, torch.tensor(end)) for end in (math.inf, -math.inf)])
    x = x[(x.abs() > 2.0**-117) & (x.abs() < 1e31)]
    # The middle end, with a scale that is too small to move it: x itself.
    found = fp8_residual._ends(torch.full_like(x, 2.0**-140), x, torch.ones_like(x))[:, 8]
    by_ordinal = VALUES[FINITE][fp8_residual._ordinals(ALL)[FINITE].argsort()]
    expected = torch.searchsorted(by_ordinal.contiguous(), x.double()) - 127
    assert torch.equal(found.long(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 3e-4, 1e-12, 448.0, 2.0**51, 2.0**-51, 0.0])
def test_every_code_under_any_window_comes_back(kind: str, scale: float) -> None:
    weight, codes, qparams, scales = adversarial_part(kind, scale)
    packed = pack_nibbles(codes)
    stored = fp8_residual.encode(weight, packed, qparams, scales)
    assert torch.equal(fp8_residual.decode(stored, packed, qparams, scales), weight)


def test_own_codes_need_no_escapes_but_of_cut_windows_and_are_nearest() -> None:
    weight, codes, qparams, scales = own_part(256, 512)
    stored = fp8_residual.encode(weight, codes, qparams, scales)
    words = stored.view(torch.int32)
    num_tiles = weight.numel() // TILE_WEIGHTS
    first_words = words[num_tiles + 1 + words[:num_tiles].long()]
    assert not bool((first_words & 1).any()), "a tile has escapes everywhere"
    exact = fp8.dequantize(weight, scales).double()
    chosen = unpack_nibbles(codes)
    step = qparams[..., 0].T.double().repeat_interleave(64, 1)
    distance = (exact - dequantize(chosen, qparams).double()).abs() / step
    inner = (chosen > 0) & (chosen < 15)
    assert float(distance[inner].max()) < 0.52, "half a step, and the rounding to bf16"


@pytest.mark.parametrize("block", [(128, 128), (1, 512), (256, 512), (64, 64)])
def test_blocks_of_any_shape_take_three_bits_a_weight(block: tuple[int, int]) -> None:
    weight, codes, qparams, scales = own_part(256, 512, block)
    stored = fp8_residual.encode(weight, codes, qparams, scales)
    assert torch.equal(fp8_residual.decode(stored, codes, qparams, scales), weight)
    assert 2.9 < stored.numel() * 8 / weight.numel() < 3.15


UNUSUAL = ("zeros", "one value", "tiny", "sparse", "rows far apart")


def unusual(name: str) -> Tensor:
    normal = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    if name == "zeros":
        return torch.zeros(128, 128)
    if name == "one value":
        return torch.full((128, 128), 0.7)
    if name == "tiny":
        return normal.sign() * 1e-20
    if name == "sparse":
        return normal * (normal.abs() > 2)
    return normal * torch.exp(6 * normal[:, :1])


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_matrices_come_back(name: str) -> None:
    weight, codes, qparams, scales = own_part(128, 128, matrix=unusual(name))
    for other in (weight, weight ^ 0x80, torch.full_like(weight, 0xFF)):
        stored = fp8_residual.encode(other, codes, qparams, scales)
        assert torch.equal(fp8_residual.decode(stored, codes, qparams, scales), other)


def test_the_example_of_the_documentation() -> None:
    """scale 2^-7, zero_point 2^-8, FP8 scale 2^-9; behind the first four weights of a tile all have
    code 8 and the first entry of its window. Entries 2 of 4, 16 of 32, 1 of 3, and the escape, 2
    of 3; V = 962 in 11 bits, behind the tile's first bit."""
    weight = torch.full((32, 64), 0x29, dtype=torch.uint8)
    weight[0, :4] = torch.tensor([0x52, 0xBA, 0xE0, 0x60], dtype=torch.uint8)
    codes = torch.full((32, 64), 8, dtype=torch.uint8)
    codes[0, :4] = torch.tensor([10, 7, 0, 15], dtype=torch.uint8)
    packed = pack_nibbles(codes)
    qparams = torch.tensor([2.0**-7, 2.0**-8]).expand(1, 32, 2).bfloat16().contiguous()
    scales = Scales(torch.tensor([[2.0**-9]]), 32, 64)
    ends = fp8_residual._ends(
        torch.tensor(2.0**-7), torch.tensor(2.0**-8), torch.tensor(2.0**-9)
    ).tolist()
    windows = [ends[code : code + 2] for code in (10, 7, 0, 15, 8)]
    assert windows == [[80, 84], [-73, 0], [-97, -95], [94, 96], [0, 72]]
    stored = fp8_residual.encode(weight, packed, qparams, scales).numpy().tobytes()
    assert len(stored) == 4 * (2 + 321 + 3)
    assert stored[:12].hex(" ") == "00 00 00 00 41 01 00 00 84 07 00 00"
    assert stored[-16:].hex(" ") == "60" + 15 * " 00"
    assert not any(stored[10:-16])
    back = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
    assert torch.equal(fp8_residual.decode(back, packed, qparams, scales), weight)


def test_the_weights_are_the_codes_times_their_scales_rounded_once() -> None:
    codes = ALL[FINITE].view(2, -1)[:, :64].contiguous()
    scales = Scales(torch.tensor([[3e-4], [1.7]]), 1, 64)
    expected = codes.view(torch.float8_e4m3fn).float() * scales.values
    assert torch.equal(fp8.dequantize(codes, scales), expected.bfloat16())
    below = Scales(scales.values, 1, 64, first_row=1)
    assert torch.equal(fp8.dequantize(codes[1:], below), expected[1:].bfloat16())


def test_damaged_streams_are_refused() -> None:
    weight, codes, qparams, scales = own_part(128, 128)
    stored = fp8_residual.encode(weight, codes, qparams, scales)
    longer = torch.cat((stored, torch.zeros(4, dtype=torch.uint8)))
    shorter = stored[:-4].clone()
    index = stored.clone()
    index[4] ^= 1  # the first tile's end
    bits = stored.clone()
    bits.view(torch.int32)[weight.numel() // TILE_WEIGHTS + 1] ^= 1  # escapes everywhere
    for damaged in (longer, shorter, index, bits):
        with pytest.raises(SubspecError, match="a residual is damaged") as caught:
            fp8_residual.decode(damaged, codes, qparams, scales)
        assert caught.value.exit_code == Exit.CORRUPT


def test_quantized_keeps_the_largest_weight_of_a_block() -> None:
    weight, scales = quantized(torch.randn(128, 128), (128, 128))
    assert int((weight & 0x7F).max()) == 0x7E and scales.values.shape == (1, 1)
