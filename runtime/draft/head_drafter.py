"""Drafts with a draft head: a tree grows as with the substitutes, in one pass of one layer per
level.

The first pass also reads what the last round committed, with the exact model's hidden states, and
overwrites the keys and values that the draft wrote for it. Or the head proposes a chain for the
substitutes to check: it reads their tokens as its own, with its own hidden states.
W = rows of a tree, H = hidden size
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subspec.artifacts.plan import Tree, tree_for
from subspec.runtime.draft.beam import DraftPass, PartialTree, TokenTree, grow
from subspec.runtime.draft.draft_head import (
    HeadWeights,
    following_rows,
    logits_from,
    next_hidden,
    of_head,
)
from subspec.runtime.draft.drafter import DecodeState, tree_rows, within_constraints
from subspec.runtime.draft.hierarchical import Propose, likeliest, likeliest_path, probable_chains
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.model.attention import attend
from subspec.runtime.model.cache import Cache, TreeSlots
from subspec.runtime.model.transformer import Rows


@dataclass(frozen=True)
class HeadDrafter:
    """Drafts trees with a draft head. Its outputs give logits by a head of its own, or by the
    substitute of the model's head."""

    trees: tuple[Tree, ...]  # of 1, 2, 4, ... sequences
    verify_width: int
    weights: HeadWeights
    substitutes: Substitutes

    def draft(self, states: Sequence[DecodeState]) -> list[TokenTree]:
        tree, caches = tree_for(self.trees, len(states)), [state.cache for state in states]
        depths = [max(0, min(tree.depth, state.max_tokens - 1)) for state in states]
        roots = [torch.tensor([state.root], device=state.cache.device) for state in states]
        draft_pass = self.passes_over(caches)
        if any(state.sampler.constraint for state in states):
            draft_pass = within_constraints(draft_pass, states)
        return grow(roots, depths, tree, self.verify_width, draft_pass)

    def passes_over(self, caches: Sequence[Cache]) -> DraftPass:
        """Return passes over a tree in each cache, level by level from the root."""
        slots = [cache.tree_slots(self.verify_width) for cache in caches]
        shape = self.verify_width, self.weights.model.spec.hidden_size
        # What the head returned for each node
        returned = [cache.keys[-1].new_empty(shape) for cache in caches]

        def inputs(draft: PartialTree) -> tuple[Rows, Tensor]:
            cache, own, known = caches[draft.index], slots[draft.index], returned[draft.index]
            if draft.tree.num_levels:
                return level_rows(draft, cache, own), known[draft.tree.parents[draft.last.nodes]]
            return root_rows(draft.tree.tokens[:1], cache, own)

        def run(growing: Sequence[PartialTree]) -> Tensor:
            pairs = [inputs(draft) for draft in growing]
            batch, hidden = [rows for rows, _ in pairs], torch.cat([x for _, x in pairs])
            found = next_hidden(self.weights, batch, hidden)
            wanted, sizes = list[Tensor](), [len(rows.tokens) for rows in batch]
            for draft, outputs in zip(growing, found.split(sizes), strict=True):
                nodes = draft.last.nodes
                wanted.append(outputs[-len(nodes) :])  # rows before the root's are only read
                returned[draft.index][nodes] = wanted[-1]
            return self.logits(torch.cat(wanted))

        return run

    def logits(self, returned: Tensor) -> Tensor:
        """Logits [rows, V] of the head's outputs."""
        return logits_from(self.weights, self.substitutes.head, returned)

    def proposals(self, states: Sequence[DecodeState]) -> Propose:
        """Return a proposer of the chain of the head's likeliest tokens, as far as it is probable,
        for the substitutes to check."""
        caches = [state.cache for state in states]
        slots = [cache.tree_slots(self.verify_width) for cache in caches]
        # From the root on: what the head has read of each tree, and what it returned, [1, H] each
        read, returned = [list[int]() for _ in states], [list[Tensor]() for _ in states]

        def next_rows(index: int, text: Sequence[int]) -> tuple[Rows, Tensor]:
            cache, own, depth = caches[index], slots[index], len(read[index])
            token = torch.tensor([text[depth]], device=cache.device)
            if not depth:
                return root_rows(token, cache, own)
            rows = following_rows(cache, token, cache.length + depth, own.live_slots)
            return rows, returned[index][-1]

        def continued(texts: Mapping[int, list[int]]) -> list[tuple[int, float]]:
            for index, text in texts.items():
                kept = num_shared(read[index], text)
                del read[index][kept:], returned[index][kept:]
            while behind := [
                index for index, text in texts.items() if len(read[index]) < len(text)
            ]:
                pairs = [next_rows(index, texts[index]) for index in behind]
                batch, hidden = [rows for rows, _ in pairs], torch.cat([x for _, x in pairs])
                found = next_hidden(self.weights, batch, hidden)
                sizes = [len(rows.tokens) for rows in batch]
                for index, outputs in zip(behind, found.split(sizes), strict=True):
                    read[index].append(texts[index][len(read[index])])
                    returned[index].append(outputs[-1:])
            return likeliest(self.logits(torch.cat([returned[index][-1] for index in texts])))

        def propose(growing: Sequence[PartialTree], rooms: Sequence[int]) -> list[list[int]]:
            paths = {draft.index: likeliest_path(draft) for draft in growing}
            texts = {index: [states[index].root, *path] for index, path in paths.items()}
            room_of = {draft.index: room for draft, room in zip(growing, rooms, strict=True)}
            found = probable_chains(texts, room_of, continued)
            return [found[draft.index] for draft in growing]

        return propose


def num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def root_rows(root: Tensor, cache: Cache, slots: TreeSlots) -> tuple[Rows, Tensor]:
    """Rows of committed tokens that the head has not read, and of the root int64 [1], with the
    exact model's hidden states."""
    unread = cache.unread
    assert unread is not None and unread.reaches(cache.length)
    known = torch.tensor(cache.tokens[unread.first + 1 :], dtype=torch.int64, device=cache.device)
    tokens = torch.cat((known, root))
    rows = following_rows(cache, tokens, unread.first + 1, slots.live_slots)
    return rows, unread.rows[: unread.count]


def level_rows(draft: PartialTree, cache: Cache, slots: TreeSlots) -> Rows:
    """Rows of a tree's last level."""
    rows = tree_rows(draft.tree, draft.last.nodes, of_head(cache), slots, attend)
    rows = replace(rows, windowed=None)  # a head has all slots
    assert rows.visible is not None
    rows.visible[:, 0].fill_(False)  # the first token of a text has no row
    return rows
