"""Plan and build an artifact for a request: measure, solve, build, rehearse, solve again.

Nothing here prints: a caller passes `notify`, for messages to the user, and `progress`. Heavy
imports wait until they are needed.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from subspec.artifacts.common.cpu_load import usable_cpus
from subspec.artifacts.common.errors import Exit, SubspecError, errors_of
from subspec.artifacts.common.formatting import counted
from subspec.artifacts.common.progress import Progress, unseen
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.format.folder import place_of
from subspec.artifacts.plan import Method, Plan
from subspec.artifacts.profile import Profile
from subspec.planner.solving import (
    Notify,
    PlanInputs,
    inputs_from_artifact,
    inputs_from_model,
    no_notify,
    notify_if_under_load,
    predictor_for,
    solve,
    with_known_drafter,
    with_sweeps,
)
from subspec.planner.solving import PlanRequest as PlanRequest  # programs import it from here

if TYPE_CHECKING:
    from subspec.artifacts.format.store import Artifact
    from subspec.artifacts.model import ModelSpec
    from subspec.artifacts.runs import Run
    from subspec.planner.model.checkpoint import Checkpoint
    from subspec.planner.model.hub import Resolved


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


def foresee(
    request: PlanRequest,
    model: "Resolved",
    out: Path,
    progress: Progress = unseen,
    notify: Notify = no_notify,
    draft_model: DraftModelRef | None = None,
    draft_head: "Resolved | None" = None,
) -> tuple[PlanInputs, Plan]:
    """Plan a model before its weights are fetched, from config.json and from headers if there are
    any; measures the machine. out: the artifact's folder, whose disk is timed. Raises
    SubspecError."""
    from subspec.planner.model.checkpoint import Checkpoint, read_spec
    from subspec.planner.model.draft_head import with_draft_head

    request = within_memory(request, notify)
    spec = read_spec(model.path, model.source)
    if draft_head is not None:
        with errors_of(f"draft head {draft_head.source.repository}"):
            spec = with_draft_head(Checkpoint(model.path, spec, {}), draft_head.path).spec
    other = None
    if draft_model is not None:
        with errors_of(f"draft model {draft_model.model.source.repository}"):
            own = read_spec(draft_model.model.path, draft_model.model.source)
        other = as_draft_model(own, draft_model)
    profile = request.known_profile or measure_here(request, spec, out, progress, notify, other)
    inputs = inputs_from_model(request, spec, profile, other)
    return inputs, solve(inputs)


def plan_model(
    request: PlanRequest,
    model: "Resolved",
    out: Path,
    overwrite: bool = False,
    quantizer: str = "blocked",
    progress: Progress = unseen,
    notify: Notify = no_notify,
    draft_model: DraftModelRef | None = None,
    draft_head: "Resolved | None" = None,
    measured: Profile | None = None,
) -> Planned:
    """Plan a checkpoint, with its own draft head or another one, and build the artifact `out`.
    measured: the profile by `foresee`; measured again if the weights differ from config.json."""
    from subspec.planner.build.artifact import build
    from subspec.planner.build.quantize import QUANTIZERS
    from subspec.planner.machine.profiles import measured_for
    from subspec.planner.model.checkpoint import read_checkpoint
    from subspec.planner.model.draft_head import with_draft_head
    from subspec.planner.model.tokenizer_files import read_tokenizer, with_end_of_turn
    from subspec.planner.rehearse.learning import rehearse
    from subspec.planner.rehearse.rehearsal import pack_programs
    from subspec.planner.solve.storage import Storage

    request = within_memory(request, notify)
    checkpoint = read_checkpoint(model.path, model.source)
    if draft_head is not None:
        with errors_of(f"draft head {draft_head.source.repository}"):
            checkpoint = with_draft_head(checkpoint, draft_head.path)
    tokenizer = read_tokenizer(model.path)
    checkpoint = with_end_of_turn(checkpoint, tokenizer)
    for note in (*checkpoint.notes, *tokenizer.notes):
        notify(f"note: {note}")
    spec = checkpoint.spec
    drafting = read_draft_model(draft_model) if draft_model else None
    for note in drafting.notes if drafting else ():
        notify(f"note: draft model: {note}")
    other = drafting.spec if drafting else None
    if measured is not None and not measured_for(measured, spec, other):
        measured = None
    profile = request.known_profile or measured
    profile = profile or measure_here(request, spec, out, progress, notify, other)
    inputs = inputs_from_model(request, spec, profile, other)
    first = solve(inputs)
    found = Planned(spec, first, profile)

    def improve(artifact: "Artifact") -> tuple[Plan, Profile]:
        """Plan again with the sizes that residuals have turned out to have: a plan for estimated
        sizes may not fit. Sizes of raw weights are exact from the start."""
        nonlocal found
        # Another machine's plan cannot be run here.
        if request.known_profile is not None or request.rehearse == 0:
            now = replace(inputs, stored=Storage(tuple(artifact.stored_parts())))
            plan = solve(now) if first.residuals else first
            found = Planned(spec, with_sweeps(now, plan), profile)
        else:
            inputs_now = inputs_from_artifact(request, artifact, profile)
            found = Planned(spec, *rehearse(inputs_now, artifact, progress, notify))
        if request.known_profile is None:
            pack_programs(artifact.path, found.plan, spec)
        return found.plan, found.profile

    build(
        checkpoint, tokenizer, first, profile, out, overwrite, QUANTIZERS[quantizer], improve,
        progress, drafting,
    )  # fmt: skip
    return found


def plan_dry(
    request: PlanRequest,
    model: "Resolved",
    out: Path,
    progress: Progress = unseen,
    notify: Notify = no_notify,
    draft_model: DraftModelRef | None = None,
    draft_head: "Resolved | None" = None,
) -> Planned:
    """Plan from config and headers alone."""
    from subspec.planner.model.config import config_notes
    from subspec.planner.model.generation import generation_notes, read_generation

    inputs, plan = foresee(request, model, out, progress, notify, draft_model, draft_head)
    for note in (*config_notes(model.path), *generation_notes(read_generation(model.path))):
        notify(f"note: {note}")
    return Planned(inputs.spec, with_sweeps(inputs, plan), inputs.profile)


def read_draft_model(given: DraftModelRef) -> "Checkpoint":
    """Read the checkpoint of a draft model, as an artifact stores it. Raises SubspecError."""
    from subspec.planner.model.checkpoint import read_checkpoint

    with errors_of(f"draft model {given.model.source.repository}"):
        checkpoint = read_checkpoint(given.model.path, given.model.source)
    return replace(checkpoint, spec=as_draft_model(checkpoint.spec, given))


def as_draft_model(spec: "ModelSpec", given: DraftModelRef) -> "ModelSpec":
    """The spec as a draft model's: matrices in FP8 are dequantized."""
    return replace(spec, fp8={}, draft_head=None, quantized=given.quantized)


def plan_again(
    request: PlanRequest,
    artifact: "Artifact",
    out: Path,
    measure_again: bool = False,
    sweeps: bool = True,
    progress: Progress = unseen,
    notify: Notify = no_notify,
) -> Planned:
    """Re-plan an artifact, whose weights stay as they are; nothing is written.

    measure_again: measure this machine and rehearse the artifact, even if its own profile could be
    used; samples in the request alone also cause a rehearsal. sweeps: predict other budgets and
    contexts; without them nothing is rehearsed for measure_again.
    """
    request = as_stored(within_memory(request, notify))
    profile = request.known_profile
    if profile is None:
        profile = profile_for(request, artifact, out, measure_again, progress, notify)
    inputs = inputs_from_artifact(request, artifact, profile)
    wants = request.samples is not None or request.rehearse or (measure_again and sweeps)
    if wants and request.rehearse != 0:
        from subspec.planner.rehearse.learning import rehearse

        return Planned(artifact.spec, *rehearse(inputs, artifact, progress, notify))
    plan = with_known_drafter(solve(inputs), artifact.plan)
    return Planned(artifact.spec, with_sweeps(inputs, plan) if sweeps else plan, profile)


def plan_from_runs(
    request: PlanRequest,
    artifact: "Artifact",
    out: Path,
    progress: Progress = unseen,
    notify: Notify = no_notify,
) -> Planned:
    """Re-plan an artifact with acceptance and correction factors from its recorded runs."""
    from subspec.planner.rehearse.corrections import with_runs

    request = as_stored(within_memory(request, notify))
    profile = profile_for(request, artifact, out, False, progress, notify)
    runs, before = recorded_runs(artifact, profile), artifact.plan
    inputs = inputs_from_artifact(request, artifact, profile)
    # Checked trees are nearly the substitutes' own.
    checked = before.method == "substitute+draft-model"
    method: Method = before.method if checked else "substitute"
    inputs = inputs.with_acceptance(
        "substitute", with_runs(inputs.acceptance, before, runs, method)
    )
    if inputs.proposer is not None:
        of_model = with_runs(inputs.proposer.acceptance, before, runs, "draft-model")
        inputs = inputs.with_acceptance("draft-model", of_model)
    inputs = replace(inputs, profile=corrections_from(inputs, before, runs))
    plan = with_known_drafter(solve(inputs), before)
    return Planned(inputs.spec, with_sweeps(inputs, plan), inputs.profile)


def within_memory(request: PlanRequest, notify: Notify) -> PlanRequest:
    """The request, with its budget reduced to this machine's memory; another machine's is
    unknown."""
    if request.known_profile is not None:
        return request
    from subspec.planner.machine.timing import fast_memory_bytes, pick_device

    device = pick_device(request.device)
    most = fast_memory_bytes(device)
    if request.budget_bytes <= most:
        return request
    notify(
        f"note: a budget of {short_size(request.budget_bytes)} is more than this machine's "
        f"{short_size(most)} of {device} memory: planned for {short_size(most)}"
    )
    return replace(request, budget_bytes=most)


def as_stored(request: PlanRequest) -> PlanRequest:
    """The request for an artifact: its weights stay encoded as they are."""
    return replace(request, constraints=replace(request.constraints, encoding="kept"))


def recorded_runs(artifact: "Artifact", profile: Profile) -> "list[Run]":
    """The recorded runs of this plan on the profile's machine. Raises SubspecError(USAGE) if there
    are none."""
    from subspec.artifacts.runs import plan_digest, read_runs, recorded_by

    digest, recorded = plan_digest(artifact.plan), read_runs(artifact.path)
    runs = [run for run in recorded if run.plan == digest and run.machine == profile.machine]
    if not runs:
        raise SubspecError(
            Exit.USAGE,
            f"{artifact.path} has no record of a run of its plan on this machine "
            f"({len(recorded)} of others)",
            f"run it first: {recorded_by(artifact.plan, str(artifact.path))}",
        )
    return runs


def corrections_from(inputs: PlanInputs, plan: Plan, runs: "list[Run]") -> Profile:
    """Fold the times of the plan's runs into the profile; phases without a run stay as they
    were."""
    from subspec.planner.rehearse.corrections import corrections, rounds_of_runs, updated

    bandwidth = inputs.request.link_bandwidth
    free = [run for run in runs if run.link_bandwidth == bandwidth]
    rounds = rounds_of_runs(free, predictor_for(inputs, plan))
    found = updated(inputs.slowed.corrections, rounds, corrections(rounds, bandwidth))
    return replace(inputs.profile, corrections=found)


def profile_for(
    request: PlanRequest,
    artifact: "Artifact",
    out: Path,
    measure_again: bool,
    progress: Progress,
    notify: Notify,
) -> Profile:
    """The artifact's own profile if it was measured on this machine, else a new one."""
    from subspec.planner.machine.measure import machine_name
    from subspec.planner.machine.timing import pick_device

    if not measure_again:
        if artifact.profile.machine == machine_name(pick_device(request.device)):
            notify_if_under_load(artifact.profile, notify)
            return artifact.profile
        notify(
            f"the profile is of another machine ({artifact.profile.machine}): measuring this one"
        )
    return measure_here(request, artifact.spec, out, progress, notify, artifact.draft_model)


def measure_here(
    request: PlanRequest,
    spec: "ModelSpec",
    out: Path,
    progress: Progress,
    notify: Notify,
    draft_model: "ModelSpec | None" = None,
) -> Profile:
    from subspec.planner.machine.measure import measure
    from subspec.planner.machine.timing import pick_device
    from subspec.planner.solve.problem import check_context, check_drafters

    check_drafters(request.constraints, spec, draft_model is not None)
    check_context(request.constraints.context, spec)
    profile = measure(
        spec, pick_device(request.device), place_of(out), progress, draft_model=draft_model
    )
    if profile.free_bytes < request.budget_bytes:
        notify(
            f"note: the budget is {short_size(request.budget_bytes)}, but only "
            f"{short_size(profile.free_bytes)} of {profile.device} memory are free now: runs are "
            "planned again for less until more is free"
        )
    if "OMP_NUM_THREADS" in os.environ and profile.num_threads < usable_cpus():
        notify(
            f"note: OMP_NUM_THREADS bounds the plan's CPU threads: {profile.num_threads} on "
            f"{counted(usable_cpus(), 'CPU')}; runs use the same number even without the variable"
        )
    notify_if_under_load(profile, notify)
    return profile
