"""The report's pictures: places in a plot, and what is drawn where."""

import math
from dataclasses import replace
from statistics import NormalDist

import pytest
from run_records import make_run
from toys import ACCEPTANCE, make_profile, make_spec

from subspec.artifacts.acceptance import Acceptance, Curve
from subspec.artifacts.plan import Constraints, Method, Plan, Point, Tree
from subspec.artifacts.runs import Run
from subspec.planner.report.charts import (
    MOST_KINDS,
    Chart,
    Line,
    acceptance_chart,
    axis,
    bounds,
    budget_chart,
    context_chart,
    doubling_axis,
    plain_label,
    runs_chart,
    shown_kinds,
    size_axis,
    ticks,
    timeline,
)
from subspec.planner.solve.search import PRIOR, search

MEASURED = Acceptance(
    (
        Curve(1, "chat", (40, 30, 20), (30, 20, 10)),
        Curve(1, "code", (40, 36, 33), (36, 33, 30)),
    ),
    measured=True,
)


def make_plan(**changes: object) -> Plan:
    plan = search(make_spec(), make_profile(), 12_000_000, Constraints(context=256), ACCEPTANCE)
    return replace(plan, **changes)  # type: ignore[arg-type]


def run_at(predicted: float | None, actual: float, method: Method = "substitute") -> Run:
    """Ten tokens after the first one."""
    return make_run(
        method=method,
        draft_seconds=4 / actual,
        verify_seconds=6 / actual,
        predicted_tokens_per_second=predicted,
    )


def places(line: Line | str) -> list[tuple[float, float]]:
    """Percent from the left and from the top."""
    points = line if isinstance(line, str) else line.points
    pairs = [point.split(",") for point in points.split()]
    return [(float(x), float(y)) for x, y in pairs]


def drawn(chart: Chart | None) -> Chart:
    assert chart is not None
    return chart


# Axes


@pytest.mark.parametrize("seconds", [3.1e-5, 0.0092, 0.812, 1.0, 4.999, 77.0])
def test_an_axis_of_time_has_a_few_round_ticks(seconds: float) -> None:
    found = ticks(seconds)
    assert 3 <= len(found) <= 6
    assert found[0] == (0.0, "0")
    assert found[-1][0] <= seconds
    assert all(len(label) <= 7 for _, label in found)


def test_no_time_has_no_ticks() -> None:
    assert ticks(0.0) == []


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 107, "0 20 40 60 80 100 120"),
        (0, 0.9, "0 0.2 0.4 0.6 0.8 1"),
        (0, 12, "0 2 4 6 8 10 12"),
        (81, 119, "80 90 100 110 120"),
        (0, 1160.5, "0 200 400 600 800 1000 1200"),
    ],
)
def test_an_axis_ends_at_round_numbers_around_its_values(
    low: float, high: float, labels: str
) -> None:
    found = axis(low, high, plain_label)
    assert [tick.label for tick in found.ticks] == labels.split()
    assert (found.ticks[0].place, found.ticks[-1].place) == pytest.approx((0, 100))


def test_an_axis_of_sizes_is_in_the_unit_of_its_largest() -> None:
    labels = [tick.label for tick in size_axis(3e9, 15e9).ticks]
    assert labels == ["5 GB", "10 GB", "15 GB"]
    assert size_axis(6e6, 24e6).ticks[0].label == "10 MB"
    assert size_axis(6e6, 24e6).ticks[0].place == pytest.approx(100 * 4 / 18)


def test_an_axis_of_contexts_has_powers_of_two_and_not_too_many() -> None:
    assert [tick.label for tick in doubling_axis(8.5, 12).ticks] == ["512", "1024", "2048", "4096"]
    labels = [tick.label for tick in doubling_axis(6, 17).ticks]
    assert labels == ["64", "256", "1024", "4096", "16384", "65536"]


# What other budgets and contexts would give


def point(budget: int, context: int, speed: float, method: Method = "substitute") -> Point:
    return Point(budget, context, method, speed)


def test_speeds_are_drawn_over_the_budget_from_zero() -> None:
    sweep = (
        point(6_000_000, 256, 25.0, "plain"),
        point(12_000_000, 256, 50.0),
        point(18_000_000, 512, 100.0),
    )
    chart = drawn(budget_chart(make_plan(by_budget=sweep)))
    assert places(chart.lines[0]) == [(0, 75), (50, 50), (100, 0)]
    assert [(tick.place, tick.label) for tick in chart.y][0] == (100, "0")
    assert [(mark.x, mark.y, mark.own) for mark in chart.marks] == [
        (0, 75, False), (100, 0, False), (50, 50, True),
    ]  # fmt: skip
    assert chart.marks[0].point.method == "plain"


def test_contexts_lie_at_their_doublings() -> None:
    sweep = tuple(point(12_000_000, context, 10.0) for context in (256, 512, 1024, 4096))
    chart = drawn(context_chart(make_plan(by_context=sweep)))
    assert [x for x, _ in places(chart.lines[0])] == [0, 25, 50, 100]
    assert [mark.point.context for mark in chart.marks if mark.own] == [256]


def test_one_point_is_no_picture() -> None:
    alone = (point(12_000_000, 256, 10.0),)
    plan = make_plan(by_budget=alone, by_context=2 * alone)
    assert budget_chart(plan) is None
    assert context_chart(plan) is None
    assert budget_chart(make_plan(by_budget=())) is None


# Acceptance


def test_the_acceptance_curve_begins_at_the_root_and_ends_at_the_deepest_level() -> None:
    chart = drawn(acceptance_chart(MEASURED, Tree(1, 4)))
    pooled = chart.lines[-1]
    assert pooled.kind == -1
    reached = (1.0, *MEASURED.reached(1, 4))
    expected = [(25 * n, 100 - 100 * share) for n, share in enumerate(reached)]
    assert [xy for pair in places(pooled) for xy in pair] == pytest.approx(
        [xy for pair in expected for xy in pair], abs=0.01
    )
    assert [(tick.label, tick.place) for tick in chart.x] == [(str(n), 25.0 * n) for n in range(5)]
    assert [tick.label for tick in chart.y] == ["0 %", "25 %", "50 %", "75 %", "100 %"]


def test_each_kind_of_text_has_its_own_line() -> None:
    lines = drawn(acceptance_chart(MEASURED, Tree(1, 4))).lines
    assert [(line.kind, line.label) for line in lines] == [(0, "chat"), (1, "code"), (-1, "")]
    chat, code, pooled = (places(line)[-1][1] for line in lines)
    assert code < pooled < chat  # from the top


def test_one_kind_is_all_kinds() -> None:
    assert len(drawn(acceptance_chart(ACCEPTANCE, Tree(1, 4))).lines) == 1


def test_of_many_kinds_those_with_the_most_trees_are_shown() -> None:
    curves = tuple(Curve(1, f"kind{n:02}", (10 + n,), (5,)) for n in range(30))
    shown = shown_kinds(Acceptance(curves, measured=True))
    assert shown == [f"kind{n}" for n in range(30 - MOST_KINDS, 30)]


def test_the_band_is_greenwoods() -> None:
    """Of the first level it is that of a share of 80 trees."""
    first = bounds(MEASURED, Tree(1, 1))[1]
    share = MEASURED.reached(1, 1)[0]
    half = NormalDist().inv_cdf(0.975) * math.sqrt(share * (1 - share) / 80)
    assert first == pytest.approx((share - half, share + half), abs=1e-4)


def test_the_band_holds_the_curve_and_ends_where_nothing_was_tried() -> None:
    found, reached = bounds(MEASURED, Tree(1, 9)), (1.0, *MEASURED.reached(1, 9))
    assert len(found) == 4  # the root and three levels
    for (low, high), share in zip(found, reached, strict=False):
        assert 0 <= low <= share <= high <= 1
    area = places(drawn(acceptance_chart(MEASURED, Tree(1, 9))).area)
    assert len(area) == 8
    assert max(x for x, _ in area) == pytest.approx(100 / 3, abs=0.01)


def test_published_figures_have_a_curve_without_a_band() -> None:
    chart = drawn(acceptance_chart(PRIOR, Tree(6, 32)))
    assert len(chart.lines) == 1
    assert chart.area == ""


def test_a_plan_without_a_draft_has_no_curve() -> None:
    assert acceptance_chart(MEASURED, Tree(1, 0)) is None


# Predictions against runs


def test_a_run_that_did_as_predicted_lies_on_the_diagonal() -> None:
    runs = [run_at(100.0, 100.0), run_at(50.0, 25.0), run_at(10.0, 10.0, "plain")]
    chart = drawn(runs_chart(runs))
    assert [tick.label for tick in chart.x] == ["0", "20", "40", "60", "80", "100", "120"]
    assert [tick.label for tick in chart.x] == [tick.label for tick in chart.y]
    assert places(chart.lines[0]) == [(0, 100), (100, 0)]
    assert chart.dots == (("substitute", "M83.3 16.7h0M41.7 79.2h0"), ("plain", "M8.3 91.7h0"))


def test_the_band_around_the_diagonal_stays_in_the_plot() -> None:
    for runs in ([run_at(10.0, 100.0)] * 2, [run_at(100.0, 104.0)] * 2):
        area = places(drawn(runs_chart(runs)).area)
        assert all(0 <= place <= 100 for pair in area for place in pair)


def test_runs_that_are_alike_do_not_begin_at_zero() -> None:
    chart = drawn(runs_chart([run_at(100.0, 104.0), run_at(100.0, 95.0)]))
    assert chart.x[0].label == "85"


def test_runs_without_a_prediction_are_not_drawn() -> None:
    unpredicted = run_at(None, 10.0, "plain")
    assert runs_chart([unpredicted, unpredicted]) is None
    assert runs_chart([run_at(10.0, 10.0), unpredicted]) is None
    assert runs_chart([]) is None


# One round


def test_a_timeline_shows_every_second_of_both_lanes() -> None:
    plan = make_plan()
    assert plan.substitute is not None
    predicted = plan.predicted["substitute"]
    line = timeline("substitute", predicted, plan.substitute)
    link = sum(bar.seconds for bar in line.link)
    compute = sum(bar.seconds for bar in line.compute)
    assert link == pytest.approx(predicted.stream_seconds)
    assert compute == pytest.approx(predicted.draft_seconds + predicted.compute_seconds)
    for bar in (*line.link, *line.compute):
        assert 0 <= bar.start <= bar.start + bar.seconds <= line.seconds * 1.0001


def test_a_timeline_stays_within_a_round_that_was_learned_to_be_short() -> None:
    plan = make_plan()
    assert plan.substitute is not None
    said = plan.predicted["substitute"]
    short = replace(said, verify_seconds=min(said.compute_seconds, said.stream_seconds) / 2)
    line = timeline("substitute", short, plan.substitute)
    for bar in (*line.link, *line.compute):
        assert 0 <= bar.start <= bar.start + bar.seconds <= line.seconds * 1.0001
