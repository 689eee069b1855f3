"""Rows as tables for people and programs: Markdown, CSV, JSON, JSON Lines."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Literal

from subspec.artifacts.common.formatting import big_number, number
from subspec.artifacts.common.sizes import short_size
from subspec.runtime.bench.counting import Figures, figures, interval_of_mean
from subspec.runtime.bench.paired import Compared
from subspec.runtime.bench.records import AnswerRow, Setting, SpeedRow, SweepRow

Form = Literal["md", "csv", "json", "jsonl"]
FORMS: tuple[Form, ...] = ("md", "csv", "json", "jsonl")


@dataclass(frozen=True)
class Table:
    """Cells as a person reads them. The first `num_names` columns say what a row is."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_names: int = 1


def spread(values: Sequence[float]) -> str:
    """ "12.3 ± 0.4"."""
    off = stdev(values) if len(values) > 1 else 0.0
    return f"{number(mean(values))} ± {number(off)}"


def of_setting(one: Setting) -> tuple[str, ...]:
    return (
        one.artifact, big_number(one.num_weights), short_size(one.budget_bytes), str(one.context),
        one.label,
    )  # fmt: skip


SETTING = ("model", "size", "budget", "context", "method")


def speed_table(rows: Sequence[SpeedRow]) -> Table:
    return Table(
        (*SETTING, "test", "t/s", "accepted/round", "streamed/token", "peak"),
        tuple(
            (
                *of_setting(row.setting),
                row.test,
                spread(row.tokens_per_second),
                number(row.accepted_per_round) if row.test.startswith("tg") else "",
                short_size(row.streamed_bytes_per_token) if row.test.startswith("tg") else "",
                short_size(row.peak_bytes),
            )
            for row in rows
        ),
        num_names=6,
    )


FIGURES = (
    "t/s", "with prompts", "first token", "accepted/round", "acceptance length",
    "acceptance rate", "tau", "streamed/token", "stalled", "peak", "lossy",
)  # fmt: skip


def of_figures(one: Figures) -> tuple[str, ...]:
    if not one.tokens:
        return ("-",) * len(FIGURES)
    return (
        str(one.decode_tokens_per_second),
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
    """A row per task and setting, in the order in which they come."""
    groups = dict[tuple[Setting, str], list[AnswerRow]]()
    for row in rows:
        groups.setdefault((row.setting, row.task), []).append(row)
    return Table(
        ("task", "method", "items", "score", *FIGURES),
        tuple(
            (
                task,
                setting.label,
                str(len({row.item for row in some})),
                score_of(some),
                *of_figures(figures([row.costs for row in some])),
            )
            for (setting, task), some in groups.items()
        ),
        num_names=2,
    )


def score_of(rows: Sequence[AnswerRow]) -> str:
    scores = [row.score for row in rows if row.score is not None]
    if not scores:
        return "-"
    found = interval_of_mean(scores)
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def sweep_table(rows: Sequence[SweepRow]) -> Table:
    return Table(
        (*SETTING, "temperature", "predicted", *FIGURES),
        tuple(
            (
                *of_setting(row.setting),
                f"{row.setting.temperature:g}",
                number(row.predicted_tokens_per_second) if row.predicted_tokens_per_second else "-",
                *of_figures(figures(row.answers)),
            )
            for row in rows
        ),
        num_names=6,
    )


def compared_table(found: Compared) -> Table:
    first = found.divergences[0] if found.divergences else None
    where = f"{first.task} {first.item}, token {first.position}" if first else "-"
    return Table(
        ("figure", "value [95 %]"),
        (
            ("A", found.a_method),
            ("B", found.b_method),
            ("identical turns", f"{found.identical}/{found.turns}"),
            ("first divergence", where),
            ("speed, B over A", str(found.speed_ratio or "-")),
            ("accepted per round, B - A", str(found.accepted_difference or "-")),
            ("score, B - A", str(found.score_difference or "-")),
            ("t/s of A", of_figures(found.a)[0]),
            ("t/s of B", of_figures(found.b)[0]),
        ),
    )


def as_markdown(table: Table) -> str:
    """Aligned, so that it can be read as it is; numbers to the right."""
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


def as_csv(table: Table) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table.columns, *table.rows])
    return out.getvalue()


def written(
    rows: Sequence[SpeedRow] | Sequence[AnswerRow] | Sequence[SweepRow], table: Table, form: Form
) -> str:
    if form == "md":
        return as_markdown(table)
    if form == "csv":
        return as_csv(table)
    values = [json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) for row in rows]
    if form == "jsonl":
        return "".join(f"{value}\n" for value in values)
    return json.dumps({"schema": "subspec.bench/1", "rows": [asdict(row) for row in rows]}) + "\n"
