"""Renders a chat template, which is untrusted code, in a child process with hard limits.

jinja2's sandbox keeps a template from running Python, but not from looping forever or building
gigabytes; a child can be stopped. This file is also the child's program, which imports jinja2 but
not torch. It takes about 60 ms.
"""

import json
import resource
import signal
import subprocess
import sys
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from subspec.artifacts.common.child import run_child
from subspec.artifacts.common.errors import Exit, SubspecError

CPU_SECONDS = 2
WALL_SECONDS = 60  # for an overloaded machine, where waiting takes no CPU seconds
MEMORY_BYTES = 512 << 20  # of address space; Python and jinja2 take 40 MB
LONGEST_TEXT = 4 << 20  # characters that a template may produce
LONGEST_MESSAGE = 500  # characters of a template's own error


def render(template: str, variables: dict[str, Any]) -> str:
    """Text of the rendered template. Raises SubspecError: USAGE if the template refuses the
    variables (raise_exception), CORRUPT if it fails, RESOURCES if no process can be started."""
    request = json.dumps({"template": template, "variables": variables})
    child = [sys.executable, "-P", __file__]  # -P: import nothing from this folder
    try:
        done = run_child(child, request.encode(), WALL_SECONDS)
    except subprocess.TimeoutExpired:
        raise _failed(f"it ran for more than {WALL_SECONDS} s") from None
    except OSError as error:
        raise SubspecError(
            Exit.RESOURCES, f"no process could be started: {error.strerror}", "close other programs"
        ) from None
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise _failed(f"it computed for more than {CPU_SECONDS} s")
    if done.returncode != 0:  # it was killed, or had no memory to start: a template cannot do that
        raise SubspecError(
            Exit.RESOURCES,
            f"the process that renders the chat template ended with {done.returncode}",
            "close other programs, or continue the PROMPT without the template: --raw",
        )
    reply: dict[str, str] = json.loads(done.stdout)
    if "refused" in reply:
        raise SubspecError(
            Exit.USAGE,
            f"the model's chat template refuses this: {reply['refused']}",
            "change the messages, or continue the text as it is with --raw",
        )
    if "failed" in reply:
        raise _failed(reply["failed"])
    return reply["text"]


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


def serve() -> None:
    """Read one request from stdin, write one reply to stdout."""
    limit(resource.RLIMIT_AS, MEMORY_BYTES)
    limit(resource.RLIMIT_CPU, CPU_SECONDS)
    request = json.load(sys.stdin.buffer)
    json.dump(reply_to(request["template"], request["variables"]), sys.stdout)


def limit(kind: int, most: int) -> None:
    """Limit this process to `most`, or to less if it was limited to less."""
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def reply_to(template: str, variables: dict[str, Any]) -> dict[str, str]:
    """Render with the functions and the jinja2 settings that transformers uses."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    pieces, length = [], 0
    try:
        for piece in environment.from_string(template).generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST_TEXT:
                return {"failed": f"it made more than {LONGEST_TEXT} characters"}
    except Refused as error:
        return {"refused": str(error)[:LONGEST_MESSAGE]}
    except MemoryError:
        return {"failed": f"it took more than {MEMORY_BYTES >> 20} MiB"}
    except Exception as error:  # a template may raise anything
        return {"failed": (str(error) or type(error).__name__)[:LONGEST_MESSAGE]}
    return {"text": "".join(pieces)}


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
    serve()
