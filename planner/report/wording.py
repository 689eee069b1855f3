"""A plan in words: the rows of its tables and the lines of its facts. `explain.py` makes pages of
them."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from subspec.artifacts.common.formatting import big_number, counted, duration, number
from subspec.artifacts.common.sizes import format_size, short_size, weights_rate
from subspec.artifacts.footprint import model_bytes
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import Method, Placement, Plan, Prediction, Tree, Usage
from subspec.artifacts.profile import Profile
from subspec.artifacts.runs import Run
from subspec.planner.solve.predict import full_usage, usual_usage
from subspec.planner.solve.search import option_label

PURPOSES = {  # of the ledger, in the order of the report's bar
    "resident": "resident exact weights",
    "residuals": "resident residuals",
    "substitutes": "4-bit substitutes (draft)",
    "cache": "KV cache",
    "windows": "KV cache of windows",
    "staging": "staging ring",
    "scratch": "scratch for one decoded matrix",
    "drafter": "drafter's own weights",
    "drafter_cache": "drafter's own KV cache",
    "workspace": "activations",
    "tables": "RoPE tables",
    "norms": "norms and biases",
    "overhead": "GPU context and runtime",
    "guard": "safety margin",
}
CACHE_OF_HYBRIDS = "KV cache, delta-net states"  # with their checkpoints, where they are in it
METHODS: dict[Method, str] = {
    "substitute": "speculative decoding",
    "draft-model": "speculative decoding with a draft model",
    "substitute+draft-model": "hierarchical speculative decoding with a draft model",
    "plain": "plain decoding",
}
DRAFTED_BY: dict[Method, str] = {  # after a tree; "" for the substitutes
    "draft-model": " of the draft model",
    "substitute+draft-model": ", tokens proposed by the draft model",
}
NOTICED_SHARE = 0.05  # of the time to the first token
MAX_KINDS = 8  # of text; a user's calibration may have many

Rows = list[tuple[str, ...]]


# Memory


@dataclass(frozen=True)
class Share:
    """One purpose's share of the budget."""

    purpose: str
    label: str
    num_bytes: int


def ledger_rows(spec: ModelSpec, plan: Plan) -> list[Share]:
    """The purposes that take bytes, and last what the plan leaves unused."""
    ledger, labels = placement_of(plan).ledger, PURPOSES
    if spec.delta_nets:
        labels = {**PURPOSES, "cache": CACHE_OF_HYBRIDS}
    rows = [Share(name, label, getattr(ledger, name)) for name, label in labels.items()]
    rows.append(Share("unused", "unused", plan.budget_bytes - ledger.total_bytes))
    return [row for row in rows if row.num_bytes > 0]


def resident_bytes(plan: Plan) -> int:
    """Exact weights in fast memory, residuals included."""
    ledger = placement_of(plan).ledger
    return ledger.resident + ledger.residuals


def placement_of(plan: Plan) -> Placement:
    return plan.placement(plan.method)


def needs_rows(plan: Plan) -> Rows:
    """Disk and host memory that a plan takes besides its budget; empty if unknown."""
    rows: Rows = []
    if taken := host_line(plan):
        rows.append(("host memory", taken))
    if plan.disk_bytes:
        rows.append(("disk", f"{format_size(plan.disk_bytes)} for the artifact"))
    return rows


# Time


def round_rows(plan: Plan) -> Rows:
    """A term of one round, and its value for each method; plain decoding's round is one token."""
    rounds = [plan.predicted[name] for name in METHODS if name in plan.predicted]
    rows: Rows = [("draft", *(duration(p.draft_seconds) for p in rounds))]
    rows.append(("verify", *(duration(p.verify_seconds) for p in rounds)))
    rows.append(("compute, during verify", *(duration(p.compute_seconds) for p in rounds)))
    if plan.residuals:
        label = "residual decoding, part of compute"
        rows.append((label, *(duration(p.decode_seconds) for p in rounds)))
    rows.append(("link, during draft and verify", *(duration(p.stream_seconds) for p in rounds)))
    rows.append(("bytes streamed", *(short_size(p.streamed_bytes) for p in rounds)))
    rows.append(("tokens expected", *(number(p.tokens_per_round) for p in rounds)))
    rows.append(("tokens/s", *(number(p.tokens_per_second) for p in rounds)))
    return rows


def round_line(predicted: Prediction) -> str:
    terms = f"link {duration(predicted.stream_seconds)}"
    terms += f", compute {duration(predicted.compute_seconds)}"
    if predicted.decode_seconds:
        terms += f" with {duration(predicted.decode_seconds)} of decoding"
    verify = f"verify {duration(predicted.verify_seconds)} ({terms})"
    if not predicted.draft_seconds:
        return f"{verify} for 1 token"
    tokens = number(predicted.tokens_per_round)
    return f"draft {duration(predicted.draft_seconds)} + {verify} for {tokens} tokens expected"


def speed_line(plan: Plan) -> str:
    speed, plain = plan.predicted[plan.method].tokens_per_second, plain_speed(plan)
    if plan.method == "plain":
        return f"{number(plain)} tokens/s"
    line = f"{number(speed)} tokens/s, {number(speed / plain)}x plain decoding ({number(plain)})"
    # What was measured of another drafter is among the plan's reasons.
    if plan.drafter in (None, plan.method, "substitute+lookup"):
        return line
    return f"{line} with the drafter {plan.method}"


def plain_speed(plan: Plan) -> float:
    """tokens/s of the best plan with plain decoding, which may have other weights and widths than
    this plan; of this plan, if no other was considered."""
    considered = (one.tokens_per_second for one in plan.options if one.label.startswith("plain"))
    return next(considered, plan.predicted["plain"].tokens_per_second)


def usage_line(usage: Usage) -> str:
    return f"a prompt of {usage.prompt_tokens} tokens and an answer of {usage.answer_tokens}"


def first_token_line(plan: Plan) -> str:
    predicted = plan.predicted[plan.method]
    prompt, first = usual_usage(plan.context).prompt_tokens, predicted.time_to_first_token_seconds
    line = f"after {duration(first)} for a prompt of {prompt} tokens"
    if predicted.digest_seconds < NOTICED_SHARE * first:
        return line
    whole = duration(first + predicted.digest_seconds)
    return f"{line}; {whole} for the first prompt after a start, which checks digests"


def full_context_line(plan: Plan) -> str:
    """Predicted speed of a text that fills the context; "" if that is the usual usage, or if
    nothing was predicted."""
    full, usage = plan.full_context, full_usage(plan.context)
    if full is None or usage == usual_usage(plan.context):
        return ""
    return (
        f"{number(full.tokens_per_second)} tokens/s for {usage_line(usage)}, first token after "
        f"{duration(full.time_to_first_token_seconds)}"
    )


def batch_size_rows(plan: Plan) -> Rows:
    """Batch size, predicted tokens/s in total, and draft tree; no rows without a draft."""
    if plan.method == "plain":
        return []
    return [
        (f"batch size {2 << index}", f"{number(one.tokens_per_second)} tokens/s in total",
         draft_name(one.tree))
        for index, one in enumerate(plan.draft.by_batch_size)
    ]  # fmt: skip


def option_rows(plan: Plan) -> Rows:
    """The best plan of each kind that was considered, fastest first."""
    return [
        (one_line(option.label) + (" (chosen)" if is_chosen(plan, option.label) else ""),
         number(option.tokens_per_second))
        for option in plan.options
    ]  # fmt: skip


def is_chosen(plan: Plan, label: str) -> bool:
    """Return True if the option is what the plan does (labels are search.py's)."""
    if plan.method == "plain":
        return label.startswith("plain")
    return label == option_label(plan.method, plan.draft.tree)


def context_rows(plan: Plan) -> Rows:
    """The best plan for each context under this budget."""
    return [
        (f"{point.context} tokens" + (" (this plan)" if point.context == plan.context else ""),
         METHODS[point.method], number(point.tokens_per_second),
         number(point.full_tokens_per_second) if point.full_tokens_per_second else "")
        for point in plan.by_context
    ]  # fmt: skip


# Acceptance


def acceptance_line(plan: Plan) -> str:
    """Expected tokens per round and their source; "" without a draft."""
    acceptance, tree = plan.draft.acceptance, plan.draft.tree
    if not tree.depth:
        return ""
    tokens = f"{tokens_expected(plan)} tokens per round"
    if not acceptance.measured:
        return (
            f"{tokens}, from published figures: not measured on this model, and measured plans may "
            "reach far less (6 to 9 on a model of 1 billion parameters)"
        )
    return f"{tokens}, measured on {counted(acceptance.num_answers(), 'answer')}"


def acceptance_rows(plan: Plan) -> Rows:
    """Kind of text, number of answers, tokens per round; none with a single kind or no draft."""
    acceptance = plan.draft.acceptance
    if len(acceptance.kinds) < 2 or not acceptance.measured or not plan.draft.tree.depth:
        return []
    most = sorted(acceptance.kinds, key=lambda kind: -acceptance.num_answers(kind))[:MAX_KINDS]
    return [
        (
            one_line(kind) or "all kinds",
            f"{acceptance.num_answers(kind)}",
            tokens_expected(plan, kind),
        )
        for kind in (*sorted(most), "")
    ]


def tokens_expected(plan: Plan, kind: str = "") -> str:
    """ "12.1 ± 1.3": a round's tokens and half of their 95 % confidence interval, if known."""
    tokens = number(plan.draft.acceptance.acceptance_length(plan.draft.tree, kind))
    margin = margin_of(plan, kind)
    return tokens if margin is None else f"{tokens} ± {number(margin)}"


def margin_of(plan: Plan, kind: str = "") -> float | None:
    """Half of the 95 % confidence interval of a round's tokens; None if it was not measured."""
    margin = plan.draft.acceptance.margin(plan.draft.tree, kind)
    return margin if math.isfinite(margin) else None


# Recorded runs


def run_rows(runs: Sequence[Run]) -> Rows:
    """Figure, number of answers, medians of prediction and measurement, their difference."""
    rows: Rows = []
    for method, name in METHODS.items():
        some = [run for run in runs if run.method == method]
        # With a reused prompt or a digest check the first token's time is another figure.
        whole = [run for run in some if not run.cached_tokens and not run.includes_digest_check]
        rows += compared(
            f"{name}, tokens/s",
            number,
            [(run.predicted_tokens_per_second, run.tokens_per_second) for run in some],
        )
        rows += compared(
            f"{name}, first token",
            duration,
            [(run.predicted_first_token_seconds, run.first_token_seconds) for run in whole],
        )
        rows += compared(f"{name}, peak memory", short_size, [
            (run.predicted_peak_bytes, run.fast_peak_bytes) for run in some
        ])  # fmt: skip
    return rows


def compared(
    label: str, shown: Callable[[float], str], pairs: Sequence[tuple[float | None, float]]
) -> Rows:
    """One row, or none if nothing was predicted."""
    known = [(predicted, actual) for predicted, actual in pairs if predicted]
    if not known:
        return []
    predicted, actual = (median(values) for values in zip(*known, strict=True))
    difference = f"{actual / predicted - 1:+.0%}"
    return [(label, str(len(known)), shown(predicted), shown(actual), difference)]


# Decisions and measured costs


def method_name(plan: Plan) -> str:
    if plan.method == "plain":
        return METHODS["plain"]
    if plan.drafter == "substitute+lookup":
        return f"speculative decoding with {draft_name(plan.tree)}, with prompt lookup"
    if plan.drafter not in (None, plan.method):
        return f"speculative decoding with the drafter {plan.drafter}"
    return f"speculative decoding with {draft_name(plan.draft.tree)}" + DRAFTED_BY.get(
        plan.method, ""
    )


def draft_name(tree: Tree) -> str:
    if tree.width == 1:
        return f"a draft chain of {tree.depth} tokens"
    return f"a draft tree of width {tree.width} and depth {tree.depth}"


def streamed_line(spec: ModelSpec, plan: Plan) -> str:
    """Streamed bytes and parts, and resident parts of the exact weights. A part is at most 64 MB of
    a matrix."""
    placement, streamed = placement_of(plan), plan.predicted[plan.method].streamed_bytes
    total, num_dequantized = len(spec.parts), len(placement.dequantized)
    out = f" ({num_dequantized} dequantized)" if num_dequantized else ""
    if not streamed:
        return f"nothing: all {total} parts are resident{out}"
    inside = len(placement.resident) + len(placement.residuals)
    line = f"{short_size(streamed)} per round, {total - inside} of {total} parts; "
    line += f"{len(placement.resident)} are resident{out}"
    return line + (f", {len(placement.residuals)} as residuals" if placement.residuals else "")


def host_line(plan: Plan) -> str:
    """Host memory that the plan takes beside a GPU's; "" if none."""
    taken = plan.host_ledger
    return f"{format_size(taken.total_bytes)}: {taken.parts}" if taken else ""


def decision_rows(plan: Plan) -> Rows:
    placement, tree = placement_of(plan), plan.draft.tree
    rows: Rows = [("method", method_name(plan))]
    if plan.method != "plain":
        rows.append(
            ("draft temperature", f"{tree.temperature:g}, for ranking nodes and ending drafts")
        )
    ring = f"{placement.num_slots} slots of {format_size(placement.block_bytes)}"
    rows += [(answers, f"{drafts}: {speed}") for answers, speed, drafts in batch_size_rows(plan)]
    return [
        *rows,
        ("verification", f"padded to {', '.join(map(str, plan.verify_widths))} rows"),
        ("prompt", f"{plan.prefill_chunk_tokens} tokens per stream of the weights"),
        ("staging ring", ring if placement.num_slots else "none: nothing streams"),
        *needs_rows(plan),
        ("4-bit kernel", plan.int4_kernel),
        ("CPU threads", str(plan.num_threads)),
    ]


def cost_rows(profile: Profile) -> Rows:
    """Measured speeds of link and memory, one a row."""
    rows: Rows = [
        (f"link, blocks of {format_size(rate.block_bytes)}",
         f"{short_size(rate.bytes_per_second)}/s")
        for rate in profile.link
    ]  # fmt: skip
    rows.append(("link while layers compute", f"{profile.contended_link:.0%} of its speed"))
    rows.append(
        ("layers while the link is busy", f"{profile.contended_compute:.0%} of their speed")
    )
    decoding = profile.residual_weights_per_second
    rows.append(("decoding residuals", weights_rate(decoding) if decoding else "not available"))
    if profile.fp8_weights_per_second:
        decoding = profile.fp8_residual_weights_per_second
        what = weights_rate(decoding) if decoding else "not available"
        rows.append(("FP8 residual decoding", what))
        rows.append(("FP8 dequantization", weights_rate(profile.fp8_weights_per_second)))
    digests = (
        f"{short_size(profile.digest_bytes_per_second)}/s"
        if profile.digest_bytes_per_second
        else "free"
    )
    rows.append(("checking digests at first read", digests))
    rows.append(("fixed cost of a round", duration(profile.round_overhead_seconds)))
    rows.append(("free fast memory", format_size(profile.free_bytes)))
    if profile.pinnable_bytes:
        rows.append(("host memory that can be pinned", format_size(profile.pinnable_bytes)))
    return [*rows, ("correction factors", corrections_line(profile))]


def corrections_line(profile: Profile) -> str:
    found = profile.corrections
    if not found.num_rounds:
        return "none: no real rounds were timed yet"
    return (
        f"draft {number(found.draft)}, verify {number(found.verify)}, plain decoding "
        f"{number(found.plain)}, first token {number(found.prompt)}; from {found.num_rounds} rounds"
    )


# Names

FP8_TARGET = (
    "The target is the FP8 checkpoint, not the model that it was made from: its weights are used "
    "exactly, dequantized to bfloat16, and activations stay bfloat16. Engines that round "
    "activations to FP8 too can give other tokens."
)


def num_parameters(spec: ModelSpec) -> int:
    packed = sum(part.num_bytes - part.plain_bytes for part in spec.parts)  # by FP8
    return (model_bytes(spec) + packed) // spec.item_bytes


def parameters(spec: ModelSpec) -> str:
    return f"{big_number(num_parameters(spec))} parameters"


def weights_dtype(spec: ModelSpec) -> str:
    return f"FP8 and {spec.dtype}" if spec.fp8 else spec.dtype


def one_line(text: str) -> str:
    """A foreign name without the characters that steer a terminal or break a page."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def in_markdown(text: str) -> str:
    """A foreign name for a code span in a table."""
    return re.sub(r"[`|]", "'", one_line(text))
