"""JSON is followed while it comes: what is taken is what the json module would take."""

import json
import random
from typing import Any

import pytest

from subspec.runtime.server.tools.feed import Malformed, TextFeed
from subspec.runtime.server.tools.json_text import JsonScanner, json_text, strict_json

WORDS = (
    "0",
    "-1",
    "10",
    "2.5",
    "1e9",
    "-0.5E-3",
    "true",
    "false",
    "null",
    '""',
    '"é🙂"',
    '"\\n\\u00e9"',
)
JUNK = '{}[],:"\\ 0-+.eE1tfnu\n'


def some_json(chance: random.Random, depth: int = 0) -> str:
    kind = chance.choice(("word", "list", "object") if depth < 4 else ("word",))
    space = chance.choice(("", "", " ", "\n "))
    if kind == "word":
        return chance.choice(WORDS)
    items = [some_json(chance, depth + 1) for _ in range(chance.randint(0, 3))]
    if kind == "list":
        return f"[{space}" + f"{space},".join(items) + f"{space}]"
    return (
        "{" + f",{space}".join(f'"k{n}"{space}:{one}' for n, one in enumerate(items)) + space + "}"
    )


def scanned(text: str, cuts: tuple[int, ...] = ()) -> tuple[int, str, bool, bool]:
    """How many characters the scanner took, what it made of them, whether it is done or failed."""
    scanner, taken, out = JsonScanner(), 0, ""
    for begin, end in zip((0, *cuts), (*cuts, len(text)), strict=True):
        if not scanner.done and not scanner.failed:
            count, piece = scanner.scan(text[begin:end])
            taken, out = begin + count, out + piece
    return taken, out + scanner.take_held(), scanner.done, scanner.failed


def valid(text: str) -> bool:
    try:
        return isinstance(strict_json(text), dict | list)
    except ValueError:
        return False


def test_a_value_is_taken_to_its_end_and_no_further() -> None:
    chance = random.Random(1)
    for _ in range(500):
        value = f"[{some_json(chance)}]"
        text = value + chance.choice(("", "x", "}", " ]", ',"'))
        cuts = tuple(sorted(chance.sample(range(len(text)), min(len(text), 3))))
        assert scanned(text, cuts) == scanned(text) == (len(value), value, True, False)


def test_what_is_no_json_is_not_taken_for_it() -> None:
    chance = random.Random(2)
    for _ in range(3000):
        text = f"[{some_json(chance)}]"
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(text))
            text = text[:at] + chance.choice(JUNK) + text[at + chance.randint(0, 1) :]
        taken, out, done, failed = scanned(text)
        assert not (done and failed) and taken <= len(text)
        if done and out == text[:taken]:  # else a newline in a string was escaped
            strict_json(out)
        elif not done:
            assert not valid(text)


@pytest.mark.parametrize("text", ["[01]", "[1.]", "[.5]", "[+1]", "[-]", "[NaN]", "[tru]", "['a']"])
def test_words_that_json_does_not_know_fail(text: str) -> None:
    assert scanned(text)[3] and not valid(text)


def test_a_newline_in_a_string_is_escaped() -> None:
    taken, out, done, _ = scanned('{"a": "x\ny\t"}\n')
    assert done and taken == 13 and json.loads(out) == {"a": "x\ny\t"}


def test_depth_and_length_of_words_are_bounded() -> None:
    assert scanned("[" * 101)[3] and not scanned("[" * 100)[3]
    assert scanned("[" + "1" * 100)[3]
    with pytest.raises(ValueError):
        strict_json("[" * 100000)


def test_a_feed_gives_a_value_or_says_that_it_is_none() -> None:
    def read(text: str) -> Any:
        feed = TextFeed()
        feed.add(text)
        feed.ended = True
        reader = json_text(feed)
        while True:
            try:
                next(reader)
            except StopIteration as end:
                return end.value, feed.seen(100)

    assert read('{"a": [1, 2]} rest') == ('{"a": [1, 2]}', " rest")
    for text in ('{"a": [1, 2]', "x", ""):
        with pytest.raises(Malformed):
            read(text)
