"""Lossy acceptance, on request only: a drafted token that is not the exact model's own is kept if
the exact model agrees with what follows it, and its probabilities let the token pass.

The published rule (docs/commands.md): of the paths that are acceptable the longest one is kept. A
child that is not its parent's choice is acceptable if at least `window` nodes below it, one below
the other, are each the choice of the one above, and if the parent's probabilities let it pass:
their entropy is below `threshold` of the largest possible one, or the child has at least
`threshold` of them. Below an end token there are no nodes, whatever was drafted there: the answer
ends at it.
W = rows of the tree, V = vocabulary
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from subspec.artifacts.common.errors import Exit, SubspecError

if TYPE_CHECKING:  # command lines have the rule's defaults from here, without torch
    from torch import Tensor

    from subspec.runtime.draft.beam import TokenTree

Verify = Literal["exact", "lossy"]
ThresholdMethod = Literal["entropy", "prob"]


@dataclass(frozen=True)
class Lossy:
    threshold_method: ThresholdMethod = "entropy"
    threshold: float = 0.3
    window: int = 6  # nodes

    def __str__(self) -> str:
        return f"lossy ({self.threshold_method} {self.threshold:g}, window {self.window})"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            message = f"threshold is {self.threshold}, expected 0 to 1"
            raise SubspecError(Exit.USAGE, message)
        if self.window < 0:
            raise SubspecError(Exit.USAGE, f"window is {self.window}, expected 0 or more")


@dataclass(frozen=True)
class LossyVerification:
    path: list[int]  # the root and the accepted nodes
    tokens: list[int]  # their tokens, and the exact model's own next one
    lossy: list[int]  # places in `tokens` of tokens that are not the exact model's choice


def verification_json(rule: Lossy | None) -> dict[str, Any]:
    """Fields of a JSON object that say how an answer was verified."""
    if rule is None:
        return {"verify": "exact", "lossy": None}
    return {"verify": "lossy", "lossy": asdict(rule)}


def accept(
    tree: "TokenTree",
    choices: Sequence[int],
    logits: "Tensor",
    rule: Lossy,
    end_tokens: frozenset[int] = frozenset(),
) -> LossyVerification:
    """Return the longest acceptable path. choices: the exact model's token at each node; logits [W,
    V]. Among paths of one length, one whose first token is the exact model's own wins, or else the
    likelier one, level by level."""
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    children: list[list[int]] = [[] for _ in range(tree.num_nodes)]
    for node in range(1, tree.num_nodes):
        if tokens[parents[node]] not in end_tokens:
            children[parents[node]].append(node)
    passes = gate(tokens, logits, rule)
    agreed = [0] * tree.num_nodes  # chain of nodes below each that are choices
    length, following = [0] * tree.num_nodes, list[int | None]([None] * tree.num_nodes)
    for node in reversed(range(tree.num_nodes)):  # children first
        best = (0, False, 0.0)
        for child in children[node]:
            own = tokens[child] == choices[node]
            if own:
                agreed[node] = 1 + agreed[child]
            likely = 1.0 if own else passes(node, child) if agreed[child] >= rule.window else None
            if likely is not None and (found := (1 + length[child], own, likely)) > best:
                best, following[node] = found, child
        length[node] = best[0]
    path, kept = [0], list[int]()
    while (below := following[path[-1]]) is not None:
        if tokens[below] != choices[path[-1]]:
            kept.append(len(path) - 1)
        path.append(below)
    new_tokens = [*(tokens[node] for node in path[1:]), choices[path[-1]]]
    return LossyVerification(path, new_tokens, kept)


def gate(
    tokens: Sequence[int], logits: "Tensor", rule: Lossy
) -> Callable[[int, int], float | None]:
    """Return a function: node, child -> the child's probability by the exact model, before
    temperature and filters, or None if it does not pass. Only rows that are needed are computed,
    each once."""

    @cache
    def probabilities(node: int) -> "Tensor":
        return logits[node].double().log_softmax(-1).exp()

    @cache
    def unsure(node: int) -> float:
        every = probabilities(node)
        return -float(every.xlogy(every).sum()) / math.log(len(every))

    def passes(node: int, child: int) -> float | None:
        probability = float(probabilities(node)[tokens[child]])
        if rule.threshold_method == "prob":
            return probability if probability >= rule.threshold else None
        return probability if unsure(node) < rule.threshold else None

    return passes
