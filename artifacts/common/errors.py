"""Errors that a person can fix: one sentence, a hint, a documented exit code (docs/commands.md)."""

import enum
import errno
from collections.abc import Iterator
from contextlib import contextmanager

SHORTAGES = (
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
)  # of the system: no file's fault
DISK_FAILED = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ETIMEDOUT)  # or the network it is on
ASK_THE_KERNEL = "check the disk, or the network that it is on: dmesg says what happened"


class Exit(enum.IntEnum):
    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    INFEASIBLE = 3  # no plan fits the budget
    CORRUPT = 4  # artifact or checkpoint is damaged or hostile
    WRONG_MACHINE = 5  # artifact is valid but not for this machine
    RESOURCES = 6  # out of memory, disk or a lock at run time
    HUB = 7  # hub, network, gated, not in the cache
    UNSUPPORTED = 8  # architecture, feature or platform that subspec does not run
    HANGUP = 129  # the terminal was closed
    INTERRUPTED = 130
    TERMINATED = 143


class SubspecError(Exception):
    """`message` says what was got and what was expected; `hint` says what to do about it.
    is_printed: both are on stderr already, from a command that this one ran.
    smallest_budget_bytes: of INFEASIBLE, if a budget has a plan."""

    def __init__(
        self,
        exit_code: Exit,
        message: str,
        hint: str = "",
        is_printed: bool = False,
        smallest_budget_bytes: int | None = None,
    ) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.message = message
        self.hint = hint
        self.is_printed = is_printed
        self.smallest_budget_bytes = smallest_budget_bytes


def not_read(name: str, error: OSError) -> Exception:
    """Return the exception for a failed read of the file `name`, which does not prove that its
    content is damaged. An exhausted system resource stays one: a retry may succeed."""
    if error.errno in SHORTAGES:
        return error
    return SubspecError(Exit.RESOURCES, f"{name}: reading failed: {error.strerror}", ASK_THE_KERNEL)


@contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Prefix the messages of SubspecErrors raised in the block with `what`, since each of several
    checkpoints has a config.json."""
    try:
        yield
    except SubspecError as error:
        message = f"{what}: {error.message}"
        raise SubspecError(
            error.exit_code, message, error.hint, error.is_printed, error.smallest_budget_bytes
        ) from error
