"""An artifact appears whole or not at all, whatever happens to its builder."""

import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PROFILE, build_artifact, make_plan, random_checkpoint
from running import answer
from transformers import Qwen2Config

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact, open_artifact, verify
from subspec.artifacts.model import Source
from subspec.artifacts.plan import Plan
from subspec.artifacts.profile import Corrections, Profile
from subspec.planner.build.artifact import build
from subspec.planner.build.quantize import quantize
from subspec.planner.model.checkpoint import read_checkpoint
from subspec.planner.model.hub import DEMO
from subspec.planner.model.tokenizer_files import read_tokenizer
from subspec.runtime.engine import Engine

TESTS = Path(__file__).parents[2]  # where builders.py is


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two that wait for each other take minutes on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2048,
        max_position_embeddings=512,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", config)


def everything_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_two_builds_of_one_plan_give_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        build_artifact(checkpoint, tmp_path / out)
    for file in (path for path in (tmp_path / "a").rglob("*") if path.is_file()):
        other = tmp_path / "b" / file.relative_to(tmp_path / "a")
        assert file.read_bytes() == other.read_bytes(), file.name


def test_every_byte_of_a_new_artifact_matches_its_manifest(tmp_path: Path) -> None:
    artifact = build_artifact(DEMO, tmp_path / "artifact")
    listed = {entry.path for entry in artifact.manifest.files}
    there = {
        file.relative_to(artifact.path).as_posix()
        for file in artifact.path.rglob("*")
        if file.is_file()
    }
    assert there == listed | {"manifest.json"}
    assert verify(artifact.path) == sum(entry.num_bytes for entry in artifact.manifest.files)


def test_the_licence_of_the_checkpoint_goes_with_its_weights(
    checkpoint: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (source / "LICENSE").write_text("all rights reversed")
    artifact = build_artifact(source, tmp_path / "artifact")
    assert (artifact.path / "LICENSE").read_text() == "all rights reversed"


def test_plan_and_profile_may_be_improved_on_the_finished_weights(
    checkpoint: Path, tmp_path: Path
) -> None:
    def improve(artifact: Artifact) -> tuple[Plan, Profile]:
        with Engine.open(artifact) as engine:
            assert len(answer(engine, [1, 2, 3], 4)) == 4
        taught = replace(artifact.profile, corrections=Corrections(verify=1.5, num_rounds=7))
        return replace(artifact.plan, reasons=("it ran",)), taught

    returned = build_with(checkpoint, tmp_path / "artifact", improve=improve)
    assert returned.reasons == ("it ran",)
    written = open_artifact(tmp_path / "artifact")
    assert written.plan == returned
    assert written.profile == replace(PROFILE, corrections=Corrections(verify=1.5, num_rounds=7))


def build_with(source: Path, out: Path, **changes: Any) -> Plan:
    checkpoint = read_checkpoint(source, Source("test/model"))
    arguments: dict[str, Any] = {
        "tokenizer": read_tokenizer(source),
        "plan": make_plan(checkpoint.spec),
        "profile": PROFILE,
        "overwrite": False,
        "quantizer": quantize,
        "improve": lambda artifact: (artifact.plan, artifact.profile),
        "progress": lambda stage, share: None,
    }
    return build(checkpoint, out=out, **{**arguments, **changes})


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_error_at_the_end_leaves_nothing(
    failure: type[BaseException], checkpoint: Path, tmp_path: Path
) -> None:
    def improve(artifact: Artifact) -> tuple[Plan, Profile]:
        raise failure

    with pytest.raises(failure):
        build_with(checkpoint, tmp_path / "new" / "folder" / "artifact", improve=improve)
    assert everything_in(tmp_path) == set()


def test_what_cannot_be_opened_gets_no_name(checkpoint: Path, tmp_path: Path) -> None:
    def improve(artifact: Artifact) -> tuple[Plan, Profile]:
        return replace(artifact.plan, verify_widths=(1,)), artifact.profile

    with pytest.raises(SubspecError, match="are inconsistent"):
        build_with(checkpoint, tmp_path / "artifact", improve=improve)
    assert everything_in(tmp_path) == set()


def test_a_disk_too_small_is_noticed_before_the_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(SubspecError, match="needs .* of disk, .* has 1.00 KB") as caught:
        build_artifact(checkpoint, tmp_path / "artifact")
    assert caught.value.exit_code == Exit.RESOURCES
    assert everything_in(tmp_path) == set()


@contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [100, 5_000, 100_000, 500_000])
def test_a_full_disk_is_said_and_nothing_is_left(
    num_bytes: int, checkpoint: Path, tmp_path: Path
) -> None:
    with no_file_larger_than(num_bytes), pytest.raises(SubspecError) as caught:
        build_artifact(checkpoint, tmp_path / "artifact")
    assert caught.value.exit_code == Exit.RESOURCES
    assert everything_in(tmp_path) == set()


KILLED_BUILDS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)  # a fork keeps no threads
sys.path.insert(0, sys.argv[1])
from builders import build_artifact
from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.format.store import verify

checkpoint, out = Path(sys.argv[2]), Path(sys.argv[3])

def build_in_child():
    child = os.fork()
    if child == 0:
        build_artifact(checkpoint, out)
        os._exit(0)
    return child

started = time.monotonic()
assert os.waitpid(build_in_child(), 0)[1] == 0
seconds = time.monotonic() - started
verify(out)
os.system(f"rm -r {out}")

random.seed(0)
for trial in range(10):
    child = build_in_child()
    time.sleep(seconds * (trial + random.random()) / 10)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if out.exists():  # it was done before it was killed
        verify(out)
        os.system(f"rm -r {out}")
assert os.waitpid(build_in_child(), 0)[1] == 0
verify(out)
print(sorted(os.listdir(out.parent)))
"""


def test_a_killed_build_leaves_nothing_that_opens_and_the_next_one_succeeds(
    checkpoint: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_BUILDS, TESTS, checkpoint, tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "['out']\n"), done.stderr
