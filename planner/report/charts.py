"""Data and axes of the report's two line charts; how they are drawn is the template's business."""

from dataclasses import dataclass

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.common.axes import Axis, axis
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.plan import Plan, Tree

HEADROOM = 1.1  # of the speed axis over the highest point

Points = tuple[tuple[float, float], ...]


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
    """Probability that each level of `tree` is accepted, with the 95 % confidence interval of a
    round's tokens as a band; None if the tree has no levels."""
    if not tree.depth:
        return None
    line = tuple(enumerate((1.0, *acceptance.acceptance_rates(tree))))
    band: tuple[tuple[float, float], ...] = ()
    if acceptance.measured:
        off = acceptance.margin(tree) / acceptance.acceptance_length(tree)
        upper = [(level, min(1.0, share * (1 + off))) for level, share in line]
        # The root is always there.
        lower = [(level, max(0.0, share * (1 - off)) if level else 1.0) for level, share in line]
        band = (*upper, *reversed(lower))
    x = axis(0, tree.depth, "{:g}".format, least_step=1)
    return Chart(x, axis(0.0, 1.0, "{:.0%}".format), line, band)
