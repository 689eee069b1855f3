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
from subspec.runtime.model.delta_rule import (
    convolve,
    convolve_written,
    gated_norm,
    gates,
    rates,
    step,
)
from subspec.runtime.model.paths import Paths

SOURCE = Path(__file__).parents[1] / "kernels" / "delta_net.cpp"


@dataclass(frozen=True)
class DeltaState:
    """State of one layer after the committed tokens."""

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
    """A row, and the state that takes the layer's state after it."""

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
    return in_parts(weights, state, paths, inputs, z, ends, walk_on(z.device))


def commit(weights: DeltaWeights, state: DeltaState, paths: Paths, inputs: DeltaInputs) -> None:
    """Advance the state by rows that follow one another, with the bits of a prefill of their
    tokens. Outputs of the rows are not computed."""
    device = state.memory.device
    if device.type == "cpu" and unavailable() is None:
        commit_in_cpp(weights, state, paths, inputs)
    else:
        commit_in_parts(weights, state, paths, inputs, walk_on(device))


def walk_on(device: torch.device) -> Walk:
    compiled = device.type == "cuda" and triton_driver.unavailable(device) is None
    return walk_on_cuda if compiled else walk


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((f"num_{what}", ctypes.c_int64) for what in ("rows", "key_heads", "value_heads")),
        *((what, ctypes.c_int64) for what in ("key_size", "value_size", "conv_kernel_size")),
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
    """Why `delta_net_in_cpp` cannot be used, or None if it can. Builds delta_net.cpp if needed."""
    return cpp.unavailable(SOURCE, _declare)


def delta_net_in_cpp(
    weights: DeltaWeights,
    state: DeltaState,
    paths: Paths,
    inputs: DeltaInputs,
    z: Tensor,
    ends: Sequence[End],
) -> Tensor:
    """Compute the bits of the plain twin. Needs unavailable() to be None."""
    out = torch.empty(z.shape, dtype=z.dtype)
    out[len(paths) :] = 0
    run_in_cpp(weights, state, paths, inputs, (z, out), ends)
    return out


def commit_in_cpp(
    weights: DeltaWeights, state: DeltaState, paths: Paths, inputs: DeltaInputs
) -> None:
    """Compute the bits of `commit_in_parts`. Needs unavailable() to be None."""
    run_in_cpp(weights, state, paths, inputs, None, [End(len(paths) - 1, state)])


def run_in_cpp(
    weights: DeltaWeights,
    state: DeltaState,
    paths: Paths,
    inputs: DeltaInputs,
    results: tuple[Tensor, Tensor] | None,
    ends: Sequence[End],
) -> None:
    """Run rows in C++. results: z, and the tensor for the outputs; None: only states are
    updated."""
    num_heads, key_size, value_size = state.memory.shape
    qkv, a, b, dtype = inputs.qkv, inputs.a, inputs.b, inputs.qkv.dtype
    z, out = results or (None, None)
    rows = (qkv, a, b) if z is None else (qkv, a, b, z)
    assert state.conv.dtype == dtype and all(x.dtype == dtype for x in rows)
    assert all(x.stride(1) == 1 for x in rows) and state.conv.is_contiguous()
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
        *(0 if x is None else x.data_ptr() for x in (state.conv, qkv, a, b, z)),
        *(0 if x is None else x.stride(0) for x in (qkv, a, b, z)),
        0 if out is None else out.data_ptr(),
        0 if out is None else out.stride(0),
        *(x.data_ptr() for x in (*small, state.memory)),
        *(x.data_ptr() for x in (paths.windows, paths.sources, paths.slots, end_rows, memories)),
    )
    num_threads = torch.get_num_threads()
    of_head = key_size, value_size, sizes.conv_kernel_size
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


def leave_inputs(state: DeltaState, paths: Paths, inputs: DeltaInputs, ends: Sequence[End]) -> None:
    """Write the last inputs of the convolution to each end; ends may include `state` itself."""
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
    """The plain twin of `delta_net`."""
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
    q, k, v = convolve(weights.conv, before, paths.windows, state.memory.shape)
    decay, beta = gates_of(weights, inputs, num_rows)
    read = walk(state.memory, paths, (q, k, v, decay, beta), ends)
    gate = z[:num_rows].unflatten(1, (num_heads, -1))
    out[:num_rows] = gated_norm(weights.norm, weights.epsilon, read, gate).flatten(1)
    for end in ends:
        end.state.conv.copy_(before[paths.windows[end.row, 1:]])
    return out


def commit_in_parts(
    weights: DeltaWeights, state: DeltaState, paths: Paths, inputs: DeltaInputs, walk: Walk
) -> None:
    """Advance the state. Nothing reads the memories: k stands for q, because the same kernel gives
    the same bits."""
    before = torch.cat((state.conv, inputs.qkv))
    k, v = convolve_written(weights.conv, before, paths.windows, state.memory.shape)
    decay, beta = gates_of(weights, inputs, len(paths))
    walk(state.memory, paths, (k, k, v, decay, beta), [End(len(paths) - 1, state)])
    state.conv.copy_(before[paths.windows[-1, 1:]])


def gates_of(weights: DeltaWeights, inputs: DeltaInputs, num_rows: int) -> tuple[Tensor, Tensor]:
    a, b = inputs.a[:num_rows], inputs.b[:num_rows]
    return gates(weights.decay_log, weights.step_bias, a, b)


def walk(memory: Tensor, paths: Paths, rows: Sequence[Tensor], ends: Sequence[End]) -> Tensor:
    """Apply the rule along the paths. memory f32 [J, E, F], of the committed tokens; rows: q, k, v,
    decay and beta -> f32 [N, J, F]."""
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
    """`walk` by delta_net_triton.py. All ends are behind the last row, the first one on the GPU."""
    from subspec.runtime.kernels import delta_net_triton  # triton: only where there is a GPU

    assert paths.steps is not None and all(end.row == len(paths) - 1 for end in ends)
    left = ends[0].state.memory[None] if ends else memory.new_empty(0, *memory.shape)
    read: Tensor = delta_net_triton.walk(memory, paths.steps, rows, left)
    for end in ends[1:]:
        end.state.memory.copy_(left[0])
    return read
