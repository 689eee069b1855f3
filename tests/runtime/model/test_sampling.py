"""Sampling: filters, seeds, and the distribution that is emitted."""

import math

import pytest
import torch

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.model.sampling import (
    Sampler,
    SamplingParams,
    filter_logits,
    logprobs_of,
    mix,
    position_noise,
)

V = 50


def logits(row: int = 0) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(row)) * 2


def test_greedy_takes_the_first_of_equal_logits() -> None:
    equal = torch.zeros(V)
    assert Sampler(SamplingParams()).sample(equal, 0) == 0
    equal[[7, 30]] = 1.0
    assert Sampler(SamplingParams()).sample(equal, 1) == 7


def test_a_row_alone_has_the_greedy_choice_that_it_has_among_others() -> None:
    """Speculation takes it of all rows at once, plain decoding of one; bf16 logits are often
    equal."""
    generator = torch.Generator().manual_seed(4)
    many = torch.randint(0, 3, (64, 5003), generator=generator).bfloat16()
    assert many.argmax(-1).tolist() == [Sampler(SamplingParams()).sample(row, 0) for row in many]


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
        got = filter_logits(logits(row), SamplingParams(temperature, top_k, top_p))
        torch.testing.assert_close(got.float(), expected[0] - expected[0].max())


@pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p: float) -> None:
    from transformers import MinPLogitsWarper

    for row in range(3):
        expected = MinPLogitsWarper(min_p)(None, logits(row)[None] / 0.8)
        got = filter_logits(logits(row), SamplingParams(0.8, min_p=min_p))
        torch.testing.assert_close(got.float(), expected[0] - expected[0].max())


def test_the_repetition_penalty_is_transformers_one() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt, said = [3, 4, 5, 3], [9, 4, 9]
    sampler = Sampler(SamplingParams(repetition_penalty=1.7), prompt)
    for token in said:
        sampler.push(token)
    process = RepetitionPenaltyLogitsProcessor(1.7)
    for row in range(20):
        expected = process(torch.tensor([prompt + said]), logits(row)[None].double())
        assert sampler.sample(logits(row), row) == int(expected.argmax())


def test_a_bias_is_added_before_the_repetition_penalty() -> None:
    """As transformers does: SequenceBias, then RepetitionPenalty."""
    row = torch.tensor([2.0, 6.2, 0.0])
    penalized = SamplingParams(repetition_penalty=1.2, logit_bias=((0, 5.0),))
    assert Sampler(penalized, prompt=[0]).sample(row, 0) == 1, "7 / 1.2 < 6.2 < 2 / 1.2 + 5"


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-6])
def test_the_smallest_temperatures_take_the_likeliest_token(temperature: float) -> None:
    row = torch.tensor([30.0, 400.0, 399.0, -5.0])
    for filters in ({}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 2}):
        sampling = SamplingParams(temperature, **filters)  # type: ignore[arg-type]
        assert {Sampler(sampling).sample(row, position) for position in range(20)} == {1}


def test_presence_and_frequency_penalties_count_the_answers_tokens() -> None:
    """The prompt's do not count. OpenAI: logit - frequency * count - presence * (count > 0)."""
    sampler = Sampler(
        SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), prompt=[1, 1, 1]
    )
    row = torch.zeros(4)
    row[1], row[2], row[3] = 3.0, 2.9, 2.0
    chosen = []
    with sampler.ahead():
        for _ in range(6):
            chosen.append(sampler.sample(row, 0))
            sampler.push(chosen[-1])
    # 1 at 3.0; then it has 2.25: 2 at 2.9; 2.15; 1 at 2.25: 2.0; 2 at 2.15: 1.9; 1, 3 tie at 2.0
    assert chosen == [1, 2, 1, 2, 1, 3]
    assert sampler.sample(row, 0) == 1


def test_a_bias_is_added_to_its_tokens_logit() -> None:
    row = torch.zeros(V)
    row[5] = 1.0
    assert Sampler(SamplingParams(logit_bias=((8, 0.9),))).sample(row, 0) == 5
    assert Sampler(SamplingParams(logit_bias=((8, 1.1),))).sample(row, 0) == 8
    assert Sampler(SamplingParams(logit_bias=((5, -100.0),))).sample(row, 0) == 0
    banned = SamplingParams(1.0, logit_bias=((5, -100.0),))
    assert 5 not in {Sampler(banned).sample(row, position) for position in range(200)}


def test_log_probabilities_are_of_the_logits_as_they_are() -> None:
    row = logits().bfloat16()
    found = logprobs_of(row, 7, 4)
    expected = row.double().log_softmax(-1)
    assert found.token == 7 and found.logprob == pytest.approx(float(expected[7]))
    assert [token for token, _ in found.top] == expected.topk(4).indices.tolist()
    assert len(logprobs_of(row, 7, 1000).top) == V


def test_a_choice_depends_on_its_logits_position_and_seed_only() -> None:
    sampling = SamplingParams(temperature=1.0, seed=3)
    drawn = [Sampler(sampling).sample(logits(row), row) for row in range(9)]
    assert drawn == [Sampler(sampling).sample(logits(row), row) for row in range(9)]
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
    sampling = SamplingParams(temperature=1.0, seed=11)
    drawn = torch.tensor([Sampler(sampling).sample(row, position) for position in range(20_000)])
    counts = torch.bincount(drawn, minlength=12).double()
    statistic = ((counts - 20_000 * expected) ** 2 / (20_000 * expected)).sum().item()
    assert statistic < 49.7  # 11 degrees of freedom, p = 7e-7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("logit_bias", ((1, math.nan),)),
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
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.exit_code == Exit.USAGE
