"""A checkpoint's tokenizer, made by transformers and written in the form that the runtime reads.

Added and special tokens are spread over four files, and which of them wins is transformers' rule:
its tokenizer is made once, here, and written as a whole.
"""

import json
import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.tensors import open_regular
from subspec.planner.model.checkpoint import Checkpoint
from subspec.planner.model.config import CONFIG, load_config
from subspec.planner.model.fields import Fields, read_fields, refuse_stand_in
from subspec.planner.model.generation import generation_notes, read_generation
from subspec.planner.model.library import reading

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
SENTENCEPIECE = "tokenizer.model"
TEKKEN = "tekken.json"  # Mistral's own; not read
ADDED_TOKENS = "added_tokens.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
MORE_TEMPLATES = "additional_chat_templates"  # a folder
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")  # what templates refer to
# Families whose tokenizer may be Tekken, and a token that is in every Tekken.
MAY_BE_TEKKEN, OF_TEKKEN = ("mistral", "ministral", "ministral3"), "[INST]"
MAX_TOKENIZER = 128 << 20  # the largest known has 35 MB
MAX_TEMPLATE = 1 << 20
MAX_TOKEN = 1_000  # characters
SPLIT_AS_TEKKEN = (
    f"{TOKENIZER} splits text by a regex that is not Tekken's, which transformers calls incorrect: "
    "text is split as Tekken does, as transformers does with fix_mistral_regex=True"
)


@dataclass(frozen=True)
class TokenizerFiles:
    tokenizer_json: str
    chat_template: str | None  # a base model has none
    special_tokens: dict[str, str | None]
    begins_with_bos: bool
    end_token: int | None  # the id of eos_token
    generation_config: dict[str, Any]  # see read_generation()
    notes: tuple[str, ...] = ()  # for the user


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read a checkpoint's tokenizer through transformers. Raises SubspecError: UNSUPPORTED for one
    that cannot be converted here, CORRUPT for invalid content."""
    _check_files(folder)
    generation = read_generation(folder)
    config = load_config(read_fields(folder / CONFIG))
    split: tuple[str, ...] = ()
    with reading(f"the tokenizer in {folder}"):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # The model type's own class would put its usual splitting of text in the file's place.
        has_file = (folder / TOKENIZER).exists()
        kind = PreTrainedTokenizerFast if has_file else AutoTokenizer
        given = {"config": config, "trust_remote_code": False, "local_files_only": True}
        tokenizer = kind.from_pretrained(folder, **given)
        if has_file and config.model_type in MAY_BE_TEKKEN and _splits_bytes(tokenizer):
            fixed = kind.from_pretrained(folder, **given, fix_mistral_regex=True)
            if _pre_tokenizer(fixed) != _pre_tokenizer(tokenizer):
                tokenizer, split = fixed, (SPLIT_AS_TEKKEN,)
        if not tokenizer.is_fast:
            raise SubspecError(
                Exit.UNSUPPORTED,
                f"{folder}: {type(tokenizer).__name__} cannot be written as {TOKENIZER}",
            )
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # some files carry the settings of a training run
        backend.no_padding()
        text = backend.to_str()
        first = tokenizer("a")["input_ids"][:1]
        templates = tokenizer.chat_template
        beyond = _tokens_beyond(tokenizer.get_vocab(), config.vocab_size)
    template = _one_template(templates) if isinstance(templates, dict) else templates
    known = {name: None for name in SPECIAL_TOKENS} | tokenizer.special_tokens_map
    bos = tokenizer.bos_token_id
    return TokenizerFiles(
        tokenizer_json=_bounded(text, MAX_TOKENIZER, TOKENIZER),
        chat_template=_bounded(template, MAX_TEMPLATE, CHAT_TEMPLATE) if template else None,
        special_tokens={name: token and str(token) for name, token in known.items()},
        begins_with_bos=bos is not None and first == [bos],
        end_token=tokenizer.eos_token_id,
        generation_config=generation,
        notes=(*split, *beyond, *generation_notes(generation)),
    )


def with_end_of_turn(checkpoint: Checkpoint, tokenizer: TokenizerFiles) -> Checkpoint:
    """Add the tokenizer's eos_token to the end tokens of a model for conversations: some configs
    name only the end of a document, and answers would go on into the next turn."""
    spec, end = checkpoint.spec, tokenizer.end_token
    if end is None or tokenizer.chat_template is None:
        return checkpoint
    if end in spec.eos_token_ids or end >= spec.vocab_size:
        return checkpoint
    name = str(tokenizer.special_tokens["eos_token"])[:40]
    note = (
        f"{name!r}, the tokenizer's eos_token (id {end}), ends answers, too, although the model's "
        "configs do not say so: transformers' generate() would go on behind it"
    )
    ends = replace(spec, eos_token_ids=(*spec.eos_token_ids, end))
    return replace(checkpoint, spec=ends, notes=(*checkpoint.notes, note))


def _pre_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """The pre-tokenizer, which splits text before the merges."""
    return json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}


def _splits_bytes(tokenizer: Any) -> bool:
    """Return True if it can be Tekken. transformers would change any large vocabulary of a Mistral,
    also one of SentencePiece, which breaks it."""
    if OF_TEKKEN not in tokenizer.get_vocab():
        return False
    parts = _pre_tokenizer(tokenizer).get("pretokenizers", ())
    return [part["type"] for part in parts] == ["Split", "ByteLevel"]


def _one_template(templates: dict[str, str]) -> str | None:
    """The default template, combined with the one for tools if there is one, as transformers
    chooses."""
    default, with_tools = templates.get("default"), templates.get("tool_use")
    if not default or not with_tools:
        return default
    # What each of them renders stays the same: the newline behind `if` and `else` is dropped, the
    # `+` keeps white space before a tag, and at a template's end jinja2 drops a newline.
    first, second = (text.removesuffix("\n").removesuffix("\r") for text in (with_tools, default))
    return f"{{% if tools %}}\n{first}{{%+ else %}}\n{second}{{%+ endif %}}"


def _tokens_beyond(vocabulary: dict[str, int], num_rows: int) -> tuple[str, ...]:
    """A note on tokens for which the embedding has no row."""
    beyond = sorted((token_id, token) for token, token_id in vocabulary.items())
    beyond = [one for one in beyond if one[0] >= num_rows]
    if not beyond:
        return ()
    first_id, first = beyond[0]
    count = "a token" if len(beyond) == 1 else f"{len(beyond)} tokens"
    return (
        f"the tokenizer has {count} beyond the embedding's {num_rows} rows (vocab_size), from "
        f"{first[:40]!r}, id {first_id}: the model cannot read a text with such a token",
    )


def _check_files(folder: Path) -> None:
    """Check the sizes of all files that transformers will read, and the fields that may have been
    written by hand, so that errors name them."""
    if not (folder / TOKENIZER).exists():
        _check_sentencepiece(folder)
    limits = {TOKENIZER: MAX_TOKENIZER, SENTENCEPIECE: MAX_TOKENIZER}
    limits |= {CHAT_TEMPLATE: MAX_TEMPLATE}
    more = [path.relative_to(folder).as_posix() for path in folder.glob(f"{MORE_TEMPLATES}/*")]
    for name, largest in {**limits, **dict.fromkeys(more, MAX_TEMPLATE)}.items():
        if (folder / name).exists():
            _check_file(folder / name, largest)
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS):
        if (folder / name).exists():
            fields = read_fields(folder / name)
            if name == TOKENIZER_CONFIG:
                _check_template(fields)
                # It is a state of the tokenizer that tokenizer.json does not hold.
                if fields.flag("split_special_tokens", False):
                    raise fields.unsupported("split_special_tokens", "false")
            if name != ADDED_TOKENS:
                _check_special_tokens(fields)


def _check_sentencepiece(folder: Path) -> None:
    hint = "make one with transformers: AutoTokenizer.from_pretrained(OLD).save_pretrained(NEW)"
    if not (folder / SENTENCEPIECE).exists():
        if (folder / TEKKEN).exists():  # what transformers makes of it does not begin with BOS
            message = f"{folder} has its tokenizer as {TEKKEN}, expected {TOKENIZER}"
            hint = f"choose a repository of this model that also has a {TOKENIZER}"
            raise SubspecError(Exit.UNSUPPORTED, message, hint)
        message = f"{folder} has no tokenizer: neither {TOKENIZER} nor {SENTENCEPIECE}"
        raise SubspecError(Exit.UNSUPPORTED, message, hint)
    needed = {"sentencepiece": "sentencepiece", "protobuf": "google"}
    missing = [package for package, module in needed.items() if find_spec(module) is None]
    if missing:
        names = " and ".join(missing)
        message = (
            f"{folder} has only {SENTENCEPIECE}, and {names}, which read it, are not installed"
        )
        raise SubspecError(Exit.UNSUPPORTED, message, f"pip install {' '.join(missing)}")


def _check_file(path: Path, largest: int) -> None:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        refuse_stand_in(path, file.read(64))
        if size > largest:
            message = f"{path.name} is {size} bytes, expected at most {largest}"
            raise SubspecError(Exit.CORRUPT, message)
        if path.suffix == ".jinja":
            file.seek(0)
            try:
                file.read().decode("utf-8")
            except UnicodeDecodeError as error:
                raise SubspecError(Exit.CORRUPT, f"{path.name} is not UTF-8: {error}") from None


def _check_template(config: Fields) -> None:
    found = config.values.get("chat_template")
    named = found if isinstance(found, list) else [{"template": found or ""}]
    for entry in named:
        template = entry.get("template") if isinstance(entry, dict) else None
        if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
            expected = f"a string, or a list of named ones, of at most {MAX_TEMPLATE} characters"
            raise config.wrong("chat_template", found, expected)


def _check_special_tokens(config: Fields) -> None:
    for name in SPECIAL_TOKENS:
        value = config.values.get(name)
        token = value.get("content") if isinstance(value, dict) else value
        if value is not None and (not isinstance(token, str) or len(token) > MAX_TOKEN):
            raise config.wrong(name, value, "a string, or an object with its content")


def _bounded(text: str, largest: int, name: str) -> str:
    size = len(text.encode("utf-8"))
    if size > largest:
        raise SubspecError(Exit.CORRUPT, f"{name} has {size} bytes, expected at most {largest}")
    return text
