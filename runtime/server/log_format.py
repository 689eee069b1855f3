"""The server's log on stderr: one line per event, as text or JSON, without keys, prompts or
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
    """Formats a record as one line, followed by the traceback of an exception."""

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
        if rewrites_lines():  # the line may hold progress, or ^C
            line = f"\r\033[K{line}"
        return f"{line}\n{trace}" if trace else line


def start_log(form: LogFormat) -> logging.Logger:
    """Return the server's logger. Errors of uvicorn and asyncio are logged the same way."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(form))
    levels = {NAME: logging.INFO, "uvicorn": logging.ERROR, "asyncio": logging.ERROR}
    for name, level in levels.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    return logging.getLogger(NAME)


def request_log(logger: logging.Logger) -> Callable[[str, str, str, int, float], None]:
    """Log a line per request, except successful health checks and the chat page's two dozen
    files."""

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
