"""A Plan as a person reads it: the table on the terminal, the artifact's README, the report; and
as a program does: the object of `subspec-plan --json`."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from subspec.artifacts.common.sizes import format_size, short_size, weights_rate
from subspec.artifacts.model import ModelSpec, parts
from subspec.artifacts.plan import USUAL, Plan
from subspec.artifacts.profile import MORE_TOKENS, Profile
from subspec.artifacts.runs import Run
from subspec.planner.report.charts import (
    acceptance_chart,
    budget_chart,
    context_chart,
    runs_chart,
    ticks,
    timeline,
)
from subspec.planner.report.wording import (
    acceptance_line,
    compared_rows,
    correction_rows,
    duration,
    expected,
    in_markdown,
    is_chosen,
    kind_rows,
    ledger_rows,
    margin_of,
    method_name,
    number,
    one_line,
    parameters,
    placement_of,
    round_line,
    speed_line,
    streamed_line,
    width_rows,
)
from subspec.planner.solve.costs import model_bytes
from subspec.planner.solve.outlook import what_more_memory_buys
from subspec.planner.solve.predict import usage_within
from subspec.templates import load

NUM_OPTIONS = 4  # on the terminal; the report shows all
COMMIT = re.compile(r"[0-9a-f]{7,64}", re.ASCII)
HUB_NAME = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+", re.ASCII)


def print_plan(spec: ModelSpec, plan: Plan, console: Console) -> None:
    """The plan in one screen."""
    placement, predicted = placement_of(plan), plan.predicted[plan.method]
    facts = Table.grid(padding=(0, 2))
    model = f"{parameters(spec)}, {format_size(model_bytes(spec))}, {spec.dtype}"
    facts.add_row("model", Text(f"{one_line(spec.source.repository)}: {model}"))
    facts.add_row("budget", f"{format_size(plan.budget_bytes)} of {plan.device} memory")
    facts.add_row("method", f"{method_name(plan)}, context {plan.context} tokens")
    console.print(facts)
    table = Table("purpose", box=None, padding=(0, 2), header_style="dim")
    table.add_column("size", justify="right")
    table.add_column("share", justify="right")
    for row in ledger_rows(plan, placement):
        share = f"{row.num_bytes / plan.budget_bytes:.1%}"
        table.add_row(Text(row.label), format_size(row.num_bytes), share)
    console.print(table)
    costs = Table.grid(padding=(0, 2))
    costs.add_row("streamed", streamed_line(spec, plan))
    costs.add_row("round", round_line(predicted))
    costs.add_row("speed", f"{speed_line(plan)}, predicted")
    costs.add_row(
        "first token",
        f"after {duration(predicted.time_to_first_token_seconds)}, prompt of "
        f"{usage_within(plan.context, USUAL).prompt_tokens}",
    )
    if expected := acceptance_line(plan):
        kinds = ", ".join(f"{row.kind} {number(row.tokens)}" for row in kind_rows(plan))
        costs.add_row("acceptance", Text(f"{expected}; {kinds}" if kinds else expected))
    if more := what_more_memory_buys(plan):
        costs.add_row("more memory", more)
    for index, option in enumerate(plan.options[:NUM_OPTIONS]):
        line = f"{number(option.tokens_per_second)} tokens/s: {one_line(option.label)}"
        costs.add_row("" if index else "weighed", Text(line))
    for index, reason in enumerate(plan.reasons):
        costs.add_row("" if index else "because", Text(one_line(reason)))
    console.print(costs)


def plan_json(spec: ModelSpec, plan: Plan, artifact: Path | None) -> dict[str, Any]:
    """docs/commands.md describes every key."""
    placement, predicted = placement_of(plan), plan.predicted[plan.method]
    return {
        "schema": "subspec.plan/1",
        "model": {
            "id": spec.source.repository,
            "revision": spec.source.revision,
            "parameters": model_bytes(spec) // spec.item_bytes,
            "bytes": model_bytes(spec),
            "dtype": spec.dtype,
        },
        "budget_bytes": plan.budget_bytes,
        "artifact": None if artifact is None else str(artifact),
        "feasible": True,
        "ledger": placement.ledger,
        "decisions": {
            "device": plan.device,
            "method": plan.method,
            "context": plan.context,
            "tree": asdict(plan.tree),
            "verify_width": plan.verify_width,
            "int4_kernel": plan.int4_kernel,
            "threads": plan.num_threads,
            "prefill_tokens": plan.prefill_tokens,
            "block_bytes": placement.block_bytes,
            "num_slots": placement.num_slots,
            "residual_parts": len(plan.residuals),
            "resident_bytes": placement.ledger["resident"],
            "split_bytes": placement.ledger["residuals"],
            "streamed_bytes": predicted.streamed_bytes,
            "reasons": list(plan.reasons),
        },
        "predicted": {
            **asdict(predicted),
            "plain_tokens_per_second": plan.predicted["plain"].tokens_per_second,
        },
        "acceptance": {
            "measured": plan.acceptance.measured,
            "trees": plan.acceptance.num_trees() if plan.acceptance.measured else 0,
            "tokens_per_round": plan.acceptance.tokens(plan.tree.width, plan.tree.depth),
            "margin": margin_of(plan.acceptance, plan.tree.width, plan.tree.depth),
        },
        "by_budget": [asdict(point) for point in plan.by_budget],
        "by_context": [asdict(point) for point in plan.by_context],
    }


def render_readme(spec: ModelSpec, plan: Plan) -> str:
    """README.md of the artifact, which is its model card on a hub."""
    name = in_markdown(spec.source.repository)
    return load("artifact.md").render(
        page(spec, plan),
        name=name,
        hub_name=name if HUB_NAME.fullmatch(name) else None,
        license=in_markdown(spec.source.license),
        revision=in_markdown(spec.source.revision),
        commit=COMMIT.fullmatch(spec.source.revision),
        machine=in_markdown(plan.machine),
        speed=speed_line(plan) if plan.method in plan.predicted else None,
        acceptance=acceptance_line(plan),
    )


def render_report(spec: ModelSpec, plan: Plan, profile: Profile, runs: Sequence[Run] = ()) -> str:
    """report.html: one page that needs nothing else, a script least of all. runs: those that
    predictions of this artifact were for, under this plan or an earlier one."""
    lanes = [
        timeline(name, plan.predicted[name], placement)
        for name in ("substitute", "plain")
        if name in plan.predicted and (placement := plan.placement(name)) is not None
    ]
    total = max((lane.seconds for lane in lanes), default=0.0)
    return load("report.html").render(
        page(spec, plan),
        name=one_line(spec.source.repository) or "a model",
        license=one_line(spec.source.license),
        machine=one_line(plan.machine),
        reasons=[one_line(reason) for reason in plan.reasons],
        options=[(one_line(o.label), o.tokens_per_second, is_chosen(plan, o.label))
                 for o in plan.options],
        profile=profile,
        corrections=correction_rows(profile.corrections),
        more_tokens=MORE_TOKENS,
        streamed=streamed_line(spec, plan) if plan.method in plan.predicted else "",
        lanes=lanes,
        total=total,
        ticks=ticks(total),
        by_budget=budget_chart(plan),
        by_context=context_chart(plan),
        more_memory=what_more_memory_buys(plan) if plan.method in plan.predicted else "",
        curve=acceptance_chart(plan.acceptance, plan.tree),
        widths=width_rows(plan),
        kinds=kind_rows(plan),
        all_kinds=expected(plan, plan.tree.width, ""),
        runs=runs,
        dots=runs_chart(runs),
        compared=compared_rows(runs),
        one_line=one_line,
        number=number,
        weights_rate=weights_rate,
        duration=duration,
    )  # fmt: skip


def page(spec: ModelSpec, plan: Plan) -> dict[str, Any]:
    """What both pages say."""
    placement = placement_of(plan)
    return {
        "spec": spec,
        "plan": plan,
        "revision": one_line(spec.source.revision),
        "parameters": parameters(spec),
        "num_bytes": model_bytes(spec),
        "method": method_name(plan),
        "placement": placement,
        "num_parts": len(parts(spec)),
        "coded": bool(plan.residuals),
        "ledger": ledger_rows(plan, placement),
        "predicted": plan.predicted.get(plan.method),
        "plain": plan.predicted.get("plain"),
        "usage": usage_within(plan.context, USUAL),
        "format_size": format_size,
        "short_size": short_size,
    }
