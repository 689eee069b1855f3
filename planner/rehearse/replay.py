"""How a draft's trees are accepted, told without verifying any: where the exact model's own answer
is known, a tree of any width can be grown over it and judged with the substitutes alone.

A tree is grown as deep as any plan would draft it. What it would have done had it ended early
follows from how probable it found its own levels.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from subspec.artifacts.acceptance import Acceptance, Curve, Stopping
from subspec.planner.solve.search import make_tree
from subspec.runtime.decode import draft_pass
from subspec.runtime.draft.beam import TokenTree, levels, probability
from subspec.runtime.session import Session

WIDTHS = (1, 3, 8)
WIDEST_EVERY = 3  # starts
DEEPEST = 32
STOPS = (0.1, 0.2, 0.3)  # what Tree.min_path_probability may be


@dataclass(frozen=True)
class TreeOutcome:
    """A tree over text that is known."""

    accepted: int  # levels
    tried: int  # levels known to be accepted or not
    probabilities: tuple[
        float, ...
    ]  # of each level that was drafted, those behind a rejected one too


Trees = dict[tuple[int, str], list[TreeOutcome]]  # by width and kind of text


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


def replay(
    session: Session,
    tokens: Sequence[int],
    starts: Sequence[int],
    kind: str,
    trees: Trees,
    until: float,
) -> None:
    """Judges trees where rounds began, at the indices `starts` of prompt and answer, one place at
    least, the last first: what a tree leaves in the cache lies behind the starts still to come."""
    vocab_size = session.artifact.spec.vocab_size
    for number, start in enumerate(reversed(starts)):
        session.model.cache.roll_back(start)
        # The widest takes longest, and a plan has it least.
        for width in WIDTHS[:-1] if number % WIDEST_EVERY else WIDTHS:
            if width <= vocab_size:
                judged = judge(session, tokens[start:], width)
                trees.setdefault((width, kind), []).append(judged)
        if time.perf_counter() > until:
            return


def judge(session: Session, known: Sequence[int], width: int) -> TreeOutcome:
    """A tree over `known`, its root and what follows. It is grown on where it was rejected, as a
    draft that does not know is, until every plan would end it."""
    cache = session.model.cache
    room = cache.padding_slot - cache.length
    tree = make_tree(width, min(DEEPEST, (room - 1) // width))
    root = torch.tensor(known[:1], device=session.device)
    probabilities, alive, accepted, rejected = list[float](), 0, 0, False
    if len(known) < 2 or tree.depth < 1:
        return TreeOutcome(0, 0, ())
    for grown, level in levels(root, tree, tree.num_nodes, draft_pass(session.model)):
        probabilities.append(probability(level))
        if not rejected:
            child = child_of(alive, known[accepted + 1], grown, width)
            rejected = child is None
            if child is not None:
                alive, accepted = child, accepted + 1
        if accepted + 1 == len(known) or (rejected and probabilities[-1] < STOPS[0]):
            break
    return TreeOutcome(accepted, accepted + rejected, tuple(probabilities))


def child_of(parent: int, token: int, tree: TokenTree, width: int) -> int | None:
    """The node of the last level that continues `parent` with `token`, if there is one."""
    last = range(tree.num_nodes - width, tree.num_nodes)
    parents, tokens = tree.parents.tolist(), tree.tokens.tolist()
    return next((n for n in last if (parents[n], tokens[n]) == (parent, token)), None)


def acceptance_of(trees: Trees) -> Acceptance | None:
    """None: there is none to be judged."""
    whole = tuple(curves_of(trees, lambda one: (one.accepted, one.tried)))
    if not whole:
        return None
    stopping = tuple(
        Stopping(
            min_path_probability,
            tuple(curves_of(trees, partial(accepted_under, min_path_probability))),
            tuple(curves_of(trees, partial(followed_under, min_path_probability))),
        )
        for min_path_probability in STOPS
    )
    return Acceptance(whole, True, stopping)


def curves_of(trees: Trees, count: Callable[[TreeOutcome], tuple[int, int]]) -> Iterator[Curve]:
    """Per width and kind; count: (levels accepted, levels tried) of a tree."""
    for (width, kind), judged in sorted(trees.items()):
        counts = Counts()
        for one in judged:
            counts.add(*count(one))
        if any(counts.tried):
            yield counts.curve(width, kind)


def last_level(min_path_probability: float, judged: TreeOutcome) -> int | None:
    """Where the tree would have ended; None: it would have gone on."""
    below = (level for level, p in enumerate(judged.probabilities, 1) if p < min_path_probability)
    return next(below, None)


def accepted_under(min_path_probability: float, judged: TreeOutcome) -> tuple[int, int]:
    last = last_level(min_path_probability, judged)
    if last is None or judged.accepted < last:
        return judged.accepted, judged.tried
    return last, min(last + 1, judged.tried)


def followed_under(min_path_probability: float, judged: TreeOutcome) -> tuple[int, int]:
    last = last_level(min_path_probability, judged)
    if last is None:
        return len(judged.probabilities), len(judged.probabilities)
    return last - 1, last
