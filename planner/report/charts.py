"""Data and axes of the report's two line charts; how they are drawn is the template's business."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from subspec.artifacts.acceptance import TWO_SIDED_95, Acceptance, level_rates, pooled
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.plan import Plan, Tree

NUM_STEPS = 5  # of an axis, at most
HEADROOM = 1.1  # of the speed axis over the highest point

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]  # value, label

    def percent(self, value: float) -> float:
        """How far along the axis `value` lies."""
        return 100 * (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Chart:
    x: Axis
    y: Axis
    line: Points  # in the axes' own units
    band: Points = ()  # outline of the confidence band


def budget_chart(plan: Plan) -> Chart | None:
    """Predicted tokens/s over the budget, from 0; None if there are fewer than two budgets."""
    line = tuple((p.budget_bytes, p.tokens_per_second) for p in plan.by_budget)
    if len({budget for budget, _ in line}) < 2:
        return None
    x = axis(line[0][0], line[-1][0], lambda size: short_size(size).replace(".00", ""))
    return Chart(x, axis(0.0, HEADROOM * max(speed for _, speed in line), "{:g}".format), line)


def acceptance_chart(acceptance: Acceptance, tree: Tree) -> Chart | None:
    """Probability that each level of `tree` is accepted, with its 95 % confidence band; None if the
    tree has no levels."""
    if not tree.depth:
        return None
    line = tuple(enumerate((1.0, *acceptance.reached(tree.width, tree.depth))))
    bounds = confidence(acceptance, tree)
    upper = tuple((level, high) for level, (_, high) in enumerate(bounds))
    lower = tuple((level, low) for level, (low, _) in enumerate(bounds))
    band = (*upper, *reversed(lower)) if len(bounds) > 1 else ()
    x = axis(0, tree.depth, "{:g}".format, least_step=1)
    return Chart(x, axis(0.0, 1.0, "{:.0%}".format), line, band)


def axis(low: float, high: float, label: Callable[[float], str], least_step: float = 0.0) -> Axis:
    """An axis from `low` to `high` with a tick at every multiple of a round step."""
    least = max(least_step, (high - low) / NUM_STEPS)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= 0.999 * least)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [index * step for index in range(first, last + 1)]
    return Axis(low, high, tuple((value, label(value)) for value in values))


def confidence(acceptance: Acceptance, tree: Tree) -> list[tuple[float, float]]:
    """95 % confidence interval per level, the root first, as deep as levels were tried.

    By Greenwood's formula; like Acceptance.margin it counts the trials of the narrower of two
    measured widths.
    """
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
