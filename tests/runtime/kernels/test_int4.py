"""The 4-bit product of CPUs: its layout, and every instruction set against the plain twin."""

from collections.abc import Iterator

import pytest
import torch
from instruction_sets import Build, built
from torch import Tensor

from subspec.artifacts.format.packing import dequantize, pack_nibbles, unpack_nibbles
from subspec.artifacts.native import cpp
from subspec.planner.build.quantize import quantize
from subspec.runtime.kernels import int4

BUILDS = {
    "native": Build((), ""),
    "avx-vnni": Build(("-march=haswell", "-mavxvnni"), "avx_vnni"),
    "avx2": Build(("-march=haswell",), "avx2"),
    "sse2": Build(("-march=x86-64",), "sse2"),
}
SHAPES = [(16, 64), (48, 192), (256, 512), (64, 1088), (2048, 64)]  # N, K


@pytest.fixture(scope="module", params=BUILDS)
def build(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """product() as it is, and as built for other instruction sets."""
    with built(BUILDS[request.param], tmp_path_factory.mktemp("cache")):
        assert int4.unavailable() is None
        yield


def stored(n: int, k: int) -> tuple[Tensor, Tensor]:
    """codes uint8 [N, K / 2], qparams bf16 [G, N, 2]"""
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(16, (n, k), dtype=torch.uint8, generator=generator)
    scale = torch.rand(k // 64, n, generator=generator) * 0.01 + 0.001
    zero_point = (torch.rand(k // 64, n, generator=generator) * 15 - 7) * scale
    return pack_nibbles(codes), torch.stack((scale, zero_point), dim=-1).bfloat16()


def packed(codes: Tensor) -> Tensor:
    out = torch.empty_like(codes)
    int4.pack(codes, out)
    return out


def activations(rows: int, k: int, seed: int = 0) -> Tensor:
    """bf16 [T, K] with groups of very different size"""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(rows, k // 64, 1, generator=generator).exp()
    return (torch.randn(rows, k // 64, 64, generator=generator) * sizes).view(rows, k).bfloat16()


# ---- layout -------------------------------------------------------------------------------------


def test_the_packed_bytes_are_those_of_the_documented_layout() -> None:
    codes = torch.arange(32 * 64, dtype=torch.int32).view(32, 64) * 7 % 16
    got = packed(pack_nibbles(codes.to(torch.uint8)))
    row_1_columns_8_to_15 = bytes([0xF8, 0xD6, 0xB4, 0x92])
    assert codes[1, 8:16].tolist() == [0x8, 0xF, 0x6, 0xD, 0x4, 0xB, 0x2, 0x9]
    at = 1 * 64 + 1 * 4  # the second line, its second row
    assert bytes(got.view(-1)[at : at + 4].tolist()) == row_1_columns_8_to_15


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_read_back_from_blocks_are_the_stored_ones(shape: tuple[int, int]) -> None:
    codes, _ = stored(*shape)
    blocks = packed(codes)
    assert torch.equal(int4.unpack(blocks), codes)
    assert torch.equal(int4.unpack(blocks[-16:]), codes[-16:])


# ---- product ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 16, 37])
def test_every_bit_is_that_of_the_plain_twin(shape: tuple[int, int], rows: int) -> None:
    codes, qparams = stored(*shape)
    x = activations(rows, shape[1])
    got = int4.product(x, packed(codes), qparams, 1)
    assert torch.equal(got, int4.product_plainly(x, codes, qparams).bfloat16())


@pytest.mark.usefixtures("build")
def test_a_row_depends_neither_on_the_others_nor_on_the_number_of_threads() -> None:
    codes, qparams = stored(2048, 704)  # enough for 5 threads
    blocks, x = packed(codes), activations(21, 704)
    alone = torch.cat([int4.product(row[None], blocks, qparams, 1) for row in x])
    for threads in (1, 2, 3, 5):
        assert torch.equal(int4.product(x, blocks, qparams, threads), alone)
        assert torch.equal(int4.product(x.flip(0), blocks, qparams, threads), alone.flip(0))
        for rows in (2, 4, 5):
            assert torch.equal(int4.product(x[-rows:], blocks, qparams, threads), alone[-rows:])


@pytest.mark.usefixtures("build")
def test_it_can_fill_a_column_range_of_a_wider_tensor() -> None:
    codes, qparams = stored(48, 192)
    x = activations(3, 192)
    wide = torch.zeros(3, 100, dtype=torch.bfloat16)
    int4.product(x, packed(codes), qparams, 1, wide[:, 10:58])
    assert torch.equal(wide[:, 10:58], int4.product(x, packed(codes), qparams, 1))
    assert wide[:, :10].abs().sum() + wide[:, 58:].abs().sum() == 0


@pytest.mark.usefixtures("build")
def test_activations_of_any_finite_size_stay_finite_and_zeros_give_zero() -> None:
    codes, qparams = stored(64, 256)
    x = activations(6, 256)
    x[0] = 0
    x[1, :64] = 0
    x[2] = 2.0**-133 * torch.randint(-1, 2, (256,)).bfloat16()  # the smallest bf16 there is
    x[3] *= 2.0**-100  # on both sides of what counts as zero
    x[4] *= 2.0**110
    x[5, 64:] = -x[5, :192]
    got = int4.product(x, packed(codes), qparams, 1)
    assert torch.equal(got, int4.product_plainly(x, codes, qparams).bfloat16())
    assert got.isfinite().all()
    assert (got[[0, 2]] == 0).all() and got[3:].abs().amin(1).gt(0).all()


@pytest.mark.usefixtures("build")
def test_a_row_with_an_infinity_or_nan_becomes_nan_and_leaves_the_others_alone() -> None:
    codes, qparams = stored(32, 192)
    x = activations(4, 192)
    expected = int4.product(x, packed(codes), qparams, 1)
    x[1, 70], x[2, 3] = torch.inf, torch.nan
    got = int4.product(x, packed(codes), qparams, 1)
    assert got[1:3].isnan().all() and torch.equal(got[[0, 3]], expected[[0, 3]])
    assert int4.product_plainly(x, codes, qparams)[1:3].isnan().all()


@pytest.mark.usefixtures("build")
def test_eight_bit_activations_change_a_product_by_less_than_a_percent() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 1024, generator=generator) * 0.02
    weight[:, :64] += 0.1  # a zero point far from 0
    substitute = quantize(weight.bfloat16(), "cpu")
    x = activations(8, 1024)
    got = int4.product(x, packed(substitute.codes), substitute.qparams, 1).float()
    exact = x.float() @ dequantize(unpack_nibbles(substitute.codes), substitute.qparams).t()
    assert ((got - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.01


@pytest.mark.usefixtures("build")
def test_codes_and_qparams_are_taken_exactly() -> None:
    codes, qparams = stored(64, 192)
    one_hot = torch.eye(192, dtype=torch.bfloat16)  # row k picks column k; 127 / 127 is exact
    got = int4.product(one_hot, packed(codes), qparams, 1)
    expected = dequantize(unpack_nibbles(codes), qparams).t()
    torch.testing.assert_close(got.float(), expected, rtol=2**-8, atol=0)


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpp.library.cache_clear()
    reason = int4.unavailable()
    assert reason is not None and "no-such-compiler" in reason
    cpp.library.cache_clear()
