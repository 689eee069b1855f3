"""Aggregate figures over many answers, with confidence intervals. docs/bench.md defines them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist, mean, stdev

import numpy as np

from subspec.runtime.bench.records import Costs

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A value and its interval. low, high: None for a single value, which has no interval."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)

    def through(self, rising: Callable[[float], float]) -> "Interval":
        return Interval(rising(self.value), *map(rising, self.ends or ()))

    def shown(self, form: Callable[[float], str]) -> str:
        ends = f" [{', '.join(map(form, self.ends))}]" if self.ends else ""
        return f"{form(self.value)}{ends}"

    def __str__(self) -> str:
        return self.shown("{:.3g}".format)


@dataclass(frozen=True)
class Figures:
    """Figures over all answers. Rates are sums over sums, so that long answers weigh more.

    Answers without tokens, whose prompt did not fit, have no costs: only `answers` counts them.
    Without any token all other figures are 0.
    """

    answers: int  # total
    tokens: int
    decode_tokens_per_second: Interval  # after the first token
    tokens_per_second: float  # prompts included
    first_token_seconds: float  # mean
    accepted_per_round: float  # drafted tokens
    acceptance_length: float  # with the exact model's own token: vLLM's mean acceptance length
    acceptance_rate: float  # accepted tokens / drafted levels
    tau: float  # the official implementation's, by answer, then the mean
    streamed_bytes_per_token: float
    stall_share: float  # of decoding, spent waiting for weights
    peak_bytes: int
    lossy_share: float  # share of tokens that differ from the exact model's


def figures(every: Sequence[Costs]) -> Figures:
    answers = [one for one in every if one.generated_tokens]
    decoded = [one.generated_tokens - 1 for one in answers]
    seconds = [one.decode_seconds for one in answers]
    rounds = sum(len(one.accepted) for one in answers)
    accepted = sum(sum(one.accepted) for one in answers)
    drafted = sum(sum(one.drafted) for one in answers)
    whole = sum(seconds) + sum(one.first_token_seconds for one in answers)
    tokens = sum(one.generated_tokens for one in answers)
    return Figures(
        answers=len(every),
        tokens=tokens,
        decode_tokens_per_second=interval_of_ratio(decoded, seconds),
        tokens_per_second=ratio(tokens, whole),
        first_token_seconds=average([one.first_token_seconds for one in answers]),
        accepted_per_round=ratio(accepted, rounds),
        acceptance_length=ratio(accepted + rounds, rounds),
        acceptance_rate=ratio(accepted, drafted),
        tau=average([one.generated_tokens / (1 + len(one.accepted)) for one in answers]),
        streamed_bytes_per_token=ratio(sum(one.streamed_bytes for one in answers), sum(decoded)),
        stall_share=ratio(sum(one.stream_wait_seconds for one in answers), sum(seconds)),
        peak_bytes=max((one.peak_bytes for one in answers), default=0),
        lossy_share=ratio(sum(one.lossy_tokens for one in answers), tokens),
    )


def ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def average(values: Sequence[float]) -> float:
    return mean(values) if values else 0.0


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation; None for a single value."""
    return stdev(values) if len(values) > 1 else None


def interval_of_ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Return the ratio of sums, with its bootstrap interval over items of the same kind."""
    a, b = np.asarray(above, dtype=float), np.asarray(below, dtype=float)

    def rate(rows: "np.ndarray[tuple[int, ...], np.dtype[np.intp]]") -> float:
        return ratio(float(a[rows].sum()), float(b[rows].sum()))

    return bootstrapped(len(a), rate)


def interval_of_mean(values: Sequence[float]) -> Interval:
    every = np.asarray(values, dtype=float)
    return bootstrapped(len(every), lambda rows: float(every[rows].mean()))


def interval_of_score(scores: Sequence[float]) -> Interval:
    """Return the mean with its interval, Wilson's (1927) if all scores are 0 or 1: a bootstrap over
    20 right answers would have no width."""
    if len(scores) < 2 or not all(one in (0, 1) for one in scores):
        return interval_of_mean(scores)
    number, share = len(scores), mean(scores)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre = share + z * z / (2 * number)
    half = z * sqrt(share * (1 - share) / number + (z / (2 * number)) ** 2)
    low, high = ((centre + off) / (1 + z * z / number) for off in (-half, half))
    return Interval(share, max(0.0, low), min(1.0, high))


def bootstrapped(
    number: int, figure: Callable[["np.ndarray[tuple[int, ...], np.dtype[np.intp]]"], float]
) -> Interval:
    """Return the figure over all rows and its percentiles over resampled rows, with a fixed
    seed."""
    value = figure(np.arange(number))
    if number < 2:
        return Interval(value)
    drawn = np.random.default_rng(0).integers(0, number, (RESAMPLES, number))
    found = [figure(rows) for rows in drawn]
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))
