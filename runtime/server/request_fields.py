"""Limits and field types shared by the Responses and Messages endpoints."""

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.server.chat_events import JSONValue
from subspec.runtime.server.errors import ApiError, invalid, unsupported

# Per request. The size of its body is limited before it is read (middleware.py).
MAX_ITEMS = 20_000  # messages, parts of one message
MAX_TOOLS = 1024
MAX_STOPS = 16
MAX_TOKENS = 1 << 30
MAX_NAME = 256
MAX_STOP = 1000

JSONObject = dict[str, JSONValue]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
Label = Annotated[str, Field(max_length=MAX_NAME)]
StopTexts = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP)]],
    Field(max_length=MAX_STOPS),
]
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Temperature = Annotated[float, Field(ge=0, le=100)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=0, le=MAX_TOKENS)]


def random_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


def as_parts(value: Any) -> Any:
    """Convert a string content to a list of one text part."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    return [] if value is None else value


def with_asked(defaults: SamplingParams, asked: Mapping[str, float | None]) -> SamplingParams:
    """Return `defaults` with the request's values. asked: values by field; None if absent."""
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return replace(defaults, **given)


def required(value: str | None, where: str) -> str:
    """Return the value. Raises ApiError if it is absent."""
    if value is None:
        raise missing(where)
    return value


def missing(where: str) -> ApiError:
    return invalid(f"{where} is missing", where, "missing_required_parameter")


def not_text(kind: str, where: str) -> ApiError:
    """The error for an image, a file or audio."""
    message = f"{where} is of the type {kind[:40]!r}; this model reads text"
    return unsupported(message, f"{where}.type")
