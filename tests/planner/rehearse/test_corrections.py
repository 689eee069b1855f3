"""What real rounds teach: factors on the terms of a profile, and one more kind of text."""

import math
from dataclasses import replace
from typing import Any

import pytest
from run_records import PLAN, SAID, make_run
from toys import ACCEPTANCE, make_curve, make_profile, make_spec

from subspec.artifacts.acceptance import Acceptance, Curve
from subspec.artifacts.format.checks import check_plan
from subspec.artifacts.plan import Constraints, Method, Prediction, Tree, Usage
from subspec.artifacts.profile import Corrections
from subspec.artifacts.runs import Run
from subspec.planner.rehearse.corrections import (
    MAX_FACTOR,
    MIN_FACTOR,
    Rounds,
    Timed,
    corrections,
    rounds_of_runs,
    slowdown,
    updated,
    with_runs,
    without_corrections,
)
from subspec.planner.solve.outlook import predict_for
from subspec.planner.solve.search import search
from subspec.planner.solve.storage import raw_storage


def said(method: Method, usage: Usage) -> Prediction:
    """Plain decoding takes twice as long for a token."""
    return replace(SAID, verify_seconds=0.15) if method == "plain" else SAID


# Factors


def test_the_quickest_and_the_slowest_rounds_do_not_count() -> None:
    """One of ten at either end: a first touch, another program's turn."""
    usual = Timed((0.1, 0.2, 0.3, 0.4) * 2, 0.1)
    outliers = Timed((0.0001, 900.0), 0.1)
    assert slowdown([usual, outliers]) == pytest.approx(2.5)
    assert slowdown([Timed((0.1, 0.3), 0.1)]) == pytest.approx(2.0)  # too few to leave any out


def test_rounds_of_several_answers_count_by_what_was_predicted_for_each() -> None:
    assert slowdown([Timed((0.2, 0.2), 0.1), Timed((3.0,) * 2, 1.0)]) == pytest.approx(2.5)


def test_where_nothing_was_timed_the_prediction_stays() -> None:
    assert slowdown([]) == slowdown([Timed((), 0.1)]) == slowdown([Timed((0.5,), 0.0)]) == 1.0
    assert corrections(Rounds()) == Corrections()


def test_a_factor_beyond_reason_is_a_mistake_of_something_else() -> None:
    assert slowdown([Timed((50.0,), 0.1)]) == MAX_FACTOR
    assert slowdown([Timed((1e-9,), 0.1)]) == MIN_FACTOR


def test_phases_are_learned_apart() -> None:
    found = corrections(
        Rounds(
            draft=(Timed((0.11,) * 3, 0.1),),
            verify=(Timed((0.12,) * 3, 0.1),),
            plain=(Timed((0.09,) * 2, 0.1),),
            prompt=(Timed((0.13,), 0.1),),
        )
    )
    assert found.num_rounds == 5
    factors = (found.draft, found.verify, found.plain, found.prompt)
    assert factors == pytest.approx((1.1, 1.2, 0.9, 1.3))


def test_what_was_not_timed_stays_as_it_was_known() -> None:
    before = Corrections(draft=1.1, verify=1.2, plain=1.3, prompt=1.4, num_rounds=90)
    rounds = Rounds(verify=(Timed((0.2,) * 4, 0.1),))
    assert updated(before, rounds, corrections(rounds)) == replace(before, verify=2.0, num_rounds=4)
    assert updated(before, Rounds(), corrections(Rounds())) == before


def test_a_profile_without_what_was_learned_is_the_one_that_was_measured() -> None:
    taught = make_profile(corrections=Corrections(draft=1.1, verify=1.2, num_rounds=9))
    assert without_corrections(taught) == make_profile()


# Runs


def run_like(plan_of: Prediction, factor: float, rounds: int, **changes: Any) -> Run:
    """A run of `rounds` rounds, `factor` times as long as predicted."""
    given: dict[str, Any] = {
        "accepted": (rounds,),
        "drafted": (rounds,) * round(plan_of.levels_per_round),
        "draft_seconds": factor * rounds * plan_of.draft_seconds,
        "verify_seconds": factor * rounds * plan_of.verify_seconds,
        "first_token_seconds": factor * plan_of.time_to_first_token_seconds,
    }
    return make_run(**{**given, **changes})


def test_a_run_counts_as_so_many_rounds_of_its_mean() -> None:
    """4 rounds in 0.25 and 0.375 s."""
    found = rounds_of_runs([make_run()], said)
    assert found.draft == (Timed((0.0625,) * 4, 0.05),)
    assert found.verify == (Timed((0.09375,) * 4, 0.075),)
    assert found.prompt == (Timed((0.5,), 0.5),)
    assert found.plain == ()


@pytest.mark.parametrize("usual", [3.0, 1.5, 5.0])
@pytest.mark.parametrize("drafted", [(4, 4, 4), (4, 3, 2), (4, 2, 0), (1, 0, 0)])
def test_drafts_are_compared_level_by_level(drafted: tuple[int, ...], usual: float) -> None:
    """Of 4 rounds: some end early, others had no room for whole trees."""

    def ask(method: Method, usage: Usage) -> Prediction:
        return replace(SAID, levels_per_round=usual)

    found = rounds_of_runs([make_run(drafted=drafted, accepted=(4,))], ask)
    [draft] = found.draft
    assert draft.actual == (0.0625,) * 4
    assert draft.predicted == pytest.approx(0.05 * sum(drafted) / (4 * usual))
    assert found.verify == rounds_of_runs([make_run()], ask).verify


def test_answers_of_two_tokens_draft_nothing_and_correct_no_draft() -> None:
    without = rounds_of_runs([make_run(drafted=(0, 0, 0), accepted=(4,))], said)
    assert corrections(without).draft == 1.0


def test_each_run_is_compared_with_what_is_promised_for_its_own_usage() -> None:
    asked = list[tuple[Method, Usage]]()

    def ask(method: Method, usage: Usage) -> Prediction:
        asked.append((method, usage))
        return SAID

    rounds_of_runs([make_run(), make_run(method="plain", prompt_tokens=9)], ask)
    assert asked == [("substitute", Usage(24, 11)), ("plain", Usage(9, 11))]


def test_plain_decoding_at_one_row_is_learned_and_its_padded_twin_is_not() -> None:
    fast = make_run(method="plain", padded=False, draft_seconds=0.0, verify_seconds=0.9)
    found = rounds_of_runs([fast], said)
    assert (found.draft, found.verify) == ((), ())
    assert corrections(found).plain == pytest.approx(0.9 / 4 / 0.15)
    assert rounds_of_runs([replace(fast, padded=True)], said).plain == ()


@pytest.mark.parametrize("changes", [{"cached_tokens": 5}, {"includes_digest_check": True}])
def test_a_first_token_that_others_or_digests_share_in_is_not_learned(
    changes: dict[str, Any],
) -> None:
    found = rounds_of_runs([make_run(**changes)], said)
    assert found.prompt == () and len(found.verify) == 1


def test_runs_fold_into_the_profile_until_its_predictions_are_theirs() -> None:
    spec, profile, stored = make_spec(), make_profile(), raw_storage(make_spec())
    plan = search(spec, profile, 12_000_000, Constraints(context=256), ACCEPTANCE, stored)

    def predicted_for(method: Method, usage: Usage) -> Prediction:
        return predict_for(
            spec, replace(profile, digest_bytes_per_second=0.0), plan, stored, method, usage
        )

    runs = []
    for prompt_tokens, num_rounds, factor in ((20, 30, 1.2), (90, 60, 1.3), (120, 30, 1.4)):
        usage = Usage(prompt_tokens, 100)
        tokens = {"prompt_tokens": prompt_tokens, "generated_tokens": 100}
        drafted, plain = predicted_for("substitute", usage), predicted_for("plain", usage)
        runs.append(run_like(drafted, factor, num_rounds, **tokens))
        runs.append(run_like(plain, 2 * factor, num_rounds, method="plain", padded=False, **tokens))
    rounds = rounds_of_runs(runs, predicted_for)
    taught = replace(profile, corrections=corrections(rounds))
    assert taught.corrections.draft == pytest.approx(1.3, rel=0.02)
    assert taught.corrections.num_rounds == 240
    for method, factor in (("substitute", 1.3), ("plain", 2.6)):
        usage = Usage(90, 100)
        after = predict_for(spec, taught, plan, stored, method, usage)  # type: ignore[arg-type]
        before = predicted_for(method, usage)  # type: ignore[arg-type]
        seconds = before.draft_seconds + before.verify_seconds
        found = after.draft_seconds + after.verify_seconds
        assert found == pytest.approx(factor * seconds, rel=0.03)


# Acceptance


[CODE] = PLAN.acceptance.curves
# 4 rounds: one accepted none, one 1, two all 3 levels.
ONE_RUN = Curve(2, 0.0, "runs", 1, 4, (4, 4, 4), (3, 2, 2), margin=11 / 4)


def test_runs_are_a_kind_of_text_of_their_own() -> None:
    """The same answer twice: it has no spread."""
    plain = make_run(method="plain", accepted=(9,), drafted=())
    found = with_runs(PLAN.acceptance, PLAN, [make_run(), plain, make_run()])
    both = Curve(2, 0.0, "runs", 2, 8, (8, 8, 8), (6, 4, 4), margin=0.0)
    assert found == Acceptance((CODE, both), measured=True)
    assert found.num_answers("runs") == 2 and found.num_answers("code") == 8
    assert found.acceptance_rates(Tree(2, 3), kind="code") == PLAN.acceptance.acceptance_rates(
        Tree(2, 3)
    )


def test_answers_that_differ_widen_the_margin() -> None:
    """4 rounds of 11 tokens and 4 of 4: 7.5 and 0.5 per round around the mean."""
    runs = [make_run(), make_run(drafted=(4, 1, 0), accepted=(4,))]
    own = with_runs(PLAN.acceptance, PLAN, runs).curve(2, 0.0, "runs")
    assert (own.num_trees, own.drafted, own.accepted) == (8, (8, 5, 4), (3, 2, 2))
    off = 4 * (11 / 4 - 15 / 8)  # of each answer's tokens from the mean's
    assert own.margin == pytest.approx(1.96 * math.sqrt(2 * off**2 * 2) / 8)


def test_runs_count_for_every_width_and_threshold_that_was_measured() -> None:
    """What was measured does not tell these apart."""
    several = tuple(
        make_curve(width, 0.9, min_path_probability=stop) for width in (1, 4) for stop in (0.0, 0.2)
    )
    found = with_runs(Acceptance(several, measured=True), PLAN, [make_run()])
    own = [curve for curve in found.curves if curve.kind == "runs"]
    assert own == [
        replace(ONE_RUN, width=width, min_path_probability=stop)
        for width in (1, 2, 4) for stop in (0.0, 0.2)
    ]  # fmt: skip
    assert found.thresholds == (0.0, 0.2)


def test_runs_tell_of_other_widths_by_what_was_known_of_them() -> None:
    """Level by level; a level is not accepted more often than it is drafted, or than the one
    above."""
    narrow, wide, widest = (
        make_curve(width, rate) for width, rate in ((1, 0.4), (2, 0.8), (4, 1.0))
    )
    runs = [make_run(drafted=(40, 40, 36), accepted=(20, 4, 8, 8))]
    found = with_runs(Acceptance((narrow, wide, widest), measured=True), PLAN, runs)
    counts = {width: found.curve(width, 0.0, "runs").accepted for width in (1, 2, 4)}
    assert counts == {1: (10, 4, 1), 2: (20, 16, 8), 4: (25, 25, 16)}
    for known in (True, False):
        found = with_runs(Acceptance((narrow, wide, widest), measured=known), PLAN, runs)
        tokens = [found.acceptance_length(Tree(width, 3)) for width in (1, 2, 4)]
        before = Acceptance((wide,), measured=True).acceptance_length(Tree(2, 3))
        assert tokens == sorted(tokens) and tokens[1] < before


def test_curves_stay_in_the_order_that_a_reader_asks_for() -> None:
    wider = Acceptance((CODE, replace(CODE, width=8)), measured=True)
    found = with_runs(wider, PLAN, [make_run()])
    assert [(curve.width, curve.kind) for curve in found.curves] == [
        (2, "code"), (2, "runs"), (8, "code"), (8, "runs"),
    ]  # fmt: skip
    spec = make_spec()
    plan = search(spec, make_profile(), 12_000_000, Constraints(context=256), found)
    check_plan(spec, list(raw_storage(spec).parts), plan)


def test_what_was_published_does_not_count_once_something_was_measured() -> None:
    prior = replace(PLAN.acceptance, measured=False)
    assert with_runs(prior, PLAN, [make_run()]) == Acceptance((ONE_RUN,), measured=True)


def test_runs_that_were_added_before_are_replaced() -> None:
    once = with_runs(PLAN.acceptance, PLAN, [make_run()])
    assert with_runs(once, PLAN, [make_run()]) == once
    assert with_runs(once, PLAN, [make_run(), make_run()]).num_answers("runs") == 2


@pytest.mark.parametrize("drafted", [(), (0, 0, 0), None])
def test_without_a_tree_there_is_nothing_to_add(drafted: tuple[int, ...] | None) -> None:
    """Answers of two tokens draft no level, plain decoding none at all."""
    runs = [] if drafted is None else [make_run(drafted=drafted, accepted=(3,))]
    runs.append(make_run(method="plain", drafted=(), accepted=(9,)))
    assert with_runs(PLAN.acceptance, PLAN, runs) is PLAN.acceptance
