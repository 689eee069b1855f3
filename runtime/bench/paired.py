"""`subspec-bench compare A B`: the same items answered twice, compared item by item."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.bench.counting import Figures, Interval, bootstrapped, figures, ratio
from subspec.runtime.bench.records import AnswerRow


@dataclass(frozen=True)
class Divergence:
    """The first token that differs; None: that answer had ended."""

    task: str
    item: str
    turn: int
    position: int
    a: int | None
    b: int | None


@dataclass(frozen=True)
class Compared:
    """B against A over the turns that both have. Ratios are geometric means of the turns' own."""

    turns: int
    identical: int
    divergences: tuple[Divergence, ...]
    speed_ratio: Interval  # of tokens/s after the first token
    accepted_difference: Interval  # per round
    score_difference: Interval | None  # None: nothing is judged
    a: Figures
    b: Figures


def compare(a: Sequence[AnswerRow], b: Sequence[AnswerRow]) -> Compared:
    """Raises SubspecError(USAGE) if they have no turn in common."""
    others = {row.key: row for row in b}
    pairs = [(row, others[row.key]) for row in a if row.key in others]
    if not pairs:
        raise SubspecError(
            Exit.USAGE,
            f"of {len(a)} and {len(b)} turns none is of the same item",
            "compare two files of subspec-bench tasks with the same --tasks and --seed",
        )
    found = [one for pair in pairs if (one := divergence(*pair)) is not None]
    timed = [pair for pair in pairs if rate(pair[0]) and rate(pair[1])]
    ratios = [math.log(rate(other) / rate(one)) for one, other in timed]
    accepted = [per_round(other) - per_round(one) for one, other in pairs]
    scores = [
        other.score - one.score
        for one, other in pairs
        if one.score is not None and other.score is not None
    ]
    speed = mean_interval(ratios)
    return Compared(
        len(pairs),
        len(pairs) - len(found),
        tuple(found),
        Interval(*(math.exp(one) for one in (speed.value, speed.low, speed.high))),
        mean_interval(accepted),
        mean_interval(scores) if scores else None,
        figures([one.costs for one, _ in pairs]),
        figures([other.costs for _, other in pairs]),
    )


def mean_interval(values: Sequence[float]) -> Interval:
    if not values:
        return Interval(0.0, 0.0, 0.0)
    return bootstrapped(len(values), lambda rows: sum(values[at] for at in rows) / len(rows))


def rate(row: AnswerRow) -> float:
    return ratio(row.costs.generated_tokens - 1, row.costs.decode_seconds)


def per_round(row: AnswerRow) -> float:
    return ratio(sum(row.costs.accepted), len(row.costs.accepted))


def divergence(a: AnswerRow, b: AnswerRow) -> Divergence | None:
    """None: the same tokens."""
    if a.token_ids == b.token_ids:
        return None
    shorter = min(len(a.token_ids), len(b.token_ids))
    differing = (at for at in range(shorter) if a.token_ids[at] != b.token_ids[at])
    at = next(differing, shorter)
    first, second = (row.token_ids[at] if at < len(row.token_ids) else None for row in (a, b))
    return Divergence(a.task, a.item, a.turn, at, first, second)


def compared_json(found: Compared) -> dict[str, Any]:
    return {"schema": "subspec.bench.compared/1", **asdict(found)}
