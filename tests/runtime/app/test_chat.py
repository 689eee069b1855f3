"""A conversation: what it remembers, its commands, and the ways out of it."""

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running import QUESTION, Ended, Terminal, demo_artifact, run

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.app import answer, chat
from subspec.runtime.app.answer import Answer, Answering
from subspec.runtime.sequence import GenerationParams, Sequence
from subspec.runtime.text.tokenizer import ChatTokenizer

Chatting = Callable[..., Ended]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_artifact(tmp_path_factory.getbasetemp())


@pytest.fixture
def chatting(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Chatting:
    """Runs a chat whose turns come through a pipe; answers are of 4 tokens."""

    def chatted(lines: str | bytes, *words: object, tokens: int = 4) -> Ended:
        data = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        return run(capsys, artifact, "--chat", "--max-tokens", tokens, *words)

    return chatted


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """The messages of each turn, in place of a model: it answers with their number."""
    seen: list[list[tuple[str, str]]] = []

    def chat_ids(_: ChatTokenizer, messages: list[dict[str, str]]) -> list[int]:
        seen.append([(message["role"], message["content"]) for message in messages])
        return [1]

    def answer_prompt(*_: object, **__: object) -> Answer:
        print(f"answer {len(seen)}", end="")
        return Answer(f"answer {len(seen)}", [5], [1], "eos")

    monkeypatch.setattr(ChatTokenizer, "chat_ids", chat_ids)
    monkeypatch.setattr(chat, "answer_prompt", answer_prompt)
    return seen


def test_the_second_turn_reads_only_what_is_new(chatting: Chatting) -> None:
    ended = chatting(f"{QUESTION}\n/stats\nand for floats\n/stats\n")
    assert ended.exit_code == 0
    assert ended.out.startswith("def ") and ended.out.count("\n") >= 2
    first, second = (line for line in ended.err.splitlines() if line.startswith("prompt "))
    assert "cached" not in first
    prompt = int(second.split()[1])
    cached, word = second.partition("(")[2].partition(")")[0].split()
    assert 24 <= int(cached) < prompt and word == "cached"


def test_a_turn_sees_those_before_it(chatting: Chatting, asked: Any) -> None:
    ended = chatting("one\n\n  two  \n", "--system", "Be brief.")
    assert ended.out == "answer 1\nanswer 2\n"
    assert asked == [
        [("system", "Be brief."), ("user", "one")],
        [
            ("system", "Be brief."),
            ("user", "one"),
            ("assistant", "answer 1"),
            ("user", "two"),
        ],
    ]


def test_clear_forgets_all_but_the_system_message(chatting: Chatting, asked: Any) -> None:
    ended = chatting("one\n/system Be kind.\ntwo\n/clear\nthree\n/system\nfour\n/reset\nfive\n")
    assert asked[1:] == [
        [("system", "Be kind."), ("user", "two")],
        [("system", "Be kind."), ("user", "three")],
        [("user", "four")],
        [("user", "five")],
    ]
    for said in ("system message set, conv", "system message removed, conv", "\nconversation cl"):
        assert said in ended.err


@pytest.mark.parametrize("word", ["/exit", "/bye", "/quit"])
def test_exit_leaves_with_0_and_reads_no_further(chatting: Chatting, asked: Any, word: str) -> None:
    ended = chatting(f"{word}\none\n")
    assert ended.exit_code == 0 and asked == []


def test_help_stats_and_unknown_commands_answer_on_stderr(chatting: Chatting, asked: Any) -> None:
    ended = chatting("/help\n/?\n/stats\n/systems off\n/nope now\n")
    assert ended.out == "" and asked == []
    assert ended.err.count("/clear          forget the conversation") == 2
    assert "no answer yet" in ended.err
    assert "/systems is not a command; /help lists them" in ended.err
    assert "/nope is not a command" in ended.err


def test_settings_are_shown_and_changed_for_the_answers_after(
    chatting: Chatting, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = list[GenerationParams]()
    answer_as_before = chat.answer_prompt

    def answer_prompt(*given: Any, **more: Any) -> Answer:
        used.append(given[3].params)
        return answer_as_before(*given, **more)

    monkeypatch.setattr(chat, "answer_prompt", answer_prompt)
    ended = chatting("one\n/set temperature 0.5\n/set min_p=0.1\n/set max-tokens 9\ntwo\n/set\n")
    assert ended.exit_code == 0
    before, after = used
    assert (before.sampling.temperature, before.max_tokens) == (0.0, 4)
    assert after.sampling == replace(before.sampling, temperature=0.5, min_p=0.1)
    assert after.max_tokens == 9
    assert ended.err.count("  max-tokens           9\n") == 2
    assert ended.err.endswith("  seed                 0\n")


def test_a_setting_that_cannot_be_is_one_sentence_and_changes_nothing(
    chatting: Chatting, asked: Any
) -> None:
    ended = chatting("/set temperature -1\n/set top-k 1.5\n/set speed 3\n/set seed\n/set\n")
    assert ended.exit_code == 0
    for said in (
        "error: temperature is -1.0, expected 0 or more\n",
        "error: top-k is '1.5', expected a whole number\n\nhint: such as /set top-k 1\n",
        "error: 'speed 3' is not a setting and its value\n\nhint: the settings are max-tokens, ",
        "error: 'seed' is not a setting and its value\n",
        "  temperature          0.0\n",
    ):
        assert said in ended.err


def test_triple_quotes_hold_a_turn_of_several_lines(chatting: Chatting, asked: Any) -> None:
    chatting('"""\ndef f():\n    pass\n"""\n"""one line"""\n"""never closed\n  end')
    turns = [messages[-1][1] for messages in asked]
    assert turns == ["def f():\n    pass", "one line", "never closed\n  end"]


def test_a_prompt_on_the_command_line_is_the_first_turn(chatting: Chatting, asked: Any) -> None:
    chatting("two\n", "one")
    assert [messages[-1] for messages in asked] == [("user", "one"), ("user", "two")]


def test_a_line_that_is_not_utf8_is_skipped(chatting: Chatting, asked: Any) -> None:
    ended = chatting(b"one\n" + b"caf\xe9\n" + "café\n".encode())
    assert [messages[-1][1] for messages in asked] == ["one", "café"]
    assert "that line is not UTF-8" in ended.err


def test_a_turn_that_does_not_fit_leaves_the_conversation_as_it_was(chatting: Chatting) -> None:
    long = "word " * 300
    ended = chatting(f"{QUESTION}\n{long}\nand for floats\n/stats\n")
    assert ended.exit_code == 0
    assert "error: the prompt has " in ended.err and "hint: /clear, or " in ended.err
    assert "cached)" in ended.err.splitlines()[-1]


def test_what_the_template_refuses_leaves_the_conversation_as_it_was(
    chatting: Chatting, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = ChatTokenizer.chat_ids

    def refuses_no(text: ChatTokenizer, messages: list[dict[str, str]]) -> list[int]:
        if messages[-1]["content"] == "no":
            raise SubspecError(Exit.USAGE, "the model's chat template refuses this: no", "ask")
        return taken(text, messages)

    monkeypatch.setattr(ChatTokenizer, "chat_ids", refuses_no)
    ended = chatting("one\nno\ntwo\n")
    assert "refuses this: no" in ended.err
    assert [content for _, content in asked[-1]] == ["one", "answer 1", "two"]


def test_any_other_error_ends_the_chat_with_its_code(
    chatting: Chatting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object) -> None:
        raise SubspecError(Exit.CORRUPT, "exact.safetensors: reading failed")

    monkeypatch.setattr(Sequence, "generate", unreadable)
    ended = chatting("one\ntwo\n")
    assert ended.exit_code == Exit.CORRUPT and ended.err.count("reading failed") == 1


def test_an_answer_that_was_cut_off_says_why(chatting: Chatting) -> None:
    assert "(cut off at --max-tokens 4)" in chatting(f"{QUESTION}\n").err


def test_an_answer_names_what_cut_it_off() -> None:
    engine: Any = SimpleNamespace(plan=SimpleNamespace(context=256))
    said = {
        reason: answer.cut_off(
            Answer("", [5], [1], reason), engine, Answering(GenerationParams(max_tokens=9))
        )
        for reason in ("context", "length", "eos", "stop", "interrupted")
    }
    assert said.pop("context") == "cut off: the plan's context of 256 tokens is full"
    assert said.pop("length") == "cut off at --max-tokens 9"
    assert set(said.values()) == {""}


# On a terminal


def test_ctrl_c_ends_an_answer_and_the_chat_goes_on(artifact: Path) -> None:
    with Terminal(artifact, "--link-bandwidth", "15MB") as terminal:
        terminal.expect("/help lists the commands")
        terminal.expect("> ")
        terminal.send(f"{QUESTION}\n")
        terminal.expect("def")
        terminal.interrupt()
        terminal.expect("> ")
        terminal.send("/stats\n")
        terminal.expect("prompt 24 tokens")
        terminal.expect("> ")
        terminal.send("half a li")
        terminal.expect("half a li")
        terminal.interrupt()  # the line goes, the chat stays
        terminal.expect("Ctrl-C once more leaves")
        terminal.expect("> ")
        terminal.send("/clear\n")
        terminal.expect("conversation cleared")
        terminal.expect("> ")
        terminal.send("\x04")
        assert terminal.end() == 0
        assert "Traceback" not in terminal.screen


def test_ctrl_c_twice_leaves_with_130(artifact: Path) -> None:
    with Terminal(artifact, "--chat", QUESTION, "--link-bandwidth", "15MB") as terminal:
        terminal.expect("def")
        terminal.interrupt()
        terminal.expect("> ")
        terminal.interrupt()
        assert terminal.end() == Exit.INTERRUPTED
        assert "interrupted" in terminal.screen and "Traceback" not in terminal.screen
