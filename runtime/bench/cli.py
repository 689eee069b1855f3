"""subspec-bench: speed, tasks, sweep, compare, trace, report. Slow imports are done when needed."""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from subspec.artifacts.common.command import HINT, Program, say
from subspec.artifacts.common.configuration import Configured
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import parse_size
from subspec.runtime.app.opening_options import OpeningOptions, plan_options
from subspec.runtime.app.run_options import finite_option
from subspec.runtime.bench.layouts import BUILTIN, LAYOUTS

if TYPE_CHECKING:
    from subspec.runtime.bench.records import AnswerRow, SpeedRow, SweepRow
    from subspec.runtime.bench.tables import Form, Table
    from subspec.runtime.bench.variants import Source

NAME = "subspec-bench"
HELP = {"help_option_names": ["-h", "--help"]}
METHODS = ("substitute", "plain")

Command = Callable[..., None]


class Programs(Program, click.Group):
    """Commands under one name, each of which ends as `Program` says."""


def whole_numbers(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """ "128,512" -> (128, 512); "" -> ()."""
    return tuple(listed(text, int, lambda one: one >= 0, "whole numbers such as 128,512"))


def positive_numbers(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    return tuple(listed(text, int, lambda one: one >= 1, "whole numbers from 1, such as 128,512"))


def temperatures(context: click.Context, option: click.Parameter, text: str) -> tuple[float, ...]:
    return tuple(listed(text, float, lambda one: 0 <= one <= 100, "numbers such as 0,0.7"))


def sizes(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(parse_size(one.strip()) for one in text.split(",") if one.strip())
    except SubspecError as error:
        raise click.BadParameter(f"{error.message}{HINT}{error.hint}") from None


def listed(text: str, kind: Any, holds: Any, expected: str) -> list[Any]:
    try:
        found = [kind(one) for one in text.split(",") if one.strip()]
    except ValueError:
        found = [None]
    if not all(one is not None and holds(one) for one in found):
        raise click.BadParameter(f"{text!r} is not {expected}")
    return found


def names(text: str, known: Iterable[str], what: str) -> tuple[str, ...]:
    """Raises SubspecError(USAGE)."""
    every, found = list(known), tuple(one.strip() for one in text.split(",") if one.strip())
    if wrong := next((one for one in found if one not in every), None):
        raise SubspecError(Exit.USAGE, f"{what} {wrong!r}, expected some of {', '.join(every)}")
    return found


@click.group(NAME, cls=Programs, context_settings=HELP)
@click.version_option(package_name="subspec")
def main() -> None:
    """Measure an artifact: speed, tasks with accuracy, sweeps of settings, pairs, traces.

    Tables go to stdout, progress to stderr. docs/bench.md has the rules by which is counted.
    """


def form_option(command: Command) -> Command:
    return click.option("-o", "--output", "form", type=click.Choice(["md", "csv", "json", "jsonl"]),
                        default="md", show_default=True, help="Form of the table on stdout.",
                        )(command)  # fmt: skip


def out_option(help: str) -> Callable[[Command], Command]:
    return click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help=help)


def artifact_argument(command: Command) -> Command:
    return click.argument("artifact", type=click.Path(path_type=Path))(command)


@main.command("speed", cls=Configured, program=NAME, context_settings=HELP)
@artifact_argument
@click.option("-p", "--prompts", default="128", show_default=True, callback=whole_numbers,
              metavar="N,N", help="Rows pp: tokens of prompts that are read.")  # fmt: skip
@click.option("-n", "--answers", default="64", show_default=True, callback=whole_numbers,
              metavar="N,N", help="Rows tg: tokens that are generated.")  # fmt: skip
@click.option("-d", "--filled", default="0", show_default=True, callback=whole_numbers,
              metavar="N,N", help="Tokens in the cache before either.")  # fmt: skip
@click.option("-r", "--repeats", type=click.IntRange(1, 1000), default=3, show_default=True)
@click.option("--methods", default="substitute,plain", show_default=True, metavar="NAMES")
@click.option("--budgets", default="", callback=sizes, metavar="SIZE,SIZE",
              help="Plan for each of them.  [default: the plan's]")  # fmt: skip
@click.option("--contexts", default="", callback=positive_numbers, metavar="N,N",
              help="Plan for each of them.  [default: the plan's]")  # fmt: skip
@click.option("--widths", default="", callback=positive_numbers, metavar="N,N",
              help="Widths of the draft tree.  [default: the plan's]")  # fmt: skip
@click.option("--depths", default="", callback=positive_numbers, metavar="N,N",
              help="Depths of the draft tree.  [default: the plan's]")  # fmt: skip
@form_option
@out_option("Also append the rows, JSON Lines, as they are measured.")
@plan_options
def speed(artifact: Path, form: "Form", out: Path | None, **given: Any) -> None:
    """Rows as llama-bench has them: pp128 reads 128 tokens, tg64 generates 64."""
    from subspec.runtime.bench.records import append_row
    from subspec.runtime.bench.tables import speed_table
    from subspec.runtime.bench.throughput import Tests, speed_rows
    from subspec.runtime.bench.variants import variants

    methods = names(given["methods"], METHODS, "--methods")
    axes = variants(given["budgets"], given["contexts"], given["widths"], given["depths"])
    tests = Tests(
        tuple(one for one in given["prompts"] if one),
        tuple(one for one in given["answers"] if one),
        given["filled"] or (0,),
        given["repeats"],
    )
    rows = list["SpeedRow"]()
    for row in speed_rows(source_of(artifact, given), axes, methods, tests, say):  # type: ignore[arg-type]
        if out is not None:
            append_row(out, row)
        rows.append(row)
    show(rows, speed_table(rows), form)


@main.command("tasks", cls=Configured, program=NAME, context_settings=HELP)
@artifact_argument
@click.option("--tasks", default=BUILTIN, show_default=True, metavar="NAMES",
              help=f"Some of {BUILTIN}, {', '.join(LAYOUTS)}.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), metavar="FOLDER",
              help="With TASK.jsonl in the data set's own layout.  [default: the hub]")  # fmt: skip
@click.option("--max-samples", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1),
              help="Longest answer.  [default: the task's]")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True,
              callback=finite_option)  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True,
              help="Of the choice of items and of sampling.")  # fmt: skip
@click.option("--no-speculation", is_flag=True,
              help="Decode plainly: the same tokens without a draft.")  # fmt: skip
@click.option("--execute-code", is_flag=True,
              help="Run generated programs, in a child with limits.")  # fmt: skip
@form_option
@out_option("Append each answer; what it has already is not done again.")
@plan_options
def tasks(artifact: Path, form: "Form", out: Path | None, **given: Any) -> None:
    """Answer items of data sets: accuracy, acceptance and speed together."""
    from subspec.runtime.bench.items import items_of
    from subspec.runtime.bench.tables import task_table
    from subspec.runtime.bench.tasks import Asking, answered_items
    from subspec.runtime.bench.variants import Variant, opened_engine, planned
    from subspec.runtime.text.tokenizer import load_tokenizer

    chosen = names(given["tasks"], (BUILTIN, *LAYOUTS), "--tasks")
    most, seed = given["max_samples"], given["seed"]
    items = [one for task in chosen for one in items_of(task, given["data"], most, seed)]
    how = Asking(given["temperature"], seed, given["max_tokens"], given["execute_code"])
    source = source_of(artifact, given)
    found = planned(source, Variant())
    with opened_engine(found, source, None, padded=True) as engine:
        text = load_tokenizer(found.path / "tokenizer")
        rows = answered_items(engine, text, items, how, out, say)
    show(rows, task_table(rows), form)


@main.command("sweep", cls=Configured, program=NAME, context_settings=HELP)
@artifact_argument
@click.option("--widths", default="", callback=positive_numbers, metavar="N,N")
@click.option("--depths", default="", callback=positive_numbers, metavar="N,N")
@click.option("--temperatures", default="0", show_default=True, callback=temperatures,
              metavar="T,T")  # fmt: skip
@click.option("--budgets", default="", callback=sizes, metavar="SIZE,SIZE")
@click.option("--contexts", default="", callback=positive_numbers, metavar="N,N")
@click.option("--method", type=click.Choice(METHODS), help="[default: each plan's own]")
@click.option("--tasks", default=BUILTIN, show_default=True, metavar="NAMES")
@click.option("--data", type=click.Path(path_type=Path), metavar="FOLDER")
@click.option("--max-samples", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@form_option
@out_option("Also append the rows, JSON Lines, as they are measured.")
@plan_options
def sweep(artifact: Path, form: "Form", out: Path | None, **given: Any) -> None:
    """The same prompts under every combination of settings; subspec-plan --from plans each."""
    from subspec.runtime.bench.items import items_of
    from subspec.runtime.bench.records import append_row
    from subspec.runtime.bench.sweep import Grid, sweep_rows
    from subspec.runtime.bench.tables import sweep_table
    from subspec.runtime.bench.variants import variants

    chosen = names(given["tasks"], (BUILTIN, *LAYOUTS), "--tasks")
    most, seed = given["max_samples"], given["seed"]
    items = [one for task in chosen for one in items_of(task, given["data"], most, seed)]
    axes = variants(given["budgets"], given["contexts"], given["widths"], given["depths"])
    grid = Grid(axes, given["temperatures"] or (0.0,), given["method"], given["max_tokens"], seed)
    rows = list["SweepRow"]()
    for row in sweep_rows(source_of(artifact, given), grid, items, say):
        if out is not None:
            append_row(out, row)
        rows.append(row)
    show(rows, sweep_table(rows), form)


@main.command("compare", cls=Configured, program=NAME, context_settings=HELP)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--expect-identical", is_flag=True, help="End with 1 if a token differs.")
def compare(a: Path, b: Path, as_json: bool, expect_identical: bool) -> None:
    """Compare two files of `tasks --out`, item by item: tokens, speed, acceptance, score."""
    from subspec.runtime.bench.paired import compare as compared
    from subspec.runtime.bench.paired import compared_json
    from subspec.runtime.bench.records import AnswerRow, of_kind, read_rows
    from subspec.runtime.bench.tables import as_markdown, compared_table

    found = compared(*(list(of_kind(read_rows(file), AnswerRow)) for file in (a, b)))
    if as_json:
        print(json.dumps(compared_json(found)))
    else:
        sys.stdout.write(as_markdown(compared_table(found)))
    if expect_identical and found.identical < found.turns:
        first = found.divergences[0]
        raise SubspecError(
            Exit.UNEXPECTED,
            f"{found.turns - found.identical} of {found.turns} turns have other tokens, first "
            f"{first.task} {first.item} at token {first.position}",
        )


@main.command("trace", cls=Configured, program=NAME, context_settings=HELP)
@artifact_argument
@click.argument("prompt")
@click.option("--max-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER",
              help="For trace.json (Perfetto) and steps.jsonl.")  # fmt: skip
@plan_options
def trace(artifact: Path, prompt: str, out: Path, max_tokens: int, **given: Any) -> None:
    """What runs when while PROMPT is answered, and each draft's tokens with their probabilities."""
    from subspec.runtime.bench.tracing import traced, write_trace
    from subspec.runtime.bench.variants import Variant, planned
    from subspec.runtime.sequence import GenerationParams
    from subspec.runtime.text.tokenizer import load_tokenizer

    source = source_of(artifact, given)
    found = planned(source, Variant())
    ids = load_tokenizer(found.path / "tokenizer").chat_ids([{"role": "user", "content": prompt}])
    ends = frozenset(found.spec.eos_token_ids)
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        message = f"--out {out} cannot be made: {error.strerror}"
        raise SubspecError(Exit.USAGE, message, "name another folder") from None
    params = GenerationParams(max_tokens, end_tokens=ends, logprobs=0)
    spans, steps = traced(found, source, ids, params)
    write_trace(out, found, spans, steps)
    say(f"{len(steps)} rounds, {len(spans)} spans: {out}/")
    print(out)


@main.command("report", cls=Configured, program=NAME, context_settings=HELP)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench.html"),
              show_default=True, metavar="FILE")  # fmt: skip
def report(files: tuple[Path, ...], out: Path) -> None:
    """One HTML page of files that were written with --out or -o jsonl."""
    from subspec.runtime.bench.page import page
    from subspec.runtime.bench.records import read_rows

    rendered = page([(file.name, read_rows(file)) for file in files])
    try:
        out.write_text(rendered, "utf-8")
    except OSError as error:
        message = f"--out {out} cannot be written: {error.strerror}"
        raise SubspecError(Exit.USAGE, message, "name another file") from None
    print(out)


def source_of(artifact: Path, given: dict[str, Any]) -> "Source":
    from subspec.runtime.bench.variants import Source

    known = {field.name for field in fields(OpeningOptions)}
    return Source(artifact, OpeningOptions(**{k: v for k, v in given.items() if k in known}))


def show(
    rows: "list[SpeedRow] | list[AnswerRow] | list[SweepRow]", table: "Table", form: "Form"
) -> None:
    from subspec.runtime.bench.tables import written

    sys.stdout.write(written(rows, table, form))


if __name__ == "__main__":
    main()
