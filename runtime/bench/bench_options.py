"""Option parsers of subspec-bench: lists of numbers, sizes and names, and options shared by several
commands."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click

from subspec.artifacts.common.command import HINT, finite_option
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import parse_size
from subspec.runtime.app.opening_options import (
    DRAFT_TEMPERATURES,
    OPENING,
    OpeningOptions,
    all_of,
)
from subspec.runtime.lossy import Lossy

Command = Callable[..., None]


def whole_numbers(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """Parse a list of numbers: "128,512" -> (128, 512); "" -> ()."""
    return tuple(listed(text, int, lambda one: one >= 0, "whole numbers such as 128,512"))


def positive_numbers(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    return tuple(listed(text, int, lambda one: one >= 1, "whole numbers from 1, such as 128,512"))


def temperatures(context: click.Context, option: click.Parameter, text: str) -> tuple[float, ...]:
    return tuple(listed(text, float, lambda one: 0 <= one <= 100, "numbers such as 0,0.7"))


def draft_temperatures(
    context: click.Context, option: click.Parameter, text: str
) -> tuple[float, ...]:
    least, most = DRAFT_TEMPERATURES
    expected = f"numbers from {least:g} to {most:g}, such as 0.2,1"
    return tuple(listed(text, float, lambda one: least <= one <= most, expected))


def shares(context: click.Context, option: click.Parameter, text: str) -> tuple[float, ...]:
    return tuple(listed(text, float, lambda one: 0 <= one <= 1, "numbers from 0 to 1, as 0.1,0.3"))


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
    """Parse a list of at least one known name. Raises SubspecError(USAGE)."""
    every, found = list(known), tuple(one.strip() for one in text.split(",") if one.strip())
    if wrong := next((one for one in found if one not in every), None):
        raise SubspecError(Exit.USAGE, f"{what} {wrong!r}, expected some of {', '.join(every)}")
    if not found:
        raise SubspecError(Exit.USAGE, f"{what} is empty, expected some of {', '.join(every)}")
    return found


# rules_of has the error messages.
SWEEPING = replace(
    OPENING,
    needs=(*OPENING.needs, ("thresholds", "verify"), ("windows", "verify")),
    excludes=(*OPENING.excludes, ("method", "verify")),
    only_if={**OPENING.only_if, ("method", "verify"): lambda given: given["method"] == "plain"},
)


def rules_of(
    how: OpeningOptions, thresholds: Sequence[float], windows: Sequence[int], method: str | None
) -> list[Lossy | None]:
    """Return the lossy rules of a sweep, or [None] if it is exact. Raises SubspecError(USAGE)."""
    if how.lossy is None:
        for flag, given in (("--thresholds", thresholds), ("--windows", windows)):
            if given:
                message = f"{flag} was given without --verify lossy"
                raise SubspecError(Exit.USAGE, message, "add --verify lossy")
        return [None]
    if method == "plain":
        message = "--method plain and --verify lossy exclude each other"
        raise SubspecError(Exit.USAGE, message, "leave one out")
    axes = product(thresholds or (Lossy.threshold,), windows or (Lossy.window,))
    return [replace(how.lossy, threshold=one, window=size) for one, size in axes]


def writable_file(
    context: click.Context, option: click.Parameter, value: Path | None
) -> Path | None:
    """Callback: check as far as possible that a file can be written, without creating it."""
    return None if value is None else checked_writable(value, value.is_file, "file")


def folder_of_files(
    context: click.Context, option: click.Parameter, value: Path | None
) -> Path | None:
    """Callback: check that a folder is writable or can be created."""
    return None if value is None else checked_writable(value, value.is_dir, "folder")


def checked_writable(path: Path, is_one: Callable[[], bool], kind: str) -> Path:
    """Return `path`. Raises click.BadParameter if it cannot be written."""
    try:
        there = path.exists()
        if there and not is_one():
            problem = f"is not a {kind}"
        elif not path.parent.is_dir():
            problem = f"cannot be made: {path.parent} is not a folder"
        elif not os.access(path if there else path.parent, os.W_OK):
            problem = "cannot be written"
        else:
            return path
    except OSError as error:
        problem = f"cannot be used: {error.strerror}"
    raise click.BadParameter(f"{path} {problem}{HINT}name another {kind}")


def form_option(command: Command) -> Command:
    return click.option("-o", "--output", "form", type=click.Choice(["md", "csv", "json", "jsonl"]),
                        default="md", show_default=True, help="Form of the table on stdout.",
                        )(command)  # fmt: skip


def out_option(help: str) -> Callable[[Command], Command]:
    return click.option(
        "--out",
        type=click.Path(path_type=Path),
        callback=writable_file,
        metavar="FILE",
        help=help,
    )


# What `speed` and `sweep` plan for.
plan_axes = all_of(
    click.option("--budgets", default="", callback=sizes, metavar="SIZE,SIZE",
                 help="Plan for each value.  [default: the plan's]"),
    click.option("--contexts", default="", callback=positive_numbers, metavar="N,N",
                 help="Plan for each value.  [default: the plan's]"),
    click.option("--widths", default="", callback=positive_numbers, metavar="N,N",
                 help="Widths of the draft tree.  [default: the plan's]"),
    click.option("--depths", default="", callback=positive_numbers, metavar="N,N",
                 help="Depths of the draft tree.  [default: the plan's]"),
)  # fmt: skip
seed_option = click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0,
                           show_default=True,
                           help="Seed for item selection and sampling.")  # fmt: skip
# How one answer is sampled.
sampling_options = all_of(
    click.option("--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True,
                 callback=finite_option, help="Sampling temperature; 0 is greedy."),
    seed_option,
)  # fmt: skip


def artifact_argument(command: Command) -> Command:
    return click.argument("artifact", type=click.Path(path_type=Path))(command)
