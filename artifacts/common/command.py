"""What both command lines share: sizes as options, errors as sentences and exit codes."""

import errno
import functools
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import click

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import parse_size

HINT = "\n\nhint: "  # between the sentence and the hint of a click error
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Escape sequences in untrusted text (model output, names in an artifact) must not reach a terminal:
# C0 except newline and tab, DEL, C1.
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """`text` without terminal control characters."""
    return text.translate(CONTROL)


def say(line: str) -> None:
    """Print a line for people on stderr; stdout is for data."""
    sys.stderr.write(printable(line) + "\n")


def size_option(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> int | None:
    """Callback of a SIZE option: text -> bytes."""
    if value is None:
        return None
    try:
        return parse_size(value)
    except SubspecError as error:
        raise click.BadParameter(f"{error.message}{HINT}{error.hint}") from None


class Program(click.Command):
    """A command whose usage errors look like its other errors: a sentence, a hint, exit code 2."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **settings: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        prepare_streams()
        try:
            return super().main(given, *rest, **{**settings, "standalone_mode": False})
        except click.UsageError as error:
            message, _, hint = error.format_message().partition(HINT)
            if "unexpected extra argument" in message:
                hint = "text with spaces is one argument only in quotes"
            fail(
                SubspecError(Exit.USAGE, message, hint or "--help lists the options"),
                as_json="--json" in given,
            )
        except click.Abort:
            leave(Exit.INTERRUPTED)


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Run a command; a SubspecError becomes one sentence on stderr and its exit code.

    With the option `as_json` the error is an object on stdout as well. Any other exception is a bug
    in subspec and keeps its traceback.
    """

    @functools.wraps(command)
    def run(**options: Any) -> None:
        as_json = bool(options.get("as_json"))
        try:
            check_platform(sys.platform)
            with terminable():
                command(**options)
                sys.stdout.flush()
        except SubspecError as error:
            fail(error, as_json)
        except MemoryError:
            fail(SubspecError(Exit.RESOURCES, "out of memory", "close other programs"), as_json)
        except KeyboardInterrupt:
            say("\ninterrupted")
            leave(Exit.INTERRUPTED)
        except Terminated:
            leave(Exit.TERMINATED)
        except BrokenPipeError:  # the reader of stdout went away: `subspec-run ... | head`
            discard(sys.stdout, sys.stderr)
            leave(Exit.OK)
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            discard(sys.stdout)
            fail(SubspecError(Exit.RESOURCES, f"cannot write: {error.strerror}"), as_json)

    return run


def check_platform(platform: str) -> None:
    """Raise SubspecError(UNSUPPORTED) unless this is Linux: direct reads and memory limits are
    Linux-specific."""
    if platform != "linux":
        raise SubspecError(
            Exit.UNSUPPORTED,
            f"subspec runs on Linux, and this is {platform}",
            "on Windows use WSL2",
        )


class Terminated(BaseException):
    """SIGTERM as an exception, as KeyboardInterrupt is SIGINT, so that resources are closed."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated inside the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def prepare_streams() -> None:
    """Open /dev/null for a closed stdin, stdout or stderr, so that no other file gets its number;
    characters that the locale's encoding lacks are printed as ?."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    # Python sets the stream of a closed descriptor to None.
    sys.stdin = sys.stdin or open(0, encoding="utf-8")
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def discard(*streams: TextIO) -> None:
    """Discard what is still buffered; else the interpreter would fail again when it flushes."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def fail(error: SubspecError, as_json: bool) -> NoReturn:
    if as_json:
        body = {
            "code": error.exit_code.name.lower(),
            "exit": int(error.exit_code),
            "message": error.message,
            "hint": error.hint,
        }
        sys.stdout.write(json.dumps({"schema": "subspec.error/1", "error": body}) + "\n")
    say(f"error: {error.message}")
    if error.hint:
        say(f"\nhint: {error.hint}")
    leave(error.exit_code)


def leave(code: Exit) -> NoReturn:
    if code in (Exit.INTERRUPTED, Exit.TERMINATED):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the exit
    try:
        sys.stdout.flush()
    except OSError:
        discard(sys.stdout)
    sys.exit(int(code))
