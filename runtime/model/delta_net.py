"""Gated delta nets (arXiv 2412.06464): a causal convolution and a recurrent memory per head.

A pass takes rows that are a tree over the state that is committed: each row continues its parent's
state, and a prompt or a plain row is a chain. The rule runs row after row, and every operation is a
rounded sum, product, quotient or square root in an order of its own, so a row's bits depend on
nothing but its path: not on its place, the other rows, or how a path was cut into passes.
T = rows, N = rows without padding, K = taps, G / J = key / value heads, E / F = their sizes,
C = channels of the convolution: G E of q, G E of k, J F of v
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_SUMS = 8  # partial sums of every reduction
L2_EPSILON = 1e-6
LOG2_E = 1.4426950408889634


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


def chain_paths(num_rows: int, num_taps: int) -> Paths:
    """Each row follows the one before it."""
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
    taps = [rows]
    for _ in range(num_taps - 1):
        last = taps[-1]  # below -1: as many inputs before the last committed one
        taps.append(torch.where(last < 0, last - 1, parents[last.clamp(min=0)]))
    return torch.stack(taps[::-1], dim=1) + (num_taps - 1)


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
    return delta_net_in_torch(weights, state, paths, inputs, z, ends)


def commit(weights: DeltaWeights, state: DeltaState, inputs: DeltaInputs) -> None:
    """Moves the state on by rows that follow one another: the same bits as if a prompt had held
    their tokens."""
    num_rows = len(inputs.qkv)
    paths = chain_paths(num_rows, weights.conv.shape[-1])
    nothing = inputs.qkv.new_zeros(num_rows, state.memory[:, 0].numel())
    delta_net(weights, state, paths, inputs, nothing, [End(num_rows - 1, state)])


# The plain twin


def delta_net_in_torch(
    weights: DeltaWeights,
    state: DeltaState,
    paths: Paths,
    inputs: DeltaInputs,
    z: Tensor,
    ends: Sequence[End],
) -> Tensor:
    num_rows, num_heads = len(paths), len(weights.step_bias)
    before = torch.cat((state.conv, inputs.qkv))
    windows = paths.windows.to(z.device)
    q, k, v = convolve(weights, before, windows, state.memory.shape)
    decay, beta = gates(weights, inputs.a[:num_rows], inputs.b[:num_rows])
    kept = dict[int, Tensor]()
    memories, found = dict[int, Tensor](), []
    wanted = {end.row for end in ends}
    sources, slots = paths.sources.tolist(), paths.slots.tolist()
    for row, (source, slot) in enumerate(zip(sources, slots, strict=True)):
        memory = state.memory if source < 0 else memories[source]
        memory, out = step(memory, q[row], k[row], v[row], decay[row], beta[row])
        memories[slot] = memory
        found.append(out)
        if row in wanted:
            kept[row] = memory
    for end in ends:
        end.state.memory.copy_(kept[end.row])
        end.state.conv.copy_(before[windows[end.row, 1:]])
    out = torch.zeros_like(z)
    if num_rows:
        gate = z[:num_rows].unflatten(1, (num_heads, -1))
        out[:num_rows] = gated_norm(weights, torch.stack(found), gate).flatten(1)
    return out


def convolve(
    weights: DeltaWeights, before: Tensor, windows: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows `windows` of `before` -> q and k f32 [N, J, E] of the lengths 1 / sqrt(E) and 1, and
    v f32 [N, J, F]. sizes: J, E, F."""
    num_heads, key_size, value_size = sizes
    taps = weights.conv.float()[:, 0]
    mixed = torch.zeros(len(windows), before.shape[1], device=before.device)
    for tap in range(taps.shape[1]):
        mixed = mixed + before[windows[:, tap]].float() * taps[:, tap]
    mixed = silu(mixed.to(before.dtype).float()).to(before.dtype).float()
    of_keys = (before.shape[1] - num_heads * value_size) // 2
    q, k, v = mixed.split((of_keys, of_keys, num_heads * value_size), dim=1)
    q, k = (some.unflatten(1, (-1, key_size)) for some in (q, k))
    repeats = num_heads // q.shape[1]
    q, k = (unit_length(some).repeat_interleave(repeats, dim=1) for some in (q, k))
    return q * key_size**-0.5, k, v.unflatten(1, (num_heads, value_size))


def unit_length(x: Tensor) -> Tensor:
    squares = ordered_sum(x * x, x.dim() - 1)[..., None]
    return x * (1 / (squares + L2_EPSILON).sqrt())


def gates(weights: DeltaWeights, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a, b [N, J] -> f32 [N, J]: the decay of the memory, and the share of a new value."""
    rate = weights.decay_log.float().exp()  # of as many numbers in every pass
    log_decay = rate * softplus(a.float() + weights.step_bias.float())
    return exp_of_negative(-log_decay), sigmoid(b).float()


def step(
    memory: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule: memory [J, E, F]; q, k [J, E]; v [J, F]; decay, beta [J] -> the memory
    that follows, and what q reads of it [J, F]."""
    known = ordered_sum(memory * k[:, :, None], 1) * decay[:, None]
    change = (v - known) * beta[:, None]
    memory = memory * decay[:, None, None] + change[:, None] * k[:, :, None]
    return memory, ordered_sum(memory * q[:, :, None], 1)


def gated_norm(weights: DeltaWeights, x: Tensor, gate: Tensor) -> Tensor:
    """x f32 [N, J, F] through an RMSNorm over each head, times silu(gate), in gate's dtype."""
    x = x.to(gate.dtype).float()
    mean = ordered_sum(x * x, 2)[:, :, None] * (1 / x.shape[2])
    x = (x * (1 / (mean + weights.epsilon).sqrt())).to(gate.dtype)
    return (weights.norm * x * silu(gate.float())).to(gate.dtype)


# Functions of exactly rounded operations: torch's own f32 functions round the last numbers of a
# tensor, and of each thread's share of one, otherwise than the others.


def ordered_sum(x: Tensor, dim: int) -> Tensor:
    """Over one dimension, as partial sums of every NUM_SUMS-th number and then halves of those."""
    x = x.movedim(dim, 0)
    sums = x.new_zeros(NUM_SUMS, *x.shape[1:])
    for first in range(0, len(x), NUM_SUMS):
        some = x[first : first + NUM_SUMS]
        sums[: len(some)] += some
    while len(sums) > 1:
        half = len(sums) // 2
        sums = sums[:half] + sums[half:]
    return sums[0]


def exp_of_negative(x: Tensor) -> Tensor:
    """e^x for f32 x <= 0: power_of_two of exponent.hpp."""
    x = x * LOG2_E
    whole = x.round()
    part = x - whole
    power = part * 0.000153533605 + 0.0013398875
    for factor in (0.00961843692, 0.0555033237, 0.240226477, 0.693147182, 1.0):
        power = power * part + factor
    exponent = whole.clamp(min=-126).to(torch.int32) << 23
    power = (power.view(torch.int32) + exponent).view(torch.float32)
    power = torch.where(x < -126, torch.zeros_like(x), power)
    return torch.where(x.isnan(), x, power)


def sigmoid(x: Tensor) -> Tensor:
    """In x's dtype."""
    power = exp_of_negative(-x.float().abs())
    return (torch.where(x < 0, power, torch.ones_like(power)) / (power + 1)).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """Of f32 x."""
    power = exp_of_negative(-x.abs())
    return x * torch.where(x < 0, power, torch.ones_like(power)) / (power + 1)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) of f32 x: its logarithm is 2 atanh(y / (2 + y)), y = e^-|x|."""
    power = exp_of_negative(-x.abs())
    ratio = power / (power + 2)
    square = ratio * ratio
    series = square * (1 / 17) + 1 / 15
    for odd in (13, 11, 9, 7, 5, 3, 1):
        series = series * square + 1 / odd
    return x.clamp(min=0) + (ratio + ratio) * series
