"""Functions made of sums, products, quotients and square roots, each rounded as IEEE 754 says.

torch's own f32 functions on CPUs round the last numbers of a tensor, and of each thread's share of
one, otherwise than the others. The bits of these depend on the number alone, and C++ that computes
the same operations has them too.
"""

import torch
from torch import Tensor

NUM_SUMS = 8  # partial sums of every reduction
LOG2_E = 1.4426950408889634


def ordered_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over one dimension: partial sums of every NUM_SUMS-th number, then pairwise halves."""
    x = x.movedim(dim, 0)
    sums = x.new_zeros(NUM_SUMS, *x.shape[1:])
    for first in range(0, len(x), NUM_SUMS):
        some = x[first : first + NUM_SUMS]
        sums[: len(some)] += some
    while len(sums) > 1:
        half = len(sums) // 2
        sums = sums[:half] + sums[half:]
    return sums[0]


def square_root(x: Tensor) -> Tensor:
    """Correctly rounded square root of f32 x, which torch's is not. f64 suffices: the root of a
    24-bit number is farther from the middle of two f32 numbers than the error of f64."""
    return x.double().sqrt().float()


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
    """Sigmoid in x's dtype."""
    power = exp_of_negative(-x.float().abs())
    return (torch.where(x < 0, power, torch.ones_like(power)) / (power + 1)).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU of f32 x."""
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
