"""Axes of charts: round ticks, and places along them. How they look is a template's business."""

import math
from collections.abc import Callable
from dataclasses import dataclass

NUM_STEPS = 5  # of an axis, at most


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]  # value, label

    def percent(self, value: float) -> float:
        """Position of `value` along the axis, in percent."""
        return 100 * (value - self.low) / (self.high - self.low)


def axis(low: float, high: float, label: Callable[[float], str], least_step: float = 0.0) -> Axis:
    """An axis from `low` to `high` with a tick at every multiple of a round step."""
    least = max(least_step, (high - low) / NUM_STEPS)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= 0.999 * least)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [index * step for index in range(first, last + 1)]
    return Axis(low, high, tuple((value, label(value)) for value in values))
