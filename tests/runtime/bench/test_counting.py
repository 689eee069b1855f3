"""Figures of answers by the rules of docs/bench.md, against worked examples."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from subspec.runtime.bench.counting import (
    Interval,
    figures,
    interval_of_mean,
    interval_of_ratio,
    interval_of_score,
)
from subspec.runtime.bench.records import Costs
from subspec.runtime.bench.tables import of_figures

# 1 token by the prompt, then 3 rounds of 4, 1 and 2 tokens, in 2 seconds.
FIRST = Costs(10, 8, 0.5, 0.5, 1.5, 0.4, 700, 9, (4, 4, 2), (3, 0, 1))
SECOND = Costs(20, 3, 1.5, 0.0, 2.0, 0.0, 200, 7, (4,), (1,))
# A question that did not fit the context.
UNANSWERED = Costs(900, 0, 0.0, 0.0, 0.0, 0.0, 0, 0, (), ())


def test_an_answers_figures_follow_the_counting_rules() -> None:
    found = figures([FIRST])
    assert found.decode_tokens_per_second.value == 7 / 2
    assert found.tokens_per_second == 8 / 2.5
    assert found.accepted_per_round == 4 / 3
    assert found.acceptance_length == pytest.approx(7 / 3)  # with its own token
    assert found.acceptance_rate == 4 / 10
    assert found.tau == 8 / 4  # the prompt counts as a round
    assert found.streamed_bytes_per_token == 100
    assert found.stall_share == pytest.approx(0.2)


def test_rates_of_several_answers_are_sums_over_sums() -> None:
    found = figures([FIRST, SECOND])
    assert (found.answers, found.tokens, found.peak_bytes) == (2, 11, 9)
    assert found.decode_tokens_per_second.value == 9 / 4
    assert found.tau == (8 / 4 + 3 / 2) / 2
    assert found.first_token_seconds == 1.0


def test_answers_without_a_token_are_counted_and_change_no_other_figure() -> None:
    found = figures([UNANSWERED, FIRST, UNANSWERED, SECOND])
    assert found == replace(figures([FIRST, SECOND]), answers=4)


def test_figures_of_no_answer_with_a_token_are_zero_and_shown_as_missing() -> None:
    for every in ([], [UNANSWERED], [UNANSWERED] * 3):
        found = figures(every)
        assert {**asdict(found), "answers": 0} == {
            **dict.fromkeys(asdict(found), 0),
            "decode_tokens_per_second": {"value": 0, "low": None, "high": None},
        }
        assert found.answers == len(every) and set(of_figures(found)) == {"-"}


def test_scores_of_right_and_wrong_are_never_certain() -> None:
    right = interval_of_score([1.0] * 20)
    assert (right.value, right.high) == (1, pytest.approx(1))
    assert right.low == pytest.approx(0.8389, abs=1e-4)
    wrong = interval_of_score([0.0] * 20)
    assert (wrong.low, wrong.high) == (pytest.approx(0), pytest.approx(0.1611, abs=1e-4))
    some = interval_of_score([1.0] * 3 + [0.0] * 7)  # worked out by hand, z = 1.96
    assert some.ends == (pytest.approx(0.1078, abs=1e-4), pytest.approx(0.6032, abs=1e-4))
    shares = [0.2, 0.4, 1.0]
    assert interval_of_score(shares) == interval_of_mean(shares)


def test_intervals_hold_the_mean_about_as_often_as_they_say() -> None:
    draws = np.random.default_rng(1)
    held = 0
    for _ in range(40):
        found = interval_of_mean(list(draws.normal(5, 2, 30)))
        held += found.low <= 5 <= found.high
    assert held >= 32  # of 38 expected


def test_an_interval_is_the_same_every_time_and_one_value_has_none() -> None:
    assert interval_of_mean([1.0, 2.0, 4.0]) == interval_of_mean([1.0, 2.0, 4.0])
    one = interval_of_ratio([6], [3])
    assert (one.value, one.low, one.high) == (2, None, None) and str(one) == "2"
    assert interval_of_score([1.0]) == Interval(1.0) == interval_of_mean([1])
    assert interval_of_ratio([1, 1], [0, 0]).value == 0
