"""A Plan for people and programs: the table on the terminal, the artifact's README and report, the
object of `subspec-plan --json`."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from subspec.artifacts.common.formatting import duration, number
from subspec.artifacts.common.sizes import format_size, short_size
from subspec.artifacts.footprint import model_bytes
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import Plan
from subspec.artifacts.profile import Profile
from subspec.artifacts.runs import Run
from subspec.planner.report.charts import acceptance_chart, budget_chart
from subspec.planner.report.wording import (
    FP8_TARGET,
    METHODS,
    acceptance_line,
    acceptance_rows,
    batch_size_rows,
    context_rows,
    cost_rows,
    decision_rows,
    first_token_line,
    full_context_line,
    in_markdown,
    ledger_rows,
    margin_of,
    method_name,
    needs_rows,
    num_parameters,
    one_line,
    option_rows,
    parameters,
    placement_of,
    plain_speed,
    resident_bytes,
    round_line,
    round_rows,
    run_rows,
    speed_line,
    streamed_line,
    usage_line,
    weights_dtype,
)
from subspec.planner.solve.outlook import memory_gain_line
from subspec.planner.solve.predict import usual_usage
from subspec.templates import load

NUM_OPTIONS = 4  # on the terminal; the report shows all
COMMIT = re.compile(r"[0-9a-f]{7,64}", re.ASCII)
HUB_NAME = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+", re.ASCII)


def print_plan(spec: ModelSpec, plan: Plan, console: Console) -> None:
    """Print the plan in one screen."""
    predicted = plan.predicted[plan.method]
    facts = Table.grid(padding=(0, 2))
    model = f"{parameters(spec)}, {format_size(model_bytes(spec))}, {weights_dtype(spec)}"
    facts.add_row("model", Text(f"{one_line(spec.source.repository)}: {model}"))
    if spec.fp8:
        facts.add_row("", FP8_TARGET)
    facts.add_row("budget", f"{format_size(plan.budget_bytes)} of {plan.device} memory")
    facts.add_row("method", method_name(plan))
    facts.add_row("context", f"{plan.context} tokens")
    for what, size in needs_rows(plan):
        facts.add_row(what, size)
    console.print(facts)
    table = Table("fast memory", box=None, padding=(0, 2), header_style="dim")
    table.add_column("size", justify="right")
    table.add_column("share", justify="right")
    for row in ledger_rows(spec, plan):
        share = f"{row.num_bytes / plan.budget_bytes:.1%}"
        table.add_row(Text(row.label), format_size(row.num_bytes), share)
    console.print(table)
    costs = Table.grid(padding=(0, 2))
    costs.add_row("streamed", streamed_line(spec, plan))
    costs.add_row("round", round_line(predicted))
    usual = usage_line(usual_usage(plan.context))
    costs.add_row("speed", f"{speed_line(plan)}, predicted for {usual}")
    costs.add_row("first token", first_token_line(plan))
    if full := full_context_line(plan):
        costs.add_row("full context", full)
    for answers, speed, drafts in batch_size_rows(plan):
        costs.add_row(answers, f"{speed}, with {drafts} per sequence")
    if accepted := acceptance_line(plan):
        kinds = ", ".join(f"{kind} {tokens}" for kind, _, tokens in acceptance_rows(plan)[:-1])
        costs.add_row("acceptance", Text(f"{accepted}; {kinds}" if kinds else accepted))
    if more := memory_gain_line(plan):
        costs.add_row("more memory", more)
    for index, (label, speed) in enumerate(option_rows(plan)[:NUM_OPTIONS]):
        costs.add_row("" if index else "options", Text(f"{speed} tokens/s: {label}"))
    for index, reason in enumerate(plan.reasons):
        costs.add_row("" if index else "reasons", Text(one_line(reason)))
    console.print(costs)


def plan_json(spec: ModelSpec, plan: Plan, artifact: Path | None) -> dict[str, Any]:
    """The JSON object of a plan; docs/commands.md describes every key."""
    placement, predicted = placement_of(plan), plan.predicted[plan.method]
    ledger, draft = asdict(placement.ledger), plan.draft
    acceptance, tree = draft.acceptance, draft.tree
    return {
        "schema": "subspec.plan/1",
        "model": {
            "id": spec.source.repository,
            "revision": spec.source.revision,
            "parameters": num_parameters(spec),
            "bytes": model_bytes(spec),
            "dtype": weights_dtype(spec),
        },
        "budget_bytes": plan.budget_bytes,
        "artifact": None if artifact is None else str(artifact),
        "feasible": True,
        "ledger": ledger,
        "host_ledger": asdict(plan.host_ledger) if plan.host_ledger else None,
        "disk_bytes": plan.disk_bytes,
        "decisions": {
            "device": plan.device,
            "method": plan.method,
            "drafter": plan.drafter,
            "context": plan.context,
            "sequences": plan.num_sequences,
            "tree": asdict(tree),
            "by_batch_size": [
                {"batch_size": 2 << index, **asdict(one)}
                for index, one in enumerate(draft.by_batch_size)
            ],
            "verify_widths": list(plan.verify_widths),
            "int4_kernel": plan.int4_kernel,
            "threads": plan.num_threads,
            "prefill_chunk_tokens": plan.prefill_chunk_tokens,
            "block_bytes": placement.block_bytes,
            "num_slots": placement.num_slots,
            "residual_parts": len(plan.residuals),
            "resident_bytes": ledger["resident"],
            "residual_bytes": ledger["residuals"],
            "streamed_bytes": predicted.streamed_bytes,
            "reasons": list(plan.reasons),
        },
        "predicted": {
            **asdict(predicted),
            "plain_tokens_per_second": plain_speed(plan),
        },
        "full_context": asdict(plan.full_context) if plan.full_context else None,
        "acceptance": {
            "measured": acceptance.measured,
            "answers": acceptance.num_answers() if acceptance.measured else 0,
            "tokens_per_round": acceptance.acceptance_length(tree),
            "margin": margin_of(plan),
        },
        "by_budget": [asdict(point) for point in plan.by_budget],
        "by_context": [asdict(point) for point in plan.by_context],
    }


def render_readme(spec: ModelSpec, plan: Plan) -> str:
    """README.md of the artifact, which is its model card on the hub."""
    name = in_markdown(spec.source.repository)
    return load("artifact.md").render(
        page(spec, plan),
        name=name,
        hub_name=name if HUB_NAME.fullmatch(name) else None,
        license=in_markdown(spec.source.license),
        revision=in_markdown(spec.source.revision),
        commit=COMMIT.fullmatch(spec.source.revision),
        machine=in_markdown(plan.machine),
        coded=bool(plan.residuals),
        resident_bytes=resident_bytes(plan),
        speed=speed_line(plan) if plan.method in plan.predicted else None,
        needs=needs_rows(plan),
        acceptance=acceptance_line(plan),
    )


def render_report(spec: ModelSpec, plan: Plan, profile: Profile, runs: Sequence[Run] = ()) -> str:
    """report.html: one page without scripts or external resources. runs: those whose predictions
    came from this artifact, under this plan or an earlier one."""
    predicts = plan.method in plan.predicted
    return load("report.html").render(
        page(spec, plan),
        name=one_line(spec.source.repository) or "a model",
        license=one_line(spec.source.license),
        revision=one_line(spec.source.revision),
        machine=one_line(plan.machine),
        ledger=ledger_rows(spec, plan),
        methods=[name for method, name in METHODS.items() if method in plan.predicted],
        round_rows=round_rows(plan),
        options=option_rows(plan),
        by_budget=budget_chart(plan),
        more_memory=memory_gain_line(plan) if predicts else "",
        contexts=context_rows(plan),
        first_token=first_token_line(plan) if predicts else "",
        full_context=full_context_line(plan) if predicts else "",
        accepted=acceptance_line(plan),
        curve=acceptance_chart(plan.draft.acceptance, plan.draft.tree),
        kinds=acceptance_rows(plan),
        runs=runs,
        run_rows=run_rows(runs),
        reasons=[one_line(reason) for reason in plan.reasons],
        decisions=decision_rows(plan),
        streamed=streamed_line(spec, plan) if predicts else "",
        costs=cost_rows(profile),
        plain_speed=plain_speed,
        number=number,
        duration=duration,
    )


def page(spec: ModelSpec, plan: Plan) -> dict[str, Any]:
    """Template values that README and report share."""
    return {
        "spec": spec,
        "weights_dtype": weights_dtype,
        "fp8_target": FP8_TARGET,
        "plan": plan,
        "parameters": parameters(spec),
        "num_bytes": model_bytes(spec),
        "method": method_name(plan),
        "predicted": plan.predicted.get(plan.method),
        "usage": usual_usage(plan.context),
        "format_size": format_size,
        "short_size": short_size,
    }
