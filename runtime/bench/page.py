"""`subspec-bench report`: rows of any kind as one HTML page with SVG plots, without scripts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from subspec.artifacts.common.axes import Axis, axis
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.formatting import number
from subspec.artifacts.common.sizes import short_size
from subspec.runtime.bench.counting import figures, interval_of_mean
from subspec.runtime.bench.paired import compare
from subspec.runtime.bench.records import (
    AnswerRow,
    Costs,
    Setting,
    SpeedRow,
    SweepRow,
    of_kind,
)
from subspec.runtime.bench.tables import (
    Table,
    compared_table,
    speed_table,
    sweep_table,
    task_table,
)
from subspec.templates import load

MOST_PLANS = 2  # that the page names
MOST_LINES = 6  # of one chart, as many as there are colours
Rows = Sequence[SpeedRow | AnswerRow | SweepRow]


@dataclass(frozen=True)
class Bar:
    """low, high: what the value may be; places are shares of the longest bar."""

    name: str
    text: str
    value: float
    low: float
    high: float
    plain: bool


@dataclass(frozen=True)
class Line:
    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Lines:
    x: Axis
    y: Axis
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Part:
    """One section: a chart of bars for each of `groups`, at most one of lines, and the numbers."""

    title: str
    about: str
    groups: tuple[tuple[str, tuple[Bar, ...]], ...]
    table: Table
    lines: Lines | None = None


def page(files: Sequence[tuple[str, Rows]]) -> str:
    """Of the rows of some files. Raises SubspecError(USAGE) if there are none."""
    rows = [row for _, some in files for row in some]
    if not rows:
        raise SubspecError(Exit.USAGE, "the files have no rows", "measure something first")
    parts = list[Part]()
    if speeds := list(of_kind(rows, SpeedRow)):
        parts.append(speed_part(speeds))
    if answers := list(of_kind(rows, AnswerRow)):
        parts.append(task_part(answers))
        parts += pairs_part(answers)
    if points := list(of_kind(rows, SweepRow)):
        parts.append(sweep_part(points))
    settings = list(dict.fromkeys(row.setting for row in rows))
    return load("bench.html").render(
        models=unique(one.artifact for one in settings),
        machines=unique(one.machine for one in settings),
        links=unique(
            "not limited" if one.link_bandwidth is None else f"{short_size(one.link_bandwidth)}/s"
            for one in settings
        ),
        files=[(name, len(some)) for name, some in files],
        plans=unique(one.plan[:12] for one in settings[:MOST_PLANS]),
        num_more=max(0, len({one.plan for one in settings}) - MOST_PLANS),
        parts=parts,
    )


def unique(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def speed_part(rows: Sequence[SpeedRow]) -> Part:
    groups = dict[str, list[Bar]]()
    for row in rows:
        value = mean(row.tokens_per_second)
        off = stdev(row.tokens_per_second) if len(row.tokens_per_second) > 1 else 0.0
        text = f"{number(value)} ± {number(off)}"
        groups.setdefault(row.test, []).append(
            bar(row.setting, rows_differ(rows), text, (value, value - off, value + off))
        )
    about = (
        "pp: tokens of a prompt that are read, tg: tokens that are generated, @ d: tokens in the "
        "cache before. Tokens/s; the thin line is the standard deviation of the repetitions."
    )
    every = tuple((f"{test}, tokens/s", tuple(bars)) for test, bars in groups.items())
    return Part("Speed", about, every, speed_table(rows))


def task_part(rows: Sequence[AnswerRow]) -> Part:
    groups = dict[str, dict[Setting, list[AnswerRow]]]()
    for row in rows:
        groups.setdefault(row.task, {}).setdefault(row.setting, []).append(row)
    parts = differing(list(dict.fromkeys(row.setting for row in rows)))
    charts = []
    for task, by_setting in groups.items():
        bars = []
        for setting, some in by_setting.items():
            bars.append(rate_bar(setting, parts, [row.costs for row in some]))
        charts.append((f"{task}, tokens/s", tuple(bars)))
        scores = [score_bar(setting, parts, some) for setting, some in by_setting.items()]
        if judged := tuple(one for one in scores if one is not None):
            charts.append((f"{task}, score", judged))
    about = "Tokens/s after the first token, with its 95 % interval over the items."
    lines = reached_lines(
        {
            f"{task} {setting.label}".strip(): [row.costs for row in some]
            for task, by_setting in groups.items()
            for setting, some in by_setting.items()
        }
    )
    return Part("Tasks", about, tuple(charts), task_table(rows), lines)


def pairs_part(rows: Sequence[AnswerRow]) -> list[Part]:
    """Of two settings that answered the same items; else nothing."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    if len(settings) != 2:
        return []
    a, b = ([row for row in rows if row.setting == setting] for setting in settings)
    if not {row.key for row in a} & {row.key for row in b}:
        return []
    names = [named(setting, differing(settings)) for setting in settings]
    about = f"Turn by turn: A is {names[0]}, B is {names[1]}. Intervals are over the pairs."
    return [Part("Pairs", about, (), compared_table(compare(a, b)))]


def sweep_part(rows: Sequence[SweepRow]) -> Part:
    settings = [row.setting for row in rows]
    bars = tuple(rate_bar(row.setting, differing(settings), row.answers) for row in rows)
    about = "The same prompts under each setting: tokens/s after the first token, 95 % intervals."
    lines = reached_lines(
        {named(row.setting, differing(settings)): list(row.answers) for row in rows}
    )
    return Part("Sweep", about, (("tokens/s", bars),), sweep_table(rows), lines)


def rate_bar(setting: Setting, parts: Sequence[str], answers: Sequence[Costs]) -> Bar:
    found = figures(answers)
    rate = found.decode_tokens_per_second
    text = (
        f"{number(rate.value)} [{number(rate.low)}, {number(rate.high)}]" if found.tokens else "-"
    )
    return bar(setting, parts, text, (rate.value, rate.low, rate.high))


def score_bar(setting: Setting, parts: Sequence[str], rows: Sequence[AnswerRow]) -> Bar | None:
    """Of 100; None if nothing was judged."""
    scores = [100 * row.score for row in rows if row.score is not None]
    if not scores:
        return None
    found = interval_of_mean(scores)
    text = f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]"
    return bar(setting, parts, text, (found.value, found.low, found.high))


def bar(
    setting: Setting, parts: Sequence[str], text: str, values: tuple[float, float, float]
) -> Bar:
    return Bar(named(setting, parts), text, *values, plain=setting.method == "plain")


def rows_differ(rows: Sequence[SpeedRow]) -> tuple[str, ...]:
    return differing([row.setting for row in rows])


def differing(settings: Sequence[Setting]) -> tuple[str, ...]:
    """What of a setting has to be said to tell these apart."""
    fields = ("artifact", "budget_bytes", "context", "temperature")
    return tuple(f for f in fields if len({getattr(one, f) for one in settings}) > 1)


def named(setting: Setting, parts: Sequence[str]) -> str:
    said = {
        "artifact": setting.artifact,
        "budget_bytes": short_size(setting.budget_bytes),
        "context": f"context {setting.context}",
        "temperature": f"T {setting.temperature:g}",
    }
    return ", ".join([setting.label, *(said[part] for part in parts)])


def reached_lines(answers: dict[str, list[Costs]]) -> Lines | None:
    """The share of rounds that accept each level, for the first of the groups that draft."""
    found = list[Line]()
    for name, some in answers.items():
        rounds = [count for one in some for count in one.accepted]
        depth = max((levels for one in some for levels in one.drafted), default=0)
        if depth and len(found) < MOST_LINES:
            share = tuple(
                (float(level), sum(count >= level for count in rounds) / len(rounds))
                for level in range(depth + 1)
            )
            found.append(Line(name, share))
    if not found:
        return None
    deepest = max(line.points[-1][0] for line in found)
    x = axis(0, deepest, "{:g}".format, least_step=1)
    return Lines(x, axis(0.0, 1.0, "{:.0%}".format), tuple(found))
