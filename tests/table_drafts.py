"""Draft models that are lookup tables, and what trees of theirs have in common."""

from collections.abc import Sequence

import torch
from torch import Tensor

from subspec.runtime.draft.beam import DraftPass, PartialTree, TokenTree

V = 11  # vocabulary


def table_draft(*tables: Tensor) -> DraftPass:
    """Drafts whose logits depend on the node's token only: row t of a table [V, V] of the
    sequence's own."""

    def run(growing: Sequence[PartialTree]) -> Tensor:
        return torch.cat([tables[one.index][one.tree.tokens[one.last.nodes]] for one in growing])

    return run


def random_table(seed: int, sharpness: float = 3.0) -> Tensor:
    return torch.randn(V, V, generator=torch.Generator().manual_seed(seed)) * sharpness


def same(got: TokenTree, expected: TokenTree) -> bool:
    pairs = [
        (getattr(got, name), getattr(expected, name))
        for name in ("tokens", "parents", "depths", "ancestors")
    ]
    return got.num_nodes == expected.num_nodes and all(torch.equal(*pair) for pair in pairs)
