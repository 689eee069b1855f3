"""Calls as call:name{key:value}, where a string stands between quotes that are one special token:
<|"|> (Gemma 4) or <escape> (FunctionGemma).
"""

import json
from collections.abc import Generator

from subspec.runtime.server.tools.calls import Calls
from subspec.runtime.server.tools.feed import Emit, Malformed, TextFeed, Wait
from subspec.runtime.server.tools.json_text import DEEPEST, json_value, strict_json

LONGEST_NAME = 256
LONGEST_WORD = 4096  # of a number, true, false, null or a string without quotes


def gemma_call(feed: TextFeed, calls: Calls, quote: str) -> Wait:
    """Raises Malformed."""
    yield from feed.skip_space()
    yield from feed.expect("call:")
    name = yield from feed.word("{\n", LONGEST_NAME)
    yield from feed.begins("{")
    calls.start(name.strip())
    yield from members(feed, calls.arguments, quote, 1)
    calls.end()


def members(feed: TextFeed, emit: Emit, quote: str, depth: int) -> Wait:
    """{key:value,...} as a JSON object."""
    yield from feed.expect("{")
    emit("{")
    separator = ""
    while True:
        yield from feed.skip_space()
        if (yield from feed.begins("}")) is not None:
            break
        key = yield from member_name(feed, quote)
        emit(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        separator = ", "
        yield from value(feed, emit, quote, depth)
        yield from feed.skip_space()
        if (yield from feed.begins(",")) is None:
            break
        feed.take(1)
    yield from feed.expect("}")
    emit("}")


def member_name(feed: TextFeed, quote: str) -> Generator[None, None, str]:
    """A key: bare, or in either kind of quotes. Its colon is taken."""
    mark = yield from feed.begins(quote, '"')
    if mark is None:
        key = (yield from feed.word(":{},", LONGEST_NAME)).strip()
    else:
        feed.take(len(mark))
        pieces: list[str] = []
        if (yield from feed.until((mark,), pieces.append)) is None:
            raise Malformed
        feed.take(len(mark))
        key = "".join(pieces)
        yield from feed.skip_space()
    yield from feed.expect(":")
    return key


def value(feed: TextFeed, emit: Emit, quote: str, depth: int) -> Wait:
    if depth > DEEPEST:
        raise Malformed
    yield from feed.skip_space()
    kind = yield from feed.begins(quote, '"', "{", "[")
    if kind == quote:
        feed.take(len(quote))
        emit('"')
        found = yield from feed.until(
            (quote,), lambda text: emit(json.dumps(text, ensure_ascii=False)[1:-1])
        )
        if found is None:
            raise Malformed
        feed.take(len(quote))
        emit('"')
    elif kind == '"':
        yield from json_value(feed, emit)
    elif kind == "{":
        yield from members(feed, emit, quote, depth + 1)
    elif kind == "[":
        yield from items(feed, emit, quote, depth + 1)
    else:
        emit(as_json((yield from feed.word(",}]", LONGEST_WORD)).strip()))


def items(feed: TextFeed, emit: Emit, quote: str, depth: int) -> Wait:
    """[value,...] as a JSON array."""
    yield from feed.expect("[")
    emit("[")
    separator = ""
    while True:
        yield from feed.skip_space()
        if (yield from feed.begins("]")) is not None:
            break
        if separator:
            emit(separator)
        separator = ", "
        yield from value(feed, emit, quote, depth)
        yield from feed.skip_space()
        if (yield from feed.begins(",")) is None:
            break
        feed.take(1)
    yield from feed.expect("]")
    emit("]")


def as_json(word: str) -> str:
    """A number, true, false or null; anything else is a string."""
    if word == "None":
        return "null"
    try:
        found = strict_json(word)
    except ValueError:
        found = word
    simple = found is None or isinstance(found, (bool, int, float))
    return json.dumps(found if simple else word, ensure_ascii=False)
