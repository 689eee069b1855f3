"""The server's log on stderr: one line an event, as text or JSON. It has no keys, no prompts and no
answers."""

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

from subspec.artifacts.common.command import printable, rewrites_lines

LogFormat = Literal["text", "json"]
MAX_PATH = 200  # characters
NAME = "subspec.server"
# How an event reads as text.
SENTENCES = {
    "listening": "listening on {address}",
    "loading": "loading {model}",
    "lossy": "{rule}: answers may differ from the exact model's",
    "ready": "ready on {address}: {model}, context {context}, {sequences} at once",
    "stopping": "stopping",
    "draining": "{running} running: {seconds:g} s to end; a second signal ends the process at once",
    "request": "{method} {path} {status} in {seconds:.3f} s, id {id}",
}


class LineFormatter(logging.Formatter):
    """A line of a record; one of an exception is followed by its traceback."""

    def __init__(self, form: LogFormat) -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        trace = self.formatException(record.exc_info) if record.exc_info else None
        fields = record.args if isinstance(record.args, dict) else {}
        message = record.msg if fields else record.getMessage()
        if self._form == "json":
            time = when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            found = {"time": time, "level": record.levelname.lower(), "message": message, **fields}
            return json.dumps(found | ({"traceback": trace} if trace else {}))
        said = SENTENCES[record.msg].format(**fields) if record.msg in SENTENCES else message
        line = printable(f"{when:%Y-%m-%dT%H:%M:%SZ} {said}")
        if rewrites_lines():  # the line may have begun with progress, or with the ^C of a key
            line = f"\r\033[K{line}"
        return f"{line}\n{trace}" if trace else line


def start_log(form: LogFormat) -> logging.Logger:
    """The server's logger; errors of uvicorn and asyncio go the same way."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(form))
    levels = {NAME: logging.INFO, "uvicorn": logging.ERROR, "asyncio": logging.ERROR}
    for name, level in levels.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    return logging.getLogger(NAME)


def request_log(logger: logging.Logger) -> Callable[[str, str, str, int, float], None]:
    """Logs a line for each request, but not for a supervisor's that succeed, nor for the two dozen
    files of the chat page."""

    def log(request_id: str, method: str, path: str, status: int, seconds: float) -> None:
        is_asked_often = path.startswith("/health") and status < 500
        if is_asked_often or (path.startswith("/page/") and status < 400):
            return
        logger.info(
            "request",
            {
                "method": method,
                "path": (path if path.isprintable() else ascii(path))[:MAX_PATH],
                "status": status,
                "seconds": round(seconds, 3),
                "id": request_id,
            },
        )

    return log
