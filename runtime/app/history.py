"""Compare recorded runs with the plan's predictions: speed, first token, memory, acceptance by
level.

Reads only JSON: no weights, no torch.
"""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from subspec.artifacts.acceptance import added
from subspec.artifacts.common.command import printable
from subspec.artifacts.common.formatting import counted, duration, number
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import USUAL, Draft, Method, Plan
from subspec.artifacts.runs import Run, plan_digest, read_runs, recorded_by

MIN_ANSWERS = 5  # minimum for a hint
MAX_DRIFT = 0.1  # a larger difference from the predicted speed gives a hint
SAME_LINK = 0.99  # a link of at least this share of the plan's rate counts as the plan's


@dataclass(frozen=True)
class Figure:
    """A figure over several answers, and its prediction; None: not predicted."""

    median: float
    lowest: float
    highest: float
    predicted: float | None

    @property
    def drift(self) -> float | None:
        """Relative deviation; 0.1: 10 % more than predicted."""
        return self.median / self.predicted - 1 if self.predicted else None


@dataclass(frozen=True)
class Level:
    level: int
    drafted: int  # rounds that drafted this level
    accepted: int  # rounds that accepted it
    reached: float  # share of all rounds that accepted it
    expected: float  # the same, as predicted


@dataclass(frozen=True)
class Answers:
    """Answers of one decoding method."""

    method: Method
    padded: bool
    answers: int
    tokens: int
    prompt_tokens: float  # median, as the next one
    answer_tokens: float
    tokens_per_second: Figure
    first_token_seconds: Figure
    digests_checked: bool  # every first token includes the digest check
    tokens_per_round: Figure
    fast_peak_bytes: Figure
    levels: tuple[Level, ...]  # of the draft; empty without one


@dataclass(frozen=True)
class History:
    machine: str
    budget_bytes: int
    ways: tuple[Answers, ...]  # of decoding; the plan's own first
    left_out: dict[str, int]  # reason -> number of answers


# Reasons not to compare an answer with the plan's predictions.
OTHER_PLAN, OTHER_MACHINE, SLOWER_LINK = "other_plan", "other_machine", "slower_link"
REASONS = {
    OTHER_PLAN: "under another plan",
    OTHER_MACHINE: "on another machine",
    SLOWER_LINK: "over a slower link",
}


def report(artifact: Artifact, as_json: bool) -> None:
    """Print the comparison on stdout."""
    history = summary(artifact.plan, read_runs(artifact.path))
    hint = hint_of(history, str(artifact.path))
    if as_json:
        print(json.dumps(history_json(history, hint)))
        return
    for line in history_lines(history, artifact.plan, str(artifact.path)):
        print(printable(line))
    if hint:
        print(printable(f"\nhint: {hint}"))


def summary(plan: Plan, runs: Sequence[Run]) -> History:
    digest = plan_digest(plan)
    left_out = Counter(why for run in runs if (why := why_left_out(plan, digest, run)) is not None)
    ways: dict[tuple[bool, Method, bool], list[Run]] = {}
    for run in runs:
        if why_left_out(plan, digest, run) is None:
            ways.setdefault((run.method != plan.method, run.method, run.padded), []).append(run)
    return History(
        machine=plan.machine,
        budget_bytes=plan.budget_bytes,
        ways=tuple(answers_of(plan, some) for _, some in sorted(ways.items())),
        left_out={why: left_out[why] for why in REASONS},
    )


def why_left_out(plan: Plan, digest: str, run: Run) -> str | None:
    """Return the reason why a run is not compared; None if it is."""
    if run.plan != digest:
        return OTHER_PLAN
    if run.machine != plan.machine:
        return OTHER_MACHINE
    said = plan.predicted.get(run.method)
    if run.link_bandwidth is None or said is None or said.stream_seconds <= 0:
        return None
    counted_on = said.streamed_bytes / said.stream_seconds
    return SLOWER_LINK if run.link_bandwidth < SAME_LINK * counted_on else None


def answers_of(plan: Plan, runs: Sequence[Run]) -> Answers:
    """Summarize at least one run, all of one decoding method."""
    newest = runs[-1]
    # The digest check of a first token is not part of the prediction.
    settled = [run for run in runs if not run.includes_digest_check]
    drafts = newest.method != "plain"
    return Answers(
        method=newest.method,
        padded=newest.padded,
        answers=len(runs),
        tokens=sum(run.generated_tokens for run in runs),
        prompt_tokens=median(run.prompt_tokens for run in runs),
        answer_tokens=median(run.generated_tokens for run in runs),
        tokens_per_second=figure(
            [run.tokens_per_second for run in runs], newest.predicted_tokens_per_second
        ),
        first_token_seconds=figure(
            [run.first_token_seconds for run in settled or runs],
            newest.predicted_first_token_seconds,
        ),
        digests_checked=not settled,
        tokens_per_round=figure(
            [(run.generated_tokens - 1) / run.rounds for run in runs],
            tokens_expected(plan.draft_of(newest.method)) if drafts else 1.0,
        ),
        fast_peak_bytes=figure([run.fast_peak_bytes for run in runs], newest.predicted_peak_bytes),
        levels=levels_of(plan, runs) if drafts else (),
    )


def tokens_expected(draft: Draft) -> float:
    return draft.acceptance.acceptance_length(draft.tree)


def figure(values: Sequence[float], predicted: float | None) -> Figure:
    return Figure(median(values), min(values), max(values), predicted)


def levels_of(plan: Plan, runs: Sequence[Run]) -> tuple[Level, ...]:
    draft, rounds = plan.draft_of(runs[-1].method), sum(run.rounds for run in runs)
    tree = draft.tree
    drafted = padded(added(run.drafted for run in runs), tree.depth)
    accepted = padded(added(run.accepted_by_level for run in runs), tree.depth)
    expected = draft.acceptance.acceptance_rates(tree)
    return tuple(
        Level(number, drafts, accepts, accepts / rounds, said)
        for number, (drafts, accepts, said) in enumerate(
            zip(drafted, accepted, expected, strict=True), 1
        )
    )


def padded(counts: tuple[int, ...], depth: int) -> tuple[int, ...]:
    return (*counts, *(0,) * depth)[:depth]


def hint_of(history: History, path: str) -> str | None:
    """Return a command that corrects the plan; None if it is accurate or there is too little
    data."""
    for way in history.ways:
        drift = way.tokens_per_second.drift
        if drift is not None and abs(drift) > MAX_DRIFT and way.answers >= MIN_ANSWERS:
            return f"subspec-plan --calibrate {shlex.quote(path)} updates the plan with these runs"
    return None


# Output: the object of --json, and text


def history_json(history: History, hint: str | None) -> dict[str, Any]:
    """Return the object of --json; docs/commands.md describes its keys."""
    return {
        "schema": "subspec.stats/1",
        "machine": history.machine,
        "budget_bytes": history.budget_bytes,
        "methods": [way_json(way) for way in history.ways],
        "left_out": history.left_out,
        "hint": hint,
    }


def way_json(way: Answers) -> dict[str, Any]:
    return {
        **asdict(way),
        "tokens_per_second": figure_json(way.tokens_per_second),
        "first_token_seconds": figure_json(way.first_token_seconds),
        "tokens_per_round": figure_json(way.tokens_per_round),
        "fast_peak_bytes": figure_json(way.fast_peak_bytes),
    }


def figure_json(some: Figure) -> dict[str, Any]:
    return {**asdict(some), "drift": some.drift}


def history_lines(history: History, plan: Plan, path: str) -> list[str]:
    left_out = ", ".join(
        f"{counted(answers, 'answer')} {REASONS[why]}"
        for why, answers in history.left_out.items()
        if answers
    )
    if not history.ways:
        found = f"no answers are recorded under the current plan of {path}"
        if left_out:
            return [f"{found}; not counted: {left_out}"]
        return [f"{found}: run it first: {recorded_by(plan, path)}"]
    budget = short_size(history.budget_bytes)
    lines = [f"{path}: budget {budget}, planned on {history.machine}"]
    for way in history.ways:
        answers = f"{counted(way.answers, 'answer')}, {counted(way.tokens, 'token')}"
        lines += ["", f"{way_name(way, plan)}: {answers}"]
        lines += aligned_columns(figure_rows(way))
        lines += [f"  {note}" for note in notes_of(way)]
        if way.levels:
            measured = plan.draft_of(way.method).acceptance.measured
            source = "measurements" if measured else "published figures"
            lines += ["", f"acceptance by draft level, predicted from {source}"]
            lines += aligned_columns(level_rows(way.levels))
    return [*lines, "", f"not counted: {left_out}"] if left_out else lines


def way_name(way: Answers, plan: Plan) -> str:
    if way.method != "plain":
        tree = plan.draft_of(way.method).tree
        whose = "" if way.method == "substitute" else f" ({way.method})"
        return f"speculative decoding{whose}, width {tree.width}, depth {tree.depth}"
    return "plain decoding, padded" if way.padded else "plain decoding"


def figure_rows(way: Answers) -> list[tuple[str, ...]]:
    figures = [
        ("tokens/s", way.tokens_per_second, number),
        ("first token", way.first_token_seconds, duration),
        ("peak memory", way.fast_peak_bytes, short_size),
    ]
    if way.levels:
        figures.insert(1, ("tokens per round", way.tokens_per_round, number))
    rows: list[tuple[str, ...]] = [("", "median", "lowest", "highest", "predicted", "difference")]
    for name, some, shown in figures:
        predicted = "-" if some.predicted is None else shown(some.predicted)
        drift = "-" if some.drift is None else f"{some.drift:+.0%}"
        spread = (shown(some.median), shown(some.lowest), shown(some.highest))
        rows.append((name, *spread, predicted, drift))
    return rows


def notes_of(way: Answers) -> list[str]:
    """Notes on conditions that differ from the prediction's."""
    notes = []
    if way.tokens_per_second.predicted is not None:
        notes.append(
            f"predicted for {USUAL.prompt_tokens} tokens of prompt and {USUAL.answer_tokens} of "
            f"answer; the medians here are {way.prompt_tokens:.0f} and {way.answer_tokens:.0f}"
        )
    if way.digests_checked:
        notes.append("first tokens include the digest check: no run had a second answer")
    return notes


def level_rows(levels: Sequence[Level]) -> list[tuple[str, ...]]:
    """Rows for levels 1, 2, 4, 8, ... and the deepest."""
    rows: list[tuple[str, ...]] = [("level", "drafted", "accepted to here", "predicted")]
    for one in levels:
        if one.level.bit_count() == 1 or one.level == len(levels):
            reached, expected = f"{one.reached:.0%}", f"{one.expected:.0%}"
            rows.append((str(one.level), str(one.drafted), reached, expected))
    return rows


def aligned_columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Format rows as indented lines; the first column is aligned left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
