"""Rows as CSV for programs: plain numbers, with units in the column names."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from statistics import mean

from subspec.runtime.bench.counting import Figures, Interval, deviation, figures, interval_of_score
from subspec.runtime.bench.records import AnswerRow, Costs, Setting, SpeedRow, SweepRow, by_task
from subspec.runtime.lossy import Lossy

Cell = str | int | float | None  # None: empty
Columns = list[dict[str, Cell]]  # by row


def of_setting(one: Setting) -> dict[str, Cell]:
    cells = asdict(one)
    rule = cells.pop("lossy") or {field.name: None for field in fields(Lossy)}
    return {"label": one.label, **cells, **rule}


def of_interval(name: str, found: Interval) -> dict[str, Cell]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def of_costs(every: Sequence[Costs]) -> dict[str, Cell]:
    found: Figures = figures(every)
    rate = "decode_tokens_per_second"
    rest = {name: value for name, value in asdict(found).items() if name != rate}
    return {**of_interval(rate, found.decode_tokens_per_second), **rest}


def speed_columns(rows: Sequence[SpeedRow]) -> Columns:
    return [
        {
            **of_setting(row.setting),
            "test": row.test,
            "repeats": len(row.tokens_per_second),
            "tokens_per_second": mean(row.tokens_per_second),
            "tokens_per_second_stdev": deviation(row.tokens_per_second),
            "accepted_per_round": row.accepted_per_round,
            "streamed_bytes_per_token": row.streamed_bytes_per_token,
            "peak_bytes": row.peak_bytes,
        }
        for row in rows
    ]


def task_columns(rows: Sequence[AnswerRow]) -> Columns:
    found = Columns()
    for (setting, task), some in by_task(rows).items():
        scores = [row.score for row in some if row.score is not None]
        score = of_interval("score", interval_of_score(scores)) if scores else {
            "score": None, "score_low": None, "score_high": None,
        }  # fmt: skip
        found.append({
            **of_setting(setting),
            "task": task,
            "items": len({row.item for row in some}),
            "judged": len(scores),
            **score,
            **of_costs([row.costs for row in some]),
        })  # fmt: skip
    return found


def sweep_columns(rows: Sequence[SweepRow]) -> Columns:
    return [
        {
            **of_setting(row.setting),
            "predicted_tokens_per_second": row.predicted_tokens_per_second,
            **of_costs(row.answers),
        }
        for row in rows
    ]


def as_csv(columns: Columns) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns[0]) if columns else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(columns)
    return out.getvalue()
