"""Re-planning: a plan that does not fit this machine or its free memory is solved again.

This runs subspec-plan as a command, because the runtime does not import the planner. The artifact's
folder is not changed: the new plan is kept in the user's cache for the next start.
"""

import hashlib
import os
import shlex
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.common.host_memory import free_host_bytes
from subspec.artifacts.common.progress import Progress, unseen
from subspec.artifacts.common.sizes import format_size
from subspec.artifacts.common.user_cache import readable_cache_dir, user_cache_dir
from subspec.artifacts.format.checks import check_plan
from subspec.artifacts.format.codec import dump_json, load_dataclass, parse_json
from subspec.artifacts.format.folder import MANIFEST
from subspec.artifacts.format.store import MAX_JSON, Artifact
from subspec.artifacts.format.tensors import open_regular
from subspec.artifacts.plan import Method, Plan
from subspec.runtime.app.planner_command import run_planner
from subspec.runtime.device import machine_name

MARGIN = 0.03  # of free memory; less may be free once the weights are loaded
STEPS = 32  # steps of a plan's budget: free memory varies between runs, the cached plan should not
MAX_KEPT = 64

# If only the machine differs, the stored plan still runs, at another speed.
Cause = Literal["machine", "budget", "device", "memory", "sequences"]


@dataclass(frozen=True)
class Here:
    """The device, machine and free memory that a plan is to run with."""

    device: str  # cpu, cuda or cuda:N
    machine: str  # machine_name of it
    free_bytes: int  # of fast memory, beyond what this process already uses

    @property
    def kind(self) -> str:
        return self.device.partition(":")[0]


@dataclass(frozen=True)
class Mismatch:
    """Why a plan cannot be used as it is, and what to re-plan for."""

    cause: Cause
    budget_bytes: int
    context: int | None  # None: the planner's choice, for a smaller budget
    here: Here
    said: str  # cause and new target, in one sentence
    num_sequences: int | None = None  # None: as many as the plan's constraints say


def fitted(
    artifact: Artifact,
    method: Method | None,
    vram: int | None,
    device: str | None,
    link_bandwidth: int | None,
    progress: Progress = unseen,
    sequences: int | None = None,
) -> tuple[Artifact, str]:
    """Return the artifact with a usable plan, and a sentence on why it is a new one; "" if it is
    not. method None: the plan's. sequences: required number. Raises the planner's SubspecError."""
    plan = artifact.plan
    here = look_around(plan, device)
    found = mismatch(plan, method or plan.method, here, vram, sequences) if here else None
    if found is None:
        return artifact, ""
    try:
        solved = solve_again(artifact, found, link_bandwidth, progress)
    except SubspecError as error:
        if found.cause == "machine":
            return artifact, (
                f"could not be re-planned for this machine ({error.message}): using "
                "the stored plan (--no-replan skips this)"
            )
        if found.cause == "memory":
            message = f"only {format_size(found.here.free_bytes)} are free: {error.message}"
            hint = "close other programs that use this memory"
            raise SubspecError(error.exit_code, message, hint) from None
        raise
    said = found.said
    if solved.context < plan.context:
        said += f", context {solved.context} tokens instead of {plan.context}"
    keep = shlex.join(["subspec-plan", *planner_words(artifact, found)])
    return replace(artifact, plan=solved), f"{said}; to keep that: {keep}"


def look_around(plan: Plan, device: str | None) -> Here | None:
    """Return the requested device, else the plan's, else the CPU if there is no GPU. None if there
    is no such device, which Engine.open reports."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = device or (plan.device if num_gpus else "cpu")
    if chosen == "cpu":
        return Here(chosen, machine_name(torch.device("cpu")), free_host_bytes())
    gpu = torch.device("cuda", torch.device(chosen).index or 0)
    if gpu.index >= num_gpus:
        return None
    return Here(chosen, machine_name(gpu), torch.cuda.mem_get_info(gpu)[0])


def mismatch(
    plan: Plan, method: Method, here: Here, vram: int | None, sequences: int | None = None
) -> Mismatch | None:
    """Return why `plan` cannot be used `here`; None if it can. vram: the user's budget, if given;
    one larger than the plan's matters only if re-planning is needed anyway. sequences: required
    number."""
    placement = plan.placement(method)
    wanted = plan.budget_bytes if vram is None else vram
    same_kind, foreign = here.kind == plan.device, here.machine != plan.machine
    overhead = placement.ledger.overhead if same_kind else 0
    cramped = same_kind and placement.ledger.total_bytes - overhead > here.free_bytes
    reduced = wanted < plan.budget_bytes
    more = sequences is not None and sequences > plan.num_sequences
    if not (foreign or cramped or reduced or more):
        return None
    budget = wanted if foreign or more else min(wanted, plan.budget_bytes)
    room = int((here.free_bytes + overhead) * (1 - MARGIN))
    free = ""
    if budget > room:
        step = max(1, plan.budget_bytes // STEPS)
        if 0 < room < 8 * step:  # the budget far exceeds this memory: a share of free memory
            step = max(1, 1 << room.bit_length() >> 6)
        budget = max(1, room // step) * step
        free = f", but only {format_size(here.free_bytes)} are free"
    cause: Cause = "sequences" if more else "machine"
    if cramped or not same_kind or reduced:
        cause = "memory" if cramped else "device" if not same_kind else "budget"
    if foreign:
        planned = "planned on another machine" if same_kind else f"planned for {plan.device}"
        planned += f" ({plan.machine})"
        target = "this one" if same_kind else here.device
        target += "" if budget == plan.budget_bytes else f" and {format_size(budget)}"
        target += f" and {counted(sequences or 1)}" if more else ""
    elif more and budget == plan.budget_bytes:
        planned, target = f"planned for {counted(plan.num_sequences)}", counted(sequences or 1)
    else:
        planned, target = f"planned for {format_size(plan.budget_bytes)}", format_size(budget)
        target += f" and {counted(sequences or 1)}" if more else ""
    return Mismatch(
        cause,
        budget,
        plan.context if budget >= plan.budget_bytes else None,
        here,
        f"{planned}{free}: re-planned for {target}",
        sequences if more else None,
    )


def counted(num_sequences: int) -> str:
    return "1 sequence" if num_sequences == 1 else f"{num_sequences} sequences"


def solve_again(
    artifact: Artifact, found: Mismatch, link_bandwidth: int | None, progress: Progress
) -> Plan:
    """Return the plan for `found` from the cache, else from the planner. Raises SubspecError."""
    # A read-only cache is usable too
    folder = user_cache_dir("plans") or readable_cache_dir("plans")
    entry = folder / entry_name(artifact, found, link_bandwidth) if folder else None
    plan = read_entry(entry, artifact, found) if entry else None
    if plan is None:
        progress("planning again", 0.0)
        try:
            plan = planned_anew(artifact, found, link_bandwidth)
        finally:
            progress("planning again", 1.0)
        if entry is not None:
            write_entry(entry, plan)
    return plan


def planned_anew(artifact: Artifact, found: Mismatch, link_bandwidth: int | None) -> Plan:
    """Run subspec-plan for a link of at most `link_bandwidth` bytes per second. It measures this
    machine, in seconds, if the artifact's profile is of another one. Raises SubspecError."""
    words = [*planner_words(artifact, found), "--print-plan"]
    words += ["--link-bandwidth", f"{link_bandwidth}B"] if link_bandwidth else []
    return load_plan(run_planner(words), artifact)


def planner_words(artifact: Artifact, found: Mismatch) -> list[str]:
    changed: dict[str, object] = {
        "--vram": f"{found.budget_bytes}B",
        "--device": found.here.device,
        "--context": found.context,
    }
    if found.num_sequences is not None:
        changed["--sequences"] = found.num_sequences
    return words_as_before(artifact, changed)


def words_as_before(artifact: Artifact, changed: Mapping[str, object]) -> list[str]:
    """Return the options that subspec-plan was given for the artifact, with those in `changed`
    replaced; None leaves one to the planner."""
    plan, constraints = artifact.plan, artifact.plan.constraints
    sequences = constraints.num_sequences
    asked = {
        "--from": artifact.path,
        "--vram": f"{plan.budget_bytes}B",
        "--device": plan.device,
        "--context": constraints.context,
        "--width": constraints.width,
        "--depth": constraints.depth,
        "--method": constraints.method,
        "--draft-min-probability": constraints.min_path_probability,
        "--ram": f"{constraints.ram_bytes}B" if constraints.ram_bytes else None,
        "--sequences": sequences if sequences > 1 else None,
        "--draft-head": "own" if constraints.draft_head else None,
        **changed,
    }
    return [str(word) for pair in asked.items() if pair[1] is not None for word in pair]


def load_plan(text: bytes | str, artifact: Artifact) -> Plan:
    plan: Plan = load_dataclass(Plan, parse_json(text, "the new plan"), "the new plan")
    check_plan(artifact.spec, artifact.stored_parts(), plan, artifact.draft_model is not None)
    return plan


# The cache: an entry is a plan.json, named by a digest of everything that it depends on.


def entry_name(artifact: Artifact, found: Mismatch, link_bandwidth: int | None) -> str:
    depends_on = {
        "manifest": digest((artifact.path / MANIFEST).read_bytes()),
        "plan": digest(dump_json(artifact.plan).encode()),
        "machine": found.here.machine,
        "device": found.here.device,
        "budget_bytes": found.budget_bytes,
        "sequences": found.num_sequences,
        "link_bandwidth": link_bandwidth,
        "subspec": version("subspec"),
    }
    return digest(dump_json(depends_on).encode()) + ".json"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_entry(path: Path, plan: Plan) -> None:
    """Write an entry atomically and remove the least recently used ones. Ignores errors: the next
    start then re-plans."""
    with suppress(OSError):
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".new")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(dump_json(plan))
            os.replace(unfinished, path)
        finally:
            Path(unfinished).unlink(missing_ok=True)
        by_age = sorted(path.parent.iterdir(), key=lambda entry: entry.stat().st_mtime)
        for entry in by_age[:-MAX_KEPT]:
            entry.unlink(missing_ok=True)


def read_entry(path: Path, artifact: Artifact, found: Mismatch) -> Plan | None:
    """Return the plan of an entry; None if it is missing, damaged or does not match."""
    try:
        with open_regular(path) as file:
            plan = load_plan(file.read(MAX_JSON), artifact)
    except (SubspecError, OSError):
        return None
    with suppress(OSError):
        os.utime(path)  # marks it as used
    asked = (found.here.kind, found.here.machine, found.budget_bytes)
    return plan if (plan.device, plan.machine, plan.budget_bytes) == asked else None
