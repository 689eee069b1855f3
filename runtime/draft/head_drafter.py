"""Drafts with a draft head: the tree grows as the substitutes' does, a pass of one layer a level.

The first pass also reads what the last round has committed, with the exact model's hidden states:
keys and values that the draft wrote for it are written again. W = rows of a tree, H = hidden size
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subspec.artifacts.plan import Tree, tree_for
from subspec.runtime.draft.beam import DraftPass, Growing, TokenTree, grow
from subspec.runtime.draft.draft_head import (
    HeadWeights,
    following_rows,
    logits_from,
    next_hidden,
    of_head,
)
from subspec.runtime.draft.drafter import Turn, tree_rows, within_constraints
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.model.attention import attend
from subspec.runtime.model.cache import Cache, TreeSlots
from subspec.runtime.model.transformer import Rows


@dataclass(frozen=True)
class HeadDrafter:
    """The logits of what the head returns are its own, or those of the substitute of the model's
    head."""

    trees: tuple[Tree, ...]  # of 1, 2, 4, ... sequences
    verify_width: int
    weights: HeadWeights
    substitutes: Substitutes

    def draft(self, turns: Sequence[Turn]) -> list[TokenTree]:
        tree, caches = tree_for(self.trees, len(turns)), [turn.cache for turn in turns]
        depths = [max(0, min(tree.depth, turn.max_tokens - 1)) for turn in turns]
        roots = [torch.tensor([turn.root], device=turn.cache.device) for turn in turns]
        draft_pass = self.passes_over(caches)
        if any(turn.chooser.constraint for turn in turns):
            draft_pass = within_constraints(draft_pass, turns)
        return grow(roots, depths, tree, self.verify_width, draft_pass)

    def passes_over(self, caches: Sequence[Cache]) -> DraftPass:
        """Passes over a tree in each cache, level after level from the root."""
        slots = [cache.tree_slots(self.verify_width) for cache in caches]
        shape = self.verify_width, self.weights.model.spec.hidden_size
        # What the head returned for each node
        returned = [cache.keys[-1].new_empty(shape) for cache in caches]

        def inputs(one: Growing) -> tuple[Rows, Tensor]:
            cache, own, known = caches[one.index], slots[one.index], returned[one.index]
            if one.tree.num_levels:
                return level_rows(one, cache, own), known[one.tree.parents[one.last.nodes]]
            return root_rows(one, cache, own)

        def run(growing: Sequence[Growing]) -> Tensor:
            pairs = [inputs(one) for one in growing]
            batch, hidden = [rows for rows, _ in pairs], torch.cat([some for _, some in pairs])
            found = next_hidden(self.weights, batch, hidden)
            wanted, sizes = list[Tensor](), [len(rows.tokens) for rows in batch]
            for one, some in zip(growing, found.split(sizes), strict=True):
                nodes = one.last.nodes
                wanted.append(some[-len(nodes) :])  # before the root: what is only read
                returned[one.index][nodes] = wanted[-1]
            return logits_from(self.weights, self.substitutes.head, torch.cat(wanted))

        return run


def root_rows(one: Growing, cache: Cache, slots: TreeSlots) -> tuple[Rows, Tensor]:
    """Rows for what is committed and not read yet, and for the root, with the exact model's hidden
    states."""
    unread = cache.unread
    assert unread is not None and unread.reaches(cache.length)
    known = torch.tensor(cache.tokens[unread.first + 1 :], dtype=torch.int64, device=cache.device)
    tokens = torch.cat((known, one.tree.tokens[:1]))
    rows = following_rows(cache, tokens, unread.first + 1, slots.live_slots)
    return rows, unread.rows[: unread.count]


def level_rows(one: Growing, cache: Cache, slots: TreeSlots) -> Rows:
    """Rows for the last level of a tree."""
    rows = tree_rows(one.tree, one.last.nodes, of_head(cache), slots, attend)
    rows = replace(rows, windowed=None)  # a head has all slots
    assert rows.visible is not None
    rows.visible[:, 0].fill_(False)  # the first token of a text has no row
    return rows
