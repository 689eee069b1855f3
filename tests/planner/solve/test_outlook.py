"""What a plan predicts for another usage, and what other budgets and contexts would give."""

from dataclasses import replace
from typing import Any

import pytest
from toys import ACCEPTANCE, make_curve, make_profile, make_spec

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.formatting import number
from subspec.artifacts.common.sizes import size_argument
from subspec.artifacts.plan import Constraints, Method, Plan, Point, Prediction, Usage
from subspec.planner.solve.feasible import drafting_from
from subspec.planner.solve.outlook import (
    BUDGET_STEPS,
    CONTEXTS,
    memory_gain_line,
    next_bytes,
    predict_for,
    with_outlook,
)
from subspec.planner.solve.predict import usual_usage
from subspec.planner.solve.search import search
from subspec.planner.solve.storage import usual_storages

SPEC = make_spec()
METHODS: tuple[Method, ...] = ("substitute", "plain")


def plan_for(budget_bytes: int, context: int | None = 256, **changes: Any) -> Plan:
    acceptance = changes.pop("acceptance", ACCEPTANCE)
    constraints = Constraints(context=context)
    return search(SPEC, make_profile(**changes), budget_bytes, constraints, acceptance)


def foretold(plan: Plan, method: Method, usage: Usage, **changes: Any) -> Prediction:
    stored = next(way for way in usual_storages(SPEC) if way.residuals == plan.residuals)
    return predict_for(SPEC, make_profile(**changes), plan, stored, method, usage)


# Other usages


@pytest.mark.parametrize("budget_bytes", [9_000_000, 12_000_000, 30_000_000])
@pytest.mark.parametrize("residual_weights_per_second", [0.0, 5e7])
@pytest.mark.parametrize("method", METHODS)
def test_a_plan_foretells_for_the_usual_usage_what_it_predicts(
    budget_bytes: int, residual_weights_per_second: float, method: Method
) -> None:
    """But for the peak, which is that of a prompt as long as the usual one."""
    plan = plan_for(budget_bytes, residual_weights_per_second=residual_weights_per_second)
    found = foretold(
        plan,
        method,
        usual_usage(256),
        residual_weights_per_second=residual_weights_per_second,
    )
    expected = plan.predicted[method]
    assert found == replace(expected, fast_peak_bytes=found.fast_peak_bytes)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_plan_holds_decoded_is_not_foretold_to_be_decoded(method: Method) -> None:
    """Nor to stream: the artifact alone does not say what is held so."""
    stored = usual_storages(SPEC)[0]
    slow = make_profile(residual_weights_per_second=2e7)
    plan = search(SPEC, slow, 12_450_000, Constraints(context=256), ACCEPTANCE, stored)
    placement = plan.placement(method)
    assert 0 < len(placement.resident) < len(stored.parts)
    found = predict_for(SPEC, slow, plan, stored, method, usual_usage(256))
    expected = plan.predicted[method]
    assert found == replace(expected, fast_peak_bytes=found.fast_peak_bytes)


@pytest.mark.parametrize("method", METHODS)
def test_a_short_prompt_leaves_some_of_the_workspace_alone(method: Method) -> None:
    plan = plan_for(40_000_000, context=1024)
    placement = plan.placement(method)
    assert plan.prefill_chunk_tokens > 64
    most = placement.ledger.total_bytes - placement.ledger.guard
    peaks = [foretold(plan, method, Usage(n, 10)).fast_peak_bytes for n in (16, 64, 256, 1000)]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1] <= most
    assert peaks[0] > most - placement.ledger.workspace


def test_a_longer_cache_makes_a_round_longer() -> None:
    plan = plan_for(80_000_000, context=4096)
    for method in METHODS:
        near, far = (foretold(plan, method, Usage(prompt, 256)) for prompt in (128, 3000))
        assert far.compute_seconds > 1.2 * near.compute_seconds
        assert far.time_to_first_token_seconds > 10 * near.time_to_first_token_seconds


def test_a_plan_whose_drafts_end_early_foretells_them() -> None:
    """As it was counted with the plan's threshold."""
    early = Acceptance(
        (make_curve(1, 0.8), make_curve(1, 0.79, "code", 0.3, lasts=0.9)), measured=True
    )
    whole = plan_for(9_000_000, acceptance=early)
    tree = replace(whole.tree, min_path_probability=0.3)
    plan = replace(whole, tree=tree)
    found, before = (foretold(one, "substitute", usual_usage(256)) for one in (plan, whole))
    expectation = early.expected_round(tree)
    assert found.tokens_per_round == expectation.tokens < before.tokens_per_round
    assert found.levels_per_round == expectation.levels < before.levels_per_round == tree.depth
    assert found.draft_seconds < before.draft_seconds


# Other budgets and contexts


def best(budget_bytes: int, context: int) -> Plan:
    return plan_for(budget_bytes, context)


def test_every_budget_and_context_that_has_a_plan_is_a_point() -> None:
    plan = with_outlook(plan_for(10_000_000), best, most_positions=4096)
    budgets = [int(10_000_000 * step) for step in BUDGET_STEPS]
    assert [p.budget_bytes for p in plan.by_budget] == sorted(
        # Of the smallest nothing fits.
        {*budgets[1:], 10_000_000, 11_000_000}
    )
    with pytest.raises(SubspecError):
        best(budgets[0], 256)
    assert {point.context for point in plan.by_budget} == {256}
    own = Point(10_000_000, 256, plan.method, plan.predicted[plan.method].tokens_per_second)
    assert own in plan.by_budget and own in plan.by_context
    contexts = [point.context for point in plan.by_context]
    assert contexts == [256, *(some for some in CONTEXTS if some <= contexts[-1])]
    with pytest.raises(SubspecError):
        best(12_000_000, 2 * contexts[-1])
    assert {point.budget_bytes for point in plan.by_context} == {10_000_000}
    for point in (*plan.by_budget, *plan.by_context):
        found = best(point.budget_bytes, point.context)
        assert point.method == found.method
        assert point.tokens_per_second == found.predicted[found.method].tokens_per_second


def test_more_memory_is_shown_as_never_slower() -> None:
    plan = with_outlook(plan_for(12_000_000), best, most_positions=4096)
    speeds = [point.tokens_per_second for point in plan.by_budget]
    assert speeds == sorted(speeds) and speeds[-1] > 2 * speeds[0]
    assert {point.method for point in plan.by_budget} == {"substitute", "plain"}


def test_other_budgets_are_for_the_plans_own_context() -> None:
    """Whoever chose it: else more memory would buy a longer context, and no speed."""
    asked = list[tuple[int, int]]()

    def solve(budget_bytes: int, context: int) -> Plan:
        asked.append((budget_bytes, context))
        return best(budget_bytes, context)

    own = plan_for(24_000_000, None)
    plan = with_outlook(own, solve, most_positions=4000)
    assert own.context == 2048
    assert {context for budget, context in asked if budget != 24_000_000} == {2048}
    assert {point.context for point in plan.by_budget} == {2048}
    speeds = [point.tokens_per_second for point in plan.by_budget]
    assert speeds == sorted(speeds)
    # The plan's own context is a point once, and is not solved for again.
    assert [context for budget, context in asked if budget == 24_000_000] == [512, 1024]
    assert [point.context for point in plan.by_context] == [512, 1024, 2048]


def test_a_plan_without_room_for_a_draft_says_where_drafting_begins() -> None:
    plan = plan_for(6_500_000)
    assert set(plan.placements) == {"plain"}
    begins = drafting_from(SPEC, make_profile(), plan, ACCEPTANCE)
    first = best(begins, 256)
    assert (
        first.method == "substitute" and "substitute" not in best(begins - 20_000, 256).placements
    )
    told = memory_gain_line(with_outlook(plan, best, 4096, begins))
    size, speed = size_argument(begins), number(first.predicted["substitute"].tokens_per_second)
    assert told.endswith(f"; drafting begins at {size}: {speed} tokens/s")
    drafts = plan_for(12_000_000)
    assert "drafting" not in memory_gain_line(with_outlook(drafts, best, 4096))


def test_an_error_other_than_too_little_memory_is_not_passed_over() -> None:
    def broken(budget_bytes: int, context: int) -> Plan:
        raise SubspecError(Exit.UNSUPPORTED, "a bug", "")

    with pytest.raises(SubspecError, match="a bug"):
        with_outlook(plan_for(12_000_000), broken, most_positions=4096)


# The next GB


@pytest.mark.parametrize(
    ("budget_bytes", "more"), [(8 * 10**9, 8 * 10**8), (24 * 10**9, 10**9), (9_000_000, 900_000)]
)
def test_the_next_gb_is_a_tenth_of_a_small_budget(budget_bytes: int, more: int) -> None:
    assert next_bytes(budget_bytes) == more


@pytest.mark.parametrize(
    ("speed", "sentence"),
    [
        (1.31, "1.20 MB more memory: 31% faster, 13.1 tokens/s"),
        (1.006, "1.20 MB more memory: 1% faster, 10.1 tokens/s"),
        (1.004, "1.20 MB more memory: no speedup"),
        (1.0, "1.20 MB more memory: no speedup"),
    ],
)
def test_what_the_next_gb_buys_is_one_sentence(speed: float, sentence: str) -> None:
    plan = plan_for(12_000_000)
    said = replace(plan.predicted[plan.method], tokens_per_second=10.0)
    plan = replace(
        plan,
        predicted={**plan.predicted, plan.method: said},
        by_budget=(
            Point(12_000_000, 256, plan.method, 10.0),
            Point(13_200_000, 256, "plain", 10 * speed),
            Point(15_000_000, 256, "plain", 50.0),
        ),
    )
    assert memory_gain_line(plan) == sentence


def test_a_budget_that_was_not_looked_into_is_not_spoken_of() -> None:
    assert memory_gain_line(plan_for(12_000_000)) == ""


def test_the_next_gb_is_among_the_budgets_that_are_tried() -> None:
    plan = with_outlook(plan_for(12_000_000), best, most_positions=4096)
    assert memory_gain_line(plan).startswith("1.20 MB more memory: ")
