"""Predictions of a plan for another usage, and the best plans for other budgets and contexts."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from subspec.artifacts.acceptance import ONE_TOKEN, HierarchicalCost
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.formatting import number
from subspec.artifacts.common.sizes import short_size, size_argument
from subspec.artifacts.footprint import Ring, Shape, workspace_bytes
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import (
    WITH_DRAFT_MODEL,
    WITH_SUBSTITUTES,
    Method,
    Plan,
    Point,
    Prediction,
    Usage,
)
from subspec.artifacts.profile import Profile
from subspec.planner.solve.predict import Candidate, Proposer, passes_of, predict
from subspec.planner.solve.storage import Storage, group_bytes

BUDGET_STEPS = (0.4, 0.5, 0.625, 0.75, 0.875, 1.125, 1.25, 1.5, 1.75, 2.0)  # of the plan's own
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
NEXT_BYTES = 10**9  # more memory, for which the gain is reported
NEXT_SHARE = 0.1  # of the budget, if that is less
# Of methods without a hierarchical draft
NO_HIERARCHICAL_COST = HierarchicalCost(substitute_passes=1.0, proposer_passes=0.0)

Solve = Callable[[int, int], Plan]  # budget, context -> best plan


def predict_for(
    spec: ModelSpec,
    profile: Profile,
    plan: Plan,
    stored: Storage,
    method: Method,
    usage: Usage,
    draft_model: ModelSpec | None = None,
) -> Prediction:
    """Prediction of `plan` for `usage`; its own predictions are for the usual one. The peak is also
    for this usage: a short prompt does not use the whole workspace."""
    profile = profile.with_kernel(plan.int4_kernel)
    placement = plan.placement(method)
    ledger = placement.ledger
    draft = None if method == "plain" else plan.draft_of(method)
    tree, proposer = draft.tree if draft else None, None
    if method in WITH_DRAFT_MODEL:
        assert draft is not None and draft_model is not None
        proposer = Proposer(
            draft_model, draft.acceptance, draft.hierarchical_cost or NO_HIERARCHICAL_COST
        )
    else:
        draft_model = None
    resident_names, dequantized = set(placement.resident), set(placement.dequantized)
    decoded = tuple(
        part.name
        for part in stored.parts
        if part.name in dequantized or (part.is_residual and part.name in resident_names)
    )
    held = replace(stored, decoded=decoded, dequantized=placement.dequantized)
    block_bytes, num_slots = placement.block_bytes, placement.num_slots
    ring = Ring(block_bytes, num_slots) if num_slots else None
    candidate = Candidate(held, tree, plan.verify_widths, ring, method)
    inside = {*placement.resident, *placement.residuals}
    streamed = group_bytes([part for part in stored.parts if part.name not in inside])
    shape = Shape(
        plan.context,
        1,
        plan.verify_width if tree else 1,
        candidate.draft_width,
        min(plan.prefill_chunk_tokens, usage.prompt_tokens),
        plan.num_threads,
        plan.prompt_widths[0],
        draft_model=draft_model,
        substitutes_draft=method in WITH_SUBSTITUTES,
        drafts_with_head=plan.constraints.draft_head and method == "substitute",
    )
    workspace = min(workspace_bytes(spec, plan.device, shape), ledger.workspace)
    idle = ledger.guard + ledger.workspace - workspace
    expected = draft.acceptance.expected_round(draft.tree) if draft else ONE_TOKEN
    peak = ledger.total_bytes - idle
    passes = passes_of(
        spec, profile, tree, plan.verify_widths, expected, plan.prefill_chunk_tokens, usage,
        method=method, proposer=proposer,
    )  # fmt: skip
    return predict(profile, candidate, passes, streamed, expected, peak, usage)


def with_outlook(plan: Plan, solve: Solve, most_positions: int, drafting_from: int = 0) -> Plan:
    """The plan with `by_budget`, of its own context, and `by_context`. drafting_from: the budget
    from which a draft fits, if none does."""
    sizes = {int(plan.budget_bytes * step) for step in BUDGET_STEPS} | {drafting_from}
    sizes |= {plan.budget_bytes + next_bytes(plan.budget_bytes)}
    budgets = points(solve, [(size, plan.context) for size in sorted(sizes) if size])
    others = [some for some in CONTEXTS if some <= most_positions and some != plan.context]
    contexts = points(solve, [(plan.budget_bytes, some) for some in others])
    own = point_of(plan)
    return replace(
        plan,
        by_budget=tuple(sorted({*budgets, own}, key=lambda point: point.budget_bytes)),
        by_context=tuple(sorted({*contexts, own}, key=lambda point: point.context)),
    )


def points(solve: Solve, asked: Sequence[tuple[int, int]]) -> list[Point]:
    """Points of the feasible plans for pairs of budget and context."""
    found = []
    for budget, context in asked:
        try:
            plan = solve(budget, context)
        except SubspecError as error:
            if error.exit_code != Exit.INFEASIBLE:
                raise
            continue
        found.append(point_of(plan))
    return found


def point_of(plan: Plan) -> Point:
    full = plan.full_context.tokens_per_second if plan.full_context else None
    return Point(plan.budget_bytes, plan.context, plan.method, speed_of(plan), full)


def speed_of(plan: Plan) -> float:
    return plan.predicted[plan.method].tokens_per_second


def next_bytes(budget_bytes: int) -> int:
    return min(NEXT_BYTES, int(budget_bytes * NEXT_SHARE))


def memory_gain_line(plan: Plan) -> str:
    """Gain of more memory, in one sentence; "" if it was not computed."""
    more = next_bytes(plan.budget_bytes)
    wanted = plan.budget_bytes + more
    point = next((p for p in plan.by_budget if p.budget_bytes == wanted), None)
    if point is None:
        return ""
    gain = point.tokens_per_second / speed_of(plan) - 1
    said = f"{short_size(more)} more memory: "
    faster = f"{gain:.0%} faster, {number(point.tokens_per_second)} tokens/s"
    said += faster if gain >= 0.005 else "no speedup"
    return f"{said}; {begins}" if (begins := where_drafting_begins(plan)) else said


def where_drafting_begins(plan: Plan) -> str:
    """The first budget with a draft; "" if the plan's own has room for one."""
    if set(plan.placements) != {"plain"}:
        return ""
    drafting = (point for point in plan.by_budget if point.method != "plain")
    first = next(drafting, None)
    if first is None:
        return ""
    size = size_argument(first.budget_bytes)
    return f"drafting begins at {size}: {number(first.tokens_per_second)} tokens/s"
