"""Which tokens layers with windows keep: not one slot for every token of the context, as other
layers have, but a stretch of slots that follows the text.

Slots have the numbers that they have in other layers, and lie in their order: what a row attends
to is the same sequence, so it has the same bits. A stretch that is full is emptied by copying its
last tokens to its beginning: no tensor changes its address.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from subspec.artifacts.footprint import aligned_slots


@dataclass(eq=False)
class WindowSlots:
    """Of one sequence. The stores of all attentions with windows have room for twice what has to be
    kept, and behind it for a tree and the padding slot: a copy for a tree overlaps nothing, and a
    long piece of a text leaves what it needs alone until it is committed."""

    attentions: frozenset[int]  # in execution order
    num_slots: int  # of each of their stores
    text_slots: int  # of a store for the whole context
    widest: int  # of the windows
    kept: int  # tokens that stay when a stretch is emptied, at most
    base: int = 0  # the slot that lies first in the stores; aligned, so that drafts sum alike
    start: int = 0  # the first slot of which they have the token: `base`, or later

    @property
    def padding_slot(self) -> int:
        """Where it lies in the stores."""
        return self.num_slots - 1

    def places(self, first: int, end: int) -> slice:
        """Where slots [first, end) lie in the stores."""
        return slice(first - self.base, end - self.base)

    def fit(self, end: int) -> bool:
        """Whether the slots before `end` have places in the stores."""
        return end - self.base < self.num_slots

    def reach(self, length: int) -> bool:
        """Whether what follows `length` tokens finds all that its windows show it."""
        return windows_reach(length, self.start, self.widest)

    def begin_at(self, slot: int) -> None:
        """The stores have the tokens from this slot on, and begin with it."""
        self.base = self.start = slot

    def overlap(self, length: int) -> bool:
        """Whether `move` writes over what it reads."""
        return length - self.base < 2 * self.kept

    def move(self, stores: Sequence[Tensor], length: int) -> None:
        """Copies the last of `length` tokens to the front. stores [B, num_slots, D]. Where it is
        interrupted and does not overlap, it can be done again."""
        base, overlap = aligned_slots(length - self.kept), self.overlap(length)
        kept = self.places(base, length)
        self.start = max(self.start, base)  # what lies in front of it is written over
        for store in stores:
            store[:, : length - base] = store[:, kept].clone() if overlap else store[:, kept]
        self.base = base

    def last_places(self, end: int) -> slice:
        """Where a piece of a text, for which there is no room, puts its last tokens before `end`:
        the second half has nothing that has to be kept then."""
        return slice(self.kept, end - self._base_of_piece(end))

    def jump(self, end: int) -> None:
        """The stores have the tokens in `last_places`. In their first half is nothing that a window
        still shows."""
        self.base = self._base_of_piece(end)
        self.start = self.base + self.kept

    def _base_of_piece(self, end: int) -> int:
        return aligned_slots(end - 2 * self.kept)


def windows_reach(length: int, start: int, widest: int) -> bool:
    """Whether what follows `length` tokens finds all that windows of `widest` tokens, its own
    included, show it where those from `start` on are kept."""
    return start == 0 or length - widest + 1 >= start
