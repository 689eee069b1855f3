"""Paths of the rows of a pass: which row follows which, along a text or along a tree.

T = rows, N = rows without padding, K = taps of a convolution along the paths
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from subspec.artifacts.footprint import NET_ROWS

HOST = torch.device("cpu")
COMMITTED, CONTINUES = -1, -2  # as the source of a row's memory, in steps


@dataclass(frozen=True)
class Steps:
    """Steps of a walk on a GPU, where one kernel takes row after row."""

    rows: Tensor  # int32 [N, 3], on the GPU, see `steps_of`
    num_slots: int  # for memories that other rows than the next continue
    num_ends: int


@dataclass(frozen=True)
class Paths:
    """Sources of the rows of a pass. A slot holds the memory of one row while rows that continue it
    are still to come. Made once for all layers: each upload to a GPU would wait for its queue."""

    # int64 [N, K], on the rows' device: rows of cat(state.conv, qkv) that a convolution takes
    windows: Tensor
    # On the host, int64 [N]
    sources: Tensor  # slot of the memory that a row continues; -1: what is committed
    slots: Tensor  # slot of its own
    num_slots: int
    steps: Steps | None = None  # of rows on a GPU

    def __len__(self) -> int:
        return len(self.slots)


def chain_paths(num_rows: int, conv_kernel_size: int, device: torch.device = HOST) -> Paths:
    """Paths of rows that follow one another; the last row is an end. Made on the device, so that
    nothing is uploaded."""
    paths = chain_on_host(num_rows, conv_kernel_size)
    if device.type == "cpu":
        return paths
    first, taps = (torch.arange(count, device=device) for count in (num_rows, conv_kernel_size))
    rows = torch.full((num_rows, 3), -1, dtype=torch.int32, device=device)
    rows[1:, 0].fill_(CONTINUES)
    rows[-1:, 2].fill_(0)
    return replace(paths, windows=first[:, None] + taps, steps=Steps(rows, 0, 1))


@lru_cache(maxsize=2 * NET_ROWS)
def chain_on_host(num_rows: int, conv_kernel_size: int) -> Paths:
    """Paths of a chain on the host; cached and shared, so not to be written to."""
    windows = torch.arange(num_rows)[:, None] + torch.arange(conv_kernel_size)
    slots = torch.zeros(num_rows, dtype=torch.int64)
    sources = slots.clone()
    sources[:1] = -1
    return Paths(windows, sources, slots, 1)


def tree_paths(parents: Sequence[int], conv_kernel_size: int) -> Paths:
    """Paths of a tree. parents: an earlier row for each row; -1: the committed state."""
    assert all(-1 <= parent < row for row, parent in enumerate(parents))
    windows = window_rows(torch.tensor(parents), torch.arange(len(parents)), conv_kernel_size)
    left, free = Counter(parents), list[int]()
    sources, slots, num_slots = list[int](), list[int](), 0
    for row, parent in enumerate(parents):
        sources.append(slots[parent] if parent >= 0 else -1)
        left[parent] -= 1
        if parent >= 0 and not left[parent]:  # its last child takes the slot over
            slots.append(slots[parent])
        elif free:
            slots.append(free.pop())
        else:
            slots.append(num_slots)
            num_slots += 1
        if not left[row]:
            free.append(slots[row])
    return Paths(windows, torch.tensor(sources), torch.tensor(slots), num_slots)


def on_device(paths: Paths, device: torch.device, windows: Tensor | None = None) -> Paths:
    """The paths for rows on that device, without ends. windows: those of the paths, if already
    there."""
    if device.type == "cpu":
        return paths
    steps = steps_of(paths.sources.tolist(), paths.slots.tolist(), ())
    there = paths.windows.to(device) if windows is None else windows
    return replace(paths, windows=there, steps=uploaded(steps, device))


def steps_of(
    sources: Sequence[int], slots: Sequence[int], end_rows: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Return for each row the source of the memory that it continues (a slot, COMMITTED, or
    CONTINUES: the row before), the slot for its own memory, and the index of its end; -1: none. A
    row that only the next one continues needs no slot."""
    taken, writers, kept = list[int](), dict[int, int](), set[int]()
    for row, (source, slot) in enumerate(zip(sources, slots, strict=True)):
        follows = row > 0 and source >= 0 and source == slots[row - 1]
        if source >= 0 and not follows:
            kept.add(writers[source])
        taken.append(CONTINUES if follows else source)
        writers[slot] = row
    ends = {row: entry for entry, row in enumerate(end_rows)}
    return [
        (source, slots[row] if row in kept else -1, ends.get(row, -1))
        for row, source in enumerate(taken)
    ]


def uploaded(steps: Sequence[tuple[int, int, int]], device: torch.device) -> Steps:
    rows = torch.tensor(steps, dtype=torch.int32).to(device)
    num_slots = 1 + max(slot for _, slot, _ in steps)
    return Steps(rows, num_slots, 1 + max(end for *_, end in steps))


def window_rows(parents: Tensor, rows: Tensor, conv_kernel_size: int) -> Tensor:
    """Inputs of the convolutions of `rows`, int64 [len(rows), K]: rows of the last K - 1 committed
    inputs and the tree's behind them. parents: -1 above a first row."""
    committed = conv_kernel_size - 1
    above = torch.cat((torch.arange(-1, committed - 1, device=rows.device), parents + committed))
    taps = [rows + committed]
    for _ in range(committed):
        taps.append(above[taps[-1]])
    return torch.stack(taps[::-1], dim=1)
