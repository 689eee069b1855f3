"""subspec-plan: model + machine + budget -> artifact. Heavy imports wait until they are needed."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from subspec.artifacts.command import reported, size_option
from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.sizes import parse_size

if TYPE_CHECKING:
    from subspec.artifacts.model import ModelSpec
    from subspec.artifacts.plan import Acceptance, Plan
    from subspec.artifacts.profile import Profile
    from subspec.artifacts.store import Artifact
    from subspec.planner.search import Wishes

CALIBRATION_TREES = ((1, 12), (3, 12))  # (width, depth) whose acceptance is measured

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Options:
    """The command line, as click parsed it."""

    model: str
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
    quantizer: str
    dry_run: bool
    as_json: bool
    overwrite: bool


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--model", required=True, metavar="REF",
    help="A folder, org/name, hf://org/name@rev, a bare name such as Qwen2.5-32B, or demo.",
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
@click.option("--quantizer", type=click.Choice(["blocked", "hqq"]), default="blocked",
              show_default=True, help="hqq: the reference package, 9x slower.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Plan from config and headers; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact at --out.")
@click.version_option(package_name="subspec")
@reported
def main(**given: Any) -> None:
    """Plan the model REF for a cap on fast memory and write an artifact for subspec-run.

    Exit codes, the SIZE grammar and the JSON object are in docs/commands.md.
    """
    options = Options(**given)
    from subspec.planner.hub import resolve

    resolved = resolve(options.model, options.revision, weights=not options.dry_run)
    if resolved.note:
        say(resolved.note)
    out = options.out or Path(default_name(options))
    with progress() as show:
        plan, spec = (dry_run if options.dry_run else plan_and_build)(options, resolved, out, show)
    from rich.console import Console

    from subspec.planner.explain import plan_json, print_plan

    print_plan(spec, plan, Console(stderr=True))
    if not options.dry_run:
        say(f"wrote {out}/: subspec-run {out} \"your prompt\"")
    if options.as_json:
        print(json.dumps(plan_json(spec, plan, None if options.dry_run else out)))
    elif not options.dry_run:
        print(out)


def plan_and_build(
    options: Options, resolved: Any, out: Path, show: Progress
) -> "tuple[Plan, ModelSpec]":
    from subspec.artifacts.folder import check_target
    from subspec.planner.build import build
    from subspec.planner.checkpoint import read_checkpoint
    from subspec.planner.quantize import QUANTIZERS
    from subspec.planner.search import PRIOR, search
    from subspec.planner.tokenizer_files import read_tokenizer

    check_target(out, options.overwrite)
    checkpoint = read_checkpoint(resolved.path, resolved.source)
    tokenizer = read_tokenizer(resolved.path)
    profile = find_profile(options, checkpoint.spec, out, show)
    wishes = wishes_of(options)
    plan = search(checkpoint.spec, profile, options.vram, wishes, PRIOR)

    def replan(artifact: "Artifact") -> "Plan":
        if options.profile is not None:  # another machine's plan cannot be run here
            return plan
        acceptance = calibrate(artifact, wishes, show)
        return search(checkpoint.spec, profile, options.vram, wishes, acceptance)

    final = build(
        checkpoint,
        tokenizer,
        plan,
        profile,
        out,
        options.overwrite,
        QUANTIZERS[options.quantizer],
        replan,
        show,
    )
    return final, checkpoint.spec


def calibrate(artifact: "Artifact", wishes: "Wishes", show: Progress) -> "Acceptance":
    """Acceptance measured by running the artifact with a few trees that fit its budget."""
    from subspec.artifacts.plan import Acceptance
    from subspec.planner.measure import measure_acceptance
    from subspec.planner.search import PRIOR, search

    rates = []
    for width, depth in CALIBRATION_TREES:
        fixed = replace(wishes, width=width, depth=depth, method="substitute")
        try:
            plan = search(
                artifact.spec, artifact.profile, artifact.plan.budget_bytes, fixed, PRIOR
            )
        except SubspecError as error:
            if error.exit_code != Exit.INFEASIBLE:
                raise
            continue  # a tree too wide for this budget will not be planned either
        rates.append(measure_acceptance(artifact, plan, show))
    return Acceptance(tuple(rates)) if rates else PRIOR


def dry_run(
    options: Options, resolved: Any, out: Path, show: Progress
) -> "tuple[Plan, ModelSpec]":
    from subspec.planner.checkpoint import read_spec
    from subspec.planner.search import PRIOR, search

    spec = read_spec(resolved.path, resolved.source)
    profile = find_profile(options, spec, out, show)
    return search(spec, profile, options.vram, wishes_of(options), PRIOR), spec


def find_profile(options: Options, spec: "ModelSpec", out: Path, show: Progress) -> "Profile":
    if options.profile is not None:
        from subspec.artifacts.codec import load_dataclass, parse_json
        from subspec.artifacts.profile import Profile

        name = options.profile.name
        if not options.profile.is_file():
            raise SubspecError(Exit.USAGE, f"--profile {options.profile} is not a file")
        return load_dataclass(Profile, parse_json(options.profile.read_bytes(), name), name)
    from subspec.planner.measure import measure, pick_device
    from subspec.planner.search import default_context

    folder = next(parent for parent in out.absolute().parents if parent.exists())
    context = options.context or default_context(spec, options.vram)
    return measure(spec, pick_device(options.device), folder, context, show)


def wishes_of(options: Options) -> "Wishes":
    from subspec.planner.search import Wishes

    return Wishes(options.context, options.width, options.depth, options.method, options.ram)  # type: ignore[arg-type]


def default_name(options: Options) -> str:
    """qwen2.5-32b-24gb, from the model's last name and the size."""
    stem = options.model.rstrip("/").rpartition("/")[2].partition("@")[0].lower()
    size = next(
        f"{options.vram // unit}{name}"
        for name, unit in (("gb", 10**9), ("mb", 10**6), ("b", 1))
        if options.vram % unit == 0 or unit == 1
    )
    if options.vram % parse_size("1GiB") == 0:
        size = f"{options.vram >> 30}gib"
    return re.sub(r"[^a-z0-9._-]+", "-", f"{stem}-{size}")


def say(line: str) -> None:
    sys.stderr.write(line + "\n")


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
