"""Errors as HTTP responses, in the format of each API."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.server.generation import PromptTooLong, QueueFull

# openai-python retries 408, 409, 429 and 5xx unless this says otherwise.
FINAL = {"x-should-retry": "false"}
RETRY_SECONDS = 5  # Retry-After while the server loads or shuts down
INTERNAL = "the server failed; its log says why"
MAX_MESSAGE = 1000  # characters
OF_A_COMMAND = re.compile(r"(?<!\S)--[a-z]|\bsubspec-[a-z]")
ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclass(eq=False)  # not frozen: Python writes to a raised exception
class ApiError(Exception):
    """An error for the client. kind: OpenAI's `type`. param: the invalid field."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | int | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A 400 that must not be retried."""
    return ApiError(400, message, code=code, param=param, headers=FINAL)


def unsupported(message: str, param: str) -> ApiError:
    """A 400 for a known field that is not supported."""
    return invalid(message, param, "unsupported_value")


def unavailable(message: str, code: str | int) -> ApiError:
    headers = {"retry-after": str(RETRY_SECONDS)}
    return ApiError(503, message, "unavailable_error", code, headers=headers)


def as_api_error(error: Exception) -> ApiError:
    """Convert `error` for the client. Details of bugs are not disclosed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        num = error.num_waiting
        waiting = "1 request is waiting" if num == 1 else f"{num} requests are waiting"
        headers = {"retry-after": str(error.retry_after_seconds), "x-queue-depth": str(num)}
        message = f"{waiting}: the queue is full"
        return ApiError(503, message, "overloaded_error", "queue_full", headers=headers)
    if isinstance(error, PromptTooLong):
        return too_long(error, "messages")
    if isinstance(error, SubspecError):
        message = said(error)
        if error.exit_code == Exit.USAGE:
            return invalid(message)
        if error.exit_code == Exit.UNSUPPORTED:
            return invalid(message, code="unsupported_value")
        if error.exit_code == Exit.CORRUPT:  # the model's template or tokenizer fails at this
            return invalid(message, code="template_failed")
        if error.exit_code == Exit.RESOURCES:
            return unavailable(message, "resources")
        return ApiError(500, message, "server_error", "internal_error")
    return ApiError(500, INTERNAL, "server_error", "internal_error")


def too_long(error: PromptTooLong, param: str) -> ApiError:
    """A 400 in the wording that OpenAI clients look for. param: the prompt's field."""
    message = (
        f"This model's maximum context length is {error.context} tokens, and the prompt has "
        f"{error.counted}: the answer needs room for at least one"
    )
    return invalid(message, param, "context_length_exceeded")


def engine_error(error: SubspecError) -> ApiError:
    """Convert an error raised while decoding. An error of the request itself, such as a grammar
    that cannot be continued, is reported as a 400."""
    if error.exit_code == Exit.USAGE:
        return as_api_error(error)
    return ApiError(500, said(error), "server_error", "engine_error")


def said(error: SubspecError) -> str:
    """The error's message as one sentence, without hints about command lines."""
    told = bool(error.hint) and not OF_A_COMMAND.search(error.hint)
    message = f"{error.message} ({error.hint})" if told else error.message
    return message[:MAX_MESSAGE]


def openai_body(error: ApiError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


def anthropic_body(error: ApiError) -> dict[str, Any]:
    kind = ANTHROPIC_KINDS.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The error's body in the format of the endpoint `path`."""
    return anthropic_body(error) if path.startswith("/v1/messages") else openai_body(error)


def error_response(error: ApiError, path: str) -> JSONResponse:
    return JSONResponse(error_body(error, path), error.status, dict(error.headers))
