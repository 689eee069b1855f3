"""Text <-> token ids: chat template, tokenizer, streaming detokenizer."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.codec import load_dataclass, parse_json
from subspec.artifacts.format.tensors import open_regular
from subspec.runtime.text.chat_template import render

TOKENIZER = "tokenizer.json"
SETTINGS = "settings.json"
TEMPLATE = "chat_template.jinja"
KNOWN_SETTINGS = ("special_tokens", "begins_with_bos")
LARGEST_TOKENIZER = 128 << 20  # bytes; the largest known has 35 MB
LARGEST_TEMPLATE = 1 << 20
INCOMPLETE = "\ufffd"  # text of bytes that are not a character, or not yet
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
MOST_WAITING = 64  # tokens whose text is not certain; a character has 4 bytes
MOST_BEFORE = 256  # of a prompt's last tokens, with which an answer is decoded


@dataclass(frozen=True)
class Settings:
    """tokenizer/settings.json: special tokens for the template, and whether text begins with
    bos."""

    special_tokens: dict[str, str | None] = field(default_factory=dict)
    begins_with_bos: bool = False  # False: tokenizer.json's own post-processor decides


@dataclass(frozen=True)
class ChatTokenizer:
    """The artifact's tokenizer folder."""

    tokenizer: Tokenizer
    template: str | None
    special_tokens: dict[str, str | None]
    begins_with_bos: bool

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Messages -> ids, up to the beginning of the assistant's turn. Without a template the
        messages are joined as plain text. Raises SubspecError as `render` does."""
        if self.template is None:
            return self.plain_ids("\n\n".join(message["content"] for message in messages))
        return self._encode(self.render(messages), add_special_tokens=False)

    def plain_ids(self, text: str) -> list[int]:
        """Text -> ids, special tokens in it included, with one bos first if the model uses it."""
        ids = self._encode(text, add_special_tokens=True)
        bos = self.tokenizer.token_to_id(self.special_tokens.get("bos_token") or "")
        if bos is None:
            return ids
        if self.begins_with_bos and ids[:1] != [bos]:
            return [bos, *ids]
        return ids[1:] if ids[:2] == [bos, bos] else ids  # the text had one as well

    def check_known(self, ids: Sequence[int], vocab_size: int) -> None:
        """Raises SubspecError(USAGE) for a token that the model does not know: some tokenizers have
        more tokens than the embedding has rows."""
        if (token := next((one for one in ids if one >= vocab_size), None)) is not None:
            raise SubspecError(
                Exit.USAGE,
                f"the prompt has the token {self.tokenizer.id_to_token(token)!r}, id {token}, but "
                f"the model knows the ids below its vocab_size, {vocab_size}",
                "leave that text out: the model was not made for it",
            )

    def render(self, messages: list[dict[str, str]]) -> str:
        """Messages -> text. Raises SubspecError: USAGE if the template refuses them, CORRUPT if it
        fails."""
        safe = [{**m, "content": self._without_control_tokens(m["content"])} for m in messages]
        known = {name: token for name, token in self.special_tokens.items() if token is not None}
        variables = {"messages": safe, "tools": None, "documents": None, **known}
        return render(self.template or "", {**variables, "add_generation_prompt": True})

    def _without_control_tokens(self, content: str) -> str:
        """Split special tokens in a message by a zero-width space, so that they are tokenized as
        ordinary text and a user cannot forge turns."""
        for token in self.tokenizer.get_added_tokens_decoder().values():
            if token.special and len(token.content) > 1 and token.content in content:
                broken = token.content[0] + "\u200b" + token.content[1:]
                content = content.replace(token.content, broken)
        return content

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # tokenizers raises bare Exception
            raise SubspecError(
                Exit.CORRUPT, f"{TOKENIZER} cannot encode the text: {str(error)[:200]}"
            ) from None
        return ids


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """Load the folder tokenizer/ of an artifact. Raises SubspecError(CORRUPT)."""
    try:
        tokenizer = Tokenizer.from_buffer(_read(folder / TOKENIZER, LARGEST_TOKENIZER))
    except SubspecError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise SubspecError(
            Exit.CORRUPT, f"{TOKENIZER} cannot be read: {str(error)[:200]}"
        ) from None
    tokenizer.no_truncation()  # some files contain the settings of a training run
    tokenizer.no_padding()
    settings, template = Settings(), None
    if (folder / SETTINGS).exists():
        value = parse_json(_read(folder / SETTINGS, LARGEST_TEMPLATE), SETTINGS)
        if isinstance(value, dict):  # a newer minor format may have added keys
            value = {key: item for key, item in value.items() if key in KNOWN_SETTINGS}
        settings = load_dataclass(Settings, value, SETTINGS)
    if (folder / TEMPLATE).exists():
        try:
            template = _read(folder / TEMPLATE, LARGEST_TEMPLATE).decode("utf-8")
        except UnicodeDecodeError as error:
            raise SubspecError(Exit.CORRUPT, f"{TEMPLATE} is not UTF-8: {error}") from None
    return ChatTokenizer(tokenizer, template, settings.special_tokens, settings.begins_with_bos)


def _read(path: Path, most: int) -> bytes:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise SubspecError(
                Exit.CORRUPT, f"{path.name} is {size} bytes, expected at most {most}"
            )
        return file.read()


class Decoder:
    """Streaming detokenizer: ids that follow `prompt`, one by one -> their text, in total
    decode(prompt + ids) without decode(prompt), with which it begins.

    What a token says depends on its neighbours: a byte is a part of a character, and some decoders
    drop the first space. So tokens are decoded together with those before them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._ids = list(prompt[-MOST_BEFORE:])  # since a place where decoding can begin
        self._num_settled = len(self._ids)  # of them, when all of their text had been returned
        self._num_given = len(self._decode())  # characters of their text that were returned
        self._in_bytes = False  # the last token is a byte
        self.waiting = ""  # whole characters that the next token may still change

    def feed(self, token: int) -> str:
        """Text that has become certain."""
        self._ids.append(token)
        if token not in self._special:  # which the tokenizer's decoder does not see
            piece = self._tokenizer.id_to_token(token) or ""
            self._in_bytes = BYTE_TOKEN.fullmatch(piece) is not None
        text = self._decode()
        if len(self._ids) - self._num_settled >= MOST_WAITING:
            return self._give(text, len(text))
        if self._in_bytes:  # if these are no characters in the end, each byte becomes U+FFFD
            return self._give(text, self._num_given)
        return self._give(text, len(text) - text.endswith(INCOMPLETE))

    def finish(self) -> str:
        """The remaining text, with an incomplete character as U+FFFD."""
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


class StreamingDetokenizer:
    """Ids that follow `prompt` -> text up to a stop text. Untrusted: use `printable` before showing
    it on a terminal.

    A stop text may have special tokens in it, which are no part of the text: a mark stands for each
    of them where it was, a surrogate, which no text contains.
    """

    def __init__(
        self, text: ChatTokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        self._decoder = Decoder(text.tokenizer, prompt)
        special = special_tokens(text.tokenizer)
        by_length = sorted(set(special.values()), key=len, reverse=True)
        used = [content for content in by_length if any(content in s for s in stop)]
        marks = {content: chr(0xD800 + index) for index, content in enumerate(used)}
        self._mark_of = {token: marks[c] for token, c in special.items() if c in marks}
        self._stop = tuple(stop)
        self._marked_stop = tuple({marked(s, marks) for s in stop} - set(stop))
        self._held = ""  # certain, but a stop text could begin with it
        self._marks: list[tuple[int, str]] = []  # at which characters after those of `text`
        self.text = ""
        self.stopped = False
        self.num_tokens = 0  # of the text, up to the token that completed a stop text

    def feed(self, ids: Sequence[int]) -> str:
        """Text that has become certain. After a stop text `stopped` is True."""
        fresh = ""
        for token in ids:
            if self.stopped:
                break
            self.num_tokens += 1
            self._held += self._decoder.feed(token)
            seen = self._held + self._decoder.waiting
            if token in self._mark_of:
                self._marks.append((len(seen), self._mark_of[token]))
            fresh += self._release(seen, len(self._held))
        self.text += fresh
        return fresh

    def finish(self) -> str:
        """The text that was withheld because a stop text could have begun with it."""
        fresh = ""
        if not self.stopped:
            self._held += self._decoder.finish()
            fresh = self._release(self._held, len(self._held)) + self._held
            self._held = ""
        self.text += fresh
        return fresh

    def _release(self, seen: str, num_certain: int) -> str:
        """What no stop text can begin with, of `seen`, all that is known after `text`."""
        with_marks, places = insert(seen, self._marks)
        found = [at for s in self._stop if (at := seen.find(s)) >= 0]
        found += [places[at] for s in self._marked_stop if (at := with_marks.find(s)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return seen[: min(found)]
        end = min(
            num_certain,
            len(seen) - overlap(seen, self._stop),
            places[len(with_marks) - overlap(with_marks, self._marked_stop)],
        )
        self._held = seen[end:num_certain]
        self._marks = [(at - end, mark) for at, mark in self._marks if at >= end]
        return seen[:end]


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Those that decoding leaves out, by id."""
    added = tokenizer.get_added_tokens_decoder()
    return {token: one.content for token, one in added.items() if one.special}


def marked(stop: str, marks: dict[str, str]) -> str:
    """A stop text with marks for the special tokens in it, of which the longest come first."""
    for content, mark in marks.items():
        stop = stop.replace(content, mark)
    return stop


def insert(text: str, marks: Sequence[tuple[int, str]]) -> tuple[str, list[int]]:
    """`text` with marks before some of its characters, and the place in `text` of each character,
    and of the end, of that."""
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
