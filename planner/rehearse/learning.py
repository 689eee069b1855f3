"""A rehearsal: measure acceptance, solve, time rounds of the plan, solve again."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.common.cpu_load import background_cpu_share, cpu_times
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.progress import Progress
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import DraftHeadResult, Method, Plan
from subspec.artifacts.profile import Profile
from subspec.planner.machine.timing import free_memory_bytes
from subspec.planner.rehearse.calibration import Sample, shipped_samples
from subspec.planner.rehearse.corrections import corrections, without_corrections
from subspec.planner.rehearse.rehearsal import (
    AT_ONCE,
    CONTEXT,
    Effort,
    Setting,
    measure_acceptance,
    measure_hierarchical_cost,
    time_head,
    time_rounds,
)
from subspec.planner.rehearse.replay import MAX_DEPTH, WIDTHS
from subspec.planner.rehearse.rivals import with_fastest_drafter
from subspec.planner.solve.outlook import predict_for, speed_of
from subspec.planner.solve.predict import usual_usage
from subspec.planner.solve.search import PRIOR
from subspec.planner.solving import (
    Notify,
    PlanInputs,
    inputs_from_artifact,
    predictor_for,
    solve,
    solve_if_feasible,
    with_known_drafter,
    with_load,
    with_sweeps,
)

FREE_SHARE = 0.97  # of what is free now that a rehearsal takes: it may be less a moment later
SETTLED_SPEED = 0.98  # of the best plan's, by the plan that was the best before
SETTLED_MARGIN = 0.12  # of a round's tokens, to be known within


@dataclass(frozen=True)
class Rehearsal:
    """Everything needed to run an artifact on samples."""

    artifact: Artifact
    samples: tuple[Sample, ...]
    setting: Setting
    effort: Effort
    progress: Progress


def rehearse(
    inputs: PlanInputs, artifact: Artifact, progress: Progress, notify: Notify
) -> tuple[Plan, Profile]:
    """Rehearse in as much of the budget as is free now. Returns the plan for the whole budget, and
    the profile. If nothing fits what is free, nothing is measured, with a note, so that the built
    artifact is not lost."""
    request, profile = inputs.request, inputs.profile
    free = free_memory_bytes(request.device or profile.device) + profile.overhead_bytes
    room = int(free * FREE_SHARE)
    within = replace(request, budget_bytes=min(request.budget_bytes, room))
    try:
        now, plan = rehearse_within(replace(inputs, request=within), artifact, progress, notify)
    except SubspecError as error:
        if error.exit_code not in (Exit.INFEASIBLE, Exit.RESOURCES):
            raise
        plan = with_sweeps(inputs, solve(inputs))
        notify(
            f"note: the artifact was not run, so acceptance and speed were not measured "
            f"({error.message}): when more memory is free, subspec-plan --from ARTIFACT --rehearse "
            "60"
        )
        return plan, profile
    if within == request:
        return with_sweeps(now, plan), now.profile
    notify(
        f"note: rehearsed within {short_size(room)}, which are free now; the plan is for "
        f"{short_size(request.budget_bytes)}"
    )
    whole = inputs_from_artifact(request, replace(artifact, plan=plan), now.profile)
    return with_sweeps(whole, with_known_drafter(solve(whole), plan)), now.profile


def rehearse_within(
    inputs: PlanInputs, artifact: Artifact, progress: Progress, notify: Notify
) -> tuple[PlanInputs, Plan]:
    """Measure acceptance, time rounds of the plan that is best by it for corrections, and plan
    again with both."""
    request, started = inputs.request, cpu_times()
    inputs = replace(inputs, profile=without_corrections(inputs.profile))
    effort = effort_of(inputs)
    samples, setting = (
        request.samples or shipped_samples(),
        Setting(request.link_bandwidth, request.device),
    )
    run = Rehearsal(artifact, samples, setting, effort, progress)
    inputs = with_hierarchical_cost(with_draft_model(with_substitutes(inputs, run), run), run)
    trial = solve(inputs)
    rounds = time_rounds(
        artifact, trial, predictor_for(inputs, trial), samples, setting, progress, effort
    )
    profile = replace(inputs.profile, corrections=corrections(rounds, request.link_bandwidth))
    profile = with_load(profile, background_cpu_share(started, cpu_times()), notify)
    inputs = replace(inputs, profile=profile)
    plan = solve(inputs)
    head = time_head(artifact, plan, samples, setting, progress, effort.time_seconds)
    if head is not None:
        plan = replace(
            plan, draft_head_result=head, reasons=(*plan.reasons, why_head(inputs.spec, head))
        )
    asked = request.constraints
    if asked.method is None and asked.width is None and asked.depth is None:
        plan = with_fastest_drafter(artifact, plan, samples, setting, progress, effort.time_seconds)
    return inputs, plan


def effort_of(inputs: PlanInputs) -> Effort:
    seconds = inputs.request.rehearse
    whole = Effort() if seconds is None else Effort.within(seconds)
    return whole if inputs.proposer is None else whole.divided(3)  # one for each way to draft


def with_substitutes(inputs: PlanInputs, run: Rehearsal) -> PlanInputs:
    """The inputs with the acceptance of the substitutes' trees, unless the constraints exclude
    them."""
    asked = inputs.request.constraints
    if asked.method in ("plain", "draft-model"):
        return inputs
    # As if there were nothing else: other methods are measured for themselves.
    alone = replace(asked, method="substitute" if asked.method else None)
    found = acceptance_of("substitute", replace(inputs.constrained(alone), proposer=None), run)
    return inputs.with_acceptance("substitute", found) if found else inputs


def with_draft_model(inputs: PlanInputs, run: Rehearsal) -> PlanInputs:
    """The inputs with the acceptance of the draft model's own trees."""
    if inputs.proposer is None or inputs.request.constraints.method not in (None, "draft-model"):
        return inputs
    found = acceptance_of("draft-model", inputs, run)
    return inputs.with_acceptance("draft-model", found) if found else inputs


def acceptance_of(method: Method, inputs: PlanInputs, run: Rehearsal) -> Acceptance | None:
    """Measured acceptance of a method's trees; None: the budget has no room for a deep draft."""
    calibration = calibration_plan(inputs, method)
    if calibration is None:
        return None
    return measure_acceptance(
        run.artifact, calibration, run.samples, run.setting, settles(inputs, method), run.progress,
        run.effort, method,
    )  # fmt: skip


def with_hierarchical_cost(inputs: PlanInputs, run: Rehearsal) -> PlanInputs:
    """The inputs with the measured cost of hierarchical drafting."""
    both: Method = "substitute+draft-model"
    proposer = inputs.proposer
    if proposer is None or inputs.request.constraints.method not in (None, both):
        return inputs
    if proposer.spec.delta_nets:
        return inputs
    calibration = calibration_plan(inputs, both)
    if calibration is None:
        return inputs
    cost = measure_hierarchical_cost(
        run.artifact, calibration, run.samples, run.setting, run.progress, run.effort.time_seconds
    )
    return replace(inputs, proposer=replace(proposer, hierarchical_cost=cost)) if cost else inputs


def calibration_plan(inputs: PlanInputs, method: Method = "substitute") -> Plan | None:
    """A plan within the budget for as many concurrent short answers as fit, and then for as wide
    trees as fit. None: no deep draft of the method fits."""
    asked = replace(
        inputs.request.constraints,
        context=min(CONTEXT, inputs.spec.max_positions),
        depth=MAX_DEPTH,
        method=method,
        min_path_probability=None,
    )
    for num_sequences in AT_ONCE:
        for width in reversed(WIDTHS[inputs.profile.device]):
            constraints = replace(asked, num_sequences=num_sequences, width=width)
            again = replace(inputs.constrained(constraints), acceptance=PRIOR)
            plan = solve_if_feasible(again)
            if plan is not None:
                return plan
    return None


def settles(inputs: PlanInputs, method: Method = "substitute") -> Callable[[Acceptance], bool]:
    """Predicate on acceptance: more answers would hardly change the plan. The plan chosen with
    fewer answers is still as good as the best, and the tokens of a round are known well. For other
    methods, it was the best before too. method: the one whose acceptance is passed."""
    before: Plan | None = None
    assert inputs.stored is not None
    stored = inputs.stored

    def settled(acceptance: Acceptance) -> bool:
        nonlocal before
        plan, last = solve(inputs.with_acceptance(method, acceptance)), before
        before = plan
        if last is None or plan.method != method or last.method != plan.method:
            return last is not None and last.method == plan.method
        tree = plan.draft.tree
        tokens, margin = acceptance.acceptance_length(tree), acceptance.margin(tree)
        if method == "substitute":
            last = replace(last, acceptance=acceptance)
        else:
            last = replace(last, drafts={method: replace(last.draft, acceptance=acceptance)})
        still = predict_for(
            inputs.spec, inputs.slowed, last, stored, method, usual_usage(last.context),
            inputs.draft_model,
        )  # fmt: skip
        return (
            still.tokens_per_second >= SETTLED_SPEED * speed_of(plan)
            and margin <= SETTLED_MARGIN * tokens
        )

    return settled


def why_head(spec: ModelSpec, head: DraftHeadResult) -> str:
    """Reason for using --drafter with the draft head, or against it."""
    assert spec.draft_head is not None
    name, tree = spec.draft_head.layout, head.tree
    return (
        f"the draft head reached {head.tokens_per_second:.2f} tokens/s, "
        f"{head.tokens_per_round:.2f} tokens per round, with a tree {tree.width} wide, "
        f"{tree.depth} deep: --drafter {name}"
    )
