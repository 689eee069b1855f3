"""Parse and validate JSON request bodies from untrusted clients: any error is a 400 that names the
field."""

import asyncio
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from starlette.requests import Request

from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.format.codec import parse_json
from subspec.runtime.server.errors import ApiError, invalid, unsupported
from subspec.runtime.server.tools.json_text import is_deeper

MAX_DEPTH = 500  # nested objects and lists
QUICK_BYTES = 16 << 10  # bytes; smaller bodies are parsed without a thread
MAX_SHOWN = 80  # characters of a value in a message
SHOULD_BE = re.compile(r"Input should be (.*)", re.DOTALL)
SHOULD_HAVE = re.compile(
    r"\w+ should have ((?:at least|at most) \d+ \w+)(?: after validation, not .*)?"
)

Body = TypeVar("Body", bound="Fields")


class Fields(BaseModel):
    """Fields of a request. Strict: true is not a number, nor is "1". null means absent. Unknown
    fields are ignored, or refused if the server is strict."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: item for name, item in value.items() if item is not None}


async def read_body(
    request: Request,
    kind: type[Body],
    refused: Mapping[str, tuple[Any, ...]],
    refuse_unknown: bool = False,
) -> Body:
    """Read the request's body as `kind`. refused: known unsupported fields, with the values besides
    null that have no effect. Raises ApiError."""
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
    """Allow JSON only: browsers send some other types cross-origin without a preflight request."""
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
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and is_deeper(value, MAX_DEPTH):
        # Responses repeat parts of it and are serialized with less stack left.
        raise invalid("the body is not valid JSON: nested too deep", code="invalid_json")
    return value


def refuse_fields(value: dict[str, Any], refused: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ApiError for the first unsupported field with an effect."""
    for name, neutral in refused.items():
        got = value.get(name)
        if got is not None and not any(got == one and type(got) is type(one) for one in neutral):
            raise unsupported(f"{name} is {shown(got)}, which this server does not support", name)


def validated(kind: type[Body], value: dict[str, Any]) -> Body:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        missing = first["type"] == "missing"
        param, is_form = field_name(first["loc"], value, missing)
        if missing:
            raise invalid(f"{param} is missing", param, "missing_required_parameter") from None
        reason = "it has none of the forms that it may have" if is_form else wanted(first["msg"])
        raise invalid(f"{param} is {shown(first['input'])}, {reason}", param) from None
    except RecursionError:
        raise invalid("the body is nested too deep", code="invalid_json") from None


def wanted(message: str) -> str:
    """pydantic's message, as the end of a sentence that begins with the field's name."""
    message = message.removeprefix("Value error, ")
    found = SHOULD_BE.fullmatch(message) or SHOULD_HAVE.fullmatch(message)
    if not found:
        return message
    bounds = {"greater than or equal to": "at least", "less than or equal to": "at most"}
    expected: str = found[1]
    for theirs, ours in bounds.items():
        expected = expected.replace(theirs, ours)
    return f"expected {expected}"


def field_name(place: tuple[int | str, ...], value: object, missing: bool) -> tuple[str, bool]:
    """("messages", 0, "content") -> messages[0].content. Variant names that pydantic adds for
    unions are left out; also returns whether the last part was one."""
    name, is_form = "", False
    for index, part in enumerate(place):
        is_form = False
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            name, value = f"{name}[{part}]", value[part]
        elif isinstance(value, dict) and part in value:
            name, value = f"{name}.{part}" if name else str(part), value[part]
        elif missing and index == len(place) - 1:
            name = f"{name}.{part}" if name else str(part)
        else:
            is_form = True
    return name or "the body", is_form


def shown(value: object) -> str:
    """A value for a message: control characters removed, shortened."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value[:MAX_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
