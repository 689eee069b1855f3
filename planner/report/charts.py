"""Geometry of the report's pictures: what lies where. How it is drawn is the template's.

A place in a plot is in percent of it, from the left and from the top.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from subspec.artifacts.acceptance import TWO_SIDED_95, Acceptance, level_rates, pooled
from subspec.artifacts.plan import Placement, Plan, Point, Prediction, Tree
from subspec.artifacts.runs import Run

MOST_SEGMENTS = 12  # of a lane: a picture of the pipeline, not a count of its blocks
NUM_STEPS = 5  # of an axis
TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
SIZE_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "KB"))
MOST_KINDS = 8  # of text, told apart by colours
OFF = 0.1  # a prediction within it is drawn as near
NARROW = 0.5  # values from this share of the largest upwards: their axis does not begin at 0


@dataclass(frozen=True)
class Tick:
    place: float  # from the axis' beginning
    label: str


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    ticks: tuple[Tick, ...]

    def place(self, value: float) -> float:
        return 100 * (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Line:
    kind: int  # of text, by its colour; -1: all kinds
    label: str
    points: str  # "x,y x,y", as SVG has it


@dataclass(frozen=True)
class Mark:
    """One plan of an outlook."""

    x: float
    y: float
    point: Point
    own: bool  # the plan that the report is of


@dataclass(frozen=True)
class Chart:
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]  # from the top
    lines: tuple[Line, ...] = ()
    area: str = ""  # points of a polygon
    marks: tuple[Mark, ...] = ()
    dots: tuple[tuple[str, str], ...] = ()  # method, and a path of one dot each


# Axes


def round_step(low: float, high: float, most: int = NUM_STEPS) -> float:
    """The smallest one that fits at most `most` times."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    return next(power * n for n in (1, 2, 5, 10) if (high - low) / (power * n) <= most * 1.001)


def multiples(step: float, low: float, high: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def axis(low: float, high: float, label: Callable[[float], str]) -> Axis:
    """Of round numbers, the first at or below `low`, the last at or above `high`."""
    step = round_step(low, high, NUM_STEPS + 1)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return labelled(low, high, [(value, label(value)) for value in multiples(step, low, high)])


def labelled(low: float, high: float, values: Iterable[tuple[float, str]]) -> Axis:
    bare = Axis(low, high, ())
    return Axis(low, high, tuple(Tick(bare.place(value), label) for value, label in values))


def plain_label(value: float) -> str:
    return f"{value:.6g}"


def size_axis(low: float, high: float) -> Axis:
    """Of bytes, which are not rounded at its ends."""
    unit, name = next(((u, n) for u, n in SIZE_UNITS if high >= u), (1, "B"))
    places = multiples(round_step(low, high), low, high)
    return labelled(low, high, [(value, f"{value / unit:.6g} {name}") for value in places])


def doubling_axis(low: float, high: float) -> Axis:
    """Of the logarithms of numbers to base 2: each power of two has a tick, or every other."""
    first, last = math.ceil(low), math.floor(high)
    step = 1 if last - first < 2 * NUM_STEPS - 2 else 2
    return labelled(low, high, [(n, str(2**n)) for n in range(first, last + 1, step)])


def downwards(ticks: Iterable[Tick]) -> tuple[Tick, ...]:
    return tuple(Tick(100 - tick.place, tick.label) for tick in ticks)


def ticks(seconds: float) -> list[tuple[float, str]]:
    """At most NUM_STEPS round numbers after 0, up to `seconds`, and their labels."""
    if seconds <= 0:
        return []
    step = round_step(0.0, seconds)
    unit, name = next(((u, n) for u, n in TIME_UNITS if step >= 0.999 * u), TIME_UNITS[-1])
    return [(place, f"{place / unit:g} {name}" if place else "0")
            for place in multiples(step, 0.0, seconds)]  # fmt: skip


def joined(x: Axis, y: Axis, values: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x.place(a):.2f},{100 - y.place(b):.2f}" for a, b in values)


# What other budgets and contexts would give


def budget_chart(plan: Plan) -> Chart | None:
    """None: too few points to draw."""
    points = plan.by_budget
    if len({point.budget_bytes for point in points}) < 2:
        return None
    x = size_axis(points[0].budget_bytes, points[-1].budget_bytes)
    return outlook(points, [point.budget_bytes for point in points], x, plan.budget_bytes)


def context_chart(plan: Plan) -> Chart | None:
    """Contexts on a logarithmic axis. None: too few points to draw."""
    points = plan.by_context
    if len({point.context for point in points}) < 2:
        return None
    places = [math.log2(point.context) for point in points]
    return outlook(points, places, doubling_axis(places[0], places[-1]), math.log2(plan.context))


def outlook(points: Sequence[Point], places: Sequence[float], x: Axis, own: float) -> Chart:
    """Tokens/s over `places`, from 0."""
    speeds = [point.tokens_per_second for point in points]
    y = axis(0.0, max(speeds), plain_label)
    marks = [
        Mark(x.place(place), 100 - y.place(speed), point, place == own)
        for place, speed, point in zip(places, speeds, points, strict=True)
    ]
    pairs = joined(x, y, zip(places, speeds, strict=True))
    return Chart(
        x.ticks,
        downwards(y.ticks),
        lines=(Line(-1, "", pairs),),
        marks=tuple(sorted(marks, key=lambda mark: mark.own)),  # the own one is drawn last
    )


# Acceptance


def acceptance_chart(acceptance: Acceptance, tree: Tree) -> Chart | None:
    """Probability that each level of `tree` is reached, its root first. None: it has no levels."""
    if not tree.depth:
        return None
    levels = multiples(max(1.0, round_step(0, tree.depth, 8)), 0, tree.depth)
    x = labelled(0, tree.depth, [(level, plain_label(level)) for level in levels])
    y = labelled(0.0, 1.0, [(n / 4, f"{25 * n} %") for n in range(5)])

    def line(index: int, kind: str) -> Line:
        reached = (1.0, *acceptance.reached(tree.width, tree.depth, kind))
        return Line(index, kind, joined(x, y, enumerate(reached)))

    kinds = [line(index, kind) for index, kind in enumerate(shown_kinds(acceptance))]
    band = bounds(acceptance, tree)
    upper, lower = ([(n, pair[side]) for n, pair in enumerate(band)] for side in (1, 0))
    area = joined(x, y, [*upper, *reversed(lower)]) if len(band) > 1 else ""
    return Chart(x.ticks, downwards(y.ticks), (*kinds, line(-1, "")), area)


def shown_kinds(acceptance: Acceptance) -> list[str]:
    """Those with the most trees, by name; none where there is one kind only."""
    kinds = sorted(acceptance.kinds, key=lambda kind: -acceptance.num_trees(kind))
    return sorted(kinds[:MOST_KINDS]) if len(kinds) > 1 and acceptance.measured else []


def bounds(acceptance: Acceptance, tree: Tree) -> list[tuple[float, float]]:
    """95 % confidence interval of what is reached, from the root as deep as it was tried, by
    Greenwood's formula; of the narrower of two measured widths, as Acceptance.margin."""
    known = [curve for curve in pooled(acceptance) if curve.width <= tree.width]
    tried = known[-1].tried if known and acceptance.measured else ()
    rates = level_rates(acceptance, tree.width, tree.depth, "")
    reached = acceptance.reached(tree.width, tree.depth)
    found, variance = [(1.0, 1.0)], 0.0
    for rate, share, trials in zip(rates, reached, tried, strict=False):
        if not trials:
            break
        variance += (1 - rate) / (rate * trials)
        half = TWO_SIDED_95 * share * math.sqrt(variance)
        found.append((max(0.0, share - half), min(1.0, share + half)))
    return found


# Predictions against runs


def runs_chart(runs: Sequence[Run]) -> Chart | None:
    """Actual over predicted tokens/s: on the diagonal they agree. None: too few runs to draw."""
    pairs = [
        (run.method, run.predicted_tokens_per_second, run.tokens_per_second)
        for run in runs
        if run.predicted_tokens_per_second
    ]
    if len(pairs) < 2:
        return None
    values = [value for _, *both in pairs for value in both]
    low, high = min(values), max(values) * (1 + OFF)
    both = axis(low * (1 - OFF) if low > NARROW * high else 0.0, high, plain_label)
    first, last = both.low, both.high
    near = [  # within OFF of the diagonal, as far as the plot goes
        (first, first), (first, first * (1 + OFF)), (last / (1 + OFF), last), (last, last),
        (last, last * (1 - OFF)), (first / (1 - OFF), first),
    ]  # fmt: skip
    dots = []
    for method in ("substitute", "plain"):
        places = [(both.place(x), 100 - both.place(y)) for m, x, y in pairs if m == method]
        if places:
            dots.append((method, "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)))
    return Chart(
        both.ticks,
        downwards(both.ticks),
        lines=(Line(-1, "", joined(both, both, [(first, first), (last, last)])),),
        area=joined(both, both, near),
        dots=tuple(dots),
    )


# One round


@dataclass(frozen=True)
class Bar:
    """A stretch of a lane, in seconds from the beginning of the round."""

    kind: str  # draft, compute or link: its colour
    start: float
    seconds: float


@dataclass(frozen=True)
class Timeline:
    """One round of a method, as the report draws it."""

    method: str
    prediction: Prediction
    seconds: float
    ahead_seconds: float  # link time that passes while the draft runs
    compute: tuple[Bar, ...]
    link: tuple[Bar, ...]


def timeline(method: str, prediction: Prediction, placement: Placement) -> Timeline:
    """Blocks arrive and are computed in turn: the shorter of the two lanes has gaps."""
    draft, verify = prediction.draft_seconds, prediction.verify_seconds
    ring_bytes = placement.block_bytes * placement.num_slots
    share = min(1.0, ring_bytes / prediction.streamed_bytes) if prediction.streamed_bytes else 0.0
    ahead = min(draft, prediction.stream_seconds * share)
    # Real rounds may have taught that verification is shorter than one of its terms.
    link = min(prediction.stream_seconds - ahead, verify)
    compute = min(prediction.compute_seconds, verify)
    blocks = math.ceil(prediction.streamed_bytes / max(1, placement.block_bytes))
    count = max(1, min(MOST_SEGMENTS, blocks))
    starts = [draft + index * verify / count for index in range(count)]
    lanes = [Bar("compute", begin + (verify - compute) / count, compute / count)
             for begin in starts]  # fmt: skip
    copies = [Bar("link", begin, link / count) for begin in starts]
    return Timeline(
        method,
        prediction,
        draft + verify,
        ahead,
        tuple(bar for bar in (Bar("draft", 0.0, draft), *lanes) if bar.seconds > 0),
        tuple(bar for bar in (Bar("link", 0.0, ahead), *copies) if bar.seconds > 0),
    )
