"""Renders a chat template, which is untrusted code, in a child process with hard limits.

jinja2's sandbox keeps a template from running Python, but not from looping forever or building
gigabytes; a child can be stopped. This file is also the child's program, which imports jinja2 but
not torch. It starts in about 60 ms; one that renders many takes a few ms each.
"""

import json
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from subspec.artifacts.common.child import end_group, start_child
from subspec.artifacts.common.errors import Exit, SubspecError

CPU_SECONDS = 2  # for each render
WALL_SECONDS = 60  # for an overloaded machine, where waiting takes no CPU seconds
MEMORY_BYTES = 512 << 20  # of address space; Python and jinja2 take 40 MB
RETIRING_BYTES = 128 << 20  # a child that has taken as much serves no other render
MAX_TEXT = 4 << 20  # characters that a template may produce
MAX_MESSAGE = 500  # characters of a template's own error
CHILD = (sys.executable, "-P", __file__)  # -P: import nothing from this folder


class TemplateWorker:
    """A child that renders requests one after the other. The limits hold for each request; a child
    that was stopped is replaced. `render` is thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """Text of the rendered template. Raises SubspecError: USAGE if the template refuses the
        variables (raise_exception) or they are nested too deeply, CORRUPT if it fails, RESOURCES if
        no process can be started."""
        try:
            request = json.dumps({"template": template, "variables": variables}).encode()
        except RecursionError:
            raise SubspecError(Exit.USAGE, "the messages or tools are nested too deeply") from None
        with self._lock:
            reply = self._ask(request + b"\n")
        if "refused" in reply:
            raise SubspecError(
                Exit.USAGE,
                f"the model's chat template refuses this: {reply['refused']}",
                "change the messages, or continue the text as it is with --raw",
            )
        if "failed" in reply:
            raise _failed(reply["failed"])
        return reply["text"]

    def close(self) -> None:
        """End the child. A later `render` starts another one."""
        with self._lock:
            self._end_child()

    def __enter__(self) -> "TemplateWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: bytes) -> dict[str, str]:
        if self._child is not None and self._child.poll() is not None:
            self._end_child()
        if self._child is None:
            self._child = _started()
        child, late = self._child, threading.Event()

        def stop() -> None:
            late.set()
            end_group(child)

        timer = threading.Timer(WALL_SECONDS, stop)
        timer.start()
        try:
            line = _exchange(child, request)
        except BaseException:
            end_group(child)
            self._end_child()
            raise
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            status = child.wait()
            self._end_child()
            raise _stopped(status, late.is_set())
        reply: dict[str, str] = json.loads(line)
        if reply.pop("retires", None):
            self._end_child()
        return reply

    def _end_child(self) -> None:
        """Close the child's input, which ends it."""
        if self._child is not None:
            with self._child, suppress(BrokenPipeError):
                assert self._child.stdin is not None
                self._child.stdin.close()
            self._child = None


def render(template: str, variables: dict[str, Any]) -> str:
    """Render as `TemplateWorker.render`, in a child for this one request."""
    with TemplateWorker() as worker:
        return worker.render(template, variables)


def _started() -> "subprocess.Popen[bytes]":
    try:
        return start_child(CHILD)
    except OSError as error:
        raise SubspecError(
            Exit.RESOURCES, f"no process could be started: {error.strerror}", "close other programs"
        ) from None


def _exchange(child: "subprocess.Popen[bytes]", request: bytes) -> bytes:
    """Send a request and return the line of the reply, cut short if the child has ended."""
    assert child.stdin is not None and child.stdout is not None
    with suppress(BrokenPipeError):
        child.stdin.write(request)
        child.stdin.flush()
        return child.stdout.readline()
    return b""


def _stopped(status: int, is_late: bool) -> SubspecError:
    """The error for a child that ended without a reply."""
    if is_late:
        return _failed(f"it ran for more than {WALL_SECONDS} s")
    if status == -signal.SIGPROF:
        return _failed(f"it computed for more than {CPU_SECONDS} s")
    # It was killed, or had no memory to start: a template cannot do that.
    return SubspecError(
        Exit.RESOURCES,
        f"the process that renders the chat template ended with {status}",
        "close other programs, or continue the PROMPT without the template: --raw",
    )


def _failed(what: str) -> SubspecError:
    return SubspecError(
        Exit.CORRUPT,
        f"the model's chat template failed: {what}",
        "--raw continues the PROMPT without the template",
    )


# The child


class Refused(TemplateError):
    """The template called raise_exception."""


class GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}, a mark for training, is rendered as its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def serve(requests: BinaryIO) -> None:
    """Read one request from each line, write one reply on each line to stdout."""
    limit(resource.RLIMIT_AS, MEMORY_BYTES)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    for line in requests:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # counts CPU seconds
        reply: dict[str, Any] = reply_to(**json.loads(line))
        text = json.dumps({**reply, "retires": True} if is_worn() else reply)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(text, flush=True)


def is_worn() -> bool:
    """Return True if this process has taken so much memory that the next render could lack it. The
    peak in getrusage is no help: a child starts with its parent's."""
    try:
        status = Path("/proc/self/status").read_text("ascii", "replace")
    except OSError:  # not Linux
        return False
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return bool(peaks) and int(peaks[0]) << 10 > RETIRING_BYTES


def limit(kind: int, most: int) -> None:
    """Limit this process to `most`, or to less if it was limited to less."""
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def reply_to(template: str, variables: dict[str, Any]) -> dict[str, str]:
    """Render with the functions and the jinja2 settings that transformers uses."""
    pieces, length = [], 0
    try:
        for piece in compiled(template).generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_TEXT:
                return {"failed": f"it made more than {MAX_TEXT} characters"}
    except Refused as error:
        return {"refused": str(error)[:MAX_MESSAGE]}
    except MemoryError:
        return {"failed": f"it took more than {MEMORY_BYTES >> 20} MiB"}
    except Exception as error:  # a template may raise anything
        return {"failed": (str(error) or type(error).__name__)[:MAX_MESSAGE]}
    return {"text": "".join(pieces)}


@lru_cache(maxsize=2)
def compiled(template: str) -> Template:
    """Return the compiled template. It keeps no data of renders: a template cannot change its
    environment."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without escaping HTML, unlike jinja2's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(message: object) -> None:
    raise Refused(str(message))


if __name__ == "__main__":
    serve(sys.stdin.buffer)
