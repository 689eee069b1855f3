"""Sampling: filters, seeds, and the distribution that is emitted."""

import math

import pytest
import torch

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.model.sampling import Sampling, choose, filter_logits, mix, position_noise

V = 50


def logits(row: int = 0) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(row)) * 2


def test_greedy_takes_the_first_of_equal_logits() -> None:
    equal = torch.zeros(V)
    assert choose(equal, 0, Sampling()) == 0
    equal[[7, 30]] = 1.0
    assert choose(equal, 1, Sampling()) == 7


def test_a_row_alone_has_the_greedy_choice_that_it_has_among_others() -> None:
    """Speculation takes it of all rows at once, plain decoding of one; bf16 logits are often
    equal."""
    generator = torch.Generator().manual_seed(4)
    many = torch.randint(0, 3, (64, 5003), generator=generator).bfloat16()
    assert many.argmax(-1).tolist() == [choose(row, 0, Sampling()) for row in many]


@pytest.mark.parametrize("settings", [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6), (0.9, 8, 0.5)])
def test_filters_keep_what_transformers_keeps(settings: tuple[float, int, float]) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    temperature, top_k, top_p = settings
    for row in range(3):
        expected = TemperatureLogitsWarper(temperature)(None, logits(row)[None])
        if top_k:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p < 1:
            expected = TopPLogitsWarper(top_p)(None, expected)
        got = filter_logits(logits(row), Sampling(temperature, top_k, top_p))
        torch.testing.assert_close(got.float(), expected[0])


def test_a_choice_depends_on_its_logits_position_and_seed_only() -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    drawn = [choose(logits(row), row, sampling) for row in range(9)]
    assert drawn == [choose(logits(row), row, sampling) for row in range(9)]
    assert len(set(drawn)) > 3


def test_another_seed_or_position_gives_other_noise() -> None:
    device = torch.device("cpu")
    first = position_noise(1, 5, V, device)
    assert torch.equal(first, position_noise(1, 5, V, device))
    assert not torch.equal(first, position_noise(2, 5, V, device))
    assert not torch.equal(first, position_noise(1, 6, V, device))
    assert len({mix(seed, position) for seed in range(40) for position in range(40)}) == 1600


def test_gumbel_noise_samples_the_softmax() -> None:
    """Chi-square over 20,000 draws: the seed is fixed, so it never flickers."""
    row = logits()[:12]
    expected = row.double().softmax(-1)
    sampling = Sampling(temperature=1.0, seed=11)
    drawn = torch.tensor([choose(row, position, sampling) for position in range(20_000)])
    counts = torch.bincount(drawn, minlength=12).double()
    statistic = ((counts - 20_000 * expected) ** 2 / (20_000 * expected)).sum().item()
    assert statistic < 49.7  # 11 degrees of freedom, p = 7e-7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("seed", -1),
        ("seed", 1 << 63),
    ],
)
def test_impossible_values_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(SubspecError, match=f"{name} is .*, expected") as caught:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert caught.value.exit_code == Exit.USAGE
