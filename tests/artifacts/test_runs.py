"""Run records: a line out and in, what is skipped, where they lie, and what they never do."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from run_records import PLAN, RUN, make_run
from running import demo_artifact

from subspec.artifacts import runs
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.codec import dump_json
from subspec.artifacts.format.store import (
    open_artifact,
    read_manifest,
    verify,
    write_json,
    write_manifest,
)
from subspec.artifacts.runs import Run, append_run, dump_run, load_run, plan_digest, read_runs
from subspec.planner.build.artifact import rebuild

FORMAT = Path(__file__).parents[2] / "docs" / "format.md"
LINE = (
    b'{"accepted":[1,1,0,2],"cached_tokens":0,"draft_seconds":0.25,'
    b'"drafted":[4,4,4],"fast_peak_bytes":7500000,'
    b'"first_token_seconds":0.5,"generated_tokens":11,"greedy":true,'
    b'"includes_digest_check":false,"link_bandwidth":null,'
    b'"machine":"cpu: a toy, 2 cpus","method":"substitute","padded":true,'
    b'"plan":"' + b"ab" * 32 + b'","predicted_first_token_seconds":0.5,'
    b'"predicted_peak_bytes":8000000,"predicted_tokens_per_second":20.0,"prompt_tokens":24,'
    b'"stream_wait_seconds":0.125,"streamed_bytes":20000000,'
    b'"time":"2026-11-20T16:45:00Z","verify_seconds":0.375}\n'
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As far as records go, an artifact: a folder with a manifest."""
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "manifest.json").write_text("{}")
    return tmp_path / "artifact"


@pytest.fixture
def artifact(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    whole = demo_artifact(tmp_path_factory.getbasetemp())
    unrecorded = shutil.ignore_patterns(runs.RUNS)
    return Path(shutil.copytree(whole, tmp_path / "demo", ignore=unrecorded))


def at(second: int) -> Run:
    return make_run(time=f"2026-11-20T16:{second // 60:02}:{second % 60:02}Z")


# One line


def test_a_record_has_literal_bytes_and_comes_back() -> None:
    run = make_run(plan="ab" * 32)
    assert dump_run(run) == LINE
    assert load_run(LINE) == run


def test_its_figures_are_those_of_the_answer() -> None:
    assert RUN.rounds == 4
    assert RUN.tokens_per_second == 16.0
    assert RUN.accepted_by_level == (3, 2, 2)
    assert RUN.drafted_levels == 12
    early = make_run(drafted=(4, 2, 2), accepted=(1, 1, 0, 2))
    assert (early.drafted_levels, load_run(dump_run(early))) == (8, early)


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 9000,
        LINE[:-20],
        LINE.replace(b'"greedy":true', b'"greedy":1'),
        LINE.replace(b'"greedy":true,', b""),
        LINE.replace(b'"greedy":true', b'"greedy":true,"prompt":"secret"'),
        LINE.replace(b'"method":"substitute"', b'"method":"other"'),
        LINE.replace(b'"method":"substitute"', b'"method":[]'),
        LINE.replace(b'"draft_seconds":0.25', b'"draft_seconds":NaN'),
        LINE.replace(b'"draft_seconds":0.25', b'"draft_seconds":-1.0'),
        LINE.replace(b'"draft_seconds":0.25', b'"draft_seconds":1e300'),
        LINE.replace(b'"prompt_tokens":24', b'"prompt_tokens":' + b"9" * 5000),
        LINE.replace(b'"prompt_tokens":24', b'"prompt_tokens":-24'),
        LINE.replace(b'"accepted":[1,1,0,2]', b'"accepted":[]'),
        LINE.replace(b'"accepted":[1,1,0,2]', b'"accepted":[1,1,0,2,3]'),
        LINE.replace(b'"drafted":[4,4,4]', b'"drafted":[4,1,1]'),  # two rounds accepted level 3
        LINE.replace(b'"drafted":[4,4,4]', b'"drafted":[4,3,4]'),
        LINE.replace(b'"drafted":[4,4,4]', b'"drafted":[5,4,4]'),  # of four rounds
        LINE.replace(b'"drafted":[4,4,4]', b'"drafted":[4,4,-4]'),
        LINE.replace(b'"drafted":[4,4,4]', b'"drafted":[' + b"4," * 2000 + b"4]"),
        LINE.replace(b'"time":"2026-11-20T16:45:00Z"', b'"time":"yesterday"'),
        LINE.replace(b'"plan":"ab', b'"plan":"zz'),
        LINE.replace(b"a toy", b"a toy" + b" " * runs.MAX_LINE),
    ],
)
def test_what_is_no_record_is_skipped(folder: Path, line: bytes) -> None:
    append_run(folder, at(1))
    with open(folder / runs.RUNS, "ab") as file:
        file.write(line.rstrip(b"\n") + b"\n")
    append_run(folder, at(2))
    assert line != LINE
    assert read_runs(folder) == (at(1), at(2))


def test_a_torn_line_does_not_take_the_next_one_along(folder: Path) -> None:
    (folder / runs.RUNS).write_bytes(dump_run(at(1)) + dump_run(at(2))[:100])
    append_run(folder, at(3))
    assert read_runs(folder) == (at(1), at(3))


# The file


def test_no_file_is_no_records(folder: Path, tmp_path: Path) -> None:
    assert read_runs(folder) == ()
    assert read_runs(tmp_path / "nothing") == ()
    append_run(tmp_path / "nothing", RUN)
    assert not (tmp_path / "nothing").exists()


def test_the_newest_thousand_are_kept_and_the_file_is_cut_now_and_then(folder: Path) -> None:
    file = folder / runs.RUNS
    file.write_bytes(b"".join(dump_run(at(second)) for second in range(2 * runs.MAX_RUNS - 1)))
    file.chmod(0o640)
    append_run(folder, at(2000))
    assert len(file.read_bytes().splitlines()) == 2 * runs.MAX_RUNS
    assert read_runs(folder)[0] == at(runs.MAX_RUNS)
    append_run(folder, at(2001))
    assert len(file.read_bytes().splitlines()) == runs.MAX_RUNS
    assert read_runs(folder)[-1] == at(2001)
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", runs.RUNS]


def test_a_huge_file_is_read_from_its_end_and_cut(folder: Path) -> None:
    with open(folder / runs.RUNS, "wb") as file:
        file.truncate(1 << 30)  # a hole
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + dump_run(at(1)))
    assert read_runs(folder) == (at(1),)
    append_run(folder, at(2))
    assert read_runs(folder) == (at(1), at(2))
    assert (folder / runs.RUNS).stat().st_size <= runs.MAX_FILE


def test_a_folder_that_cannot_be_written_has_its_records_in_the_cache(
    folder: Path, cache: Path
) -> None:
    append_run(folder, at(1))
    (folder / runs.RUNS).rename(folder / "moved")
    (folder / runs.RUNS).mkdir()  # a root may write where a mode forbids it, not here
    append_run(folder, at(2))
    [file] = (cache / "subspec" / "runs").iterdir()
    assert file.name == "44136fa355b3678a.jsonl"  # SHA-256 of {}
    assert (cache / "subspec").stat().st_mode & 0o777 == 0o700
    assert read_runs(folder) == (at(2),)
    (folder / runs.RUNS).rmdir()
    (folder / "moved").rename(folder / runs.RUNS)
    append_run(folder, at(3))
    assert read_runs(folder) == (at(1), at(2), at(3))


def test_records_that_cannot_be_written_anywhere_are_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    (folder / runs.RUNS).mkdir()
    append_run(folder, RUN)
    assert read_runs(folder) == ()


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"mine\n")
    (folder / runs.RUNS).symlink_to(tmp_path / "notes.txt")
    append_run(folder, RUN)
    assert (tmp_path / "notes.txt").read_bytes() == b"mine\n"
    assert read_runs(folder) == (RUN,)


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / runs.RUNS)
    append_run(folder, RUN)
    assert read_runs(folder) == (RUN,)


def test_two_processes_do_not_mix_their_lines(folder: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from run_records import RUN\n"
        "from subspec.artifacts.runs import append_run\n"
        "for _ in range(200): append_run(Path(sys.argv[1]), RUN)"
    )
    command = [sys.executable, "-c", code, str(folder), str(Path(__file__).parents[1])]
    children = [subprocess.Popen(command) for _ in range(2)]
    assert [child.wait(60) for child in children] == [0, 0]
    assert read_runs(folder) == (RUN,) * 400


# Beside an artifact


def test_the_digest_of_a_plan_is_that_of_its_file(folder: Path) -> None:
    write_json(folder, "plan.json", PLAN)
    entry = write_manifest(folder, "test", (), (), {}).files[0]
    assert (entry.path, entry.chunks) == ("plan.json", (plan_digest(PLAN),))


def test_records_are_in_no_manifest_and_disturb_no_check(artifact: Path) -> None:
    append_run(artifact, RUN)
    verify(artifact)
    listed = read_manifest(artifact)
    write_manifest(artifact, listed.producer, listed.parts, listed.substitutes, {})
    assert runs.RUNS not in {entry.path for entry in read_manifest(artifact).files}
    append_run(artifact, RUN)
    verify(artifact)


def test_a_manifest_that_lists_records_is_refused(artifact: Path) -> None:
    listed = read_manifest(artifact)
    (artifact / "other.jsonl").write_bytes(LINE)
    made = write_manifest(artifact, listed.producer, listed.parts, listed.substitutes, {})
    text = (artifact / "manifest.json").read_text("utf-8")
    assert any(entry.path == "other.jsonl" for entry in made.files)
    (artifact / "other.jsonl").rename(artifact / runs.RUNS)
    reseal(artifact, text.replace('"other.jsonl"', f'"{runs.RUNS}"'))
    with pytest.raises(SubspecError, match="names a file 'runs.jsonl'") as caught:
        open_artifact(artifact)
    assert caught.value.exit_code == Exit.CORRUPT


def reseal(artifact: Path, text: str) -> None:
    """`text` as a manifest with the right digest."""
    value = json.loads(text)
    del value["digest"]
    digest = hashlib.sha256(dump_json(value).encode()).hexdigest()
    (artifact / "manifest.json").write_text(dump_json({**value, "digest": digest}), "utf-8")


def test_planning_anew_in_place_keeps_the_records_and_a_sibling_begins_without(
    artifact: Path, tmp_path: Path
) -> None:
    append_run(artifact, RUN)
    opened = open_artifact(artifact)
    plan = replace(opened.plan, reasons=("another",))
    rebuild(opened, plan, opened.profile, tmp_path / "sibling", overwrite=False)
    assert read_runs(tmp_path / "sibling") == ()
    rebuild(opened, plan, opened.profile, artifact, overwrite=True)
    assert open_artifact(artifact).plan.reasons == ("another",)
    assert read_runs(artifact) == (RUN,)
    verify(artifact)
    append_run(tmp_path / "sibling", RUN)
    rebuild(opened, plan, opened.profile, tmp_path / "sibling", overwrite=True)
    assert read_runs(tmp_path / "sibling") == ()  # replaced by another artifact


def test_every_key_is_in_the_format_page() -> None:
    section = FORMAT.read_text("utf-8").split("\n## 12. runs.jsonl\n")[1]
    assert all(f"`{name}`" in section for name in Run.__dataclass_fields__)
