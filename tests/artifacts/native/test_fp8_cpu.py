"""fp8.cpp against its plain twins, as it is built here and for other processors."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fp8_parts import KINDS, adversarial_part, own_part
from instruction_sets import Build, built
from residual_parts import in_layout

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format import fp8, fp8_residual
from subspec.artifacts.format.packing import pack_nibbles, unpack_nibbles
from subspec.artifacts.format.tiles import TILE_WEIGHTS
from subspec.artifacts.native import fp8_cpu

BUILDS = {
    "as built here": Build((), ""),
    "without AVX-512": Build(("-DPORTABLE", "-march=x86-64-v3"), "avx2"),
    "without byte shuffles": Build(("-DPORTABLE", "-march=x86-64"), "sse2"),
}


@pytest.fixture(scope="module", params=BUILDS, autouse=True)
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    with built(BUILDS[request.param], tmp_path_factory.mktemp("kernels")):
        assert fp8_cpu.unavailable() is None
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 3e-4, 2.0**51, 2.0**-51, 0.0])
def test_both_directions_are_the_plain_twins_for_every_code(kind: str, scale: float) -> None:
    weight, codes, qparams, scales = adversarial_part(kind, scale)
    packed = pack_nibbles(codes)
    stored = fp8_cpu.encode(weight, packed, qparams, scales, 2)
    assert torch.equal(stored, fp8_residual.encode(weight, packed, qparams, scales))
    assert torch.equal(fp8_cpu.decode(stored, packed, qparams, scales, 2), weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 3e-4, 2.0**51, 2.0**-51, 0.0])
def test_codes_are_chosen_as_the_plain_twin_does(kind: str, scale: float) -> None:
    weight, _, qparams, scales = adversarial_part(kind, scale)
    expected = fp8_residual.codes_by_windows(weight, qparams, scales)
    assert torch.equal(fp8_cpu.codes_by_windows(weight, qparams, scales, 2), expected)


@pytest.mark.parametrize("tile_rows", [0, 16, 32, 64])
@pytest.mark.parametrize("first_row", [0, 64])
def test_rows_of_a_matrix_are_decoded_over_any_layout(tile_rows: int, first_row: int) -> None:
    weight, codes, qparams, scales = own_part(192, 256, (64, 128))
    rows = slice(first_row, first_row + 128)
    own, below = codes[rows].contiguous(), scales.from_row(first_row)
    packed = in_layout(unpack_nibbles(own), tile_rows)
    stored = fp8_cpu.encode(weight[rows].contiguous(), own, qparams[:, rows], below, 1)
    out = torch.empty(128, 256, dtype=torch.bfloat16)
    fp8_cpu.decode_into(out, stored, packed, qparams[:, rows], below, tile_rows, 2)
    assert torch.equal(out, fp8.dequantize(weight[rows], below))


@pytest.mark.parametrize("block", [(128, 128), (1, 256), (256, 256), (64, 64)])
def test_widening_multiplies_every_code_as_torch_does(block: tuple[int, int]) -> None:
    codes = (torch.arange(256 * 256) % 255).to(torch.uint8).view(256, 256)
    codes[codes == 0x7F] = 0
    _, _, _, scales = own_part(256, 256, block)
    varied = scales._replace(values=scales.values * torch.logspace(-20, 20, scales.values.numel())
                             .view(scales.values.shape))  # fmt: skip
    out = torch.empty(256, 256, dtype=torch.bfloat16)
    fp8_cpu.dequantize_into(out, codes, varied, 2)
    assert torch.equal(out, fp8.dequantize(codes, varied))


def test_damage_is_refused_where_the_twin_refuses_it() -> None:
    weight, codes, qparams, scales = own_part(64, 128, (64, 128))
    stored = fp8_residual.encode(weight, codes, qparams, scales)
    generator = torch.Generator().manual_seed(0)
    num_refused = 0
    for _ in range(40):
        damaged = stored.clone()
        place = int(torch.randint(len(stored), (), generator=generator))
        damaged[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        try:
            expected = fp8_residual.decode(damaged, codes, qparams, scales)
        except SubspecError:
            num_refused += 1
            with pytest.raises(SubspecError, match="a residual is damaged") as caught:
                fp8_cpu.decode(damaged, codes, qparams, scales, 1)
            assert caught.value.exit_code == Exit.CORRUPT
        else:
            assert torch.equal(fp8_cpu.decode(damaged, codes, qparams, scales, 1), expected)
    assert num_refused > 0


def test_a_tile_is_never_longer_than_its_bound() -> None:
    """Foreign codes: every weight escaped, under windows of any kind."""
    for kind in KINDS:
        weight, codes, qparams, scales = adversarial_part(kind, 1e-3)
        stored = fp8_cpu.encode(weight, pack_nibbles(codes), qparams, scales, 1)
        index = stored.view(torch.int32)[: weight.numel() // TILE_WEIGHTS + 1]
        assert int(index.diff().max()) <= fp8_cpu.MAX_TILE_WORDS


def test_without_a_compiler_the_plain_twins_do_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weight, codes, qparams, scales = own_part(64, 128, (64, 128))
    monkeypatch.setattr(fp8_cpu, "unavailable", lambda: "no compiler")
    stored = fp8_cpu.encode(weight, codes, qparams, scales, 1)
    assert torch.equal(fp8_cpu.decode(stored, codes, qparams, scales, 1), weight)
    out = torch.empty(64, 128, dtype=torch.bfloat16)
    fp8_cpu.dequantize_into(out, weight, scales, 1)
    assert torch.equal(out, fp8.dequantize(weight, scales))
