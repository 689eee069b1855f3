"""One answer: its text, its figures, its JSON, and what Ctrl-C does to it."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running import QUESTION, demo_artifact, run

from subspec.runtime.answer import generate
from subspec.runtime.cli import Options
from subspec.runtime.session import Stats
from subspec.runtime.text import load_text

STATS = {
    "prompt_tokens", "reused_tokens", "generated_tokens", "decode_tokens_per_second",
    "time_to_first_token_seconds", "rounds", "mean_accepted_per_round", "accepted_histogram",
    "draft_seconds", "verify_seconds", "stream_wait_seconds", "streamed_bytes", "fast_peak_bytes",
    "fast_cap_bytes", "process_peak_bytes", "predicted_tokens_per_second",
}  # fmt: skip
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_artifact(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def same_signal_handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_answer_is_on_stdout_and_its_figures_on_stderr(artifact: Path, capsys: Capture) -> None:
    ended = run(capsys, artifact, QUESTION, "--max-tokens", 6)
    assert ended.exit_code == 0
    assert ended.out.startswith("def ") and ended.out.endswith("\n")
    note, line = ended.err.splitlines()
    assert note.startswith("note: planned on (a test machine), running on (cpu: ")
    assert line.startswith("prompt 24 tokens, first token after ")
    for part in ("6 tokens at ", "(predicted 50.0)", "accepted ", "streamed ", "peak "):
        assert part in line
    assert line.endswith("cut off at --max-tokens 6")


def test_json_is_one_object_with_the_documented_keys(artifact: Path, capsys: Capture) -> None:
    ended = run(capsys, artifact, QUESTION, "--max-tokens", 6, "--json")
    found = json.loads(ended.out)
    assert ended.out.count("\n") == 1 and ended.out.isascii()
    assert set(found) == {
        "schema", "text", "token_ids", "prompt_token_ids", "finish_reason", "method", "stats",
    }  # fmt: skip
    assert set(found["stats"]) == STATS
    assert found["schema"] == "subspec.run/1" and found["method"] == "substitute"
    assert found["finish_reason"] == "length" and len(found["token_ids"]) == 6
    text = load_text(artifact / "tokenizer")
    assert found["text"] == text.tokenizer.decode(found["token_ids"])
    assert found["prompt_token_ids"] == text.chat_ids([{"role": "user", "content": QUESTION}])
    stats = found["stats"]
    assert stats["generated_tokens"] == 6 and stats["prompt_tokens"] == 24
    assert sum(stats["accepted_histogram"]) == stats["rounds"] > 0
    assert 0 < stats["fast_peak_bytes"] <= stats["fast_cap_bytes"] < stats["process_peak_bytes"]


def test_plain_decoding_gives_the_same_tokens_and_says_so(artifact: Path, capsys: Capture) -> None:
    drafted, plain, fast = (
        json.loads(run(capsys, artifact, QUESTION, "--max-tokens", 6, "--json", *flags).out)
        for flags in ((), ("--no-speculation",), ("--no-speculation", "--unpadded"))
    )
    assert plain["token_ids"] == drafted["token_ids"] and plain["method"] == "plain"
    assert plain["stats"]["predicted_tokens_per_second"] is None
    assert fast["stats"]["predicted_tokens_per_second"] == 50.0
    line = run(capsys, artifact, QUESTION, "--max-tokens", 2, "--no-speculation").err
    assert "accepted" not in line and "2 tokens at " in line


def test_an_answer_of_one_token_claims_no_speed(artifact: Path, capsys: Capture) -> None:
    assert " · 1 token · peak " in run(capsys, artifact, QUESTION, "--max-tokens", 1).err


def test_an_answer_ends_at_its_end_token_or_before_a_stop_string(
    artifact: Path, capsys: Capture
) -> None:
    whole = json.loads(run(capsys, artifact, QUESTION, "--json").out)
    assert whole["finish_reason"] == "eos"
    ended = run(capsys, artifact, QUESTION, "--json", "--stop", "nothing", "--stop", "self")
    cut = json.loads(ended.out)
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole["text"].partition("self")[0]
    assert cut["token_ids"] == whole["token_ids"][: len(cut["token_ids"])]
    assert "cut off" not in ended.err


def fake_session(ids: list[int], after: Any = lambda: None) -> Any:
    """A session that says `ids` one by one; `after` runs before each but the first."""

    def say_ids(*_: object) -> Iterator[list[int]]:
        for index, token in enumerate(ids):
            if index:
                after()
            yield [token]

    spec = SimpleNamespace(eos_token_ids=(2,))
    return SimpleNamespace(
        artifact=SimpleNamespace(spec=spec),
        generate=say_ids,
        stats=Stats("plain"),
        plan=SimpleNamespace(context=256, budget_bytes=1),
        peak=SimpleNamespace(peak_bytes=1),
        method="plain",
        predicted_tokens_per_second=None,
    )


def test_escape_sequences_reach_json_but_no_terminal(artifact: Path, capsys: Capture) -> None:
    text = load_text(artifact / "tokenizer")
    written = "a\x1b]52;c;ZXZpbA==\x07b\x9bc\n"
    session = fake_session(text.tokenizer.encode(written).ids)
    found = generate(session, text, Options(artifact), [1], echo=True)
    assert capsys.readouterr().out == "a]52;c;ZXZpbA==bc\n"
    assert found.text == written
    assert json.dumps(found.as_json(session)).isprintable()


def test_the_first_ctrl_c_ends_the_answer_between_rounds_the_second_at_once(
    artifact: Path, capsys: Capture
) -> None:
    text = load_text(artifact / "tokenizer")
    ids = text.tokenizer.encode("one two three four").ids
    once = fake_session(ids, lambda: signal.raise_signal(signal.SIGINT))
    found = generate(once, text, Options(artifact), [1], echo=False)
    assert found.finish_reason == "interrupted" and found.token_ids == ids[:2]

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        generate(fake_session(ids, twice), text, Options(artifact), [1], echo=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_is_left_alone_where_it_is_ignored(artifact: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    text = load_text(artifact / "tokenizer")
    session = fake_session([65, 66], lambda: signal.raise_signal(signal.SIGINT))
    found = generate(session, text, Options(artifact, max_tokens=2), [1], echo=False)
    assert found.finish_reason == "length"
