"""The gated delta rule on CUDA: the twin of `walk` of delta_net.py.

Imports triton, so only code for CUDA may import this module.

A program walks through all rows with some columns of one head's memory, which never meet the
others. The memory stays in registers from a row to the one that continues it; a row that others
continue as well leaves its memory in a slot. Tiles are those of the head's sizes whatever the
number of rows, and nothing is fused that is not written so (`enable_fp_fusion`): a row's bits
depend on its path alone.
N = rows, J = heads, E / F = sizes of keys and values
"""

# mypy: allow-untyped-decorators

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from subspec.artifacts.footprint import delta_net_slots_bytes
from subspec.runtime.model import paths
from subspec.runtime.model.paths import Steps

MAX_KEY_SIZE = 512
TILE = 2048  # numbers of a memory that a program holds, 64 of a thread
MAX_COLUMNS = 16

_CONTINUES = tl.constexpr(paths.CONTINUES)
_COMMITTED = tl.constexpr(paths.COMMITTED)


def columns_of(key_size: int) -> int:
    """Columns of a memory that a program computes."""
    return min(MAX_COLUMNS, TILE // padded_keys(key_size))


def padded_keys(key_size: int) -> int:
    found: int = max(16, triton.next_power_of_2(key_size))
    return found


def walk(memory: Tensor, steps: Steps, rows: Sequence[Tensor], ends: Tensor) -> Tensor:
    """memory f32 [J, E, F]; rows: q and k f32 [N, J, E], v f32 [N, J, F], decay and beta f32
    [N, J]; ends f32 [number of them, J, E, F] -> f32 [N, J, F], what q reads of the memories.

    `ends` may be `memory` if only the first row continues that. Does not wait for the device.
    """
    q, k, v, decay, beta = (some.contiguous() for some in rows)
    (num_rows, num_heads, key_size), value_size = q.shape, v.shape[2]
    assert memory.is_contiguous() and ends.is_contiguous() and key_size <= MAX_KEY_SIZE
    assert memory.shape == (num_heads, key_size, value_size)
    assert steps.rows.shape == (num_rows, 3) and len(ends) == steps.num_ends
    size = delta_net_slots_bytes(steps.num_slots, num_heads, key_size, value_size)
    slots = torch.empty(size // 4, dtype=torch.float32, device=v.device)
    out, columns = torch.empty_like(v), columns_of(key_size)
    _walk[(num_heads, triton.cdiv(value_size, columns))](
        memory,
        steps.rows,
        slots,
        q,
        k,
        v,
        decay,
        beta,
        ends,
        out,
        num_rows,
        HEADS=num_heads,
        KEYS=key_size,
        VALUES=value_size,
        PADDED=padded_keys(key_size),
        COLUMNS=columns,
        num_warps=1,
        num_stages=1,
        enable_fp_fusion=False,
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _walk(
    memory: tl.tensor,
    steps: tl.tensor,
    slots: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    decay: tl.tensor,
    beta: tl.tensor,
    ends: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    key = tl.arange(0, PADDED)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_key, is_column = key < KEYS, column < VALUES
    place = (head * KEYS + key)[:, None] * VALUES + column[None, :]
    is_held = is_key[:, None] & is_column[None, :]
    own = tl.zeros([PADDED, COLUMNS], tl.float32)
    for row in range(num_rows):
        source = tl.load(steps + row * 3)
        if source == _COMMITTED:
            own = tl.load(memory + place, mask=is_held, other=0.0)
        elif source != _CONTINUES:
            kept = slots + source.to(tl.int64) * (HEADS * KEYS * VALUES)
            own = tl.load(kept + place, mask=is_held, other=0.0)
        at = row * HEADS + head
        keys = tl.load(k + at * KEYS + key, mask=is_key, other=0.0)
        queries = tl.load(q + at * KEYS + key, mask=is_key, other=0.0)
        values = tl.load(v + at * VALUES + column, mask=is_column, other=0.0)
        fade = tl.load(decay + at)
        known = tl.sum(own * keys[:, None], 0) * fade
        change = (values - known) * tl.load(beta + at)
        own = own * fade + keys[:, None] * change[None, :]
        read = tl.sum(own * queries[:, None], 0)
        tl.store(out + at * VALUES + column, read, mask=is_column)
        slot = tl.load(steps + row * 3 + 1)
        if slot >= 0:
            kept = slots + slot.to(tl.int64) * (HEADS * KEYS * VALUES)
            tl.store(kept + place, own, mask=is_held)
            tl.debug_barrier()  # other threads of the program may read what this one wrote
        end = tl.load(steps + row * 3 + 2)
        if end >= 0:
            left = ends + end.to(tl.int64) * (HEADS * KEYS * VALUES)
            tl.store(left + place, own, mask=is_held)
