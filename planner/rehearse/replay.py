"""How a draft's trees are accepted, told without verifying any: where the exact model's own answer
is known, a tree of any width can be grown over it and judged with the substitutes alone.
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
WIDEST_EVERY = 3  # starts: the widest takes longest, and a plan has it least
DEEPEST = 32  # levels; deeper ones are rarely reached, and expected to be as the mean of these


@dataclass
class Counts:
    """Of the trees of one width on one kind of text."""

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
    """Judges trees where rounds began, at the indices `starts` of prompt and answer, one place at
    least, the last first: what a tree leaves in the cache lies behind the starts still to come."""
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
    """Levels accepted, and levels known to be accepted or not, of a tree over `known`, its root and
    what follows. It is grown until it is rejected."""
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
    """None: there is none to be judged."""
    curves = tuple(
        counts.curve(width, kind)
        for (width, kind), counts in sorted(trees.items())
        if counts.tried[0]
    )
    return Acceptance(curves, measured=True) if curves else None
