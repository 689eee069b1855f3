"""`subspec-bench compare A B`: the same items answered twice, compared item by item."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.bench.counting import Figures, Interval, figures, interval_of_mean, ratio
from subspec.runtime.bench.records import AnswerRow


@dataclass(frozen=True)
class Divergence:
    """The first differing token; None: that answer had ended."""

    task: str
    item: str
    turn: int
    position: int
    a: int | None
    b: int | None


@dataclass(frozen=True)
class Compared:
    """B against A over their common turns. Ratios are geometric means over turns. None: no turn has
    the figure. lossy: a lossy rule accepted drafts of A or B."""

    a_method: str  # labels of its settings
    b_method: str
    lossy: bool
    turns: int
    left_out: int  # turns whose prompts, references or maximum length differ
    identical: int
    divergences: tuple[Divergence, ...]
    speed_ratio: Interval | None  # of tokens/s after the first token
    accepted_difference: Interval | None  # per round, over the turns that both answered in rounds
    score_difference: Interval | None
    a: Figures
    b: Figures


def compare(a: Sequence[AnswerRow], b: Sequence[AnswerRow]) -> Compared:
    """Compare two runs. Raises SubspecError(USAGE) if they have no turn in common."""
    pairs, left_out = pairs_of(a, b)
    if not pairs:
        raise SubspecError(
            Exit.USAGE,
            f"all {left_out} common turns differ in prompt, reference or --max-tokens"
            if left_out
            else f"the files have no turn in common ({len(a)} and {len(b)} turns)",
            "compare two files of subspec-bench tasks with the same --tasks, --data, --seed and "
            "--max-tokens",
        )
    found = [one for pair in pairs if (one := divergence(*pair)) is not None]
    timed = [pair for pair in pairs if rate(pair[0]) and rate(pair[1])]
    ratios = [math.log(rate(other) / rate(one)) for one, other in timed]
    accepted = [
        per_round(other) - per_round(one)
        for one, other in pairs
        if one.costs.accepted and other.costs.accepted
    ]
    scores = [
        other.score - one.score
        for one, other in pairs
        if one.score is not None and other.score is not None
    ]
    return Compared(
        methods_of([one for one, _ in pairs]),
        methods_of([other for _, other in pairs]),
        any(row.setting.lossy is not None for pair in pairs for row in pair),
        len(pairs),
        left_out,
        len(pairs) - len(found),
        tuple(found),
        geometric_mean(ratios),
        mean_interval(accepted),
        mean_interval(scores),
        figures([one.costs for one, _ in pairs]),
        figures([other.costs for _, other in pairs]),
    )


def pairs_of(
    a: Sequence[AnswerRow], b: Sequence[AnswerRow]
) -> tuple[list[tuple[AnswerRow, AnswerRow]], int]:
    """Return pairs of the same turn, and how many are left out: ids are often row numbers, which
    other data also has. Rows without a digest are assumed to match."""
    others = {row.key: row for row in b}
    every = [(row, others[row.key]) for row in a if row.key in others]
    pairs = [
        (one, other)
        for one, other in every
        if one.asked == other.asked or "" in (one.asked, other.asked)
    ]
    return pairs, len(every) - len(pairs)


def methods_of(rows: Sequence[AnswerRow]) -> str:
    return "; ".join(dict.fromkeys(row.setting.label for row in rows))


def geometric_mean(logarithms: Sequence[float]) -> Interval | None:
    found = mean_interval(logarithms)
    return found and found.through(math.exp)


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return the mean with its interval; None without values."""
    return interval_of_mean(values) if values else None


def rate(row: AnswerRow) -> float:
    """Tokens/s after the first token; 0 for fewer than two tokens."""
    return ratio(max(0, row.costs.generated_tokens - 1), row.costs.decode_seconds)


def per_round(row: AnswerRow) -> float:
    return ratio(sum(row.costs.accepted), len(row.costs.accepted))


def divergence(a: AnswerRow, b: AnswerRow) -> Divergence | None:
    """Return the first difference; None if the tokens are identical."""
    if a.token_ids == b.token_ids:
        return None
    shorter = min(len(a.token_ids), len(b.token_ids))
    differing = (at for at in range(shorter) if a.token_ids[at] != b.token_ids[at])
    at = next(differing, shorter)
    first, second = (row.token_ids[at] if at < len(row.token_ids) else None for row in (a, b))
    return Divergence(a.task, a.item, a.turn, at, first, second)


def identical_or_raise(found: Compared) -> str:
    """Return a description of the comparison. Raises SubspecError(UNEXPECTED) if any token
    differs."""
    which = f"A is {found.a_method}, B is {found.b_method}"
    if found.identical == found.turns:
        return f"all {found.turns} turns have identical tokens; {which}"
    first = found.divergences[0]
    of_rule = "a lossy rule may change tokens: only exact answers are promised to be identical"
    raise SubspecError(
        Exit.UNEXPECTED,
        f"{found.turns - found.identical} of {found.turns} turns have other tokens, first "
        f"{first.task} {first.item} at token {first.position}; {which}",
        of_rule if found.lossy else "",
    )


def compared_json(found: Compared) -> dict[str, Any]:
    return {"schema": "subspec.bench.compared/1", **asdict(found)}
