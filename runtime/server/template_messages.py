"""Convert messages in OpenAI's chat form to the form a chat template accepts."""

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.server.tools.json_text import arguments_object
from subspec.runtime.text.template_caps import TemplateCaps

ROLES = ("system", "developer", "user", "assistant", "tool")


def template_messages(
    messages: Sequence[dict[str, Any]], caps: TemplateCaps, short_ids: bool
) -> list[dict[str, Any]]:
    """Return messages in an order the template accepts, with text contents, calls' arguments as
    objects if supported, and results with their tools' names. short_ids: shorten call ids for
    Mistral's templates. Raises SubspecError(USAGE) for content that the template would drop."""
    for index, message in enumerate(messages):
        _check(message, f"messages[{index}]", caps)
    if not caps.supports_parallel_tool_calls:
        messages = _one_by_one(messages)
    if not caps.supports_user_after_result:
        messages = _said_in_results(messages)
    return [_message(message, caps, short_ids) for message in _named(messages)]


def _check(message: dict[str, Any], where: str, caps: TemplateCaps) -> None:
    role = message["role"]
    if role not in ROLES:
        expected = ", ".join(ROLES)
        raise SubspecError(Exit.USAGE, f"{where}.role is {role!r}, expected one of {expected}")
    if role in ("system", "developer") and not caps.supports_system_role:
        raise _no_place(f"{where} has the role system", "say it in the first user message")
    if (role == "tool" or message.get("tool_calls")) and not caps.supports_tool_calls:
        raise _no_place(f"{where} belongs to a tool call", "leave tool calls out")


def _one_by_one(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split a turn with several calls into one turn per call and result: Llama's templates reject
    several."""
    found, at = list[dict[str, Any]](), 0
    while at < len(messages):
        message, at = messages[at], at + 1
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            found.append(message)
            continue
        results = defaultdict[str, deque[dict[str, Any]]](deque)
        while at < len(messages) and messages[at]["role"] == "tool":
            results[messages[at].get("tool_call_id") or ""].append(messages[at])
            at += 1
        for call in calls:
            found.append({**message, "tool_calls": [call]})
            if own := results[call.get("id") or ""]:
                found.append(own.popleft())
            message = {"role": "assistant", "content": ""}
        found += [result for rest in results.values() for result in rest]
    return found


def _said_in_results(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Append a user's text that follows a call's result to that result: Mistral's templates require
    an assistant's turn in between."""
    found = list[dict[str, Any]]()
    for message in messages:
        if message["role"] == "user" and found and found[-1]["role"] == "tool":
            result = found.pop()
            texts = [one["content"] for one in (result, message) if one.get("content")]
            message = {**result, "content": "\n\n".join(texts)}
        found.append(message)
    return found


def _named(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Add their tools' names to results: FunctionGemma's template fails without."""
    names = dict[str, str]()
    for message in messages:
        calls = message.get("tool_calls") or []
        names |= {call["id"]: call["function"]["name"] for call in calls if call.get("id")}
        name = names.get(message.get("tool_call_id") or "")
        is_nameless = message["role"] == "tool" and message.get("name") is None
        yield {**message, "name": name} if name and is_nameless else message


def _message(message: dict[str, Any], caps: TemplateCaps, short_ids: bool) -> dict[str, Any]:
    role = "system" if message["role"] == "developer" else message["role"]
    changed = {**message, "role": role, "content": message.get("content") or ""}
    if message.get("tool_calls"):
        changed["tool_calls"] = [_call(one, caps, short_ids) for one in message["tool_calls"]]
    if short_ids and "tool_call_id" in message:
        changed["tool_call_id"] = _short(str(message["tool_call_id"]))
    return changed


def _call(call: dict[str, Any], caps: TemplateCaps, short_ids: bool) -> dict[str, Any]:
    function = call["function"]
    value = arguments_object(function["arguments"])
    given = value if caps.supports_object_arguments else json.dumps(value, ensure_ascii=False)
    changed = {**call, "function": {**function, "arguments": given}}
    if short_ids:
        changed["id"] = _short(str(call.get("id")))
    return changed


def _short(identifier: str) -> str:
    """Return a call id of nine letters or digits; ids of that form are kept."""
    if len(identifier) == 9 and identifier.isascii() and identifier.isalnum():
        return identifier
    return hashlib.sha256(identifier.encode(errors="replace")).hexdigest()[:9]


def _no_place(what: str, hint: str) -> SubspecError:
    message = f"{what}, for which the model's chat template has no place"
    return SubspecError(Exit.USAGE, message, hint)
