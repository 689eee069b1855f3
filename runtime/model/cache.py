"""KV cache of one sequence: write, commit, roll back. Draft and verification share it.

B = KV heads, S = slots, D = head size, T = rows
The slot of a committed token is its position. A tree of W nodes lies after the committed tokens,
node i at slot length + i; the last slot takes what padding rows write. Attentions keep tensors of
their own sizes, in execution order.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspec.artifacts.footprint import SLOT_ALIGNMENT
from subspec.artifacts.model import ModelSpec

Take = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True)
class TreeSlots:
    """Where a tree lies in a cache, and how many committed tokens it sees; both numbers are on the
    device, where a captured graph reads them."""

    length: Tensor  # int64 [], tokens before the tree
    first: Tensor  # int64 [], slot of the root: behind all that is committed
    live_slots: int  # that a pass over the tree attends to, visible or not
    padding_slot: int


@dataclass(eq=False)  # a sequence's own: two caches are never the same
class Cache:
    keys: tuple[Tensor, ...]  # [B, S, D] of each attention
    values: tuple[Tensor, ...]
    tokens: list[int] = field(default_factory=list)  # ids whose exact keys and values are committed

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def num_slots(self) -> int:
        return self.keys[0].shape[1]

    @property
    def padding_slot(self) -> int:
        return self.num_slots - 1

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    def live_slots(self, end: int) -> int:
        return min(-(-end // SLOT_ALIGNMENT) * SLOT_ALIGNMENT, self.num_slots)

    def tree_slots(self, num_rows: int, after: int | None = None) -> TreeSlots:
        """Of a tree of so many rows that follows the first `after` committed tokens; None: all. The
        live slots are those of the whole tree, whatever of it is drafted yet, so that every pass of
        a round has one shape."""
        first = torch.full((), self.length, device=self.device)
        length = first if after is None else torch.full((), after, device=self.device)
        live_slots = self.live_slots(self.length + num_rows)
        return TreeSlots(length, first, live_slots, self.padding_slot)

    def write(self, attention: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """keys, values [B, T, D] -> slots [T]. attention: its index in execution order."""
        for kept, fresh in ((self.keys[attention], keys), (self.values[attention], values)):
            kept.index_copy_(1, slots, fresh.to(kept.dtype))

    def read(self, attention: int, num_slots: int) -> tuple[Tensor, Tensor]:
        """Views [B, num_slots, D] of the first slots."""
        return self.keys[attention][:, :num_slots], self.values[attention][:, :num_slots]

    def commit(self, tokens: list[int]) -> None:
        """The next slots hold the exact keys and values of `tokens`."""
        self.tokens.extend(tokens)

    def commit_path(self, path: Tensor, tokens: list[int]) -> None:
        """Moves the tree nodes `path` (int64, ascending, on the device, the root first) to the
        first slots of the tree, and commits `tokens`, which are those of its first nodes.

        Rows of `path` beyond them may be anything: what they leave is written again.
        """
        first = self.length
        for kept in (*self.keys, *self.values):  # one at a time: a small temporary
            kept[:, first : first + len(path)] = kept.index_select(1, path + first)
        self.commit(tokens)

    def roll_back(self, length: int) -> None:
        """Forgets all but the first `length` tokens; their slots are written again."""
        del self.tokens[length:]

    def common_prefix(self, tokens: list[int]) -> int:
        """How many leading `tokens` are already committed."""
        for index, (mine, theirs) in enumerate(zip(self.tokens, tokens, strict=False)):
            if mine != theirs:
                return index
        return min(len(self.tokens), len(tokens))


def make_cache(spec: ModelSpec, num_slots: int, take: Take) -> Cache:
    """An empty cache in memory that `take(shape, dtype)` gives."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    shapes = [
        (attention.num_kv_heads, num_slots, attention.head_size)
        for layer in spec.layers
        for attention in layer.attentions
    ]
    pairs = [(take(shape, dtype), take(shape, dtype)) for shape in shapes]
    return Cache(tuple(keys for keys, _ in pairs), tuple(values for _, values in pairs))
