"""Another plan for the same weights: by subspec-plan --from, and by subspec-run on the fly."""

import errno
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import PROFILE, build_artifact, make_plan
from running import answer, own_cache, run
from toys import make_spec

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.host_memory import free_host_bytes
from subspec.artifacts.common.user_cache import user_cache_dir
from subspec.artifacts.format.codec import dump_json
from subspec.artifacts.format.store import Artifact, open_artifact, verify
from subspec.artifacts.plan import Constraints, Method, Placement, Plan
from subspec.artifacts.runs import RUNS
from subspec.planner.build.artifact import rebuild
from subspec.planner.cli import main as plan_command
from subspec.planner.model.hub import DEMO
from subspec.planner.solve.fastest import fastest_plan
from subspec.planner.solve.search import PRIOR
from subspec.planner.solve.storage import Storage
from subspec.runtime.app import planner_command, replan
from subspec.runtime.app.folder import open_folder
from subspec.runtime.app.planner_command import planners_error
from subspec.runtime.app.replan import (
    Here,
    Mismatch,
    entry_name,
    fitted,
    look_around,
    mismatch,
    planned_anew,
    planner_words,
    read_entry,
    write_entry,
)
from subspec.runtime.engine import Engine

ELSEWHERE = "cpu: AVX2, 64 cpus; torch 2.11.0"
NO_PLANNER = ("/nowhere/subspec-plan",)
REFUSAL = {
    "schema": "subspec.error/1",
    "error": {
        "code": "infeasible",
        "exit": 3,
        "message": "the smallest plan needs more",
        "hint": "",
    },
}
INFEASIBLE = (sys.executable, "-c", f"import sys; print({json.dumps(REFUSAL)!r}); sys.exit(3)")
WEIGHTS = ("exact.safetensors", "resident.safetensors", "substitutes.safetensors")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As planned on this machine: nothing needs to be measured again."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("replan") / "artifact"
    artifact = build_artifact(DEMO, out, "residual", width=2, depth=3)
    here = replace(PROFILE, num_threads=1)
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
    with Engine.open(artifact) as engine:
        return answer(engine, [5] * 20, 12)


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


def test_the_command_that_runs_an_artifact_can_be_pasted(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my small model"
    assert plan("--from", artifact, "--vram", "8MB", "--out", out) == 0
    assert f"subspec-run '{out}' \"your prompt\"" in capsys.readouterr().err
    with pytest.raises(SubspecError) as caught:
        open_folder(Path("my model"))
    assert "subspec-run --model 'my model' --vram SIZE" in caught.value.hint


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


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_where_nothing_can_be_linked_weights_and_records_are_copied_if_there_is_room(
    code: int, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_links)
    opened = open_artifact(artifact)
    (artifact / RUNS).write_text("a record\n")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(artifact)._replace(free=1000)
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(SubspecError, match="has 1.00 KB") as caught:
            rebuild(opened, opened.plan, opened.profile, artifact, overwrite=True)
    assert caught.value.exit_code == Exit.RESOURCES
    rebuild(opened, opened.plan, opened.profile, artifact, overwrite=True)
    assert verify(artifact) > 0 and (artifact / RUNS).read_text() == "a record\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "none of --model REF, --from ARTIFACT and"),
        (["--model", "demo", "--from", "x"], "2 of --model REF, --from ARTIFACT and"),
        (["--model", "demo", "--print-plan"], "--print-plan was given without --from"),
        (["--model", "demo", "--reprofile"], "--reprofile was given without --from"),
        (["--from", "x", "--encoding", "raw"], "weights of an artifact stay as they are stored"),
        (["--from", "x", "--quantizer", "hqq"], "weights of an artifact stay as they are stored"),
        (["--from", "x", "--revision", "main"], "weights of an artifact stay as they are stored"),
        (["--from", "nothing"], "nothing is not a folder"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*words, "--vram", "9MB") == Exit.USAGE
    assert message in capsys.readouterr().err


def test_the_printed_plan_is_the_one_that_would_be_written_without_its_outlook(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (artifact / "plan.json").read_text()
    assert plan("--from", artifact, "--vram", "8MB", "--print-plan") == 0
    printed = capsys.readouterr().out
    assert (artifact / "plan.json").read_text() == before
    assert plan("--from", artifact, "--vram", "8MB") == 0
    written = open_artifact(artifact).plan
    assert printed == dump_json(replace(written, by_budget=(), by_context=()))


def test_an_anew_planned_artifact_has_the_plan_of_the_search(artifact: Path) -> None:
    opened = open_artifact(artifact)
    stored = Storage(tuple(opened.stored_parts()))
    kept = Constraints(encoding="kept")
    expected = fastest_plan(opened.spec, opened.profile, 8_000_000, kept, PRIOR, stored)
    assert plan("--from", artifact, "--vram", "8MB") == 0
    found = open_artifact(artifact).plan
    assert replace(found, by_budget=(), by_context=()) == expected
    assert "as in the existing artifact" in found.reasons[-1]


def test_an_artifact_that_decodes_slowly_is_planned_to_hold_some_residuals_decoded(
    artifact: Path, tmp_path: Path
) -> None:
    """By subspec-plan, and by subspec-run for a smaller cap; the tokens stay the same."""
    before = open_artifact(artifact)
    slow = tmp_path / "slow.json"
    slow.write_text(dump_json(replace(before.profile, residual_weights_per_second=1e6)))
    words = ("--width", 2, "--depth", 3, "--method", "substitute", "--profile", slow)
    words += ("--draft-min-probability", 0.05)
    assert plan("--from", artifact, "--vram", "11MB", *words) == 0
    verify(artifact)
    anew = open_artifact(artifact)
    smaller, note = fitted(anew, None, 9_000_000, None, None)
    assert "re-planned for 9.00 MB" in note
    assert smaller.plan.constraints == anew.plan.constraints
    counts = []
    for some in (anew, smaller):
        assert some.plan.residuals == before.plan.residuals
        resident = some.plan.placement("substitute").resident
        assert set(resident) <= set(some.plan.residuals)
        total = len(before.spec.parts)
        assert (
            f"; {len(resident)} of {total} parts are decoded while loading" in some.plan.reasons[-1]
        )
        assert tokens(some) == tokens(before)
        counts.append(len(resident))
    assert len(before.spec.parts) > counts[0] > counts[1] > 0


# What keeps a plan from being obeyed


PLAN = make_plan(make_spec())
PLENTY = 1 << 40
HERE = Here("cpu", PROFILE.machine, PLENTY)


def larger(plan: Plan, guard_bytes: int) -> Plan:
    """The plan with so much more in the guard of its draft, and in its budget."""
    placement = plan.placement("substitute")
    more = replace(placement, ledger=replace(placement.ledger, guard=guard_bytes))
    placements: dict[Method, Placement] = {**plan.placements, "substitute": more}
    return replace(plan, placements=placements, budget_bytes=more.ledger.total_bytes)


@pytest.mark.parametrize("vram", [None, PLAN.budget_bytes, 2 * PLAN.budget_bytes])
def test_a_plan_that_can_be_obeyed_is_left_alone(vram: int | None) -> None:
    assert mismatch(PLAN, "substitute", HERE, vram) is None


@pytest.mark.parametrize(
    ("plan", "here", "vram", "cause", "budget_bytes", "said"),
    [
        (PLAN, replace(HERE, machine="another"), None, "machine", PLAN.budget_bytes,
         f"planned on another machine ({PLAN.machine}): re-planned for this one"),
        (PLAN, replace(HERE, machine="another"), 1 << 30, "machine", 1 << 30,
         f"planned on another machine ({PLAN.machine}): re-planned for this one and 1.07 GB "
         "(1.00 GiB)"),
        (PLAN, HERE, 100_000, "budget", 100_000, "re-planned for 100.00 KB (97.66 KiB)"),
        (PLAN, replace(HERE, machine="another"), 100_000, "budget", 100_000,
         "re-planned for this one and 100.00 KB (97.66 KiB)"),
        (replace(PLAN, device="cuda", machine="cuda: card"), HERE, None, "device",
         PLAN.budget_bytes, "planned for cuda (cuda: card): re-planned for cpu"),
        (PLAN, Here("cuda:1", "cuda: card", PLENTY), None, "device", PLAN.budget_bytes,
         f"planned for cpu ({PLAN.machine}): re-planned for cuda:1"),
        (larger(PLAN, 1 << 30), replace(HERE, free_bytes=1 << 29), None, "memory", None,
         ", but only 536.87 MB (512.00 MiB) are free: re-planned for "),
        (larger(PLAN, 1 << 30), replace(HERE, free_bytes=1 << 29), 1 << 20, "memory", 1 << 20,
         ": re-planned for 1.05 MB (1.00 MiB)"),
    ],
)  # fmt: skip
def test_a_mismatch_has_a_cause_a_budget_and_a_sentence(
    plan: Plan, here: Here, vram: int | None, cause: str, budget_bytes: int | None, said: str
) -> None:
    found = mismatch(plan, "substitute", here, vram)
    assert found is not None and found.cause == cause and found.here == here
    assert budget_bytes is None or found.budget_bytes == budget_bytes
    assert said in found.said and "\n" not in found.said


def test_more_sequences_than_the_plan_has_memory_for_are_a_mismatch() -> None:
    assert mismatch(PLAN, "substitute", HERE, None, 1) is None
    larger_budget = 2 * PLAN.budget_bytes
    for vram, budget, said in (
        (None, PLAN.budget_bytes, "planned for 1 sequence: re-planned for 3 sequences"),
        (100_000, 100_000, "re-planned for 100.00 KB (97.66 KiB) and 3 sequences"),
        (larger_budget, larger_budget, " and 3 sequences"),
    ):
        found = mismatch(PLAN, "substitute", HERE, vram, 3)
        assert found is not None and found.budget_bytes == budget and said in found.said
        assert found.num_sequences == 3 and found.cause == (
            "budget" if vram == 100_000 else "sequences"
        )


def test_a_plan_for_more_sequences_has_the_budget_and_context_of_the_old_one(
    artifact: Path,
) -> None:
    before = open_artifact(artifact)
    words = planner_words(before, Mismatch("sequences", 5, before.plan.context, HERE, "", 3))
    assert words[words.index("--sequences") + 1] == "3"
    anew, note = fitted(before, None, None, "cpu", None, sequences=3)
    assert anew.plan.num_sequences == 3 and "re-planned for 3 sequences; to keep that: " in note
    assert (anew.plan.budget_bytes, anew.plan.context) == (
        before.plan.budget_bytes, before.plan.context,
    )  # fmt: skip
    again, _ = fitted(before, None, None, "cpu", None, sequences=3)  # from the cache
    assert again.plan == anew.plan


def test_the_context_is_kept_unless_the_budget_shrinks() -> None:
    elsewhere = replace(PLAN, machine=ELSEWHERE)
    for vram, context in ((None, PLAN.context), (100_000, None)):
        found = mismatch(elsewhere, "substitute", HERE, vram)
        assert found is not None and found.context == context


def test_a_little_more_or_less_free_memory_asks_for_the_same_plan() -> None:
    plan = larger(PLAN, 1 << 30)
    budgets = set()
    for free in range(1 << 29, (1 << 29) + (1 << 24), 1 << 22):
        found = mismatch(plan, "substitute", replace(HERE, free_bytes=free), None)
        assert found is not None and 0.9 * free < found.budget_bytes < 0.97 * free
        budgets.add(found.budget_bytes)
    assert len(budgets) <= 2


def test_a_budget_far_beyond_this_memory_is_replanned_for_what_is_free() -> None:
    for free in (10**9, 24 * 10**9):
        found = mismatch(larger(PLAN, 1 << 50), "substitute", replace(HERE, free_bytes=free), None)
        assert found is not None and 0.9 * free < found.budget_bytes < 0.97 * free


def test_of_a_cramped_machine_at_least_something_is_asked() -> None:
    found = mismatch(PLAN, "substitute", replace(HERE, free_bytes=1), None)
    assert found is not None and found.budget_bytes == PLAN.budget_bytes // 32


def test_only_the_method_that_runs_must_fit() -> None:
    plan, here = larger(PLAN, 1 << 30), replace(HERE, free_bytes=1 << 29)
    assert mismatch(plan, "plain", here, None) is None


def test_what_a_gpu_has_given_to_the_process_already_is_not_asked_of_it_again() -> None:
    plan = larger(replace(PLAN, device="cuda"), 0)
    placement = plan.placement("substitute")
    with_overhead = replace(placement, ledger=replace(placement.ledger, overhead=1 << 30))
    placements: dict[Method, Placement] = {**plan.placements, "substitute": with_overhead}
    plan = replace(plan, placements=placements, budget_bytes=1 << 31)
    here = Here("cuda", plan.machine, placement.ledger.total_bytes)
    assert mismatch(plan, "substitute", here, None) is None
    found = mismatch(plan, "substitute", replace(here, free_bytes=here.free_bytes - 1), None)
    assert found is not None and found.cause == "memory" and found.budget_bytes > 0.9 * (1 << 30)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_there_is_no_gpu_its_plans_go_to_the_cpu_unless_one_was_asked_for() -> None:
    for plan in (PLAN, replace(PLAN, device="cuda")):
        here = look_around(plan, None)
        assert here is not None and (here.device, here.machine) == ("cpu", PROFILE.machine)
        assert here.free_bytes > 1 << 24
        assert look_around(plan, "cuda:1") is None


# What is kept in the user's cache


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_cache(tmp_path_factory.mktemp("cache"), monkeypatch) / "plans"


@pytest.fixture
def smaller() -> Mismatch:
    return Mismatch("budget", 8_000_000, None, HERE, "")


def test_an_entry_is_the_text_of_a_plan_and_is_read_back(artifact: Path, cache: Path) -> None:
    opened = open_artifact(artifact)
    found = Mismatch("machine", opened.plan.budget_bytes, None, HERE, "")
    assert user_cache_dir("plans") == cache
    entry = cache / "entry.json"
    write_entry(entry, opened.plan)
    assert entry.read_bytes() == (artifact / "plan.json").read_bytes()
    assert [path.name for path in cache.iterdir()] == ["entry.json"]
    assert read_entry(entry, opened, found) == opened.plan


def test_an_entry_that_is_damaged_or_of_another_plan_is_not_taken(
    artifact: Path, cache: Path
) -> None:
    opened = open_artifact(artifact)
    plan = opened.plan
    found = Mismatch("machine", plan.budget_bytes, None, HERE, "")
    folder = user_cache_dir("plans")
    assert folder is not None
    entry = folder / "entry.json"
    text = dump_json(plan)
    broken = [
        text[: len(text) // 2],
        text.replace('"width": 2', '"width": 2000'),
        text.replace('"context"', '"contxt"'),
        dump_json(replace(plan, machine=ELSEWHERE)),
        dump_json(replace(plan, device="cuda")),
        dump_json(replace(plan, budget_bytes=plan.budget_bytes + 1)),
        "",
    ]
    for one in broken:
        entry.write_text(one)
        assert read_entry(entry, opened, found) is None
    entry.unlink()
    assert read_entry(entry, opened, found) is None
    os.mkfifo(entry)
    assert read_entry(entry, opened, found) is None


def test_an_entrys_name_depends_on_all_that_its_plan_does(
    artifact: Path, smaller: Mismatch
) -> None:
    opened = open_artifact(artifact)
    names = [
        entry_name(opened, smaller, None),
        entry_name(opened, smaller, 40_000_000),
        entry_name(opened, replace(smaller, budget_bytes=7_000_000), None),
        entry_name(opened, replace(smaller, here=replace(HERE, machine=ELSEWHERE)), None),
        entry_name(opened, replace(smaller, here=replace(HERE, device="cuda:1")), None),
        entry_name(replace(opened, plan=replace(opened.plan, context=200)), smaller, None),
    ]
    with (artifact / "manifest.json").open("a") as file:
        file.write("\n")
    names.append(entry_name(opened, smaller, None))
    assert len(set(names)) == len(names)
    assert all(len(name) == 64 + len(".json") for name in names)
    elsewhere = replace(smaller, here=replace(HERE, free_bytes=1), said="", cause="memory")
    assert entry_name(opened, elsewhere, None) == names[-1]


def test_the_entries_that_were_used_longest_ago_make_room(artifact: Path, cache: Path) -> None:
    opened = open_artifact(artifact)
    found = Mismatch("machine", opened.plan.budget_bytes, None, HERE, "")
    assert user_cache_dir("plans") == cache
    for index in range(70):
        write_entry(cache / f"{index}.json", opened.plan)
        os.utime(cache / f"{index}.json", (index, index))
    assert len(list(cache.iterdir())) == 64
    assert read_entry(cache / "6.json", opened, found) == opened.plan
    write_entry(cache / "last.json", opened.plan)
    left = {path.name for path in cache.iterdir()}
    assert len(left) == 64 and {"6.json", "last.json"} < left and "7.json" not in left


def test_a_cache_that_cannot_be_written_is_no_error(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_entry(tmp_path / "no" / "folder" / "entry.json", PLAN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(artifact / "plan.json"))
    assert user_cache_dir("plans") is None


# As a person meets it


def moved(folder: Path, measured_here: bool) -> Path:
    """The artifact as if it came from another machine, or only its plan did."""
    opened = open_artifact(folder)
    profile = opened.profile if measured_here else replace(opened.profile, machine=ELSEWHERE)
    rebuild(opened, replace(opened.plan, machine=ELSEWHERE), profile, folder, overwrite=True)
    return folder


def words(artifact: Path, *more: object) -> tuple[object, ...]:
    return (artifact, "def main():", "--raw", "--max-tokens", 4, "--json", *more)


def notes(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("note: ")]


def test_a_smaller_cap_is_kept_on_the_fly_and_solved_only_once(
    artifact: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
) -> None:
    before = (artifact / "plan.json").read_bytes()
    ended = run(capsys, *words(artifact, "--vram", "7MB"))
    assert ended.exit_code == 0, ended.err
    stats = json.loads(ended.out)["stats"]
    assert stats["budget_bytes"] == 7_000_000 >= stats["fast_peak_bytes"]
    [note] = notes(ended.err)
    assert "re-planned for 7.00 MB" in note
    assert f"subspec-plan --from {artifact} --vram 7000000B --device cpu" in note
    assert (artifact / "plan.json").read_bytes() == before

    monkeypatch.setattr(planner_command, "PLANNER", NO_PLANNER)
    again = run(capsys, *words(artifact, "--vram", "7MB"))
    assert again.exit_code == 0, again.err
    assert json.loads(again.out)["token_ids"] == json.loads(ended.out)["token_ids"]
    assert notes(again.err) == [note]

    [entry] = cache.iterdir()
    entry.write_text("{")
    broken = run(capsys, *words(artifact, "--vram", "7MB"))
    assert broken.exit_code == Exit.UNEXPECTED
    assert "subspec-plan cannot be started: No such file" in broken.err


def test_a_plan_of_another_machine_is_solved_again_with_one_line(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine is measured, once."""
    moved(artifact, measured_here=False)
    planned = open_artifact(artifact).plan
    ended = run(capsys, *words(artifact))
    assert ended.exit_code == 0, ended.err
    [note] = notes(ended.err)
    assert note.startswith(
        f"note: planned on another machine ({ELSEWHERE}): re-planned for this one; to keep that: "
        f"subspec-plan --from {artifact} --vram {planned.budget_bytes}B --device cpu"
    )
    monkeypatch.setattr(planner_command, "PLANNER", NO_PLANNER)
    again = run(capsys, *words(artifact))
    assert notes(again.err) == [note]
    assert json.loads(again.out)["token_ids"] == json.loads(ended.out)["token_ids"]
    assert open_artifact(artifact).plan == planned


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_plan_for_a_gpu_runs_on_the_cpu_where_there_is_none(artifact: Path) -> None:
    opened = open_artifact(moved(artifact, measured_here=True))
    found, note = fitted(
        replace(opened, plan=replace(opened.plan, device="cuda")), None, 9_000_000, None, None
    )
    assert (found.plan.device, found.plan.budget_bytes) == ("cpu", 9_000_000)
    assert found.plan.machine == PROFILE.machine
    assert "re-planned for cpu and 9.00 MB" in note
    assert len(tokens(found)) == 12


def test_a_plan_for_more_than_is_free_is_solved_again_for_what_is(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 500_000_000
    monkeypatch.setattr(replan, "free_host_bytes", lambda: free)
    opened = open_artifact(artifact)
    large = replace(opened, plan=larger(opened.plan, 2 * free))
    found, note = fitted(large, None, None, None, None)
    assert 0 < found.plan.budget_bytes < free
    assert ", but only " in note and " are free: re-planned for " in note
    assert len(tokens(found)) == 12


def test_a_context_that_shrank_is_said_so(artifact: Path, cache: Path) -> None:
    opened = open_artifact(artifact)
    opened = replace(opened, plan=replace(opened.plan, budget_bytes=20_000_000))
    here = look_around(opened.plan, None)
    assert here is not None and user_cache_dir("plans") == cache
    found = mismatch(opened.plan, "substitute", here, 19_000_000)
    assert found is not None
    kept = replace(opened.plan, context=200, budget_bytes=19_000_000)
    write_entry(cache / entry_name(opened, found, None), kept)
    _, note = fitted(opened, None, 19_000_000, None, None)
    assert ", context 200 tokens instead of 256; to keep that: subspec-plan --from " in note


def test_where_no_plan_fits_what_is_free_that_is_the_error(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner_command, "PLANNER", INFEASIBLE)
    opened = open_artifact(artifact)
    large = replace(opened, plan=larger(opened.plan, 2 * free_host_bytes()))
    with pytest.raises(
        SubspecError, match="only .* are free: the smallest plan needs more"
    ) as caught:
        fitted(large, None, None, None, None)
    assert caught.value.exit_code == Exit.INFEASIBLE
    assert "close other programs" in caught.value.hint


@pytest.mark.parametrize(
    ("planner", "why"),
    [(NO_PLANNER, "subspec-plan cannot be started"), (INFEASIBLE, "the smallest plan needs more")],
)
def test_a_plan_of_another_machine_is_obeyed_where_there_is_no_other(
    artifact: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    planner: tuple[str, ...],
    why: str,
) -> None:
    moved(artifact, measured_here=True)
    monkeypatch.setattr(planner_command, "PLANNER", planner)
    ended = run(capsys, *words(artifact))
    assert ended.exit_code == 0
    failed, obeyed = notes(ended.err)
    assert why in failed and "using the stored plan" in failed
    assert obeyed.startswith(f"note: planned on ({ELSEWHERE}), running on (cpu: ")


def test_without_replanning_the_stored_plan_is_obeyed_with_a_note(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved(artifact, measured_here=True)
    monkeypatch.setattr(planner_command, "PLANNER", NO_PLANNER)
    ended = run(capsys, *words(artifact, "--no-replan"))
    assert ended.exit_code == 0
    [note] = notes(ended.err)
    assert note.startswith(f"note: planned on ({ELSEWHERE}), running on (cpu: ")


def test_a_cap_that_no_plan_keeps_ends_with_the_planners_words(
    artifact: Path, smaller: Mismatch
) -> None:
    with pytest.raises(SubspecError, match="the smallest plan needs") as caught:
        planned_anew(open_artifact(artifact), replace(smaller, budget_bytes=1_000_000), None)
    assert caught.value.exit_code == Exit.INFEASIBLE
    assert caught.value.hint.startswith("--vram ")


def test_a_link_that_is_slowed_down_is_planned_for(artifact: Path, smaller: Mismatch) -> None:
    opened, less = open_artifact(artifact), replace(smaller, budget_bytes=7_000_000)
    plans = [planned_anew(opened, less, link) for link in (None, 20_000_000)]
    free, slow = (plan.predicted["plain"] for plan in plans)
    assert slow.stream_seconds == pytest.approx(slow.streamed_bytes / 20e6)
    assert slow.stream_seconds > 2 * free.stream_seconds


def test_a_planner_that_dies_is_reported_with_its_last_words() -> None:
    for printed in ("", "{", '{"schema": "subspec.error/2"}', json.dumps({**REFUSAL, "more": 1})):
        error = planners_error(-9, printed, "Traceback\nKilled")
        assert error.exit_code == Exit.UNEXPECTED
        assert error.message == "subspec-plan ended with code -9: Killed"
    assert planners_error(-9, "", "").message == "subspec-plan ended with code -9: "


def test_an_exit_code_that_is_none_of_ours_is_unexpected() -> None:
    error = {**REFUSAL["error"], "exit": 77}  # type: ignore[dict-item]
    found = planners_error(77, json.dumps({**REFUSAL, "error": error}), "last words")
    assert found.exit_code == Exit.UNEXPECTED and found.message.endswith("77: last words")


def test_what_the_user_fixed_is_asked_for_again(artifact: Path, smaller: Mismatch) -> None:
    opened = open_artifact(artifact)
    fixed = Constraints(context=200, width=2, depth=3, num_sequences=3, min_path_probability=0.05)
    asked = planner_words(replace(opened, plan=replace(opened.plan, constraints=fixed)), smaller)
    words = " ".join(asked)
    assert words.startswith(f"--from {artifact} --vram 8000000B --device cpu ")
    for expected in ("--width 2", "--depth 3", "--sequences 3", "--draft-min-probability 0.05"):
        assert expected in words
    assert "--context" not in words  # the artifact's plan says it
