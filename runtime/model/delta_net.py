"""Gated delta nets (arXiv 2412.06464): a causal convolution and a recurrent memory per head.

A pass takes rows that are a tree over the state that is committed: each row continues its parent's
state, and a prompt or a plain row is a chain. The rule runs row after row, and every operation is a
rounded sum, product, quotient or square root in an order of its own, so a row's bits depend on
nothing but its path: not on its place, the other rows, or how a path was cut into passes.
T = rows, N = rows without padding, K = taps, G / J = key / value heads, E / F = their sizes,
C = channels of the convolution: G E of q, G E of k, J F of v
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.footprint import delta_net_scratch_bytes
from subspec.artifacts.native import cpp
from subspec.runtime.kernels import triton_driver
from subspec.runtime.model.attention import ELEMENT_BITS
from subspec.runtime.model.delta_rule import convolve, gated_norm, gates, rates, step
from subspec.runtime.model.paths import Paths, chain_paths

SOURCE = Path(__file__).parents[1] / "kernels" / "delta_net.cpp"


@dataclass(frozen=True)
class DeltaState:
    """Of one layer, after the committed tokens."""

    conv: Tensor  # [K - 1, C], the last inputs of the convolution, in the model's dtype
    memory: Tensor  # f32 [J, E, F]


@dataclass(frozen=True)
class DeltaWeights:
    """A layer's small tensors, as stored: f32, f16 or bf16."""

    conv: Tensor  # [C, 1, K]
    decay_log: Tensor  # [J]; the memory decays by exp(-exp(decay_log) * step)
    step_bias: Tensor  # [J]
    norm: Tensor  # [F]
    epsilon: float


@dataclass(frozen=True)
class DeltaInputs:
    """Products of the rows: all that a state needs to move on."""

    qkv: Tensor  # [T, C]
    b: Tensor  # [T, J], before the sigmoid: how much of a value is written
    a: Tensor  # [T, J], of the step


@dataclass(frozen=True)
class End:
    """Takes what the state is after a row."""

    row: int
    state: DeltaState


# memory, paths, (q, k, v, decay, beta), ends -> f32 [N, J, F]
Walk = Callable[[Tensor, Paths, Sequence[Tensor], Sequence[End]], Tensor]


def delta_net(
    weights: DeltaWeights,
    state: DeltaState,
    paths: Paths,
    inputs: DeltaInputs,
    z: Tensor,
    ends: Sequence[End] = (),
) -> Tensor:
    """z [T, J F], the products of the output gate -> [T, J F] in its dtype, zeros beyond N.

    `state` is only read, unless it is itself the end behind the last row of a chain.
    """
    is_end = any(end.state.memory is state.memory for end in ends)
    assert not is_end or paths.num_slots == 1
    if z.device.type == "cpu" and unavailable() is None:
        return delta_net_in_cpp(weights, state, paths, inputs, z, ends)
    compiled = z.device.type == "cuda" and triton_driver.unavailable(z.device) is None
    return in_parts(weights, state, paths, inputs, z, ends, walk_on_cuda if compiled else walk)


def commit(weights: DeltaWeights, state: DeltaState, inputs: DeltaInputs) -> None:
    """Moves the state on by rows that follow one another: the same bits as if a prompt had held
    their tokens."""
    num_rows = len(inputs.qkv)
    paths = chain_paths(num_rows, weights.conv.shape[-1])
    nothing = inputs.qkv.new_zeros(num_rows, state.memory[:, 0].numel())
    delta_net(weights, state, paths, inputs, nothing, [End(num_rows - 1, state)])


def leave_inputs(state: DeltaState, paths: Paths, inputs: DeltaInputs, ends: Sequence[End]) -> None:
    """The last inputs of the convolution behind each end, some of which may be the state's own."""
    num_before, found = len(state.conv), []
    if not num_before:  # a convolution of one tap
        return
    for end in ends:
        window = paths.windows[end.row, 1:].tolist()  # row by row: so few that indices cost more
        found.append(
            torch.stack(
                [state.conv[i] if i < num_before else inputs.qkv[i - num_before] for i in window]
            )
        )
    for end, rows in zip(ends, found, strict=True):
        end.state.conv.copy_(rows)


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((f"num_{what}", ctypes.c_int64) for what in ("rows", "key_heads", "value_heads")),
        *((what, ctypes.c_int64) for what in ("key_size", "value_size", "num_taps")),
        *((f"num_{what}", ctypes.c_int64) for what in ("slots", "ends")),
        *((f, ctypes.c_float) for f in ("query_scale", "inverse_value_size", "norm_epsilon")),
        ("rounds_norm", ctypes.c_int32),
    ]


class _Tensors(ctypes.Structure):
    _fields_ = [
        *((what, ctypes.c_void_p) for what in ("before", "qkv", "a", "b", "z")),
        *((f"{what}_row", ctypes.c_int64) for what in ("qkv", "a", "b", "z")),
        ("out", ctypes.c_void_p),
        ("out_row", ctypes.c_int64),
        *((what, ctypes.c_void_p) for what in ("taps", "rate", "step_bias", "norm", "memory")),
        *((what, ctypes.c_void_p) for what in ("windows", "sources", "slots", "end_rows", "ends")),
    ]


def unavailable() -> str | None:
    """None if `delta_net_in_cpp` works, which builds delta_net.cpp where that has not been done;
    else why not."""
    return cpp.unavailable(SOURCE, _declare)


def delta_net_in_cpp(
    weights: DeltaWeights,
    state: DeltaState,
    paths: Paths,
    inputs: DeltaInputs,
    z: Tensor,
    ends: Sequence[End],
) -> Tensor:
    """The bits of the plain twin. Needs unavailable() to be None."""
    num_heads, key_size, value_size = state.memory.shape
    qkv, a, b, dtype = inputs.qkv, inputs.a, inputs.b, z.dtype
    assert state.conv.dtype == qkv.dtype == a.dtype == b.dtype == dtype
    assert all(x.stride(1) == 1 for x in (qkv, a, b, z)) and state.conv.is_contiguous()
    out = torch.empty(z.shape, dtype=dtype)
    out[len(paths) :] = 0
    end_rows = torch.tensor([end.row for end in ends], dtype=torch.int64)
    memories = torch.tensor([end.state.memory.data_ptr() for end in ends], dtype=torch.int64)
    stored = (weights.conv, rates(weights.decay_log), weights.step_bias, weights.norm)
    small = [x.float().contiguous() for x in stored]
    assert state.memory.is_contiguous()
    assert all(end.state.memory.is_contiguous() for end in ends)
    sizes = _Sizes(
        len(paths),
        (qkv.shape[1] - num_heads * value_size) // (2 * key_size),
        num_heads,
        key_size,
        value_size,
        weights.conv.shape[-1],
        paths.num_slots,
        len(ends),
        key_size**-0.5,
        1 / value_size,
        weights.epsilon,
        torch.promote_types(weights.norm.dtype, dtype) == dtype,
    )
    tensors = _Tensors(
        *(x.data_ptr() for x in (state.conv, qkv, a, b, z)),
        *(x.stride(0) for x in (qkv, a, b, z)),
        out.data_ptr(),
        out.stride(0),
        *(x.data_ptr() for x in (*small, state.memory)),
        *(x.data_ptr() for x in (paths.windows, paths.sources, paths.slots, end_rows, memories)),
    )
    num_threads = torch.get_num_threads()
    of_head = key_size, value_size, sizes.num_taps
    size = delta_net_scratch_bytes(num_threads, *of_head, paths.num_slots)
    scratch = torch.empty(size, dtype=torch.uint8)
    assert scratch.data_ptr() % 64 == 0, "it is used as vectors"
    cpp.loaded(SOURCE, _declare).subspec_delta_net(
        ctypes.byref(sizes),
        ctypes.byref(tensors),
        ELEMENT_BITS[dtype],
        scratch.data_ptr(),
        num_threads,
    )
    leave_inputs(state, paths, inputs, ends)
    return out


def _declare(library: ctypes.CDLL) -> None:
    library.subspec_delta_net.restype = None
    library.subspec_delta_net.argtypes = (
        *(ctypes.POINTER(_Sizes), ctypes.POINTER(_Tensors), ctypes.c_int),
        *(ctypes.c_void_p, ctypes.c_int),  # scratch, threads
    )


# In parts: on CUDA, and the plain twin


def delta_net_in_torch(
    weights: DeltaWeights,
    state: DeltaState,
    paths: Paths,
    inputs: DeltaInputs,
    z: Tensor,
    ends: Sequence[End],
) -> Tensor:
    """The plain twin."""
    return in_parts(weights, state, paths, inputs, z, ends, walk)


def in_parts(
    weights: DeltaWeights,
    state: DeltaState,
    paths: Paths,
    inputs: DeltaInputs,
    z: Tensor,
    ends: Sequence[End],
    walk: Walk,
) -> Tensor:
    num_rows, num_heads = len(paths), len(weights.step_bias)
    out = torch.zeros_like(z)
    if not num_rows:
        return out
    before = torch.cat((state.conv, inputs.qkv))
    q, k, v = convolve(weights.conv, before, paths.windows.to(z.device), state.memory.shape)
    a, b = inputs.a[:num_rows], inputs.b[:num_rows]
    decay, beta = gates(weights.decay_log, weights.step_bias, a, b)
    read = walk(state.memory, paths, (q, k, v, decay, beta), ends)
    gate = z[:num_rows].unflatten(1, (num_heads, -1))
    out[:num_rows] = gated_norm(weights.norm, weights.epsilon, read, gate).flatten(1)
    leave_inputs(state, paths, inputs, ends)
    return out


def walk(memory: Tensor, paths: Paths, rows: Sequence[Tensor], ends: Sequence[End]) -> Tensor:
    """The rule along the paths. memory f32 [J, E, F], of the committed tokens; rows: q, k, v, decay
    and beta -> f32 [N, J, F]."""
    memories, kept, found = dict[int, Tensor](), dict[int, Tensor](), []
    wanted = {end.row for end in ends}
    sources, slots = paths.sources.tolist(), paths.slots.tolist()
    for row, (source, slot) in enumerate(zip(sources, slots, strict=True)):
        memories[slot], read = step(
            memory if source < 0 else memories[source], *(some[row] for some in rows)
        )
        found.append(read)
        if row in wanted:
            kept[row] = memories[slot]
    for end in ends:
        end.state.memory.copy_(kept[end.row])
    return torch.stack(found)


def walk_on_cuda(
    memory: Tensor, paths: Paths, rows: Sequence[Tensor], ends: Sequence[End]
) -> Tensor:
    """The same by delta_net_triton.py."""
    from subspec.runtime.kernels import delta_net_triton  # triton: only where there is a GPU

    end_rows = list(dict.fromkeys(end.row for end in ends))
    left = memory.new_empty(len(end_rows), *memory.shape) if len(ends) != 1 else None
    read: Tensor = delta_net_triton.walk(
        memory,
        delta_net_triton.steps_of(paths.sources.tolist(), paths.slots.tolist(), end_rows),
        rows,
        ends[0].state.memory[None] if left is None else left,
    )
    if left is not None:
        for end in ends:
            end.state.memory.copy_(left[end_rows.index(end.row)])
    return read
