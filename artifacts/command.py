"""What both command lines share: sizes as options, errors as sentences and exit codes."""

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.sizes import parse_size


def size_option(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> int | None:
    """Callback of a SIZE option: text -> bytes."""
    if value is None:
        return None
    try:
        return parse_size(value)
    except SubspecError as error:
        raise click.BadParameter(f"{error.message}\n\nhint: {error.hint}") from None


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Runs a command; a SubspecError becomes one sentence on stderr and its exit code.

    With `as_json` among the options the error is an object on stdout as well. Any other exception
    is a bug of ours and keeps its traceback.
    """

    @functools.wraps(command)
    def run(**options: Any) -> None:
        try:
            command(**options)
            sys.stdout.flush()
        except SubspecError as error:
            fail(error, bool(options.get("as_json")))
        except KeyboardInterrupt:
            sys.stderr.write("\ninterrupted\n")
            leave(Exit.INTERRUPTED)
        except BrokenPipeError:  # the reader of our stdout went away: `subspec-run ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            leave(Exit.OK)

    return run


def fail(error: SubspecError, as_json: bool) -> NoReturn:
    if as_json:
        body = {
            "code": error.exit_code.name.lower(),
            "exit": int(error.exit_code),
            "message": error.message,
            "hint": error.hint,
        }
        sys.stdout.write(json.dumps({"schema": "subspec.error/1", "error": body}) + "\n")
    sys.stderr.write(f"error: {error.message}\n")
    if error.hint:
        sys.stderr.write(f"\nhint: {error.hint}\n")
    leave(error.exit_code)


def leave(code: Exit) -> NoReturn:
    sys.stdout.flush()
    sys.exit(int(code))
