"""Model text as it comes, read by parsers that are generators: they yield whenever they need more.

What a parser finds depends on the text alone, not on the pieces in which it came.
"""

from collections.abc import Callable, Generator

Emit = Callable[[str], None]
Wait = Generator[None, None, None]
SPACE = " \t\r\n"


class Malformed(Exception):
    """The text is not what the parser reads."""


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
        """From here on text that has been taken can be put back."""
        self._kept_from = self._at

    def forget(self) -> None:
        self._kept_from = None

    @property
    def kept(self) -> str:
        """What has been taken since `keep`."""
        return self._text[self._kept_from : self._at]

    def put_back(self, count: int) -> None:
        """What has been taken since `keep`, except its first `count` characters, comes again."""
        assert self._kept_from is not None
        self._at = self._kept_from + count
        self._kept_from = None

    def seen(self, most: int) -> str:
        """What has come and is not taken, or the beginning of it."""
        return self._text[self._at : self._at + most]

    def take(self, count: int) -> str:
        taken = self._text[self._at : self._at + count]
        self._at += count
        return taken

    def peek(self, count: int, beyond: int = 0) -> Generator[None, None, str]:
        """The next characters, fewer only at the end. beyond: as many are skipped."""
        while len(self._text) - self._at < beyond + count and not self.ended:
            yield
        return self._text[self._at + beyond : self._at + beyond + count]

    def begins(self, *wanted: str, beyond: int = 0) -> Generator[None, None, str | None]:
        """Which of the wanted texts comes next, the longest of them, if one does."""
        longest = max(map(len, wanted))
        while True:
            seen = self._text[self._at + beyond : self._at + beyond + longest]
            if self.ended or not any(one.startswith(seen) and one != seen for one in wanted):
                found = [one for one in wanted if seen.startswith(one)]
                return max(found, key=len, default=None)
            yield

    def expect(self, *wanted: str) -> Generator[None, None, str]:
        """Takes one of the wanted texts. Raises Malformed if none comes next."""
        found = yield from self.begins(*wanted)
        if found is None:
            raise Malformed
        return self.take(len(found))

    def length_of(self, characters: str, most: int = 1 << 62) -> Generator[None, None, int]:
        """How many of these characters come next, up to `most`."""
        count = 0
        while count < most:
            one = yield from self.peek(1, count)
            if not one or one not in characters:
                break
            count += 1
        return count

    def skip_space(self) -> Generator[None, None, str]:
        """Takes white space, and returns it."""
        count = yield from self.length_of(SPACE)
        return self.take(count)

    def until(self, wanted: tuple[str, ...], emit: Emit) -> Generator[None, None, str | None]:
        """Takes and emits what comes before the first of the wanted texts, and returns that, which
        is not taken; None: the text has ended, and all of it is emitted."""
        while True:
            places = [(at, one) for one in wanted if (at := self._text.find(one, self._at)) >= 0]
            safe = len(self._text) - (0 if self.ended else self._overlap(wanted))
            if places:
                at, found = min(places, key=lambda place: (place[0], -len(place[1])))
                if at < safe:  # else one that is not complete yet may begin before it
                    if at > self._at:
                        emit(self.take(at - self._at))
                    return found
            elif safe > self._at:
                emit(self.take(safe - self._at))
            if self.ended:
                return None
            yield

    def _overlap(self, wanted: tuple[str, ...]) -> int:
        """Length of the longest end of what has come that a wanted text begins with."""
        longest = min(max(map(len, wanted), default=1) - 1, len(self._text) - self._at)
        for count in range(longest, 0, -1):
            end = self._text[-count:]
            if any(one.startswith(end) for one in wanted):
                return count
        return 0

    def word(self, ends: str, most: int) -> Generator[None, None, str]:
        """Takes what comes before one of these characters, which is not taken. Raises Malformed
        if none comes within `most` characters."""
        for count in range(most + 1):
            one = yield from self.peek(1, count)
            if not one:
                break
            if one in ends:
                return self.take(count)
        raise Malformed
