"""Calls of the form call:name{key:value}, with strings between quotes that are one special token:
<|"|> (Gemma 4) or <escape> (FunctionGemma)."""

from collections.abc import Callable, Generator

from subspec.runtime.server.tools.calls import Calls
from subspec.runtime.server.tools.feed import Emit, Malformed, TextFeed, Wait
from subspec.runtime.server.tools.json_text import MAX_DEPTH, as_json, json_value, strict_json

MAX_NAME = 256
MAX_WORD = 4096  # of a number, true, false, null or a string without quotes


def gemma_call(feed: TextFeed, calls: Calls, quote: str) -> Wait:
    """Read one call. Raises Malformed."""
    yield from feed.expect("call:")
    name = yield from feed.word("{\n", MAX_NAME)
    yield from feed.begins("{")
    calls.start(name.strip())
    yield from members(feed, calls.arguments, quote, 1)
    calls.end()


def members(feed: TextFeed, emit: Emit, quote: str, depth: int) -> Wait:
    """Read {key:value,...} and return it as a JSON object."""

    def member() -> Wait:
        key = yield from member_name(feed, quote)
        emit(f"{as_json(key)}: ")
        yield from value(feed, emit, quote, depth)

    yield from separated(feed, emit, "{", "}", member)


def items(feed: TextFeed, emit: Emit, quote: str, depth: int) -> Wait:
    """Read [value,...] and return it as a JSON array."""
    yield from separated(feed, emit, "[", "]", lambda: value(feed, emit, quote, depth))


def separated(feed: TextFeed, emit: Emit, begin: str, end: str, one: Callable[[], Wait]) -> Wait:
    """Read a comma-separated list of `one` between `begin` and `end`."""
    yield from feed.expect(begin)
    emit(begin)
    separator = ""
    while True:
        yield from feed.skip_space()
        if (yield from feed.begins(end)) is not None:
            break
        if separator:
            emit(separator)
        separator = ", "
        yield from one()
        yield from feed.skip_space()
        if (yield from feed.begins(",")) is None:
            break
        feed.take(1)
    yield from feed.expect(end)
    emit(end)


def member_name(feed: TextFeed, quote: str) -> Generator[None, None, str]:
    """Read a key, bare or in either kind of quotes, and its colon."""
    mark = yield from feed.begins(quote, '"')
    if mark is None:
        key = (yield from feed.word(":{},", MAX_NAME)).strip()
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
    if depth > MAX_DEPTH:
        raise Malformed
    yield from feed.skip_space()
    kind = yield from feed.begins(quote, '"', "{", "[")
    if kind == quote:
        feed.take(len(quote))
        emit('"')
        found = yield from feed.until((quote,), lambda text: emit(as_json(text)[1:-1]))
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
        emit(json_of_word((yield from feed.word(",}]", MAX_WORD)).strip()))


def json_of_word(word: str) -> str:
    """JSON of a number, true, false or null; anything else becomes a string."""
    if word == "None":
        return "null"
    try:
        found = strict_json(word)
    except ValueError:
        found = word
    simple = found is None or isinstance(found, (bool, int, float))
    return as_json(found if simple else word)
