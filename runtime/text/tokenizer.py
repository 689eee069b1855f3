"""Text <-> token ids: chat template, tokenizer, streaming detokenizer."""

import os
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
MOST_INCOMPLETE = 16  # tokens; a character has 4 bytes, so after more it never completes


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
    """Streaming detokenizer: ids, one by one -> text in whole characters, in total that of all
    ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # since the last place where decoding can begin
        self._num_shown = 0  # of `_ids`, those whose text was returned
        self._shown = ""  # their text; the text of a token depends on those before it
        self._num_waiting = 0

    def feed(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode()
        self._num_waiting = self._num_waiting + 1 if text.endswith(INCOMPLETE) else 0
        return "" if 0 < self._num_waiting < MOST_INCOMPLETE else self._give(text)

    def finish(self) -> str:
        """The remaining text, with an incomplete character as U+FFFD."""
        return self._give(self._decode())

    def _give(self, text: str) -> str:
        fresh = text[len(self._shown) :]
        if fresh:  # else these are special tokens, and decoding cannot begin there
            self._ids = self._ids[self._num_shown :]
            self._num_shown = len(self._ids)
            self._shown = self._decode()
        return fresh

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text


class StreamingDetokenizer:
    """Ids -> text up to a stop string. Untrusted: use `printable` before showing it on a
    terminal."""

    def __init__(self, text: ChatTokenizer, stop: tuple[str, ...] = ()) -> None:
        self._decoder = Decoder(text.tokenizer)
        self._stop = stop
        self._held = ""
        self.text = ""
        self.stopped = False
        self.num_tokens = 0  # of the text, up to the token that completed a stop string

    def feed(self, ids: list[int]) -> str:
        """Text that has become certain. After a stop string `stopped` is True."""
        fresh = ""
        for token in ids:
            if self.stopped:
                break
            self.num_tokens += 1
            fresh += self._release(self._decoder.feed(token), final=False)
        self.text += fresh
        return fresh

    def finish(self) -> str:
        """The text that was withheld because a stop string could have begun with it."""
        fresh = "" if self.stopped else self._release(self._decoder.finish(), final=True)
        self.text += fresh
        return fresh

    def _release(self, decoded: str, final: bool) -> str:
        self._held += decoded
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        keep = 0 if final else self._possible_stop()
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return certain

    def _possible_stop(self) -> int:
        """Length of the longest suffix of the withheld text that is a prefix of a stop string."""
        lengths = [n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])]
        return max(lengths, default=0)
