"""The most probable tokens of a draft's logits, by top_k.cpp where it can be used.

T = rows, V = vocabulary
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.native import cpp

SOURCE = Path(__file__).with_name("top_k.cpp")


def unavailable() -> str | None:
    """None if `top_k_compiled` can be used, which builds top_k.cpp if needed; else the reason."""
    return cpp.unavailable(SOURCE, _declare)


def top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """logits [T, V] -> the k largest of each row, the largest first: f32 [T, k] of
    log softmax(logits / temperature), and their ids int64 [T, k]."""
    on_cpu = logits.device.type == "cpu" and logits.dtype == torch.bfloat16
    if on_cpu and unavailable() is None:
        return top_k_compiled(logits, k, temperature)
    return top_k_plainly(logits, k, temperature)


def top_k_plainly(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Plain twin of `top_k_compiled`, and what CUDA uses."""
    logits = logits.float()
    best, ids = logits.topk(k, dim=-1)
    return best / temperature - (logits / temperature).logsumexp(-1, keepdim=True), ids


def top_k_compiled(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The same of bf16 logits in one pass over a row and a second one for its sum, without f32
    copies of it. The bits of a row depend neither on the other rows nor on the number of threads.
    A row with an infinity or NaN has NaN for log-probabilities, but ids of its own all the same.
    Needs unavailable() to be None."""
    num_rows, num_columns = logits.shape
    assert logits.dtype == torch.bfloat16 and logits.stride(1) == 1
    assert 1 <= k <= num_columns and temperature > 0
    out = torch.empty(num_rows, k)
    ids = torch.empty(num_rows, k, dtype=torch.int64)
    cpp.loaded(SOURCE, _declare).subspec_top_k(
        num_rows,
        num_columns,
        logits.data_ptr(),
        logits.stride(0),
        k,
        temperature,
        out.data_ptr(),
        ids.data_ptr(),
        torch.get_num_threads(),
    )
    return out, ids


def _declare(library: ctypes.CDLL) -> None:
    number, size, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.subspec_top_k.restype = None
    library.subspec_top_k.argtypes = (
        *(size, size, address, size),  # rows, columns, logits, their stride
        *(size, ctypes.c_float),  # k, temperature
        *(address, address, number),  # out, ids, threads
    )
