"""subspec-plan: model + machine + budget -> artifact. Heavy imports wait until they are needed."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from subspec.artifacts.command import Program, reported, say, size_option
from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.sizes import parse_size, short_size

if TYPE_CHECKING:
    from subspec.artifacts.model import ModelSpec
    from subspec.artifacts.plan import Acceptance, Plan
    from subspec.artifacts.profile import Profile
    from subspec.artifacts.store import Artifact
    from subspec.planner.hub import Resolved
    from subspec.planner.search import Wishes
    from subspec.planner.storage import Storage

CALIBRATION_WIDTHS = (1, 3)  # of the trees whose acceptance is measured
CALIBRATION_DEPTH = 12

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Options:
    """The command line, as click parsed it."""

    model: str | None
    source: Path | None
    vram: int
    device: str | None
    context: int | None
    out: Path | None
    revision: str | None
    ram: int | None
    width: int | None
    depth: int | None
    method: str | None
    profile: Path | None
    link_bandwidth: int | None
    quantizer: str
    encoding: str
    dry_run: bool
    print_plan: bool
    reprofile: bool
    as_json: bool
    overwrite: bool


@click.command(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--model", metavar="REF",
    help="A folder, org/name, hf://org/name@rev, a bare name such as Qwen2.5-32B, or demo.",
)  # fmt: skip
@click.option(
    "--from", "source", type=click.Path(path_type=Path), metavar="ARTIFACT",
    help="Plan an artifact anew: its weights stay as they are.",
)  # fmt: skip
@click.option(
    "--vram", required=True, callback=size_option, metavar="SIZE",
    help="Cap on fast memory: the GPU's, or with --device cpu what the model may take of RAM.",
)  # fmt: skip
@click.option("--device", metavar="cuda|cuda:N|cpu", help="[default: cuda if there is one]")
@click.option("--context", type=click.IntRange(min=16), help="Tokens of prompt and answer.")
@click.option("--out", type=click.Path(path_type=Path), help="[default: NAME-SIZE/]")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--ram", callback=size_option, metavar="SIZE", help="Cap on pinned host memory.")
@click.option("--width", type=click.IntRange(1, 64), help="Fix the tree's width.")
@click.option("--depth", type=click.IntRange(1, 128), help="Fix the tree's depth.")
@click.option("--method", type=click.Choice(["substitute", "plain"]), help="Fix the method.")
@click.option(
    "--profile", type=click.Path(path_type=Path), help="Plan for the machine of this profile.json."
)
@click.option(
    "--link-bandwidth", callback=size_option, metavar="SIZE",
    help="Plan as if the link gave SIZE a second.",
)  # fmt: skip
@click.option("--quantizer", type=click.Choice(["blocked", "hqq"]), default="blocked",
              show_default=True, help="hqq: the reference package, 9x slower.")  # fmt: skip
@click.option("--encoding", type=click.Choice(["auto", "residual", "raw"]), default="auto",
              show_default=True, help="How exact weights are stored.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Plan from config and headers; write nothing.")
@click.option("--reprofile", is_flag=True, help="With --from: measure this machine again.")
@click.option("--print-plan", is_flag=True, help="With --from: plan.json on stdout, no folder.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact at --out.")
@click.version_option(package_name="subspec")
@reported
def main(**given: Any) -> None:
    """Plan the model REF, or an ARTIFACT anew, for a cap on fast memory and write an artifact for
    subspec-run.

    Exit codes, the SIZE grammar and the JSON object are in docs/commands.md.
    """
    options = Options(**given)
    check_options(options)
    if options.source is not None:
        plan_anew(options, options.source)
        return
    out = options.out or Path(default_name(options))
    # A download may take an hour: what can be known to fail is asked first.
    measured = known_profile(options)
    if not options.dry_run:
        check_out(out, options.overwrite)
    from subspec.planner.hub import resolve

    assert options.model is not None, "check_options asks for it"
    resolved = resolve(options.model, options.revision, weights=not options.dry_run)
    if resolved.note:
        say(resolved.note)
    with progress() as show:
        run = dry_run if options.dry_run else plan_and_build
        plan, spec = run(options, resolved, out, measured, show)
    report(options, spec, plan, out)


def report(options: Options, spec: "ModelSpec", plan: "Plan", out: Path) -> None:
    """The table on stderr; on stdout the folder, or the JSON object."""
    from rich.console import Console

    from subspec.planner.explain import plan_json, print_plan

    print_plan(spec, plan, Console(stderr=True))
    if not options.dry_run:
        say(f'wrote {out}/: subspec-run {out} "your prompt"')
    if options.as_json:
        print(json.dumps(plan_json(spec, plan, None if options.dry_run else out)))
    elif not options.dry_run:
        print(out)


def check_options(options: Options) -> None:
    """Raises SubspecError(USAGE) for what click cannot see."""
    if (options.model is None) == (options.source is None):
        got = "neither" if options.model is None else "both"
        raise SubspecError(
            Exit.USAGE,
            f"{got} of --model REF and --from ARTIFACT given, expected one",
            "--model for a checkpoint, --from to plan an artifact anew",
        )
    for flag, given in (("--print-plan", options.print_plan), ("--reprofile", options.reprofile)):
        if given and options.source is None:
            raise SubspecError(
                Exit.USAGE, f"{flag} was given without --from", "add --from ARTIFACT"
            )
    makes_weights = options.encoding != "auto" or options.quantizer != "blocked"
    if options.source is not None and (makes_weights or options.revision):
        raise SubspecError(
            Exit.USAGE,
            "--from keeps the weights as they are stored: --encoding, --quantizer and --revision "
            "do not apply",
            "leave them out, or plan with --model",
        )


def plan_anew(options: Options, source: Path) -> None:
    """--from: another plan over the weights of an artifact, in its folder or in one beside it."""
    from subspec.artifacts.codec import dump_json
    from subspec.artifacts.store import open_artifact
    from subspec.planner.build import rebuild
    from subspec.planner.storage import Storage

    artifact = open_artifact(source)
    out = options.out or source
    writes = not (options.dry_run or options.print_plan)
    if writes:
        check_out(out, overwrite=options.overwrite or options.out is None)
    with progress() as show:
        profile = known_profile(options) or profile_for(options, artifact, out, show)
    stored = Storage(tuple(artifact.stored_parts()))
    plan = solve(options, artifact.spec, profile, artifact.plan.acceptance, stored)
    if options.print_plan:
        print(dump_json(plan), end="")
        return
    if writes:
        rebuild(artifact, plan, profile, out, overwrite=options.overwrite or options.out is None)
    report(options, artifact.spec, plan, out)


def profile_for(options: Options, artifact: "Artifact", out: Path, show: Progress) -> "Profile":
    """The artifact's own profile if it was measured on this machine, else a new one."""
    from subspec.planner.measure import machine_name, pick_device

    if not options.reprofile:
        if artifact.profile.machine == machine_name(pick_device(options.device)):
            return artifact.profile
        say(f"the profile is of another machine ({artifact.profile.machine}): measuring this one")
    return measure_here(options, artifact.spec, out, show)


def plan_and_build(
    options: Options, resolved: "Resolved", out: Path, measured: "Profile | None", show: Progress
) -> "tuple[Plan, ModelSpec]":
    from subspec.planner.build import build
    from subspec.planner.checkpoint import read_checkpoint
    from subspec.planner.quantize import QUANTIZERS
    from subspec.planner.search import PRIOR
    from subspec.planner.storage import Storage
    from subspec.planner.tokenizer_files import read_tokenizer

    checkpoint = read_checkpoint(resolved.path, resolved.source)
    tokenizer = read_tokenizer(resolved.path)
    profile = measured or measure_here(options, checkpoint.spec, out, show)
    plan = solve(options, checkpoint.spec, profile, PRIOR)

    def replan(artifact: "Artifact") -> "Plan":
        """The weights are as long as they turned out by now."""
        stored = Storage(tuple(artifact.stored_parts()))
        if measured is not None:  # another machine's plan cannot be run here
            return solve(options, artifact.spec, profile, PRIOR, stored)
        acceptance = calibrate(options, artifact, stored, show)
        return solve(options, artifact.spec, profile, acceptance, stored)

    quantizer = QUANTIZERS[options.quantizer]
    final = build(
        checkpoint, tokenizer, plan, profile, out, options.overwrite, quantizer, replan, show
    )
    return final, checkpoint.spec


def dry_run(
    options: Options, resolved: "Resolved", out: Path, measured: "Profile | None", show: Progress
) -> "tuple[Plan, ModelSpec]":
    from subspec.planner.checkpoint import read_spec
    from subspec.planner.search import PRIOR

    spec = read_spec(resolved.path, resolved.source)
    profile = measured or measure_here(options, spec, out, show)
    return solve(options, spec, profile, PRIOR), spec


def solve(
    options: Options,
    spec: "ModelSpec",
    profile: "Profile",
    acceptance: "Acceptance",
    stored: "Storage | None" = None,
) -> "Plan":
    from subspec.planner.profiles import with_link
    from subspec.planner.search import search

    if options.link_bandwidth is not None:
        profile = with_link(profile, options.link_bandwidth)
    plan = search(spec, profile, options.vram, wishes_of(options), acceptance, stored)
    if options.link_bandwidth is None:
        return plan
    reason = f"planned as if the link gave {short_size(options.link_bandwidth)}/s at most"
    return replace(plan, reasons=(f"{reason}: --link-bandwidth", *plan.reasons))


def calibrate(
    options: Options, artifact: "Artifact", stored: "Storage", show: Progress
) -> "Acceptance":
    """Acceptance measured by running the artifact with a few trees that fit its budget."""
    from subspec.artifacts.plan import Acceptance
    from subspec.planner.measure import measure_acceptance
    from subspec.planner.profiles import with_link
    from subspec.planner.search import PRIOR, search

    if options.method == "plain":
        return PRIOR
    profile, rates = artifact.profile, []
    if options.link_bandwidth is not None:
        profile = with_link(profile, options.link_bandwidth)
    for width in (options.width,) if options.width else CALIBRATION_WIDTHS:
        depth = options.depth or CALIBRATION_DEPTH
        wishes = replace(wishes_of(options), width=width, depth=depth, method="substitute")
        try:
            plan = search(artifact.spec, profile, options.vram, wishes, PRIOR, stored)
        except SubspecError as error:
            if error.exit_code != Exit.INFEASIBLE:
                raise
            continue  # a tree too wide for this budget will not be planned either
        rate = measure_acceptance(artifact, plan, show, options.device)
        rates += [rate] if rate.num_samples else []  # none: every answer ended at once
    return Acceptance(tuple(rates)) if rates else PRIOR


def known_profile(options: Options) -> "Profile | None":
    """The profile of --profile; None: this machine is to be measured."""
    if options.profile is None:
        from subspec.planner.machine import pick_device

        pick_device(options.device)
        return None
    from subspec.planner.profiles import read_profile

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
    from subspec.planner.measure import measure, pick_device
    from subspec.planner.search import default_context

    context = options.context or default_context(spec, options.vram)
    if context > spec.max_positions:
        raise SubspecError(
            Exit.USAGE,
            f"--context {context} is more than the model's {spec.max_positions} positions",
            f"--context {spec.max_positions} or less",
        )
    # A cache beyond the budget fits no plan: it need not be timed, nor have room.
    context = min(context, options.vram // spec.kv_bytes_per_token)
    return measure(spec, pick_device(options.device), existing_parent(out), context, show)


def check_out(out: Path, overwrite: bool) -> None:
    """What new_folder() would refuse in the end, before any work."""
    from subspec.artifacts.folder import check_target

    try:
        check_target(out, overwrite)
        parent = existing_parent(out)
        (parent / f".{out.name}.building").exists()  # is the name too long?
    except OSError as error:
        raise SubspecError(
            Exit.USAGE, f"--out {out} cannot be used: {error.strerror}", "choose another --out"
        ) from None
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise SubspecError(Exit.USAGE, f"cannot write in {parent}", "choose another --out")


def existing_parent(out: Path) -> Path:
    return next(parent for parent in out.absolute().parents if parent.exists())


def wishes_of(options: Options) -> "Wishes":
    from subspec.planner.search import Wishes

    return Wishes(
        options.context,
        options.width,
        options.depth,
        options.method,  # type: ignore[arg-type]
        options.ram,
        options.encoding if options.source is None else "kept",  # type: ignore[arg-type]
    )


def default_name(options: Options) -> str:
    """qwen2.5-32b-24gb, from the model's last name and the size."""
    model = options.model or ""
    stem = model.partition("@")[0].rstrip("/").rpartition("/")[2]
    if set(stem) <= set(".~"):  # a folder that is named by its place
        stem = Path(model).expanduser().resolve().name
    if options.vram % parse_size("1GiB") == 0:
        size = f"{options.vram >> 30}gib"
    else:
        units = (("gb", 10**9), ("mb", 10**6), ("b", 1))
        size = next(f"{options.vram // n}{unit}" for unit, n in units if options.vram % n == 0)
    return re.sub(r"[^a-z0-9._-]+", "-", f"{stem}-{size}".lower()).lstrip("-.")


@contextmanager
def progress() -> Iterator[Progress]:
    """Progress on stderr: a bar on a terminal, a line per stage elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        stages: list[str] = []

        def line(stage: str, share: float) -> None:
            if stage not in stages:
                stages.append(stage)
                say(stage)

        yield line
        return
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("reading the checkpoint", total=1.0)

        def bar(stage: str, share: float) -> None:
            bars.update(task, description=stage, completed=share)

        yield bar


if __name__ == "__main__":
    main()
