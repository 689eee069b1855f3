"""Rows as readable tables, and as Markdown, JSON, JSON Lines."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import mean
from typing import Literal, TypeVar

from subspec.artifacts.common.formatting import big_number, number
from subspec.artifacts.common.sizes import short_size
from subspec.runtime.bench.counting import Figures, Interval, deviation, figures, interval_of_score
from subspec.runtime.bench.csv_columns import Columns, as_csv
from subspec.runtime.bench.paired import Compared
from subspec.runtime.bench.records import AnswerRow, Setting, SpeedRow, SweepRow, by_task

Form = Literal["md", "csv", "json", "jsonl"]
Row = TypeVar("Row", SpeedRow, AnswerRow, SweepRow)
# Fields in a setting's name besides its label, where settings differ in them; and further fields
# for names that are still equal.
NAMED_BY = (
    "artifact", "budget_bytes", "context", "temperature", "link_bandwidth", "machine", "seed",
)  # fmt: skip
LAST_RESORT = (
    *(one.name for one in fields(Setting) if one.name not in (*NAMED_BY, "plan")), "plan",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Formatted cells. The first `num_names` columns identify a row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_names: int = 1


def mean_and_deviation(values: Sequence[float]) -> str:
    """Format as "12.3 ± 0.4"; a single value as "12.3"."""
    off = deviation(values)
    return number(mean(values)) + ("" if off is None else f" ± {number(off)}")


def names_of(settings: Sequence[Setting], besides: Sequence[str] = ()) -> dict[Setting, str]:
    """Shortest distinct names of settings. besides: fields shown in other columns."""
    every = list(dict.fromkeys(settings))
    parts = [
        part
        for part in NAMED_BY
        if part not in besides and len({getattr(one, part) for one in every}) > 1
    ]

    def named(one: Setting, parts: Sequence[str]) -> str:
        return ", ".join([one.label, *(said(one, part) for part in parts)])

    def told_apart(parts: Sequence[str]) -> int:
        return len({(named(one, parts), *(getattr(one, b) for b in besides)) for one in every})

    for part in LAST_RESORT:
        if told_apart([*parts, part]) > told_apart(parts):
            parts.append(part)
    return {one: named(one, parts) for one in every}


def said(setting: Setting, part: str) -> str:
    """A setting's field as part of its name."""
    value = getattr(setting, part)
    if part in ("artifact", "machine"):
        return str(value)
    if part == "budget_bytes":
        return short_size(setting.budget_bytes)
    if part == "temperature":
        return f"T {setting.temperature:g}"
    if part == "link_bandwidth":
        return f"link {link_limit(setting)}"
    return f"{part} {value[:12] if part == 'plan' else value}"


def link_limit(setting: Setting) -> str:
    limit = setting.link_bandwidth
    return "not limited" if limit is None else f"{short_size(limit)}/s"


SETTING = ("model", "size", "params", "budget", "context", "method")
SHOWN = ("artifact", "budget_bytes", "context")  # of a setting, beside its name


def of_settings(every: Sequence[Setting], more: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Cells of each setting. more: other fields with columns."""
    names = names_of(every, (*SHOWN, *more))
    return [
        (
            one.artifact,
            short_size(one.weight_bytes) if one.weight_bytes else "-",
            big_number(one.num_weights),
            short_size(one.budget_bytes),
            str(one.context),
            names[one],
        )
        for one in every
    ]


def speed_table(rows: Sequence[SpeedRow]) -> Table:
    return Table(
        (*SETTING, "test", "t/s", "accepted/round", "streamed/token", "peak"),
        tuple(
            (
                *setting,
                row.test,
                mean_and_deviation(row.tokens_per_second),
                number(row.accepted_per_round) if row.test.startswith("tg") else "",
                short_size(row.streamed_bytes_per_token) if row.test.startswith("tg") else "",
                short_size(row.peak_bytes),
            )
            for row, setting in zip(rows, of_settings([row.setting for row in rows]), strict=True)
        ),
        num_names=7,
    )


FIGURES = (
    "t/s", "with prompts", "first token", "accepted/round", "acceptance length",
    "acceptance rate", "tau", "streamed/token", "stalled", "peak", "lossy",
)  # fmt: skip


def of_figures(one: Figures) -> tuple[str, ...]:
    if not one.tokens:
        return ("-",) * len(FIGURES)
    return (
        one.decode_tokens_per_second.shown(number),
        number(one.tokens_per_second),
        f"{number(one.first_token_seconds)} s",
        number(one.accepted_per_round),
        number(one.acceptance_length),
        f"{one.acceptance_rate:.0%}",
        number(one.tau),
        short_size(one.streamed_bytes_per_token),
        f"{one.stall_share:.0%}",
        short_size(one.peak_bytes),
        f"{one.lossy_share:.1%}",
    )


def task_table(rows: Sequence[AnswerRow]) -> Table:
    """A row per task and setting, in order of appearance."""
    names = names_of([row.setting for row in rows])
    return Table(
        ("task", "method", "items", "score", *FIGURES),
        tuple(
            (
                task,
                names[setting],
                str(len({row.item for row in some})),
                score_cell(score_of(some)),
                *of_figures(figures([row.costs for row in some])),
            )
            for (setting, task), some in by_task(rows).items()
        ),
        num_names=2,
    )


def score_cell(found: Interval | None) -> str:
    return found.shown("{:.1f}".format) if found else "-"


def score_of(rows: Sequence[AnswerRow]) -> Interval | None:
    """Score in percent; None if nothing was judged."""
    scores = [row.score for row in rows if row.score is not None]
    return interval_of_score(scores).through(lambda one: 100 * one) if scores else None


def sweep_table(rows: Sequence[SweepRow]) -> Table:
    return Table(
        (*SETTING, "temperature", "predicted", *FIGURES),
        tuple(
            (
                *setting,
                f"{row.setting.temperature:g}",
                number(row.predicted_tokens_per_second) if row.predicted_tokens_per_second else "-",
                *of_figures(figures(row.answers)),
            )
            for row, setting in zip(
                rows, of_settings([row.setting for row in rows], ["temperature"]), strict=True
            )
        ),
        num_names=7,
    )


LEFT_OUT = "left out (other prompt, reference or length)"


def compared_table(found: Compared) -> Table:
    first = found.divergences[0] if found.divergences else None
    where = f"{first.task} {first.item}, token {first.position}" if first else "-"
    return Table(
        ("figure", "value [95 %]"),
        (
            *([(LEFT_OUT, str(found.left_out))] if found.left_out else []),
            ("A", found.a_method),
            ("B", found.b_method),
            ("identical turns", f"{found.identical}/{found.turns}"),
            ("first divergence", where),
            ("speed, B over A", str(found.speed_ratio or "-")),
            ("accepted per round, B - A", difference(found.accepted_difference)),
            ("score, B - A", difference(found.score_difference)),
            ("t/s of A", of_figures(found.a)[0]),
            ("t/s of B", of_figures(found.b)[0]),
        ),
    )


def difference(found: Interval | None) -> str:
    if found is None:
        return "-"
    if not any((found.value, *(found.ends or ()))):
        return "0 in every pair"  # an interval of [0, 0] would say so of other items
    return str(found)


def as_markdown(table: Table) -> str:
    """Markdown with aligned columns, numbers to the right."""
    cells = [table.columns, *([cell.replace("|", "\\|") for cell in row] for row in table.rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(table.columns))]

    def line(row: Sequence[str]) -> str:
        shown = (
            cell.ljust(width) if at < table.num_names else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(shown)} |"

    rule = "|".join(
        "-" * (width + 2) if at < table.num_names else "-" * (width + 1) + ":"
        for at, width in enumerate(widths)
    )
    return "\n".join([line(cells[0]), f"|{rule}|", *map(line, cells[1:])]) + "\n"


def written(
    rows: Sequence[Row],
    form: Form,
    table: Callable[[Sequence[Row]], Table],
    columns: Callable[[Sequence[Row]], Columns],
) -> str:
    if form == "md":
        return as_markdown(table(rows))
    if form == "csv":
        return as_csv(columns(rows))
    values = [json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) for row in rows]
    if form == "jsonl":
        return "".join(f"{value}\n" for value in values)
    return json.dumps({"schema": "subspec.bench/1", "rows": [asdict(row) for row in rows]}) + "\n"
