"""benchmarks/planner_grid.py: what its summary says of predictions and of what came."""

from dataclasses import replace
from types import ModuleType

import pytest
from builders import make_plan
from scripts import benchmark
from toys import make_spec

from subspec.artifacts.plan import Tree


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return benchmark("planner_grid")


def test_a_summary_of_promises_repeats_and_rivals(script: ModuleType) -> None:
    first = script.Contender(
        "planning", 1, 100, "2x24 to 0.1", predicted=11.0, actual=10.0, predicted_tokens=8.0,
        tokens_actual=8.0, levels_actual=11.0, streamed_bytes=50.0, ledger_bytes=100, peak_bytes=97,
    )  # fmt: skip
    second = replace(first, number=2, predicted=9.0, actual=12.0)
    by_hand = replace(first, kind="by hand", predicted=1.0, actual=9.9, peak_bytes=99)
    other = replace(first, budget_bytes=200, predicted=20.0, actual=20.0, peak_bytes=98)
    fp8 = replace(first, kind="beside", predicted=11.0, actual=22.0, streamed_bytes=20.0)
    found = script.summary_of([first, second, by_hand, other, fp8])
    assert found["median_error"] == pytest.approx(0.1)
    assert found["worst_error"] == pytest.approx(0.25)
    assert found["repeats"] == pytest.approx([0.2, 0.0])
    assert found["best_rival"] == pytest.approx([9.9 / 11.0, 0.0])
    assert found["worst_peak"] == 0.98
    assert found["beside"] == [pytest.approx({"speed": 2.0, "streamed": 0.4, "worst_error": 0.5})]


def test_plans_are_named_by_their_trees_and_where_those_end(script: ModuleType) -> None:
    plan = make_plan(make_spec(), width=2, depth=3)
    tree = Tree(2, 24, min_path_probability=0.1)
    assert script.name_of(replace(plan, method="plain")) == "plain"
    assert script.name_of(replace(plan, method="substitute", tree=tree)) == "2x24 to 0.1"
    assert script.name_of(replace(plan, method="substitute", tree=Tree(1, 8))) == "1x8"


def test_a_budget_is_a_size_or_a_share_of_the_model(script: ModuleType) -> None:
    spec = make_spec()
    half, whole = script.budget_of("0.5", spec), script.budget_of("1", spec)
    assert half == whole // 2 > 0
    assert script.budget_of("9MB", spec) == 9_000_000
