"""Calibration prompts of several kinds, from JSON Lines files, shipped or a user's."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal, Protocol

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.codec import load_dataclass, parse_json
from subspec.artifacts.format.tensors import open_regular

SHIPPED = Path(__file__).with_name("calibration.jsonl")
MAX_FILE = 1_000_000  # bytes
MAX_PROMPTS = 1000
KIND = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,19}", re.ASCII)
SHAPES = 'a line is an object: {"kind": "code", "text": "def "}, {"chat": "Hi"} or {"messages": []}'


class Tokenizer(Protocol):
    """The runtime's tokenizer."""

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]: ...
    def plain_ids(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Sample:
    kind: str  # acceptance is measured for each kind
    prompt: str | tuple[Message, ...]  # text is continued, messages are answered


@dataclass(frozen=True)
class Line:
    """One object of a file, with exactly one of the last three fields."""

    kind: str = "own"
    text: str | None = None
    chat: str | None = None  # short form of messages with one message of the user
    messages: tuple[Message, ...] | None = None


def shipped_samples() -> tuple[Sample, ...]:
    return read_samples(SHIPPED)


def read_samples(path: Path) -> tuple[Sample, ...]:
    """One sample per line of a JSON Lines file, without blank lines.

    Raises SubspecError(USAGE) if the file cannot be read, and for the first invalid line.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_FILE + 1)
    except SubspecError as error:  # a wrong file of the user is not a damaged artifact
        raise SubspecError(Exit.USAGE, error.message, "give a file of prompts") from None
    if len(content) > MAX_FILE:
        message = f"{path.name} has more than {MAX_FILE} bytes"
        raise SubspecError(Exit.USAGE, message, "some dozens of short prompts are enough")
    try:
        lines = content.decode("utf-8").split("\n")  # a string may hold U+2028: no splitlines()
    except UnicodeDecodeError as error:
        message = f"{path.name} is not UTF-8: {error.reason} at byte {error.start}"
        raise SubspecError(Exit.USAGE, message, "convert it to UTF-8") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise SubspecError(Exit.USAGE, f"{path.name} holds no prompt", SHAPES)
    if len(numbered) > MAX_PROMPTS:
        message = f"{path.name} has {len(numbered)} prompts, expected at most {MAX_PROMPTS}"
        raise SubspecError(Exit.USAGE, message, "some dozens are enough")
    return tuple(read_sample(line, f"{path.name} line {number}") for number, line in numbered)


def read_sample(line: str, where: str) -> Sample:
    """Parse one line. `where` names file and line in errors. Raises SubspecError(USAGE)."""
    try:
        read: Line = load_dataclass(Line, parse_json(line, where), where)
    except SubspecError as error:
        raise SubspecError(Exit.USAGE, error.message, SHAPES) from None
    if not KIND.fullmatch(read.kind):
        message = f"{where} has the kind {read.kind[:60]!r}"
        raise SubspecError(Exit.USAGE, message, "a kind is one short word, such as code or chat")
    chat = None if read.chat is None else (Message("user", read.chat),)
    given = [p for p in (read.text, chat, read.messages) if p is not None]
    if len(given) != 1:
        message = f"{where} has {len(given)} prompts, expected one of text, chat and messages"
        raise SubspecError(Exit.USAGE, message, SHAPES)
    sample = Sample(read.kind, given[0])
    if not contents(sample) or not all(content.strip() for content in contents(sample)):
        raise SubspecError(Exit.USAGE, f"{where} has an empty prompt", "write some text")
    if not isinstance(sample.prompt, str) and sample.prompt[-1].role != "user":
        message = f"{where} ends with the {sample.prompt[-1].role}'s message, expected the user's"
        raise SubspecError(Exit.USAGE, message, "the last message is what will be answered")
    return sample


def known_ids(
    text: Tokenizer, samples: Iterable[Sample], vocab_size: int
) -> list[tuple[str, list[int]]]:
    """Kind and token ids of each sample, alternating between kinds. A sample is used as plain text,
    or skipped, if a chat template renders nothing or the model has no rows for its tokens. Raises
    SubspecError(USAGE) if none is left."""
    found = list[tuple[str, list[int]]]()
    for sample in in_turns(samples):
        for ids in (sample_ids(text, sample), text.plain_ids("\n\n".join(contents(sample)))):
            if ids and max(ids) < vocab_size:
                found.append((sample.kind, ids))
                break
    if not found:
        raise SubspecError(
            Exit.USAGE,
            f"no calibration prompt consists of the model's {vocab_size} tokens",
            "give prompts that do: --calibration FILE, or plan with --rehearse none",
        )
    return found


def contents(sample: Sample) -> list[str]:
    prompt = sample.prompt
    return [prompt] if isinstance(prompt, str) else [message.content for message in prompt]


def sample_ids(text: Tokenizer, sample: Sample) -> list[int]:
    """Token ids of a sample: messages by the chat template, or as plain text if that fails."""
    if isinstance(sample.prompt, str):
        return text.plain_ids(sample.prompt)
    try:
        return text.chat_ids([asdict(message) for message in sample.prompt])
    except SubspecError:
        return text.plain_ids("\n\n".join(contents(sample)))


def in_turns(samples: Iterable[Sample]) -> list[Sample]:
    """The first sample of each kind, then the second of each, ..., so that any prefix has all kinds
    equally."""
    by_kind: dict[str, list[Sample]] = {}
    for sample in samples:
        by_kind.setdefault(sample.kind, []).append(sample)
    turns = zip_longest(*by_kind.values())
    return [sample for turn in turns for sample in turn if sample is not None]
