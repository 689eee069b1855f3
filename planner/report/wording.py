"""A plan in words: the rows of its tables, the lines of its facts, and numbers as a person reads
them. Plain functions of a Plan and of recorded runs; `explain.py` makes pages of them."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from subspec.artifacts.acceptance import Acceptance, mean_rate, pooled
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.model import GROUP_SIZE, ModelSpec, parts
from subspec.artifacts.plan import USUAL, Method, Placement, Plan, Prediction
from subspec.artifacts.profile import Corrections
from subspec.artifacts.runs import Run
from subspec.planner.report.charts import TIME_UNITS, shown_kinds
from subspec.planner.solve.costs import model_bytes
from subspec.planner.solve.predict import rounds_needed, usage_within, yields_by_depth

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
    curves = pooled(
        plan.acceptance, kind
    )  # of the narrower of two measured widths, as the margin is
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
    gives = yields_by_depth(plan.acceptance, plan.tree.width, plan.tree.depth, kind)[-1]
    num_tokens = max(1, usage_within(plan.context, USUAL).answer_tokens - 1)
    round_seconds = predicted.draft_seconds + predicted.verify_seconds
    return num_tokens / (rounds_needed(num_tokens, gives) * round_seconds)


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


def correction_rows(corrections: Corrections) -> list[tuple[str, float]]:
    """What real rounds took in parts of the profile's terms, phase by phase."""
    return [
        ("draft", corrections.draft),
        ("verification", corrections.verify),
        ("a token of plain decoding", corrections.plain),
        ("first token", corrections.prompt),
    ]


def placement_of(plan: Plan) -> Placement:
    placement = plan.placement(plan.method)
    assert placement is not None, "check_plan asks for it"
    return placement


def method_name(plan: Plan) -> str:
    if plan.method == "plain":
        return "plain decoding"
    tree = plan.tree
    depth = f"at most {tree.depth}" if tree.min_path_probability else f"{tree.depth}"
    shape = f"a chain of {depth}" if tree.width == 1 else f"a tree {tree.width} wide, {depth} deep"
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
    of both. What is held decoded is not among these weights."""
    placement, streamed = placement_of(plan), plan.predicted[plan.method].streamed_bytes
    if not streamed:
        return "nothing: all exact weights stay in fast memory"
    decoded = set(placement.resident) & set(plan.residuals)
    count = sum(part.num_weights for part in parts(spec) if part.name not in decoded)
    held = placement.ledger["resident"] + placement.ledger["residuals"]
    held -= sum(part.padded_bytes for part in parts(spec) if part.name in decoded)
    draft_bits = 4 + 32 / GROUP_SIZE if placement.ledger["substitutes"] else 0.0
    stored_bits = 8 * (streamed + held) / count
    in_memory = count * draft_bits / 8 + held
    bits = (
        f"({draft_bits:.1f} + {stored_bits:.2f}) bits" if draft_bits else f"{stored_bits:.2f} bits"
    )
    return (
        f"{big_number(count)} weights x {bits} - {short_size(int(in_memory))} in fast memory = "
        f"{short_size(streamed)} a round"
        + (f"; {len(decoded)} more matrices are held decoded" if decoded else "")
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
