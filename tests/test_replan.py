"""Another plan for the same weights: by subspec-plan --from, and by subspec-run on the fly."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import PROFILE, build_artifact
from running import run

from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.store import Artifact, open_artifact, verify
from subspec.planner.build import rebuild
from subspec.planner.cli import main as plan_command
from subspec.planner.hub import DEMO
from subspec.planner.search import PRIOR, Wishes, search
from subspec.planner.storage import Storage
from subspec.runtime.replan import planned_anew, planners_error
from subspec.runtime.sampling import Sampling
from subspec.runtime.session import Session, machine_name

WEIGHTS = ("exact.safetensors", "resident.safetensors", "substitutes.safetensors")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As planned on this machine: nothing needs to be measured again."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("replan") / "artifact"
    artifact = build_artifact(DEMO, out, "residual", width=2, depth=3)
    here = replace(PROFILE, machine=machine_name(torch.device("cpu")), num_threads=1)
    rebuild(artifact, replace(artifact.plan, acceptance=PRIOR), here, out, overwrite=True)
    return out


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "artifact"))


def plan(*words: object) -> int:
    try:
        plan_command([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def inodes(folder: Path) -> list[int]:
    return [(folder / name).stat().st_ino for name in WEIGHTS]


def tokens(artifact: Artifact) -> list[int]:
    with Session(artifact) as session:
        return [t for some in session.generate([5] * 20, 12, Sampling()) for t in some]


def test_an_artifact_is_planned_anew_in_place_without_touching_weights(artifact: Path) -> None:
    before = inodes(artifact)
    assert plan("--from", artifact, "--vram", "8MB", "--context", 200) == 0
    opened = open_artifact(artifact)
    assert (opened.plan.budget_bytes, opened.plan.context) == (8_000_000, 200)
    assert inodes(artifact) == before
    verify(artifact)
    assert len(tokens(opened)) == 12
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"]


def test_a_sibling_links_to_the_same_weights(artifact: Path, tmp_path: Path) -> None:
    sibling = tmp_path / "small"
    assert plan("--from", artifact, "--vram", "8MB", "--out", sibling) == 0
    assert inodes(sibling) == inodes(artifact)
    shutil.rmtree(artifact)  # neither needs the other
    verify(sibling)
    assert plan("--from", sibling, "--vram", "9MB", "--out", sibling.parent / "artifact") == 0


def test_an_existing_sibling_is_replaced_only_if_asked(artifact: Path, tmp_path: Path) -> None:
    words = ("--from", artifact, "--vram", "8MB", "--out", tmp_path / "small")
    assert plan(*words) == 0
    assert plan(*words) == Exit.USAGE
    assert plan(*words, "--overwrite") == 0


def test_a_folder_on_another_disk_is_refused_and_nothing_is_left(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_disk(*_: object, **__: object) -> None:
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(os, "link", other_disk)
    opened = open_artifact(artifact)
    with pytest.raises(SubspecError, match="cannot be linked") as caught:
        rebuild(opened, opened.plan, opened.profile, tmp_path / "other", overwrite=False)
    assert caught.value.exit_code == Exit.USAGE
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "neither of --model REF and --from"),
        (["--model", "demo", "--from", "x"], "both of --model REF and --from"),
        (["--model", "demo", "--print-plan"], "--print-plan was given without --from"),
        (["--model", "demo", "--reprofile"], "--reprofile was given without --from"),
        (["--from", "x", "--encoding", "raw"], "keeps the weights as they are stored"),
        (["--from", "x", "--quantizer", "hqq"], "keeps the weights as they are stored"),
        (["--from", "x", "--revision", "main"], "keeps the weights as they are stored"),
        (["--from", "nothing"], "nothing is not a folder"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*words, "--vram", "9MB") == Exit.USAGE
    assert message in capsys.readouterr().err


def test_the_printed_plan_is_the_one_that_would_be_written(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (artifact / "plan.json").read_text()
    assert plan("--from", artifact, "--vram", "8MB", "--print-plan") == 0
    printed = capsys.readouterr().out
    assert (artifact / "plan.json").read_text() == before
    assert plan("--from", artifact, "--vram", "8MB") == 0
    assert (artifact / "plan.json").read_text() == printed


def test_an_anew_planned_artifact_has_the_plan_of_the_search(artifact: Path) -> None:
    opened = open_artifact(artifact)
    stored = Storage(tuple(opened.stored_parts()))
    kept = Wishes(encoding="kept")
    expected = search(opened.spec, opened.profile, 8_000_000, kept, PRIOR, stored)
    assert plan("--from", artifact, "--vram", "8MB") == 0
    found = open_artifact(artifact).plan
    assert found == expected
    assert found.reasons[-1].endswith("the artifact keeps them so")


def test_a_smaller_cap_is_kept_on_the_fly(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (artifact / "plan.json").read_bytes()
    words = (artifact, "def main():", "--raw", "--max-tokens", 4, "--vram", "7MB", "--json")
    ended = run(capsys, *words)
    assert ended.exit_code == 0, ended.err
    stats = json.loads(ended.out)["stats"]
    assert stats["fast_cap_bytes"] == 7_000_000 >= stats["fast_peak_bytes"]
    assert "planned anew for 7.00 MB" in ended.err
    assert f"subspec-plan --from {artifact} --vram 7000000B" in ended.err
    assert (artifact / "plan.json").read_bytes() == before


def test_a_cap_that_no_plan_keeps_ends_with_the_planners_words(artifact: Path) -> None:
    with pytest.raises(SubspecError, match="the smallest plan needs") as caught:
        planned_anew(open_artifact(artifact), 1_000_000, None, None)
    assert caught.value.exit_code == Exit.INFEASIBLE
    assert caught.value.hint.startswith("--vram ")


def test_a_link_that_is_slowed_down_is_planned_for(artifact: Path) -> None:
    plans = [
        planned_anew(open_artifact(artifact), 7_000_000, None, link).plan
        for link in (None, 20_000_000)
    ]
    free, slow = (plan.predicted["plain"] for plan in plans)
    assert slow.stream_seconds == pytest.approx(slow.streamed_bytes / 20e6)
    assert slow.stream_seconds > 2 * free.stream_seconds


def test_a_planner_that_dies_is_reported_with_its_last_words() -> None:
    error = planners_error(-9, "Traceback\nKilled")
    assert error.exit_code == Exit.UNEXPECTED
    assert error.message == "subspec-plan ended with code -9: Killed"
