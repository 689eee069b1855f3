"""A model's tokens for llguidance: the bytes of each, and a tokenizer function."""

import json
import re
from dataclasses import dataclass
from typing import Any

from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.text.detokenizer import BYTE_TOKEN

SPACE = "▁"  # in SentencePiece's pieces


@dataclass(frozen=True)
class GrammarTokens:
    """contents: bytes of each id below vocab_size, b"" for an unused id, the name for a special
    token. special: ids by name of tokens that only match where a grammar names them. ends: tokens
    that end an answer."""

    tokenizer: LLTokenizer
    vocab_size: int
    contents: tuple[bytes, ...]
    special: dict[str, int]
    ends: frozenset[int]


def read_grammar_tokens(
    tokenizer: Tokenizer, vocab_size: int, end_tokens: tuple[int, ...]
) -> GrammarTokens:
    """Read a tokenizer's tokens. Takes about a second for 152k tokens. Raises
    SubspecError(UNSUPPORTED) for a tokenizer whose tokens have no bytes, or a model without an end
    token."""
    ends = sorted({token for token in end_tokens if 0 <= token < vocab_size})
    if not ends:
        raise SubspecError(
            Exit.UNSUPPORTED,
            "structured output needs a model with an end token, and this one names none",
        )
    added = tokenizer.get_added_tokens_decoder()
    special = {
        token.content: index
        for index, token in added.items()
        # <think> and <tool_call> are decoded as text, but never match in a grammar's text.
        if token.special or (token.content.startswith("<") and token.content.endswith(">"))
    }
    contents = [b""] * vocab_size
    file = json.loads(tokenizer.to_str())
    content_of = _content_of(file["decoder"])
    for piece, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index < vocab_size:
            token = added.get(index)
            contents[index] = token.content.encode() if token else content_of(piece)
    usable = {name: index for name, index in special.items() if index < vocab_size}
    special_ids = sorted({*usable.values(), *ends})
    source = _TokenSource(_without_prefix(tokenizer, file), contents, special, special_ids, ends[0])
    return GrammarTokens(
        LLTokenizer(TokenizerWrapper(source), eos_token=ends),
        vocab_size,
        tuple(contents),
        usable,
        frozenset(ends),
    )


class _TokenSource:
    """The tokenizer interface of llguidance. Its texts are tokenized without special tokens and
    without a leading space (`tokenizer` must not add one)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        contents: list[bytes],
        special: dict[str, int],
        special_token_ids: list[int],
        eos_token_id: int,
    ) -> None:
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self.special_token_ids = special_token_ids
        self.tokens = contents
        self._tokenizer = tokenizer
        names = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None
        hidden = set(special_token_ids)
        self._usable = {index for index, text in enumerate(contents) if text} - hidden
        self._longest = max((len(text) for text in contents), default=1)
        self._index_of = {contents[index]: index for index in sorted(self._usable, reverse=True)}

    def __call__(self, text: bytes) -> list[int]:
        """Tokenize UTF-8 as in training; llguidance forces these ids where the grammar leaves no
        choice of text."""
        ids: list[int] = []
        for part in self._apart(text.decode("utf-8")):
            ids += self._tokenizer.encode(part, add_special_tokens=False).ids
        return ids if self._usable.issuperset(ids) else self._greedy(text)

    def _apart(self, text: str) -> list[str]:
        """Split the text so that no special token can match."""
        parts, begin = [], 0
        for found in self._special.finditer(text) if self._special else ():
            parts.append(text[begin : found.start() + 1])
            begin = found.start() + 1
        return [*parts, text[begin:]]

    def _greedy(self, text: bytes) -> list[int]:
        """Tokenize by longest match: for text whose tokens exceed the model's vocabulary."""
        ids, begin = [], 0
        while begin < len(text):
            for end in range(min(len(text), begin + self._longest), begin, -1):
                if (index := self._index_of.get(text[begin:end])) is not None:
                    ids.append(index)
                    break
            begin = end if index is not None else begin + 1
        return ids


def _content_of(decoder: Any) -> Any:
    """Return the function piece -> bytes of a tokenizer's decoder (tokenizer.json). Raises
    SubspecError(UNSUPPORTED)."""
    steps = (decoder or {}).get("decoders", [decoder]) if decoder else []
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        table = _byte_level_table()
        return lambda piece: _latin(piece.translate(table))
    if kinds & {"ByteFallback", "Metaspace"}:
        return _piece_bytes
    raise SubspecError(
        Exit.UNSUPPORTED,
        "structured output needs a byte-level or SentencePiece tokenizer, this model's decoder is "
        + (" + ".join(sorted(kinds)) or "none"),
    )


def _piece_bytes(piece: str) -> bytes:
    if BYTE_TOKEN.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


def _byte_level_table() -> dict[int, int]:
    """Byte-level BPE's characters -> bytes: printable ones map to themselves, the others to U+0100
    and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {256 + index: byte for index, byte in enumerate(others)}


def _latin(piece: str) -> bytes:
    try:
        return piece.encode("latin-1")
    except UnicodeEncodeError:
        return b""  # no bytes, so no token that a grammar could allow


def _without_prefix(tokenizer: Tokenizer, value: Any) -> Tokenizer:
    """Return the tokenizer, or a copy that adds no leading space. value: its tokenizer.json."""
    steps = {key: _no_prefix(value[key]) for key in ("normalizer", "pre_tokenizer")}
    if all(step == value[key] for key, step in steps.items()):
        return tokenizer
    return Tokenizer.from_str(json.dumps({**value, **steps}))


def _no_prefix(step: Any) -> Any:
    """Return a normalizer or pre-tokenizer of tokenizer.json without a prefix space."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        return {**step, key: [one for inner in step[key] if (one := _no_prefix(inner))]}
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return step
