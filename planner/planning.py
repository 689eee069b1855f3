"""From what was asked for to a plan and an artifact: measure, solve, build, rehearse, solve again.

Heavy imports wait until they are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from subspec.artifacts.common.command import say
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import short_size

if TYPE_CHECKING:
    from subspec.artifacts.acceptance import Acceptance
    from subspec.artifacts.format.store import Artifact
    from subspec.artifacts.model import ModelSpec
    from subspec.artifacts.plan import Constraints, Plan
    from subspec.artifacts.profile import Profile
    from subspec.artifacts.runs import Run
    from subspec.planner.model.hub import Resolved
    from subspec.planner.rehearse.calibration import Sample
    from subspec.planner.rehearse.corrections import PredictFor
    from subspec.planner.solve.storage import Storage

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Options:
    """The command line, as click parsed it."""

    model: str | None = None
    source: Path | None = None  # --from
    calibrate: Path | None = None
    vram: int | None = None  # None: the artifact's
    device: str | None = None
    context: int | None = None
    out: Path | None = None
    revision: str | None = None
    ram: int | None = None
    width: int | None = None
    depth: int | None = None
    method: str | None = None
    min_path_probability: float | None = None  # --draft-min-probability
    profile: Path | None = None
    calibration: Path | None = None
    link_bandwidth: int | None = None
    quantizer: str = "blocked"
    encoding: str = "auto"
    dry_run: bool = False
    print_plan: bool = False
    reprofile: bool = False
    as_json: bool = False
    overwrite: bool = False

    @property
    def artifact(self) -> Path | None:
        """What is planned anew."""
        return self.source or self.calibrate

    @property
    def budget(self) -> int:
        assert self.vram is not None, "check_options asks for it, or the artifact's plan has it"
        return self.vram


def plan_and_build(
    options: Options, resolved: "Resolved", out: Path, measured: "Profile | None", show: Progress
) -> "tuple[Plan, ModelSpec]":
    """A checkpoint becomes an artifact."""
    from subspec.planner.build.artifact import build
    from subspec.planner.build.quantize import QUANTIZERS
    from subspec.planner.model.checkpoint import read_checkpoint
    from subspec.planner.model.tokenizer_files import read_tokenizer
    from subspec.planner.rehearse.rehearsal import pack_kernels
    from subspec.planner.solve.search import PRIOR
    from subspec.planner.solve.storage import Storage

    samples = samples_of(options)
    checkpoint = read_checkpoint(resolved.path, resolved.source)
    tokenizer = read_tokenizer(resolved.path)
    profile = measured or measure_here(options, checkpoint.spec, out, show)
    plan = solve(options, checkpoint.spec, profile, PRIOR)

    def improve(artifact: "Artifact") -> "tuple[Plan, Profile]":
        """The weights are as long as they turned out by now."""
        stored = Storage(tuple(artifact.stored_parts()))
        if measured is not None:  # another machine's plan cannot be run here
            final = solve(options, artifact.spec, profile, PRIOR, stored)
            return with_sweeps(options, artifact.spec, profile, stored, final), profile
        final, corrections = rehearsed(options, artifact, profile, stored, samples, show)
        pack_kernels(artifact.path, final)
        return final, corrections

    final = build(
        checkpoint, tokenizer, plan, profile, out, options.overwrite,
        QUANTIZERS[options.quantizer], improve, show,
    )  # fmt: skip
    return final, checkpoint.spec


def dry_run(
    options: Options, resolved: "Resolved", out: Path, measured: "Profile | None", show: Progress
) -> "tuple[Plan, ModelSpec]":
    """From config and headers alone."""
    from subspec.planner.model.checkpoint import read_spec
    from subspec.planner.solve.search import PRIOR

    spec = read_spec(resolved.path, resolved.source)
    profile = measured or measure_here(options, spec, out, show)
    return with_sweeps(options, spec, profile, None, solve(options, spec, profile, PRIOR)), spec


def plan_anew(
    options: Options, artifact: "Artifact", out: Path, known: "Profile | None", show: Progress
) -> "tuple[Plan, Profile]":
    """Another plan over the weights of an artifact, which stay as they are. known: --profile."""
    from subspec.planner.rehearse.corrections import with_runs
    from subspec.planner.solve.storage import Storage

    spec, acceptance = artifact.spec, artifact.plan.acceptance
    stored, samples = Storage(tuple(artifact.stored_parts())), samples_of(options)
    profile = known or profile_for(options, artifact, out, show)
    if options.calibration is not None or (options.reprofile and not options.print_plan):
        return rehearsed(options, artifact, profile, stored, samples, show)
    if options.calibrate is not None:
        runs = recorded_runs(artifact, profile)
        acceptance = with_runs(acceptance, artifact.plan, runs)
        profile = corrections_from(options, artifact, profile, stored, runs)
    plan = solve(options, spec, profile, acceptance, stored)
    if not options.print_plan:
        plan = with_sweeps(options, spec, profile, stored, plan)
    return plan, profile


def rehearsed(
    options: Options,
    artifact: "Artifact",
    profile: "Profile",
    stored: "Storage",
    samples: "tuple[Sample, ...]",
    show: Progress,
) -> "tuple[Plan, Profile]":
    """Runs the best plan that is known so far, and plans again with what that taught."""
    from subspec.planner.rehearse.corrections import corrections, without_corrections
    from subspec.planner.rehearse.rehearsal import Setting, rehearse
    from subspec.planner.solve.search import PRIOR

    spec, profile = artifact.spec, without_corrections(profile)
    # Of whole trees, as predictions are: where its rounds begin acceptance is measured.
    whole = replace(options, min_path_probability=None)
    trial = solve(whole, spec, profile, artifact.plan.acceptance, stored)
    setting = Setting(options.link_bandwidth, options.device)
    seen = rehearse(artifact, trial, predictor(options, spec, profile, trial, stored), samples,
                    setting, show)  # fmt: skip
    profile = replace(profile, corrections=corrections(seen.rounds, options.link_bandwidth))
    plan = solve(options, spec, profile, seen.acceptance or PRIOR, stored)
    return with_sweeps(options, spec, profile, stored, plan), profile


def predictor(
    options: Options, spec: "ModelSpec", profile: "Profile", plan: "Plan", stored: "Storage"
) -> "PredictFor":
    """What the plan promises for a usage, by the profile's own terms. A check of what streams first
    is left out: it happens once."""
    from subspec.planner.rehearse.corrections import without_corrections
    from subspec.planner.solve.outlook import predict_for

    bare = replace(without_corrections(slowed(options, profile)), digest_rate=0.0)
    return lambda method, usage: predict_for(spec, bare, plan, stored, method, usage)


def recorded_runs(artifact: "Artifact", profile: "Profile") -> "list[Run]":
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
    options: Options, artifact: "Artifact", profile: "Profile", stored: "Storage", runs: "list[Run]"
) -> "Profile":
    """Folds the runs' times into the profile; phases without a run stay as they were."""
    from subspec.planner.rehearse.corrections import corrections, rounds_of_runs, updated

    free = [run for run in runs if run.link_bandwidth == options.link_bandwidth]
    promised = predictor(options, artifact.spec, profile, artifact.plan, stored)
    rounds = rounds_of_runs(free, artifact.plan.tree.depth, promised)
    found = corrections(rounds, options.link_bandwidth)
    return replace(
        profile, corrections=updated(slowed(options, profile).corrections, rounds, found)
    )


def profile_for(options: Options, artifact: "Artifact", out: Path, show: Progress) -> "Profile":
    """The artifact's own profile if it was measured on this machine, else a new one."""
    from subspec.planner.machine.measure import machine_name
    from subspec.planner.machine.timing import pick_device

    if not options.reprofile:
        if artifact.profile.machine == machine_name(pick_device(options.device)):
            return artifact.profile
        say(f"the profile is of another machine ({artifact.profile.machine}): measuring this one")
    return measure_here(options, artifact.spec, out, show)


def known_profile(options: Options) -> "Profile | None":
    """The profile of --profile; None: this machine is to be measured."""
    if options.profile is None:
        from subspec.planner.machine.timing import pick_device

        pick_device(options.device)
        return None
    from subspec.planner.machine.profiles import read_profile

    profile = read_profile(options.profile)
    if options.device is not None and options.device.partition(":")[0] != profile.device:
        raise SubspecError(
            Exit.USAGE,
            f"--profile {options.profile} was measured on {profile.device}, "
            f"--device says {options.device}",
            "drop one of the two",
        )
    return profile


def measure_here(options: Options, spec: "ModelSpec", out: Path, show: Progress) -> "Profile":
    from subspec.planner.machine.measure import measure
    from subspec.planner.machine.timing import pick_device

    if options.context is not None and options.context > spec.max_positions:
        raise SubspecError(
            Exit.USAGE,
            f"--context {options.context} is more than the model's {spec.max_positions} positions",
            f"--context {spec.max_positions} or less",
        )
    profile = measure(spec, pick_device(options.device), existing_parent(out), show)
    if profile.free_bytes < options.budget:
        say(
            f"note: {short_size(profile.free_bytes)} of {profile.device} memory are free now, the "
            f"cap is {short_size(options.budget)}: runs are planned anew for less while that is so"
        )
    return profile


def solve(
    options: Options,
    spec: "ModelSpec",
    profile: "Profile",
    acceptance: "Acceptance",
    stored: "Storage | None" = None,
) -> "Plan":
    from subspec.planner.solve.search import search

    slow = slowed(options, profile)
    plan = search(spec, slow, options.budget, constraints_of(options), acceptance, stored)
    if options.link_bandwidth is None:
        return plan
    reason = f"planned as if the link gave {short_size(options.link_bandwidth)}/s at most"
    return replace(plan, reasons=(f"{reason}: --link-bandwidth", *plan.reasons))


def with_sweeps(
    options: Options,
    spec: "ModelSpec",
    profile: "Profile",
    stored: "Storage | None",
    plan: "Plan",
) -> "Plan":
    """The plan with what other budgets and contexts would give."""
    from subspec.planner.solve.outlook import with_outlook
    from subspec.planner.solve.search import search

    slow = slowed(options, profile)

    def best(budget: int, context: int | None) -> "Plan":
        constraints = replace(constraints_of(options), context=context)
        return search(spec, slow, budget, constraints, plan.acceptance, stored)

    return with_outlook(plan, best, options.context is not None, spec.max_positions)


def slowed(options: Options, profile: "Profile") -> "Profile":
    """The profile under --link-bandwidth."""
    from subspec.planner.machine.profiles import under_link

    return under_link(profile, options.link_bandwidth)


def samples_of(options: Options) -> "tuple[Sample, ...]":
    from subspec.planner.rehearse.calibration import read_samples, shipped_samples

    if options.calibration is None:
        return shipped_samples()
    samples = read_samples(options.calibration)
    if options.profile is not None:
        raise SubspecError(
            Exit.USAGE,
            "--profile plans for another machine, --calibration runs the model on this one",
            "drop one of the two",
        )
    return samples


def constraints_of(options: Options) -> "Constraints":
    from subspec.artifacts.plan import Constraints

    return Constraints(
        options.context,
        options.width,
        options.depth,
        options.method,  # type: ignore[arg-type]
        options.ram,
        options.encoding if options.artifact is None else "kept",  # type: ignore[arg-type]
        options.min_path_probability,
    )


def asked_before(options: Options, artifact: "Artifact") -> Options:
    """What is not asked for now stays as the artifact's plan was asked for."""
    constraints, stop = artifact.plan.constraints, options.min_path_probability
    return replace(
        options,
        vram=options.vram or artifact.plan.budget_bytes,
        context=options.context or constraints.context,
        width=options.width or constraints.width,
        depth=options.depth or constraints.depth,
        method=options.method or constraints.method,
        ram=options.ram or constraints.ram_bytes,
        min_path_probability=constraints.min_path_probability if stop is None else stop,
    )


def existing_parent(out: Path) -> Path:
    return next(parent for parent in out.absolute().parents if parent.exists())
