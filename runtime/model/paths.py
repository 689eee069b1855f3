"""How the rows of a pass follow one another: along a text, or along a tree.

T = rows, N = rows without padding, K = taps of a convolution along the paths
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from subspec.artifacts.footprint import NET_ROWS


@dataclass(frozen=True)
class Paths:
    """How the rows of a pass follow one another. A slot holds the memory of one row while rows that
    continue it are still to come; made once for all layers, on the CPU."""

    windows: Tensor  # int64 [N, K]: rows of cat(state.conv, qkv) that a convolution takes
    sources: Tensor  # int64 [N]: slot of the memory that a row continues; -1: what is committed
    slots: Tensor  # int64 [N]: slot of its own
    num_slots: int

    def __len__(self) -> int:
        return len(self.slots)


@lru_cache(maxsize=2 * NET_ROWS)
def chain_paths(num_rows: int, num_taps: int) -> Paths:
    """Each row follows the one before it. Shared: nobody writes to them."""
    windows = torch.arange(num_rows)[:, None] + torch.arange(num_taps)
    slots = torch.zeros(num_rows, dtype=torch.int64)
    sources = slots.clone()
    sources[:1] = -1
    return Paths(windows, sources, slots, 1)


def tree_paths(parents: Sequence[int], num_taps: int) -> Paths:
    """parents: of each row an earlier one; -1: the committed state."""
    assert all(-1 <= parent < row for row, parent in enumerate(parents))
    windows = window_rows(torch.tensor(parents), torch.arange(len(parents)), num_taps)
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


def window_rows(parents: Tensor, rows: Tensor, num_taps: int) -> Tensor:
    """int64 [len(rows), K]: the inputs that the convolutions of `rows` take, as rows of the last
    K - 1 committed inputs and those of the tree behind them. parents: -1 above a first row."""
    committed = num_taps - 1
    above = torch.cat((torch.arange(-1, committed - 1, device=rows.device), parents + committed))
    taps = [rows + committed]
    for _ in range(committed):
        taps.append(above[taps[-1]])
    return torch.stack(taps[::-1], dim=1)
