"""What counts of drafted and accepted levels say of a round, against values worked out by hand and
simulations."""

import math
import random
from dataclasses import replace

import pytest
from toys import make_curve

from subspec.artifacts.acceptance import (
    ONE_TOKEN,
    Acceptance,
    Curve,
    ExpectedRound,
    Tree,
    added,
    margin_of_ratio,
    merged,
)

# Of 8 trees: 8, 6 and 2 have level 1, 2 and 3, and it is accepted in 4, 3 and 1.
EARLY = Curve(2, 0.25, "code", 2, 8, (8, 6, 2), (4, 3, 1), 0.5)


def measured(*curves: Curve) -> Acceptance:
    return Acceptance(curves, measured=True)


def counted(width: int, stop: float, accepted: int, kind: str = "", margin: float = 0.1) -> Curve:
    """One level, which all of 100 trees have, along 10 answers."""
    return Curve(width, stop, kind, 10, 100, (100,), (accepted,), margin)


# A round


def early(depth: int) -> Tree:
    return Tree(2, depth, min_path_probability=0.25)


def yields_of(
    known: Acceptance, width: int, deepest: int, stop: float = 0.0
) -> tuple[ExpectedRound, ...]:
    """With trees of 0, 1, ... `deepest` levels."""
    trees = (Tree(width, depth, min_path_probability=stop) for depth in range(deepest + 1))
    return tuple(map(known.expected_round, trees))


def test_a_round_gives_what_was_accepted_and_the_exact_models_own() -> None:
    """Half of the drafts are right: 1, 2, 3, 4 tokens in 1/2, 1/4, 1/8, 1/8 of the rounds."""
    half = measured(Curve(1, 0.0, "", 5, 1000, (1000,) * 3, (500, 250, 125)))
    assert half.acceptance_rates(Tree(1, 3)) == (0.5, 0.25, 0.125)
    assert (half.acceptance_rates(Tree(1, 0)), half.acceptance_length(Tree(1, 0))) == ((), 1.0)
    assert half.acceptance_length(Tree(1, 3)) == 1.875
    assert yields_of(half, 1, 3) == (
        ONE_TOKEN,
        ExpectedRound(1.5, 0.5 + 4 * 0.5, 1.0, (0.0, 1.0)),
        ExpectedRound(1.75, 0.5 + 4 * 0.25 + 9 * 0.25, 2.0, (0.0, 0.0, 1.0)),
        ExpectedRound(1.875, 0.5 + 4 * 0.25 + 9 * 0.125 + 16 * 0.125, 3.0, (0.0, 0.0, 0.0, 1.0)),
    )


def test_drafts_that_end_early_are_counted_by_the_levels_that_they_have() -> None:
    """2 of 8 trees have one level, 4 have two, 2 have three; 4 rounds give 1 token, 1 gives 2, 2
    give 3, 1 gives 4."""
    whole = measured(EARLY).expected_round(early(3))
    assert whole == ExpectedRound(
        tokens=(4 * 1 + 1 * 2 + 2 * 3 + 1 * 4) / 8,
        tokens_squared=(4 * 1 + 1 * 4 + 2 * 9 + 1 * 16) / 8,
        levels=(2 * 1 + 4 * 2 + 2 * 3) / 8,
        shares=(0.0, 2 / 8, 4 / 8, 2 / 8),
    )


def test_a_shallower_tree_is_the_beginning_of_a_deeper_one() -> None:
    found = yields_of(measured(EARLY), 2, 6, 0.25)
    for depth in range(7):
        cut = replace(EARLY, drafted=EARLY.drafted[:depth], accepted=EARLY.accepted[:depth])
        if depth <= 3:
            assert measured(cut).expected_round(early(depth)) == found[depth]
        assert found[depth].tokens == measured(EARLY).acceptance_length(early(depth))
    assert found[2].shares == (0.0, 2 / 8, 6 / 8)  # trees of three levels are cut at two


@pytest.mark.parametrize("lasts", [1.0, 0.9, 0.4])
def test_every_round_drafts_some_number_of_levels_and_their_mean_is_that_of_the_shares(
    lasts: float,
) -> None:
    for one in yields_of(measured(make_curve(1, 0.5, "", 0.3, lasts)), 1, 70, 0.3):
        assert sum(one.shares) == pytest.approx(1.0) and min(one.shares) >= 0
        assert one.levels == pytest.approx(sum(n * share for n, share in enumerate(one.shares)))
        assert one.tokens - 1 <= one.levels
        assert one.tokens**2 <= one.tokens_squared + 1e-9


def test_beyond_the_levels_that_were_counted_trees_go_on_and_nothing_is_accepted() -> None:
    """A deeper tree is not free because none was grown so deep."""
    found = yields_of(measured(EARLY), 2, 5, 0.25)
    assert found[3].tokens == found[4].tokens == found[5].tokens
    assert [one.levels for one in found[3:]] == [16 / 8, 18 / 8, 20 / 8]
    assert found[5].shares == (0.0, 2 / 8, 4 / 8, 0.0, 0.0, 2 / 8)


# Which curve


def test_a_width_or_threshold_between_counted_ones_is_as_the_next_smaller() -> None:
    """Which never expects more than was counted: narrower trees are accepted less often."""
    known = measured(counted(2, 0.1, 50), counted(2, 0.3, 40), counted(8, 0.0, 75))
    for width, stop, expected in (
        (2, 0.1, 0.5),
        (3, 0.2, 0.5),
        (7, 0.3, 0.4),
        (2, 0.999, 0.4),
        (1, 0.05, 0.5),  # none is smaller: as the smallest
        (8, 0.0, 0.75),
        (16, 0.5, 0.75),
    ):
        assert known.acceptance_rates(Tree(width, 1, min_path_probability=stop)) == (expected,)
    assert known.thresholds == (0.0, 0.1, 0.3)


def test_kinds_are_merged_by_adding_their_counts() -> None:
    """The half of the trees on prose that had two levels count as if they had gone on."""
    prose = Curve(2, 0.25, "prose", 3, 24, (24, 12), (6, 0), 0.1)
    both = measured(EARLY, prose)
    together = merged([EARLY, prose])
    assert both.kinds == ("code", "prose")
    assert both.curve(2, 0.25) == together
    assert together == Curve(
        2, 0.25, "", 5, 32, (32, 18, 14), (10, 3, 1),
        # Of independent samples that weigh 8 and 24.
        pytest.approx(math.hypot(0.25 * 0.5, 0.75 * 0.1)),
    )  # fmt: skip
    assert both.curve(2, 0.25, "code") == EARLY
    assert both.acceptance_rates(early(3), "prose") == (0.25, 0.0, 0.0)


def test_a_kind_that_is_missing_is_expected_to_be_as_all_are() -> None:
    both = measured(EARLY, replace(EARLY, kind="prose", accepted=(8, 6, 2)))
    assert both.acceptance_rates(early(5), "json") == both.acceptance_rates(early(5))
    assert both.margin(early(5), "json") == both.margin(early(5))


def test_answers_are_counted_at_the_width_that_has_most() -> None:
    """Trees with several thresholds are grown along the same answers."""
    known = measured(
        Curve(1, 0.0, "code", 3, 9, (), ()), Curve(1, 0.0, "prose", 4, 9, (), ()),
        Curve(1, 0.2, "code", 3, 9, (), ()), Curve(1, 0.2, "prose", 4, 9, (), ()),
        Curve(4, 0.0, "code", 5, 9, (), ()),
    )  # fmt: skip
    assert [known.num_answers(kind) for kind in ("", "code", "prose", "json")] == [7, 5, 4, 7]


def test_counts_of_different_depth_are_added_level_by_level() -> None:
    assert added([(3, 2), (5,), (), (1, 1, 1)]) == (9, 3, 1)
    assert added([]) == ()


def test_trees_without_levels_give_the_exact_models_own_token() -> None:
    none = measured(Curve(1, 0.0, "", 2, 5, (), ()))
    assert yields_of(none, 1, 2) == (
        ONE_TOKEN,
        replace(ONE_TOKEN, levels=1.0, shares=(0.0, 1.0)),
        replace(ONE_TOKEN, levels=2.0, shares=(0.0, 0.0, 1.0)),
    )


# Margins


def test_a_margin_worked_out_by_hand() -> None:
    """Answers of 10, 20 and 30 tokens in 10 rounds each: 2 tokens a round; off by 10, 0 and 10."""
    found = margin_of_ratio([(10, 10), (20, 10), (30, 10)])
    assert found == pytest.approx(1.96 * math.sqrt(200 * 3 / 2) / 30)
    assert margin_of_ratio([(20, 10), (40, 20), (10, 5)]) == 0  # all alike, however long


def test_one_answer_says_nothing_of_another() -> None:
    assert margin_of_ratio([(30, 10)]) == 3.0  # all of what it gives


def test_a_margin_holds_95_of_100_estimates() -> None:
    """2000 times 60 answers, which differ from each other in acceptance and in length (a false
    alarm is four standard deviations away)."""
    pick, repeats, inside = random.Random(7), 2000, 0
    for _ in range(repeats):
        answers = []
        for _ in range(60):
            mean, rounds = pick.uniform(1, 9), pick.randint(10, 60)
            answers.append((round(rounds * mean), rounds))
        found = sum(tokens for tokens, _ in answers) / sum(rounds for _, rounds in answers)
        inside += abs(found - 5) <= margin_of_ratio(answers)
    assert inside / repeats == pytest.approx(0.945, abs=0.02)


def test_a_shallower_tree_has_its_share_of_the_margin() -> None:
    known = measured(Curve(1, 0.0, "", 10, 100, (100, 100), (80, 60), 0.48))
    assert known.margin(Tree(1, 2)) == pytest.approx(0.48)
    assert known.margin(Tree(1, 1)) == pytest.approx(0.48 * 1.8 / 2.4)
    assert known.margin(Tree(1, 9)) == known.margin(Tree(1, 2))


def test_what_was_not_measured_has_no_margin() -> None:
    assert Acceptance((counted(3, 0.0, 90),), measured=False).margin(Tree(3, 1)) == math.inf
