"""Slots of layers with windows: not one for every token of the context, as in other layers, but a
stretch that follows the text.

Slots have the same numbers and order as in other layers: a row attends to the same sequence, so it
has the same bits. A full stretch is emptied by copying its last tokens to its beginning: no tensor
changes its address.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from subspec.artifacts.footprint import aligned_slots


@dataclass(eq=False)
class WindowSlots:
    """Window slots of one sequence. The stores of all attentions with windows have room for twice
    the tokens that have to be kept, for a tree and for the padding slot. So a copy for a tree
    overlaps nothing, and a long chunk does not overwrite what it needs until it is committed."""

    attentions: frozenset[int]  # in execution order
    num_slots: int  # of each store
    text_slots: int  # of a store for the whole context
    widest: int  # of the windows
    kept: int  # most tokens that are kept when a stretch is emptied
    base: int = 0  # first slot in the stores; aligned, so that drafts add in the same order
    start: int = 0  # first slot whose token they have: `base`, or later

    @property
    def padding_slot(self) -> int:
        """Place of the padding slot in the stores."""
        return self.num_slots - 1

    def places(self, first: int, end: int) -> slice:
        """Places of slots [first, end) in the stores."""
        return slice(first - self.base, end - self.base)

    def fit(self, end: int) -> bool:
        """Return True if the slots before `end` have places in the stores."""
        return end - self.base < self.num_slots

    def reach(self, length: int) -> bool:
        """Return True if all that the windows show after `length` tokens is in the stores."""
        return windows_reach(length, self.start, self.widest)

    def begin_at(self, slot: int) -> None:
        """Let the stores begin at this slot; they have the tokens from it on."""
        self.base = self.start = slot

    def overlap(self, length: int) -> bool:
        """Return True if `move` overwrites part of its source."""
        return length - self.base < 2 * self.kept

    def move(self, stores: Sequence[Tensor], length: int) -> None:
        """Copy the last of `length` tokens to the front. stores [B, num_slots, D]. If it is
        interrupted and does not overlap, it can be repeated."""
        base, overlap = aligned_slots(length - self.kept), self.overlap(length)
        kept = self.places(base, length)
        self.start = max(self.start, base)  # slots before it are overwritten
        for store in stores:
            store[:, : length - base] = store[:, kept].clone() if overlap else store[:, kept]
        self.base = base

    def last_places(self, end: int) -> slice:
        """Places for the last tokens before `end` of a chunk that does not fit: in the second half,
        where nothing has to be kept then."""
        return slice(self.kept, end - self._base_of_chunk(end))

    def jump(self, end: int) -> None:
        """Move the stretch to the tokens in `last_places`. No window shows the first half any
        more."""
        self.base = self._base_of_chunk(end)
        self.start = self.base + self.kept

    def _base_of_chunk(self, end: int) -> int:
        return aligned_slots(end - 2 * self.kept)


def windows_reach(length: int, start: int, widest: int) -> bool:
    """Return True if windows of `widest` tokens, a row's own included, show only tokens from
    `start` on after `length` tokens."""
    return start == 0 or length - widest + 1 >= start
