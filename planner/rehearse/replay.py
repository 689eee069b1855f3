"""Acceptance of draft trees without verification: if the exact model's answer is known, a tree of
any width can be drafted by the substitutes and compared with it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from subspec.artifacts.acceptance import Acceptance, Curve
from subspec.planner.solve.problem import make_tree
from subspec.runtime.draft.beam import TokenTree, levels, root_only
from subspec.runtime.draft.drafter import SubstituteDrafter
from subspec.runtime.model.cache import Cache

WIDTHS = (1, 3, 8)
WIDEST_EVERY = 3  # starts: the widest trees take longest, and plans rarely have them
DEEPEST = 32  # levels; deeper ones are rarely reached, and estimated by the mean of these


@dataclass
class Counts:
    """Counts of the trees of one width on one kind of text."""

    tried: list[int] = field(default_factory=lambda: [0] * DEEPEST)
    accepted: list[int] = field(default_factory=lambda: [0] * DEEPEST)

    def add(self, num_accepted: int, num_tried: int) -> None:
        for level in range(num_tried):
            self.tried[level] += 1
            self.accepted[level] += level < num_accepted

    def curve(self, width: int, kind: str) -> Curve:
        deepest = sum(count > 0 for count in self.tried)
        return Curve(width, kind, tuple(self.tried[:deepest]), tuple(self.accepted[:deepest]))


Trees = dict[tuple[int, str], Counts]  # by width and kind of text


@torch.inference_mode()
def replay(
    drafter: SubstituteDrafter,
    cache: Cache,
    tokens: Sequence[int],
    starts: Sequence[int],
    kind: str,
    trees: Trees,
    until: float,
    widths: Sequence[int] = WIDTHS,
) -> None:
    """Count trees at the indices `starts` of `tokens` (prompt and answer), where rounds began,
    until the time is up, but at least at one. The last start comes first, as a tree overwrites the
    cache behind its start."""
    vocab_size = drafter.weights.spec.vocab_size
    for number, start in enumerate(reversed(starts)):
        cache.roll_back(start)
        for width in widths[:-1] if number % WIDEST_EVERY else widths:
            if width <= vocab_size:
                trees.setdefault((width, kind), Counts()).add(
                    *judge(drafter, cache, tokens[start:], width)
                )
        if time.perf_counter() > until:
            return


def judge(
    drafter: SubstituteDrafter, cache: Cache, known: Sequence[int], width: int
) -> tuple[int, int]:
    """(accepted, tried) levels of a tree. `known`: the root and the tokens that follow it. The tree
    is grown until no node of a level is accepted."""
    room = cache.padding_slot - cache.length
    tree = make_tree(width, min(DEEPEST, (room - 1) // width, len(known) - 1))
    num_rows = max(1, tree.num_nodes)
    start = root_only(torch.tensor(known[:1], device=cache.device), num_rows)
    node = accepted = 0
    for [grown] in levels([start], [tree.depth], tree, drafter.draft_pass([cache], num_rows)):
        child = child_of(node, known[accepted + 1], grown.tree, width)
        if child is None:
            return accepted, accepted + 1
        node, accepted = child, accepted + 1
    return accepted, accepted


def child_of(parent: int, token: int, tree: TokenTree, width: int) -> int | None:
    """The node of the last level that continues `parent` with `token`, if there is one."""
    last = range(tree.num_nodes - width, tree.num_nodes)
    parents, tokens = tree.parents.tolist(), tree.tokens.tolist()
    return next((n for n in last if (parents[n], tokens[n]) == (parent, token)), None)


def acceptance_of(trees: Trees) -> Acceptance | None:
    """Acceptance by the counts of trees; None if there are none."""
    curves = tuple(
        counts.curve(width, kind)
        for (width, kind), counts in sorted(trees.items())
        if counts.tried[0]
    )
    return Acceptance(curves, measured=True) if curves else None
