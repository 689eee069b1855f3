"""Verification: which candidates the exact model accepts, as pure functions of its choices.

W = rows of the tree, D = its levels. Each node's choice is the target's own next token there
(argmax, or its sample), so every emitted token is the target's, whatever the draft proposed. A
child is accepted if it is that token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.runtime.draft.beam import TokenTree


@dataclass(frozen=True)
class Verification:
    path: Tensor  # int64 [D + 1]: the root and the accepted nodes, in order; then padding
    packed_tokens: Tensor  # int64 [D + 2]: accepted count, then the new tokens; then padding

    def tokens(self) -> list[int]:
        """Return the accepted tokens and the target's own next one: the round's one transfer to
        host."""
        count, *tokens = self.packed_tokens.tolist()
        return tokens[: count + 1]


def accept(tree: TokenTree, choices: Tensor, depth: int) -> Verification:
    """Return the accepted path and its tokens. choices int64 [W]: the target's next token at each
    row. Static shapes, nothing is read back."""
    device = choices.device
    nodes = torch.arange(len(choices), device=device)
    mismatched = (tree.tokens != choices[tree.parents]) | (nodes >= tree.num_nodes)
    mismatched[0].fill_(False)
    accepted_nodes = ~(tree.ancestors & mismatched).any(1) & (nodes < tree.num_nodes)
    # Siblings differ in their token, so the accepted nodes form one path, one node per depth.
    depths = tree.depths.clamp(max=depth + 1)
    path = torch.zeros(depth + 2, dtype=torch.int64, device=device)
    path.scatter_(0, depths.masked_fill(~accepted_nodes, depth + 1), nodes)
    path = path[: depth + 1]
    # Without the root; [1], as one number would be read back
    accepted = accepted_nodes.sum()[None] - 1
    steps = torch.arange(depth + 1, device=device)
    last = path[accepted]
    following = tree.tokens[path.roll(-1)]
    new_tokens = torch.where(steps < accepted, following, choices[last])
    return Verification(path, torch.cat((accepted, new_tokens)))


def accept_sequentially(
    tree: TokenTree, choose: Callable[[int, int], int | None], depth: int
) -> Verification:
    """Plain twin of `accept` for slow choices: walk from the root and call `choose(node, its
    depth)` on the host for nodes of the path only. The walk ends early if `choose` returns None,
    which is not allowed at the root."""
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    path, new_tokens = list[int](), list[int]()
    node: int | None = 0
    while node is not None and (token := choose(node, len(path))) is not None:
        path.append(node)
        new_tokens.append(token)
        matching_children = (
            child
            for child in range(node + 1, tree.num_nodes)
            if parents[child] == node and tokens[child] == token
        )
        node = next(matching_children, None)
    padded = path + [0] * (depth + 1 - len(path))
    packed = torch.tensor([len(path) - 1, *new_tokens])
    return Verification(torch.tensor(padded, device=tree.tokens.device), packed)
