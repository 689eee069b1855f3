"""The parts of a gated delta net in plain torch: convolution, gates, rule and gated norm.

All are functions of rounded.py and their like: a row's bits do not depend on its place, nor on the
other rows. delta_net.cpp computes the same operations.
N = rows, K = taps, J = value heads, E / F = sizes of keys and values, C = channels: q, k, v
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from subspec.runtime.model.rounded import (
    exp_of_negative,
    ordered_sum,
    sigmoid,
    silu,
    softplus,
    square_root,
)

L2_EPSILON = 1e-6


def convolve(
    conv: Tensor, before: Tensor, windows: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """conv [C, 1, K], rows `windows` [N, K] of `before` -> q and k f32 [N, J, E] of the lengths
    1 / sqrt(E) and 1, and v f32 [N, J, F]. sizes: J, E, F."""
    num_heads, key_size, value_size = sizes
    taps = conv.float()[:, 0]
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
    return x * (1 / square_root(squares + L2_EPSILON))


def gates(decay_log: Tensor, step_bias: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a, b [N, J] -> f32 [N, J]: the decay of the memory, and the share of a new value."""
    log_decay = rates(decay_log) * softplus(a.float() + step_bias.float())
    return exp_of_negative(-log_decay), sigmoid(b).float()


def rates(decay_log: Tensor) -> Tensor:
    """f32 [J], of the decay."""
    return decay_log.double().exp().float()


def step(
    memory: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule: memory [J, E, F]; q, k [J, E]; v [J, F]; decay, beta [J] -> the memory
    that follows, and what q reads of it [J, F]."""
    known = ordered_sum(memory * k[:, :, None], 1) * decay[:, None]
    change = (v - known) * beta[:, None]
    memory = memory * decay[:, None, None] + change[:, None] * k[:, :, None]
    return memory, ordered_sum(memory * q[:, :, None], 1)


def gated_norm(norm: Tensor, epsilon: float, x: Tensor, gate: Tensor) -> Tensor:
    """x f32 [N, J, F] through an RMSNorm over each head, times silu(gate), in gate's dtype."""
    x = x.to(gate.dtype).float()
    mean = ordered_sum(x * x, 2)[:, :, None] * (1 / x.shape[2])
    x = (x * (1 / square_root(mean + epsilon))).to(gate.dtype)
    return (norm * x * silu(gate.float())).to(gate.dtype)
