"""A rehearsal in its order: learn acceptance, solve, time the plan's own rounds, solve again."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.common.cpu_load import cpu_times, others_share
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.progress import Progress
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import HeadDraft, Method, Plan
from subspec.artifacts.profile import Profile
from subspec.planner.machine.timing import free_memory_bytes
from subspec.planner.rehearse.calibration import Sample, shipped_samples
from subspec.planner.rehearse.corrections import corrections, without_corrections
from subspec.planner.rehearse.rehearsal import (
    AT_ONCE,
    CONTEXT,
    Effort,
    Setting,
    learn_acceptance,
    learn_checks,
    time_head,
    time_rounds,
)
from subspec.planner.rehearse.replay import DEEPEST, WIDTHS
from subspec.planner.rehearse.rivals import with_fastest_drafter
from subspec.planner.solve.outlook import predict_for, speed_of
from subspec.planner.solve.predict import usual_usage
from subspec.planner.solve.search import PRIOR
from subspec.planner.solving import (
    Known,
    Tell,
    known_of,
    promised,
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
    """An artifact that is run on samples."""

    artifact: Artifact
    samples: tuple[Sample, ...]
    setting: Setting
    effort: Effort
    progress: Progress


def rehearse(
    known: Known, artifact: Artifact, progress: Progress, tell: Tell
) -> tuple[Plan, Profile]:
    """The plan and the profile after a rehearsal in as much of the budget as is free now. The plan
    is for all of it. If nothing can be run in what is free, nothing is learnt, and that is told:
    the weights that were packed for the plan are not lost."""
    request, profile = known.request, known.profile
    free = free_memory_bytes(request.device or profile.device) + profile.overhead_bytes
    room = int(free * FREE_SHARE)
    within = replace(request, budget_bytes=min(request.budget_bytes, room))
    try:
        plan, profile = rehearse_within(replace(known, request=within), artifact, progress, tell)
    except SubspecError as error:
        if error.exit_code not in (Exit.INFEASIBLE, Exit.RESOURCES):
            raise
        plan = with_sweeps(known, solve(known))
        tell(
            f"note: the artifact was not run, so acceptance and speed were not measured "
            f"({error.message}): when more memory is free, subspec-plan --from ARTIFACT --rehearse "
            "60"
        )
        return plan, profile
    if within == request:
        return plan, profile
    tell(
        f"note: rehearsed within {short_size(room)}, which are free now; the plan is for "
        f"{short_size(request.budget_bytes)}"
    )
    learnt = known_of(request, replace(artifact, plan=plan), profile)
    return with_sweeps(learnt, with_known_drafter(solve(learnt), plan)), profile


def rehearse_within(
    known: Known, artifact: Artifact, progress: Progress, tell: Tell
) -> tuple[Plan, Profile]:
    """Runs the artifact to learn acceptance, then the plan that is best by it, for corrections, and
    plans again with both."""
    request, started = known.request, cpu_times()
    known = replace(known, profile=without_corrections(known.profile))
    effort = effort_of(known)
    samples, setting = (
        request.samples or shipped_samples(),
        Setting(request.link_bandwidth, request.device),
    )
    run = Rehearsal(artifact, samples, setting, effort, progress)
    known = with_checks(with_draft_model(with_substitutes(known, run), run), run)
    trial = solve(known)
    rounds = time_rounds(
        artifact, trial, promised(known, trial), samples, setting, progress, effort
    )
    profile = replace(known.profile, corrections=corrections(rounds, request.link_bandwidth))
    profile = with_load(profile, others_share(started, cpu_times()), tell)
    known = replace(known, profile=profile)
    plan = solve(known)
    head = time_head(artifact, plan, samples, setting, progress, effort.time_seconds)
    if head is not None:
        plan = replace(plan, head_draft=head, reasons=(*plan.reasons, why_head(known.spec, head)))
    asked = request.constraints
    if asked.method is None and asked.width is None and asked.depth is None:
        plan = with_fastest_drafter(artifact, plan, samples, setting, progress, effort.time_seconds)
    return with_sweeps(known, plan), profile


def effort_of(known: Known) -> Effort:
    seconds = known.request.rehearse
    whole = Effort() if seconds is None else Effort.within(seconds)
    return whole if known.proposer is None else whole.divided(3)  # one for each way to draft


def with_substitutes(known: Known, run: Rehearsal) -> Known:
    """With the acceptance of the substitutes' trees, unless what is asked for has none."""
    asked = known.request.constraints
    if asked.method in ("plain", "draft-model"):
        return known
    # As if there were nothing else: other methods are learnt for themselves.
    alone = replace(asked, method="substitute" if asked.method else None)
    found = acceptance_of("substitute", replace(known.constrained(alone), proposer=None), run)
    return known.learnt("substitute", found) if found else known


def with_draft_model(known: Known, run: Rehearsal) -> Known:
    """With the acceptance of the draft model's own trees."""
    if known.proposer is None or known.request.constraints.method not in (None, "draft-model"):
        return known
    found = acceptance_of("draft-model", known, run)
    return known.learnt("draft-model", found) if found else known


def acceptance_of(method: Method, known: Known, run: Rehearsal) -> Acceptance | None:
    """Of its trees; None: the budget has no room for a deep draft."""
    company = plan_for_company(known, method)
    if company is None:
        return None
    return learn_acceptance(
        run.artifact, company, run.samples, run.setting, settles(known, method), run.progress,
        run.effort, method,
    )  # fmt: skip


def with_checks(known: Known, run: Rehearsal) -> Known:
    """With how often the substitutes agree with what the draft model proposes."""
    both: Method = "substitute+draft-model"
    proposer = known.proposer
    if proposer is None or known.request.constraints.method not in (None, both):
        return known
    if proposer.spec.delta_nets:
        return known
    company = plan_for_company(known, both)
    if company is None:
        return known
    checks = learn_checks(
        run.artifact, company, run.samples, run.setting, run.progress, run.effort.time_seconds
    )
    return replace(known, proposer=replace(proposer, checks=checks)) if checks else known


def plan_for_company(known: Known, method: Method = "substitute") -> Plan | None:
    """A plan within the budget for as many short answers at once as it has room for, and then for
    as wide trees. None: it has none for a deep draft of the method."""
    asked = replace(
        known.request.constraints,
        context=min(CONTEXT, known.spec.max_positions),
        depth=DEEPEST,
        method=method,
        min_path_probability=None,
    )
    for num_sequences in AT_ONCE:
        for width in reversed(WIDTHS[known.profile.device]):
            constraints = replace(asked, num_sequences=num_sequences, width=width)
            again = replace(known.constrained(constraints), acceptance=PRIOR)
            plan = solve_if_feasible(again)
            if plan is not None:
                return plan
    return None


def settles(known: Known, method: Method = "substitute") -> Callable[[Acceptance], bool]:
    """Tells whether more answers would hardly change the plan: the one that was chosen with fewer
    is still as good as the best, and what a round gives is known well. Another method is settled if
    it was the best before too. method: the one whose acceptance it is told of."""
    before: Plan | None = None
    assert known.stored is not None
    stored = known.stored

    def settled(acceptance: Acceptance) -> bool:
        nonlocal before
        plan, last = solve(known.learnt(method, acceptance)), before
        before = plan
        if last is None or plan.method != method or last.method != plan.method:
            return last is not None and last.method == plan.method
        tree = plan.draft.tree
        tokens, margin = acceptance.tokens(tree), acceptance.margin(tree)
        if method == "substitute":
            last = replace(last, acceptance=acceptance)
        else:
            last = replace(last, drafts={method: replace(last.draft, acceptance=acceptance)})
        still = predict_for(
            known.spec, known.slowed, last, stored, method, usual_usage(last.context),
            known.draft_model,
        )  # fmt: skip
        return (
            still.tokens_per_second >= SETTLED_SPEED * speed_of(plan)
            and margin <= SETTLED_MARGIN * tokens
        )

    return settled


def why_head(spec: ModelSpec, head: HeadDraft) -> str:
    """A reason for --drafter, or against it."""
    assert spec.draft_head is not None
    name, tree = spec.draft_head.layout, head.tree
    return (
        f"the draft head gave {head.tokens_per_second:.2f} tokens/s, {head.tokens_per_round:.2f} "
        f"a round with a tree {tree.width} wide, {tree.depth} deep: --drafter {name}"
    )
