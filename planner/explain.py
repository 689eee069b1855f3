"""A Plan as a person reads it: the table on the terminal, the artifact's README, the report; and
as a program does: the object of `subspec-plan --json`."""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from subspec.artifacts.model import GROUP_SIZE, ModelSpec, parts
from subspec.artifacts.plan import PROMPT_TOKENS, Placement, Plan, Prediction
from subspec.artifacts.profile import Profile
from subspec.artifacts.sizes import format_size, short_size, weights_rate
from subspec.planner.costs import expected_tokens, model_bytes
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
MOST_SEGMENTS = 12  # of a lane: a picture of the pipeline, not a count of its blocks
NUM_TICKS = 5
TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
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
        f"after {duration(predicted.time_to_first_token_seconds)}, prompt of {PROMPT_TOKENS}",
    )
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
    )


def render_report(spec: ModelSpec, plan: Plan, profile: Profile) -> str:
    """report.html: one page that needs nothing else, a script least of all."""
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
        streamed=streamed_line(spec, plan) if plan.method in plan.predicted else "",
        lanes=lanes,
        total=total,
        ticks=ticks(total),
        expected_tokens=expected_tokens,
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
        "prompt_tokens": PROMPT_TOKENS,
        "format_size": format_size,
        "short_size": short_size,
    }


@dataclass(frozen=True)
class Row:
    """One purpose of the ledger."""

    kind: str  # its colour
    label: str
    num_bytes: int


@dataclass(frozen=True)
class Bar:
    """A stretch of a lane, in seconds from the beginning of the round."""

    kind: str  # draft, compute or link: its colour
    start: float
    seconds: float


@dataclass(frozen=True)
class Timeline:
    """One round of a method, as the report draws it."""

    method: str
    prediction: Prediction
    seconds: float
    ahead_seconds: float  # link time that passes while the draft runs
    compute: tuple[Bar, ...]
    link: tuple[Bar, ...]


def timeline(method: str, prediction: Prediction, placement: Placement) -> Timeline:
    """Blocks arrive and are computed in turn: the shorter of the two lanes has gaps."""
    draft, verify = prediction.draft_seconds, prediction.verify_seconds
    ring_bytes = placement.block_bytes * placement.num_slots
    share = min(1.0, ring_bytes / prediction.streamed_bytes) if prediction.streamed_bytes else 0.0
    ahead = min(draft, prediction.stream_seconds * share)
    link, compute = prediction.stream_seconds - ahead, prediction.compute_seconds
    blocks = math.ceil(prediction.streamed_bytes / max(1, placement.block_bytes))
    count = max(1, min(MOST_SEGMENTS, blocks))
    starts = [draft + index * verify / count for index in range(count)]
    lanes = [Bar("compute", begin + (verify - compute) / count, compute / count)
             for begin in starts]  # fmt: skip
    copies = [Bar("link", begin, link / count) for begin in starts]
    return Timeline(
        method,
        prediction,
        draft + verify,
        ahead,
        tuple(bar for bar in (Bar("draft", 0.0, draft), *lanes) if bar.seconds > 0),
        tuple(bar for bar in (Bar("link", 0.0, ahead), *copies) if bar.seconds > 0),
    )


def ticks(seconds: float) -> list[tuple[float, str]]:
    """At most NUM_TICKS round numbers after 0, up to `seconds`, and their labels."""
    if seconds <= 0:
        return []
    power = 10.0 ** math.floor(math.log10(seconds / NUM_TICKS))
    step = next(power * n for n in (1, 2, 5, 10) if seconds / (power * n) <= NUM_TICKS)
    unit, name = next(((u, n) for u, n in TIME_UNITS if step >= 0.999 * u), TIME_UNITS[-1])
    places = [index * step for index in range(int(seconds / step) + 1)]
    return [(place, f"{place / unit:g} {name}" if place else "0") for place in places]


def ledger_rows(plan: Plan, placement: Placement) -> list[Row]:
    """The purposes that take bytes, and last what the plan leaves of the budget."""
    ledger, unused = placement.ledger, plan.budget_bytes - placement.total_bytes
    rows = [Row(name, label, ledger.get(name, 0)) for name, label in PURPOSES.items()]
    rows += [Row("other", one_line(name), ledger[name]) for name in ledger if name not in PURPOSES]
    return [row for row in (*rows, Row("unused", "not used", unused)) if row.num_bytes > 0]


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
