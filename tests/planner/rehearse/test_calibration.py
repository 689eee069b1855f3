import json
import tomllib
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.planner.rehearse.calibration import (
    MAX_FILE,
    MAX_PROMPTS,
    SHIPPED,
    Message,
    Sample,
    contents,
    in_turns,
    known_ids,
    read_samples,
    sample_ids,
    shipped_samples,
)

ROOT = Path(__file__).parents[3]
HELD_OUT = ROOT / "benchmarks" / "prompts.jsonl"
KINDS = {"question", "long", "turns", "code", "json", "prose", "german"}


class Letters:
    """A tokenizer of characters; a chat begins with 0."""

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        return [0, *self.plain_ids("".join(f"{m['role']}:{m['content']};" for m in messages))]

    def plain_ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


class Untemplated(Letters):
    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        raise SubspecError(Exit.CORRUPT, "the model's chat template failed")


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(SubspecError) as caught:
        read_samples(path)
    assert caught.value.exit_code == Exit.USAGE and caught.value.hint
    return caught.value.message


LITERAL = (
    '{"kind": "code", "text": "def read(path):\\n"}\r\n'
    "\n"
    '{"chat": "Wie spät ist es?"}\n'
    '{"kind": "own-2", "messages": [{"role": "system", "content": "Be brief."},'
    ' {"role": "user", "content": "Hello\u2028"}]}'
)


def test_each_line_is_text_or_a_chat_or_messages(tmp_path: Path) -> None:
    assert read_samples(write(tmp_path, LITERAL)) == (
        Sample("code", "def read(path):\n"),
        Sample("own", (Message("user", "Wie spät ist es?"),)),
        Sample("own-2", (Message("system", "Be brief."), Message("user", "Hello\u2028"))),
    )


WRONG_LINES = {
    "def read(path):": "line 2 is not valid JSON",
    '{"text": "a", "text": "b"}': "line 2 is not valid JSON: key 'text' is given twice",
    '{"text": "\\ud800"}': "line 2 is not valid JSON",
    '["a"]': "line 2 is ['a'], expected an object",
    '{"prompt": "a"}': "line 2 has an unknown key 'prompt'",
    '{"text": 5}': "line 2.text is 5, expected str",
    '{"kind": "", "text": "a"}': "line 2 has the kind ''",
    '{"kind": "two words", "text": "a"}': "line 2 has the kind 'two words'",
    '{"kind": "größe", "text": "a"}': "line 2 has the kind 'größe'",
    '{"kind": "code"}': "line 2 has 0 prompts, expected one of text, chat and messages",
    '{"text": "a", "chat": "b"}': "line 2 has 2 prompts",
    '{"text": ""}': "line 2 has an empty prompt",
    '{"chat": " \\n"}': "line 2 has an empty prompt",
    '{"messages": []}': "line 2 has an empty prompt",
    '{"messages": [{"role": "user", "content": ""}]}': "line 2 has an empty prompt",
    '{"messages": [{"role": "tool", "content": "a"}]}': "line 2.messages[0].role is 'tool'",
    '{"messages": [{"role": "user"}]}': "line 2.messages[0] lacks the key 'content'",
    '{"messages": [{"role": "assistant", "content": "a"}]}': "line 2 ends with the assistant's",
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_line_that_is_wrong_is_named(line: str, tmp_path: Path) -> None:
    path = write(tmp_path, f'{{"text": "a"}}\n{line}\n')
    assert refusal(path).startswith(f"prompts.jsonl {WRONG_LINES[line]}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "prompts.jsonl holds no prompt"),
        ("\n \n", "prompts.jsonl holds no prompt"),
        (b'{"text": "\xff"}', "prompts.jsonl is not UTF-8: invalid start byte at byte 10"),
        (" " * (MAX_FILE + 1), "prompts.jsonl has more than 1000000 bytes"),
        ('{"text": "a"}\n' * (MAX_PROMPTS + 1), "prompts.jsonl has 1001 prompts, expected at"),
    ],
)
def test_a_file_that_holds_no_prompts_or_too_many_is_refused(
    content: str | bytes, message: str, tmp_path: Path
) -> None:
    assert refusal(write(tmp_path, content)).startswith(message)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.jsonl").startswith("none.jsonl is missing in ")
    assert refusal(tmp_path).endswith(" is not a regular file")
    assert refusal(tmp_path / ("a" * 300)).endswith(" cannot be opened: File name too long")


def test_as_many_prompts_as_are_allowed_are_read(tmp_path: Path) -> None:
    samples = read_samples(write(tmp_path, '{"text": "a"}\n' * MAX_PROMPTS))
    assert samples == (Sample("own", "a"),) * MAX_PROMPTS


def test_text_is_continued_and_messages_go_through_the_template() -> None:
    turns = (Message("system", "be brief"), Message("user", "hello"))
    assert sample_ids(Letters(), Sample("code", "def")) == [*b"def"]
    assert sample_ids(Letters(), Sample("chat", turns)) == [0, *b"system:be brief;user:hello;"]


def test_a_model_whose_template_fails_is_tried_on_plain_text() -> None:
    turns = (Message("system", "be brief"), Message("user", "hello"))
    assert sample_ids(Untemplated(), Sample("chat", turns)) == [*b"be brief\n\nhello"]


def test_prompts_of_tokens_that_a_model_does_not_have_are_plain_text_or_left_out() -> None:
    turns = (Message("system", "be brief"), Message("user", "hello"))
    given = [Sample("chat", turns), Sample("greek", "\u03b1"), Sample("code", "def")]

    class Odd(Letters):
        def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
            return [5000]

    class Silent(Letters):
        def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
            return []

    for text in (Odd(), Silent()):
        found = known_ids(text, given, 128)
        assert found == [("chat", [*b"be brief\n\nhello"]), ("code", [*b"def"])]
    with pytest.raises(SubspecError, match="the model's 50 tokens") as caught:
        known_ids(Odd(), given, 50)
    assert caught.value.exit_code == Exit.USAGE and "--calibration" in str(caught.value.hint)


def test_kinds_take_turns() -> None:
    given = [Sample(kind, text) for kind, text in ("a1", "a2", "a3", "b1", "c1", "b2", "c2", "a4")]
    taken = [sample.kind + str(sample.prompt) for sample in in_turns(given)]
    assert taken == ["a1", "b1", "c1", "a2", "b2", "c2", "a3", "a4"]


@pytest.mark.parametrize("path", [SHIPPED, HELD_OUT])
def test_the_prompts_are_a_mix_of_what_people_ask(path: Path) -> None:
    """Most are messages; text that is continued is code, data and prose."""
    samples = read_samples(path)
    shares = {
        kind: count / len(samples) for kind, count in Counter(s.kind for s in samples).items()
    }
    assert set(shares) == KINDS and all(0.08 <= share <= 0.25 for share in shares.values())
    assert max(shares, key=lambda kind: shares[kind]) == "question"
    assert {sample.kind for sample in in_turns(samples)[: len(KINDS)]} == KINDS
    continued = [sample.kind for sample in samples if isinstance(sample.prompt, str)]
    assert 0 < len(continued) < len(samples) / 5
    assert set(continued) <= {"code", "json", "prose", "german"}
    for sample in samples:
        turns = len(contents(sample))
        assert turns >= 3 if sample.kind == "turns" else turns <= 2


@pytest.mark.parametrize("path", [SHIPPED, HELD_OUT])
def test_a_prompt_leaves_room_for_an_answer_and_ends_where_one_can_go_on(path: Path) -> None:
    """A rehearsal's context is 256 tokens, of which an answer takes 80."""
    for sample in read_samples(path):
        *_, content = contents(sample)
        assert 10 < sum(map(len, contents(sample))) < 1000
        assert not content.endswith((" ", "\t")), "a tokenizer joins a space to the word behind it"


def test_what_predictions_are_tested_on_was_held_out() -> None:
    def lines(samples: tuple[Sample, ...]) -> set[str]:
        texts = [content for sample in samples for content in contents(sample)]
        parts = [line.strip() for text in texts for line in text.replace(". ", ".\n").split("\n")]
        return {part for part in parts if len(part) > 9}  # all JSON has brackets

    calibrated, held_out = lines(shipped_samples()), lines(read_samples(HELD_OUT))
    assert len(calibrated) > 30 and len(held_out) > 30
    assert calibrated.isdisjoint(held_out)


def test_the_shipped_prompts_are_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert "*.jsonl" in settings["package-data"]["subspec.planner.rehearse"]


def test_a_sample_written_as_messages_is_read_again(tmp_path: Path) -> None:
    def line(sample: Sample) -> dict[str, Any]:
        if isinstance(sample.prompt, str):
            return {"kind": sample.kind, "text": sample.prompt}
        return {"kind": sample.kind, "messages": [asdict(turn) for turn in sample.prompt]}

    written = "\n".join(json.dumps(line(sample)) for sample in shipped_samples())
    assert read_samples(write(tmp_path, written)) == shipped_samples()
