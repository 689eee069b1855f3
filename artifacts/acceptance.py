"""Acceptance of draft trees, counted on text of the exact model, and what a round is expected to
give.

Trees are grown along an answer one after another, each where the one before it ended, as rounds
are. So a curve weighs hard and easy text as decoding does. The first n levels of a tree are the
tree of depth n: one deep tree counts for all depths.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Annotated

from subspec.artifacts.common.bounds import (
    MAX_LEVELS,
    Between,
    Count,
    Length,
    Probability,
    TreeWidth,
)

TWO_SIDED_95 = 1.96

Levels = Annotated[tuple[Count, ...], Length(0, MAX_LEVELS)]


@dataclass(frozen=True)
class Tree:
    """The draft: a beam of `width` tokens per level, `depth` levels below the root."""

    width: TreeWidth
    depth: Annotated[int, Between(0, MAX_LEVELS)]
    # Sharpens the draft's probabilities (arXiv 2509.18344).
    temperature: Annotated[float, Between(1e-6, 1e6)] = 1.0
    # The draft ends at the first level whose paths have a smaller total sharpened probability.
    min_path_probability: Probability = 0.0

    @property
    def num_nodes(self) -> int:
        return 1 + self.width * self.depth


@dataclass(frozen=True)
class Curve:
    """Acceptance counts by level, of trees of one width and one threshold on one kind of text."""

    width: TreeWidth
    min_path_probability: Probability  # as in Tree
    kind: str
    num_answers: Count
    num_trees: Annotated[int, Between(1, 1 << 62)]
    drafted: Levels  # trees that have the level
    accepted: Levels  # trees whose level was accepted
    # Half of the 95 % confidence interval of a whole tree's tokens, from the spread of the answers.
    margin: Annotated[float, Between(0, 1e9)] = 0.0


@dataclass(frozen=True)
class HierarchicalCost:
    """Passes per drafted level in hierarchical drafting: one drafter proposes, the substitutes
    check."""

    substitute_passes: Annotated[float, Between(0, 1)]  # of the substitutes
    proposer_passes: Annotated[float, Between(0, MAX_LEVELS)]  # of the proposer, one token each


@dataclass(frozen=True)
class ExpectedRound:
    """Expectations of one round."""

    tokens: float  # the accepted ones and the exact model's own
    tokens_squared: float
    levels: float  # drafted
    shares: tuple[float, ...]  # of the rounds that draft 0, 1, ... levels


ONE_TOKEN = ExpectedRound(1.0, 1.0, 0.0, (1.0,))  # a pass of plain decoding


@dataclass(frozen=True)
class Acceptance:
    curves: tuple[Curve, ...]  # by width and threshold, ascending, then by kind
    measured: bool  # False: published figures, not this model's

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(curve.kind for curve in self.curves))

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The values of `Tree.min_path_probability` that were counted, ascending."""
        return tuple(sorted({curve.min_path_probability for curve in self.curves}))

    def num_answers(self, kind: str = "") -> int:
        """Largest number of answers along which trees of one width were counted; kind "": of all
        kinds."""
        widths = {curve.width for curve in self.curves}
        return max(self.curve(width, 0.0, kind).num_answers for width in widths)

    def curve(self, width: int, min_path_probability: float, kind: str = "") -> Curve:
        """The curve of the next narrower width and the next smaller threshold that were counted (if
        there is none, of the smallest); of `kind` if it was counted, else of all kinds."""
        own = [curve for curve in self.curves if curve.kind == kind] or list(self.curves)
        widths = sorted({curve.width for curve in own})
        known = [some for some in widths if some <= width] or widths[:1]
        own = [curve for curve in own if curve.width == known[-1]]
        limits = sorted({curve.min_path_probability for curve in own})
        below = [some for some in limits if some <= min_path_probability] or limits[:1]
        return merged([c for c in own if c.min_path_probability == below[-1]])

    def acceptance_rates(self, tree: Tree, kind: str = "") -> tuple[float, ...]:
        """Probability that a round accepts level 1, 2, ... of the tree."""
        curve = self.curve(tree.width, tree.min_path_probability, kind)
        return shares_of(curve.accepted, curve.num_trees, tree.depth)

    def acceptance_length(self, tree: Tree, kind: str = "") -> float:
        """Expected tokens of one round: the accepted ones and the exact model's own."""
        return 1.0 + sum(self.acceptance_rates(tree, kind))

    def margin(self, tree: Tree, kind: str = "") -> float:
        """Half of the 95 % confidence interval of `tokens`. inf: nothing was measured."""
        if not self.measured:
            return math.inf
        curve = self.curve(tree.width, tree.min_path_probability, kind)
        whole = 1.0 + sum(shares_of(curve.accepted, curve.num_trees, len(curve.accepted)))
        return curve.margin * self.acceptance_length(tree, kind) / whole

    def expected_round(self, tree: Tree) -> ExpectedRound:
        """Expected tokens, drafted levels and their distribution in a round with the tree."""
        curve = self.curve(tree.width, tree.min_path_probability)
        reached = shares_of(curve.accepted, curve.num_trees, tree.depth)
        # Beyond the counted levels, drafting continues as at the last one, and acceptance is
        # unknown: 0.
        last = (curve.num_trees, *curve.drafted)[-1]
        drafted = (1.0, *shares_of(curve.drafted, curve.num_trees, tree.depth, last))
        return ExpectedRound(
            tokens=1.0 + sum(reached),
            tokens_squared=1.0 + sum((2 * n + 1) * p for n, p in enumerate(reached, 1)),
            levels=sum(drafted[1:]),
            shares=(*(high - low for high, low in pairwise(drafted)), drafted[-1]),
        )


def shares_of(
    counts: Sequence[int], num_trees: int, depth: int, beyond: int = 0
) -> tuple[float, ...]:
    """Counts by level divided by the number of trees. beyond: the count for levels without one."""
    some = (*counts[:depth], *(beyond,) * (depth - len(counts)))
    return tuple(count / num_trees for count in some)


def merged(curves: Sequence[Curve]) -> Curve:
    """Merge one or more curves of different kinds of text, as independent samples."""
    first, num_trees = curves[0], sum(curve.num_trees for curve in curves)
    if len(curves) == 1:
        return first
    weighted = (curve.num_trees / num_trees * curve.margin for curve in curves)
    # Where some counted fewer levels, drafting went on as at their last one.
    deepest = max(len(curve.drafted) for curve in curves)
    drafted = (
        curve.drafted + (curve.num_trees, *curve.drafted)[-1:] * (deepest - len(curve.drafted))
        for curve in curves
    )
    return Curve(
        first.width,
        first.min_path_probability,
        "",
        sum(curve.num_answers for curve in curves),
        num_trees,
        added(drafted),
        added(curve.accepted for curve in curves),
        math.hypot(*weighted),
    )


def added(counts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Sums level by level; missing levels count as 0."""
    return tuple(sum(level) for level in zip_longest(*counts, fillvalue=0))


def margin_of_ratio(answers: Sequence[tuple[int, int]]) -> float:
    """Half of the 95 % confidence interval of tokens per round, from (tokens, rounds) of each
    answer: answers differ from each other much more than the rounds of one do."""
    rounds, count = sum(several for _, several in answers), len(answers)
    mean = sum(tokens for tokens, _ in answers) / rounds
    if count < 2:
        return mean
    off = sum((some - mean * several) ** 2 for some, several in answers)
    return TWO_SIDED_95 * math.sqrt(off * count / (count - 1)) / rounds
