"""Streaming detokenizer: token ids -> text as it becomes certain, up to a stop text."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from subspec.runtime.text.tokenizer import ChatTokenizer, special_tokens

INCOMPLETE = "\ufffd"  # text of bytes that are not a character, or not yet
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
MAX_WAITING = 64  # tokens whose text is not certain; a character has 4 bytes
MAX_BEFORE = 256  # last tokens of a prompt that are decoded together with the answer


class Decoder:
    """Streaming detokenizer: ids that follow `prompt`, one by one -> their text, in total
    decode(prompt + ids) without its prefix decode(prompt).

    The text of a token depends on its neighbours: a byte is a part of a character, and some
    decoders drop the first space. So tokens are decoded together with those before them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._ids = list(prompt[-MAX_BEFORE:])  # since a place where decoding can begin
        self._num_settled = len(self._ids)  # of them, whose text has all been returned
        self._num_given = len(self._decode())  # characters of their text that were returned
        self._in_bytes = False  # the last token is a byte
        self.waiting = ""  # whole characters that the next token may still change

    def feed(self, token: int) -> str:
        """Return the text that has become certain."""
        self._ids.append(token)
        if token not in self._special:  # which the tokenizer's decoder does not see
            piece = self._tokenizer.id_to_token(token) or ""
            self._in_bytes = BYTE_TOKEN.fullmatch(piece) is not None
        text = self._decode()
        if len(self._ids) - self._num_settled >= MAX_WAITING:
            return self._give(text, len(text))
        if self._in_bytes:  # if these are no characters in the end, each byte becomes U+FFFD
            return self._give(text, self._num_given)
        return self._give(text, len(text) - text.endswith(INCOMPLETE))

    def finish(self) -> str:
        """Return the remaining text, with an incomplete character as U+FFFD."""
        text = self._decode()
        return self._give(text, len(text))

    def _give(self, text: str, num_certain: int) -> str:
        fresh = text[self._num_given : num_certain]
        self._num_given = max(self._num_given, num_certain)
        self.waiting = text[self._num_given :].rstrip(INCOMPLETE)
        if fresh and num_certain == len(text):  # else decoding cannot begin here
            self._ids = self._ids[self._num_settled :]
            self._num_settled = len(self._ids)
            self._num_given = len(self._decode())
        return fresh

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text


@dataclass(frozen=True)
class Unstopped:
    """A section in which stop texts do not count: from `begin` to `end`; with an empty `begin` the
    text starts inside. leads: `begin` counts only after white space or nothing. follows: it counts
    only before one of these, after optional white space."""

    begin: str
    end: str
    leads: bool = False
    follows: tuple[str, ...] = ()


class StreamingDetokenizer:
    """Ids that follow `prompt` -> text up to a stop text. Untrusted: use `printable` before showing
    it on a terminal.

    Special tokens are not part of the text, except those in `shown`. A stop text may contain
    others: each is replaced by a mark, a surrogate, which no text contains.
    """

    def __init__(
        self,
        text: ChatTokenizer,
        stop: Sequence[str] = (),
        prompt: Sequence[int] = (),
        shown: frozenset[str] = frozenset(),
        unstopped: Sequence[Unstopped] = (),
    ) -> None:
        self._decoder = Decoder(text.tokenizer, prompt)
        special = special_tokens(text.tokenizer)
        self._shown = {token: content for token, content in special.items() if content in shown}
        by_length = sorted(set(special.values()) - shown, key=len, reverse=True)
        used = [content for content in by_length if any(content in s for s in stop)]
        marks = {content: chr(0xD800 + index) for index, content in enumerate(used)}
        self._mark_of = {token: marks[c] for token, c in special.items() if c in marks}
        self._stop = tuple(stop)
        self._marked_stop = {marked(s, marks): s for s in stop if marked(s, marks) not in stop}
        self._unstopped = tuple(one for one in unstopped if one.begin)
        self._within = next(
            (one.end for one in unstopped if not one.begin), None
        )  # end of the section that the text is in
        self._is_blank = True  # released text is only white space
        self._held = ""  # certain text with which a stop text could begin
        self._marks: list[tuple[int, str]] = []  # and their places after `text`
        self.text = ""
        self.stop_text: str | None = None  # the one that ended the text
        self.num_tokens = 0  # of the text, up to the token that completed a stop text

    @property
    def stopped(self) -> bool:
        return self.stop_text is not None

    def feed(self, ids: Sequence[int]) -> str:
        """Return the text that has become certain. After a stop text `stopped` is True."""
        fresh = ""
        for token in ids:
            if self.stopped:
                break
            self.num_tokens += 1
            if token in self._shown:
                self._held += self._decoder.finish() + self._shown[token]
            else:
                self._held += self._decoder.feed(token)
            seen = self._held + self._decoder.waiting
            if token in self._mark_of:
                self._marks.append((len(seen), self._mark_of[token]))
            fresh += self._release(seen, len(self._held))
        self.text += fresh
        return fresh

    def finish(self) -> str:
        """Return the text that was withheld because a stop text could have begun with it."""
        fresh = ""
        if not self.stopped:
            self._held += self._decoder.finish()
            fresh = self._release(self._held, len(self._held), ended=True) + self._held
            self._held = ""
        self.text += fresh
        return fresh

    def _release(self, seen: str, num_certain: int, ended: bool = False) -> str:
        """Return the part of `seen`, all text after `text`, with which no stop text can begin."""
        begin = 0  # what is before it is released
        while True:
            if self._within is not None:
                at = seen.find(self._within, begin, num_certain)
                if at < 0:
                    end = min(num_certain, len(seen) - overlap(seen[begin:], (self._within,)))
                    break
                begin, self._within = at + len(self._within), None
            stop_at, stop = self._find_stop(seen, begin)
            opened_at, opened, is_certain = self._find_opening(seen[:num_certain], begin, ended)
            if stop is not None and (opened is None or stop_at <= opened_at):
                self.stop_text = stop
                self._held = ""
                return seen[:stop_at]
            if opened is None or not is_certain:
                end = min(num_certain, self._end_of_safe(seen, begin))
                end = end if opened is None else min(end, opened_at)
                break
            begin, self._within = opened_at + len(opened.begin), opened.end
        self._held = seen[end:num_certain]
        self._marks = [(at - end, mark) for at, mark in self._marks if at >= end]
        self._is_blank = self._is_blank and not seen[:end].strip()
        return seen[:end]

    def _find_opening(
        self, seen: str, begin: int, ended: bool
    ) -> tuple[int, Unstopped | None, bool]:
        """The first section without stop texts after `begin`: its place, itself, and whether it is
        certain, which may depend on the text that follows."""
        found = list[tuple[int, Unstopped, bool]]()
        for one in self._unstopped:
            at = seen.find(one.begin, begin)
            while at >= 0 and (opens := self._opens(one, seen, at, ended)) is False:
                at = seen.find(one.begin, at + 1)
            if at >= 0:
                found.append((at, one, opens is True))
        return min(found, key=lambda place: place[0], default=(-1, None, True))

    def _opens(self, one: Unstopped, seen: str, at: int, ended: bool) -> bool | None:
        """Return True if the section begins at `at`, None if that depends on the text that
        follows."""
        if one.leads and not (self._is_blank and not seen[:at].strip()):
            return False
        rest = seen[at + len(one.begin) :].lstrip()
        if not one.follows or rest.startswith(one.follows):
            return True
        return None if not ended and any(text.startswith(rest) for text in one.follows) else False

    def _find_stop(self, seen: str, begin: int) -> tuple[int, str | None]:
        """The first stop text after `begin`: its place and itself."""
        at, stop = first_of(seen, self._stop, begin)
        with_marks, places = insert(seen, self._marks)
        start = bisect_left(places, begin)
        marked_at, with_mark = first_of(with_marks, tuple(self._marked_stop), start)
        if with_mark is not None and (stop is None or places[marked_at] < at):
            return places[marked_at], self._marked_stop[with_mark]
        return at, stop

    def _end_of_safe(self, seen: str, begin: int) -> int:
        """End of the text in which neither a stop text nor a section without them can have
        begun."""
        with_marks, places = insert(seen, self._marks)
        rest = with_marks[bisect_left(places, begin) :]
        return min(
            len(seen)
            - overlap(seen[begin:], (*self._stop, *(one.begin for one in self._unstopped))),
            places[len(with_marks) - overlap(rest, tuple(self._marked_stop))],
        )


def first_of(text: str, wanted: Sequence[str], begin: int = 0) -> tuple[int, str | None]:
    """The first of the `wanted` texts after `begin`: its place and itself, or -1 and None."""
    found = [(at, one) for one in wanted if (at := text.find(one, begin)) >= 0]
    return min(found, key=lambda place: place[0], default=(-1, None))


def marked(stop: str, marks: dict[str, str]) -> str:
    """A stop text with marks for the special tokens in it. marks: the longest tokens first."""
    for content, mark in marks.items():
        stop = stop.replace(content, mark)
    return stop


def insert(text: str, marks: Sequence[tuple[int, str]]) -> tuple[str, list[int]]:
    """Return `text` with marks before some of its characters, and the place in `text` of each
    character of the result, and of its end."""
    whole, places, begin = "", list[int](), 0
    for at, mark in marks:
        whole += text[begin:at] + mark
        places += [*range(begin, at), at]
        begin = at
    return whole + text[begin:], [*places, *range(begin, len(text) + 1)]


def overlap(text: str, stop: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a prefix of a stop text."""
    lengths = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    return max(lengths, default=0)
