"""Calls of the form <function=name><parameter=key>value</parameter></function> (Qwen3-Coder,
Qwen3.5).

Values are written without quotes; the tool's JSON schema gives their types.
"""

from collections.abc import Generator

from subspec.runtime.server.tools.calls import Calls, check_name
from subspec.runtime.server.tools.feed import SPACE, Emit, Malformed, TextFeed, Wait
from subspec.runtime.server.tools.json_text import as_json, strict_json
from subspec.runtime.server.tools.schema_types import alternatives, kinds_of, types_in

FUNCTION, PARAMETER = "<function=", "<parameter="
END_FUNCTION, END_PARAMETER, END_CALL = "</function>", "</parameter>", "</tool_call>"
MAX_NAME = 256
MAX_SPACE = 64  # after a value, before the next tag


def xml_call(feed: TextFeed, calls: Calls, must_be_offered: bool) -> Wait:
    """Read a call from <function= to </function>. must_be_offered: only offered tools count. Raises
    Malformed before the name is complete; after that, text that fits no parameter ends the call."""
    yield from feed.expect(FUNCTION)
    name = (yield from feed.word(">\n", MAX_NAME)).strip().strip("\"'")
    yield from feed.expect(">")
    check_name(name)
    if must_be_offered and name not in calls.parameters:
        raise Malformed
    calls.start(name)
    schema = calls.parameters.get(name, {})
    properties = schema.get("properties")
    separator = "{"
    while True:
        space = yield from feed.length_of(SPACE, MAX_SPACE)
        tag = yield from feed.begins(PARAMETER, END_FUNCTION, beyond=space)
        if tag == PARAMETER:
            feed.take(space + len(PARAMETER))
            key = yield from parameter_name(feed)
            calls.arguments(f"{separator}{as_json(key)}: ")
            separator = ", "
            known = properties.get(key) if isinstance(properties, dict) else None
            if not (yield from value(feed, calls, types_of(known, schema))):
                return  # the text has ended
            continue
        if tag == END_FUNCTION:
            feed.take(space + len(END_FUNCTION))
        elif feed.ended and not feed.seen(space + 1)[space:]:
            return
        calls.arguments("{}" if separator == "{" else "}")
        calls.end()
        return


def parameter_name(feed: TextFeed) -> Generator[None, None, str]:
    name = yield from feed.word(">\n", MAX_NAME)
    yield from feed.expect(">")
    return name.strip().strip("\"'")


def value(feed: TextFeed, calls: Calls, types: frozenset[str]) -> Generator[None, None, bool]:
    """Emit a value as JSON, streaming strings. Returns False if the text ends within it."""
    for newline in ("\r\n", "\n"):
        if (yield from feed.begins(newline)) is not None:
            feed.take(len(newline))
            break
    if types == {"string"}:
        text = StringPieces(calls)
        if not (yield from raw_value(feed, text.add)):
            return False
        text.end()
        return True
    pieces: list[str] = []
    if not (yield from raw_value(feed, pieces.append)):
        return False
    calls.arguments(typed("".join(pieces).removesuffix("\n").removesuffix("\r"), types))
    return True


class StringPieces:
    """Emits a JSON string in pieces, without the newline before the closing tag."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._held = ""
        calls.arguments('"')

    def add(self, text: str) -> None:
        text = self._held + text
        kept = text.removesuffix("\n").removesuffix("\r")
        self._held = text[len(kept) :]
        if kept:
            self._calls.arguments(as_json(kept)[1:-1])

    def end(self) -> None:
        self._calls.arguments('"')


def raw_value(feed: TextFeed, emit: Emit) -> Generator[None, None, bool]:
    """Take a value and its closing tag, which counts only if a tag follows, since a value may
    contain </parameter>. Returns False if the text ends first."""
    while (yield from feed.until((END_PARAMETER,), emit)) is not None:
        after = len(END_PARAMETER)
        space = 0
        while space < MAX_SPACE:
            one = yield from feed.peek(1, after + space)
            if not one or one not in SPACE:
                break
            space += 1
        tags = (PARAMETER, END_FUNCTION, END_CALL)
        found = yield from feed.begins(*tags, beyond=after + space)
        at_end = feed.ended and not feed.seen(after + space + 1)[after + space :]
        if found is not None or at_end:
            feed.take(after)
            return True
        emit(feed.take(after))
    return False


def types_of(schema: object, whole: object) -> frozenset[str]:
    """JSON types that a schema allows; empty: unrestricted. whole: the schema it is part of."""
    return frozenset[str]().union(*map(types_in, alternatives(schema, whole)))


def typed(text: str, types: frozenset[str]) -> str:
    """JSON of a value as one of these types, else as a string."""
    word = text.strip()
    if not types and word[:1] not in ("{", "["):
        return as_json(text)
    if word in ("None", "null") and (not types or "null" in types):
        return "null"
    if word.lower() in ("true", "false") and "boolean" in types:
        return word.lower()
    try:
        found = strict_json(word)
    except ValueError:
        return as_json(text)
    kinds = kinds_of(found) - {"string"}  # which is not written in quotes
    return as_json(found if kinds & (types or {"object", "array"}) else text)
