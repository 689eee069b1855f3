"""Which candidates the exact model accepts; pure functions of its choices.

W = rows of the tree, D = depth of the plan's tree. Each node's choice is the target's own next
token there (argmax, or its sample), so whatever the draft proposed, what is emitted is the
target's. A child is accepted if it is that token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.runtime.draft import TokenTree


@dataclass(frozen=True)
class Verdict:
    path: Tensor  # int64 [D + 1]: the root and the accepted nodes, in order; then anything
    result: Tensor  # int64 [D + 2]: accepted count, then the emitted tokens; then anything

    def emitted(self) -> list[int]:
        """The accepted tokens and the target's own next one: the round's one transfer to host."""
        count, *tokens = self.result.tolist()
        return tokens[: count + 1]


def accept(tree: TokenTree, choices: Tensor, depth: int) -> Verdict:
    """choices int64 [W]: the target's next token at each row. Static shapes, nothing read back."""
    device = choices.device
    nodes = torch.arange(len(choices), device=device)
    wrong = (tree.tokens != choices[tree.parents]) | (nodes >= tree.num_nodes)
    wrong[0] = False
    alive = ~(tree.ancestors & wrong).any(1) & (nodes < tree.num_nodes)
    # Siblings differ in their token, so the alive nodes form one path, one node per depth.
    depths = torch.tensor(tree.depths, device=device).clamp_(max=depth + 1)
    path = torch.zeros(depth + 2, dtype=torch.int64, device=device)
    path.scatter_(0, torch.where(alive, depths, depth + 1), nodes)
    path = path[: depth + 1]
    accepted = alive.sum() - 1  # without the root
    steps = torch.arange(depth + 1, device=device)
    last = path[accepted]
    following = tree.tokens[path.roll(-1)]
    emitted = torch.where(steps < accepted, following, choices[last])
    return Verdict(path, torch.cat((accepted[None], emitted)))


def accept_plainly(tree: TokenTree, choices: list[int]) -> list[int]:
    """The plain twin: a walk from the root -> emitted tokens."""
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    node, emitted = 0, [choices[0]]
    while True:
        children = [i for i in range(1, tree.num_nodes) if parents[i] == node]
        match = [i for i in children if tokens[i] == emitted[-1]]
        if not match:
            return emitted
        node = match[0]
        emitted.append(choices[node])
