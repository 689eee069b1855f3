"""Acceptance rate per level of draft trees: counts, and estimates from them.

Level n of a tree is tried if its path was accepted down to level n - 1 and the exact model's next
token is known there. So a tree that reaches the end of its text counts as far as it can be judged
(Kaplan-Meier). The first n levels of a tree are the tree of depth n: one deep tree covers all
depths.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from operator import mul
from typing import Annotated

from subspec.artifacts.common.bounds import MOST_LEVELS, Count, Length, TreeWidth

# The only prior: each level counts as tried this many times more, with the mean acceptance rate of
# all levels and all kinds of text at its width (empirical Bayes). The weight is a guess: a
# rehearsal tries a first level hundreds of times, and a deep level, or one kind of text, tens.
PRIOR_TRIALS = 20
TWO_SIDED_95 = 1.96


Levels = Annotated[tuple[Count, ...], Length(1, MOST_LEVELS)]


@dataclass(frozen=True)
class Curve:
    """Counts of the trees of one width on one kind of text, level by level from the first."""

    width: TreeWidth
    kind: str
    tried: Levels
    accepted: Levels


@dataclass(frozen=True)
class Acceptance:
    curves: tuple[Curve, ...]  # widths ascending
    measured: bool  # False: published figures, not this model's

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(curve.kind for curve in self.curves))

    def num_trees(self, kind: str = "") -> int:
        """Largest number of trees tried at one width; kind "": of all kinds."""
        return max((c.tried[0] for c in pooled(self, kind) if c.tried), default=0)

    def reached(self, width: int, depth: int, kind: str = "") -> tuple[float, ...]:
        """Probability that a path is accepted down to level 1, 2, ... `depth` of a tree."""
        return tuple(accumulate(level_rates(self, width, depth, kind), mul))

    def tokens(self, width: int, depth: int, kind: str = "") -> float:
        """Expected tokens of one round: the accepted ones and the exact model's own."""
        return 1.0 + sum(self.reached(width, depth, kind))

    def margin(self, width: int, depth: int, kind: str = "") -> float:
        """Half of the 95 % confidence interval of `tokens`, by the delta method, with the counts of
        the next narrower measured width. inf: nothing was measured."""
        known = [curve for curve in pooled(self, kind) if curve.width <= width]
        if not known or not self.measured:
            return math.inf
        rates, reached = level_rates(self, width, depth, kind), self.reached(width, depth, kind)
        tried = known[-1].tried
        variance = 0.0
        for level, rate in enumerate(rates[: len(tried)]):
            slope = sum(reached[level:]) / rate
            variance += slope**2 * rate * (1 - rate) / max(1, tried[level])
        return TWO_SIDED_95 * math.sqrt(variance)


def mean_rate(curve: Curve) -> float:
    """Acceptance rate over all levels, by Laplace's rule of succession: a few trials without a
    rejection do not mean a rate of 1."""
    return (sum(curve.accepted) + 1) / (sum(curve.tried) + 2)


@lru_cache(maxsize=256)
def level_rates(acceptance: Acceptance, width: int, depth: int, kind: str) -> tuple[float, ...]:
    """Probability that level 1, 2, ... is accepted if all levels above it were. Interpolated
    between measured widths linearly in the logarithm of the width, constant beyond them."""
    curves = pooled(acceptance, kind)
    means = {curve.width: mean_rate(curve) for curve in pooled(acceptance)}

    def rates_of(curve: Curve) -> list[float]:
        untried = (0,) * depth
        counts = islice(zip(curve.accepted + untried, curve.tried + untried, strict=True), depth)
        prior = PRIOR_TRIALS * means[curve.width]
        return [(a + prior) / (t + PRIOR_TRIALS) for a, t in counts]

    low = ([c for c in curves if c.width <= width] or curves[:1])[-1]
    high = next((c for c in curves if c.width >= width), low)
    share = 0.0
    if high.width > low.width:
        share = math.log(width / low.width) / math.log(high.width / low.width)
    pairs = zip(rates_of(low), rates_of(high), strict=True)
    return tuple(below + share * (above - below) for below, above in pairs)


def pooled(acceptance: Acceptance, kind: str = "") -> list[Curve]:
    """One curve per width: of `kind` if it was measured, else of all kinds together."""
    own = [curve for curve in acceptance.curves if curve.kind == kind]
    return merged(own or acceptance.curves, kind if own else "")


def merged(curves: Iterable[Curve], kind: str) -> list[Curve]:
    """One curve per width with the sums of the counts; widths ascending."""
    by_width: dict[int, list[Curve]] = {}
    for curve in curves:
        by_width.setdefault(curve.width, []).append(curve)
    return [
        Curve(width, kind, added(c.tried for c in some), added(c.accepted for c in some))
        for width, some in sorted(by_width.items())
    ]


def added(counts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Sums level by level; missing levels count as 0."""
    rows = list(counts)
    longest = max((len(row) for row in rows), default=0)
    return tuple(sum(row[level] for row in rows if level < len(row)) for level in range(longest))
