"""Grows candidate tokens: a beam over a tree for each sequence, on the device.

W = rows of a tree's tensors: the plan's widest while it grows, fewer where fewer are verified;
k = beam width, V = vocabulary.
Node 0 is the root, the last token that was emitted. Nodes of level d are 1 + k (d - 1) .. k d.
As in arXiv 2509.18344, section 4, the k best continuations over all parents form the next level.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subspec.artifacts.plan import Tree


@dataclass(frozen=True)
class TokenTree:
    """A tree of candidate tokens. Rows beyond the nodes are padding: unread copies of the root."""

    tokens: Tensor  # int64 [W]
    parents: Tensor  # int64 [W]; the root's is itself
    ancestors: Tensor  # bool [W, W]: row i marks node i and everything above it
    depths: Tensor  # int64 [W]; the root's is 0
    num_nodes: int
    num_levels: int = 0
    num_proposed: int = 0  # levels that took no pass of the substitutes


@dataclass(frozen=True)
class Level:
    """The last level of a tree, from which the next one grows."""

    nodes: Tensor  # int64 [k]
    scores: Tensor  # f32 [k]: log of the sharpened path probability

    @staticmethod
    def of_root(device: torch.device) -> "Level":
        zero = torch.zeros(1, device=device)
        return Level(zero.long(), zero)


@dataclass(frozen=True)
class PartialTree:
    """A tree and its last level; `index` is that of its sequence."""

    index: int
    tree: TokenTree
    last: Level


# The draft model's logits for the last level of each tree: f32 [sum of their nodes, V].
DraftPass = Callable[[Sequence[PartialTree]], Tensor]


def root_only(root: Tensor, verify_width: int) -> TokenTree:
    """Return a tree of the root only, int64 [1]: what plain decoding verifies."""
    ancestors = torch.zeros(verify_width, verify_width, dtype=torch.bool, device=root.device)
    ancestors[:, 0].fill_(True)
    return TokenTree(
        tokens=root.repeat(verify_width),
        parents=torch.zeros(verify_width, dtype=torch.int64, device=root.device),
        ancestors=ancestors,
        depths=torch.zeros(verify_width, dtype=torch.int64, device=root.device),
        num_nodes=1,
    )


def narrowed(tree: TokenTree, num_rows: int) -> TokenTree:
    """Return the tree in `num_rows` rows, no fewer than its nodes."""
    return replace(
        tree,
        tokens=tree.tokens[:num_rows],
        parents=tree.parents[:num_rows],
        ancestors=tree.ancestors[:num_rows, :num_rows],
        depths=tree.depths[:num_rows],
    )


def grow(
    roots: Sequence[Tensor],
    depths: Sequence[int],
    tree: Tree,
    verify_width: int,
    draft_pass: DraftPass,
) -> list[TokenTree]:
    """Grow a tree from each root int64 [1], as deep as its entry of `depths`, or less deep where
    `tree.min_path_probability` stops it. One pass drafts a level of all trees."""
    trees = [root_only(root, verify_width) for root in roots]
    for level in levels(trees, depths, tree, draft_pass, lambda draft: stops(tree, draft.last)):
        for draft in level:
            trees[draft.index] = draft.tree
    return trees


def levels(
    trees: Sequence[TokenTree],
    depths: Sequence[int],
    tree: Tree,
    draft_pass: DraftPass,
    ends: Callable[[PartialTree], bool],
) -> Iterator[list[PartialTree]]:
    """Yield the trees that grew, after each level; all states of a tree share its tensors. ends:
    called before each level but the first."""
    growing = [
        PartialTree(index, root, Level.of_root(root.tokens.device))
        for index, root in enumerate(trees)
    ]
    for level in range(max(depths, default=0)):
        growing = [
            draft
            for draft in growing
            if level < depths[draft.index] and not (level and ends(draft))
        ]
        if not growing:
            return
        logits = draft_pass(growing)
        sizes = [len(draft.last.nodes) for draft in growing]
        grown = []
        for draft, rows in zip(growing, logits.split(sizes), strict=True):
            first, device = draft.tree.num_nodes, draft.tree.tokens.device
            children = torch.arange(first, first + tree.width, device=device)
            last = add_level(draft.tree, draft.last, children, tree, rows)
            deeper = replace(
                draft.tree, num_nodes=first + tree.width, num_levels=draft.tree.num_levels + 1
            )
            grown.append(PartialTree(draft.index, deeper, last))
        growing = grown
        yield growing


def stops(tree: Tree, last: Level) -> bool:
    """Return True if the level's total path probability is below the tree's threshold."""
    least = tree.min_path_probability
    return least > 0 and log_probability(last) < math.log(least)


def log_probability(level: Level) -> float:
    """Log of the total path probability of the level, sharpened as for ranking; synchronizes."""
    return level.scores.logsumexp(0).item()


def add_level(grown: TokenTree, last: Level, children: Tensor, tree: Tree, logits: Tensor) -> Level:
    """Write the k best continuations of the last level into the rows `children`, int64 [k], and
    return them as a level. logits [nodes of the last level, V].

    Static shapes, nothing is read back, no number comes from the host: a graph can capture it.
    """
    logits = logits.float()
    best, ids = logits.topk(min(tree.width, logits.shape[1]), dim=-1)  # [last level, k] each
    sharp = log_probabilities(best, logits, tree.temperature)
    scores, picked = (last.scores[:, None] + sharp).flatten().topk(tree.width)
    parents = last.nodes[picked // best.shape[1]]
    grown.tokens[children] = ids.flatten()[picked]
    grown.parents[children] = parents
    grown.depths[children] = grown.depths[parents] + 1
    grown.ancestors[children] = grown.ancestors[parents].scatter(1, children[:, None], True)
    return Level(children, scores)


def log_probabilities(selected: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) of the `selected` logits: [rows, k] of [rows, V]."""
    return selected / temperature - (logits / temperature).logsumexp(-1, keepdim=True)
