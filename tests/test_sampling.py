"""Sampling: filters, seeds, and the distribution that is emitted."""

import pytest
import torch

from subspec.runtime.sampling import Sampling, choose, filter_logits, mix, position_noise

V = 50


def logits(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(0)) * 2


def test_greedy_takes_the_first_of_equal_logits() -> None:
    equal = torch.zeros(2, V)
    equal[1, [7, 30]] = 1.0
    assert choose(equal, [0, 1], Sampling()).tolist() == [0, 7]


@pytest.mark.parametrize("settings", [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6), (0.9, 8, 0.5)])
def test_filters_keep_what_transformers_keeps(settings: tuple[float, int, float]) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    temperature, top_k, top_p = settings
    expected = TemperatureLogitsWarper(temperature)(None, logits())
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    got = filter_logits(logits(), Sampling(temperature, top_k, top_p))
    torch.testing.assert_close(got.float(), expected)


def test_a_choice_depends_on_its_row_and_position_only() -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    together = choose(logits(9), list(range(9)), sampling)
    for row in range(9):
        assert choose(logits(9)[row : row + 1], [row], sampling) == together[row]


def test_another_seed_or_position_gives_other_noise() -> None:
    device = torch.device("cpu")
    first = position_noise(1, 5, V, device)
    assert torch.equal(first, position_noise(1, 5, V, device))
    assert not torch.equal(first, position_noise(2, 5, V, device))
    assert not torch.equal(first, position_noise(1, 6, V, device))
    assert len({mix(seed, position) for seed in range(40) for position in range(40)}) == 1600


def test_gumbel_noise_samples_the_softmax() -> None:
    """Chi-square over 20,000 draws: the seed is fixed, so it never flickers."""
    row = logits(1)[:, :12]
    expected = row.double().softmax(-1)[0]
    sampling = Sampling(temperature=1.0, seed=11)
    drawn = choose(row.expand(20_000, 12), list(range(20_000)), sampling)
    counts = torch.bincount(drawn, minlength=12).double()
    statistic = ((counts - 20_000 * expected) ** 2 / (20_000 * expected)).sum().item()
    assert statistic < 49.7  # 11 degrees of freedom, p = 7e-7
