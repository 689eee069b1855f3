"""Compiled kernels travel with an artifact, and nothing of them is loaded unasked."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import build_artifact
from running import QUESTION, run

from subspec.artifacts.common import user_cache
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.prebuilt import find_prebuilt, install_prebuilt, pack_prebuilt
from subspec.artifacts.format.store import Artifact, open_artifact, verify, write_manifest
from subspec.artifacts.native import cpp, residual_cpu
from subspec.planner.model.hub import DEMO
from subspec.runtime.kernels import bf16
from subspec.runtime.model import attention
from subspec.runtime.programs import kernel_sources

KERNELS = (attention, *(() if bf16.is_native() else (bf16,)), residual_cpu)
SOURCES = [kernel.SOURCE for kernel in KERNELS]


def programs(*sources: Path) -> list[str]:
    """As they are named now; all of SOURCES unless some are given."""
    return [cpp.program(source) for source in sources or SOURCES]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Residuals, and the kernels of this machine."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("shipped") / "artifact"
    made = build_artifact(DEMO, folder, "residual", resident_share=1.0)
    assert kernel_sources(made.spec, made.plan) == SOURCES
    assert all(kernel.unavailable() is None for kernel in KERNELS)
    pack_prebuilt(folder, programs())
    return sealed(folder)


def sealed(folder: Path) -> Artifact:
    """What is in the folder now is what its manifest lists."""
    listed = open_artifact(folder).manifest
    write_manifest(folder, listed.producer, listed.parts, listed.substitutes, {})
    return open_artifact(folder)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Another user of such a machine, who has no compiler; yields where kernels are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    cpp.library.cache_clear()
    yield tmp_path / "cache" / "subspec" / "kernels"
    cpp.library.cache_clear()
    user_cache._held.cache_clear()


def test_what_was_built_is_listed_with_its_digest(artifact: Artifact) -> None:
    entries = [entry for entry in artifact.manifest.files if entry.role == cpp.FOLDER]
    assert [entry.path for entry in entries] == sorted(programs())
    assert verify(artifact.path) > sum(entry.num_bytes for entry in entries) > 0


def test_with_the_users_word_no_compiler_is_needed(artifact: Artifact, elsewhere: Path) -> None:
    assert residual_cpu.unavailable() == "there is no C++ compiler 'g++' (install g++ or set CXX)"
    cpp.library.cache_clear()
    assert install_prebuilt(artifact, programs()) == []
    assert {path.name for path in elsewhere.iterdir()} == set(map(cpp.library_name, SOURCES))
    assert residual_cpu.unavailable() is None and attention.unavailable() is None


def test_a_flipped_bit_is_an_error_and_is_not_kept(
    artifact: Artifact, elsewhere: Path, tmp_path: Path
) -> None:
    shutil.copytree(artifact.path, tmp_path / "copy")
    copy = open_artifact(tmp_path / "copy")
    entry = find_prebuilt(copy, cpp.program(residual_cpu.SOURCE))
    assert entry is not None
    damaged = bytearray((copy.path / entry.path).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (copy.path / entry.path).write_bytes(damaged)
    with pytest.raises(SubspecError, match="does not match its digest") as error:
        install_prebuilt(copy, programs(residual_cpu.SOURCE))
    assert error.value.exit_code == Exit.CORRUPT
    assert not elsewhere.exists() or not [*elsewhere.iterdir()]


def test_kernels_of_other_sources_flags_or_processors_are_not_brought(
    artifact: Artifact, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changed = tmp_path / "residual.cpp"
    changed.write_bytes(residual_cpu.SOURCE.read_bytes() + b"\n")
    for header in residual_cpu.SOURCE.parent.glob("*.hpp"):
        shutil.copy(header, tmp_path)
    assert install_prebuilt(artifact, programs(changed)) == programs(changed)
    for name, value in (("FLAGS", (*cpp.FLAGS, "-g")), ("processor", lambda: "another")):
        with monkeypatch.context() as patch:
            patch.setattr(cpp, name, value)
            assert install_prebuilt(artifact, programs()) == programs()
    monkeypatch.setenv("CXX", "g++ -mno-avx512f")
    assert find_prebuilt(artifact, cpp.program(residual_cpu.SOURCE)) is None


def test_where_nothing_can_be_kept_this_process_alone_loads_what_is_trusted(
    artifact: Artifact,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A home that is not writable, and no compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    words = (artifact.path, QUESTION, "--max-tokens", 2, "--no-replan", "--no-record")
    trusted = run(capsys, *words, "--trust-kernels")
    assert trusted.exit_code == 0
    assert "kernels" not in trusted.err and "compiler" not in trusted.err
    assert residual_cpu.unavailable() is None


def test_where_nothing_can_be_kept_a_note_says_that_kernels_are_compiled_at_every_start(
    artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    built = {source.name: tmp_path / f"{source.stem}.so" for source in SOURCES}
    for source in SOURCES:
        shutil.copy(artifact.path / cpp.program(source), built[source.name])

    def copied(command: list[str], stopped: object) -> None:
        shutil.copy(built[Path(command[-3]).name], command[-1])

    monkeypatch.setattr(cpp, "_run", copied)
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    cpp.library.cache_clear()
    words = (artifact.path, QUESTION, "--max-tokens", 2, "--no-replan", "--no-record")
    said = run(capsys, *words).err
    cpp.library.cache_clear()
    user_cache._held.cache_clear()
    assert said.count("note: the C++ kernels are compiled at every start") == 1
    assert f"{os.devnull}/subspec cannot be made: Not a directory" in said


def test_a_person_without_a_compiler_is_told_of_them_and_may_trust_them(
    artifact: Artifact,
    elsewhere: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (artifact.path, QUESTION, "--max-tokens", 4, "--no-replan", "--no-record")
    ended = run(capsys, *words)
    assert ended.exit_code == 0
    assert "there is no C++ compiler" in ended.err
    assert "(--trust-kernels would load the artifact's own)" in ended.err
    assert not elsewhere.exists(), "nothing of it is kept unasked"
    cpp.library.cache_clear()
    trusted = run(capsys, *words, "--trust-kernels")
    assert trusted.exit_code == 0 and "compiler" not in trusted.err
    assert trusted.out == ended.out


def test_what_an_artifact_does_not_bring_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bare = build_artifact(DEMO, tmp_path / "artifact", "residual", resident_share=1.0)
    ended = run(capsys, bare.path, QUESTION, "--max-tokens", 2, "--no-record", "--trust-kernels")
    assert ended.exit_code == 0
    compiled = ", ".join(source.stem for source in SOURCES)
    assert f"note: no pre-built kernels for this machine, compiling: {compiled}" in ended.err
