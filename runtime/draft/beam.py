"""Grows candidate tokens with the substitutes: a beam over one tree, on the device.

W = verify width (rows of the tree's tensors), k = beam width, V = vocabulary.
Node 0 is the root, the last token that was emitted. Nodes of level d are 1 + k (d - 1) .. k d.
arXiv 2509.18344 §4: the k best continuations over all parents form the next level.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subspec.artifacts.plan import Tree

DraftPass = Callable[["TokenTree", Tensor], Tensor]


@dataclass(frozen=True)
class TokenTree:
    """Rows beyond the nodes are padding: copies of the root that nobody reads."""

    tokens: Tensor  # int64 [W]
    parents: Tensor  # int64 [W]; the root's is itself
    ancestors: Tensor  # bool [W, W]: row i marks node i and everything above it
    depths: Tensor  # int64 [W]; the root's is 0
    num_nodes: int


def root_only(root: Tensor, verify_width: int) -> TokenTree:
    """A tree without a draft: what plain decoding verifies. root int64 [1]."""
    ancestors = torch.zeros(verify_width, verify_width, dtype=torch.bool, device=root.device)
    ancestors[:, 0].fill_(True)
    return TokenTree(
        tokens=root.repeat(verify_width),
        parents=torch.zeros(verify_width, dtype=torch.int64, device=root.device),
        ancestors=ancestors,
        depths=torch.zeros(verify_width, dtype=torch.int64, device=root.device),
        num_nodes=1,
    )


def grow(root: Tensor, tree: Tree, verify_width: int, draft_pass: DraftPass) -> TokenTree:
    """The tree with all its levels, or fewer if `tree.min_path_probability` says so."""
    grown = root_only(root, verify_width)
    for deeper, _ in levels(root, tree, verify_width, draft_pass):
        grown = deeper
    return grown


def levels(
    root: Tensor, tree: Tree, verify_width: int, draft_pass: DraftPass
) -> Iterator[tuple[TokenTree, "Level"]]:
    """The tree after each of its levels, and that level; all trees share their tensors.

    `draft_pass(token tree, nodes)` -> logits [len(nodes), V] of the substitutes.
    Ends early where `tree.min_path_probability` says so: one number is read back per level then.
    """
    grown = root_only(root, verify_width)
    last = Level.of_root(root.device)
    for level in range(tree.depth):
        if level and stops(tree, last):
            return
        children = torch.arange(tree.width, device=root.device) + grown.num_nodes
        last = add_level(grown, last, children, tree, draft_pass)
        grown = replace(grown, num_nodes=grown.num_nodes + tree.width)
        yield grown, last


@dataclass(frozen=True)
class Level:
    """The last level of a tree, from which the next one grows."""

    nodes: Tensor  # int64 [k]
    scores: Tensor  # f32 [k]: log of the sharpened path probability

    @staticmethod
    def of_root(device: torch.device) -> "Level":
        zero = torch.zeros(1, device=device)
        return Level(zero.long(), zero)


def stops(tree: Tree, last: Level) -> bool:
    """Whether the draft has lost its way."""
    return tree.min_path_probability > 0 and probability(last) < tree.min_path_probability


def probability(level: Level) -> float:
    """Of its paths, all together, sharpened as their ranking is: the less, the less likely is one
    of them accepted. Reads a number back."""
    return level.scores.logsumexp(0).exp().item()


def add_level(
    grown: TokenTree, last: Level, children: Tensor, tree: Tree, draft_pass: DraftPass
) -> Level:
    """Writes the k best continuations of the last level into the rows `children`, int64 [k].

    Static shapes, nothing read back and no number of the host's: a captured graph can do it.
    """
    logits = draft_pass(grown, last.nodes).float()
    best, ids = logits.topk(min(tree.width, logits.shape[1]), dim=-1)  # [last level, k] each
    sharp = log_probabilities(best, logits, tree.temperature)
    scores, picked = (last.scores[:, None] + sharp).flatten().topk(tree.width)
    parents = last.nodes[picked // best.shape[1]]
    grown.tokens[children] = ids.flatten()[picked]
    grown.parents[children] = parents
    grown.depths[children] = grown.depths[parents] + 1
    grown.ancestors[children] = grown.ancestors[parents].scatter(1, children[:, None], True)
    return Level(children, scores)


def log_probabilities(some: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) of `some` of the logits: [rows, k] of [rows, V]."""
    return some / temperature - (logits / temperature).logsumexp(-1, keepdim=True)
