"""What of FP8 weights is held as residuals, as FP8 codes, or dequantized, as memory grows."""

from dataclasses import replace
from itertools import pairwise

import pytest
from toys import ACCEPTANCE, make_fp8_spec, make_profile

from subspec.artifacts.format.checks import check_plan
from subspec.artifacts.model import StoredPart
from subspec.artifacts.plan import Constraints, Plan
from subspec.artifacts.profile import LinkRate, Profile
from subspec.planner.solve import problem as problem_module
from subspec.planner.solve.outlook import predict_for
from subspec.planner.solve.predict import usual_usage
from subspec.planner.solve.search import search
from subspec.planner.solve.storage import Storage, held_decoded, storages, usual_storages

SPEC = make_fp8_spec(num_layers=32)  # so that its weights are most of what a plan takes
CODED, *_, BYTES = usual_storages(SPEC)
NUM_FP8 = len(SPEC.fp8)
# A link that is faster than the decoders: decoding is what memory can save.
FAST_LINK = make_profile(
    link=(LinkRate(64 << 10, 10e9),),
    residual_weights_per_second=3e7,
    fp8_residual_weights_per_second=3e7,
    fp8_weights_per_second=3e8,
)
BUDGETS = range(22_000_000, 50_000_000, 3_000_000)


@pytest.fixture(autouse=True)
def small_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module, "WIDTHS", (1,))
    monkeypatch.setattr(problem_module, "DEPTHS", (3, 9))


def plan_for(
    budget_bytes: int, stored: Storage | None = None, profile: Profile = FAST_LINK
) -> Plan:
    constraints = Constraints(context=256, encoding="kept" if stored else "auto")
    return search(SPEC, profile, budget_bytes, constraints, ACCEPTANCE, stored)


def speed(plan: Plan) -> float:
    return plan.predicted[plan.method].tokens_per_second


def parts_of(plan: Plan) -> list[StoredPart]:
    return list(next(one.parts for one in usual_storages(SPEC) if one.residuals == plan.residuals))


@pytest.mark.parametrize("stored", [None, CODED, BYTES], ids=["new", "residuals", "FP8"])
def test_memory_that_is_left_holds_fp8_weights_multiplied_out(stored: Storage | None) -> None:
    plans = [plan_for(budget_bytes, stored) for budget_bytes in BUDGETS]
    for slower, faster in pairwise(map(speed, plans)):
        assert faster >= slower * (1 - 1e-9)
    counts = [len(plan.placement(plan.method).dequantized) for plan in plans]
    assert counts[0] < NUM_FP8 == counts[-1] and len(set(counts)) > 3
    largest = plans[-1]
    assert largest.predicted[largest.method].decode_seconds == 0
    assert largest.placement(largest.method).ledger.scratch == 0
    for plan in plans:
        parts = parts_of(plan)
        check_plan(SPEC, parts, plan)
        sizes = {one.name: one for one in parts}
        for method, placement in plan.placements.items():
            wide = set(placement.dequantized)
            assert placement.ledger.resident == sum(
                sizes[name].part.num_bytes if name in wide else sizes[name].part.plain_bytes
                for name in placement.resident
            )
            usage = usual_usage(plan.context)
            again = predict_for(SPEC, FAST_LINK, plan, Storage(tuple(parts)), method, usage)
            assert again.tokens_per_second == pytest.approx(
                plan.predicted[method].tokens_per_second
            )


def test_where_dequantizing_costs_little_memory_holds_residuals_as_fp8_codes_first() -> None:
    cheap = replace(FAST_LINK, fp8_weights_per_second=3e9)
    plan = plan_for(34_000_000, CODED, cheap)
    placement = plan.placement(plan.method)
    assert len(placement.dequantized) < NUM_FP8 / 4
    assert len(placement.resident) > NUM_FP8 * 3 / 4
    dear = replace(FAST_LINK, fp8_weights_per_second=3.1e7)
    plan = plan_for(34_000_000, CODED, dear)
    placement = plan.placement(plan.method)
    assert placement.dequantized and len(placement.resident) < NUM_FP8 * 3 / 4


def test_where_the_link_is_the_slower_nothing_that_streams_makes_room_for_it() -> None:
    slow = replace(FAST_LINK, link=(LinkRate(64 << 10, 20e6),), fp8_weights_per_second=3e9)
    for stored in (None, BYTES):
        plan = plan_for(23_000_000, stored, slow)
        assert plan.predicted[plan.method].streamed_bytes
        assert not plan.placement(plan.method).dequantized


def test_the_last_storage_needs_no_work_at_its_use() -> None:
    ways = [held_decoded(CODED), held_decoded(BYTES)]
    ways += [storages(SPEC, encoding, True) for encoding in ("auto", "raw", "residual")]
    for some in ways:
        assert set(some[-1].used_as) == {"raw"} and not some[-1].scratch_bytes
        assert some[-1].decoded_bytes >= sum(
            part.num_bytes for part in SPEC.parts if part.linear.fp8
        )
    assert all(a is b for a, b in zip(*(storages(SPEC, "auto", True) for _ in "ab"), strict=True))


def test_without_a_decoder_of_fp8_residuals_the_plan_says_so() -> None:
    plan = plan_for(40_000_000, profile=replace(FAST_LINK, fp8_residual_weights_per_second=0.0))
    assert not plan.residuals and "there is no fast decoder for residuals" in plan.reasons[-1]
