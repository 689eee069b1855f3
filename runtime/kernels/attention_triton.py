"""Batch-invariant attention on CUDA, in f32 on tensor cores: the twin of `attend_in_fp64`.

Imports triton, so only code for CUDA may import this module.

A row's result is a function of its q and of the sequence of the keys and values that it sees, in
ascending slot order, and of nothing else. A slot's *place* in a row is its number among the slots
that the row sees. Places are cut into blocks of BLOCK and sections of SECTION, whatever slots they
lie in:
1. `_list_slots` finds the slot of each place: the leading places are slots of the same number, the
   others are listed.
2. `_attend_section` computes softmax sums of one section for ROWS query heads of rows, block after
   block. A block whose places are the same slots in all of these rows is loaded once. Any other is
   taken for one row at a time, its own keys and values loaded by place, zeros behind the last, and
   the sums of the others stay as they are. Both are the same instructions, of one loop.
3. `_combine` adds the sections in ascending order.
All shapes, so all orders of summation, are those of the constants here: none depends on the number
of rows or slots. An entry of a product on tensor cores depends on the row of the one operand and
the column of the other, not on where in the tile it is. What is fused into one rounding is written
as such, so that copies of an expression round alike.

Weights are f32. Products of 16-bit numbers take them as the sum of two or three such numbers, which
with f32 sums keeps at least 22 bits; products of f32 numbers are three of tf32.

A = query heads, B = KV heads, R = A / B, T = query rows, S = live slots, D = head size
"""

# mypy: allow-untyped-decorators

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from subspec.artifacts.footprint import (
    ATTENTION_SECTION,
    attention_blocks_bytes,
    attention_results,
    attention_sections,
)

MAX_HEAD_SIZE = 512
ROWS = 16  # of a tile: what one instruction of the tensor cores takes
LIST_BLOCK = 1024  # slots

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of f32; of -inf, -inf - -inf would be NaN
_F16_SCALE = tl.constexpr(2.0**15)  # of weights, 1 at most: what their rounding leaves is normal


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of a program of `_attend_section`. The bits depend on the first two."""

    block: int  # places
    chunk: int  # dimensions of a score
    num_warps: int
    num_stages: int  # of the pipeline that loads ahead of the products


def tiling(dims: int, dtype: torch.dtype) -> Tiling:
    """Return tile sizes for a head size that is a power of two from 32 to MAX_HEAD_SIZE. They fit
    the registers, and 99 KiB of shared memory, of every GPU from sm_80 on: a test compiles them."""
    num_warps = 4 if dims < 128 else 8
    if dtype == torch.float32:
        return Tiling(64, dims, num_warps, 1) if dims <= 128 else Tiling(32, 64, num_warps, 1)
    return Tiling(64 if dims <= 256 else 32, dims, num_warps, 2 if dims < 128 else 1)


def attend_in_blocks(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """q [A, T, D]; keys, values [B, S, D]; visible bool [T, S]; scale of the scores -> [A, T, D] in
    q's dtype; all on one CUDA device. D <= MAX_HEAD_SIZE.

    The bits of a row do not depend on hidden slots, their number or what is in them, on the other
    rows, or on its place among them. A row that sees nothing becomes zeros. Does not wait for the
    device.
    """
    (num_heads, num_rows, head_size), (num_kv_heads, num_slots, _) = q.shape, keys.shape
    assert q.dtype == keys.dtype == values.dtype and visible.dtype == torch.bool
    assert keys.shape == values.shape == (num_kv_heads, num_slots, head_size)
    assert visible.shape == (num_rows, num_slots)
    assert num_heads % num_kv_heads == 0 and head_size <= MAX_HEAD_SIZE and scale > 0
    assert keys[0].is_contiguous() and values[0].is_contiguous() and q.stride(2) == 1
    visible, out = visible.contiguous(), torch.empty_like(q)
    assert out.stride(2) == 1
    repeats, dims = num_heads // num_kv_heads, max(32, triton.next_power_of_2(head_size))
    at_once = attention_sections(num_slots)
    size = attention_blocks_bytes(num_heads, num_rows, num_slots, head_size)
    scratch = torch.empty(size // 4, dtype=torch.int32, device=q.device)
    # Where sections come in turns, the last results are of all sections before.
    results = attention_results(num_slots) * num_heads * num_rows
    sizes = num_rows * num_slots, num_rows * 2, results * 2, results * head_size
    slots, counts, weights, sums = scratch.split(sizes)
    _list_slots[(num_rows,)](visible.view(torch.int8), slots, counts, num_slots, BLOCK=LIST_BLOCK)
    tiles, form = triton.cdiv(num_rows * repeats, ROWS), tiling(dims, q.dtype)
    for first in range(0, triton.cdiv(num_slots, ATTENTION_SECTION), at_once):
        _attend_section[(tiles, num_kv_heads, at_once)](
            q,
            keys,
            values,
            slots,
            counts,
            weights.view(torch.float32),
            sums.view(torch.float32),
            q.stride(0),
            q.stride(1),
            keys.stride(0),
            values.stride(0),
            num_rows,
            num_slots,
            first,
            scale * 1.4426950408889634,  # log2(e)
            REPEATS=repeats,
            HEAD_SIZE=head_size,
            DIMS=dims,
            CHUNK=form.chunk,
            TILE=ROWS,
            BLOCK=form.block,
            SECTION=ATTENTION_SECTION,
            num_warps=form.num_warps,
            num_stages=form.num_stages,
        )
        _combine[(num_rows, num_heads)](
            out,
            counts,
            weights.view(torch.float32),
            sums.view(torch.float32),
            out.stride(0),
            out.stride(1),
            first,
            at_once,
            triton.cdiv(num_slots, ATTENTION_SECTION),
            HEAD_SIZE=head_size,
            DIMS=dims,
            SECTION=ATTENTION_SECTION,
            num_warps=1,
        )
    return out


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["visible"])
def _list_slots(
    visible: tl.tensor,  # int8 [T, S], 0 or 1
    slots: tl.tensor,  # int32 [T, S]: the slot of each place from the first that differs from it
    counts: tl.tensor,  # int32 [T, 2]: seen slots, and how many of them come before a hidden one
    num_slots: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    visible += row.to(tl.int64) * num_slots
    slots += row.to(tl.int64) * num_slots
    lane = tl.arange(0, BLOCK)
    count = 0
    leading = num_slots
    for first in range(0, num_slots, BLOCK):
        slot = first + lane
        seen = tl.load(visible + slot, mask=slot < num_slots, other=0).to(tl.int32)
        count += tl.sum(seen, 0)
        leading = tl.minimum(leading, tl.min(tl.where(seen > 0, num_slots, slot), 0))
    tl.store(counts + row * 2, count)
    tl.store(counts + row * 2 + 1, leading)
    before = leading // BLOCK * BLOCK
    end = tl.where(count == leading, 0, num_slots)  # nothing to list
    for first in range(before, end, BLOCK):
        slot = first + lane
        seen = tl.load(visible + slot, mask=slot < num_slots, other=0).to(tl.int32)
        place = before + tl.cumsum(seen, 0) - 1
        tl.store(slots + place, slot, mask=seen > 0)
        before += tl.sum(seen, 0)


@triton.jit(
    do_not_specialize=["q_head_stride", "num_rows", "num_slots", "first_section"],
    do_not_specialize_on_alignment=["q", "slots", "counts", "weights", "sums"],
)
def _attend_section(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    counts: tl.tensor,
    weights: tl.tensor,  # f32 [results, T, A, 2]: the largest score, the sum of the weights
    sums: tl.tensor,  # f32 [results, T, A, D], of weighted values
    q_head_stride: tl.tensor,
    q_row_stride: tl.tensor,
    keys_stride: tl.tensor,
    values_stride: tl.tensor,
    num_rows: tl.tensor,
    num_slots: tl.tensor,
    first_section: tl.tensor,
    scale: tl.tensor,  # of scores whose power of two is the weight
    REPEATS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,  # D rounded up to a power of two
    CHUNK: tl.constexpr,  # dimensions of scores that are multiplied at a time
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SECTION: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    section = tl.program_id(2)
    first_place = (first_section + section) * SECTION

    # The query heads of the first row, then those of the next.
    entry = tile * TILE + tl.arange(0, TILE)
    row = entry // REPEATS
    inside = row < num_rows
    head = kv_head * REPEATS + entry % REPEATS
    count = tl.load(counts + row * 2, mask=inside, other=0)
    leading = tl.load(counts + row * 2 + 1, mask=inside, other=2147483647)
    end = tl.minimum(tl.max(count, 0), first_place + SECTION)
    num_blocks = tl.maximum(end - first_place + BLOCK - 1, 0) // BLOCK
    num_shared = tl.maximum(tl.min(leading, 0) - first_place, 0) // BLOCK
    num_shared = tl.minimum(num_shared, num_blocks)
    first_row = tile * TILE // REPEATS
    last_row = tl.minimum((tile * TILE + TILE - 1) // REPEATS, num_rows - 1)
    num_own = last_row - first_row + 1

    lane = tl.arange(0, BLOCK)
    dim = tl.arange(0, DIMS)
    in_head = dim < HEAD_SIZE
    q += head.to(tl.int64) * q_head_stride + row * q_row_stride
    if CHUNK == DIMS:
        is_query = inside[:, None] & in_head[None, :]
        queries = tl.load(q[:, None] + dim[None, :], mask=is_query, other=0.0)
    keys += kv_head.to(tl.int64) * keys_stride
    values += kv_head.to(tl.int64) * values_stride
    most = tl.full([TILE], _LOWEST, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    result = tl.zeros([TILE, DIMS], tl.float32)
    for step in range(num_shared + (num_blocks - num_shared) * num_own):
        # 1. The slots of the block's places in all rows, or in the row `only`.
        is_shared = step < num_shared
        own_step = tl.maximum(step - num_shared, 0)
        block = tl.where(is_shared, step, num_shared + own_step // num_own)
        only = first_row + own_step % num_own
        only_count = tl.load(counts + only * 2)
        only_leading = tl.load(counts + only * 2 + 1)
        place = first_place + block * BLOCK + lane
        exists = is_shared | (place < only_count)
        is_listed = exists & (is_shared == 0) & (place >= only_leading)
        listed = slots + only.to(tl.int64) * num_slots + place
        slot = tl.where(is_listed, tl.load(listed, mask=is_listed, other=0), place)
        where = slot[:, None] * HEAD_SIZE + dim[None, :]
        is_held = exists[:, None] & in_head[None, :]

        # 2. Scores, in f32. Queries that would not fit registers are loaded again.
        scores = tl.zeros([TILE, BLOCK], tl.float32)
        if CHUNK == DIMS:
            key = tl.load(keys + where, mask=is_held, other=0.0)
            scores = _product(queries, tl.trans(key), scores)
        else:
            for first_dim in range(0, HEAD_SIZE, CHUNK):
                some = first_dim + tl.arange(0, CHUNK)
                in_both = inside[:, None] & (some < HEAD_SIZE)[None, :]
                query = tl.load(q[:, None] + some[None, :], mask=in_both, other=0.0)
                in_both = exists[:, None] & (some < HEAD_SIZE)[None, :]
                key_place = slot[:, None] * HEAD_SIZE + some[None, :]
                key = tl.load(keys + key_place, mask=in_both, other=0.0)
                scores = _product(query, tl.trans(key), scores)
        scores = tl.fma(scores, scale, 0.0)
        takes_part = inside & (is_shared | (row == only))
        scores = tl.where(takes_part[:, None] & exists[None, :], scores, float("-inf"))

        # 3. Weights, and their sums. Where a row takes no part, `most` remains and `fade` is 1.
        higher = tl.maximum(most, tl.max(scores, 1))
        fade = tl.exp2(most - higher)
        most = higher
        weight = tl.exp2(scores - higher[:, None])
        total = tl.fma(total, fade, tl.sum(weight, 1))
        value = tl.load(values + where, mask=is_held, other=0.0)
        added = _weighted(weight, value, result * fade[:, None])
        result = tl.where(takes_part[:, None], added, result)

    # Rows without a place in this section leave nothing: _combine does not look.
    target = (section * num_rows + row) * (tl.num_programs(1) * REPEATS) + head
    leaves = inside & (count > first_place)
    tl.store(weights + target * 2, most, mask=leaves)
    tl.store(weights + target * 2 + 1, total, mask=leaves)
    sums += target.to(tl.int64)[:, None] * HEAD_SIZE + dim[None, :]
    tl.store(sums, result, mask=leaves[:, None] & in_head[None, :])


@triton.jit
def _product(a: tl.tensor, b: tl.tensor, sums: tl.tensor) -> tl.tensor:
    if a.dtype == tl.float32:
        return tl.dot(a, b, sums, input_precision="tf32x3")
    else:
        return tl.dot(a, b, sums)


@triton.jit
def _weighted(weight: tl.tensor, value: tl.tensor, sums: tl.tensor) -> tl.tensor:
    """sums + weight @ value; for f16 times _F16_SCALE, `sums` as well."""
    if value.dtype == tl.float32:
        return _product(weight, value, sums)
    elif value.dtype == tl.float16:
        weight = weight * _F16_SCALE
        high = weight.to(tl.float16)
        rest = weight - high.to(tl.float32)
        sums = tl.dot(rest.to(tl.float16), value, sums)
        return tl.dot(high, value, sums)
    else:
        high = weight.to(tl.bfloat16)
        rest = weight - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        rest = rest - middle.to(tl.float32)
        sums = tl.dot(rest.to(tl.bfloat16), value, sums)
        sums = tl.dot(middle, value, sums)
        return tl.dot(high, value, sums)


@triton.jit(
    do_not_specialize=["out_head_stride", "first_section", "num_sections", "all_sections"],
    do_not_specialize_on_alignment=["out", "counts", "weights", "sums"],
)
def _combine(
    out: tl.tensor,
    counts: tl.tensor,
    weights: tl.tensor,
    sums: tl.tensor,
    out_head_stride: tl.tensor,
    out_row_stride: tl.tensor,
    first_section: tl.tensor,
    num_sections: tl.tensor,  # at a time
    all_sections: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    SECTION: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    head = tl.program_id(1)
    results = tl.num_programs(0) * tl.num_programs(1)
    place = row * tl.num_programs(1) + head
    dim = tl.arange(0, DIMS)
    in_head = dim < HEAD_SIZE
    kept = num_sections * results + place
    is_later = first_section > 0
    most = tl.load(weights + kept * 2, mask=is_later, other=_LOWEST)
    total = tl.load(weights + kept * 2 + 1, mask=is_later, other=0.0)
    kept_sums = sums + kept.to(tl.int64) * HEAD_SIZE + dim
    result = tl.load(kept_sums, mask=in_head & is_later, other=0.0)
    left = tl.cdiv(tl.load(counts + row * 2), SECTION) - first_section
    for section in range(tl.minimum(left, num_sections)):
        at = section * results + place
        section_most = tl.load(weights + at * 2)
        higher = tl.maximum(most, section_most)
        fade = tl.exp2(most - higher)
        share = tl.exp2(section_most - higher)
        most = higher
        total = tl.fma(total, fade, tl.load(weights + at * 2 + 1) * share)
        added = tl.load(sums + at.to(tl.int64) * HEAD_SIZE + dim, mask=in_head, other=0.0)
        result = tl.fma(result, fade, added * share)
    is_kept = first_section + num_sections < all_sections
    tl.store(weights + kept * 2, most, mask=is_kept)
    tl.store(weights + kept * 2 + 1, total, mask=is_kept)
    tl.store(kept_sums, result, mask=in_head & is_kept)
    if out.dtype.element_ty == tl.float16:
        result = result * (1.0 / _F16_SCALE)
    # A row that sees nothing has no weight; zeros of either sign become +0.
    mean = tl.div_rn(result, tl.where(total == 0.0, 1.0, total)) + 0.0
    target = out + head.to(tl.int64) * out_head_stride + row * out_row_stride + dim
    tl.store(target, mean.to(out.dtype.element_ty), mask=in_head)
