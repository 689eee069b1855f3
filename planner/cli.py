"""subspec-plan: model + machine + budget -> artifact. Heavy imports wait until they are needed."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from subspec.artifacts.common.command import finite_option, say, size_option
from subspec.artifacts.common.configuration import Configured
from subspec.artifacts.common.errors import Exit, SubspecError, errors_of
from subspec.artifacts.common.precedence import Rules
from subspec.artifacts.common.progress import Progress
from subspec.artifacts.common.sizes import parse_size
from subspec.planner.planning import (
    DraftModelRef,
    Planned,
    foresee,
    plan_again,
    plan_dry,
    plan_from_runs,
    plan_model,
)
from subspec.planner.solve.problem import check_method
from subspec.planner.solving import PlanRequest

if TYPE_CHECKING:
    from subspec.artifacts.plan import Constraints
    from subspec.artifacts.profile import Profile
    from subspec.planner.model.hub import Resolved
    from subspec.planner.rehearse.calibration import Sample

OWN_HEAD = "own"  # instead of a draft head's REF
MAX_REHEARSAL = 86_400  # seconds


class RehearsalTime(click.ParamType[float]):
    """Seconds, or none: 0.0."""

    name = "seconds"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if value == "none":
            return 0.0
        with suppress(ValueError):
            if 0 < (seconds := float(value)) <= MAX_REHEARSAL:
                return seconds
        self.fail(f"{value!r} is neither none nor seconds up to {MAX_REHEARSAL}", param, ctx)


@dataclass(frozen=True)
class Options:
    """The command line, as click parsed it."""

    model: str | None = None
    source: Path | None = None  # --from
    calibrate: Path | None = None
    vram: int | None = None  # None: the artifact's
    device: str | None = None
    context: int | None = None
    sequences: int | None = None
    out: Path | None = None
    revision: str | None = None
    ram: int | None = None
    width: int | None = None
    depth: int | None = None
    method: str | None = None
    min_path_probability: float | None = None  # --draft-min-probability
    profile: Path | None = None
    calibration: Path | None = None
    rehearse: float | None = None
    link_bandwidth: int | None = None
    quantizer: str = "blocked"
    encoding: str = "auto"
    dry_run: bool = False
    print_plan: bool = False
    reprofile: bool = False
    as_json: bool = False
    overwrite: bool = False
    draft_model: str | None = None
    draft_model_weights: str = "4bit"
    draft_head: str | None = None

    @property
    def artifact(self) -> Path | None:
        """The artifact that is re-planned; None: a model is planned."""
        return self.source or self.calibrate

    @property
    def budget(self) -> int:
        assert self.vram is not None, "check_options asks for it, or the artifact's plan has it"
        return self.vram


# check_options has the sentences.
RULES = Rules(
    needs=(
        ("print_plan", "source"), ("reprofile", "source"), ("draft_model", "model"),
        ("draft_model_weights", "draft_model"), ("draft_head", "model"), ("encoding", "model"),
        ("quantizer", "model"), ("revision", "model"),
    ),
    excludes=(
        ("model", "source"), ("model", "calibrate"), ("source", "calibrate"),
        ("calibrate", "profile"), ("calibrate", "calibration"), ("calibrate", "rehearse"),
        ("profile", "calibration"), ("profile", "rehearse"), ("calibration", "rehearse"),
    ),
    only_if={
        ("draft_head", "model"): lambda given: given["draft_head"] != OWN_HEAD,
        ("profile", "rehearse"): lambda given: given["rehearse"] > 0,
        ("calibration", "rehearse"): lambda given: given["rehearse"] == 0,
    },
)  # fmt: skip


@click.command(
    "subspec-plan", cls=Configured, rules=RULES,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
@click.option(
    "--model", metavar="REF",
    help="A folder, org/name, hf://org/name@rev, a bare name such as Qwen2.5-32B, or demo.",
)  # fmt: skip
@click.option(
    "--from", "source", type=click.Path(path_type=Path), metavar="ARTIFACT",
    help="Plan again for an existing artifact; its weights stay as they are.",
)  # fmt: skip
@click.option(
    "--calibrate", type=click.Path(path_type=Path), metavar="ARTIFACT",
    help="Plan again with acceptance and timings from the artifact's recorded runs.",
)  # fmt: skip
@click.option(
    "--vram", callback=size_option, metavar="SIZE",
    help="Budget of fast memory: the GPU's, or with --device cpu the RAM that the model may take.",
)  # fmt: skip
@click.option("--device", metavar="cuda|cuda:N|cpu", help="[default: cuda if there is one]")
@click.option("--context", type=click.IntRange(min=16), help="Tokens of prompt and answer.")
@click.option(
    "--sequences", type=click.IntRange(1, 256),
    help="Conversations in memory at once, each with its own context.  [default: 1]",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="[default: NAME-SIZE/]")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option(
    "--ram", callback=size_option, metavar="SIZE", help="Budget of host memory, with a GPU."
)
@click.option(
    "--width", type=click.IntRange(1, 64), help="Width of the draft tree.  [default: the fastest]"
)
@click.option(
    "--depth", type=click.IntRange(1, 128), help="Depth of the draft tree.  [default: the fastest]"
)
@click.option(
    "--draft-min-probability", "min_path_probability", metavar="P",
    type=click.FloatRange(0, 1, max_open=True), callback=finite_option,
    help="Stop drafting at the first level whose total path probability is below P.",
)  # fmt: skip
@click.option(
    "--method",
    type=click.Choice(["substitute", "plain", "draft-model", "substitute+draft-model"]),
    help="Decoding method; the last two need --draft-model.  [default: the fastest]",
)
@click.option(
    "--draft-model", metavar="REF",
    help="Draft model: a smaller model with the same vocabulary. It is resident in fast memory.",
)  # fmt: skip
@click.option("--draft-model-weights", type=click.Choice(["4bit", "exact"]), default="4bit",
              show_default=True, help="Storage of the draft model's weights.")  # fmt: skip
@click.option(
    "--draft-head", metavar="own|REF",
    help="Draft head: own for the checkpoint's MTP head, or REF of an EAGLE head.",
)  # fmt: skip
@click.option(
    "--profile", type=click.Path(path_type=Path), help="Plan for the machine of this profile.json."
)
@click.option(
    "--calibration", type=click.Path(path_type=Path), metavar="FILE",
    help="Measure the acceptance rate on these prompts (JSON Lines).",
)  # fmt: skip
@click.option(
    "--rehearse", type=RehearsalTime(), metavar="SECONDS|none",
    help="Time for running the artifact to measure acceptance and speed; none: skip it.  [default: "
    "60]",
)  # fmt: skip
@click.option(
    "--link-bandwidth", callback=size_option, metavar="SIZE",
    help="Plan for a link of at most SIZE per second.",
)  # fmt: skip
@click.option("--quantizer", type=click.Choice(["blocked", "hqq"]), default="blocked",
              show_default=True,
              help="4-bit quantizer; hqq is the reference package, 9x slower.")  # fmt: skip
@click.option("--encoding", type=click.Choice(["auto", "residual", "raw"]), default="auto",
              show_default=True,
              help="Storage of exact weights: raw, or as residuals of the 4-bit copy.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Plan from config and headers; write nothing.")
@click.option("--reprofile", is_flag=True, help="With --from: measure this machine again.")
@click.option("--print-plan", is_flag=True, help="With --from: plan.json on stdout, no folder.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact at --out.")
@click.version_option(package_name="subspec")
def main(**given: Any) -> None:
    """Plan how to run a model within a budget of fast memory, and write an artifact that
    subspec-run executes.

    Exit codes, the SIZE grammar and the JSON object are in docs/commands.md.
    """
    options = Options(**given)
    check_options(options)
    if options.artifact is not None:
        plan_artifact(options, options.artifact)
        return
    out = options.out or Path(default_name(options))
    request = request_of(options)
    if not options.dry_run:
        check_out(out, options.overwrite)
    configs = fetch(options, weights=False)
    for note in configs.model.notes:
        say(note)
    if options.dry_run:
        with progress() as show:
            planned = plan_dry(
                request, configs.model, out, show, say, configs.draft_model, configs.draft_head
            )
    else:
        planned = build_planned(options, request, configs, out)
    report(options, planned, out)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints that the options name, in folders of this machine."""

    model: "Resolved"
    draft_model: DraftModelRef | None
    draft_head: "Resolved | None"


def fetch(options: Options, weights: bool) -> Checkpoints:
    """Fetch the checkpoints, and check that we run them and that they go together. Without
    `weights`: only the small files of model and draft model; a draft head is fetched whole."""
    from subspec.planner.model.hub import resolve

    assert options.model is not None, "check_options asks for it"
    checks = not weights and (not options.dry_run or options.draft_model is not None)
    model = resolve(options.model, options.revision, weights, tokenizer=weights or checks)
    vocabulary = check_model(model) if checks else ""
    draft_model = None
    if options.draft_model is not None:
        small = resolve(options.draft_model, weights=weights, tokenizer=True)
        if checks:
            check_draft_model(vocabulary, small, options.draft_model)
        draft_model = DraftModelRef(small, options.draft_model_weights == "4bit")
    head = None
    if options.draft_head is not None and options.draft_head != OWN_HEAD:
        head = resolve(options.draft_head, tokenizer=False)  # it has the model's vocabulary
    return Checkpoints(model, draft_model, head)


def build_planned(
    options: Options, request: PlanRequest, configs: Checkpoints, out: Path
) -> Planned:
    """Plan and build the artifact `out`. Feasibility and disk space are checked before the weights
    are downloaded, which may take an hour."""
    from subspec.planner.build.artifact import check_space

    with progress() as show:
        inputs, plan = foresee(
            request, configs.model, out, show, say, configs.draft_model, configs.draft_head
        )
    check_space(inputs.spec, plan, inputs.draft_model, out)
    whole = fetch(options, weights=True)
    with progress() as show:
        return plan_model(
            inputs.request, whole.model, out, options.overwrite, options.quantizer, show, say,
            whole.draft_model, whole.draft_head, measured=inputs.profile,
        )  # fmt: skip


def check_model(model: "Resolved") -> str:
    """Return the model's tokenizer.json. Raises SubspecError for a model that we do not run, before
    its weights are fetched."""
    from subspec.planner.model.config import read_config
    from subspec.planner.model.tokenizer_files import read_tokenizer

    read_config(model.path, model.source)
    return read_tokenizer(model.path).tokenizer_json


def check_draft_model(vocabulary: str, draft_model: "Resolved", reference: str) -> None:
    """Raises SubspecError for a draft model that we do not run, or USAGE for one of another
    vocabulary, before its weights are fetched. vocabulary: the model's tokenizer.json."""
    from subspec.planner.model.vocabulary import check_vocabulary

    with errors_of(f"draft model {draft_model.source.repository}"):
        own = check_model(draft_model)
    check_vocabulary(vocabulary, own, reference)


def report(options: Options, planned: Planned, out: Path) -> None:
    """Print the table on stderr, and on stdout the folder or the JSON object."""
    from rich.console import Console

    from subspec.planner.report.explain import plan_json, print_plan

    spec, plan = planned.spec, planned.plan
    print_plan(spec, plan, Console(stderr=True))
    if not options.dry_run:
        say(f'wrote {out}/: subspec-run {shlex.quote(str(out))} "your prompt"')
    if options.as_json:
        print(json.dumps(plan_json(spec, plan, None if options.dry_run else out)))
    elif not options.dry_run:
        print(out)


def check_options(options: Options) -> None:
    """Raise SubspecError(USAGE) for combinations of options that click cannot check."""
    number = sum(given is not None for given in (options.model, options.source, options.calibrate))
    if number != 1:
        raise SubspecError(
            Exit.USAGE,
            f"{number or 'none'} of --model REF, --from ARTIFACT and --calibrate ARTIFACT given, "
            "expected one",
            "--model for a checkpoint, --from to re-plan an artifact",
        )
    for flag, given in (("--print-plan", options.print_plan), ("--reprofile", options.reprofile)):
        if given and options.source is None:
            raise SubspecError(
                Exit.USAGE, f"{flag} was given without --from", "add --from ARTIFACT"
            )
    if options.draft_model is None and options.draft_model_weights != "4bit":
        message = "--draft-model-weights was given without --draft-model"
        raise SubspecError(Exit.USAGE, message, "add --draft-model REF")
    if options.model is not None:  # before it is downloaded
        check_method(options.method, options.draft_model is not None)
    makes_weights = options.encoding != "auto" or options.quantizer != "blocked"
    makes_weights = makes_weights or options.draft_model is not None
    makes_weights = makes_weights or options.draft_head not in (None, OWN_HEAD)
    if options.artifact is not None and (makes_weights or options.revision):
        raise SubspecError(
            Exit.USAGE,
            "the weights of an artifact stay as they are stored: --encoding, --quantizer, "
            "--draft-model, --draft-head REF and --revision do not apply",
            "leave them out, or plan with --model",
        )
    rehearses = options.rehearse is not None
    if options.calibrate is not None and (options.profile or options.calibration or rehearses):
        raise SubspecError(
            Exit.USAGE,
            "--calibrate uses the recorded runs and the artifact's profile: --calibration, "
            "--profile and --rehearse do not apply",
            "leave them out, or use --from",
        )
    if options.rehearse and options.profile is not None:
        raise SubspecError(
            Exit.USAGE,
            "--profile plans for the machine of a file, whose plan is not run here: --rehearse "
            "SECONDS does not apply",
            "leave out one of them",
        )
    if options.rehearse == 0 and options.calibration is not None:
        raise SubspecError(
            Exit.USAGE,
            "--calibration FILE needs a measurement run, which --rehearse none skips",
            "leave out one of them",
        )
    if options.vram is None and options.artifact is None:
        raise SubspecError(Exit.USAGE, "--vram SIZE is missing", "such as --vram 8GB")


def plan_artifact(options: Options, source: Path) -> None:
    """Run --from or --calibrate: re-plan an artifact, in its folder or in one beside it."""
    from subspec.artifacts.format.codec import dump_json
    from subspec.artifacts.format.store import open_artifact
    from subspec.planner.build.artifact import rebuild

    artifact = open_artifact(source)
    if options.vram is None:
        options = replace(options, vram=artifact.plan.budget_bytes)
    if options.calibrate is not None:
        options = asked_before(options, artifact.plan.constraints)
    out = options.out or source
    writes = not (options.dry_run or options.print_plan)
    if writes:
        check_out(out, overwrite=options.overwrite or options.out is None)
    request = request_of(options)
    with progress() as show:
        if options.calibrate is not None:
            planned = plan_from_runs(request, artifact, out, show, say)
        else:
            planned = plan_again(
                request, artifact, out, options.reprofile, not options.print_plan, show, say
            )
    plan, profile = planned.plan, planned.profile
    if options.print_plan:
        print(dump_json(plan), end="")
        return
    if writes:
        rebuild(artifact, plan, profile, out, overwrite=options.overwrite or options.out is None)
    report(options, planned, out)


def asked_before(options: Options, constraints: "Constraints") -> Options:
    """The options, with the constraints of the artifact's plan where none are given."""
    stop = options.min_path_probability
    return replace(
        options,
        context=options.context or constraints.context,
        sequences=options.sequences or constraints.num_sequences,
        width=options.width or constraints.width,
        depth=options.depth or constraints.depth,
        method=options.method or constraints.method,
        ram=options.ram or constraints.ram_bytes,
        min_path_probability=constraints.min_path_probability if stop is None else stop,
        draft_head=options.draft_head or (OWN_HEAD if constraints.draft_head else None),
    )


def request_of(options: Options) -> PlanRequest:
    """The PlanRequest of the options; reads the files that they name."""
    from subspec.artifacts.plan import Constraints

    samples = own_samples(options)
    constraints = Constraints(
        options.context,
        options.width,
        options.depth,
        options.method,  # type: ignore[arg-type]
        options.ram,
        options.encoding,  # type: ignore[arg-type]
        options.min_path_probability,
        options.sequences or 1,
        options.draft_head is not None,
    )
    return PlanRequest(
        options.budget, constraints, options.device, options.link_bandwidth,
        known_profile(options), samples, options.rehearse,
    )  # fmt: skip


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


def own_samples(options: Options) -> "tuple[Sample, ...] | None":
    """The prompts of --calibration."""
    from subspec.planner.rehearse.calibration import read_samples

    if options.calibration is None:
        return None
    samples = read_samples(options.calibration)
    if options.profile is not None:
        raise SubspecError(
            Exit.USAGE,
            "--profile plans for another machine, --calibration runs the model on this one",
            "drop one of the two",
        )
    return samples


def check_out(out: Path, overwrite: bool) -> None:
    """Raise early what new_folder() would raise after the work."""
    from subspec.artifacts.format.folder import check_target, place_of

    try:
        check_target(out, overwrite)
        parent = place_of(out)
        (parent / f".{out.name}.building").exists()  # is the name too long?
    except OSError as error:
        raise SubspecError(
            Exit.USAGE, f"--out {out} cannot be used: {error.strerror}", "choose another --out"
        ) from None
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise SubspecError(Exit.USAGE, f"cannot write in {parent}", "choose another --out")


def default_name(options: Options) -> str:
    """qwen2.5-32b-24gb, from the model's last name and the size."""
    model, vram = options.model or "", options.budget
    stem = model.partition("@")[0].rstrip("/").rpartition("/")[2]
    if set(stem) <= set(".~"):  # a folder that is named by its place
        stem = Path(model).expanduser().resolve().name
    if vram % parse_size("1GiB") == 0:
        size = f"{vram >> 30}gib"
    else:
        units = (("gb", 10**9), ("mb", 10**6), ("b", 1))
        size = next(f"{vram // n}{unit}" for unit, n in units if vram % n == 0)
    return re.sub(r"[^a-z0-9._-]+", "-", f"{stem}-{size}".lower()).lstrip("-.")


@contextmanager
def progress() -> Iterator[Progress]:
    """Progress on stderr: a bar on a terminal, a line per stage elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
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
