"""Among the 4-bit kernels of a profile the one whose plan is the fastest is chosen; and what a plan
needs and gives beside what the search compares."""

from dataclasses import replace
from typing import Any

import pytest
from toys import ACCEPTANCE, make_profile, make_spec

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.footprint import substitutes_bytes
from subspec.artifacts.plan import Constraints, HostLedger, Plan, Usage
from subspec.artifacts.profile import KernelCosts, Profile, Timing
from subspec.planner.solve.fastest import fastest_plan
from subspec.planner.solve.outlook import point_of, predict_for, speed_of
from subspec.planner.solve.predict import full_usage, usual_usage
from subspec.planner.solve.search import search
from subspec.planner.solve.storage import artifact_bytes, raw_storage, storage_with

SPEC = make_spec()
CONSTRAINTS = Constraints(context=256)
# As on a GPU; the arithmetic of the kernels' bytes is the same on a CPU.
SLOWER = tuple(replace(one, seconds=2 * one.seconds) for one in make_profile().draft_layer)
OTHER = KernelCosts("aten", SLOWER, make_profile().draft_head, 0.0)


def both(**changes: Any) -> Profile:
    return make_profile(int4_kernel="gemlite", other_kernels=(OTHER,), **changes)


def plan_for(profile: Profile, budget_bytes: int, **constraints: Any) -> Plan:
    asked = replace(CONSTRAINTS, **constraints)
    return fastest_plan(SPEC, profile, budget_bytes, asked, ACCEPTANCE)


def smallest(profile: Profile) -> int:
    with pytest.raises(SubspecError) as caught:
        plan_for(profile, 1, method="substitute")
    assert caught.value.exit_code == Exit.INFEASIBLE
    assert caught.value.smallest_budget_bytes is not None
    return caught.value.smallest_budget_bytes


def test_a_slower_kernel_is_chosen_where_the_memory_that_it_leaves_is_worth_more() -> None:
    fast, slow = (both().with_kernel(kernel) for kernel in ("gemlite", "aten"))
    more = substitutes_bytes(SPEC, "gemlite") - substitutes_bytes(SPEC, "aten")
    assert 0 < more == pytest.approx(substitutes_bytes(SPEC, "aten") / 9, rel=0.01)
    tight = smallest(slow) + more // 2
    assert tight < smallest(fast), "there it is the only one"
    for budget, kernel, other in ((tight, "aten", "gemlite"), (12_000_000, "gemlite", "aten")):
        plan = plan_for(both(), budget)
        speeds = [speed_of(plan_for(one, budget)) for one in (fast, slow)]
        assert (plan.int4_kernel, speed_of(plan)) == (kernel, max(speeds))
        reason = next(one for one in plan.reasons if "4-bit kernel" in one)
        assert reason.startswith(f"the 4-bit kernel is {kernel}, its copy takes ")
        assert f" with {other}, whose" in reason
    assert not any("4-bit kernel" in one for one in plan_for(fast, tight).reasons)


def test_the_smallest_budget_is_that_of_the_smaller_kernel() -> None:
    fast, slow = both().by_kernel
    assert smallest(both()) == smallest(slow) < smallest(fast)


def test_a_plan_is_foretold_with_the_timings_of_its_kernel() -> None:
    profile = both()
    slow = profile.with_kernel("aten")
    plan = search(SPEC, slow, 12_000_000, replace(CONSTRAINTS, method="substitute"), ACCEPTANCE)
    found = predict_for(
        SPEC, profile, plan, raw_storage(SPEC), "substitute", usual_usage(plan.context)
    )
    assert found.draft_seconds == plan.predicted["substitute"].draft_seconds


def test_what_fills_the_context_is_foretold_beside_the_usual() -> None:
    assert full_usage(4096) == Usage(3840, 256) and full_usage(256) == usual_usage(256)
    plan = plan_for(make_profile(), 27_000_000, context=4096)
    assert plan.full_context is not None
    usual = plan.predicted[plan.method]
    assert plan.full_context.tokens_per_second < usual.tokens_per_second
    assert plan.full_context.time_to_first_token_seconds > usual.time_to_first_token_seconds
    assert point_of(plan).full_tokens_per_second == plan.full_context.tokens_per_second


def test_a_plan_says_what_host_memory_and_disk_it_needs() -> None:
    slow = (Timing(1, 1e-3),)
    for device in ("cpu", "cuda"):
        profile = make_profile(device=device, residual_weights_per_second=1e9, exact_layer=slow)
        plan = plan_for(profile, 140_000_000 if device == "cuda" else 12_000_000)
        streamed = plan.predicted[plan.method].streamed_bytes
        beside = HostLedger(streamed, SPEC.embedding_bytes, 0) if device == "cuda" else None
        assert plan.host_ledger == beside
        stored = storage_with(SPEC, plan.residuals)
        assert plan.disk_bytes == artifact_bytes(SPEC, stored, None)
    assert artifact_bytes(SPEC, raw_storage(SPEC), SPEC) > artifact_bytes(
        SPEC, raw_storage(SPEC), None
    )
    coded = storage_with(SPEC, tuple(part.name for part in SPEC.parts))
    whole = artifact_bytes(SPEC, raw_storage(SPEC), None)
    assert artifact_bytes(SPEC, coded, None) < 0.7 * whole, "residuals take half"
