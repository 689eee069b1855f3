"""Grows trees of which the substitutes check what another one proposes: several levels in one pass
where they agree, and level after level elsewhere, as `grow` of beam.py.

Anything cheaper than a pass of the substitutes may propose: the text itself (`looked_up`), a draft
model (draft_model.py), a draft head (head_drafter.py).
k = beam width, V = vocabulary
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from subspec.artifacts.footprint import MAX_PROPOSED
from subspec.artifacts.plan import Tree
from subspec.runtime.draft.beam import (
    DraftPass,
    Level,
    PartialTree,
    TokenTree,
    add_level,
    root_only,
    stops,
)
from subspec.runtime.draft.lookup import as_text, continuation

# Of the probability of a level, that its likeliest path has at least where the others are given up.
CLEAR = 0.8
# A proposed token costs a pass; one that the substitutes do not agree with was in vain. Chosen.
MIN_PROBABILITY = 0.4  # of a proposed chain

# Trees, and how many tokens each has room for -> what may follow the likeliest node of each one's
# last level, no more than that.
Propose = Callable[[Sequence[PartialTree], Sequence[int]], list[list[int]]]
# Texts by the index of their tree -> the likeliest next token of each, and its probability.
Continue = Callable[[Mapping[int, list[int]]], list[tuple[int, float]]]


def grow(
    roots: Sequence[Tensor],
    depths: Sequence[int],
    propose: Propose,
    tree: Tree,
    verify_width: int,
    draft_pass: DraftPass,
) -> list[TokenTree]:
    """A tree for each root int64 [1], as `grow` of beam.py. draft_pass: of the substitutes."""
    trees = [root_only(root, verify_width) for root in roots]
    growing = [
        PartialTree(index, one, Level.of_root(one.tokens.device)) for index, one in enumerate(trees)
    ]
    while growing := [
        one
        for one in growing
        if one.tree.num_levels < depths[one.index]
        and not (one.tree.num_levels and stops(tree, one.last))
    ]:
        left = [depths[one.index] - one.tree.num_levels - 1 for one in growing]
        guesses = propose(growing, [min(count, MAX_PROPOSED) for count in left])
        asked = [with_guess(*some, tree.width) for some in zip(growing, guesses, strict=True)]
        logits = draft_pass(asked).split([len(one.last.nodes) for one in asked])
        growing = [
            deepened(one, tokens, tree, some)
            for one, tokens, some in zip(growing, guesses, logits, strict=True)
        ]
        for one in growing:
            trees[one.index] = one.tree
    for finished in trees:
        pad(finished)
    return trees


def pad(tree: TokenTree) -> None:
    """Makes the rows beyond the nodes copies of the root again, where guesses were."""
    tree.tokens[tree.num_nodes :] = tree.tokens[0]
    tree.parents[tree.num_nodes :].zero_()
    tree.depths[tree.num_nodes :].zero_()
    tree.ancestors[tree.num_nodes :].zero_()
    tree.ancestors[tree.num_nodes :, 0].fill_(True)


def looked_up(texts: Sequence[str]) -> Propose:
    """Proposes what followed where the same stood before. texts: up to the root of each tree, by
    its index; one character per token."""

    def propose(growing: Sequence[PartialTree], rooms: Sequence[int]) -> list[list[int]]:
        return [
            continuation(texts[one.index] + as_text(likeliest_path(one)), room)
            for one, room in zip(growing, rooms, strict=True)
        ]

    return propose


def probable_chains(
    texts: dict[int, list[int]], rooms: Mapping[int, int], continued: Continue
) -> dict[int, list[int]]:
    """What may follow each text, by the index of its tree: token after token as long as the chain
    is probable, no more than there is room for. The texts get them too."""
    lengths = {index: len(text) for index, text in texts.items()}
    probable = dict.fromkeys(texts, 1.0)
    active = [index for index in texts if rooms[index] > 0]
    while active:
        likeliest = continued({index: texts[index] for index in active})
        for index, (token, probability) in zip(active, likeliest, strict=True):
            probable[index] *= probability
            if probable[index] >= MIN_PROBABILITY:
                texts[index].append(token)
        active = [
            index
            for index in active
            if probable[index] >= MIN_PROBABILITY
            and len(texts[index]) - lengths[index] < rooms[index]
        ]
    return {index: text[lengths[index] :] for index, text in texts.items()}


def likeliest(logits: Tensor) -> list[tuple[int, float]]:
    """The token with the greatest of the logits [rows, V] of each row, and its probability."""
    wide = logits.float()
    best, ids = wide.max(-1)
    probabilities = (best - wide.logsumexp(-1)).exp()
    return list(zip(ids.tolist(), probabilities.tolist(), strict=True))


def likeliest_path(one: PartialTree) -> list[int]:
    """The tokens down to the first node of the last level, without the root."""
    path: list[int] = one.tree.tokens[one.tree.ancestors[one.last.nodes[0]]].tolist()[1:]
    return path


def with_guess(one: PartialTree, tokens: Sequence[int], width: int) -> PartialTree:
    """The tree with the tokens as a chain below its last level's first node, each where the first
    node of its level will be; `last.nodes` are those of the level and then of the chain."""
    if not tokens:
        return one
    tree, device = one.tree, one.tree.tokens.device
    chain = torch.arange(len(tokens), device=device) * width + tree.num_nodes
    above = torch.cat((one.last.nodes[:1], chain[:-1]))
    tree.tokens[chain] = torch.tensor(tokens, device=device)
    tree.parents[chain] = above
    tree.depths[chain] = torch.arange(1, len(tokens) + 1, device=device) + tree.num_levels
    lines = tree.ancestors[one.last.nodes[0]].repeat(len(tokens), 1)
    lines[:, chain] = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=device).tril()
    tree.ancestors[chain] = lines
    asked = replace(tree, num_nodes=tree.num_nodes + width * len(tokens))
    nodes = torch.cat((one.last.nodes, chain))
    return PartialTree(one.index, asked, Level(nodes, one.last.scores))


def deepened(one: PartialTree, tokens: Sequence[int], tree: Tree, logits: Tensor) -> PartialTree:
    """The tree with the levels that the logits give: of the last level, and then of each proposed
    token that is clearly the likeliest."""
    num_nodes = len(one.last.nodes)
    above = one.last.nodes[0]
    one = with_level(one, one.last, tree, logits[:num_nodes])
    for token, row in zip(tokens, logits[num_nodes:], strict=True):
        first = one.last.nodes[0]
        agreed = (one.tree.tokens[first] == token) & (one.tree.parents[first] == above)
        if not agreed or one.last.scores[0].exp() < CLEAR * one.last.scores.exp().sum():
            break
        above = first
        one = with_level(one, Level(first[None], one.last.scores[:1]), tree, row[None])
        one = replace(one, tree=replace(one.tree, num_proposed=one.tree.num_proposed + 1))
    return one


def with_level(one: PartialTree, last: Level, tree: Tree, logits: Tensor) -> PartialTree:
    first = one.tree.num_nodes
    children = torch.arange(first, first + tree.width, device=one.tree.tokens.device)
    grown = replace(one.tree, num_nodes=first + tree.width, num_levels=one.tree.num_levels + 1)
    return PartialTree(one.index, grown, add_level(one.tree, last, children, tree, logits))
