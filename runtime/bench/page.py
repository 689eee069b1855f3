"""`subspec-bench report`: rows of any kind as one HTML page with SVG plots, without scripts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from subspec.artifacts.common.axes import Axis, axis
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.formatting import number
from subspec.artifacts.common.sizes import short_size
from subspec.runtime.bench.counting import Interval, deviation, figures
from subspec.runtime.bench.paired import compare, pairs_of
from subspec.runtime.bench.records import (
    AnswerRow,
    Costs,
    Setting,
    SpeedRow,
    SweepRow,
    by_task,
    of_kind,
)
from subspec.runtime.bench.tables import (
    Table,
    compared_table,
    link_limit,
    mean_and_deviation,
    names_of,
    score_cell,
    score_of,
    speed_table,
    sweep_table,
    task_table,
)
from subspec.templates import load

MARK = b'<meta name="generator" content="subspec-bench report" />'  # identifies our pages
MARKED_BYTES = 1000  # searched at the beginning of a file
MAX_PLANS = 2  # named on the page
MAX_LINES = 6  # of one chart, as many as there are colours
Rows = Sequence[SpeedRow | AnswerRow | SweepRow]


@dataclass(frozen=True)
class Bar:
    """One bar. low, high: ends of its interval, or the value if there is none; positions are shares
    of the longest bar."""

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
    """One section: bar charts for each of `groups`, at most one line chart, and the table."""

    title: str
    about: str
    groups: tuple[tuple[str, tuple[Bar, ...]], ...]
    table: Table
    lines: Lines | None = None


def page(files: Sequence[tuple[str, Rows]]) -> str:
    """Render the rows of result files as HTML. Raises SubspecError(USAGE) if there are none."""
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
        links=unique(map(link_of, settings)),
        versions=unique(f"subspec {one.subspec}" for one in settings if one.subspec),
        drivers=unique(f"driver {one.driver}" for one in settings if one.driver),
        files=[(name, len(some)) for name, some in files],
        plans=unique(one.plan[:12] for one in settings[:MAX_PLANS]),
        num_more=max(0, len({one.plan for one in settings}) - MAX_PLANS),
        parts=parts,
    )


def is_replaceable(file: Path) -> bool:
    """Return True if the file is absent, empty or an older page. Unreadable files are not
    replaceable."""
    try:
        with open(file, "rb") as opened:
            beginning = opened.read(MARKED_BYTES)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return not beginning or MARK in beginning


def link_of(setting: Setting) -> str:
    measured = setting.measured_link_bandwidth
    return link_limit(setting) + (f" (measured {short_size(measured)}/s)" if measured else "")


def unique(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def speed_part(rows: Sequence[SpeedRow]) -> Part:
    groups, names = dict[str, list[Bar]](), names_of([row.setting for row in rows])
    for row in rows:
        value = mean(row.tokens_per_second)
        off = deviation(row.tokens_per_second) or 0.0
        groups.setdefault(row.test, []).append(
            Bar(
                names[row.setting],
                mean_and_deviation(row.tokens_per_second),
                value,
                value - off,
                value + off,
                plain=row.setting.method == "plain",
            )
        )
    about = (
        "pp: prompt tokens, tg: generated tokens, @ d: tokens already in the KV cache. "
        "Tokens/s; the thin line is the standard deviation of the repetitions."
    )
    every = tuple((f"{test}, tokens/s", tuple(bars)) for test, bars in groups.items())
    return Part("Speed", about, every, speed_table(rows))


def task_part(rows: Sequence[AnswerRow]) -> Part:
    every = by_task(rows)
    groups = {
        task: {setting: some for (setting, other), some in every.items() if other == task}
        for _, task in every
    }
    names = names_of([row.setting for row in rows])
    charts = []
    for task, by_setting in groups.items():
        bars = []
        for setting, some in by_setting.items():
            bars.append(rate_bar(setting, names[setting], [row.costs for row in some]))
        charts.append((f"{task}, tokens/s", tuple(bars)))
        scores = [score_bar(setting, names[setting], some) for setting, some in by_setting.items()]
        if judged := tuple(one for one in scores if one is not None):
            charts.append((f"{task}, score", judged))
    about = "Tokens/s after the first token, with its 95 % interval over the items."
    lines = reached_lines(
        {
            f"{task} {names[setting]}": [row.costs for row in some]
            for task, by_setting in groups.items()
            for setting, some in by_setting.items()
        }
    )
    return Part("Tasks", about, tuple(charts), task_table(rows), lines)


def pairs_part(rows: Sequence[AnswerRow]) -> list[Part]:
    """Return the comparison of two settings with the same items; else an empty list."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    if len(settings) != 2:
        return []
    a, b = ([row for row in rows if row.setting == setting] for setting in settings)
    if not pairs_of(a, b)[0]:
        return []
    names = names_of(settings)
    one, other = (names[setting] for setting in settings)
    about = f"Turn by turn: A is {one}, B is {other}. Intervals are over the pairs."
    return [Part("Pairs", about, (), compared_table(compare(a, b)))]


def sweep_part(rows: Sequence[SweepRow]) -> Part:
    names = names_of([row.setting for row in rows])
    bars = tuple(rate_bar(row.setting, names[row.setting], row.answers) for row in rows)
    about = "The same prompts under each setting: tokens/s after the first token, 95 % intervals."
    lines = reached_lines({names[row.setting]: list(row.answers) for row in rows})
    return Part("Sweep", about, (("tokens/s", bars),), sweep_table(rows), lines)


def rate_bar(setting: Setting, name: str, answers: Sequence[Costs]) -> Bar:
    found = figures(answers)
    rate = found.decode_tokens_per_second
    return bar(setting, name, rate.shown(number) if found.tokens else "-", rate)


def score_bar(setting: Setting, name: str, rows: Sequence[AnswerRow]) -> Bar | None:
    """Return the score's bar; None if nothing was judged."""
    found = score_of(rows)
    return None if found is None else bar(setting, name, score_cell(found), found)


def bar(setting: Setting, name: str, text: str, found: Interval) -> Bar:
    low, high = found.ends or (found.value, found.value)
    return Bar(name, text, found.value, low, high, plain=setting.method == "plain")


def reached_lines(answers: dict[str, list[Costs]]) -> Lines | None:
    """Share of rounds that accept each level, for the first groups with a draft."""
    found = list[Line]()
    for name, some in answers.items():
        rounds = [count for one in some for count in one.accepted]
        depth = max((levels for one in some for levels in one.drafted), default=0)
        if depth and len(found) < MAX_LINES:
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
