"""Grows candidate tokens with the substitutes: a beam over one tree, on the device.

W = verify width (rows of the tree's tensors), k = beam width, V = vocabulary.
Node 0 is the root, the last token that was emitted. Nodes of level d are 1 + k (d - 1) .. k d.
arXiv 2509.18344 §4: the k best continuations over all parents form the next level.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.artifacts.plan import Tree

# A greedy target accepts a draft's favourite of probability p more often than p. The probability at
# this temperature is close to how often (published logs: p 0.3-0.5 accepted 68 %, 0.5-0.7 85 %,
# 0.7-0.9 97 %).
STOP_TEMPERATURE = 0.5

DraftPass = Callable[["TokenTree", Tensor, int], Tensor]


@dataclass(frozen=True)
class TokenTree:
    """Rows beyond the nodes are padding: copies of the root that nobody reads."""

    tokens: Tensor  # int64 [W]
    parents: Tensor  # int64 [W]; the root's is itself
    ancestors: Tensor  # bool [W, W]: row i marks node i and everything above it
    depths: tuple[int, ...]  # of each of the W rows
    num_nodes: int


def root_only(root: Tensor, verify_width: int) -> TokenTree:
    """A tree without a draft: what plain decoding verifies. root int64 [1]."""
    ancestors = torch.zeros(verify_width, verify_width, dtype=torch.bool, device=root.device)
    ancestors[:, 0] = True
    return TokenTree(
        tokens=root.repeat(verify_width),
        parents=torch.zeros(verify_width, dtype=torch.int64, device=root.device),
        ancestors=ancestors,
        depths=(0,) * verify_width,
        num_nodes=1,
    )


def grow(root: Tensor, tree: Tree, verify_width: int, draft_pass: DraftPass) -> TokenTree:
    """The tree with all its levels, or fewer if `tree.stop_below` says so."""
    grown = root_only(root, verify_width)
    for deeper in levels(root, tree, verify_width, draft_pass):
        grown = deeper
    return grown


def levels(
    root: Tensor, tree: Tree, verify_width: int, draft_pass: DraftPass
) -> Iterator[TokenTree]:
    """The tree after each of its levels; all share their tensors.

    `draft_pass(token tree, nodes, depth)` -> logits [len(nodes), V] of the substitutes.
    Ends early when the best path's chance of acceptance falls below `tree.stop_below`: one number
    is read back per level. Plans leave it at 0 (docs/LOG.md), and then nothing is.
    """
    grown = root_only(root, verify_width)
    tokens, parents, ancestors = grown.tokens, grown.parents, grown.ancestors
    frontier = torch.zeros(1, dtype=torch.int64, device=root.device)
    scores = torch.zeros(1, device=root.device)  # log of the sharpened path probability
    likely = torch.zeros(1, device=root.device)  # log of the chance that the path is accepted
    for depth in range(1, tree.depth + 1):
        logits = draft_pass(grown, frontier, depth - 1).float()
        best, ids = logits.topk(min(tree.width, logits.shape[1]), dim=-1)  # [frontier, k] each
        sharp = log_probabilities(best, logits, tree.temperature)
        scores, picked = (scores[:, None] + sharp).flatten().topk(tree.width)
        parent = frontier[picked // best.shape[1]]
        frontier = torch.arange(tree.width, device=root.device) + 1 + tree.width * (depth - 1)
        tokens[frontier] = ids.flatten()[picked]
        parents[frontier] = parent
        ancestors[frontier] = ancestors[parent]
        ancestors[frontier, frontier] = True
        level_depths = (depth,) * tree.width
        first = grown.num_nodes
        depths = grown.depths[:first] + level_depths + grown.depths[first + tree.width :]
        grown = TokenTree(tokens, parents, ancestors, depths, first + tree.width)
        yield grown
        if tree.stop_below > 0:
            chance = log_probabilities(best, logits, STOP_TEMPERATURE)
            likely = (likely[:, None] + chance).flatten()[picked]
            if likely.max().exp().item() < tree.stop_below:
                return


def log_probabilities(some: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) of `some` of the logits: [rows, k] of [rows, V]."""
    return some / temperature - (logits / temperature).logsumexp(-1, keepdim=True)
