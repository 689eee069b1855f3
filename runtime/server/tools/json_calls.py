"""Calls as JSON, {"name": ..., "arguments": {...}}: Qwen, Hermes, Llama, Mistral."""

from collections.abc import Generator
from typing import Any

from subspec.runtime.server.tools.calls import Calls, check_name
from subspec.runtime.server.tools.feed import Malformed, TextFeed, Wait
from subspec.runtime.server.tools.json_text import as_json, json_text, json_value, strict_json

ARGUMENTS = ("arguments", "parameters")
KEYS = ("name", "id", "type", "function", *ARGUMENTS)
FENCES = ("```json", "```tool_code", "```tool_call", "```")
MAX_KEY = 256


def json_calls(feed: TextFeed, calls: Calls, must_be_offered: bool = False) -> Wait:
    """Read one call or a list of them. must_be_offered: only offered tools count. Raises
    Malformed."""
    if (yield from feed.begins("[")) is None:
        yield from json_call(feed, calls, must_be_offered)
        return
    feed.take(1)
    yield from feed.skip_space()
    yield from json_call(feed, calls, must_be_offered)
    while True:
        yield from feed.skip_space()
        if (yield from feed.expect(",", "]")) == "]":
            return
        yield from feed.skip_space()
        yield from json_call(feed, calls, must_be_offered)


def json_call(feed: TextFeed, calls: Calls, must_be_offered: bool) -> Wait:
    """Read a call. Its arguments are streamed if the name comes first."""
    found: dict[str, Any] = {}
    started = False
    yield from feed.expect("{")
    while True:
        yield from feed.skip_space()
        key = yield from read_key(feed)
        if key not in KEYS:
            raise Malformed
        yield from feed.skip_space()
        yield from feed.expect(":")
        yield from feed.skip_space()
        is_object = (yield from feed.begins("{")) is not None
        if key in ARGUMENTS and is_object and "name" in found and not started:
            calls.start(found["name"])
            started = True
            yield from json_value(feed, calls.arguments)
            calls.end()
        else:
            found[key] = value_of((yield from json_text(feed)))
        if key == "name":
            check_call(found["name"], calls, must_be_offered)
        yield from feed.skip_space()
        if (yield from feed.expect(",", "}")) == "}":
            break
    if not started:
        start_whole(found, calls, must_be_offered)


def read_key(feed: TextFeed) -> Generator[None, None, str]:
    yield from feed.expect('"')
    key = yield from feed.word('"\\', MAX_KEY)
    yield from feed.expect('"')
    return key


def check_call(name: object, calls: Calls, must_be_offered: bool) -> None:
    if not isinstance(name, str) or (must_be_offered and name not in calls.parameters):
        raise Malformed
    check_name(name)


def start_whole(found: dict[str, Any], calls: Calls, must_be_offered: bool) -> None:
    """Emit a call whose arguments came before its name, as a string, within "function", or not at
    all."""
    if isinstance(found.get("function"), dict):
        found = found["function"]
    name = found.get("name")
    check_call(name, calls, must_be_offered)
    given = next((found[key] for key in ARGUMENTS if key in found), None)
    if isinstance(given, str) and given.strip():
        given = value_of(given)
    if given is not None and given != "" and not isinstance(given, dict):
        raise Malformed
    calls.start(str(name))
    calls.arguments(as_json(given or {}))
    calls.end()


def value_of(text: str) -> Any:
    """Parse JSON. Raises Malformed if it is invalid."""
    try:
        return strict_json(text)
    except ValueError:
        raise Malformed from None


def mistral_calls(feed: TextFeed, calls: Calls) -> Wait:
    """Read calls after [TOOL_CALLS]: a list of JSON calls, or a name, optionally [CALL_ID] and an
    id, optionally [ARGS], and the arguments."""
    yield from feed.skip_space()
    if (yield from feed.begins("[", "{")) is not None:
        yield from json_calls(feed, calls)
        return
    name = yield from feed.word("[{", MAX_KEY)
    if (yield from feed.begins("[CALL_ID]")) is not None:
        feed.take(len("[CALL_ID]"))
        yield from feed.word("[{", MAX_KEY)
    if (yield from feed.begins("[ARGS]")) is not None:
        feed.take(len("[ARGS]"))
    yield from feed.skip_space()
    if (yield from feed.begins("{")) is None:
        raise Malformed
    calls.start(name.strip())
    yield from json_value(feed, calls.arguments)
    calls.end()


def bare_calls(feed: TextFeed, calls: Calls) -> Wait:
    """Read JSON calls of offered tools without marks, optionally in a code fence and separated by
    white space, ";" or ","."""
    fence = yield from feed.begins(*FENCES)
    if fence is not None:
        feed.take(len(fence))
    yield from feed.skip_space()
    if (yield from feed.begins("{", "[")) is None:
        raise Malformed
    yield from json_calls(feed, calls, must_be_offered=True)
    if fence is not None:
        space = yield from feed.length_of(" \r\n", 64)
        if (yield from feed.begins("```", beyond=space)) is not None:
            feed.take(space + len("```"))
