"""Run subspec-plan as a command, since the runtime does not import the planner."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from subspec.artifacts.common.child import run_child
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.codec import load_dataclass, parse_json

PLANNER = (sys.executable, "-P", "-m", "subspec.planner")


def run_planner(words: Sequence[str], shown: bool = False) -> bytes:
    """Run subspec-plan with these arguments and --json, and return its stdout. shown: its stderr is
    shown to the user. Raises SubspecError: the planner's own, with its exit code."""
    # The arguments are complete: the user's defaults for subspec-plan must not apply.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SUBSPEC_PLAN_")}
    try:
        ended = run_child([*PLANNER, *words, "--json"], shown=shown, environment=environment)
    except OSError as error:
        message = f"subspec-plan cannot be started: {error.strerror}"
        raise SubspecError(Exit.UNEXPECTED, message, "install subspec again") from None
    if ended.returncode:
        raise planners_error(
            ended.returncode,
            ended.stdout.decode("utf-8", "replace"),
            "" if shown else ended.stderr.decode("utf-8", "replace"),
            shown,
        )
    return ended.stdout


def planners_error(code: int, printed: str, story: str, shown: bool = False) -> SubspecError:
    """Return the planner's error from the JSON object on its stdout, `printed`; without one, from
    the last line of its stderr, `story`. shown: that was shown to the user."""
    try:
        value = parse_json(printed, "the planner's error")
        found: Reported = load_dataclass(Reported, value, "the planner's error")
        error = found.error
        smallest = error.smallest_budget_bytes
        return SubspecError(Exit(error.exit), error.message, error.hint, shown, smallest)
    except (SubspecError, ValueError):
        line = "see above" if shown else (story.splitlines() or [""])[-1][:300]
        return SubspecError(Exit.UNEXPECTED, f"subspec-plan ended with code {code}: {line}")


@dataclass(frozen=True)
class ErrorObject:
    code: str
    exit: int
    message: str
    hint: str
    smallest_budget_bytes: int | None = None


@dataclass(frozen=True)
class Reported:
    """The JSON object of a failed command with --json (docs/commands.md)."""

    schema: Literal["subspec.error/1"]
    error: ErrorObject
