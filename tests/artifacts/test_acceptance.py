"""What counts of accepted levels promise, against values worked out by hand and simulations."""

import math
import random
from dataclasses import replace

import pytest
import torch

from subspec.artifacts.acceptance import (
    PRIOR_TRIALS,
    Acceptance,
    Curve,
    added,
    level_rates,
)

RATES = (0.9, 0.85, 0.8, 0.9, 0.7, 0.6)


def measured(*curves: Curve) -> Acceptance:
    return Acceptance(curves, measured=True)


# Rates


def test_a_level_is_drawn_towards_the_mean_of_its_tree_the_less_it_was_tried() -> None:
    """11 of 14 by Laplace's rule are 12 of 16; they weigh as 20 trials."""
    found = level_rates(measured(Curve(1, "", (10, 4), (8, 3))), 1, 3, "")
    assert PRIOR_TRIALS == 20
    assert found == pytest.approx(((8 + 15) / 30, (3 + 15) / 24, 15 / 20))


def test_many_trials_outweigh_the_mean() -> None:
    counts = Curve(1, "", (10_000, 9_000, 1_800), (9_000, 1_800, 1_620))
    assert level_rates(measured(counts), 1, 3, "") == pytest.approx((0.9, 0.2, 0.9), abs=0.005)


def test_a_run_without_a_rejection_does_not_promise_that_there_is_never_one() -> None:
    assert level_rates(measured(Curve(1, "", (8,), (8,))), 1, 2, "")[1] == pytest.approx(9 / 10)
    assert level_rates(measured(Curve(1, "", (8,), (0,))), 1, 2, "")[1] == pytest.approx(1 / 10)


def test_rates_lie_straight_over_the_logarithm_of_the_width_and_beyond_as_at_the_nearest() -> None:
    known = measured(Curve(2, "", (998,), (499,)), Curve(8, "", (998,), (749,)))
    found = [level_rates(known, width, 1, "")[0] for width in (1, 2, 4, 8, 16)]
    assert found == pytest.approx([0.5, 0.5, 0.625, 0.75, 0.75], abs=1e-3)


def test_a_path_is_as_likely_as_all_of_its_levels() -> None:
    half = measured(Curve(1, "", (1000,), (500,)))
    assert half.reached(1, 3) == (0.5, 0.25, 0.125)
    assert half.tokens(1, 3) == 1.875
    assert (half.reached(1, 0), half.tokens(1, 0)) == ((), 1.0)


def test_a_deeper_tree_begins_as_a_shallower_one() -> None:
    known = measured(Curve(1, "", (40, 30, 20), (30, 20, 5)))
    assert known.reached(1, 9)[:4] == known.reached(1, 4)


# Kinds of text


CODE = (Curve(1, "code", (30, 20), (20, 10)), Curve(3, "code", (30,), (25,)))
PROSE = (Curve(1, "prose", (10, 4, 1), (4, 1, 0)),)


def test_kinds_are_pooled_by_adding_their_counts() -> None:
    both = measured(CODE[0], *PROSE, CODE[1])
    together = measured(Curve(1, "", (40, 24, 1), (24, 11, 0)), replace(CODE[1], kind=""))
    assert both.kinds == ("code", "prose")
    for width in (1, 2, 3):
        assert both.reached(width, 4) == together.reached(width, 4)


def test_a_kind_is_drawn_towards_all_kinds_the_less_it_was_tried() -> None:
    """74 of 100 are accepted in all, 75 of 102 by Laplace's rule."""
    both = measured(Curve(1, "code", (60,), (54,)), Curve(1, "prose", (40,), (20,)))
    prior = 20 * 75 / 102
    assert both.reached(1, 1) == pytest.approx(((74 + prior) / 120,))
    assert both.reached(1, 1, "code") == pytest.approx(((54 + prior) / 80,))
    assert both.reached(1, 1, "prose") == pytest.approx(((20 + prior) / 60,))


def test_a_kind_that_is_missing_is_expected_to_be_as_all_are() -> None:
    both = measured(CODE[0], *PROSE, CODE[1])
    assert both.reached(2, 5, "json") == both.reached(2, 5)
    assert both.margin(2, 5, "json") == both.margin(2, 5)


def test_trees_are_counted_at_the_width_that_has_most() -> None:
    both = measured(CODE[0], *PROSE, CODE[1])
    assert [both.num_trees(kind) for kind in ("", "code", "prose", "json")] == [40, 30, 10, 40]


def test_counts_of_different_depth_are_added_level_by_level() -> None:
    assert added([(3, 2), (5,), (), (1, 1, 1)]) == (9, 3, 1)
    assert added([]) == ()


# Censoring


def counted(seed: int, num_trees: int, longest: int) -> tuple[Curve, Curve, Curve]:
    """Of one set of trees: uncut; cut at a random level; cut, and the cut taken for a rejection."""
    pick, depth = random.Random(seed), len(RATES)
    rows = [([0] * depth, [0] * depth) for _ in range(3)]

    def count(row: int, num_accepted: int, num_tried: int) -> None:
        for level in range(num_tried):
            rows[row][0][level] += 1
            rows[row][1][level] += level < num_accepted

    for _ in range(num_trees):
        reached = next((n for n, rate in enumerate(RATES) if pick.random() > rate), depth)
        cut = pick.randint(0, longest)
        count(0, reached, min(reached + 1, depth))
        count(1, min(reached, cut), min(reached + 1, cut, depth))
        count(2, min(reached, cut), min(min(reached, cut) + 1, depth))
    whole, cut_off, mistaken = (Curve(1, "", tuple(t), tuple(a)) for t, a in rows)
    return whole, cut_off, mistaken


def test_trees_that_end_with_their_text_tell_the_same_as_those_that_do_not() -> None:
    whole, cut, mistaken = (
        measured(curve).reached(1, len(RATES)) for curve in counted(1, 8000, longest=8)
    )
    assert cut == pytest.approx(whole, abs=0.02)
    assert mistaken[-1] < 0.4 * whole[-1]


def test_the_estimate_is_that_of_the_rates_which_made_the_trees() -> None:
    expected = [math.prod(RATES[: level + 1]) for level in range(len(RATES))]
    mean = [0.0] * len(RATES)
    for seed in range(5):
        found = measured(counted(seed, 20_000, longest=8)[1]).reached(1, len(RATES))
        mean = [total + some / 5 for total, some in zip(mean, found, strict=True)]
    assert mean == pytest.approx(expected, abs=0.01)


# Margins


def test_four_times_the_trees_give_half_the_margin() -> None:
    few = measured(Curve(1, "", (200, 160, 120), (160, 120, 80)))
    many = measured(Curve(1, "", (800, 640, 480), (640, 480, 320)))
    assert few.margin(1, 3) == pytest.approx(2 * many.margin(1, 3), rel=0.03)


def test_a_margin_worked_out_by_hand() -> None:
    """One level: 1.96 standard deviations of a share; slope 1."""
    assert measured(Curve(1, "", (1000,), (500,))).margin(1, 1) == pytest.approx(
        1.96 * math.sqrt(0.25 / 1000)
    )


def test_a_margin_holds_95_of_100_estimates() -> None:
    """4000 times 600 trees: by the spread of their estimates, and by how often the truth is inside
    (a false alarm of the latter is four standard deviations away)."""
    generator, repeats = torch.Generator().manual_seed(7), 4000
    tried, rows = torch.full((repeats,), 600.0), list[tuple[torch.Tensor, torch.Tensor]]()
    for rate in RATES:
        accepted = torch.binomial(tried, torch.full((repeats,), rate), generator=generator)
        rows.append((tried.int(), accepted.int()))
        tried = accepted
    found, margins = list[float](), list[float]()
    for index in range(repeats):
        counts = [(int(t[index]), int(a[index])) for t, a in rows]
        one = measured(Curve(1, "", tuple(t for t, _ in counts), tuple(a for _, a in counts)))
        found.append(one.tokens(1, len(RATES)))
        margins.append(one.margin(1, len(RATES)))
    spread = 1.96 * torch.tensor(found).std().item()
    assert sum(margins) / repeats == pytest.approx(spread, rel=0.05)
    truth = 1 + sum(math.prod(RATES[: level + 1]) for level in range(len(RATES)))
    inside = sum(abs(one - truth) <= margin for one, margin in zip(found, margins, strict=True))
    assert inside / repeats == pytest.approx(0.95, abs=0.014)


def test_what_was_not_measured_has_no_margin() -> None:
    curve = Curve(3, "", (1000,), (900,))
    assert measured(curve).margin(2, 4) == math.inf  # nothing as narrow was tried
    assert math.isfinite(measured(curve).margin(3, 4))
    assert Acceptance((curve,), measured=False).margin(3, 4) == math.inf
