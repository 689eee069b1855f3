"""The most probable tokens: compiled, against the plain twin."""

from collections.abc import Iterator

import pytest
import torch
from instruction_sets import Build, built
from torch import Tensor

from subspec.runtime.kernels import top_k
from subspec.runtime.kernels.top_k import top_k_compiled, top_k_plainly

BUILDS = {
    "native": Build((), ""),
    "avx2": Build(("-march=haswell",), "avx2"),
    "sse2": Build(("-march=x86-64",), "sse2"),
}


@pytest.fixture(scope="module", params=BUILDS)
def build(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    cache = tmp_path_factory.getbasetemp() / f"top-k-{request.param}"
    cache.mkdir(mode=0o700, exist_ok=True)
    with built(BUILDS[request.param], cache):
        assert top_k.unavailable() is None
        yield


def logits_of(num_rows: int, num_columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_columns)
    return (torch.randn(num_rows, num_columns, generator=generator) * 4).bfloat16()


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, 2, 4, 17])
@pytest.mark.parametrize("num_columns", [17, 64, 515, 49152])
def test_the_tokens_and_their_log_probabilities_are_those_of_the_twin(
    num_columns: int, k: int, temperature: float
) -> None:
    """Of equal logits, of which bf16 has many, either may be named: the logits count."""
    logits = logits_of(3, num_columns)
    got, ids = top_k_compiled(logits, k, temperature)
    expected, twins = top_k_plainly(logits, k, temperature)
    assert torch.equal(logits.gather(1, ids), logits.gather(1, twins))
    assert all(len(set(row)) == k for row in ids.tolist())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("build")
def test_rows_that_lie_apart_have_the_bits_of_rows_alone() -> None:
    wide = logits_of(5, 3000)
    for rows in (wide[:, :2500], wide[:, 100:2601], wide[::2]):
        together = top_k_compiled(rows, 3, 0.2)
        for index in range(len(rows)):
            alone = top_k_compiled(rows[index : index + 1].clone(), 3, 0.2)
            assert all(
                torch.equal(one[index], own[0]) for one, own in zip(together, alone, strict=True)
            )


@pytest.mark.usefixtures("build")
def test_the_number_of_threads_changes_no_bit() -> None:
    before, logits = torch.get_num_threads(), logits_of(5, 49152)
    try:
        found = []
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            found.append(top_k_compiled(logits, 4, 0.2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for one in found[1:] for pair in zip(one, found[0], strict=True))


@pytest.mark.usefixtures("build")
def test_of_equal_logits_the_first_ones_count() -> None:
    _, ids = top_k_compiled(torch.zeros(2, 700).bfloat16(), 3, 1.0)
    assert ids.tolist() == [[0, 1, 2]] * 2


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("count", [1, 600])
def test_what_is_not_finite_spoils_its_own_row_and_names_tokens_all_the_same(
    bad: float, count: int
) -> None:
    logits = logits_of(3, 600)
    clean = top_k_compiled(logits, 2, 0.2)
    logits[1, :count] = bad
    values, ids = top_k_compiled(logits, 2, 0.2)
    assert values[1].isnan().all() and len(set(ids[1].tolist())) == 2
    assert ids.min() >= 0 and ids.max() < 600
    for row in (0, 2):
        assert torch.equal(values[row], clean[0][row]) and torch.equal(ids[row], clean[1][row])


@pytest.mark.usefixtures("build")
def test_masked_tokens_are_never_probable() -> None:
    logits = torch.full((1, 600), -torch.inf).bfloat16()
    logits[0, [5, 590]] = torch.tensor([1.0, 2.0]).bfloat16()
    got, ids = top_k_compiled(logits, 3, 1.0)
    expected, _ = top_k_plainly(logits, 3, 1.0)
    assert ids[0, :2].tolist() == [590, 5]
    torch.testing.assert_close(got, expected)


def test_other_dtypes_are_left_to_the_twin_and_so_is_a_machine_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = logits_of(2, 300)
    expected = top_k_plainly(logits, 2, 0.5)
    of_f32 = top_k.top_k(logits.float(), 2, 0.5)
    assert all(torch.equal(*pair) for pair in zip(of_f32, expected, strict=True))
    monkeypatch.setattr(top_k, "unavailable", lambda: "there is no C++ compiler")
    without = top_k.top_k(logits, 2, 0.5)
    assert all(torch.equal(*pair) for pair in zip(without, expected, strict=True))
