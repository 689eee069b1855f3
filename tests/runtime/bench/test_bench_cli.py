"""subspec-bench as a person uses it, on the demo model: rows, resuming, pairs, traces, the page."""

import csv
import errno
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import click
import pytest
from chat_templates import QWEN35
from running import Ended, demo_artifact

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.codec import dump_json
from subspec.artifacts.format.store import open_artifact
from subspec.artifacts.plan import Constraints
from subspec.runtime.app.opening_options import OpeningOptions
from subspec.runtime.bench import tasks, variants
from subspec.runtime.bench.cli import main
from subspec.runtime.bench.csv_columns import speed_columns
from subspec.runtime.bench.items import Item
from subspec.runtime.bench.page import page
from subspec.runtime.bench.paired import compare, divergence
from subspec.runtime.bench.records import AnswerRow, SpeedRow, append_row, read_rows
from subspec.runtime.bench.tables import (
    Form,
    Table,
    as_markdown,
    compared_table,
    speed_table,
    written,
)
from subspec.runtime.bench.throughput import warm_up
from subspec.runtime.bench.variants import Source, Variant
from subspec.runtime.draft import hierarchical
from subspec.runtime.draft.beam import TokenTree
from subspec.runtime.engine import Engine
from subspec.runtime.lossy import Lossy
from subspec.runtime.sequence import GenerationParams, Sequence
from subspec.runtime.text import tokenizer
from subspec.runtime.text.tokenizer import load_tokenizer

Capture = pytest.CaptureFixture[str]
HERE = ("--no-replan",)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_artifact(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def measured(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of a few answers, with a draft and without."""
    folder = tmp_path_factory.mktemp("measured")
    data = folder / "gsm8k.jsonl"
    rows = [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["tasks", str(artifact), *HERE, "--tasks", "gsm8k", "--data", str(folder)]
    words += ["--max-tokens", "8", "--out"]
    files = {"draft": folder / "draft.jsonl", "plain": folder / "plain.jsonl"}
    main.main([*words, str(files["draft"])])
    main.main([*words, str(files["plain"]), "--no-speculation"])
    return files


@pytest.fixture(scope="module")
def speeds(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rows of `speed`."""
    out = tmp_path_factory.mktemp("speeds") / "speed.jsonl"
    words = ("-p", "16", "-n", "4", "-d", "0,24", "-r", "1", *HERE, "--out", str(out))
    main.main(["speed", str(artifact), *words])
    return out


def run(capsys: Capture, *words: object) -> Ended:
    capsys.readouterr()
    try:
        code = main.main([str(word) for word in words]) or 0
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return Ended(code, said.out, said.err)


def answers(file: Path) -> list[AnswerRow]:
    return [row for row in read_rows(file) if isinstance(row, AnswerRow)]


def test_speed_has_a_row_for_each_test_depth_and_method(speeds: Path, capsys: Capture) -> None:
    kept: list[Any] = read_rows(speeds)
    tests = ["pp16", "tg4", "pp16 @ d24", "tg4 @ d24"]
    assert [(row.setting.label, row.test) for row in kept] == [
        (label, test) for label in ("2x3", "plain") for test in tests
    ]
    assert all(len(row.tokens_per_second) == 1 and min(row.tokens_per_second) > 0 for row in kept)
    assert kept[1].accepted_per_round > 0 == kept[5].accepted_per_round


def test_rows_of_speed_that_a_file_has_are_not_measured_again(
    artifact: Path, speeds: Path, capsys: Capture, tmp_path: Path
) -> None:
    whole = speeds.read_bytes().splitlines(keepends=True)
    out = tmp_path / "speed.jsonl"
    out.write_bytes(b"".join(whole[:7]) + whole[7][:40])  # the last line was cut off
    words = ("-p", 16, "-n", 4, "-d", "0,24", "-r", 1, *HERE, "--out", out)
    done = run(capsys, "speed", artifact, *words, "-o", "jsonl")
    assert done.exit_code == 0 and done.err.count("already") == 7
    kept = out.read_bytes().splitlines(keepends=True)
    assert kept[:7] == whole[:7] and len(kept) == 8
    assert done.out.encode() == b"".join(kept)
    elsewhere = whole[0].replace(b'"machine": "', b'"machine": "another ')
    out.write_bytes(elsewhere)
    refused = run(capsys, "speed", artifact, *words)
    assert refused.exit_code == Exit.USAGE and "machine 'another" in refused.err
    assert out.read_bytes() == elsewhere


def opened_under(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, without: str = "", **changed: Any
) -> None:
    """The artifact is opened with changes of its plan, without the placement of a method."""
    opened = open_artifact(artifact)
    placements = {name: one for name, one in opened.plan.placements.items() if name != without}
    plan = replace(opened.plan, placements=placements, **changed)
    monkeypatch.setattr(variants, "open_folder", lambda folder: replace(opened, plan=plan))


@pytest.mark.parametrize(
    ("changed", "labels"),
    [
        ({"drafter": "substitute+lookup"}, ["2x3+lookup", "plain"]),
        ({"method": "plain"}, ["plain"]),
        ({"method": "plain", "without": "substitute"}, ["plain"]),
        ({"method": "plain", "drafter": "lookup"}, ["lookup", "plain"]),
        ({"without": "plain"}, ["2x3"]),
    ],
)
def test_speed_measures_the_plans_own_drafter_and_plain_decoding(
    artifact: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    labels: list[str],
) -> None:
    opened_under(artifact, monkeypatch, **changed)
    done = run(capsys, "speed", artifact, "-p", 0, "-n", 2, "-r", 1, *HERE, "-o", "csv")
    assert done.exit_code == 0, done.err
    assert [row["label"] for row in csv.DictReader(io.StringIO(done.out))] == labels
    assert ("left out: plain: " in done.err) == (changed.get("without") == "plain")


def test_methods_without_memory_are_left_out_as_long_as_one_is_left(
    artifact: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_under(artifact, monkeypatch, without="substitute", method="plain")
    words = ("speed", artifact, "-p", 0, "-n", 2, "-r", 1, *HERE, "-o", "csv", "--methods")
    done = run(capsys, *words, "substitute,draft-model,lookup")
    assert [row["label"] for row in csv.DictReader(io.StringIO(done.out))] == ["lookup"]
    assert done.exit_code == 0 and done.err.count("left out: ") == 2
    assert "left out: substitute: this plan has no room for the method 'substitute'" in done.err
    for name, code in (("substitute", Exit.INFEASIBLE), ("draft-model", Exit.USAGE)):
        assert run(capsys, *words, name).exit_code == code
    sweep = ("sweep", artifact, *HERE, "--max-samples", 1, "--max-tokens", 2, "--method")
    assert run(capsys, *sweep, "substitute").exit_code == Exit.INFEASIBLE
    assert run(capsys, *sweep, "plain").exit_code == 0


@pytest.mark.parametrize("command", ["speed", "sweep"])
def test_every_variant_is_planned_before_one_is_measured(
    artifact: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def run_planner(words: list[str]) -> str:
        if "999" in words:
            raise SubspecError(Exit.USAGE, "999 is not in the range")
        return dump_json(open_artifact(artifact).plan)

    monkeypatch.setattr(variants, "run_planner", run_planner)
    monkeypatch.setattr(variants, "opened", lambda *_: pytest.fail("it was measured"))
    done = run(capsys, command, artifact, "--widths", "1,999")
    assert done.exit_code == Exit.USAGE and "not in the range" in done.err


def test_every_form_of_a_table_says_the_same(speeds: Path) -> None:
    rows: list[Any] = read_rows(speeds)
    md, of_csv, of_json, jsonl = (
        written(rows, form, speed_table, speed_columns) for form in get_args(Form)
    )
    header, rule, *lines = md.splitlines()
    assert len(lines) == 8 and {line.count("|") for line in (header, rule, *lines)} == {12}
    assert set(rule) <= set("|-:")
    cells = list(csv.DictReader(io.StringIO(of_csv)))
    assert [row["test"] for row in cells] == [row.test for row in rows]
    assert [float(row["tokens_per_second"]) for row in cells] == [
        row.tokens_per_second[0] for row in rows
    ]
    whole = json.loads(of_json)["rows"]
    assert whole == [json.loads(line) for line in jsonl.splitlines()]
    assert {row["schema"] for row in whole} == {"subspec.bench.speed/1"}


def test_a_draft_never_changes_the_answers(measured: dict[str, Path], capsys: Capture) -> None:
    done = run(capsys, "compare", measured["draft"], measured["plain"], "--expect-identical")
    assert done.exit_code == 0, done.err
    assert "| identical turns " in done.out and "3/3" in done.out


def test_another_drafter_gives_the_same_answers_and_is_named(
    artifact: Path, measured: dict[str, Path], capsys: Capture, tmp_path: Path
) -> None:
    words = ["--tasks", "gsm8k", "--data", measured["draft"].parent, "--max-tokens", 8]
    words += ["--drafter", "substitute+lookup", "--out", tmp_path / "lookup.jsonl"]
    done = run(capsys, "tasks", artifact, *HERE, *words)
    assert done.exit_code == 0 and "2x3+lookup" in done.out
    files = (measured["draft"], tmp_path / "lookup.jsonl")
    assert run(capsys, "compare", *files, "--expect-identical").exit_code == 0
    refused = run(capsys, "tasks", artifact, *HERE, *words, "--no-speculation")
    assert refused.exit_code == Exit.USAGE and "exclude each other" in refused.err


ALL = ("--verify", "lossy", "--threshold-method", "prob", "--threshold", 0, "--window", 0)
RULE = "lossy (prob 0, window 0)"


def test_lossy_answers_name_their_rule_in_every_row_and_table(
    artifact: Path, measured: dict[str, Path], capsys: Capture, tmp_path: Path
) -> None:
    exact, out = tmp_path / "exact.jsonl", tmp_path / "lossy.jsonl"
    words = ["tasks", artifact, *HERE, "--tasks", "gsm8k", "--data", measured["draft"].parent]
    words += ["--max-tokens", 16, "--temperature", 1.5, "--out"]
    assert run(capsys, *words, exact).exit_code == 0
    done = run(capsys, *words, out, *ALL)
    assert done.exit_code == 0 and f"2x3, {RULE}" in done.out, done.err
    rows = answers(out)
    assert {row.setting.lossy for row in rows} == {Lossy("prob", 0.0, 0)}
    assert sum(row.costs.lossy_tokens for row in rows) > 0
    refused = run(capsys, *words, exact, *ALL)
    assert refused.exit_code == Exit.USAGE and "lossy None instead of Lossy(" in refused.err
    files = (exact, out)
    found = run(capsys, "compare", *files)
    assert found.exit_code == 0 and f"2x3, {RULE}" in found.out
    strict = run(capsys, "compare", *files, "--expect-identical")
    assert strict.exit_code == Exit.UNEXPECTED and f"A is 2x3, B is 2x3, {RULE}" in strict.err
    assert "hint: a lossy rule may change tokens" in strict.err
    told = json.loads(run(capsys, "compare", *files, "--json").out)
    assert (told["a_method"], told["b_method"], told["lossy"]) == ("2x3", f"2x3, {RULE}", True)
    assert told["b"]["lossy_share"] > 0 == told["a"]["lossy_share"]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        assert run(capsys, "report", *files).exit_code == 0
        assert RULE in Path("bench.html").read_text("utf-8")


def test_identical_lossy_answers_are_said_to_be_lossy(
    artifact: Path, measured: dict[str, Path], capsys: Capture, tmp_path: Path
) -> None:
    """A threshold that nothing passes."""
    out = tmp_path / "lossy.jsonl"
    words = ["--tasks", "gsm8k", "--data", measured["draft"].parent, "--max-tokens", 8]
    run(capsys, "tasks", artifact, *HERE, *words, "--verify", "lossy", "--threshold", 0,
        "--out", out)  # fmt: skip
    done = run(capsys, "compare", measured["draft"], out, "--expect-identical")
    assert done.exit_code == 0
    said = "all 3 turns have identical tokens; A is 2x3, B is 2x3, lossy (entropy 0, window 6)"
    assert said in done.err


def test_rows_of_before_lossy_acceptance_are_exact(
    measured: dict[str, Path], tmp_path: Path
) -> None:
    older = [json.loads(line) for line in measured["draft"].read_text().splitlines()]
    for row in older:
        del row["setting"]["lossy"], row["setting"]["draft_temperature"]
        del row["costs"]["lossy_tokens"]
    file = tmp_path / "older.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in older))
    assert read_rows(file) == read_rows(measured["draft"])


def test_answers_have_scores_tokens_and_costs(measured: dict[str, Path]) -> None:
    rows = answers(measured["draft"])
    assert len(rows) == 3 and {row.score for row in rows} <= {0.0, 1.0}
    for row in rows:
        assert row.costs.generated_tokens == len(row.token_ids) <= 8
        assert row.costs.generated_tokens == 1 + sum(row.costs.accepted) + len(row.costs.accepted)
        assert row.setting.method == "substitute" and row.costs.decode_seconds > 0


def test_an_interrupted_run_goes_on_where_it_was(
    artifact: Path, measured: dict[str, Path], capsys: Capture, tmp_path: Path
) -> None:
    whole = measured["draft"].read_bytes().splitlines(keepends=True)
    out = tmp_path / "answers.jsonl"
    out.write_bytes(whole[0] + whole[1][:40])  # the second line was cut off
    words = ["--tasks", "gsm8k", "--data", measured["draft"].parent, "--max-tokens", 8]
    done = run(capsys, "tasks", artifact, *HERE, *words, "--out", out)
    assert "1 turns are in" in done.err and "1 of 3" not in done.err
    kept = out.read_bytes().splitlines(keepends=True)
    assert kept[0] == whole[0] and len(kept) == 3
    assert [row.token_ids for row in answers(out)] == [
        row.token_ids for row in answers(measured["draft"])
    ]


def test_one_short_answer_that_does_not_count_comes_before_the_others(
    artifact: Path,
    measured: dict[str, Path],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Else the first one's time to its first token has the check of digests in it."""
    generated = list[int]()
    generate = Sequence.generate

    def noted(sequence: Sequence, prompt: list[int], params: GenerationParams) -> Any:
        generated.append(params.max_tokens)
        return generate(sequence, prompt, params)

    monkeypatch.setattr(Sequence, "generate", noted)
    out, data = tmp_path / "answers.jsonl", measured["draft"].parent
    words = ("--tasks", "gsm8k", "--data", data, "--max-tokens", 8, "--out", out)
    run(capsys, "tasks", artifact, *HERE, *words)
    assert generated == [3, 8, 8, 8] and len(answers(out)) == 3
    out.write_bytes(out.read_bytes().splitlines(keepends=True)[0])
    run(capsys, "tasks", artifact, *HERE, *words)  # goes on, in a new process as a rule
    assert generated[4:] == [3, 8, 8]
    run(capsys, "tasks", artifact, *HERE, *words)
    assert len(generated) == 7
    run(capsys, "sweep", artifact, *HERE, "--max-samples", 1, "--max-tokens", 5)
    assert generated[7:] == [3, 5, 5]  # an item of two turns


def test_a_question_that_is_too_long_is_no_trouble_for_the_answer_that_does_not_count(
    artifact: Path,
) -> None:
    with Engine.open(artifact) as engine:
        warm_up(engine, [5] * 10 * engine.plan.context)
        assert engine.num_prefill_chunks == 1


def test_each_item_is_sampled_with_noise_of_its_own(
    artifact: Path, capsys: Capture, tmp_path: Path
) -> None:
    row = {"question": "Say anything", "answer": "#### 1"}
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    words = ("--tasks", "gsm8k", "--data", tmp_path, "--max-tokens", 8, "--temperature", 5)
    for name in ("a", "b"):
        run(capsys, "tasks", artifact, *HERE, *words, "--out", tmp_path / f"{name}.jsonl")
    a, b = (answers(tmp_path / f"{name}.jsonl") for name in ("a", "b"))
    assert len({one.token_ids for one in a}) == 3
    assert [one.token_ids for one in a] == [one.token_ids for one in b]


def test_answers_of_another_version_are_not_put_together(
    artifact: Path, measured: dict[str, Path], capsys: Capture, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    for row in answers(measured["draft"]):
        append_row(out, replace(row, setting=replace(row.setting, subspec="0.0.1")))
    words = ("--tasks", "gsm8k", "--data", measured["draft"].parent, "--max-tokens", 8)
    done = run(capsys, "tasks", artifact, *HERE, *words, "--out", out)
    assert done.exit_code == Exit.USAGE and "subspec '0.0.1' instead of" in done.err


def test_answers_of_another_setting_are_not_put_together(
    artifact: Path, measured: dict[str, Path], capsys: Capture
) -> None:
    words = ["--tasks", "gsm8k", "--data", measured["draft"].parent, "--temperature", 0.5]
    done = run(capsys, "tasks", artifact, *HERE, *words, "--out", measured["draft"])
    assert done.exit_code == Exit.USAGE and "temperature 0.0 instead of 0.5" in done.err


def test_answers_to_other_questions_or_of_another_length_are_not_put_together(
    artifact: Path, measured: dict[str, Path], capsys: Capture, tmp_path: Path
) -> None:
    before = measured["draft"].read_bytes()
    out, other = tmp_path / "out.jsonl", tmp_path / "gsm8k.jsonl"
    out.write_bytes(before)
    rows = [{"question": f"What is {n} - {n}?", "answer": "#### 0"} for n in range(3)]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = measured["draft"].parent
    for changed in (("--data", data, "--max-tokens", 9), ("--data", other, "--max-tokens", 8)):
        words = ("--tasks", "gsm8k", *changed, "--out", out)
        done = run(capsys, "tasks", artifact, *HERE, *words)
        assert done.exit_code == Exit.USAGE and out.read_bytes() == before
        assert "the --data and --max-tokens of that run" in done.err
    older = [row.replace(b', "asked": "' + row.partition(b'"asked": "')[2].strip()[:-1], b"")
             for row in before.splitlines(keepends=True)]  # fmt: skip
    out.write_bytes(b"".join(older))
    assert b"asked" not in out.read_bytes()
    words = ("--tasks", "gsm8k", "--data", data, "--max-tokens", 8, "--out", out)
    assert "3 turns are in" in run(capsys, "tasks", artifact, *HERE, *words).err


@pytest.fixture
def unjudged(artifact: Path, tmp_path: Path) -> Path:
    """A file of two answers with programs that were not run, and one row of `speed` between."""
    row = {"prompt": "def f(a):\n", "test": "def check(one):\n    assert one\n"}
    rows = [{**row, "entry_point": "f", "task_id": name} for name in ("one", "two")]
    (tmp_path / "human-eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    words = ["--tasks", "human-eval", "--data", str(tmp_path), "--max-tokens", "4"]
    main.main(["tasks", str(artifact), *HERE, *words, "--out", str(out)])
    first, second = answers(out)
    out.unlink()
    speed = SpeedRow("subspec.bench.speed/1", first.setting, "pp1", (1.0,), 0.0, 0.0, 0)
    for one in (first, speed, second):
        append_row(out, one)
    return out


def test_stored_programs_are_run_later_without_decoding_them_again(
    artifact: Path, unjudged: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[Any] = read_rows(unjudged)
    monkeypatch.setattr(tasks, "answered", lambda *_: pytest.fail("it was decoded again"))
    monkeypatch.setattr(tasks, "score_code", lambda text, item: (1.0, ""))
    words = ("tasks", artifact, *HERE, "--tasks", "human-eval", "--data", unjudged.parent)
    words += ("--max-tokens", 4, "--out", unjudged)
    assert "running the code" not in run(capsys, *words).err and read_rows(unjudged) == before
    linked = unjudged.with_name("linked.jsonl")
    linked.symlink_to(unjudged)
    done = run(capsys, *words[:-1], linked, "--execute-code")
    assert done.err.count("running the code") == 2 and "100.0" in done.out
    assert read_rows(unjudged) == [
        replace(row, score=1.0, why="") if isinstance(row, AnswerRow) else row for row in before
    ]
    assert linked.is_symlink() and not list(unjudged.parent.glob(".*"))
    again = run(capsys, *words, "--execute-code")
    assert again.exit_code == 0 and "running the code" not in again.err


def test_judging_stored_programs_loses_no_row_if_it_is_interrupted(
    artifact: Path, unjudged: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, whole = read_rows(unjudged), unjudged.read_bytes()
    words = ("tasks", artifact, *HERE, "--tasks", "human-eval", "--data", unjudged.parent)
    words += ("--max-tokens", 4, "--out", unjudged, "--execute-code")

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tasks, "score_code", lambda text, item: (1.0, ""))
    with monkeypatch.context() as full:
        full.setattr("os.replace", no_space)
        done = run(capsys, *words)
        assert done.exit_code == Exit.RESOURCES and "No space left" in done.err
        assert unjudged.read_bytes() == whole and not list(unjudged.parent.glob(".*"))
    left = iter([(1.0, "")])

    def interrupted(text: str, item: Item) -> tuple[float, str]:
        for one in left:
            return one
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "score_code", interrupted)
    assert run(capsys, *words).exit_code == Exit.INTERRUPTED
    rows: list[Any] = read_rows(unjudged)
    assert [type(row) for row in rows] == [type(row) for row in before]
    assert sorted(str(row.score) for row in answers(unjudged)) == ["1.0", "None"]


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), SubspecError(Exit.RESOURCES, "full disk")]
)
def test_an_answer_is_kept_if_its_code_could_not_be_run_and_is_run_later(
    failure: BaseException,
    artifact: Path,
    unjudged: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(text: str, item: Item) -> tuple[float, str]:
        raise failure

    unjudged.unlink()
    words = ("tasks", artifact, *HERE, "--tasks", "human-eval", "--data", unjudged.parent)
    words += ("--max-tokens", 4, "--out", unjudged, "--execute-code")
    monkeypatch.setattr(tasks, "isolation", tuple)
    monkeypatch.setattr(tasks, "score_code", failing)
    done = run(capsys, *words)
    assert done.err.count("this system does not let this user make namespaces") == 1
    if isinstance(failure, SubspecError):
        assert done.exit_code == 0 and done.err.count("not judged: full disk") == 2
    else:
        assert done.exit_code == Exit.INTERRUPTED
    kept = answers(unjudged)
    assert [row.score for row in kept] == [None] * (2 if done.exit_code == 0 else 1)
    monkeypatch.setattr(tasks, "score_code", lambda text, item: (1.0, ""))
    assert run(capsys, *words).exit_code == 0
    judged = answers(unjudged)
    assert [row.score for row in judged] == [1.0, 1.0]
    assert [row.costs for row in judged[: len(kept)]] == [row.costs for row in kept]


def test_a_question_that_does_not_fit_is_counted_and_told(
    artifact: Path, capsys: Capture, tmp_path: Path
) -> None:
    row = {"article": "word " * 500, "highlights": "word", "id": "long"}
    (tmp_path / "cnn-dm.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "out.jsonl"
    words = ("--tasks", "cnn-dm", "--data", tmp_path, "--out", out, *HERE)
    done = run(capsys, "tasks", artifact, *words)
    assert done.exit_code == 0, done.err
    [kept] = answers(out)
    assert (kept.finish_reason, kept.score) == ("too long", 0.0) and "do not fit" in kept.why


def test_of_a_longbench_prompt_over_the_context_the_middle_is_left_out_and_told(
    artifact: Path, capsys: Capture, tmp_path: Path
) -> None:
    row = {"context": "word " * 500, "input": "who?", "answers": ["Anna"], "_id": "long"}
    for task in ("hotpotqa", "gov_report"):  # for the longest answer of the second there is no room
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "out.jsonl"
    words = ("--tasks", "hotpotqa,gov_report", "--data", tmp_path, "--out", out, *HERE)
    done = run(capsys, "tasks", artifact, *words)
    assert done.exit_code == 0, done.err
    context = open_artifact(artifact).plan.context
    for kept, room in zip(answers(out), (context - 32, context // 2), strict=True):
        assert room - 8 <= kept.costs.prompt_tokens <= room and kept.token_ids
        assert kept.why.startswith("its middle was left out: of ")
        assert kept.why.endswith(f" {kept.costs.prompt_tokens} were read")


def test_reasoning_is_not_the_answer_and_can_be_switched_off(
    artifact: Path,
    measured: dict[str, Path],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    words = ["tasks", artifact, *HERE, "--tasks", "gsm8k", "--data", measured["draft"].parent]
    words += ["--max-tokens", 4, "--out", tmp_path / "out.jsonl"]
    refused = run(capsys, *words, "--no-thinking")
    assert refused.exit_code == Exit.USAGE and "has no enable_thinking" in refused.err
    thinking = replace(load_tokenizer(artifact / "tokenizer"), template=QWEN35)
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda folder: thinking)
    assert run(capsys, *words).exit_code == 0
    for row in answers(tmp_path / "out.jsonl"):
        assert row.text and row.reasoning_characters == len(row.text) and row.answer == ""
        assert row.score == 0 and row.why == "there is no answer after the reasoning"
        assert row.setting.enable_thinking is None
    refused = run(capsys, *words, "--no-thinking")
    assert (
        refused.exit_code == Exit.USAGE and "enable_thinking None instead of False" in refused.err
    )
    assert run(capsys, *words[:-1], tmp_path / "told.jsonl", "--no-thinking").exit_code == 0
    for row in answers(tmp_path / "told.jsonl"):
        assert row.answer == row.text and row.why == "" and row.setting.enable_thinking is False


def test_code_in_the_reasoning_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()

    def score_code(text: str, item: Item) -> tuple[float, str]:
        seen.append(text)
        return 1.0, ""

    monkeypatch.setattr(tasks, "score_code", score_code)
    item = Item("human-eval", "i", ("x",), "code", ("test",))
    thought, said = "<think>x = 1</think>", "x = 2"
    row: Any = AnswerRow("subspec.bench.answer/1", None, "t", "i", 0, "", (), "", None, "", None)  # type: ignore[arg-type]
    row = replace(row, text=thought + said, reasoning_characters=len(thought))
    assert tasks.judged(row, item, execute=True).score == 1 and seen == [said]
    cut = replace(row, text=thought)
    assert tasks.judged(cut, item, execute=True).score == 0 and len(seen) == 1


def test_a_sweep_plans_each_point_and_leaves_out_what_does_not_fit(
    artifact: Path, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[list[str]]()

    def run_planner(words: list[str]) -> str:
        asked.append(words)
        if "5" in words:
            raise SubspecError(Exit.INFEASIBLE, "too deep")
        plan = open_artifact(artifact).plan
        return dump_json(replace(plan, tree=replace(plan.tree, depth=2)))

    monkeypatch.setattr(variants, "run_planner", run_planner)
    out = tmp_path / "sweep.jsonl"
    words = ("--depths", "2,5", "--temperatures", "0,0.9", "--max-samples", 1, "--max-tokens", 6)
    done = run(capsys, "sweep", artifact, *words, "--device", "cpu", "--out", out)
    rows: list[Any] = read_rows(out)
    assert [(row.setting.depth, row.setting.temperature) for row in rows] == [(2, 0), (2, 0.9)]
    assert "left out: too deep" in done.err
    assert [words[words.index("--depth") + 1] for words in asked] == ["2", "5"]
    assert all("--print-plan" in words and "--width" not in words for words in asked)
    kept = out.read_bytes()
    again = run(capsys, "sweep", artifact, *words, "--device", "cpu", "--out", out)
    assert again.err.count("already") == 2 and out.read_bytes() == kept
    longer = (*words[:-1], 7)  # other answers: other rows
    run(capsys, "sweep", artifact, *longer, "--device", "cpu", "--out", out)
    assert len(read_rows(out)) == 4 and out.read_bytes().startswith(kept)


def test_a_sweep_has_axes_of_lossy_rules_and_of_draft_temperatures(
    artifact: Path, capsys: Capture, tmp_path: Path
) -> None:
    out = tmp_path / "sweep.jsonl"
    words = ("sweep", artifact, *HERE, "--max-samples", 1, "--max-tokens", 6, "--out", out)
    words += ("--draft-temperatures", "0.2,3", "--verify", "lossy", "--thresholds", "0,0.3")
    done = run(capsys, *words, "--windows", "0,4")
    assert done.exit_code == 0, done.err
    rows: list[Any] = read_rows(out)
    assert [(row.setting.draft_temperature, row.setting.lossy) for row in rows] == [
        (temperature, Lossy("entropy", threshold, window))
        for temperature in (0.2, 3.0) for threshold in (0.0, 0.3) for window in (0, 4)
    ]  # fmt: skip
    assert all(row.predicted_tokens_per_second is None for row in rows)
    assert "2x3, draft temperature 0.2, lossy (entropy 0.3, window 4)" in done.out
    again = run(capsys, *words, "--windows", "0,4")
    assert again.err.count("already") == 8
    plan = ("sweep", artifact, *HERE, "--max-samples", 1, "--max-tokens", 6, "--out", out)
    assert run(capsys, *plan).exit_code == 0
    last: Any = read_rows(out)[-1]
    assert (last.setting.draft_temperature, last.setting.lossy) == (None, None)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--thresholds", "0.3"], "--thresholds was given without --verify lossy"),
        (["--windows", "4"], "--windows was given without --verify lossy"),
        (["--verify", "lossy", "--thresholds", "1.5"], "numbers from 0 to 1"),
        (["--verify", "lossy", "--method", "plain"], "exclude each other"),
        (["--draft-temperatures", "0"], "numbers from 0.01 to 100"),
    ],
)
def test_an_axis_that_makes_no_sense_is_refused(
    artifact: Path, capsys: Capture, words: list[str], expected: str
) -> None:
    done = run(capsys, "sweep", artifact, *HERE, *words)
    assert done.exit_code == Exit.USAGE and expected in done.err


def test_axes_are_combined_and_an_empty_one_is_the_plans_own() -> None:
    assert variants.variants([], [], [], []) == [Variant()]
    found = variants.variants([8, 9], [], [1, 2], [])
    assert found == [Variant(b, None, w) for b in (8, 9) for w in (1, 2)]


def asked_for(
    artifact: Path, constraints: Constraints, source: Source, variant: Variant
) -> list[str]:
    """What the planner is asked for a variant of the artifact's plan with these constraints."""
    asked = list[list[str]]()
    opened = open_artifact(artifact)
    constrained = replace(opened, plan=replace(opened.plan, constraints=constraints))

    def run_planner(words: list[str]) -> str:
        asked.append(words)
        return dump_json(opened.plan)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(variants, "open_folder", lambda folder: constrained)
        patched.setattr(variants, "run_planner", run_planner)
        variants.planned(source, variant)
    return asked[0]


def test_a_variant_is_asked_for_what_the_user_fixed_but_for_its_own_axes(artifact: Path) -> None:
    fixed = Constraints(
        context=200, width=2, depth=3, method="substitute", ram_bytes=1 << 30,
        min_path_probability=0.05, num_sequences=3, draft_head=True,
    )  # fmt: skip
    here = Source(artifact)
    own = f"{open_artifact(artifact).plan.budget_bytes}B"
    kept = {
        "--from": str(artifact), "--vram": own, "--device": "cpu", "--context": "200",
        "--width": "2", "--depth": "3", "--method": "substitute", "--ram": f"{1 << 30}B",
        "--draft-min-probability": "0.05", "--sequences": "3", "--draft-head": "own",
    }  # fmt: skip
    for variant, changed in (
        (Variant(width=4), {"--width": "4"}),
        (Variant(depth=5, context=128), {"--depth": "5", "--context": "128"}),
        (Variant(budget_bytes=7_000_000), {"--vram": "7000000B"}),
    ):
        words = asked_for(artifact, fixed, here, variant)
        assert words.pop() == "--print-plan"
        assert dict(zip(words[::2], words[1::2], strict=True)) == kept | changed
    slower = Source(artifact, OpeningOptions(vram=8_000_000, link_bandwidth=10**7))
    words = asked_for(artifact, Constraints(method="plain"), slower, Variant(context=128))
    for pair in ("--vram 8000000B", "--link-bandwidth 10000000B", "--method plain"):
        assert pair in " ".join(words)
    assert "--method" not in asked_for(
        artifact, Constraints(method="plain"), here, Variant(depth=2)
    )


def test_a_trace_has_every_round_and_the_drafts_probabilities(
    artifact: Path, capsys: Capture, tmp_path: Path
) -> None:
    out = tmp_path / "trace"
    done = run(capsys, "trace", artifact, "def f", "--max-tokens", 12, "--out", out, *HERE)
    assert done.exit_code == 0, done.err
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert sum(len(step["emitted"]) for step in steps) <= 12
    assert steps[0]["nodes"] == [] and steps[0]["levels"] == 0
    for step in steps[1:]:
        nodes = [{"token": None, "depth": 0}, *step["nodes"]]
        assert len(step["emitted"]) == step["accepted"] + 1 == len(step["logprobs"])
        assert len(nodes) == 1 + 2 * step["levels"]
        shares = dict[int, float]()
        for node in step["nodes"]:
            assert node["depth"] == nodes[node["parent"]]["depth"] + 1
            shares[node["parent"]] = shares.get(node["parent"], 0.0) + node["probability"]
        assert all(0 < share <= 1.0001 for share in shares.values())
        path = {(node["depth"], node["token"]) for node in step["nodes"]}
        assert all((at + 1, step["emitted"][at]) in path for at in range(step["accepted"]))
    trace = json.loads((out / "trace.json").read_text())
    lanes = {event["args"].get("name") for event in trace["traceEvents"]}
    assert {"prefill", "draft", "verify"} <= lanes


def test_a_trace_takes_the_options_of_an_answer_and_says_them(
    artifact: Path, capsys: Capture, tmp_path: Path
) -> None:
    def steps(*words: object) -> tuple[list[dict[str, Any]], dict[str, str]]:
        out = tmp_path / "trace"
        shown = ("trace", artifact, "def f", "--max-tokens", 12, "--out", out, *HERE)
        done = run(capsys, *shown, *words)
        assert done.exit_code == 0, done.err
        about = json.loads((out / "trace.json").read_text())["otherData"]
        lines = (out / "steps.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], about

    sampling = ("--temperature", 0.9, "--seed", 3)
    drafted, about = steps(*sampling)
    assert (about["method"], about["temperature"], about["seed"]) == ("2x3", "0.9", "3")
    plain, about = steps(*sampling, "--no-speculation")
    assert about["method"] == "plain twin" and all(not step["nodes"] for step in plain)
    flat, about = steps(*sampling, "--draft-temperature", 9)
    assert about["method"] == "2x3, draft temperature 9"
    said = [
        [token for step in some for token in step["emitted"]] for some in (drafted, plain, flat)
    ]
    assert said[0] == said[1] == said[2]
    lossy, about = steps(*ALL, *sampling)
    assert about["method"] == f"2x3, {RULE}" and sum(step["lossy_tokens"] for step in lossy) > 0


def by_path(steps: list[dict[str, Any]]) -> dict[tuple[int, ...], float]:
    """The tokens before and down to each node of a trace -> its probability."""
    found, before = dict[tuple[int, ...], float](), tuple[int, ...]()
    for step in steps:
        paths = [before]
        for node in step["nodes"]:
            paths.append((*paths[node["parent"]], node["token"]))
            found[paths[-1]] = node["probability"]
        before += tuple(step["emitted"])
    return found


def test_a_trace_of_another_drafter_has_the_substitutes_probabilities_if_they_check_it(
    artifact: Path, capsys: Capture, tmp_path: Path
) -> None:
    emitted, probable = list[list[int]](), list[dict[tuple[int, ...], float]]()
    for drafter in ("substitute", "substitute+lookup", "lookup"):
        out = tmp_path / drafter
        words = ("--max-tokens", 12, "--drafter", drafter, "--out", out, *HERE)
        done = run(capsys, "trace", artifact, "def f(a):\n    return a\ndef f(a):", *words)
        assert done.exit_code == 0, done.err
        steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
        emitted.append([token for step in steps for token in step["emitted"]])
        nodes = [node for step in steps for node in step["nodes"]]
        assert nodes and all((one["probability"] is None) == (drafter == "lookup") for one in nodes)
        probable.append(by_path(steps))
    assert emitted[0] == emitted[1] == emitted[2]
    common = probable[0].keys() & probable[1].keys()
    assert len(common) > 10
    for path in common:
        assert probable[1][path] == pytest.approx(probable[0][path], rel=0.1, abs=1e-3)


def test_a_trace_of_checked_proposals_has_the_probabilities_of_each_level(
    artifact: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever is proposed, and however much of it is agreed with in one pass."""
    found = list[TokenTree]()
    grow = hierarchical.grow

    def kept(*given: Any) -> list[TokenTree]:
        found.extend(grow(*given))
        return found[-1:]

    monkeypatch.setattr(hierarchical, "grow", kept)
    monkeypatch.setattr(hierarchical, "CLEAR", 0.0)
    opened_under(artifact, monkeypatch, drafter="substitute+lookup")
    text = "def add(a, b):\n    return a + b\n\n\n" * 3
    words = ("--max-tokens", 24, "--out", tmp_path / "trace", *HERE)
    done = run(capsys, "trace", artifact, text, *words)
    assert done.exit_code == 0, done.err
    assert any(tree.num_proposed for tree in found)
    lines = (tmp_path / "trace" / "steps.jsonl").read_text().splitlines()
    for step in map(json.loads, lines):
        shares = dict[int, float]()
        for node in step["nodes"]:
            shares[node["parent"]] = shares.get(node["parent"], 0.0) + node["probability"]
        assert all(0 < share <= 1.0001 for share in shares.values())


def test_the_page_is_well_formed_without_scripts_and_says_what_is_in_the_rows(
    measured: dict[str, Path], speeds: Path, capsys: Capture, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    done = run(capsys, "report", speeds, *measured.values(), "--out", out)
    assert done.exit_code == 0, done.err
    html = out.read_text()
    ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>\n"))
    assert "<script" not in html and "http" not in html.replace("http-equiv", "")
    for said in (
        "demo-artifact",
        "pp16, tokens/s",
        "gsm8k, tokens/s",
        "gsm8k, score",
        "plain twin",
        "identical turns",
    ):
        assert said in html, said


def test_names_from_files_are_text_on_the_page(
    measured: dict[str, Path], capsys: Capture, tmp_path: Path
) -> None:
    row = answers(measured["draft"])[0]
    file, out = tmp_path / "<b>.jsonl", tmp_path / "page.html"
    append_row(file, replace(row, task="<img src=x>", setting=replace(row.setting, artifact="<i>")))
    run(capsys, "report", file, "--out", out)
    assert "<img" not in out.read_text() and "&lt;i&gt;" in out.read_text()


def test_pairs_tell_where_tokens_part_and_by_how_much_they_differ(
    measured: dict[str, Path],
) -> None:
    rows = answers(measured["draft"])
    slower = [
        replace(row, costs=replace(row.costs, verify_seconds=2 * row.costs.verify_seconds,
                                   draft_seconds=2 * row.costs.draft_seconds))
        for row in rows
    ]  # fmt: skip
    found = compare(rows, slower)
    assert found.speed_ratio is not None and found.identical == 3
    assert found.speed_ratio.value == found.speed_ratio.low == pytest.approx(0.5)
    other = replace(rows[0], token_ids=(*rows[0].token_ids[:2], 9999))
    parted = divergence(rows[0], other)
    assert parted is not None and (parted.position, parted.b) == (2, 9999)
    shorter = divergence(rows[0], replace(rows[0], token_ids=rows[0].token_ids[:1]))
    assert shorter is not None and (shorter.position, shorter.b) == (1, None)
    with pytest.raises(SubspecError, match=r"no turn in common \(3 and 3 turns\)"):
        compare(rows, [replace(row, item="other") for row in rows])


def test_turns_without_tokens_change_no_difference_of_pairs(measured: dict[str, Path]) -> None:
    rows = answers(measured["draft"])
    nothing = replace(rows[0].costs, generated_tokens=0, verify_seconds=0.0, draft_seconds=0.0,
                      drafted=(), accepted=())  # fmt: skip
    unanswered = [
        replace(row, item=f"long {at}", token_ids=(), score=None, costs=nothing)
        for at, row in enumerate(rows)
    ]
    better = [
        replace(row, costs=replace(row.costs, accepted=tuple(n + 1 for n in row.costs.accepted)))
        for row in rows
    ]
    found = compare([*rows, *unanswered], [*better, *unanswered])
    assert found.accepted_difference is not None and found.turns == 2 * len(rows)
    assert found.accepted_difference.value == found.accepted_difference.low == pytest.approx(1)
    assert found.a.decode_tokens_per_second == compare(rows, better).a.decode_tokens_per_second
    none = compare(unanswered, unanswered)
    assert none.speed_ratio is none.accepted_difference is none.score_difference is None
    table = as_markdown(compared_table(none))
    assert table.count(" - |") == 6 and "| speed, B over A" in table
    whole = page([("rows.jsonl", unanswered)])
    assert ElementTree.fromstring(whole.removeprefix("<!DOCTYPE html>\n")) is not None


def test_other_tokens_are_an_error_if_somebody_expects_the_same(
    measured: dict[str, Path], capsys: Capture, tmp_path: Path
) -> None:
    rows = answers(measured["draft"])
    for row in rows:
        append_row(tmp_path / "b.jsonl", replace(row, token_ids=(*row.token_ids[:-1], 9999)))
    words = ("compare", measured["draft"], tmp_path / "b.jsonl", "--expect-identical", "--json")
    done = run(capsys, *words)
    assert done.exit_code == Exit.UNEXPECTED and "3 of 3 turns have other tokens" in done.err
    assert json.loads(done.out.splitlines()[0])["schema"] == "subspec.bench.compared/1"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("speed", "ARTIFACT", "--methods", "fast"), "--methods 'fast', expected some of"),
        (("speed", "ARTIFACT", "-p", "x"), "'x' is not whole numbers"),
        (("speed", "ARTIFACT", "--budgets", "8gb"), "a small b means bits"),
        (("speed", "ARTIFACT", "-n", "9999", *HERE), "the plan's context is 256"),
        (("tasks", "ARTIFACT", "--tasks", "gsm9k"), "--tasks 'gsm9k', expected some of"),
        (("sweep", "ARTIFACT", "--temperatures", "-1"), "'-1' is not numbers"),
        (("compare", "a.jsonl", "b.jsonl"), "a.jsonl cannot be read"),
        (("trace", "ARTIFACT", "x", "--out", "no/where", *HERE), "cannot be made"),
        (("trace", "ARTIFACT", "x", "--out", "/dev/null", *HERE), "/dev/null is not a folder"),
        (("trace", "ARTIFACT", "x " * 999, "--out", "new", *HERE), "the prompt has"),
        (("speed", "ARTIFACT", "--out", "no/where", *HERE), "cannot be made"),
        (("speed", "ARTIFACT", "--out", "/dev/null", *HERE), "/dev/null is not a file"),
        (("tasks", "ARTIFACT", "--out", "x" * 300, *HERE), "File name too long"),
        (("speed", "ARTIFACT", "-p", "0", "-n", "0", *HERE), "expected something to measure"),
        (("speed", "ARTIFACT", "--methods", ",", *HERE), "--methods is empty"),
        (("sweep", "ARTIFACT", "--tasks", "gsm8k", "--data", os.devnull, *HERE), "has no items"),
        ((), "Missing command"),
        (("speed", "nothing"), "nothing does not exist"),
        (("fly",), "No such command 'fly'"),
    ],
)
def test_a_wrong_word_is_one_sentence(
    artifact: Path, capsys: Capture, words: tuple[str, ...], expected: str
) -> None:
    done = run(capsys, *(artifact if word == "ARTIFACT" else word for word in words))
    assert done.exit_code == Exit.USAGE and expected in done.err
    assert not Path("new").exists()


def test_a_line_that_is_no_row_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for line, expected in (("{}", "the schema None"), ("[", "rows.jsonl, line 1")):
        file.write_text(line + "\n")
        with pytest.raises(SubspecError, match=expected) as error:
            read_rows(file)
        assert error.value.exit_code == Exit.CORRUPT


@pytest.mark.parametrize("command", ["speed", "tasks", "sweep"])
def test_a_file_that_is_not_ours_is_refused_and_stays_as_it_was(
    artifact: Path, measured: dict[str, Path], capsys: Capture, tmp_path: Path, command: str
) -> None:
    row = measured["draft"].read_bytes().splitlines(keepends=True)[0]
    notes = tmp_path / "notes.json"
    for text in (b'{"todo": "call Anna"}', b"x", row + b'{"schema": "other'):
        notes.write_bytes(text)
        done = run(capsys, command, artifact, "--out", notes, *HERE)
        assert done.exit_code == Exit.USAGE and "not the beginning of a row" in done.err
        assert "name another" in done.err and notes.read_bytes() == text


def test_only_a_row_of_ours_that_was_cut_off_is_left_out(
    measured: dict[str, Path], tmp_path: Path
) -> None:
    whole, file = measured["draft"].read_bytes(), tmp_path / "rows.jsonl"
    first = whole.splitlines(keepends=True)[0]
    for size in (0, 1, 20, 40, len(first) - 1):
        file.write_bytes(whole + first[:size])
        assert read_rows(file) == read_rows(measured["draft"])


def test_cells_of_a_table_cannot_break_it() -> None:
    text = as_markdown(Table(("a", "b"), (("x|y", "1"),)))
    assert text == "| a    | b |\n|------|--:|\n| x\\|y | 1 |\n"


def test_a_task_without_the_code_switch_runs_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "score_code", lambda *_: pytest.fail("code was run"))
    row: Any = AnswerRow("subspec.bench.answer/1", None, "t", "i", 0, "", (), "", None, "", None)  # type: ignore[arg-type]
    found = tasks.judged(row, Item("t", "i", ("x",), "code"), execute=False)
    assert found.score is None and "--execute-code" in found.why


def test_an_item_without_tests_is_not_judged_and_ends_no_run() -> None:
    row: Any = AnswerRow("subspec.bench.answer/1", None, "t", "i", 0, "", (), "", None, "", None)  # type: ignore[arg-type]
    for judge in ("stdin", "calls"):
        item = Item("t", "i", ("x",), judge, ("[]",))  # type: ignore[arg-type]
        found = tasks.judged(row, item, execute=True)
        assert (found.score, found.why) == (
            None,
            "not judged: t i has no tests with input and output",
        )


def test_each_command_takes_a_file_and_the_environment(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "bench.yaml"
    file.write_text("repetitions: 7\nprompt-tokens: 1,2\n")
    monkeypatch.setenv("SUBSPEC_BENCH_SPEED_GENERATED_TOKENS", "9")
    done = run(capsys, "speed", "x", "--config", file, "--print-config")
    assert done.exit_code == 0, done.err
    assert "repetitions: 7 " in done.out and "prompt-tokens: 1,2 " in done.out
    assert "generated-tokens: 9 " in done.out
    assert isinstance(main, click.Group) and set(main.commands) == {
        "speed", "tasks", "sweep", "compare", "trace", "report",
    }  # fmt: skip
