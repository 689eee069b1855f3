"""Parts of a toy model in a file, links to it that find mistakes, and what streams over them."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from toy_weights import ToyWeights, exact_weights

from subspec.artifacts.model import PAGE_BYTES
from subspec.artifacts.plan import Block, Ledger, Placement, make_blocks
from subspec.runtime.memory import host_buffer
from subspec.runtime.stream.exact_weights import ExactWeights
from subspec.runtime.stream.link import DiskLink, Link
from subspec.runtime.stream.ring import Check, Requested, Ring, unchecked

Wrap = Callable[[DiskLink, list[torch.Tensor]], Link]


class StrictLink:
    """A link that delays copies and scribbles over a slot the moment it may be refilled: compute
    that read a slot too early or too late would see other bytes."""

    def __init__(self, inner: DiskLink, slots: list[torch.Tensor], delay: float = 0.0) -> None:
        self._inner, self._slots, self._delay = inner, slots, delay
        self.held, self.filling = set[int](), set[int]()
        self.begun = list[tuple[int, int]]()  # slot and offset of every copy
        self.wait_seconds = 0.0

    def begin(self, slot: int, offset: int, num_bytes: int) -> None:
        assert slot not in self.held, "a slot was refilled while compute held it"
        assert slot not in self.filling, "a slot was refilled while it was being filled"
        self.filling.add(slot)
        self.begun.append((slot, offset))
        self._slots[slot].fill_(0xFF)
        threading.Event().wait(self._delay)
        self._inner.begin(slot, offset, num_bytes)

    def wait(self, slot: int) -> torch.Tensor:
        assert slot in self.filling, "nothing comes into this slot: this would wait for ever"
        self.filling.remove(slot)
        self.held.add(slot)
        return self._inner.wait(slot)

    def release(self, slot: int) -> None:
        self.held.discard(slot)

    def forget(self) -> None:
        self.held.clear()
        self.filling.clear()
        self._inner.forget()

    def close(self) -> None:
        self._inner.close()


def write_parts(toy: ToyWeights, path: Path) -> dict[str, int]:
    """Every part as an artifact has it, in order, at pages -> where each one begins."""
    offsets = dict[str, int]()
    with open(path, "wb") as file:
        for stored in toy.stored:
            offsets[stored.name] = file.tell()
            rows = toy.resident[stored.name].contiguous()
            file.write(bytes(rows.view(torch.uint8).numpy().data))
            file.write(b"\xee" * (-file.tell() % PAGE_BYTES))
    return offsets


def open_ring(
    toy: ToyWeights,
    path: Path,
    offsets: dict[str, int],
    resident: Sequence[str] = (),
    block_bytes: int = 0,
    num_slots: int = 2,
    wrap: Wrap = StrictLink,
    check: Check = unchecked,
) -> tuple[Ring, list[Block]]:
    """block_bytes: the largest part's unless it is given."""
    size = block_bytes or max(part.padded_bytes for part in toy.stored)
    blocks = make_blocks(toy.stored, Placement(tuple(resident), (), size, num_slots, Ledger()))
    slots = [host_buffer(size) for _ in range(num_slots)]
    link = wrap(DiskLink(path, slots, None), slots)
    starts = [offsets[block.parts[0].name] for block in blocks]
    dtype: torch.dtype = getattr(torch, toy.spec.dtype)
    return Ring(blocks, starts, link, num_slots, dtype, check), blocks


def open_requested(
    toy: ToyWeights,
    path: Path,
    offsets: dict[str, int],
    num_slots: int = 3,
    wrap: Wrap = StrictLink,
) -> Requested:
    size = max(part.padded_bytes for part in toy.stored)
    slots = [host_buffer(size) for _ in range(num_slots)]
    link = wrap(DiskLink(path, slots, None), slots)
    dtype: torch.dtype = getattr(torch, toy.spec.dtype)
    return Requested(toy.stored, offsets, link, num_slots, dtype)


def exact_over(
    toy: ToyWeights, streamed: Ring | Requested, resident: Sequence[str] = ()
) -> ExactWeights:
    """What streams, and beside it the named parts in memory."""
    kept = {name: toy.resident[name] for name in resident}
    return exact_weights(toy, streamed, kept)
