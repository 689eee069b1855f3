"""Logits -> token. The noise for the token at position p depends on (seed, p) alone, so that tokens
are the same with and without speculation.

V = vocabulary
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.model.constraint import Constraint, ConstraintFollower


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of the sampler. Temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 keep every
    token; a repetition_penalty of 1 and penalties of 0 have no effect. Raises SubspecError(USAGE)
    for values outside the ranges beside the fields."""

    temperature: float = 0.0  # 0 or more
    top_k: int = 0  # 0 or more
    top_p: float = 1.0  # above 0, at most 1
    seed: int = 0  # 0 to 2**63 - 1
    min_p: float = 0.0  # 0 to 1; share of the likeliest token's probability (arXiv 2407.01082)
    # Of tokens in the prompt or the answer (arXiv 1909.05858): above 0
    repetition_penalty: float = 1.0
    # Of tokens in the answer, subtracted once, and once for each time (OpenAI's definition)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # added to the logits of token ids

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, and 1 at most"),
            ("seed", 0 <= self.seed < 1 << 63, "0 to 2**63 - 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number"),
            ("logit_bias", all(math.isfinite(b) for _, b in self.logit_bias), "numbers"),
        ):
            if not fits:
                message = f"{name} is {getattr(self, name)}, expected {expected}"
                raise SubspecError(Exit.USAGE, message)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities by the exact model at one position, before temperature, filters, penalties
    and constraints: of its token, and of the likeliest ones, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Samples the tokens of one answer. A sample may depend on earlier tokens, so each is added
    with `push`; verification adds tokens that may not be kept in a block of `ahead`."""

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: Sequence[int] = (),
        end_tokens: frozenset[int] = frozenset(),
        constraint: Constraint | None = None,
    ) -> None:
        self.sampling = sampling
        self.constraint = (
            ConstraintFollower(constraint, end_tokens) if constraint is not None else None
        )
        self._prompt = frozenset(prompt) if sampling.repetition_penalty != 1 else frozenset[int]()
        self._prompt_ids = torch.tensor(sorted(self._prompt), dtype=torch.int64)
        self._answer: list[int] = []
        self._counts = Counter[int]()  # of the answer's tokens

    @property
    def is_argmax(self) -> bool:
        """Return True if every token is the one with the greatest logit, whatever came before."""
        one = self.sampling
        changes = one.repetition_penalty != 1 or one.presence_penalty or one.frequency_penalty
        return not (one.temperature or changes or one.logit_bias or self.constraint)

    def sample(self, logits: Tensor, position: int) -> int:
        """Sample the token at `position` from its logits [V].

        Gumbel-max: argmax(log p + noise) is distributed as p. Ties go to the lowest id. Raises
        SubspecError if the constraint ends the answer with an error.
        """
        if not self.is_argmax:
            logits = self._allowed(self._penalized(logits))
        if self.sampling.temperature > 0:
            noise = position_noise(self.sampling.seed, position, len(logits), logits.device)
            logits = filter_logits(logits, self.sampling).add_(noise)
        return int(logits.argmax())

    def push(self, token: int) -> None:
        """Append `token` to the answer."""
        self._answer.append(token)
        self._counts[token] += 1
        if self.constraint is not None:
            self.constraint.push(token)

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Undo, at the end of the block, all pushes in it, also after an error."""
        length = len(self._answer)
        try:
            yield
        finally:
            num_pushed = len(self._answer) - length
            for _ in range(num_pushed):
                self._counts[self._answer.pop()] -= 1
            if self.constraint is not None:
                self.constraint.rollback(num_pushed)

    def _penalized(self, logits: Tensor) -> Tensor:
        """Logits with bias and penalties, f64 [V], a copy."""
        changed, one = logits.double(), self.sampling
        counts = +self._counts
        for token, bias in one.logit_bias:  # first, as in transformers and vLLM
            changed[token] += bias
        if one.repetition_penalty != 1:
            self._prompt_ids = self._prompt_ids.to(logits.device)  # once: a prompt may be long
            others = [token for token in counts if token not in self._prompt]
            new_ids = torch.tensor(others, dtype=torch.int64, device=logits.device)
            ids = torch.cat((self._prompt_ids, new_ids))
            some, factor = changed[ids], one.repetition_penalty
            changed[ids] = torch.where(some > 0, some / factor, some * factor)
        if (one.presence_penalty or one.frequency_penalty) and counts:
            ids = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), device=logits.device)
            changed[ids] -= one.presence_penalty + one.frequency_penalty * times.double()
        return changed

    def _allowed(self, logits: Tensor) -> Tensor:
        """The logits [V], in place, -inf where the constraint forbids the token."""
        mask = self.constraint.allowed(len(logits)) if self.constraint is not None else None
        return logits if mask is None else logits.masked_fill_(~mask.to(logits.device), -math.inf)


def logprobs_of(logits: Tensor, token: int, num_top: int) -> TokenLogprobs:
    """Log probabilities of `token` and of the `num_top` likeliest, from the exact model's logits
    [V]."""
    every = logits.double().log_softmax(-1)
    best, ids = every.topk(min(num_top, len(every)))
    top = tuple(zip(ids.tolist(), best.tolist(), strict=True))
    return TokenLogprobs(token, float(every[token]), top)


def filter_logits(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Logits after temperature, top-k, top-p and min-p, in transformers' order: f64 [V], 0 the
    greatest, -inf if filtered out."""
    wide = logits.double()
    scaled = (wide - wide.max()) / sampling.temperature  # at most 0: nothing overflows
    if 0 < sampling.top_k < len(logits):
        smallest = scaled.topk(sampling.top_k).values[-1]
        scaled.masked_fill_(scaled < smallest, float("-inf"))
    if sampling.top_p < 1:
        kept = scaled.isfinite().nonzero().flatten()  # a sort of them all takes long
        ordered, order = scaled[kept].sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        scaled[kept[order[before >= sampling.top_p]]] = float("-inf")
    if sampling.min_p > 0:
        least = scaled.max() + math.log(sampling.min_p)
        scaled.masked_fill_(scaled < least, float("-inf"))
    return scaled


def position_noise(seed: int, position: int, size: int, device: torch.device) -> Tensor:
    """Gumbel noise, f64 [size], a function of its arguments alone (per kind of device)."""
    generator = torch.Generator(device)
    generator.manual_seed(mix(seed, position))
    uniform = torch.rand(size, dtype=torch.float64, device=device, generator=generator)
    return -torch.log(-torch.log(uniform.clamp_min_(1e-300)))


def mix(seed: int, position: int) -> int:
    """63-bit hash of the pair (splitmix64's finaliser), so that neighbours are unrelated. torch's
    generators on CPUs use its low 32 bits: of 4096 tokens two have one noise in 1 of 500 answers.
    """
    mask = (1 << 64) - 1
    value = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 1) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = ((value ^ (value >> shift)) * factor) & mask
    return (value ^ (value >> 31)) >> 1
