"""Text -> token ids: chat template and tokenizer. The way back is detokenizer.py."""

import os
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


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Those that decoding leaves out, by id."""
    added = tokenizer.get_added_tokens_decoder()
    return {token: one.content for token, one in added.items() if one.special}
