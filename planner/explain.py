"""A Plan as a person reads it: the table on the terminal, the artifact's README, the report; and
as a program does: the object of `subspec-plan --json`."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from subspec.artifacts.acceptance import Acceptance, mean_rate, pooled
from subspec.artifacts.model import GROUP_SIZE, ModelSpec, parts
from subspec.artifacts.plan import USUAL, Method, Placement, Plan, Prediction
from subspec.artifacts.profile import MORE_TOKENS, Learned, Profile
from subspec.artifacts.runs import Run
from subspec.artifacts.sizes import format_size, short_size, weights_rate
from subspec.planner.charts import (
    TIME_UNITS,
    acceptance_chart,
    budget_chart,
    context_chart,
    runs_chart,
    shown_kinds,
    ticks,
    timeline,
)
from subspec.planner.costs import model_bytes
from subspec.planner.outlook import what_more_memory_buys
from subspec.planner.predict import emitted_by_depth, rounds_needed, usage_within
from subspec.templates import load

PURPOSES = {  # of the ledger, as a person calls them, in the order of the report's bar
    "resident": "exact weights that stay",
    "residuals": "residuals that stay",
    "substitutes": "4-bit substitutes, the draft",
    "embedding": "token embedding",
    "cache": "keys and values",
    "staging": "staging for streamed weights",
    "scratch": "one decoded matrix",
    "workspace": "activations",
    "tables": "position tables",
    "norms": "norms and biases",
    "overhead": "GPU context and runtime",
    "guard": "safety margin",
}
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
        learned=learned_rows(profile.learned),
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


@dataclass(frozen=True)
class Row:
    """One purpose of the ledger."""

    kind: str  # its colour
    label: str
    num_bytes: int


def ledger_rows(plan: Plan, placement: Placement) -> list[Row]:
    """The purposes that take bytes, and last what the plan leaves of the budget."""
    ledger, unused = placement.ledger, plan.budget_bytes - placement.total_bytes
    rows = [Row(name, label, ledger.get(name, 0)) for name, label in PURPOSES.items()]
    rows += [Row("other", one_line(name), ledger[name]) for name in ledger if name not in PURPOSES]
    return [row for row in (*rows, Row("unused", "not used", unused)) if row.num_bytes > 0]


@dataclass(frozen=True)
class Expected:
    """What trees are expected to bring, of one width or on one kind of text."""

    width: int
    kind: str
    num_trees: int
    level_rate: float  # mean over all levels
    tokens: float  # of a round at the plan's depth
    margin: float | None
    tokens_per_second: float | None  # of the usual answer; None: the plan predicts no draft


def width_rows(plan: Plan) -> list[Expected]:
    return [expected(plan, curve.width, "") for curve in pooled(plan.acceptance)]


def kind_rows(plan: Plan) -> list[Expected]:
    """At the plan's width; empty without a draft, and where there is one kind only."""
    kinds = shown_kinds(plan.acceptance) if plan.tree.depth else []
    return [expected(plan, plan.tree.width, kind) for kind in kinds]


def expected(plan: Plan, width: int, kind: str) -> Expected:
    acceptance, depth = plan.acceptance, plan.tree.depth
    curves = pooled(acceptance, kind)  # of the narrower of two measured widths, as the margin is
    curve = ([curve for curve in curves if curve.width <= width] or curves[:1])[-1]
    return Expected(
        width,
        one_line(kind),
        curve.tried[0],
        mean_rate(curve),
        acceptance.tokens(width, depth, kind),
        margin_of(acceptance, width, depth, kind),
        speed_on(plan, kind),
    )


def speed_on(plan: Plan, kind: str) -> float | None:
    """Tokens/s of the usual answer if all text were of this kind."""
    predicted = plan.predicted.get("substitute")
    if predicted is None:
        return None
    emitted = emitted_by_depth(plan.acceptance, plan.tree.width, plan.tree.depth, kind)[-1]
    num_tokens = max(1, usage_within(plan.context, USUAL).answer_tokens - 1)
    round_seconds = predicted.draft_seconds + predicted.verify_seconds
    return num_tokens / (rounds_needed(num_tokens, emitted) * round_seconds)


def acceptance_line(plan: Plan) -> str:
    """ "" without a draft."""
    acceptance, tree = plan.acceptance, plan.tree
    if not tree.depth:
        return ""
    tokens = f"{number(acceptance.tokens(tree.width, tree.depth))} tokens a round"
    if not acceptance.measured:
        return f"by published figures, not measured: {tokens}"
    margin = margin_of(acceptance, tree.width, tree.depth)
    known = "" if margin is None else f" ± {number(margin)}"
    return f"measured on {acceptance.num_trees()} trees: {tokens}{known}"


def margin_of(acceptance: Acceptance, width: int, depth: int, kind: str = "") -> float | None:
    """None: nothing was measured, or wider trees only."""
    margin = acceptance.margin(width, depth, kind)
    return margin if math.isfinite(margin) else None


@dataclass(frozen=True)
class Compared:
    """Medians of one figure over recorded runs."""

    label: str
    num_runs: int
    predicted: str
    actual: str
    off: float  # 0.1: 10 % more than predicted


def compared_rows(runs: Sequence[Run]) -> list[Compared]:
    rows = list[Compared | None]()
    names: tuple[tuple[Method, str], ...] = ("substitute", "speculation"), ("plain", "plain")
    for method, name in names:
        some = [run for run in runs if run.method == method]
        # A prompt that is in the cache already, or waits for digests, is another figure.
        whole = [run for run in some if not run.reused_tokens and not run.first_of_session]
        rows += [
            compared(f"{name}, tokens/s", number, [
                (run.predicted_tokens_per_second, run.tokens_per_second) for run in some
            ]),
            compared(f"{name}, first token", duration, [
                (run.predicted_first_token_seconds, run.first_token_seconds) for run in whole
            ]),
            compared(f"{name}, peak memory", short_size, [
                (run.predicted_peak_bytes, run.fast_peak_bytes) for run in some
            ]),
        ]  # fmt: skip
    return [row for row in rows if row is not None]


def compared(
    label: str, shown: Callable[[float], str], pairs: Sequence[tuple[float | None, float]]
) -> Compared | None:
    """None: nothing was predicted."""
    known = [(said, was) for said, was in pairs if said]
    if not known:
        return None
    said, was = (median(values) for values in zip(*known, strict=True))
    return Compared(label, len(known), shown(said), shown(was), was / said - 1)


def learned_rows(learned: Learned) -> list[tuple[str, float]]:
    """What real rounds took in parts of the profile's terms, phase by phase."""
    return [
        ("draft", learned.draft),
        ("verification", learned.verify),
        ("a token of plain decoding", learned.plain),
        ("first token", learned.prompt),
    ]


def placement_of(plan: Plan) -> Placement:
    placement = plan.placement(plan.method)
    assert placement is not None, "check_plan asks for it"
    return placement


def method_name(plan: Plan) -> str:
    if plan.method == "plain":
        return "plain decoding"
    tree = plan.tree
    shape = f"a chain of {tree.depth}" if tree.width == 1 else f"a tree {tree.width} wide, " \
        f"{tree.depth} deep"  # fmt: skip
    return f"speculation with {shape}"


def is_chosen(plan: Plan, label: str) -> bool:
    """Whether one of the weighed options is what the plan does (labels are search.py's)."""
    if plan.method == "plain":
        return label.startswith("plain")
    return label == f"tree {plan.tree.width} wide, {plan.tree.depth} deep"


def round_line(predicted: Prediction) -> str:
    terms = f"stream {duration(predicted.stream_seconds)}"
    terms += f", compute {duration(predicted.compute_seconds)}"
    if predicted.decode_seconds:
        terms += f", decoding {duration(predicted.decode_seconds)} of that"
    verify = f"verify {duration(predicted.verify_seconds)} ({terms})"
    if not predicted.draft_seconds:
        return f"{verify} for 1 token"
    tokens = number(predicted.tokens_per_round)
    return f"draft {duration(predicted.draft_seconds)}, {verify} for {tokens} tokens expected"


def streamed_line(spec: ModelSpec, plan: Plan) -> str:
    """N (d + r) / 8 - V: draft bits and stored bits of every weight, less what fast memory holds
    of both."""
    placement, streamed = placement_of(plan), plan.predicted[plan.method].streamed_bytes
    if not streamed:
        return "nothing: all exact weights stay in fast memory"
    count = sum(part.num_weights for part in parts(spec))
    held = placement.ledger["resident"] + placement.ledger["residuals"]
    draft_bits = 4 + 32 / GROUP_SIZE if placement.ledger["substitutes"] else 0.0
    stored_bits = 8 * (streamed + held) / count
    in_memory = count * draft_bits / 8 + held
    bits = (
        f"({draft_bits:.1f} + {stored_bits:.2f}) bits" if draft_bits else f"{stored_bits:.2f} bits"
    )
    return (
        f"{big_number(count)} weights x {bits} - {short_size(int(in_memory))} in fast memory = "
        f"{short_size(streamed)} a round"
    )


def speed_line(plan: Plan) -> str:
    speed, plain = (plan.predicted[name].tokens_per_second for name in (plan.method, "plain"))
    if plan.method == "plain":
        return f"{number(plain)} tokens/s"
    return f"{number(speed)} tokens/s, {number(speed / plain)}x plain decoding ({number(plain)})"


def parameters(spec: ModelSpec) -> str:
    return f"{big_number(model_bytes(spec) // spec.item_bytes)} parameters"


def big_number(count: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{number(count / unit)} {name}"
    return str(count)


def number(value: float) -> str:
    """Three digits, no exponent."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def duration(seconds: float) -> str:
    unit, name = next(((u, n) for u, n in TIME_UNITS if seconds >= u), TIME_UNITS[-1])
    return f"{number(seconds / unit)} {name}" if seconds else "0 s"


def one_line(text: str) -> str:
    """A name from elsewhere, without what steers a terminal or breaks a page."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def in_markdown(text: str) -> str:
    """The same for a code span in a table."""
    return re.sub(r"[`|]", "'", one_line(text))
