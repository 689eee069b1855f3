"""Logits -> token. The noise for the token at position p depends on (seed, p) alone, so that
speculation on or off gives the same tokens.

V = vocabulary
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. top_k 0 and top_p 1 keep every token. Raises SubspecError(USAGE) for
    other values than those beside the fields."""

    temperature: float = 0.0  # 0 or more
    top_k: int = 0  # 0 or more
    top_p: float = 1.0  # above 0, at most 1
    seed: int = 0  # 0 to 2**63 - 1

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, and 1 at most"),
            ("seed", 0 <= self.seed < 1 << 63, "0 to 2**63 - 1"),
        ):
            if not fits:
                message = f"{name} is {getattr(self, name)}, expected {expected}"
                raise SubspecError(Exit.USAGE, message)


def choose(logits: Tensor, position: int, sampling: Sampling) -> int:
    """The token at `position`, from its logits [V].

    Gumbel-max: argmax(log p + noise) is distributed as p. Ties go to the lowest id.
    """
    if sampling.temperature > 0:
        noise = position_noise(sampling.seed, position, len(logits), logits.device)
        logits = filter_logits(logits, sampling).add_(noise)
    return int(logits.argmax())


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """f64 [V] after temperature, top-k, top-p, in transformers' order; -inf where cut off."""
    scaled = logits.double() / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        smallest = scaled.topk(sampling.top_k).values[-1]
        scaled.masked_fill_(scaled < smallest, float("-inf"))
    if sampling.top_p < 1:
        kept = scaled.isfinite().nonzero().flatten()  # a sort of them all takes long
        ordered, order = scaled[kept].sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        scaled[kept[order[before >= sampling.top_p]]] = float("-inf")
    return scaled


def position_noise(seed: int, position: int, size: int, device: torch.device) -> Tensor:
    """Gumbel noise, f64 [size], a function of its arguments alone (per kind of device)."""
    generator = torch.Generator(device)
    generator.manual_seed(mix(seed, position))
    uniform = torch.rand(size, dtype=torch.float64, device=device, generator=generator)
    return -torch.log(-torch.log(uniform.clamp_min_(1e-300)))


def mix(seed: int, position: int) -> int:
    """63-bit hash of the pair (splitmix64's finaliser), so that neighbours are unrelated."""
    mask = (1 << 64) - 1
    value = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 1) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = ((value ^ (value >> shift)) * factor) & mask
    return (value ^ (value >> 31)) >> 1
