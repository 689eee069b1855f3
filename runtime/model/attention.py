"""Grouped-query attention over cache slots: fast for drafts, batch-invariant for all else.

The query heads that share a KV head are folded into rows, so that keys and values are never
repeated and one code serves both devices, chains and trees. The exact functions give a row the same
bits wherever it stands: `attend_in_order`, compiled from attention.cpp for CPUs, because it takes
the slots one by one, `attend_in_blocks` of attention_triton.py for CUDA, because it takes the
slots that a row sees in fixed blocks, and `attend_in_fp64`, the plain twin of both, because it is
far more precise than what it returns.
A = query heads, B = KV heads, T = query rows, S = live slots, D = head size
"""

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec.artifacts.footprint import attention_scratch_bytes, rows_in_fp64
from subspec.artifacts.native import cpp
from subspec.runtime.kernels import triton_driver

SOURCE = Path(__file__).parents[1] / "kernels" / "attention.cpp"
ELEMENT_BITS = {torch.float32: 32, torch.float16: 16, torch.bfloat16: -16}


def attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """q [A, T, D]; keys, values [B, S, D]; visible bool [T, S]; scale of the scores -> [A, T, D]
    in q's dtype."""
    num_heads, num_rows, head_size = q.shape
    repeats = num_heads // keys.shape[0]
    folded = q.to(keys.dtype).reshape(1, keys.shape[0], repeats * num_rows, head_size)
    bias = torch.zeros(visible.shape, dtype=keys.dtype, device=q.device)
    bias.masked_fill_(~visible, float("-inf"))
    output = F.scaled_dot_product_attention(
        folded, keys[None], values[None], attn_mask=bias.repeat(repeats, 1), scale=scale
    )
    # Some kernels on cuda return the rows outermost: no view of that is one of the heads.
    return output.reshape(num_heads, num_rows, head_size).to(q.dtype)


def attend_batch_invariant(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """Batch-invariant `attend`: a row's result does not depend on other rows or masked slots."""
    if q.device.type == "cpu" and unavailable() is None:
        return attend_in_order(q, keys, values, visible, scale)
    if q.device.type == "cuda" and triton_driver.unavailable(q.device) is None:
        from subspec.runtime.kernels import attention_triton  # triton: only where there is a GPU

        if q.shape[2] <= attention_triton.MAX_HEAD_SIZE:
            return attention_triton.attend_in_blocks(q, keys, values, visible, scale)
    return attend_in_fp64(q, keys, values, visible, scale)


def attend_in_order(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """Batch-invariant attention in f32 on CPUs, one slot after the other in ascending order.

    The bits of a row depend only on its q and on the sequence of keys and values that it sees: not
    on masked slots, the other rows, its place among them or the number of threads. A row that sees
    nothing becomes zeros. Needs unavailable() to be None; a build for another instruction set may
    round differently.
    """
    (num_heads, num_rows, head_size), (num_kv_heads, num_slots, _) = q.shape, keys.shape
    assert q.dtype == keys.dtype == values.dtype and visible.dtype == torch.bool
    assert all(tensor.device.type == "cpu" for tensor in (q, keys, values, visible))
    assert keys.shape == values.shape == (num_kv_heads, num_slots, head_size)
    assert visible.shape == (num_rows, num_slots)
    assert num_heads % num_kv_heads == 0 and head_size % 2 == 0
    assert keys[0].is_contiguous() and values[0].is_contiguous() and q.stride(2) == 1
    visible, out = visible.contiguous(), torch.empty_like(q)
    assert out.stride(2) == 1
    num_threads = torch.get_num_threads()
    size = attention_scratch_bytes(num_threads, num_slots, head_size)
    scratch = torch.empty(size, dtype=torch.uint8)
    assert scratch.data_ptr() % 64 == 0, "it is used as vectors"
    cpp.loaded(SOURCE, _declare).subspec_attend(
        num_heads,
        num_kv_heads,
        num_rows,
        num_slots,
        head_size,
        scale,
        ELEMENT_BITS[q.dtype],
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        keys.data_ptr(),
        keys.stride(0),
        values.data_ptr(),
        values.stride(0),
        visible.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        out.stride(1),
        scratch.data_ptr(),
        num_threads,
    )
    return out


def attend_in_fp64(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """The plain twin of `attend_in_order` and `attend_in_blocks`: in fp64, one KV head at a time.

    After rounding to q's dtype the result does not depend on which slots the visible keys are in,
    nor on the number of masked slots between them; masked values must be finite.
    """
    num_rows, repeats, output = q.shape[1], len(q) // len(keys), torch.empty_like(q)
    at_once = rows_in_fp64(repeats) if q.device.type == "cpu" else num_rows  # for memory
    for head in range(len(keys)):
        own = slice(head * repeats, (head + 1) * repeats)
        every, kept = keys[head].double().t(), values[head].double()
        for first in range(0, num_rows, at_once):
            some = slice(first, first + at_once)
            scores = q[own, some].double() @ every
            scores.mul_(scale).masked_fill_(~visible[some], float("-inf"))
            output[own, some] = (scores.softmax(-1) @ kept).to(q.dtype)
    return output


def unavailable() -> str | None:
    """Why `attend_in_order` cannot be used, or None if it can. Builds attention.cpp if needed."""
    return cpp.unavailable(SOURCE, _declare)


def _declare(library: ctypes.CDLL) -> None:
    number, size, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.subspec_attend.restype = None
    library.subspec_attend.argtypes = (
        *(size, size, size, size, size, ctypes.c_double, number),  # A, B, T, S, D, scale, bits
        *(address, size, size),  # q, its strides
        *(address, size, address, size),  # keys and values, their strides over heads
        *(address, address, size, size),  # visible, out, its strides
        *(address, number),  # scratch, threads
    )
