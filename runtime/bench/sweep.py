"""`subspec-bench sweep`: the same prompts under many settings, each a point of a grid."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from subspec.runtime.bench.items import Item, digest_of
from subspec.runtime.bench.records import (
    SAME_IN_A_RUN,
    Costs,
    Setting,
    SweepRow,
    append_row,
    rows_to_resume,
    setting_of,
)
from subspec.runtime.bench.tasks import Asking, answered, opening_of
from subspec.runtime.bench.throughput import warm_up
from subspec.runtime.bench.variants import (
    Source,
    Variant,
    Way,
    measurable,
    opened_engine,
    plans,
)
from subspec.runtime.engine import Engine
from subspec.runtime.lossy import Lossy
from subspec.runtime.text.tokenizer import ChatTokenizer, load_tokenizer


@dataclass(frozen=True)
class Grid:
    """Axes of the grid. rules: lossy rules; None: exact. draft_temperatures: None: the plan's."""

    variants: Sequence[Variant]
    temperatures: Sequence[float] = (0.0,)
    method: Way | None = None
    max_tokens: int = 64
    seed: int = 0
    rules: Sequence[Lossy | None] = (None,)
    draft_temperatures: Sequence[float | None] = (None,)

    @property
    def askings(self) -> list[Asking]:
        return [
            Asking(temperature, self.seed, self.max_tokens, lossy=rule)
            for temperature, rule in product(self.temperatures, self.rules)
        ]


def sweep_rows(
    source: Source,
    grid: Grid,
    items: Sequence[Item],
    out: Path | None,
    notify: Callable[[str], None],
) -> Iterator[SweepRow]:
    """Yield rows as they are measured. Plans that do not fit their budget, or have no memory for
    the method, are reported and skipped. out: file of results to append to; its rows are not
    measured again. Raises SubspecError, for plans before anything is measured."""
    asked = digest_of(items, grid.max_tokens)
    artifacts = plans(source, grid.variants, notify)
    if grid.method is not None:
        artifacts = [artifact for artifact, _ in measurable(artifacts, [grid.method], notify)]
    for artifact, draft_temperature in product(artifacts, grid.draft_temperatures):
        text = load_tokenizer(artifact.path / "tokenizer")
        sharpened = replace(source.how, draft_temperature=draft_temperature)
        with opened_engine(artifact, replace(source, how=sharpened), grid.method) as engine:
            settings = [
                setting_of(engine, one.temperature, one.seed, one.lossy) for one in grid.askings
            ]
            done = rows_to_resume(out, SweepRow, settings[0], SAME_IN_A_RUN) if out else []
            found = {one.setting: one for one in done if one.asked == asked}
            if any(setting not in found for setting in settings):
                warm_up(engine, opening_of(text, items[0]))
            for how, setting in zip(grid.askings, settings, strict=True):
                notify(
                    f"{setting.label}, {engine.plan.budget_bytes} bytes, "
                    f"context {engine.plan.context}, temperature {how.temperature:g}"
                )
                if setting in found:
                    notify(f"which is in {out} already")
                    yield found[setting]
                    continue
                answers = point(engine, text, items, how, setting)
                predicted = engine.predicted_tokens_per_second
                row = SweepRow("subspec.bench.sweep/1", setting, predicted, answers, asked)
                if out is not None:
                    append_row(out, row)
                yield row


def point(
    engine: Engine, text: ChatTokenizer, items: Sequence[Item], how: Asking, setting: Setting
) -> tuple[Costs, ...]:
    rows = [row for item in items for row in answered(engine, text, item, how, setting)]
    return tuple(row.costs for row in rows)
