"""The report's two line charts: their points, axes and confidence band."""

import math
from dataclasses import replace

import pytest
from toys import ACCEPTANCE, make_profile, make_spec

from subspec.artifacts.acceptance import Acceptance, Curve
from subspec.artifacts.plan import Constraints, Plan, Point, Tree
from subspec.planner.report.charts import acceptance_chart, budget_chart
from subspec.planner.solve.search import PRIOR, search

MEASURED = Acceptance(
    (
        Curve(1, 0.0, "chat", 3, 40, (40, 40, 40), (30, 20, 10), 0.3),
        Curve(1, 0.0, "code", 3, 40, (40, 40, 40), (36, 33, 30), 0.4),
        Curve(1, 0.2, "code", 3, 40, (40, 36, 33), (36, 30, 24), 0.2),
    ),
    measured=True,
)


def plan_with(*by_budget: Point) -> Plan:
    plan = search(make_spec(), make_profile(), 12_000_000, Constraints(context=256), ACCEPTANCE)
    return replace(plan, by_budget=by_budget)


def test_speeds_are_drawn_over_the_budget_from_zero() -> None:
    chart = budget_chart(
        plan_with(
            Point(6_000_000, 256, "plain", 25.0),
            Point(12_000_000, 256, "substitute", 50.0),
            Point(18_000_000, 512, "substitute", 100.0),
        )
    )
    assert chart is not None
    assert chart.line == ((6_000_000, 25.0), (12_000_000, 50.0), (18_000_000, 100.0))
    assert [chart.x.percent(budget) for budget, _ in chart.line] == [0, 50, 100]
    assert chart.y.low == 0 and chart.y.high > 100
    assert [label for _, label in chart.x.ticks] == ["10 MB", "15 MB"]


def test_one_budget_is_no_chart() -> None:
    assert budget_chart(plan_with()) is None
    assert budget_chart(plan_with(Point(12_000_000, 256, "plain", 10.0))) is None


def test_the_acceptance_curve_goes_from_the_root_to_the_deepest_level() -> None:
    chart = acceptance_chart(MEASURED, Tree(1, 4))
    assert chart is not None
    assert chart.line == tuple(enumerate((1.0, *MEASURED.acceptance_rates(Tree(1, 4)))))
    assert [label for _, label in chart.x.ticks] == ["0", "1", "2", "3", "4"]
    assert [label for _, label in chart.y.ticks] == ["0%", "20%", "40%", "60%", "80%", "100%"]


def test_a_draft_that_ends_early_has_a_curve_of_its_own() -> None:
    chart = acceptance_chart(MEASURED, Tree(1, 3, min_path_probability=0.3))
    assert chart is not None
    assert [share for _, share in chart.line] == pytest.approx([1.0, 0.9, 0.75, 0.6])


def test_the_band_is_as_wide_as_the_margin_of_a_rounds_tokens() -> None:
    """The margins of two kinds, 40 trees each; no share is more than all or less than none."""
    chart = acceptance_chart(MEASURED, Tree(1, 3))
    assert chart is not None
    shares = (1.0, 66 / 80, 53 / 80, 40 / 80)
    off = math.hypot(0.15, 0.2) / sum(shares)
    upper, lower = chart.band[:4], chart.band[:3:-1]
    assert [level for level, _ in (*upper, *lower)] == [0, 1, 2, 3] * 2
    assert [share for _, share in upper] == pytest.approx([min(1, s * (1 + off)) for s in shares])
    assert lower[0] == (0, 1.0), "the root is always there"
    assert [share for _, share in lower[1:]] == pytest.approx([s * (1 - off) for s in shares[1:]])
    vague = replace(MEASURED, curves=(replace(MEASURED.curves[0], margin=1e6),))
    chart = acceptance_chart(vague, Tree(1, 3))
    assert chart is not None and {share for _, share in chart.band} == {0.0, 1.0}


def test_published_figures_have_a_curve_without_a_band() -> None:
    chart = acceptance_chart(PRIOR, Tree(6, 32))
    assert chart is not None and len(chart.line) == 33 and chart.band == ()


def test_a_plan_without_a_draft_has_no_curve() -> None:
    assert acceptance_chart(MEASURED, Tree(1, 0)) is None
