"""Acceptance of draft trees on a known text: the substitutes, or a draft model, draft along an
answer of the exact model, tree after tree as rounds would, and nothing is verified.

A whole tree is grown at the root of each round, and its levels are compared with the text. What
trees with a threshold would have done follows from the probabilities of the levels
(`rounds_within`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch

from subspec.artifacts.acceptance import Curve, margin_of_ratio
from subspec.artifacts.plan import DeviceKind
from subspec.planner.rehearse.trail import Trail
from subspec.planner.solve.problem import make_tree
from subspec.runtime.draft.beam import (
    DraftPass,
    PartialTree,
    TokenTree,
    levels,
    log_probability,
    root_only,
)
from subspec.runtime.model.cache import Cache

WIDTHS: dict[DeviceKind, tuple[int, ...]] = {
    "cpu": (1, 2, 4),
    "cuda": (1, 2, 4, 8),
}  # of the trees, by device
MAX_DEPTH = 24  # levels
THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.45)  # of Tree.min_path_probability


@dataclass(frozen=True)
class Answer:
    """Tokens of the exact model; a cache has committed all of them but the last."""

    tokens: list[int]  # of prompt and answer
    prompt_length: int
    ended: bool  # by the model, not by a limit


class Drafting(Protocol):
    """A drafter that grows trees at any position of a text."""

    def passes_after(
        self, caches: Sequence[Cache], lengths: Sequence[int], num_rows: int
    ) -> DraftPass: ...


@dataclass
class Grown:
    """A whole tree at token `start` of an answer; beyond its accepted levels it has those that a
    threshold would draft."""

    start: int
    levels: list[float] = field(default_factory=list)  # log of each one's path probability
    accepted: int = 0  # levels
    node: int | None = 0  # the last accepted one; None: the next level was not accepted


def walk(
    drafter: Drafting, trails: Sequence[Trail], answers: Sequence[Answer], width: int
) -> list[list[Grown]]:
    """The trees along each answer, which its cache holds; all answers advance together, one pass
    for a level of each. Of an answer that a limit cut off the last tree is left out: it might have
    gone on."""
    found: list[list[Grown]] = [[] for _ in answers]
    starts = [answer.prompt_length for answer in answers]
    while active := [n for n, answer in enumerate(answers) if starts[n] + 1 < len(answer.tokens)]:
        for n in active:
            trails[n].go_to(starts[n])
        grown = grow_along(
            drafter,
            [trails[n].cache for n in active],
            [answers[n] for n in active],
            [starts[n] for n in active],
            width,
        )
        for n, one in zip(active, grown, strict=True):
            starts[n] += one.accepted + 1
            if answers[n].ended or starts[n] < len(answers[n].tokens) or not found[n]:
                found[n].append(one)
    return found


@torch.inference_mode()
def grow_along(
    drafter: Drafting,
    caches: Sequence[Cache],
    answers: Sequence[Answer],
    starts: Sequence[int],
    width: int,
) -> list[Grown]:
    """A tree at the start in each answer, until a level is not accepted and no threshold would go
    on."""
    tree, device = make_tree(width, MAX_DEPTH), caches[0].device
    roots = [answer.tokens[start] for answer, start in zip(answers, starts, strict=True)]
    trees = [root_only(torch.tensor([root], device=device), tree.num_nodes) for root in roots]
    found = [Grown(start) for start in starts]

    def ends(growing: PartialTree) -> bool:
        one = found[growing.index]
        return one.node is None and one.levels[-1] < math.log(THRESHOLDS[1])

    passes = drafter.passes_after(caches, starts, tree.num_nodes)
    depths = [MAX_DEPTH] * len(trees)
    for level in levels(trees, depths, tree, passes, ends):
        for growing in level:
            one = found[growing.index]
            known = answers[growing.index].tokens[one.start :]
            one.levels.append(log_probability(growing.last))
            if one.node is not None and one.accepted + 1 < len(known):
                one.node = child_of(growing.tree, one.node, known[one.accepted + 1], width)
                one.accepted += one.node is not None
            else:  # nothing is accepted beyond the end
                one.node = None
    return found


def child_of(tree: TokenTree, parent: int, token: int, width: int) -> int | None:
    """The node of the last level that continues `parent` with `token`, if there is one."""
    last = range(tree.num_nodes - width, tree.num_nodes)
    parents, tokens = tree.parents.tolist(), tree.tokens.tolist()
    return next((n for n in last if (parents[n], tokens[n]) == (parent, token)), None)


def rounds_within(one: Grown, threshold: float) -> list[tuple[int, int]]:
    """(drafted levels, accepted levels) of the rounds that trees with a threshold need for what one
    whole tree gives: a tree that ends early is followed by another one.

    The later tree is taken to find the same words as probable as the whole one did; beyond the
    levels that are known each is as probable as the last.
    """
    steps = [b - a for a, b in pairwise((0.0, *one.levels))]
    found, first = list[tuple[int, int]](), 0
    least = math.log(threshold) if threshold else -math.inf
    while first <= one.accepted:
        drafted, total = 0, 0.0
        while drafted < MAX_DEPTH and not (drafted and total < least):
            total += steps[min(first + drafted, len(steps) - 1)]
            drafted += 1
        accepted = min(one.accepted - first, drafted)
        found.append((drafted, accepted))
        first += accepted + 1
    return found


def curves_of(trees: Sequence[Sequence[Grown]], width: int, kind: str) -> list[Curve]:
    """A curve for each threshold, of the trees of one width along answers of one kind."""
    found = []
    for threshold in THRESHOLDS:
        by_answer = [[r for one in some for r in rounds_within(one, threshold)] for some in trees]
        every = [one for rounds in by_answer for one in rounds]
        drafted = [sum(n >= level for n, _ in every) for level in range(1, MAX_DEPTH + 1)]
        accepted = [sum(n >= level for _, n in every) for level in range(1, MAX_DEPTH + 1)]
        margin = margin_of_ratio([(sum(a + 1 for _, a in some), len(some)) for some in by_answer])
        found.append(
            Curve(
                width,
                threshold,
                kind,
                len(trees),
                len(every),
                tuple(drafted),
                tuple(accepted),
                margin,
            )  # fmt: skip
        )
    return found
