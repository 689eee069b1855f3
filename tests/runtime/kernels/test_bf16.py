"""The bf16 product of CPUs without instructions for it: every instruction set against the plain
twin, bit for bit, and where it takes the place of torch's."""

import math
from collections.abc import Iterator

import pytest
import torch
from instruction_sets import Build, built
from torch import Tensor

from subspec.runtime.kernels import bf16, linear
from subspec.runtime.kernels.linear import gemm_ranges

BUILDS = {
    "native": Build((), ""),
    "avx2": Build(("-march=haswell",), "avx2"),
    "sse2": Build(("-march=x86-64", "-Wno-psabi"), "sse2"),
}
SHAPES = [(1, 16), (3, 48), (10, 96), (64, 1088), (200, 2048)]  # N, K


@pytest.fixture(scope="module", params=BUILDS)
def build(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """product() as it is, and as built for other instruction sets."""
    with built(BUILDS[request.param], tmp_path_factory.mktemp("cache")):
        assert bf16.unavailable() is None
        yield


def numbers(rows: int, columns: int, seed: int = 0) -> Tensor:
    """bf16 of very different sizes."""
    generator = torch.Generator().manual_seed(1000 * rows + columns + seed)
    sizes = torch.randn(rows, columns, generator=generator).exp()
    return (torch.randn(rows, columns, generator=generator) * sizes).bfloat16()


def product(x: Tensor, weight: Tensor, num_threads: int = 1) -> Tensor:
    out = torch.empty(len(x), len(weight), dtype=torch.bfloat16)
    bf16.product(x, weight, out, num_threads)
    return out


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 33])
def test_it_has_the_bits_of_its_twin(shape: tuple[int, int], rows: int) -> None:
    x, weight = numbers(rows, shape[1]), numbers(*shape, seed=1)
    expected = bf16.product_plainly(x, weight)
    assert torch.equal(product(x, weight), expected)
    exact = x.double() @ weight.double().t()
    assert (expected.double() - exact).norm() < 0.004 * exact.norm()


@pytest.mark.usefixtures("build")
def test_a_rows_bits_depend_on_nothing_else() -> None:
    """Not on its place, the other rows, their number, W's other rows or the threads."""
    x, weight = numbers(37, 512), numbers(160, 512, seed=1)
    alone = torch.cat([product(row[None], weight) for row in x])
    for num_threads in (1, 2, 3, 8):
        assert torch.equal(product(x, weight, num_threads), alone)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(product(x[order][:9], weight), alone[order][:9])
    assert torch.equal(product(x, weight[11:52]), alone[:, 11:52])


@pytest.mark.usefixtures("build")
def test_it_writes_a_column_range_and_nothing_around_it() -> None:
    x, weight = numbers(6, 64), numbers(13, 64, seed=1)
    wide = torch.full((6, 40), 7.0, dtype=torch.bfloat16)
    bf16.product(x, weight, wide[:, 9:22], 1)
    assert torch.equal(wide[:, 9:22], bf16.product_plainly(x, weight))
    assert (wide[:, :9] == 7).all() and (wide[:, 22:] == 7).all()


@pytest.mark.usefixtures("build")
def test_numbers_that_are_not_finite_stay_in_their_row_and_column() -> None:
    x, weight = numbers(5, 64), numbers(7, 64, seed=1)
    x[1, 3], x[2, 5] = math.nan, math.inf
    got = product(x, weight)
    assert got[1].isnan().all() and not got[2].isfinite().any()
    assert torch.equal(got[[0, 3, 4]], bf16.product_plainly(x[[0, 3, 4]], weight))


def test_products_go_through_it_where_torch_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    if bf16.unavailable() is not None:
        pytest.skip("no compiler")
    x, weight, calls = numbers(21, 96), numbers(10, 96, seed=1), gemm_ranges([16, 5])
    ours, gate = bf16.product_plainly(x, weight), numbers(21, 10, seed=2)
    for native in (False, True):
        monkeypatch.setattr(bf16, "is_native", lambda native=native: native)
        assert linear.torch_is_slow(weight) != native
        out, gated = torch.empty(21, 10, dtype=torch.bfloat16), gate.clone()
        linear.exact_product(x, weight, out, calls)
        linear.exact_product_into(x, weight, gated, calls)
        assert torch.equal(gated, gate * out)
        if not native:
            assert torch.equal(out, ours)
        torch.testing.assert_close(out.float(), ours.float(), rtol=0.02, atol=0.02)
        drafted, bias = linear.product(x, weight), numbers(10, 1, seed=3)[:, 0]
        torch.testing.assert_close(drafted.float(), ours.float(), rtol=0.02, atol=0.02)
        moved = linear.product(x, weight, bias).float() - bias.float()
        torch.testing.assert_close(moved, ours.float(), rtol=0.02, atol=0.05)
        assert native or torch.equal(drafted, ours)
    monkeypatch.setattr(bf16, "is_native", lambda: False)
    others = (weight.float(), weight.half(), numbers(10, 72), weight.t()[:16].contiguous().t())
    assert not any(linear.torch_is_slow(one) for one in others)
