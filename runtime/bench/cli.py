"""subspec-bench: speed, tasks, sweep, compare, trace, report. Slow imports are done when needed."""

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from subspec.artifacts.common.command import Program, say
from subspec.artifacts.common.configuration import Configured
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.plan import DrafterName
from subspec.runtime.app.opening_options import (
    OPENING,
    OpeningOptions,
    check_opening,
    drafting_options,
    lossy_options,
    plan_options,
    verify_options,
)
from subspec.runtime.bench.bench_options import (
    SWEEPING,
    artifact_argument,
    draft_temperatures,
    folder_of_files,
    form_option,
    names,
    out_option,
    plan_axes,
    rules_of,
    sampling_options,
    seed_option,
    shares,
    temperatures,
    whole_numbers,
    writable_file,
)
from subspec.runtime.bench.layouts import BUILTIN, LAYOUTS
from subspec.runtime.lossy import Lossy

if TYPE_CHECKING:
    from subspec.runtime.bench.tables import Form
    from subspec.runtime.bench.variants import Source

NAME = "subspec-bench"
HELP = {"help_option_names": ["-h", "--help"]}
METHODS = (*get_args(DrafterName), "plain")


class Programs(Program, click.Group):
    """A group of commands with the exit codes of `Program`."""


@click.group(NAME, cls=Programs, context_settings=HELP, no_args_is_help=False)
@click.version_option(package_name="subspec")
def main() -> None:
    """Measure an artifact: speed, tasks with accuracy, sweeps of settings, pairs, traces.

    Tables go to stdout, progress to stderr. docs/bench.md defines every figure.
    """


@main.command("speed", cls=Configured, program=NAME, rules=OPENING, context_settings=HELP)
@artifact_argument
@click.option("-p", "--prompt-tokens", default="128", show_default=True, callback=whole_numbers,
              metavar="N,N", help="Prompt lengths for pp tests.")  # fmt: skip
@click.option("-n", "--generated-tokens", default="64", show_default=True, callback=whole_numbers,
              metavar="N,N", help="Numbers of generated tokens for tg tests.")  # fmt: skip
@click.option("-d", "--cached-tokens", default="0", show_default=True, callback=whole_numbers,
              metavar="N,N", help="Numbers of tokens already in the KV cache.")  # fmt: skip
@click.option("-r", "--repetitions", type=click.IntRange(1, 1000), default=3, show_default=True,
              help="Measurements of each row.")  # fmt: skip
@click.option("--methods", metavar="NAMES",
              help=f"Any of {', '.join(METHODS)}.  [default: the plan's and plain]")  # fmt: skip
@plan_axes
@form_option
@out_option("Append each row; rows already in FILE are skipped.")
@plan_options
def speed(artifact: Path, form: "Form", out: Path | None, **given: Any) -> None:
    """Measure tokens/s of prompt processing and of generation.

    Rows are named as in llama-bench: pp128 reads 128 tokens, tg64 generates 64.
    """
    from subspec.runtime.bench.csv_columns import speed_columns
    from subspec.runtime.bench.tables import speed_table, written
    from subspec.runtime.bench.throughput import Tests, speed_rows
    from subspec.runtime.bench.variants import variants

    asked = given["methods"]
    methods = () if asked is None else names(asked, METHODS, "--methods")
    axes = variants(given["budgets"], given["contexts"], given["widths"], given["depths"])
    tests = Tests(
        tuple(one for one in given["prompt_tokens"] if one),
        tuple(one for one in given["generated_tokens"] if one),
        given["cached_tokens"] or (0,),
        given["repetitions"],
    )
    if not (tests.prompt_tokens or tests.generated_tokens):
        message = "--prompt-tokens and --generated-tokens are 0, expected something to measure"
        raise SubspecError(Exit.USAGE, message, "such as --prompt-tokens 128")
    rows = list(speed_rows(source_of(artifact, given), axes, methods, tests, out, say))  # type: ignore[arg-type]
    sys.stdout.write(written(rows, form, speed_table, speed_columns))


@main.command("tasks", cls=Configured, program=NAME, rules=OPENING, context_settings=HELP)
@artifact_argument
@click.option("--tasks", default=BUILTIN, show_default=True, metavar="NAMES",
              help=f"Any of {BUILTIN}, {', '.join(LAYOUTS)}.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Folder with TASK.jsonl in the data set's own layout.  "
              "[default: the hub]")  # fmt: skip
@click.option("--max-samples", type=click.IntRange(min=1), default=20, show_default=True,
              help="Maximum items per task.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=1),
              help="Maximum answer length.  [default: the task's]")  # fmt: skip
@sampling_options
@drafting_options
@lossy_options
@click.option("--no-thinking", is_flag=True,
              help="Turn off thinking in the chat template.")  # fmt: skip
@click.option("--execute-code", is_flag=True,
              help="Run generated programs, in a child process with limits.")  # fmt: skip
@form_option
@out_option("Append each answer; answers already in FILE are skipped.")
@plan_options
def tasks(artifact: Path, form: "Form", out: Path | None, **given: Any) -> None:
    """Measure accuracy, acceptance and speed on data sets."""
    from subspec.runtime.bench.csv_columns import task_columns
    from subspec.runtime.bench.items import items_of
    from subspec.runtime.bench.prompting import check_no_thinking
    from subspec.runtime.bench.tables import task_table, written
    from subspec.runtime.bench.tasks import Asking, answered_items
    from subspec.runtime.bench.variants import Variant, opened_engine, planned
    from subspec.runtime.text.tokenizer import load_tokenizer

    chosen = names(given["tasks"], (BUILTIN, *LAYOUTS), "--tasks")
    most, seed = given["max_samples"], given["seed"]
    items = [one for task in chosen for one in items_of(task, given["data"], most, seed)]
    source = source_of(artifact, given)
    how = Asking(
        given["temperature"],
        seed,
        given["max_tokens"],
        given["execute_code"],
        source.how.lossy,
        False if given["no_thinking"] else None,
    )
    found = planned(source, Variant())
    text = load_tokenizer(found.path / "tokenizer")
    if given["no_thinking"]:
        check_no_thinking(text)
    with opened_engine(found, source, None, padded=True) as engine:
        rows = answered_items(engine, text, items, how, out, say)
    sys.stdout.write(written(rows, form, task_table, task_columns))


@main.command("sweep", cls=Configured, program=NAME, rules=SWEEPING, context_settings=HELP)
@artifact_argument
@plan_axes
@click.option("--temperatures", default="0", show_default=True, callback=temperatures,
              metavar="T,T", help="Sampling temperatures; 0 is greedy.")  # fmt: skip
@click.option("--draft-temperatures", default="", callback=draft_temperatures, metavar="T,T",
              help="Temperatures of the draft.  [default: the plan's]")  # fmt: skip
@verify_options
@click.option("--thresholds", default="", callback=shares, metavar="X,X",
              help=f"With --verify lossy: thresholds.  [default: {Lossy.threshold}]")  # fmt: skip
@click.option("--windows", default="", callback=whole_numbers, metavar="N,N",
              help=f"With --verify lossy: windows.  [default: {Lossy.window}]")  # fmt: skip
@click.option(
    "--method", type=click.Choice(METHODS), help="Decoding method.  [default: each plan's own]"
)
@click.option("--tasks", default=BUILTIN, show_default=True, metavar="NAMES",
              help="Tasks to take prompts from.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Folder with TASK.jsonl.  [default: the hub]")  # fmt: skip
@click.option("--max-samples", type=click.IntRange(min=1), default=4, show_default=True,
              help="Maximum items per task.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=2), default=64, show_default=True,
              help="Maximum answer length.")  # fmt: skip
@seed_option
@form_option
@out_option("Append each row; rows already in FILE are skipped.")
@plan_options
def sweep(artifact: Path, form: "Form", out: Path | None, **given: Any) -> None:
    """Measure speed under every combination of settings.

    The prompts are the same for all; subspec-plan --from plans each combination.
    """
    from subspec.runtime.bench.csv_columns import sweep_columns
    from subspec.runtime.bench.items import items_of
    from subspec.runtime.bench.sweep import Grid, sweep_rows
    from subspec.runtime.bench.tables import sweep_table, written
    from subspec.runtime.bench.variants import variants

    source = source_of(artifact, given)
    rules = rules_of(source.how, given["thresholds"], given["windows"], given["method"])
    chosen = names(given["tasks"], (BUILTIN, *LAYOUTS), "--tasks")
    most, seed = given["max_samples"], given["seed"]
    items = [one for task in chosen for one in items_of(task, given["data"], most, seed)]
    axes = variants(given["budgets"], given["contexts"], given["widths"], given["depths"])
    grid = Grid(
        axes,
        given["temperatures"] or (0.0,),
        given["method"],
        given["max_tokens"],
        seed,
        rules,
        given["draft_temperatures"] or (None,),
    )
    rows = list(sweep_rows(source, grid, items, out, say))
    sys.stdout.write(written(rows, form, sweep_table, sweep_columns))


@main.command("compare", cls=Configured, program=NAME, context_settings=HELP)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object on stdout.")
@click.option("--expect-identical", is_flag=True, help="Exit with code 1 if any token differs.")
def compare(a: Path, b: Path, as_json: bool, expect_identical: bool) -> None:
    """Compare two result files of tasks, item by item.

    Write them with --out. Tokens, speed, acceptance and score are compared.
    """
    from subspec.runtime.bench.paired import compare as compared
    from subspec.runtime.bench.paired import compared_json, identical_or_raise
    from subspec.runtime.bench.records import AnswerRow, of_kind, read_rows
    from subspec.runtime.bench.tables import as_markdown, compared_table

    found = compared(*(list(of_kind(read_rows(file), AnswerRow)) for file in (a, b)))
    if found.left_out:
        say(
            f"note: {found.left_out} of {found.turns + found.left_out} turns of the same items are "
            "left out: their prompts, references or --max-tokens differ"
        )
    if as_json:
        print(json.dumps(compared_json(found)))
    else:
        sys.stdout.write(as_markdown(compared_table(found)))
    if expect_identical:
        say(identical_or_raise(found))


@main.command("trace", cls=Configured, program=NAME, rules=OPENING, context_settings=HELP)
@artifact_argument
@click.argument("prompt")
@click.option("--max-tokens", type=click.IntRange(min=2), default=64, show_default=True,
              help="Maximum answer length.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER",
              callback=folder_of_files,
              help="Folder for trace.json (Perfetto) and steps.jsonl.")  # fmt: skip
@sampling_options
@drafting_options
@lossy_options
@plan_options
def trace(artifact: Path, prompt: str, out: Path, max_tokens: int, **given: Any) -> None:
    """Trace one answer: a timeline and every drafted token's probability."""
    from subspec.runtime.bench.records import writing
    from subspec.runtime.bench.tasks import Asking
    from subspec.runtime.bench.tracing import traced, write_trace
    from subspec.runtime.bench.variants import Variant, planned
    from subspec.runtime.text.tokenizer import load_tokenizer

    source = source_of(artifact, given)
    found = planned(source, Variant())
    ids = load_tokenizer(found.path / "tokenizer").chat_ids([{"role": "user", "content": prompt}])
    how = Asking(given["temperature"], given["seed"], max_tokens, lossy=source.how.lossy)
    setting, spans, steps = traced(found, source, ids, how)
    with writing(out):
        out.mkdir(exist_ok=True)
        write_trace(out, setting, spans, steps)
    say(f"{len(steps)} rounds, {len(spans)} spans: {out}/")
    print(out)


@main.command("report", cls=Configured, program=NAME, context_settings=HELP)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench.html"),
              show_default=True, callback=writable_file, metavar="FILE",
              help="Output page; an older one is replaced.")  # fmt: skip
def report(files: tuple[Path, ...], out: Path) -> None:
    """Write an HTML report of result files.

    FILES were written with --out or -o jsonl.
    """
    from subspec.runtime.bench.page import is_replaceable, page
    from subspec.runtime.bench.records import read_rows, writing

    if not is_replaceable(out):
        message = f"{out} exists already and is not a page of {NAME} report"
        raise SubspecError(Exit.USAGE, message, "choose another --out")
    rendered = page([(file.name, read_rows(file)) for file in files])
    with writing(out):
        out.write_text(rendered, "utf-8")
    print(out)


def source_of(artifact: Path, given: dict[str, Any]) -> "Source":
    from subspec.runtime.bench.variants import Source

    known = {field.name for field in fields(OpeningOptions)}
    how = OpeningOptions(**{k: v for k, v in given.items() if k in known})
    check_opening(how)
    return Source(artifact, how)


if __name__ == "__main__":
    main()
