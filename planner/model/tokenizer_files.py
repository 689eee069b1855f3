"""The tokenizer's files of a checkpoint folder: what the artifact copies; loads no tokenizer."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.tensors import open_regular
from subspec.planner.model.config import GENERATION_CONFIG
from subspec.planner.model.fields import Fields, read_fields

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
SENTENCEPIECE = "tokenizer.model"
# All that transformers reads a tokenizer from.
TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    CHAT_TEMPLATE,
    SENTENCEPIECE,
    "added_tokens.json",
    "special_tokens_map.json",
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")  # what templates refer to
LARGEST_TOKENIZER = 128 << 20  # the largest known has 35 MB
LARGEST_TEMPLATE = 1 << 20
LARGEST_TOKEN = 1_000  # characters


@dataclass(frozen=True)
class TokenizerFiles:
    tokenizer_json: Path
    chat_template: str | None  # a base model has none
    special_tokens: dict[str, str | None]
    add_bos_token: bool | None  # None: tokenizer.json's own post-processor decides
    generation_config: dict[str, Any]  # as in the file; empty where there is none


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Raises SubspecError: UNSUPPORTED without tokenizer.json, CORRUPT for what makes no sense."""
    path = folder / TOKENIZER
    if not path.exists():
        raise SubspecError(
            Exit.UNSUPPORTED,
            f"{folder} has no {TOKENIZER}, the only kind of tokenizer that we read",
            "make one with transformers: AutoTokenizer.from_pretrained(OLD).save_pretrained(NEW)",
        )
    _check_size(path, LARGEST_TOKENIZER)
    config = Fields(TOKENIZER_CONFIG, {})
    if (folder / TOKENIZER_CONFIG).exists():
        config = read_fields(folder / TOKENIZER_CONFIG)
    generation = {}
    if (folder / GENERATION_CONFIG).exists():
        generation = read_fields(folder / GENERATION_CONFIG).values
    add_bos_token = config.flag("add_bos_token", False) if config.has("add_bos_token") else None
    return TokenizerFiles(
        tokenizer_json=path,
        chat_template=_chat_template(folder, config),
        special_tokens={name: _special_token(config, name) for name in SPECIAL_TOKENS},
        add_bos_token=add_bos_token,
        generation_config=generation,
    )


def _chat_template(folder: Path, config: Fields) -> str | None:
    """The file, else tokenizer_config.json's string, or of its named templates the default."""
    path = folder / CHAT_TEMPLATE
    if path.exists():
        _check_size(path, LARGEST_TEMPLATE)
        with open_regular(path) as file:
            try:
                return file.read().decode("utf-8")
            except UnicodeDecodeError as error:
                raise SubspecError(Exit.CORRUPT, f"{CHAT_TEMPLATE} is not UTF-8: {error}") from None
    found = config.values.get("chat_template")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict)]
        defaults = [entry.get("template") for entry in named if entry.get("name") == "default"]
        found = defaults[0] if defaults else None
    if found is not None and (not isinstance(found, str) or len(found) > LARGEST_TEMPLATE):
        expected = f"a string, or a list of named ones, of at most {LARGEST_TEMPLATE} characters"
        raise config.wrong("chat_template", found, expected)
    return found


def _special_token(config: Fields, name: str) -> str | None:
    value = config.values.get(name)
    token = value.get("content") if isinstance(value, dict) else value
    if value is not None and (not isinstance(token, str) or len(token) > LARGEST_TOKEN):
        raise config.wrong(name, value, "a string, or an object with its content")
    return token


def _check_size(path: Path, largest: int) -> None:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
    if size > largest:
        raise SubspecError(Exit.CORRUPT, f"{path.name} is {size} bytes, expected at most {largest}")
