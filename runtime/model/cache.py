"""KV cache: write, keep, roll back. Draft and verification share it.

L = layers, B = KV heads, S = slots, D = head size, T = rows
The slot of a committed token is its position. A tree of W nodes lies behind the committed tokens,
node i at slot length + i; the last slot takes what padding rows write.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspec.artifacts.plan import SLOT_ALIGNMENT


@dataclass(frozen=True)
class TreeSlots:
    """Where a tree lies in the cache: behind the committed tokens."""

    length: Tensor  # int64 [], how many those are; on the device, where a captured graph reads it
    live_slots: int  # that a pass over the tree attends to, visible or not
    padding_slot: int


@dataclass
class Cache:
    keys_values: Tensor  # [L, 2, B, S, D]
    tokens: list[int] = field(default_factory=list)  # ids whose exact keys and values are committed

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def padding_slot(self) -> int:
        return self.keys_values.shape[3] - 1

    def live_slots(self, end: int) -> int:
        return min(-(-end // SLOT_ALIGNMENT) * SLOT_ALIGNMENT, self.keys_values.shape[3])

    def behind(self, num_rows: int) -> TreeSlots:
        """Of a tree of so many rows. The live slots are those of the whole tree, whatever of it is
        drafted yet, so that every pass of a round has one shape."""
        length = torch.full((), self.length, device=self.keys_values.device)
        return TreeSlots(length, self.live_slots(self.length + num_rows), self.padding_slot)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """keys, values [B, T, D] -> slots [T]."""
        self.keys_values[layer, 0].index_copy_(1, slots, keys.to(self.keys_values.dtype))
        self.keys_values[layer, 1].index_copy_(1, slots, values.to(self.keys_values.dtype))

    def read(self, layer: int, num_slots: int) -> tuple[Tensor, Tensor]:
        """Views [B, num_slots, D] of the first slots."""
        return self.keys_values[layer, 0, :, :num_slots], self.keys_values[layer, 1, :, :num_slots]

    def compact(self, path: Tensor) -> None:
        """Moves the tree nodes `path` (int64, ascending, on the device) to the first tree slots.

        Row i of `path` goes to slot length + i. Rows beyond the accepted ones may be anything: what
        they leave behind is not committed.
        """
        first = self.length
        for layer in self.keys_values:  # one layer at a time: a small temporary
            moved = layer.index_select(2, path + first)
            layer[:, :, first : first + len(path)] = moved

    def commit(self, tokens: list[int]) -> None:
        self.tokens.extend(tokens)

    def roll_back(self, length: int) -> None:
        """Forgets all but the first `length` tokens; their slots are written anew."""
        del self.tokens[length:]

    def common_prefix(self, tokens: list[int]) -> int:
        """How many leading `tokens` are already committed."""
        for index, (mine, theirs) in enumerate(zip(self.tokens, tokens, strict=False)):
            if mine != theirs:
                return index
        return min(len(self.tokens), len(tokens))
