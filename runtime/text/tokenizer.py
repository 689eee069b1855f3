"""Text -> token ids: chat template and tokenizer. The way back is detokenizer.py."""

import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.codec import load_dataclass, parse_json
from subspec.artifacts.format.store import MAX_TOKENIZER
from subspec.artifacts.format.tensors import open_regular
from subspec.runtime.text.chat_template import render

TOKENIZER = "tokenizer.json"
SETTINGS = "settings.json"
TEMPLATE = "chat_template.jinja"
KNOWN_SETTINGS = ("special_tokens", "begins_with_bos")
MAX_TEMPLATE = 1 << 20
MAX_DEPTH = 100  # lists and objects within each other in what a template is given
MAX_COUNTED = 1 << 18  # tokens of a text that need not fit a context
QUICK_CHARACTERS = 8 << 10  # encoded in a few ms
MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # other added tokens are white space or words
# Tokens that a model writes within its turn: they forge none, and texts speak of them.
WITHIN_TURNS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
SEPARATOR = "\ud800"  # half a character, which texts do not have


@dataclass(frozen=True)
class Settings:
    """tokenizer/settings.json: special tokens for the template, and whether text begins with
    bos."""

    special_tokens: dict[str, str | None] = field(default_factory=dict)
    begins_with_bos: bool = False  # False: tokenizer.json's own post-processor decides


@dataclass(frozen=True)
class Conversation:
    """Input of a chat template. messages and tools: as in OpenAI's chat form, except that the
    arguments of tool calls are objects if the template takes objects. enable_thinking,
    reasoning_effort: None is the template's own default."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None


@dataclass(frozen=True)
class ChatTokenizer:
    """The artifact's tokenizer folder."""

    tokenizer: Tokenizer
    template: str | None
    special_tokens: dict[str, str | None]
    begins_with_bos: bool
    # Encodings of long texts take 100 times their size: one at a time.
    _long_texts: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Messages -> ids, up to the beginning of the assistant's turn. Without a template the
        messages are joined as plain text. Raises SubspecError as `render` does."""
        if self.template is None:
            return self.plain_ids("\n\n".join(message["content"] for message in messages))
        return self.rendered_ids(self.render(messages))

    def rendered_ids(self, text: str) -> list[int]:
        """Rendered chat template -> ids; special tokens only as in the text."""
        return self._encode(text, add_special_tokens=False)

    def plain_ids(self, text: str) -> list[int]:
        """Text -> ids, special tokens in it included, with one bos first if the model uses it."""
        ids = self._encode(text, add_special_tokens=True)
        bos = self.tokenizer.token_to_id(self.special_tokens.get("bos_token") or "")
        if bos is None:
            return ids
        if self.begins_with_bos and ids[:1] != [bos]:
            return [bos, *ids]
        return ids[1:] if ids[:2] == [bos, bos] else ids  # the text had one as well

    def is_longer(self, text: str, most: int) -> bool:
        """Return True if a text certainly has more than `most` tokens. It is encoded in pieces, so
        that the first ones of a hostile text are enough. The words at the ends of a piece may take
        more tokens than in the whole text, but the sum is less than twice as large."""
        count = 0
        if len(text) <= most:
            return False
        for begin in range(0, len(text), QUICK_CHARACTERS):
            piece = text[begin : begin + QUICK_CHARACTERS]
            count += len(self._encode(piece, add_special_tokens=False))
            if count > 2 * most:
                return True
        return False

    def check_known(self, ids: Sequence[int], vocab_size: int) -> None:
        """Raise SubspecError(USAGE) for a token that the model does not know: some tokenizers have
        more tokens than the embedding has rows."""
        if (token := next((one for one in ids if one >= vocab_size), None)) is not None:
            raise SubspecError(
                Exit.USAGE,
                f"the prompt has the token {self.tokenizer.id_to_token(token)!r}, id {token}, but "
                f"the model knows the ids below its vocab_size, {vocab_size}",
                "leave that text out: the model was not made for it",
            )

    def render(self, messages: list[dict[str, str]], enable_thinking: bool | None = None) -> str:
        """Messages -> text. Raises SubspecError: USAGE if the template refuses them, CORRUPT if it
        fails."""
        conversation = Conversation(messages, enable_thinking=enable_thinking)
        return render(self.template or "", self.template_variables(conversation))

    def template_variables(self, conversation: Conversation) -> dict[str, Any]:
        """Variables of the template, without control tokens in text that a person may have written:
        texts of all roles, calls and results, tools. Raises SubspecError(USAGE)."""
        given = {"messages": [*conversation.messages], "tools": [*conversation.tools] or None}
        chosen = {
            "enable_thinking": conversation.enable_thinking,
            "reasoning_effort": conversation.reasoning_effort,
        }
        optional = {**self.special_tokens, **chosen}
        known = {name: value for name, value in optional.items() if value is not None}
        safe = without_control_tokens(given, self._control_tokens)
        return {"documents": None, **known, **safe, "add_generation_prompt": True}

    @cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        """Special tokens, and others with which the template marks turns or results, as DeepSeek's
        <｜User｜> and Qwen3's </tool_response>."""
        special, template = special_tokens(self.tokenizer).values(), self.template or ""
        added = [one.content for one in self.tokenizer.get_added_tokens_decoder().values()]
        marks = [one for one in added if MARK.fullmatch(one) and one in template]
        marks = [one for one in marks if one not in WITHIN_TURNS]
        return tuple(one for one in dict.fromkeys((*special, *marks)) if len(one) > 1)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        check_characters(text)
        try:
            if len(text) <= QUICK_CHARACTERS:
                found = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
            else:  # in batches other threads of Python run meanwhile
                with self._long_texts:
                    (found,) = self.tokenizer.encode_batch_fast(
                        [text], add_special_tokens=add_special_tokens
                    )
            ids: list[int] = found.ids
        except Exception as error:  # tokenizers raises bare Exception
            raise SubspecError(
                Exit.CORRUPT, f"{TOKENIZER} cannot encode the text: {str(error)[:200]}"
            ) from None
        return ids


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """Load the folder tokenizer/ of an artifact. Raises SubspecError(CORRUPT)."""
    try:
        tokenizer = Tokenizer.from_buffer(_read(folder / TOKENIZER, MAX_TOKENIZER))
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
        value = parse_json(_read(folder / SETTINGS, MAX_TEMPLATE), SETTINGS)
        if isinstance(value, dict):  # a newer minor format may have added keys
            value = {key: item for key, item in value.items() if key in KNOWN_SETTINGS}
        settings = load_dataclass(Settings, value, SETTINGS)
    if (folder / TEMPLATE).exists():
        try:
            template = _read(folder / TEMPLATE, MAX_TEMPLATE).decode("utf-8")
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


def without_control_tokens(value: Any, control_tokens: Sequence[str]) -> Any:
    """Return the JSON value with special tokens in its texts and keys split by a zero-width space,
    so that they are tokenized as ordinary text and a user cannot forge turns. Raises SubspecError
    (USAGE) for half a surrogate pair, and for a value that is nested too deeply."""
    texts = [*texts_of(value)]
    check_characters("".join(texts))
    whole = SEPARATOR.join(texts)  # in one text: a client may send very many
    for token in control_tokens:
        if token in whole:
            whole = whole.replace(token, token[0] + "\u200b" + token[1:])
    return with_texts(value, iter(whole.split(SEPARATOR)))


def texts_of(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield the texts and keys in a JSON value, in order."""
    if depth > MAX_DEPTH:
        message = f"the messages or tools are nested more than {MAX_DEPTH} deep"
        raise SubspecError(Exit.USAGE, message, "send less deeply nested JSON")
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_of(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_of(item, depth + 1)


def with_texts(value: Any, texts: Iterator[str]) -> Any:
    """Return the value with other texts, in the order of `texts_of`."""
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, dict):
        return {next(texts): with_texts(item, texts) for item in value.values()}
    if isinstance(value, (list, tuple)):
        return [with_texts(item, texts) for item in value]
    return value


def check_characters(text: str) -> None:
    """Raise SubspecError(USAGE) for half a surrogate pair, which no tokenizer can encode."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(text[error.start]):04X}"
            message = f"cannot encode the text: it has {half}, half of a surrogate pair"
            raise SubspecError(Exit.USAGE, message, "send whole characters") from None


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Tokens that decoding leaves out, by id."""
    added = tokenizer.get_added_tokens_decoder()
    return {token: one.content for token, one in added.items() if one.special}
