"""One answer: its text, its figures, its JSON, and what Ctrl-C does to it."""

import io
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_records import PLAN
from running import QUESTION, demo_artifact, run

from subspec.artifacts.common.formatting import counted
from subspec.artifacts.format.store import open_artifact
from subspec.artifacts.plan import Tree
from subspec.artifacts.runs import RUNS, plan_digest, read_runs
from subspec.runtime.app.answer import Answering, answer_prompt, run_of
from subspec.runtime.engine import Engine
from subspec.runtime.sequence import GenerationParams, Stats
from subspec.runtime.text.tokenizer import load_tokenizer

STATS = {
    "prompt_tokens", "cached_tokens", "generated_tokens", "decode_tokens_per_second",
    "time_to_first_token_seconds", "rounds", "mean_accepted_per_round", "accepted_histogram",
    "lossy_tokens", "drafted_levels", "proposed_levels",
    "draft_seconds", "verify_seconds", "stream_wait_seconds", "streamed_bytes", "fast_peak_bytes",
    "budget_bytes", "process_peak_bytes", "predicted_tokens_per_second",
}  # fmt: skip
PARAMS = GenerationParams()
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_artifact(tmp_path_factory.getbasetemp())


def test_the_answer_is_on_stdout_and_its_figures_on_stderr(artifact: Path, capsys: Capture) -> None:
    ended = run(capsys, artifact, QUESTION, "--max-tokens", 6)
    assert ended.exit_code == 0
    assert ended.out.startswith("def ") and ended.out.endswith("\n")
    [line] = ended.err.splitlines()
    assert line.startswith("prompt 24 tokens, first token after ")
    for part in ("6 tokens at ", "(predicted 50.0)", "accepted ", "streamed ", "peak "):
        assert part in line
    assert line.endswith("cut off at --max-tokens 6")


def test_json_is_one_object_with_the_documented_keys(artifact: Path, capsys: Capture) -> None:
    ended = run(capsys, artifact, QUESTION, "--max-tokens", 6, "--json")
    found = json.loads(ended.out)
    assert ended.out.count("\n") == 1 and ended.out.isascii()
    assert set(found) == {
        "schema", "text", "token_ids", "prompt_token_ids", "finish_reason", "logprobs", "method",
        "drafter", "draft_temperature", "verify", "lossy", "stats",
    }  # fmt: skip
    assert set(found["stats"]) == STATS
    assert (
        found["schema"] == "subspec.run/1" and found["method"] == found["drafter"] == "substitute"
    )
    assert found["finish_reason"] == "length" and len(found["token_ids"]) == 6
    text = load_tokenizer(artifact / "tokenizer")
    assert found["text"] == text.tokenizer.decode(found["token_ids"])
    assert found["prompt_token_ids"] == text.chat_ids([{"role": "user", "content": QUESTION}])
    stats = found["stats"]
    assert stats["generated_tokens"] == 6 and stats["prompt_tokens"] == 24
    assert sum(stats["accepted_histogram"]) == stats["rounds"] > 0
    assert 0 < stats["fast_peak_bytes"] <= stats["budget_bytes"] < stats["process_peak_bytes"]


def test_another_draft_temperature_gives_the_same_answer_and_is_not_recorded(
    artifact: Path, capsys: Capture
) -> None:
    words, before = (artifact, QUESTION, "--max-tokens", 24, "--no-replan"), read_runs(artifact)
    usual = json.loads(run(capsys, *words, "--json", "--no-record").out)
    flat = json.loads(run(capsys, *words, "--json", "--draft-temperature", 50).out)
    assert flat["token_ids"] == usual["token_ids"]
    assert (usual["draft_temperature"], flat["draft_temperature"]) == (None, 50.0)
    stats = flat["stats"]
    assert stats["predicted_tokens_per_second"] is None is not usual["stats"]["drafted_levels"]
    assert len(read_runs(artifact)) == len(before)


def test_lossy_acceptance_is_labelled_and_not_recorded(artifact: Path, capsys: Capture) -> None:
    words, before = (artifact, QUESTION, "--max-tokens", 24, "--no-replan"), read_runs(artifact)
    exact = json.loads(run(capsys, *words, "--json", "--no-record").out)
    assert exact["verify"] == "exact" and exact["stats"]["lossy_tokens"] == 0
    assert exact["lossy"] is None
    everything = ("--verify", "lossy", "--threshold-method", "prob", "--threshold", 0)
    lossy = json.loads(run(capsys, *words, *everything, "--window", 0, "--json").out)
    assert lossy["verify"] == "lossy" and lossy["stats"]["lossy_tokens"] > 0
    assert lossy["token_ids"] != exact["token_ids"]
    assert lossy["lossy"] == {"threshold_method": "prob", "threshold": 0.0, "window": 0}
    line = run(capsys, *words, *everything, "--window", 0).err
    number = counted(lossy["stats"]["lossy_tokens"], "token")
    assert f"LOSSY: {number} not the model's own" in line and "predicted" not in line
    assert lossy["stats"]["predicted_tokens_per_second"] is None
    assert exact["stats"]["predicted_tokens_per_second"] is not None
    nothing = ("--verify", "lossy", "--threshold", 0)
    strict = json.loads(run(capsys, *words, *nothing, "--json").out)
    assert strict["verify"] == "lossy" and strict["token_ids"] == exact["token_ids"]
    assert len(read_runs(artifact)) == len(before)


def test_another_drafter_gives_the_same_tokens_and_is_not_compared_with_the_plan(
    artifact: Path, capsys: Capture
) -> None:
    words, before = (artifact, QUESTION, "--max-tokens", 6, "--json"), read_runs(artifact)
    flags = ("--drafter", "lookup")
    plain, found = (json.loads(run(capsys, *words, *how).out) for how in (("--no-record",), flags))
    assert found["token_ids"] == plain["token_ids"] and found["drafter"] == "lookup"
    assert found["method"] == "plain"
    assert found["stats"]["predicted_tokens_per_second"] is None
    assert len(read_runs(artifact)) == len(before)


def test_answers_that_repeat_what_was_said_are_not_compared_with_the_plan(
    artifact: Path, capsys: Capture
) -> None:
    flags = ("--drafter", "substitute+lookup", "--json")
    for prompt, length, copies in ((QUESTION, 6, False), ("def run(self):\n" * 8, 40, True)):
        before = len(read_runs(artifact))
        words = (artifact, "--raw", prompt, "--max-tokens", length)
        found = json.loads(run(capsys, *words, *flags).out)
        assert found["stats"]["predicted_tokens_per_second"] is not None
        assert bool(found["stats"]["proposed_levels"]) == copies
        assert len(read_runs(artifact)) - before == (not copies)


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


# Run records


@pytest.fixture
def unrecorded(artifact: Path) -> Path:
    """The artifact, its records forgotten."""
    (artifact / RUNS).unlink(missing_ok=True)
    return artifact


def test_an_answer_is_recorded_with_its_figures(unrecorded: Path, capsys: Capture) -> None:
    words = ("--max-tokens", 20, "--json", "--link-bandwidth", "900MB", "--temperature", 0.5)
    stats = json.loads(run(capsys, unrecorded, QUESTION, *words).out)["stats"]
    [found] = read_runs(unrecorded)
    plan = open_artifact(unrecorded).plan
    assert found.plan == plan_digest(plan) and found.machine.startswith("cpu: ")
    assert (found.method, found.padded, found.greedy) == ("substitute", True, False)
    assert found.link_bandwidth == 900_000_000 and found.includes_digest_check
    assert found.rounds == stats["rounds"] and len(found.drafted) == plan.tree.depth
    assert 0 < found.drafted_levels <= found.rounds * plan.tree.depth
    for name in ("prompt_tokens", "cached_tokens", "generated_tokens", "draft_seconds",
                 "verify_seconds", "stream_wait_seconds", "streamed_bytes", "fast_peak_bytes",
                 "predicted_tokens_per_second"):  # fmt: skip
        assert getattr(found, name) == stats[name]
    assert found.first_token_seconds == stats["time_to_first_token_seconds"]
    assert found.tokens_per_second == pytest.approx(stats["decode_tokens_per_second"])
    said = plan.predicted["substitute"]
    assert found.predicted_first_token_seconds == said.time_to_first_token_seconds
    assert found.predicted_peak_bytes == said.fast_peak_bytes
    texts = {name for name, value in asdict(found).items() if isinstance(value, str)}
    assert texts == {"time", "plan", "machine", "method"}  # none of the prompt, none of the answer


def test_plain_decoding_is_recorded_without_levels(unrecorded: Path, capsys: Capture) -> None:
    for flags in (("--no-speculation",), ("--no-speculation", "--unpadded")):
        run(capsys, unrecorded, QUESTION, "--max-tokens", 4, *flags)
    twin, plain = read_runs(unrecorded)
    assert (twin.padded, plain.padded) == (True, False)
    for found in (twin, plain):
        assert (found.method, found.drafted, found.accepted) == ("plain", (), (3,))
    assert (twin.predicted_tokens_per_second, plain.predicted_tokens_per_second) == (None, 50.0)


def test_no_record_and_an_answer_of_one_token_leave_none(unrecorded: Path, capsys: Capture) -> None:
    run(capsys, unrecorded, QUESTION, "--max-tokens", 4, "--no-record")
    run(capsys, unrecorded, QUESTION, "--max-tokens", 1)
    assert read_runs(unrecorded) == () and not (unrecorded / RUNS).exists()


def test_each_turn_of_a_chat_is_recorded_but_not_one_that_does_not_fit(
    unrecorded: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = f"{QUESTION}\n{'word ' * 300}\nand for floats\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(turns), encoding="utf-8"))
    assert run(capsys, unrecorded, "--chat", "--max-tokens", 6).exit_code == 0
    first, second = read_runs(unrecorded)
    assert first.includes_digest_check and not second.includes_digest_check
    assert first.cached_tokens == 0 < second.cached_tokens


def test_an_answer_is_recorded_up_to_where_it_was_interrupted(unrecorded: Path) -> None:
    text, how = load_tokenizer(unrecorded / "tokenizer"), Answering(PARAMS, stop=("never",))
    with Engine.open(unrecorded) as engine, engine.new_sequence() as sequence:
        decode, rounds = sequence.generate, 0

        def pressed(*given: Any) -> Iterator[list[int]]:
            nonlocal rounds
            for emitted in decode(*given):
                yield emitted
                rounds += 1
                if rounds == 3:
                    signal.raise_signal(signal.SIGINT)
                    signal.raise_signal(signal.SIGINT)

        sequence.generate = pressed  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            answer_prompt(engine, sequence, text, how, [5] * 20, echo=False)
    [found] = read_runs(unrecorded)
    assert found.rounds == 2 and found.generated_tokens > 2


def test_levels_are_counted_by_the_rounds_that_drafted_and_that_accepted_them() -> None:
    """Of a tree of 4 levels: all accepted; one of four; two of three, and the answer ends."""
    stats = Stats("substitute", drafted=(4, 4, 3), accepted=(4, 1, 2))
    found = run_of(*recorded(stats))
    assert (found.rounds, found.drafted, found.drafted_levels) == (3, (3, 3, 3, 2), 11)
    assert found.accepted == (0, 1, 1, 0, 1)
    assert found.accepted_by_level == (3, 2, 1, 1)


def recorded(stats: Stats) -> tuple[Any, Any]:
    """What a record is made of, of the engine and of the sequence."""
    engine = SimpleNamespace(
        plan=replace(PLAN, tree=Tree(2, 4)),
        method=stats.method,
        link_bandwidth=None,
        padded=True,
        device=torch.device("cpu"),
        peak=SimpleNamespace(peak_bytes=1),
        predicted_speed_of=lambda sequence: None,
    )
    return engine, SimpleNamespace(stats=stats, params=PARAMS)


# Text and signals


def fakes(ids: list[int], after: Any = lambda: None) -> tuple[Any, Any]:
    """An engine, and a sequence that says `ids` one by one; `after` runs before each but the first.
    It asks what cuts the answer, as a real one does."""

    def say_ids(prompt: list[int], params: GenerationParams) -> Iterator[list[int]]:
        for index, token in enumerate(ids):
            if index:
                after()
            params.stopping_criteria([token])
            sequence.finish_reason = "length" if index + 1 == len(ids) else None
            yield [token]

    sequence = SimpleNamespace(
        generate=say_ids, stats=Stats("plain"), params=PARAMS, finish_reason=None
    )
    engine = SimpleNamespace(
        plan=SimpleNamespace(context=256, budget_bytes=1),
        peak=SimpleNamespace(peak_bytes=1),
        method="plain",
        drafter=None,
        draft_temperature=None,
        is_predicted_by_plan=lambda sequence: True,
        predicted_speed_of=lambda sequence: None,
    )
    return engine, sequence


def test_escape_sequences_reach_json_but_no_terminal(artifact: Path, capsys: Capture) -> None:
    text = load_tokenizer(artifact / "tokenizer")
    written = "a\x1b]52;c;ZXZpbA==\x07b\x9bc\n"
    engine, sequence = fakes(text.tokenizer.encode(written).ids)
    found = answer_prompt(engine, sequence, text, Answering(PARAMS), [1], echo=True)
    assert capsys.readouterr().out == "a]52;c;ZXZpbA==bc\n"
    assert found.text == written
    assert json.dumps(found.as_json(engine, sequence)).isprintable()


def test_the_first_ctrl_c_ends_the_answer_between_rounds_the_second_at_once(
    artifact: Path, capsys: Capture
) -> None:
    text, how = load_tokenizer(artifact / "tokenizer"), Answering(PARAMS)
    ids = text.tokenizer.encode("one two three four").ids
    once = fakes(ids, lambda: signal.raise_signal(signal.SIGINT))
    found = answer_prompt(*once, text, how, [1], echo=False)
    assert found.finish_reason == "interrupted" and found.token_ids == ids[:2]

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        answer_prompt(*fakes(ids, twice), text, how, [1], echo=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_during_the_last_round_leaves_the_answer_whole(artifact: Path) -> None:
    text = load_tokenizer(artifact / "tokenizer")
    last = fakes([65, 66], lambda: signal.raise_signal(signal.SIGINT))
    found = answer_prompt(*last, text, Answering(PARAMS), [1], echo=False)
    assert found.finish_reason == "length" and found.token_ids == [65, 66]


def test_ctrl_c_is_left_alone_where_it_is_ignored(artifact: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    text = load_tokenizer(artifact / "tokenizer")
    ignoring = fakes([65, 66, 67], lambda: signal.raise_signal(signal.SIGINT))
    found = answer_prompt(*ignoring, text, Answering(PARAMS), [1], echo=False)
    assert found.finish_reason == "length"
