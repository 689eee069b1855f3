"""docs/commands.md and docs/format.md say what the code does."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from toys import ACCEPTANCE, make_profile, make_spec

from subspec.artifacts.acceptance import Acceptance, Curve, HierarchicalCost
from subspec.artifacts.common.errors import Exit
from subspec.artifacts.format.store import (
    FORMAT_VERSION,
    REQUIRED,
    FileEntry,
    Manifest,
    PartEntry,
    SubstituteEntry,
)
from subspec.artifacts.model import (
    Attention,
    Block,
    DeltaNet,
    Dense,
    DraftHead,
    Eagle3,
    LayerSpec,
    ModelSpec,
    NormStyle,
    QueryGrowth,
    Rope,
    ScaleBlock,
    Source,
)
from subspec.artifacts.plan import (
    BatchDraft,
    Constraints,
    Draft,
    DraftHeadResult,
    HostLedger,
    Ledger,
    Option,
    Placement,
    Plan,
    Point,
    Prediction,
    Tree,
)
from subspec.artifacts.profile import Corrections, KernelCosts, LinkRate, Profile, Timing
from subspec.artifacts.runs import Run
from subspec.planner import cli as plan_cli
from subspec.planner.report.explain import plan_json
from subspec.planner.solve.fastest import fastest_plan
from subspec.runtime import cli as run_cli
from subspec.runtime.app.answer import Answer
from subspec.runtime.bench import cli as bench_cli
from subspec.runtime.bench.layouts import BUILTIN, LAYOUTS
from subspec.runtime.bench.records import KINDS, Costs, Setting
from subspec.runtime.lossy import Lossy
from subspec.runtime.sequence import GenerationParams, Stats
from subspec.runtime.server import cli as serve_cli

DOCS = Path(__file__).parent.parent / "docs"
COMMANDS = (DOCS / "commands.md").read_text("utf-8")
FORMAT = (DOCS / "format.md").read_text("utf-8")
SECTIONS = {
    name: COMMANDS.split(f"\n## {name}\n")[1].split("\n## ")[0]
    for name in ("subspec-plan", "subspec-run", "subspec-serve", "subspec-bench", "Exit codes")
}


def keys(value: object, path: str = "") -> set[str]:
    """Every key of nested objects, with its path."""
    if not isinstance(value, dict):
        return set()
    return {f"{path}.{k}" for k in value}.union(*(keys(v, f"{path}.{k}") for k, v in value.items()))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("subspec-plan", plan_cli.main),
        ("subspec-run", run_cli.main),
        ("subspec-serve", serve_cli.main),
        ("subspec-bench", bench_cli.main),
    ],
)
def test_every_option_is_documented_and_every_documented_one_exists(
    name: str, command: click.Command
) -> None:
    commands = [command, *(command.commands.values() if isinstance(command, click.Group) else ())]
    params = [p for one in commands for p in one.params if isinstance(p, click.Option)]
    real = {o for p in params for o in p.opts if o.startswith("--")}
    cells = [line.split(" | ")[0] for line in SECTIONS[name].splitlines() if line[:3] == "| `"]
    documented = set(re.findall(r"--[a-z-]+", " ".join(c for c in cells if "--" in c)))
    assert documented | {"--full", "--version"} == real | {"--full", "--version"}
    assert name != "subspec-run" or "--full" in SECTIONS[name]


def test_every_method_of_the_benchmarks_is_in_their_options() -> None:
    [row] = [line for line in SECTIONS["subspec-bench"].splitlines() if "`--methods" in line]
    assert set(bench_cli.METHODS) <= set(re.findall(r"`([a-z0-9+-]+)`", row))


def test_every_task_of_the_benchmarks_is_in_their_table() -> None:
    table = (DOCS / "bench.md").read_text("utf-8")
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`([\w-]+)`", " ".join(cells))) == {BUILTIN, *LAYOUTS}


def test_the_rows_of_the_benchmarks_have_the_documented_keys() -> None:
    blocks = (DOCS / "bench.md").read_text("utf-8").split("```json\n")[1:]
    shown = [json.loads(block.split("```")[0]) for block in blocks]
    assert [one["schema"] for one in shown] == list(KINDS)
    for one in shown:
        assert set(one) == set(KINDS[one["schema"]].__dataclass_fields__)
    assert set(shown[1]["costs"]) == set(Costs.__dataclass_fields__)
    assert set(shown[2]["setting"]) == set(Setting.__dataclass_fields__)


def test_the_exit_codes_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", SECTIONS["Exit codes"], re.MULTILINE)
    assert [(int(code), name) for code, name in rows] == [(c.value, c.name.lower()) for c in Exit]


def test_the_plans_json_object_has_the_documented_keys() -> None:
    shown = json.loads(SECTIONS["subspec-plan"].split("```json\n")[1].split("```")[0])
    plan = fastest_plan(make_spec(), make_profile(), 12_000_000, Constraints(), ACCEPTANCE)
    assert keys(plan_json(make_spec(), plan, None)) == keys(shown)


def test_the_runs_json_object_is_explained_key_by_key() -> None:
    shown = json.loads(SECTIONS["subspec-run"].split("```json\n")[1].split("```")[0])
    explained = re.findall(r"`(\w+)`", " ".join(
        line.split(" | ")[0] for line in SECTIONS["subspec-run"].splitlines() if line[:3] == "| `"
    ))  # fmt: skip
    assert set(shown["stats"]) <= set(explained)
    engine: Any = SimpleNamespace(
        method="plain",
        drafter=None,
        draft_temperature=None,
        plan=SimpleNamespace(budget_bytes=1),
        peak=SimpleNamespace(peak_bytes=1),
        predicted_speed_of=lambda sequence: None,
    )
    sequence: Any = SimpleNamespace(stats=Stats("plain"), params=GenerationParams(lossy=Lossy()))
    printed = Answer("text", [5], [1], "eos").as_json(engine, sequence)
    assert keys(printed) == keys(shown)


@pytest.mark.parametrize(
    "kind",
    [ModelSpec, DraftHead, Eagle3, LayerSpec, Block, Attention, QueryGrowth, Dense, NormStyle, Rope,
     Source, Plan, Tree, Placement, Ledger, Prediction, Acceptance, Curve, Option, Point,
     Constraints, BatchDraft, Draft, DraftHeadResult, HierarchicalCost, HostLedger, DeltaNet,
     ScaleBlock, Profile, KernelCosts, Timing, LinkRate, Corrections, Manifest, FileEntry,
     PartEntry, SubstituteEntry, Run],
)  # fmt: skip
def test_every_field_of_the_format_is_named(kind: type) -> None:
    for field in kind.__dataclass_fields__:  # type: ignore[attr-defined]
        assert f"`{field}`" in FORMAT or f'"{field}"' in FORMAT, field


def test_the_format_page_is_of_the_version_that_we_write() -> None:
    assert FORMAT.startswith(f"# The artifact format, version {FORMAT_VERSION}\n")
    assert all(f"`{name}`" in FORMAT for name in REQUIRED)
