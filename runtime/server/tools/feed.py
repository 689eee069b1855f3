"""Streamed model text, read by parsers that are generators: they yield whenever they need more.

A parser's result depends only on the text, not on how it was split.
"""

from collections.abc import Callable, Generator

Emit = Callable[[str], None]
Wait = Generator[None, None, None]
SPACE = " \t\r\n"


class Malformed(Exception):
    """Raised for text that the parser does not accept."""


class TextFeed:
    def __init__(self) -> None:
        self._text = ""
        self._at = 0  # of the next character
        self._kept_from: int | None = None
        self.ended = False

    def add(self, text: str) -> None:
        if self._kept_from is None:
            self._text, self._at = self._text[self._at :], 0
        self._text += text

    def keep(self) -> None:
        """Keep text taken from here on, so that it can be put back."""
        self._kept_from = self._at

    def forget(self) -> None:
        self._kept_from = None

    @property
    def kept(self) -> str:
        """Text taken since `keep`."""
        return self._text[self._kept_from : self._at]

    def put_back(self, count: int) -> None:
        """Put back the text taken since `keep`, except its first `count` characters."""
        assert self._kept_from is not None
        self._at = self._kept_from + count
        self._kept_from = None

    def seen(self, most: int) -> str:
        """Received text that is not taken yet, or its beginning."""
        return self._text[self._at : self._at + most]

    def take(self, count: int) -> str:
        taken = self._text[self._at : self._at + count]
        self._at += count
        return taken

    def peek(self, count: int, beyond: int = 0) -> Generator[None, None, str]:
        """Return the next characters, fewer only at the end. beyond: number of characters to
        skip."""
        while len(self._text) - self._at < beyond + count and not self.ended:
            yield
        return self._text[self._at + beyond : self._at + beyond + count]

    def begins(self, *wanted: str, beyond: int = 0) -> Generator[None, None, str | None]:
        """Return the longest of the wanted texts that comes next; None if none does."""
        longest = max(map(len, wanted))
        while True:
            seen = self._text[self._at + beyond : self._at + beyond + longest]
            if self.ended or not any(one.startswith(seen) and one != seen for one in wanted):
                found = [one for one in wanted if seen.startswith(one)]
                return max(found, key=len, default=None)
            yield

    def expect(self, *wanted: str) -> Generator[None, None, str]:
        """Take one of the wanted texts. Raises Malformed if none comes next."""
        found = yield from self.begins(*wanted)
        if found is None:
            raise Malformed
        return self.take(len(found))

    def length_of(self, characters: str, most: int = 1 << 62) -> Generator[None, None, int]:
        """Return how many of these characters come next, up to `most`."""
        count = 0
        while count < most:
            one = yield from self.peek(1, count)
            if not one or one not in characters:
                break
            count += 1
        return count

    def skip_space(self) -> Generator[None, None, str]:
        """Take white space and return it."""
        count = yield from self.length_of(SPACE)
        return self.take(count)

    def until(self, wanted: tuple[str, ...], emit: Emit) -> Generator[None, None, str | None]:
        """Take and emit the text before the first of the wanted texts, and return that one without
        taking it; None: the text has ended, and all of it is emitted."""
        while True:
            places = [(at, one) for one in wanted if (at := self._text.find(one, self._at)) >= 0]
            safe = len(self._text) - (0 if self.ended else self._overlap(wanted))
            if places:
                at, found = min(places, key=lambda place: (place[0], -len(place[1])))
                if at < safe:  # else an incomplete one may begin before it
                    if at > self._at:
                        emit(self.take(at - self._at))
                    return found
            elif safe > self._at:
                emit(self.take(safe - self._at))
            if self.ended:
                return None
            yield

    def _overlap(self, wanted: tuple[str, ...]) -> int:
        """Length of the longest suffix of the text that a wanted text begins with."""
        longest = min(max(map(len, wanted), default=1) - 1, len(self._text) - self._at)
        for count in range(longest, 0, -1):
            end = self._text[-count:]
            if any(one.startswith(end) for one in wanted):
                return count
        return 0

    def word(self, ends: str, most: int) -> Generator[None, None, str]:
        """Take the text before one of these characters, which is not taken. Raises Malformed if
        none comes within `most` characters."""
        for count in range(most + 1):
            one = yield from self.peek(1, count)
            if not one:
                break
            if one in ends:
                return self.take(count)
        raise Malformed
