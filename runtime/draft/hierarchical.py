"""Grows trees of which the substitutes check what another drafter proposes: several levels in one
pass where they agree, and level by level elsewhere, as `grow` of beam.py.

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

# Share of a level's probability from which its likeliest path goes on without the others.
CLEAR = 0.8
# A proposed token costs a pass, which is wasted if the substitutes disagree. Chosen.
MIN_PROBABILITY = 0.4  # of a proposed chain

# Trees, and the number of tokens that each has room for -> at most so many tokens that may follow
# the likeliest node of its last level.
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
    """Grow a tree from each root int64 [1], as `grow` of beam.py. draft_pass: of the
    substitutes."""
    trees = [root_only(root, verify_width) for root in roots]
    growing = [
        PartialTree(index, root, Level.of_root(root.tokens.device))
        for index, root in enumerate(trees)
    ]
    while growing := [
        draft
        for draft in growing
        if draft.tree.num_levels < depths[draft.index]
        and not (draft.tree.num_levels and stops(tree, draft.last))
    ]:
        left = [depths[draft.index] - draft.tree.num_levels - 1 for draft in growing]
        guesses = propose(growing, [min(count, MAX_PROPOSED) for count in left])
        pairs = zip(growing, guesses, strict=True)
        guessed = [with_guess(draft, tokens, tree.width) for draft, tokens in pairs]
        logits = draft_pass(guessed).split([len(draft.last.nodes) for draft in guessed])
        growing = [
            deepened(draft, tokens, tree, rows)
            for draft, tokens, rows in zip(growing, guesses, logits, strict=True)
        ]
        for draft in growing:
            trees[draft.index] = draft.tree
    for finished in trees:
        pad(finished)
    return trees


def pad(tree: TokenTree) -> None:
    """Reset the rows beyond the nodes, where guesses were, to copies of the root."""
    tree.tokens[tree.num_nodes :] = tree.tokens[0]
    tree.parents[tree.num_nodes :].zero_()
    tree.depths[tree.num_nodes :].zero_()
    tree.ancestors[tree.num_nodes :].zero_()
    tree.ancestors[tree.num_nodes :, 0].fill_(True)


def looked_up(texts: Sequence[str]) -> Propose:
    """Return a proposer of the tokens that followed an earlier occurrence. texts: up to the root of
    each tree, by its index; one character per token."""

    def propose(growing: Sequence[PartialTree], rooms: Sequence[int]) -> list[list[int]]:
        return [
            continuation(texts[draft.index] + as_text(likeliest_path(draft)), room)
            for draft, room in zip(growing, rooms, strict=True)
        ]

    return propose


def probable_chains(
    texts: dict[int, list[int]], rooms: Mapping[int, int], continued: Continue
) -> dict[int, list[int]]:
    """Continue each text, by the index of its tree, while the chain's probability is at least
    MIN_PROBABILITY and there is room. The new tokens are returned, and appended to the texts."""
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
    """Token with the greatest logit and its probability, for each row of logits [rows, V]."""
    wide = logits.float()
    best, ids = wide.max(-1)
    probabilities = (best - wide.logsumexp(-1)).exp()
    return list(zip(ids.tolist(), probabilities.tolist(), strict=True))


def likeliest_path(draft: PartialTree) -> list[int]:
    """Tokens down to the first node of the last level, without the root."""
    path: list[int] = draft.tree.tokens[draft.tree.ancestors[draft.last.nodes[0]]].tolist()[1:]
    return path


def with_guess(draft: PartialTree, tokens: Sequence[int], width: int) -> PartialTree:
    """Return the tree with the tokens as a chain below its last level's first node, each in the row
    of the first node of its level. `last.nodes` are those of the level, then those of the chain."""
    if not tokens:
        return draft
    tree, device = draft.tree, draft.tree.tokens.device
    chain = torch.arange(len(tokens), device=device) * width + tree.num_nodes
    above = torch.cat((draft.last.nodes[:1], chain[:-1]))
    tree.tokens[chain] = torch.tensor(tokens, device=device)
    tree.parents[chain] = above
    tree.depths[chain] = torch.arange(1, len(tokens) + 1, device=device) + tree.num_levels
    lines = tree.ancestors[draft.last.nodes[0]].repeat(len(tokens), 1)
    lines[:, chain] = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=device).tril()
    tree.ancestors[chain] = lines
    guessed = replace(tree, num_nodes=tree.num_nodes + width * len(tokens))
    nodes = torch.cat((draft.last.nodes, chain))
    return PartialTree(draft.index, guessed, Level(nodes, draft.last.scores))


def deepened(draft: PartialTree, tokens: Sequence[int], tree: Tree, logits: Tensor) -> PartialTree:
    """Return the tree with the levels that the logits give: of the last level, then of each
    proposed token that is clearly the likeliest."""
    num_nodes = len(draft.last.nodes)
    above = draft.last.nodes[0]
    draft = with_level(draft, draft.last, tree, logits[:num_nodes])
    for token, row in zip(tokens, logits[num_nodes:], strict=True):
        first = draft.last.nodes[0]
        agreed = (draft.tree.tokens[first] == token) & (draft.tree.parents[first] == above)
        if not agreed or draft.last.scores[0].exp() < CLEAR * draft.last.scores.exp().sum():
            break
        above = first
        draft = with_level(draft, Level(first[None], draft.last.scores[:1]), tree, row[None])
        draft = replace(draft, tree=replace(draft.tree, num_proposed=draft.tree.num_proposed + 1))
    return draft


def with_level(draft: PartialTree, last: Level, tree: Tree, logits: Tensor) -> PartialTree:
    first = draft.tree.num_nodes
    children = torch.arange(first, first + tree.width, device=draft.tree.tokens.device)
    grown = replace(draft.tree, num_nodes=first + tree.width, num_levels=draft.tree.num_levels + 1)
    return PartialTree(draft.index, grown, add_level(draft.tree, last, children, tree, logits))
