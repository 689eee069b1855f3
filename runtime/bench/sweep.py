"""`subspec-bench sweep`: the same prompts under many settings, each a point of a grid."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.bench.items import Item
from subspec.runtime.bench.records import Costs, SweepRow, setting_of
from subspec.runtime.bench.tasks import Asking, answered
from subspec.runtime.bench.variants import Source, Variant, Way, opened_engine, planned
from subspec.runtime.engine import Engine
from subspec.runtime.text.tokenizer import ChatTokenizer, load_tokenizer


@dataclass(frozen=True)
class Grid:
    variants: Sequence[Variant]
    temperatures: Sequence[float] = (0.0,)
    method: Way | None = None
    max_tokens: int = 64
    seed: int = 0


def sweep_rows(
    source: Source, grid: Grid, items: Sequence[Item], told: Callable[[str], None]
) -> Iterator[SweepRow]:
    """A row at a time. A plan that does not fit its budget is told and left out."""
    for variant in grid.variants:
        try:
            artifact = planned(source, variant)
        except SubspecError as error:
            if error.exit_code != Exit.INFEASIBLE:
                raise
            told(f"left out: {error.message}")
            continue
        text = load_tokenizer(artifact.path / "tokenizer")
        with opened_engine(artifact, source, grid.method) as engine:
            point(engine, text, items[:1], 0.0, Grid(grid.variants, max_tokens=2))  # digests
            for temperature in grid.temperatures:
                tree = engine.plan.tree
                told(
                    f"{engine.method} {tree.width}x{tree.depth}, {engine.plan.budget_bytes} bytes, "
                    f"context {engine.plan.context}, temperature {temperature:g}"
                )
                answers = point(engine, text, items, temperature, grid)
                setting = setting_of(engine, temperature, grid.seed)
                predicted = engine.predicted_tokens_per_second
                yield SweepRow("subspec.bench.sweep/1", setting, predicted, answers)


def point(
    engine: Engine, text: ChatTokenizer, items: Sequence[Item], temperature: float, grid: Grid
) -> tuple[Costs, ...]:
    how = Asking(temperature, grid.seed, grid.max_tokens)
    setting = setting_of(engine, temperature, grid.seed)
    rows = [row for item in items for row in answered(engine, text, item, how, setting)]
    return tuple(row.costs for row in rows)
