"""SIGINT (Ctrl-C), SIGTERM and SIGHUP, from a process's first moment to its last.

While a process starts and ends, a signal ends it at once (`end_at_once`). While its command runs,
it becomes an exception, which closes what is open (`raised_as_exceptions`). This is imported before
anything else.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RETRY_SECONDS = 0.05
PATIENCE_SECONDS = 3.0  # for what is being closed: a disk that has stopped answering holds it up
IMPORTER = "<frozen importlib._bootstrap>"
# An exception in these would lose a child that has been started, or print again what was printed.
WHOLE = ("Popen.__init__", "Output.write", "Story.write")

Handler = Callable[[int, FrameType | None], object]


class Terminated(BaseException):
    """SIGTERM or SIGHUP, as KeyboardInterrupt is SIGINT, so that resources are closed."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def end_at_once() -> None:
    """Install handlers that end the process with 128 + the signal's number."""

    def end(number: int, frame: FrameType | None) -> None:
        os._exit(128 + number)

    take(end)


@contextmanager
def raised_as_exceptions() -> Iterator[None]:
    """A signal in the block raises KeyboardInterrupt or Terminated, once. Another one that comes
    PATIENCE_SECONDS later ends the process, whatever is still being closed.

    Native code may drop an exception that is raised while it runs Python, or abort: none is raised
    during an import, and one that was dropped is raised again. While one closes resources, no other
    is raised.
    """
    arrived, since, over = 0, 0.0, False

    def arrive(number: int, frame: FrameType | None) -> None:
        nonlocal arrived, since
        if not arrived:
            arrived, since = number, time.monotonic()
        if time.monotonic() - since > PATIENCE_SECONDS:
            os._exit(128 + arrived)
        attempt(number, frame)

    def attempt(_: int, frame: FrameType | None) -> None:
        if over:  # everything is closed
            os._exit(128 + arrived)
        signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)
        if not (is_delicate(frame) or is_ending(sys.exception())):
            raise exception_of(arrived)

    told = sys.unraisablehook

    def tell(dropped: "sys.UnraisableHookArgs") -> None:
        if not is_ending(dropped.exc_value):  # one of ours is raised again: not reported
            told(dropped)

    sys.unraisablehook = tell
    before = {signal.SIGALRM: signal.signal(signal.SIGALRM, attempt), **take(arrive)}
    try:
        yield
        if arrived:  # it was dropped, and the block has ended since
            raise exception_of(arrived)
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = told
        for number, handler in before.items():
            signal.signal(number, handler)


def exception_of(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)


def take(handler: Handler) -> dict[signal.Signals, Any]:
    """Install `handler` for the signals, except those that are ignored: by nohup, or in a shell
    script's background job. Returns the previous handlers."""
    taken = [one for one in ENDING if signal.getsignal(one) != signal.SIG_IGN]
    return {one: signal.signal(one, handler) for one in taken}


def is_delicate(frame: FrameType | None) -> bool:
    """Return True if a signal interrupted an import or one of the functions WHOLE."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename == IMPORTER or code.co_qualname in WHOLE:
            return True
        frame = frame.f_back
    return False


def is_ending(error: BaseException | None) -> bool:
    """Return True if `error`, or an exception in its context chain, comes from a signal."""
    while error is not None and not isinstance(error, KeyboardInterrupt | Terminated):
        error = error.__context__
    return error is not None
