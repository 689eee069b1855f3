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
    of_keys = (before.shape[1] - num_heads * value_size) // 2
    mixed = convolved(conv, before, windows)
    q, k, v = mixed.split((of_keys, of_keys, num_heads * value_size), dim=1)
    q = of_heads(q, num_heads, key_size) * key_size**-0.5
    return q, of_heads(k, num_heads, key_size), v.unflatten(1, (num_heads, value_size))


def convolve_written(
    conv: Tensor, before: Tensor, windows: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The k and v of `convolve`: all that is written to a memory."""
    num_heads, key_size, value_size = sizes
    of_keys = (before.shape[1] - num_heads * value_size) // 2
    mixed = convolved(conv[of_keys:], before[:, of_keys:], windows)
    k, v = mixed.split((of_keys, num_heads * value_size), dim=1)
    return of_heads(k, num_heads, key_size), v.unflatten(1, (num_heads, value_size))


def convolved(conv: Tensor, before: Tensor, windows: Tensor) -> Tensor:
    """Convolution and SiLU, f32 [N, C], rounded to the dtype of `before`."""
    taps = conv.float()[:, 0]
    mixed = torch.zeros(len(windows), before.shape[1], device=before.device)
    for tap in range(taps.shape[1]):
        mixed = mixed + before[windows[:, tap]].float() * taps[:, tap]
    return silu(mixed.to(before.dtype).float()).to(before.dtype).float()


def of_heads(x: Tensor, num_heads: int, key_size: int) -> Tensor:
    """x [N, G E] -> [N, J, E], each head normalized to length 1."""
    x = x.unflatten(1, (-1, key_size))
    return unit_length(x).repeat_interleave(num_heads // x.shape[1], dim=1)


def unit_length(x: Tensor) -> Tensor:
    squares = ordered_sum(x * x, x.dim() - 1)[..., None]
    return x * (1 / square_root(squares + L2_EPSILON))


def gates(decay_log: Tensor, step_bias: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a, b [N, J] -> f32 [N, J]: the decay of the memory, and the share of a new value."""
    log_decay = rates(decay_log) * softplus(a.float() + step_bias.float())
    return exp_of_negative(-log_decay), sigmoid(b).float()


def rates(decay_log: Tensor) -> Tensor:
    """Rates of decay, f32 [J]."""
    return decay_log.double().exp().float()


def step(
    memory: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Gated delta rule: memory [J, E, F]; q, k [J, E]; v [J, F]; decay, beta [J] -> the next
    memory, and what q reads of it [J, F]."""
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
