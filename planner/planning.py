"""From a request to a plan and an artifact: measure, solve, build, rehearse, solve again.

Nothing here prints: a caller passes `tell`, which is given what a person should know, and
`progress`. Heavy imports wait until they are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from subspec.artifacts.common.cpu_load import cpu_times, others_share
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.format.folder import place_of
from subspec.artifacts.plan import USUAL, WITH_DRAFT_MODEL, Constraints, Method, Plan
from subspec.artifacts.profile import Profile

if TYPE_CHECKING:
    from subspec.artifacts.acceptance import Acceptance
    from subspec.artifacts.format.store import Artifact
    from subspec.artifacts.model import ModelSpec
    from subspec.artifacts.plan import HeadDraft
    from subspec.artifacts.runs import Run
    from subspec.planner.model.checkpoint import Checkpoint
    from subspec.planner.model.hub import Resolved
    from subspec.planner.rehearse.calibration import Sample
    from subspec.planner.rehearse.corrections import PredictFor
    from subspec.planner.rehearse.rehearsal import Effort, Setting
    from subspec.planner.solve.predict import Proposer
    from subspec.planner.solve.storage import Storage

SETTLED_SPEED = 0.98  # of the best plan's, by the plan that was the best before
SETTLED_MARGIN = 0.12  # of a round's tokens, to be known within

Progress = Callable[[str, float], None]
Tell = Callable[[str], None]


def nobody(line: str) -> None:
    """A `tell` that keeps silent."""


def unseen(stage: str, share: float) -> None:
    """A `progress` that nobody watches."""


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is for; the model, or the artifact that is re-planned, stands beside it."""

    budget_bytes: int
    constraints: Constraints = Constraints()
    device: str | None = None  # None: a GPU if there is one
    link_bandwidth: int | None = None  # plan as if the link gave so many bytes a second at most
    known_profile: Profile | None = None  # of a machine that is not measured, nor run on
    samples: "tuple[Sample, ...] | None" = None  # that acceptance is measured on; None: our own
    rehearse: float | None = None  # seconds that a rehearsal takes at most; 0: none; None: usual


@dataclass(frozen=True)
class DraftModelRef:
    """A smaller model that may draft."""

    model: "Resolved"
    quantized: bool = True  # False: its weights as they are


@dataclass(frozen=True)
class Planned:
    spec: "ModelSpec"
    plan: Plan
    profile: Profile


def plan_model(
    request: PlanRequest,
    model: "Resolved",
    out: Path,
    overwrite: bool = False,
    quantizer: str = "blocked",
    progress: Progress = unseen,
    tell: Tell = nobody,
    draft_model: DraftModelRef | None = None,
    draft_head: "Resolved | None" = None,
) -> Planned:
    """A checkpoint becomes the artifact `out`, with a draft head of its own or another one."""
    from subspec.planner.build.artifact import build
    from subspec.planner.build.quantize import QUANTIZERS
    from subspec.planner.model.checkpoint import read_checkpoint
    from subspec.planner.model.draft_head import with_draft_head
    from subspec.planner.model.tokenizer_files import read_tokenizer
    from subspec.planner.rehearse.rehearsal import pack_programs
    from subspec.planner.solve.search import PRIOR, unknown_proposer
    from subspec.planner.solve.storage import Storage

    request = within_memory(request, tell)
    checkpoint = read_checkpoint(model.path, model.source)
    if draft_head is not None:
        checkpoint = with_draft_head(checkpoint, draft_head.path)
    tokenizer = read_tokenizer(model.path)
    for note in (*checkpoint.notes, *tokenizer.notes):
        tell(f"note: {note}")
    spec = checkpoint.spec
    drafting = read_draft_model(draft_model) if draft_model else None
    for note in drafting.notes if drafting else ():
        tell(f"note: draft model: {note}")
    other = drafting.spec if drafting else None
    measured = request.known_profile or measure_here(request, spec, out, progress, tell, other)
    unknown = unknown_proposer(other)
    first = solve(request, spec, measured, PRIOR, proposer=unknown)
    found = Planned(spec, first, measured)

    def improve(artifact: "Artifact") -> tuple[Plan, Profile]:
        """Residuals are as long as they turned out by now: a plan for what they were thought to be
        need not fit. Raw weights are as long as they were."""
        nonlocal found
        stored = Storage(tuple(artifact.stored_parts()))
        # Another machine's plan cannot be run here.
        if request.known_profile is not None or request.rehearse == 0:
            plan = first
            if first.residuals:
                plan = solve(request, spec, measured, PRIOR, stored, unknown)
            plan = with_sweeps(request, spec, measured, stored, plan, unknown)
            found = Planned(spec, plan, measured)
        else:
            found = rehearsed(request, artifact, measured, stored, progress, tell)
        if request.known_profile is None:
            pack_programs(artifact.path, found.plan, spec)
        return found.plan, found.profile

    build(
        checkpoint, tokenizer, first, measured, out, overwrite, QUANTIZERS[quantizer], improve,
        progress, drafting,
    )  # fmt: skip
    return found


def plan_dry(
    request: PlanRequest,
    model: "Resolved",
    out: Path,
    progress: Progress = unseen,
    tell: Tell = nobody,
    draft_model: DraftModelRef | None = None,
    draft_head: "Resolved | None" = None,
) -> Planned:
    """From config and headers alone. out: on whose disk the artifact would lie."""
    from subspec.planner.model.checkpoint import Checkpoint, read_spec
    from subspec.planner.model.draft_head import with_draft_head
    from subspec.planner.model.generation import generation_notes, read_generation
    from subspec.planner.solve.search import PRIOR, unknown_proposer

    request = within_memory(request, tell)
    spec = read_spec(model.path, model.source)
    if draft_head is not None:
        spec = with_draft_head(Checkpoint(model.path, spec, {}), draft_head.path).spec
    other = None
    if draft_model is not None:
        own = read_spec(draft_model.model.path, draft_model.model.source)
        other = as_draft_model(own, draft_model)
    for note in generation_notes(read_generation(model.path)):
        tell(f"note: {note}")
    profile = request.known_profile or measure_here(request, spec, out, progress, tell, other)
    unknown = unknown_proposer(other)
    plan = solve(request, spec, profile, PRIOR, proposer=unknown)
    return Planned(spec, with_sweeps(request, spec, profile, None, plan, unknown), profile)


def read_draft_model(given: DraftModelRef) -> "Checkpoint":
    """A checkpoint of what an artifact has of a draft model. Raises SubspecError."""
    from subspec.planner.model.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(given.model.path, given.model.source)
    return replace(checkpoint, spec=as_draft_model(checkpoint.spec, given))


def as_draft_model(spec: "ModelSpec", given: DraftModelRef) -> "ModelSpec":
    """What it has in FP8 is multiplied out."""
    return replace(spec, fp8={}, draft_head=None, quantized=given.quantized)


def known_proposer(artifact: "Artifact") -> "Proposer | None":
    """The artifact's draft model, with what its plan knows of it."""
    from subspec.planner.solve.search import unknown_proposer

    found = unknown_proposer(artifact.draft_model)
    if found is None:
        return None
    drafts = artifact.plan.drafts
    if "draft-model" in drafts:
        found = replace(found, acceptance=drafts["draft-model"].acceptance)
    both = drafts.get("substitute+draft-model")
    return replace(found, checks=both.checks) if both and both.checks else found


def plan_again(
    request: PlanRequest,
    artifact: "Artifact",
    out: Path,
    measure_again: bool = False,
    sweeps: bool = True,
    progress: Progress = unseen,
    tell: Tell = nobody,
) -> Planned:
    """Another plan over the weights of an artifact, which stay as they are; nothing is written.

    measure_again: this machine is measured and the artifact rehearsed, even where its own profile
    would do; the request's samples alone have it rehearsed too. sweeps: with what other budgets and
    contexts would give; without them nothing is rehearsed for measure_again.
    """
    from subspec.planner.solve.storage import Storage

    spec, request = artifact.spec, as_stored(within_memory(request, tell))
    stored = Storage(tuple(artifact.stored_parts()))
    profile = request.known_profile
    if profile is None:
        profile = profile_for(request, artifact, out, measure_again, progress, tell)
    wants = request.samples is not None or request.rehearse or (measure_again and sweeps)
    if wants and request.rehearse != 0:
        return rehearsed(request, artifact, profile, stored, progress, tell)
    proposer = known_proposer(artifact)
    plan = solve(request, spec, profile, artifact.plan.acceptance, stored, proposer)
    if sweeps:
        plan = with_sweeps(request, spec, profile, stored, plan, proposer)
    return Planned(spec, plan, profile)


def plan_from_runs(
    request: PlanRequest,
    artifact: "Artifact",
    out: Path,
    progress: Progress = unseen,
    tell: Tell = nobody,
) -> Planned:
    """Another plan over the weights of an artifact, with what its recorded runs taught."""
    from subspec.planner.rehearse.corrections import with_runs
    from subspec.planner.solve.storage import Storage

    spec, request = artifact.spec, as_stored(within_memory(request, tell))
    stored = Storage(tuple(artifact.stored_parts()))
    profile = profile_for(request, artifact, out, False, progress, tell)
    runs = recorded_runs(artifact, profile)
    before, proposer = artifact.plan, known_proposer(artifact)
    # Checked trees are nearly the substitutes' own.
    checked = before.method == "substitute+draft-model"
    method: Method = before.method if checked else "substitute"
    acceptance = with_runs(before.acceptance, before, runs, method)
    if proposer is not None:
        learnt = with_runs(proposer.acceptance, before, runs, "draft-model")
        proposer = replace(proposer, acceptance=learnt)
    profile = corrections_from(request, artifact, profile, stored, runs)
    plan = solve(request, spec, profile, acceptance, stored, proposer)
    plan = with_sweeps(request, spec, profile, stored, plan, proposer)
    return Planned(spec, plan, profile)


def within_memory(request: PlanRequest, tell: Tell) -> PlanRequest:
    """The request with a budget that this machine has; another machine's is not known."""
    if request.known_profile is not None:
        return request
    from subspec.planner.machine.timing import fast_memory_bytes, pick_device

    device = pick_device(request.device)
    most = fast_memory_bytes(device)
    if request.budget_bytes <= most:
        return request
    tell(
        f"note: a budget of {short_size(request.budget_bytes)} is more than this machine's "
        f"{short_size(most)} of {device} memory: planned for {short_size(most)}"
    )
    return replace(request, budget_bytes=most)


def as_stored(request: PlanRequest) -> PlanRequest:
    """The request for an artifact: its weights stay encoded as they are."""
    return replace(request, constraints=replace(request.constraints, encoding="kept"))


def rehearsed(
    request: PlanRequest,
    artifact: "Artifact",
    profile: Profile,
    stored: "Storage",
    progress: Progress,
    tell: Tell,
) -> Planned:
    """Runs the artifact to learn acceptance, then the plan that is best by it, for corrections, and
    plans again with both."""
    from subspec.planner.rehearse.calibration import shipped_samples
    from subspec.planner.rehearse.corrections import corrections, without_corrections
    from subspec.planner.rehearse.rehearsal import (
        Effort,
        Setting,
        learn_acceptance,
        time_head,
        time_rounds,
    )

    spec, profile = artifact.spec, without_corrections(profile)
    samples = request.samples or shipped_samples()
    setting, started = Setting(request.link_bandwidth, request.device), cpu_times()
    effort = Effort() if request.rehearse is None else Effort.within(request.rehearse)
    acceptance, proposer = artifact.plan.acceptance, known_proposer(artifact)
    if proposer is not None:
        effort = effort.divided(3)
    company = plan_for_company(request, spec, profile, stored)
    if company is not None and request.constraints.method not in ("plain", "draft-model"):
        alone, asked = request, request.constraints
        if asked.method in WITH_DRAFT_MODEL:
            alone = replace(request, constraints=replace(asked, method="substitute"))
        learnt = learn_acceptance(
            artifact, company, samples, setting, settles(alone, spec, profile, stored),
            progress, effort,
        )  # fmt: skip
        acceptance = learnt or acceptance
    if proposer is not None and request.constraints.method != "plain":
        proposer = rehearsed_proposer(
            request, artifact, profile, stored, acceptance, proposer, setting, effort, progress
        )
    trial = solve(request, spec, profile, acceptance, stored, proposer)
    said = predictor(request, spec, profile, trial, stored, artifact.draft_model)
    rounds = time_rounds(artifact, trial, said, samples, setting, progress, effort)
    profile = replace(profile, corrections=corrections(rounds, request.link_bandwidth))
    profile = with_load(profile, others_share(started, cpu_times()), tell)
    plan = solve(request, spec, profile, acceptance, stored, proposer)
    plan = with_sweeps(request, spec, profile, stored, plan, proposer)
    head = time_head(artifact, plan, samples, setting, progress, effort.time_seconds)
    if head is not None:
        plan = replace(plan, head_draft=head, reasons=(*plan.reasons, why_head(spec, head)))
    return Planned(spec, plan, profile)


def why_head(spec: "ModelSpec", head: "HeadDraft") -> str:
    """A reason for --drafter, or against it."""
    assert spec.draft_head is not None
    name, tree = spec.draft_head.layout, head.tree
    return (
        f"the draft head gave {head.tokens_per_second:.2f} tokens/s, {head.tokens_per_round:.2f} "
        f"a round with a tree {tree.width} wide, {tree.depth} deep: --drafter {name}"
    )


def rehearsed_proposer(
    request: PlanRequest,
    artifact: "Artifact",
    profile: Profile,
    stored: "Storage",
    acceptance: "Acceptance",
    proposer: "Proposer",
    setting: "Setting",
    effort: "Effort",
    progress: Progress,
) -> "Proposer":
    """The draft model with what running it teaches: acceptance of its trees, and how often the
    substitutes agree with it. acceptance: of the substitutes."""
    from subspec.planner.rehearse.calibration import shipped_samples
    from subspec.planner.rehearse.rehearsal import learn_acceptance, learn_checks

    spec, samples, asked = artifact.spec, request.samples or shipped_samples(), request.constraints
    alone = plan_for_company(request, spec, profile, stored, "draft-model", proposer)
    if alone is not None and asked.method in (None, "draft-model"):
        enough = settles(request, spec, profile, stored, "draft-model", acceptance, proposer)
        learnt = learn_acceptance(
            artifact, alone, samples, setting, enough, progress, effort, "draft-model"
        )
        proposer = replace(proposer, acceptance=learnt or proposer.acceptance)
    both: Method = "substitute+draft-model"
    nets = spec.delta_nets or proposer.spec.delta_nets
    if nets or asked.method not in (None, both):
        return proposer
    checking = plan_for_company(request, spec, profile, stored, both, proposer)
    if checking is None:
        return proposer
    seconds = effort.time_seconds
    checks = learn_checks(artifact, checking, samples, setting, progress, seconds)
    return replace(proposer, checks=checks or proposer.checks)


def plan_for_company(
    request: PlanRequest,
    spec: "ModelSpec",
    profile: Profile,
    stored: "Storage",
    method: Method = "substitute",
    proposer: "Proposer | None" = None,
) -> Plan | None:
    """A plan within the budget for as many short answers at once as it has room for, and then for
    as wide trees. None: it has none for a deep draft of the method."""
    from subspec.planner.rehearse.rehearsal import AT_ONCE, CONTEXT
    from subspec.planner.rehearse.replay import DEEPEST, WIDTHS
    from subspec.planner.solve.search import PRIOR

    asked = replace(
        request.constraints,
        context=min(CONTEXT, spec.max_positions),
        depth=DEEPEST,
        method=method,
        min_path_probability=None,
    )
    for num_sequences in AT_ONCE:
        for width in reversed(WIDTHS[profile.device]):
            constraints = replace(asked, num_sequences=num_sequences, width=width)
            try:
                return solve(
                    replace(request, constraints=constraints), spec, profile, PRIOR, stored,
                    proposer,
                )  # fmt: skip
            except SubspecError as error:
                if error.exit_code != Exit.INFEASIBLE:
                    raise
    return None


def settles(
    request: PlanRequest,
    spec: "ModelSpec",
    profile: Profile,
    stored: "Storage",
    learnt: Method = "substitute",
    of_substitutes: "Acceptance | None" = None,
    proposer: "Proposer | None" = None,
) -> "Callable[[Acceptance], bool]":
    """Tells whether more answers would hardly change the plan: the one that was chosen with fewer
    is still as good as the best, and what a round gives is known well. Another method is settled if
    it was the best before too. learnt: the method whose acceptance it is told of."""
    from subspec.planner.solve.outlook import predict_for, speed_of
    from subspec.planner.solve.predict import usage_within

    before: Plan | None = None
    slow = slowed(request, profile)

    def settled(acceptance: "Acceptance") -> bool:
        nonlocal before
        if learnt == "substitute":
            plan, last = solve(request, spec, profile, acceptance, stored), before
        else:
            assert of_substitutes is not None and proposer is not None
            known_now = replace(proposer, acceptance=acceptance)
            plan, last = solve(request, spec, profile, of_substitutes, stored, known_now), before
        before = plan
        if last is None or plan.method != learnt or last.method != plan.method:
            return last is not None and last.method == plan.method
        tree = plan.draft.tree
        known = tree.width, tree.depth, tree.min_path_probability
        tokens, margin = acceptance.tokens(*known), acceptance.margin(*known)
        if learnt == "substitute":
            last = replace(last, acceptance=acceptance)
        else:
            last = replace(last, drafts={learnt: replace(last.draft, acceptance=acceptance)})
        still = predict_for(
            spec, slow, last, stored, learnt, usage_within(last.context, USUAL),
            proposer.spec if proposer else None,
        )  # fmt: skip
        return (
            still.tokens_per_second >= SETTLED_SPEED * speed_of(plan)
            and margin <= SETTLED_MARGIN * tokens
        )

    return settled


def predictor(
    request: PlanRequest,
    spec: "ModelSpec",
    profile: Profile,
    plan: Plan,
    stored: "Storage",
    draft_model: "ModelSpec | None",
) -> "PredictFor":
    """What the plan promises for a usage, by the profile's own terms. A check of what streams first
    is left out: it happens once."""
    from subspec.planner.rehearse.corrections import without_corrections
    from subspec.planner.solve.outlook import predict_for

    bare = replace(without_corrections(slowed(request, profile)), digest_rate=0.0)
    return lambda method, usage: predict_for(spec, bare, plan, stored, method, usage, draft_model)


def recorded_runs(artifact: "Artifact", profile: Profile) -> "list[Run]":
    """The recorded runs of this plan on the profile's machine. Raises SubspecError(USAGE) if there
    are none."""
    from subspec.artifacts.runs import plan_digest, read_runs

    digest, recorded = plan_digest(artifact.plan), read_runs(artifact.path)
    runs = [run for run in recorded if run.plan == digest and run.machine == profile.machine]
    if not runs:
        raise SubspecError(
            Exit.USAGE,
            f"{artifact.path} has no record of a run of its plan on this machine "
            f"({len(recorded)} of others)",
            f'run it first: subspec-run {artifact.path} "your prompt"',
        )
    return runs


def corrections_from(
    request: PlanRequest,
    artifact: "Artifact",
    profile: Profile,
    stored: "Storage",
    runs: "list[Run]",
) -> Profile:
    """Folds the runs' times into the profile; phases without a run stay as they were."""
    from subspec.planner.rehearse.corrections import corrections, rounds_of_runs, updated

    free = [run for run in runs if run.link_bandwidth == request.link_bandwidth]
    promised = predictor(
        request, artifact.spec, profile, artifact.plan, stored, artifact.draft_model
    )
    rounds = rounds_of_runs(free, promised)
    found = corrections(rounds, request.link_bandwidth)
    return replace(
        profile, corrections=updated(slowed(request, profile).corrections, rounds, found)
    )


def profile_for(
    request: PlanRequest,
    artifact: "Artifact",
    out: Path,
    measure_again: bool,
    progress: Progress,
    tell: Tell,
) -> Profile:
    """The artifact's own profile if it was measured on this machine, else a new one."""
    from subspec.planner.machine.measure import machine_name
    from subspec.planner.machine.timing import pick_device

    if not measure_again:
        if artifact.profile.machine == machine_name(pick_device(request.device)):
            tell_load(artifact.profile, tell)
            return artifact.profile
        tell(f"the profile is of another machine ({artifact.profile.machine}): measuring this one")
    return measure_here(request, artifact.spec, out, progress, tell, artifact.draft_model)


def measure_here(
    request: PlanRequest,
    spec: "ModelSpec",
    out: Path,
    progress: Progress,
    tell: Tell,
    draft_model: "ModelSpec | None" = None,
) -> Profile:
    from subspec.planner.machine.measure import measure
    from subspec.planner.machine.timing import pick_device

    context = request.constraints.context
    if context is not None and context > spec.max_positions:
        raise SubspecError(
            Exit.USAGE,
            f"--context {context} is more than the model's {spec.max_positions} positions",
            f"--context {spec.max_positions} or less",
        )
    profile = measure(
        spec, pick_device(request.device), place_of(out), progress, draft_model=draft_model
    )
    if profile.free_bytes < request.budget_bytes:
        tell(
            f"note: the budget is {short_size(request.budget_bytes)}, but only "
            f"{short_size(profile.free_bytes)} of {profile.device} memory are free now: runs are "
            "planned again for less until more is free"
        )
    tell_load(profile, tell)
    return profile


def with_load(profile: Profile, others: float, tell: Tell) -> Profile:
    """The profile after a rehearsal beside which other programs used this share of the CPUs; told
    unless it was under load before."""
    busier = replace(profile, others_cpu_share=max(profile.others_cpu_share, others))
    if not profile.under_load:
        tell_load(busier, tell)
    return busier


def tell_load(profile: Profile, tell: Tell) -> None:
    if profile.under_load:
        tell(
            f"note: other programs used {profile.others_cpu_share:.0%} of the CPUs while this "
            "machine was measured: predictions are too slow, and another plan may be faster; when "
            "they have ended, measure again (subspec-plan --from ARTIFACT --reprofile)"
        )


def solve(
    request: PlanRequest,
    spec: "ModelSpec",
    profile: Profile,
    acceptance: "Acceptance",
    stored: "Storage | None" = None,
    proposer: "Proposer | None" = None,
) -> Plan:
    from subspec.planner.solve.search import search

    slow = slowed(request, profile)
    plan = search(
        spec, slow, request.budget_bytes, request.constraints, acceptance, stored,
        proposer=proposer,
    )  # fmt: skip
    if request.link_bandwidth is None:
        return plan
    reason = f"planned as if the link gave {short_size(request.link_bandwidth)}/s at most"
    return replace(plan, reasons=(f"{reason}: --link-bandwidth", *plan.reasons))


def with_sweeps(
    request: PlanRequest,
    spec: "ModelSpec",
    profile: Profile,
    stored: "Storage | None",
    plan: Plan,
    proposer: "Proposer | None",
) -> Plan:
    """The plan with what other budgets and contexts would give."""
    from subspec.planner.solve.outlook import with_outlook
    from subspec.planner.solve.search import search

    slow, constraints = slowed(request, profile), request.constraints

    def best(budget: int, context: int | None) -> Plan:
        fixed = replace(constraints, context=context)
        return search(spec, slow, budget, fixed, plan.acceptance, stored, proposer=proposer)

    return with_outlook(plan, best, constraints.context is not None, spec.max_positions)


def slowed(request: PlanRequest, profile: Profile) -> Profile:
    """The profile under the request's link bandwidth."""
    from subspec.planner.machine.profiles import under_link

    return under_link(profile, request.link_bandwidth)
