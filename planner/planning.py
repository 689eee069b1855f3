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
from subspec.artifacts.plan import USUAL, Constraints, Plan
from subspec.artifacts.profile import Profile

if TYPE_CHECKING:
    from subspec.artifacts.acceptance import Acceptance
    from subspec.artifacts.format.store import Artifact
    from subspec.artifacts.model import ModelSpec
    from subspec.artifacts.runs import Run
    from subspec.planner.model.hub import Resolved
    from subspec.planner.rehearse.calibration import Sample
    from subspec.planner.rehearse.corrections import PredictFor
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
) -> Planned:
    """A checkpoint becomes the artifact `out`."""
    from subspec.planner.build.artifact import build
    from subspec.planner.build.quantize import QUANTIZERS
    from subspec.planner.model.checkpoint import read_checkpoint
    from subspec.planner.model.tokenizer_files import read_tokenizer
    from subspec.planner.rehearse.rehearsal import pack_programs
    from subspec.planner.solve.search import PRIOR
    from subspec.planner.solve.storage import Storage

    request = within_memory(request, tell)
    checkpoint = read_checkpoint(model.path, model.source)
    tokenizer = read_tokenizer(model.path)
    for note in (*checkpoint.notes, *tokenizer.notes):
        tell(f"note: {note}")
    spec = checkpoint.spec
    measured = request.known_profile or measure_here(request, spec, out, progress, tell)
    first = solve(request, spec, measured, PRIOR)
    found = Planned(spec, first, measured)

    def improve(artifact: "Artifact") -> tuple[Plan, Profile]:
        """Residuals are as long as they turned out by now: a plan for what they were thought to be
        need not fit. Raw weights are as long as they were."""
        nonlocal found
        stored = Storage(tuple(artifact.stored_parts()))
        # Another machine's plan cannot be run here.
        if request.known_profile is not None or request.rehearse == 0:
            plan = solve(request, spec, measured, PRIOR, stored) if first.residuals else first
            found = Planned(spec, with_sweeps(request, spec, measured, stored, plan), measured)
        else:
            found = rehearsed(request, artifact, measured, stored, progress, tell)
        if request.known_profile is None:
            pack_programs(artifact.path, found.plan, spec)
        return found.plan, found.profile

    build(
        checkpoint, tokenizer, first, measured, out, overwrite, QUANTIZERS[quantizer], improve,
        progress,
    )  # fmt: skip
    return found


def plan_dry(
    request: PlanRequest,
    model: "Resolved",
    out: Path,
    progress: Progress = unseen,
    tell: Tell = nobody,
) -> Planned:
    """From config and headers alone. out: on whose disk the artifact would lie."""
    from subspec.planner.model.checkpoint import read_spec
    from subspec.planner.model.generation import generation_notes, read_generation
    from subspec.planner.solve.search import PRIOR

    request = within_memory(request, tell)
    spec = read_spec(model.path, model.source)
    for note in generation_notes(read_generation(model.path)):
        tell(f"note: {note}")
    profile = request.known_profile or measure_here(request, spec, out, progress, tell)
    plan = solve(request, spec, profile, PRIOR)
    return Planned(spec, with_sweeps(request, spec, profile, None, plan), profile)


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
    plan = solve(request, spec, profile, artifact.plan.acceptance, stored)
    if sweeps:
        plan = with_sweeps(request, spec, profile, stored, plan)
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
    acceptance = with_runs(artifact.plan.acceptance, artifact.plan, runs)
    profile = corrections_from(request, artifact, profile, stored, runs)
    plan = solve(request, spec, profile, acceptance, stored)
    return Planned(spec, with_sweeps(request, spec, profile, stored, plan), profile)


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
    from subspec.planner.rehearse.rehearsal import Effort, Setting, learn_acceptance, time_rounds

    spec, profile = artifact.spec, without_corrections(profile)
    samples = request.samples or shipped_samples()
    setting, started = Setting(request.link_bandwidth, request.device), cpu_times()
    effort = Effort() if request.rehearse is None else Effort.within(request.rehearse)
    acceptance, company = None, plan_for_company(request, spec, profile, stored)
    if company is not None and request.constraints.method != "plain":
        acceptance = learn_acceptance(
            artifact, company, samples, setting, settles(request, spec, profile, stored),
            progress, effort,
        )  # fmt: skip
    acceptance = acceptance or artifact.plan.acceptance
    trial = solve(request, spec, profile, acceptance, stored)
    rounds = time_rounds(
        artifact, trial, predictor(request, spec, profile, trial, stored), samples, setting,
        progress, effort,
    )  # fmt: skip
    profile = replace(profile, corrections=corrections(rounds, request.link_bandwidth))
    profile = with_load(profile, others_share(started, cpu_times()), tell)
    plan = solve(request, spec, profile, acceptance, stored)
    return Planned(spec, with_sweeps(request, spec, profile, stored, plan), profile)


def plan_for_company(
    request: PlanRequest, spec: "ModelSpec", profile: Profile, stored: "Storage"
) -> Plan | None:
    """A plan within the budget for as many short answers at once as it has room for, and then for
    as wide trees. None: it has none for a deep draft."""
    from subspec.planner.rehearse.rehearsal import AT_ONCE, CONTEXT
    from subspec.planner.rehearse.replay import DEEPEST, WIDTHS
    from subspec.planner.solve.search import PRIOR

    asked = replace(
        request.constraints,
        context=min(CONTEXT, spec.max_positions),
        depth=DEEPEST,
        method="substitute",
        min_path_probability=None,
    )
    for num_sequences in AT_ONCE:
        for width in reversed(WIDTHS[profile.device]):
            constraints = replace(asked, num_sequences=num_sequences, width=width)
            try:
                return solve(
                    replace(request, constraints=constraints), spec, profile, PRIOR, stored
                )
            except SubspecError as error:
                if error.exit_code != Exit.INFEASIBLE:
                    raise
    return None


def settles(
    request: PlanRequest, spec: "ModelSpec", profile: Profile, stored: "Storage"
) -> "Callable[[Acceptance], bool]":
    """Tells whether more answers would hardly change the plan: the one that was chosen with fewer
    is still as good as the best, and what a round gives is known well. Plain decoding is settled if
    it was the best before too."""
    from subspec.planner.solve.outlook import predict_for, speed_of
    from subspec.planner.solve.predict import usage_within

    before: Plan | None = None
    slow = slowed(request, profile)

    def settled(acceptance: "Acceptance") -> bool:
        nonlocal before
        plan, last = solve(request, spec, profile, acceptance, stored), before
        before = plan
        if last is None or plan.method != "substitute" or last.method != plan.method:
            return last is not None and last.method == plan.method
        tree = plan.tree
        known = tree.width, tree.depth, tree.min_path_probability
        tokens, margin = acceptance.tokens(*known), acceptance.margin(*known)
        last = replace(last, acceptance=acceptance)
        still = predict_for(
            spec, slow, last, stored, "substitute", usage_within(last.context, USUAL)
        )
        return (
            still.tokens_per_second >= SETTLED_SPEED * speed_of(plan)
            and margin <= SETTLED_MARGIN * tokens
        )

    return settled


def predictor(
    request: PlanRequest, spec: "ModelSpec", profile: Profile, plan: Plan, stored: "Storage"
) -> "PredictFor":
    """What the plan promises for a usage, by the profile's own terms. A check of what streams first
    is left out: it happens once."""
    from subspec.planner.rehearse.corrections import without_corrections
    from subspec.planner.solve.outlook import predict_for

    bare = replace(without_corrections(slowed(request, profile)), digest_rate=0.0)
    return lambda method, usage: predict_for(spec, bare, plan, stored, method, usage)


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
    promised = predictor(request, artifact.spec, profile, artifact.plan, stored)
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
    return measure_here(request, artifact.spec, out, progress, tell)


def measure_here(
    request: PlanRequest, spec: "ModelSpec", out: Path, progress: Progress, tell: Tell
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
    profile = measure(spec, pick_device(request.device), place_of(out), progress)
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
) -> Plan:
    from subspec.planner.solve.search import search

    slow = slowed(request, profile)
    plan = search(spec, slow, request.budget_bytes, request.constraints, acceptance, stored)
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
) -> Plan:
    """The plan with what other budgets and contexts would give."""
    from subspec.planner.solve.outlook import with_outlook
    from subspec.planner.solve.search import search

    slow, constraints = slowed(request, profile), request.constraints

    def best(budget: int, context: int | None) -> Plan:
        fixed = replace(constraints, context=context)
        return search(spec, slow, budget, fixed, plan.acceptance, stored)

    return with_outlook(plan, best, constraints.context is not None, spec.max_positions)


def slowed(request: PlanRequest, profile: Profile) -> Profile:
    """The profile under the request's link bandwidth."""
    from subspec.planner.machine.profiles import under_link

    return under_link(profile, request.link_bandwidth)
