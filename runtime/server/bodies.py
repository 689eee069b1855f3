"""A request's JSON body -> a checked object. Hostile: what is wrong with it is a 400 that names the
field, and never an exception of another kind."""

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.format.codec import parse_json
from subspec.runtime.server.errors import ApiError, invalid, unsupported

QUICK_BYTES = 16 << 10  # a smaller body is parsed at once, without a thread
LONGEST_SHOWN = 80  # characters of a value in a message

Body = TypeVar("Body", bound="Fields")


class Fields(BaseModel):
    """Fields of a request. Strict: true is no number, and "1" is none. Unknown fields are ignored,
    unless the server is told to refuse them."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


async def read_body(
    request: Request,
    kind: type[Body],
    refused: Mapping[str, tuple[Any, ...]],
    refuse_unknown: bool = False,
) -> Body:
    """The request's body as `kind`. refused: fields that are known and not honoured, with the
    values beside null that ask for nothing. Raises ApiError."""
    check_content_type(request)
    raw = await request.body()

    def checked() -> Body:
        value = parse_body(raw)
        refuse_fields(value, refused)
        if refuse_unknown:
            unknown = [key for key in value if key not in kind.model_fields and key not in refused]
            if unknown:
                name = shown(unknown[0])
                raise invalid(f"there is no field {name}", unknown[0], "unknown_field")
        return validated(kind, value)

    return checked() if len(raw) <= QUICK_BYTES else await asyncio.to_thread(checked)


def check_content_type(request: Request) -> None:
    """JSON alone: a page of another origin may send other types without asking first."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and "+json" in kind):
        raise ApiError(
            415,
            f"the content type is {shown(kind)}, expected application/json",
            code="unsupported_media_type",
        )


def parse_body(raw: bytes) -> dict[str, Any]:
    try:
        value = parse_json(raw, "the body")
    except SubspecError as error:
        raise invalid(error.message[:300], code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("the body is not a JSON object", code="invalid_json")
    return value


def refuse_fields(value: dict[str, Any], refused: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ApiError for the first field that asks for something that is not done."""
    for name, neutral in refused.items():
        got = value.get(name)
        if got is not None and not any(got == one and type(got) is type(one) for one in neutral):
            raise unsupported(f"{name} is {shown(got)}, which this server does not support", name)


def validated(kind: type[Body], value: dict[str, Any]) -> Body:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = field_name(first["loc"])
        if first["type"] == "missing":
            raise invalid(f"{param} is missing", param, "missing_required_parameter") from None
        message = first["msg"].removeprefix("Value error, ")
        raise invalid(f"{param} is {shown(first['input'])}: {message}", param) from None
    except RecursionError:
        raise invalid("the body is nested too deep", code="invalid_json") from None


def field_name(place: tuple[int | str, ...]) -> str:
    """("messages", 0, "content") -> messages[0].content"""
    name = ""
    for part in place:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and part == part.lower():  # not the name of one of several types
            name += f".{part}" if name else part
    return name or "the body"


def shown(value: object) -> str:
    """A value in a message, without control characters, cut off."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value[:LONGEST_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."
