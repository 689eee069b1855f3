"""What the planner does with a draft model: it fits, it is chosen where it pays."""

from dataclasses import replace

import pytest
from toys import ACCEPTANCE, make_curve, make_profile, make_spec

from subspec.artifacts.acceptance import Acceptance, HierarchicalCost
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.checks import check_plan
from subspec.artifacts.plan import USUAL, WITH_DRAFT_MODEL, Constraints, Method, Plan
from subspec.artifacts.profile import Profile, Timing
from subspec.planner.solve.outlook import predict_for
from subspec.planner.solve.predict import Proposer
from subspec.planner.solve.search import search, unknown_proposer
from subspec.planner.solve.storage import Storage, raw_storage

MODEL, SMALL = make_spec(), make_spec(num_layers=1, intermediate_size=128)
BUDGET = 10_000_000
QUICK, SLOW = 1e-5, 1e-2


def profile_with(layer_seconds: float = QUICK, **changes: object) -> Profile:
    """layer_seconds: of the draft model, at one row."""
    return make_profile(
        draft_model_layer=(Timing(1, layer_seconds), Timing(128, 4 * layer_seconds)),
        draft_model_attention=(Timing(1, 1e-6), Timing(64, 2e-6)),
        draft_model_head=(Timing(1, 1e-5), Timing(8, 2e-5)),
        **changes,
    )


USUAL_CHECKS = HierarchicalCost(0.5, 1.0)


def proposer(rate: float = 0.8, cost: HierarchicalCost = USUAL_CHECKS) -> Proposer:
    own = Acceptance((make_curve(1, rate), make_curve(2, rate)), measured=True)
    return Proposer(SMALL, own, cost)


def planned(
    budget: int = BUDGET,
    profile: Profile | None = None,
    one: Proposer | None = None,
    method: Method | None = None,
) -> Plan:
    constraints = Constraints(context=256, method=method)
    profile, one = profile or profile_with(), one or proposer()
    return search(MODEL, profile, budget, constraints, ACCEPTANCE, proposer=one)


def test_a_quick_draft_model_that_is_accepted_as_often_is_chosen() -> None:
    plan = planned(one=proposer(0.9))
    assert plan.method == "draft-model" and set(plan.drafts) == set(WITH_DRAFT_MODEL)
    check_plan(MODEL, list(raw_storage(MODEL).parts), plan, has_draft_model=True)
    assert any("by drafter" in reason for reason in plan.reasons)
    assert plan.draft.acceptance.measured and plan.draft.hierarchical_cost is None


def test_one_that_is_slow_or_hardly_accepted_is_not() -> None:
    for plan in (
        planned(profile=profile_with(SLOW)),
        planned(one=proposer(0.1, HierarchicalCost(1.0, 9.0))),
    ):
        assert plan.method == "substitute"
        speeds = {method: said.tokens_per_second for method, said in plan.predicted.items()}
        assert speeds["substitute"] > max(speeds[method] for method in WITH_DRAFT_MODEL)


def test_substitutes_that_agree_with_it_are_faster_with_it() -> None:
    """One pass of theirs in five, where its own trees are accepted rarely and more rows of a pass
    cost little."""
    flat = profile_with(draft_layer=(Timing(1, 1e-4), Timing(8, 1.1e-4)))
    plan = planned(2 * BUDGET, profile=flat, one=proposer(0.3, HierarchicalCost(0.2, 0.9)))
    assert (
        plan.method == "substitute+draft-model"
        and plan.draft.hierarchical_cost == HierarchicalCost(0.2, 0.9)
    )
    assert plan.draft.acceptance == plan.acceptance


@pytest.mark.parametrize("budget", [6_000_000, 8_000_000, BUDGET, 30_000_000])
def test_every_method_fits_the_budget_with_what_its_drafter_takes(budget: int) -> None:
    plan = planned(budget)
    for method, placement in plan.placements.items():
        ledger = placement.ledger
        assert ledger.total_bytes <= budget
        has_one = method in WITH_DRAFT_MODEL
        assert (ledger.drafter > 0) == (ledger.drafter_cache > 0) == has_one
        assert (ledger.substitutes > 0) == method.startswith("substitute")


def test_a_draft_model_fits_where_substitutes_do_not() -> None:
    with pytest.raises(SubspecError) as failed:
        planned(6_000_000, method="substitute")
    assert failed.value.exit_code == Exit.INFEASIBLE
    plan = planned(6_000_000, method="draft-model")
    assert set(plan.placements) == {"plain", "draft-model"} and plan.method == "draft-model"
    check_plan(MODEL, list(raw_storage(MODEL).parts), plan, has_draft_model=True)
    with pytest.raises(SubspecError, match="the smallest plan needs"):
        planned(2_000_000, method="draft-model")


def test_a_draft_model_costs_a_tenth_of_the_speed_at_most_and_for_a_longer_context() -> None:
    """It fits beside a longer context than the substitutes do."""
    slow = proposer(0.3, HierarchicalCost(1.0, 1.0))
    for budget in range(7_500_000, 13_000_000, 500_000):
        given = (MODEL, profile_with(), budget, Constraints(), ACCEPTANCE)
        alone, beside = search(*given), search(*given, proposer=slow)
        speeds = [plan.predicted[plan.method].tokens_per_second for plan in (alone, beside)]
        assert speeds[1] >= 0.9 * speeds[0]
        assert speeds[1] >= speeds[0] or beside.context > alone.context


def test_a_draft_model_that_does_not_fit_is_said() -> None:
    large = replace(proposer(), spec=make_spec(num_layers=30))
    plan = planned(one=large)
    assert plan.method not in WITH_DRAFT_MODEL and not plan.drafts
    assert "the draft model does not fit the budget" in plan.reasons
    assert not any("does not fit" in reason for reason in planned().reasons)
    assert not any("does not fit" in r for r in planned(one=large, method="substitute").reasons)


def test_a_plan_with_a_draft_model_is_refused_without_one() -> None:
    with pytest.raises(SubspecError) as failed:
        check_plan(MODEL, list(raw_storage(MODEL).parts), planned())
    assert failed.value.exit_code == Exit.CORRUPT


def test_a_method_needs_its_draft_model_and_the_profile_its_times() -> None:
    with pytest.raises(SubspecError, match="needs a draft model") as failed:
        search(MODEL, profile_with(), BUDGET, Constraints(method="draft-model"), ACCEPTANCE)
    assert failed.value.exit_code == Exit.USAGE
    with pytest.raises(SubspecError, match="no timings of the draft model"):
        planned(profile=make_profile())


def test_proposals_are_not_checked_where_there_are_delta_nets() -> None:
    hybrid = replace(proposer(), spec=make_hybrid())
    assert "substitute+draft-model" not in planned(one=hybrid).placements


def make_hybrid():  # type: ignore[no-untyped-def]
    from subspec.artifacts.model import Block, DeltaNet, LayerSpec

    net = DeltaNet(2, 2, 32, 32, 4)
    other = LayerSpec((Block(net, "input_layernorm"), SMALL.layers[0].blocks[1]))
    return replace(SMALL, layers=(*SMALL.layers, other))


def test_the_plans_own_predictions_are_those_for_the_usual_usage() -> None:
    plan = planned()
    stored = Storage(tuple(raw_storage(MODEL).parts))
    for method in WITH_DRAFT_MODEL:
        usage = replace(USUAL, prompt_tokens=128, answer_tokens=128)
        again = predict_for(MODEL, profile_with(), plan, stored, method, usage, SMALL)
        said = plan.predicted[method].tokens_per_second
        assert again.tokens_per_second == pytest.approx(said)
        longer = predict_for(
            MODEL,
            profile_with(SLOW),
            plan,
            stored,
            method,
            replace(usage, prompt_tokens=200),
            SMALL,
        )
        assert longer.tokens_per_second < again.tokens_per_second


def test_what_is_not_known_of_a_draft_model_is_not_called_measured() -> None:
    found = unknown_proposer(SMALL)
    assert found is not None and not found.acceptance.measured
    assert unknown_proposer(None) is None
