"""benchmarks/speed.py: the whole script on a small artifact."""

import json
from pathlib import Path
from types import ModuleType

import pytest
from builders import build_artifact
from scripts import benchmark

from subspec.artifacts.format.store import Artifact
from subspec.planner.model.hub import DEMO


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return benchmark("speed")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("speed") / "artifact"
    return build_artifact(DEMO, folder, "residual", width=2, depth=3, num_sequences=2)


def test_a_run_prints_the_roofline_and_writes_the_trace(
    script: ModuleType,
    artifact: Artifact,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("roofline.MEMORY_BYTES", 1 << 20)
    trace = tmp_path / "trace.json"
    words = [str(artifact.path), "--tokens", "8", "--trace", str(trace)]
    script.main(words, standalone_mode=False)
    said = capsys.readouterr()
    found = json.loads(said.out.splitlines()[-1])["roofline"]
    assert found["num_rounds"] == script.TRACED_ROUNDS
    assert found["verdict"] == said.err.splitlines()[-1]
    assert found["terms"]["copy"]["seconds"] > 0
    written = json.loads(trace.read_text("utf-8"))
    assert written["otherData"]["artifact"] == artifact.path.name
    drafts = [event for event in written["traceEvents"] if event["name"] == "draft"]
    assert len(drafts) == found["num_rounds"]


def test_sequences_in_a_batch_have_the_tokens_that_they_have_alone(
    script: ModuleType,
    artifact: Artifact,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("roofline.MEMORY_BYTES", 1 << 20)
    script.main([str(artifact.path), "--tokens", "8", "--sequences", "2"], standalone_mode=False)
    batched = json.loads(capsys.readouterr().out.splitlines()[-1])["batched"]
    assert list(batched) == ["plain", "substitute"]
    for one in batched.values():
        assert one["num_sequences"] == 2 and one["same_tokens"]
        assert one["ratio"] == pytest.approx(
            one["together_tokens_per_second"] / one["alone_tokens_per_second"]
        )


def test_more_sequences_than_the_plan_has_are_refused(
    script: ModuleType, artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        script.main([str(artifact.path), "--sequences", "3"], standalone_mode=False)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "--sequences 3, expected 1 to 2" in said.err and said.out == ""


def test_a_trace_that_cannot_be_written_is_said_before_anything_runs(
    script: ModuleType, artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        missing = tmp_path / "missing" / "trace.json"
        script.main([str(artifact.path), "--trace", str(missing)], standalone_mode=False)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "its folder is missing or read-only" in said.err and said.out == ""
