"""Child processes that end with the process that waits for them."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

PATIENCE_SECONDS = 3.0  # between SIGTERM and SIGKILL


@contextmanager
def child_process(
    command: Sequence[str], shown: bool = False, environment: Mapping[str, str] | None = None
) -> "Iterator[subprocess.Popen[bytes]]":
    """A child with pipes, in a process group of its own: Ctrl-C reaches only its parent. An error
    in the block, or a signal, ends the whole group. shown: its stderr is this process's. Raises
    OSError if it cannot be started."""
    with start_child(command, shown, environment) as child:
        try:
            yield child
        except BaseException:
            end_group(child)
            raise


def start_child(
    command: Sequence[str], shown: bool = False, environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Like `child_process`, but the child outlives the block: the caller ends it, with `end_group`
    if it may not end by itself. environment: None: this process's."""
    pipe = subprocess.PIPE
    story = None if shown else pipe
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=story, process_group=0, env=environment
    )


def run_child(
    command: Sequence[str],
    given: bytes = b"",
    seconds: float | None = None,
    shown: bool = False,
    environment: Mapping[str, str] | None = None,
) -> "subprocess.CompletedProcess[bytes]":
    """Run a command to its end, with `given` on its stdin. shown: its stderr is this process's and
    not in the result. Raises OSError if it cannot be started, and after `seconds` TimeoutExpired,
    with what it had written."""
    with child_process(command, shown, environment) as child:
        try:
            out, story = child.communicate(given, seconds)
        except subprocess.TimeoutExpired as error:
            end_group(child)
            error.stdout, error.stderr = child.communicate()
            raise
    return subprocess.CompletedProcess(command, child.returncode, out, story)


def end_group(child: "subprocess.Popen[bytes]") -> None:
    """Send SIGTERM to the child's process group, and SIGKILL after PATIENCE_SECONDS."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE_SECONDS)
    kill_group(child)


def kill_group(child: "subprocess.Popen[bytes]") -> None:
    """Kill the child's process group, also if the child itself has ended."""
    with suppress(ProcessLookupError, PermissionError):  # none is left, or none of this user's
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        child.wait(PATIENCE_SECONDS)
