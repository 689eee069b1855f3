"""Incremental scanner for one JSON value."""

import json
import math
import re
from collections.abc import Generator, Iterable
from typing import Any

from subspec.runtime.server.tools.feed import Emit, Malformed, TextFeed, Wait

MAX_DEPTH = 100  # nested objects and arrays
CHUNK = 4096  # characters scanned together
MAX_WORD = 64  # characters of a number
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
WORDS = ("true", "false", "null")
# Escapes in JSON; the second group matches unpaired surrogates, which are invalid in text.
HIGH, LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
HIGH_AT_END = re.compile(HIGH + "$")
ESCAPE = re.compile(rf"(\\[^u]|{HIGH}{LOW})|({HIGH}|{LOW})")


class JsonScanner:
    """Scans a value character by character until it is `done` or `failed`. Control characters in
    strings, which models write and JSON forbids, are escaped; unpaired surrogates become U+FFFD."""

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._open: list[str] = []  # brackets
        self._state = "value"
        self._word = ""
        self._digits = 0  # remaining digits of a \u escape
        self._held = ""  # a high surrogate, an incomplete escape, or both

    def scan(self, text: str) -> tuple[int, str]:
        """Return how many characters belong to the value, and their JSON."""
        out = list[str]()
        for at, one in enumerate(text):
            if self._state == "word" and not (one.isalnum() or one in "+-."):
                self._end_word()
                if self.done:  # only a top-level value ends so
                    return at, "".join(out)
            if not self.failed:
                self._step(one)
            if self.failed:
                return at, "".join(out)
            if self._state in ("string", "key string") and one < " ":
                one = f"\\u{ord(one):04x}"
            out.append(self._with_held(one))
            if self.done:
                return at + 1, "".join(out)
        return len(text), "".join(out)

    def take_held(self) -> str:
        """Return the withheld text before a failure or the end."""
        held, self._held = self._held, ""
        return without_halves(held)

    def _with_held(self, one: str) -> str:
        """Return the text that is complete after `one`."""
        begins_escape = self._state.endswith(" escape")
        if not (self._held or begins_escape):
            return one
        self._held += one
        if begins_escape or self._state.endswith(" digits"):
            return ""
        half = HIGH_AT_END.search(self._held)
        whole, self._held = (self._held[: half.start()], half[0]) if half else (self._held, "")
        return without_halves(whole)

    def _step(self, one: str) -> None:
        state = self._state
        if state in ("string", "key string"):
            if one == "\\":
                self._state = state + " escape"
            elif one == '"':
                self._end_value() if state == "string" else self._go("colon")
        elif state.endswith(" escape"):
            self._state = state.removesuffix(" escape")
            if one == "u":
                self._state, self._digits = self._state + " digits", 4
            elif one not in '"\\/bfnrt':
                self.failed = True
        elif state.endswith(" digits"):
            self._digits -= 1
            self.failed = one not in "0123456789abcdefABCDEF"
            if not self._digits:
                self._state = state.removesuffix(" digits")
        elif state == "word":
            self._word += one
            self.failed = len(self._word) > MAX_WORD
        elif one not in " \t\r\n":
            self._step_between(one)

    def _step_between(self, one: str) -> None:
        """Handle a character outside strings, numbers and names."""
        state = self._state
        if one in "}]" and self._open and one == {"{": "}", "[": "]"}[self._open[-1]]:
            self.failed = state not in ("comma", "first key" if one == "}" else "first value")
            self._open.pop()
            self._end_value()
        elif state == "comma" and one == ",":
            self._go("key" if self._open[-1] == "{" else "value")
        elif state == "colon" and one == ":":
            self._go("value")
        elif state in ("key", "first key") and one == '"':
            self._go("key string")
        elif state in ("value", "first value") and one == '"':
            self._go("string")
        elif state in ("value", "first value") and one in "{[":
            self._open.append(one)
            self._go("first key" if one == "{" else "first value")
            self.failed = len(self._open) > MAX_DEPTH
        elif state in ("value", "first value") and (one.isalnum() or one == "-"):
            self._word = one
            self._go("word")
        else:
            self.failed = True

    def _go(self, state: str) -> None:
        self._state = state

    def _end_word(self) -> None:
        self.failed = self._word not in WORDS and not NUMBER.fullmatch(self._word)
        self._end_value()

    def _end_value(self) -> None:
        self._state = "comma"
        self.done = not self._open and not self.failed


def json_value(feed: TextFeed, emit: Emit) -> Wait:
    """Take one JSON value and emit its text. Raises Malformed at the first invalid character, which
    is not taken."""
    scanner = JsonScanner()
    while not scanner.done:
        text = feed.seen(CHUNK)
        count, value = scanner.scan(text)
        feed.take(count)
        if value:
            emit(value)
        if scanner.failed or (feed.ended and not text):
            if held := scanner.take_held():
                emit(held)
            raise Malformed
        if not scanner.done and not feed.seen(1):
            yield


def json_text(feed: TextFeed) -> Generator[None, None, str]:
    """As `json_value`, but return the text."""
    pieces: list[str] = []
    yield from json_value(feed, pieces.append)
    return "".join(pieces)


def strict_json(text: str) -> Any:
    """Parse a complete JSON text; of duplicate keys the last counts. Raises ValueError, also for
    numbers that are not finite and for excessive nesting."""
    try:
        found = json.loads(without_halves(text), parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if is_deeper(found, MAX_DEPTH):
        raise ValueError("nested too deeply")
    return found


def arguments_object(arguments: str) -> dict[str, Any]:
    """Parse a call's arguments. Truncated ones, which are invalid JSON, are returned as text under
    a key of their own."""
    try:
        value = strict_json(arguments or "{}")
    except ValueError:
        return {"unfinished_arguments": arguments}
    return value if isinstance(value, dict) else {"arguments": value}


def is_deeper(value: Any, most: int) -> bool:
    """Return True if a JSON value nests more than `most` objects and arrays."""
    level = [value]
    for _ in range(most + 1):
        level = [one for some in level for one in _members(some)]
    return bool(level)


def as_json(value: Any) -> str:
    """Serialize a value of `strict_json`, or a text."""
    return json.dumps(value, ensure_ascii=False)


def without_halves(text: str) -> str:
    """Replace escapes of unpaired surrogates by U+FFFD."""
    return ESCAPE.sub(lambda found: found[1] or "\\ufffd", text)


def _finite(word: str) -> float:
    if not math.isfinite(value := float(word)):
        raise ValueError(f"{word} is not a number of JSON")
    return value


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
