"""Shared by all command lines: sizes as options, errors as sentences and exit codes."""

import errno
import functools
import io
import json
import math
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import click

from subspec.artifacts.common.errors import (
    ASK_THE_KERNEL,
    DISK_FAILED,
    SHORTAGES,
    Exit,
    SubspecError,
)
from subspec.artifacts.common.signals import Terminated, raised_as_exceptions
from subspec.artifacts.common.sizes import parse_size

HINT = "\n\nhint: "  # between the sentence and the hint of a click error
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FILE_LIMITS = (("-n", resource.RLIMIT_NOFILE, 1),)  # flag of ulimit, its limit, and its unit
MEMORY_LIMITS = (("-v", resource.RLIMIT_AS, 1024), ("-u", resource.RLIMIT_NPROC, 1))
SHORTAGE = re.compile(
    "can't start new thread|[Cc]annot allocate memory|can't allocate memory|failed to map segment|"
    "not enough memory|bad_alloc|Too many open files|Resource temporarily unavailable"
)
# Escape sequences in untrusted text (model output, names in an artifact) must not reach a terminal:
# C0 except newline and tab, DEL, C1.
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """`text` without terminal control characters."""
    return text.translate(CONTROL)


def say(line: str) -> None:
    """Print a line for people on stderr; stdout is for data."""
    sys.stderr.write(printable(line) + "\n")


def rewrites_lines() -> bool:
    """Return True if stderr is a terminal that can overwrite a line; with TERM=dumb (an editor's
    shell) control characters would be shown."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


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


def finite_option(
    context: click.Context, parameter: click.Parameter, value: float | None
) -> float | None:
    """Callback: refuses nan, which click's ranges accept, and infinity."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a number{HINT}0.7 is one")
    return value


class Program(click.Command):
    """A command whose usage errors and --help, too, end as `reported` says."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        prepare_streams()
        reported(self._invoked)(given=given, as_json="--json" in given)

    def _invoked(self, given: list[str], as_json: bool) -> None:
        try:
            with self.make_context(self.name, given) as context:
                self.invoke(context)
        except click.exceptions.Exit:  # after --help and --version
            return
        except click.UsageError as error:
            message, _, hint = error.format_message().partition(HINT)
            if "unexpected extra argument" in message:
                hint = "text with spaces is one argument only in quotes"
            raise SubspecError(Exit.USAGE, message, hint or "--help lists the options") from None


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
            with signals_raised():
                command(**options)
                sys.stdout.flush()
        except SubspecError as error:
            fail(error, as_json)
        except KeyboardInterrupt:
            say("\ninterrupted")
            leave(Exit.INTERRUPTED)
        except Terminated as end:
            leave(Exit(end.exit_code))
        except BrokenPipeError:  # the reader of stdout went away: `subspec-run ... | head`
            discard(sys.stdout)
            leave(Exit.OK)
        except OutputError as error:
            discard(sys.stdout)
            fail(SubspecError(Exit.RESOURCES, f"cannot write: {error.strerror}"), as_json)
        except (MemoryError, OSError, ImportError, RuntimeError) as error:
            if (short := shortage(error)) is None:
                raise
            fail(short, as_json)

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


@contextmanager
def signals_raised() -> Iterator[None]:
    """`raised_as_exceptions` in the main thread, the only one that may set handlers; else
    nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with raised_as_exceptions():
        yield


class OutputError(OSError):
    """stdout cannot be written."""


class Output(io.FileIO):
    """stdout, whose errors are distinguishable from those of other files."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from None


class Story(io.FileIO):
    """stderr, whose write errors are ignored, so that they never decide how a command ends."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_streams() -> None:
    """Open /dev/null for a closed stdin, stdout or stderr, so that no other file gets its number;
    characters that the locale's encoding lacks are printed as ?. What cannot be written to stderr
    is lost; stdout's errors are OutputError and BrokenPipeError."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    # Python sets the stream of a closed descriptor to None.
    sys.stdin = sys.stdin or open(0, encoding="utf-8")
    if sys.stdout is sys.__stdout__:  # not those of a caller in this process
        sys.stdout = text_over(Output(1, "w", closefd=False), sys.stdout, "replace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = text_over(Story(2, "w", closefd=False), sys.stderr, "backslashreplace")


def text_over(raw: io.FileIO, before: TextIO | None, errors: str) -> io.TextIOWrapper:
    """A text stream over `raw` in place of `before`."""
    if not os.get_blocking(raw.fileno()):  # left so by another program of this terminal or pipe
        os.set_blocking(raw.fileno(), True)
    encoding = before.encoding if before is not None else "utf-8"
    # With PYTHONUNBUFFERED a stream is not buffered by line, but not at all.
    by_line = isinstance(before, io.TextIOWrapper) and (
        before.line_buffering or before.write_through
    )
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=by_line)


def discard(stream: TextIO) -> None:
    """Discard what is still buffered; else the interpreter would fail again when it flushes."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def shortage(error: Exception) -> SubspecError | None:
    """Return the error for an exhausted system resource or a failed disk; None for other errors.
    Recognized by message where libraries have no error type for it."""
    code = error.errno if isinstance(error, OSError) else None
    if code in DISK_IS_FULL:
        return SubspecError(Exit.RESOURCES, f"cannot write: {os.strerror(code)}")
    if code in DISK_FAILED:
        return SubspecError(Exit.RESOURCES, f"reading or writing failed: {error}", ASK_THE_KERNEL)
    if isinstance(error, MemoryError):
        what = "out of memory"
    elif code in SHORTAGES:
        what = os.strerror(code)
    elif (found := SHORTAGE.search(str(error))) is not None:
        what = found[0]
    else:
        return None
    files = code in (errno.EMFILE, errno.ENFILE) or "open files" in what
    kinds = FILE_LIMITS if files else MEMORY_LIMITS
    limits = [
        f"ulimit {flag} {most // unit}"
        for flag, kind, unit in kinds
        if (most := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY
    ]
    hint = "close other programs"
    hint += f", or raise what limits this process: {', '.join(limits)}" if limits else ""
    return SubspecError(Exit.RESOURCES, f"a system resource is exhausted: {what}", hint)


def fail(error: SubspecError, as_json: bool) -> NoReturn:
    if as_json:
        body = {
            "code": error.exit_code.name.lower(),
            "exit": int(error.exit_code),
            "message": error.message,
            "hint": error.hint,
        }
        if error.smallest_budget_bytes is not None:
            body["smallest_budget_bytes"] = error.smallest_budget_bytes
        sys.stdout.write(json.dumps({"schema": "subspec.error/1", "error": body}) + "\n")
    if not error.is_printed:
        say(f"error: {error.message}")
        if error.hint:
            say(f"\nhint: {error.hint}")
    leave(error.exit_code)


def leave(code: Exit) -> NoReturn:
    if code in (Exit.HANGUP, Exit.INTERRUPTED, Exit.TERMINATED):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the exit
    try:
        sys.stdout.flush()
    except OSError:
        discard(sys.stdout)
    sys.exit(int(code))
