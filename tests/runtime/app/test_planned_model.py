"""subspec-run --model: planned into the user's cache when it is first asked for, and only then."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from brief import BRIEF_PLANNER
from huggingface_hub import constants
from running import demo_artifact, own_cache, run

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import open_artifact, write_json, write_manifest
from subspec.planner.model.hub import DEMO
from subspec.runtime.app import planner_command
from subspec.runtime.app.planned_model import (
    ModelRequest,
    artifact_name,
    entry_of,
    kept,
    planned_model,
    planner_words,
)

Capture = pytest.CaptureFixture[str]
NO_PLANNER = ("/nowhere/subspec-plan",)
NINE = 9_000_000
WORDS = ("def f(", "--raw", "--max-tokens", 4, "--json")
SHA, OTHER_SHA = "0123456789abcdef0123456789abcdef01234567", "f" * 40
# Copies an artifact to --out, once a file is there, and notes what it was asked.
STAND_IN = """
import json, pathlib, shutil, sys, time
source, log, gate, *words = sys.argv[1:]
out = pathlib.Path(words[words.index("--out") + 1])
with open(log, "a") as file:
    file.write(json.dumps(words) + "\\n")
while not pathlib.Path(gate).exists():
    time.sleep(0.01)
if out.exists():
    assert "--overwrite" in words
    shutil.rmtree(out)
shutil.copytree(source, out)
print("{}")
"""
ERROR = {"code": "infeasible", "exit": 3, "message": "the smallest plan needs more", "hint": "more"}
REFUSAL = json.dumps({"schema": "subspec.error/1", "error": ERROR})
REFUSES = (
    sys.executable,
    "-c",
    f"import sys; print('error: too small', file=sys.stderr); print({REFUSAL!r}); sys.exit(3)",
)
DIES = (sys.executable, "-c", "raise ValueError('a bug')")


@pytest.fixture(autouse=True)
def artifacts(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where planned models are kept, in a cache of the test's own."""
    monkeypatch.setattr(planner_command, "PLANNER", NO_PLANNER)
    return own_cache(tmp_path_factory.mktemp("cache"), monkeypatch) / "artifacts"


class StandIn:
    """What the stand-in for subspec-plan copies, waits for, and was asked."""

    def __init__(self, folder: Path, demo: Path) -> None:
        self.source, self.gate = demo, folder / "gate"
        self._log = folder / "log"
        self.gate.touch()

    @property
    def command(self) -> tuple[str, ...]:
        words = (self.source, self._log, self.gate)
        return (sys.executable, "-c", STAND_IN, *map(str, words))

    @property
    def asked(self) -> list[list[str]]:
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture
def planner(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> StandIn:
    stand_in = StandIn(tmp_path, demo_artifact(tmp_path_factory.getbasetemp()))
    monkeypatch.setattr(planner_command, "PLANNER", stand_in.command)
    return stand_in


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "My Model"))


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# By the planner itself


def test_the_first_run_plans_and_the_second_does_not(
    artifacts: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner_command, "PLANNER", BRIEF_PLANNER)
    words = ("--model", "demo", "--vram", "9MB", "--link-bandwidth", "40MB", "--rehearse", "none")
    first = run(capfd, *words, *WORDS)
    assert first.exit_code == 0, first.err
    [path] = (one for one in artifacts.iterdir() if one.is_dir())
    assert left_in(artifacts) == {path.name, f"{path.name}.json"}
    assert path.name.startswith("demo-9.00mb-")
    assert f"planning demo for 9.00 MB into {path}, once" in first.err
    assert "\nmeasuring\n" in first.err and "\nquantizing and packing\n" in first.err
    assert "kept for the next start: " in first.err and f"rm -r {path}\n" in first.err

    monkeypatch.setattr(planner_command, "PLANNER", NO_PLANNER)
    second = run(capfd, *words, *WORDS)
    assert second.exit_code == 0, second.err
    assert json.loads(second.out)["token_ids"] == json.loads(first.out)["token_ids"]
    assert "planning" not in second.err and "kept" not in second.err


WITH_PLANNER = """
import json, sys
from subspec.runtime.app import planner_command
planner_command.PLANNER = json.loads(sys.argv[1])
from subspec.runtime.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, Exit.INTERRUPTED),
        pytest.param(signal.SIGTERM, Exit.TERMINATED, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_planning_leaves_nothing_and_is_begun_again(
    artifacts: Path, capsys: Capture, planner: StandIn, number: int, code: int
) -> None:
    words = ["--model", "demo", "--vram", "9MB", *map(str, WORDS)]
    command = [sys.executable, "-c", WITH_PLANNER, json.dumps(BRIEF_PLANNER), *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as child:
        assert child.stderr is not None and child.stdout is not None
        for line in child.stderr:
            assert "Traceback" not in line
            if line.startswith("quantizing"):
                child.send_signal(number)
        assert child.wait() == code
        assert child.stdout.read() == ""
    assert left_in(artifacts) == set()
    again = run(capsys, *words, "--no-replan")
    assert again.exit_code == 0 and len(planner.asked) == 1


# What is asked of the planner


def test_what_a_person_fixes_is_passed_through(planner: StandIn) -> None:
    request = ModelRequest("demo", NINE, "cpu", 200, 3, 40_000_000, "12.5", "demo")
    path = planned_model(request)
    [asked] = planner.asked
    assert asked == [
        "--model", "demo", "--vram", "9000000B", "--device", "cpu", "--context", "200",
        "--sequences", "3", "--link-bandwidth", "40000000B", "--rehearse", "12.5",
        "--draft-model", "demo",
        "--out", str(path), "--json",
    ]  # fmt: skip
    assert planner_words(ModelRequest("demo", 5)) == ["--model", "demo", "--vram", "5B"]


def test_each_request_has_a_name_of_its_own_that_can_be_read() -> None:
    request = ModelRequest("Qwen2.5-32B", 24_000_000_000)
    others = [
        replace(request, budget_bytes=1), replace(request, device="cpu"),
        replace(request, context=99), replace(request, sequences=2),
        replace(request, link_bandwidth=1), replace(request, rehearse="none"),
        replace(request, model="org/Qwen2.5-32B"), replace(request, model="Qwen2.5-32B@v2"),
        replace(request, draft_model="Qwen2.5-0.5B"),
    ]  # fmt: skip
    names = {artifact_name(one) for one in (request, *others)}
    assert len(names) == 1 + len(others)
    assert artifact_name(request).startswith("qwen2.5-32b-24.00gb-")
    for model in ("/", "..", "a" * 300, "ä/ö ü", "--x", ""):
        name = artifact_name(replace(request, model=model))
        assert len(name) < 120 and name.isascii() and name[0] not in ".-" and "/" not in name


def test_a_folder_is_the_same_by_whatever_path(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    (checkpoint.parent / "link").symlink_to(checkpoint)
    for model in (str(checkpoint), "My Model", "./My Model/", "link"):
        assert entry_of(ModelRequest(model, 1)) == entry_of(ModelRequest(str(checkpoint), 1))
    assert entry_of(ModelRequest("hf://a/b", 1)) == entry_of(ModelRequest("a/b", 1))


def test_the_hub_is_meant_where_it_is_named_whatever_lies_here(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    (checkpoint.parent / "org").mkdir(exist_ok=True)
    (checkpoint.parent / "org" / "name").symlink_to(checkpoint)
    hub, local = (entry_of(ModelRequest(model, 1)) for model in ("hf://org/name", "org/name"))
    assert local == entry_of(ModelRequest(str(checkpoint), 1)) != hub
    assert planner_words(hub.request)[:2] == ["--model", "hf://org/name"]


@pytest.mark.parametrize("model", ["./typo", "/no/such/folder", "~/typo", "some/typo"])
def test_a_path_that_leads_nowhere_stays_what_it_is(model: str) -> None:
    assert entry_of(ModelRequest(model, 1)).request.model == model


def test_another_number_of_sequences_links_to_the_weights_that_are_there(planner: StandIn) -> None:
    """Another budget or link may store weights in another way, and a rehearsal is not repeated."""
    request = ModelRequest("demo", NINE, rehearse="none")
    first = planned_model(request)
    planned_model(replace(request, sequences=4, context=64))
    for changes in ({"budget_bytes": 8_000_000}, {"link_bandwidth": 1}, {"rehearse": "9"}):
        planned_model(replace(request, **changes))  # type: ignore[arg-type]
    sources = [words[:2] for words in planner.asked]
    assert sources == [["--model", "demo"], ["--from", str(first)], *[["--model", "demo"]] * 3]
    assert planner.asked[1][2:8] == ["--vram", "9000000B", "--context", "64", "--sequences", "4"]
    assert "--rehearse" not in planner.asked[1]


# What is taken from the cache


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "chat_template.jinja"])
def test_a_changed_checkpoint_is_planned_again_in_the_same_place(
    checkpoint: Path, planner: StandIn, name: str
) -> None:
    request = ModelRequest(str(checkpoint), NINE)
    path = planned_model(request)
    (checkpoint / "README.md").write_text("nothing is computed from it")
    assert planned_model(request) == path and len(planner.asked) == 1
    os.utime(checkpoint / name, (1, 1))
    assert planned_model(request) == path
    assert [("--overwrite" in words) for words in planner.asked] == [False, True]
    assert planned_model(request) == path and len(planner.asked) == 2


def test_a_changed_draft_model_is_planned_again(checkpoint: Path, planner: StandIn) -> None:
    request = ModelRequest("demo", NINE, draft_model=str(checkpoint))
    path = planned_model(request)
    assert planned_model(request) == path and len(planner.asked) == 1
    os.utime(checkpoint / "config.json", (1, 1))
    assert planned_model(request) == path and len(planner.asked) == 2


def test_a_changed_checkpoint_is_not_linked_to(checkpoint: Path, planner: StandIn) -> None:
    planned_model(ModelRequest(str(checkpoint), NINE))
    os.utime(checkpoint / "config.json", (1, 1))
    planned_model(ModelRequest(str(checkpoint), NINE, context=64))
    assert all("--from" not in words for words in planner.asked)


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "exact.safetensors"])
def test_a_damaged_artifact_is_planned_again(planner: StandIn, name: str) -> None:
    request = ModelRequest("demo", NINE)
    path = planned_model(request)
    os.truncate(path / name, 10)
    assert planned_model(request) == path
    open_artifact(path)
    assert len(planner.asked) == 2


def test_a_deleted_artifact_is_planned_again(planner: StandIn) -> None:
    request = ModelRequest("demo", NINE)
    shutil.rmtree(planned_model(request))
    assert planned_model(request).is_dir() and len(planner.asked) == 2


def test_a_folder_that_is_no_artifact_is_not_overwritten(artifacts: Path, planner: StandIn) -> None:
    request = ModelRequest("demo", NINE)
    path = planned_model(request)
    (path / "manifest.json").unlink()
    with pytest.raises(SubspecError, match="is an incomplete artifact") as caught:
        planned_model(request)
    assert caught.value.hint == f"remove it: rm -r {path}"


def test_a_damaged_entry_is_planned_again(planner: StandIn) -> None:
    request = ModelRequest("demo", NINE)
    path = planned_model(request)
    entry = path.with_name(path.name + ".json")
    for text in ("", "{", '{"schema": "subspec.planned/2"}', entry.read_text() + "x"):
        entry.write_text(text)
        planned_model(request)
    assert len(planner.asked) == 5
    planned_model(request)
    assert len(planner.asked) == 5


@pytest.mark.parametrize("model", ["org/name", "hf://org/name", "name", "org/name@v1"])
def test_a_model_of_the_hub_is_of_the_commit_that_was_downloaded_last(
    tmp_path: Path, planner: StandIn, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """No network: the refs of the hub library's cache are read. Without any the artifact holds."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    planner.source = Path(shutil.copytree(planner.source, tmp_path / "source"))
    stored = open_artifact(planner.source)
    spec = replace(
        stored.spec, source=replace(stored.spec.source, repository="org/name", revision=SHA)
    )
    write_json(planner.source, "model.json", spec)
    listed = stored.manifest
    write_manifest(planner.source, listed.producer, listed.parts, listed.substitutes, {})
    monkeypatch.setattr(planner_command, "PLANNER", planner.command)
    request = ModelRequest(model, NINE)

    def times_planned() -> int:
        planned_model(request)
        return len(planner.asked)

    assert times_planned() == times_planned() == 1
    root = tmp_path / "hub" / "models--org--name"
    for sha, number in ((SHA, 1), (OTHER_SHA, 2)):
        (root / "snapshots" / sha).mkdir(parents=True)
        (root / "snapshots" / sha / "config.json").touch()
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / ("v1" if "@" in model else "main")).write_text(sha)
        assert times_planned() == number


# Two at once, and what goes wrong


def test_a_second_process_waits_for_the_first_and_does_not_plan(planner: StandIn) -> None:
    planner.gate.unlink()
    request, found, said = ModelRequest("demo", NINE), list[Path](), list[str]()
    both = [
        threading.Thread(target=lambda: found.append(planned_model(request, said.append)))
        for _ in range(2)
    ]
    both[0].start()
    while not planner.asked:
        time.sleep(0.01)
    both[1].start()
    while "another process is planning this model: waiting for it" not in said:
        time.sleep(0.01)
    planner.gate.touch()
    for one in both:
        one.join()
    assert len(set(found)) == 1 and len(found) == 2
    assert len(planner.asked) == 1


def test_the_planners_error_comes_through_once_with_its_code(
    artifacts: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner_command, "PLANNER", REFUSES)
    for words in ((), ("--json",)):
        ended = run(capfd, "--model", "demo", "--vram", "1MB", "def", *words)
        assert ended.exit_code == Exit.INFEASIBLE
        assert ended.err.count("error: ") == 1 and "error: too small\n" in ended.err
        assert ended.out == (REFUSAL + "\n" if words else "")
        assert left_in(artifacts) == set()


def test_a_planner_that_dies_is_said(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_command, "PLANNER", DIES)
    ended = run(capfd, "--model", "demo", "--vram", "9MB", "def")
    assert ended.exit_code == Exit.UNEXPECTED
    assert "ValueError: a bug\n" in ended.err
    assert ended.err.endswith("error: subspec-plan ended with code 1: see above\n")


def test_a_planner_that_is_not_there_is_said(capfd: Capture) -> None:
    ended = run(capfd, "--model", "demo", "--vram", "9MB", "def")
    assert ended.exit_code == Exit.UNEXPECTED
    assert "error: subspec-plan cannot be started: No such file" in ended.err


def test_without_a_cache_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    with pytest.raises(SubspecError, match="cannot be kept in the user.s cache") as caught:
        planned_model(ModelRequest("demo", NINE))
    assert caught.value.exit_code == Exit.RESOURCES
    assert "subspec-plan --model demo --vram SIZE --out DIR" in caught.value.hint


def test_a_planned_model_is_used_from_a_cache_that_cannot_be_written(
    planner: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ModelRequest("demo", NINE)
    path = planned_model(request)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, how: not how & os.W_OK and access(path, how))
    assert planned_model(request) == path and len(planner.asked) == 1


def test_an_empty_prompt_is_refused_before_anything_is_planned(
    artifacts: Path, capfd: Capture, planner: StandIn
) -> None:
    ended = run(capfd, "--model", "demo", "--vram", "9MB", " ")
    assert ended.exit_code == Exit.USAGE and "the PROMPT is empty" in ended.err
    assert planner.asked == [] and not artifacts.exists()


def test_files_that_are_linked_count_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    (tmp_path / "one" / "weights").write_bytes(bytes(5_000))
    alone = kept(tmp_path / "one")
    assert "5.00 KB (4.88 KiB)" in alone and f"rm -r {tmp_path / 'one'}" in alone
    (tmp_path / "two" / "weights").hardlink_to(tmp_path / "one" / "weights")
    assert f"the 2 models in {tmp_path} take 5.00 KB" in kept(tmp_path / "two")
