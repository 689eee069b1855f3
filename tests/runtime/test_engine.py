"""An engine: its memory is the ledger's, an open that fails leaves nothing, its sequences share."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import build_artifact, converted, demo_checkpoint, random_checkpoint, replan
from families import FAMILIES, config_of
from running import answer, generated

from subspec.artifacts.common import cpu_load
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import DrafterName, Int4Kernel, Ledger, Method
from subspec.planner.model.hub import DEMO
from subspec.runtime import open_model
from subspec.runtime.device import machine_name
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.kernels import bf16, int4
from subspec.runtime.load import ArtifactWeights
from subspec.runtime.lossy import Lossy
from subspec.runtime.memory import FastMemory
from subspec.runtime.model import attention
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.programs import needed_kernels
from subspec.runtime.sequence import GenerationParams, Sequence
from subspec.runtime.stream.ring import Ring

PROMPT = list(range(10, 50))
METHODS: tuple[Method, ...] = ("substitute", "plain")
FASTEST: Int4Kernel = "aten" if int4.unavailable() else "w4a8"
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, top_k=40)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_artifact(DEMO, tmp_path_factory.mktemp("engine") / "artifact")


# Memory


def temporary_bytes(engine: Engine, prompt_tokens: int) -> int:
    """Of the widest passes: a prompt, and rounds of all sequences of the plan, with sampling.

    The first round of each number of sequences is watched, and one that a doubled cache follows.
    """
    prompt = [5 + i % 1000 for i in range(prompt_tokens)]
    sequences = [engine.new_sequence() for _ in range(engine.plan.num_sequences)]
    for index, sequence in enumerate(sequences):
        sequence.begin(prompt, GenerationParams(3, replace(SAMPLED, seed=index)))
    while engine.step():
        pass
    for sequence in sequences:
        sequence.close()
    return engine.peak.peak_bytes - engine.memory.arena_bytes


@pytest.mark.parametrize("num_sequences", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "plan",
    [
        {"width": 1, "depth": 7, "resident_share": 0.0, "context": 256},
        {"width": 8, "depth": 3, "resident_share": 0.6, "context": 1024},
        {"width": 4, "depth": 14, "resident_share": 1.0, "context": 512, "int4_kernel": FASTEST},
    ],
    ids=str,
)
def test_measured_memory_stays_within_the_ledger(
    dtype: torch.dtype, plan: dict[str, Any], num_sequences: int, tmp_path: Path
) -> None:
    """Arenas are the ledger's by construction; temporaries are measured."""
    folder = demo_checkpoint(tmp_path / "model", dtype)
    built = build_artifact(folder, tmp_path / "artifact")
    artifact = replan(built, num_sequences=num_sequences, **plan)
    for method in METHODS:
        with Engine.open(artifact, OpenOptions(method)) as engine:
            temporaries = temporary_bytes(engine, plan["context"] - 3)
            unused = {name: arena.numel() for name, arena in engine.memory._free.items()}
            assert max(unused.values()) == 0, f"the ledger grants more than is used: {unused}"
            workspace = engine.placement.ledger.workspace
            assert temporaries <= workspace
            assert engine.peak.peak_bytes <= artifact.plan.budget_bytes
            assert temporaries >= 0.4 * workspace, "the estimate wastes memory"


@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [
        (torch.bfloat16, FASTEST),
        pytest.param(torch.float32, "aten", marks=pytest.mark.slow),
    ],
    ids=["bfloat16", "float32"],
)
@pytest.mark.parametrize("case", FAMILIES)
def test_three_sequences_of_every_family_stay_within_the_ledger(
    case: str, dtype: torch.dtype, kernel: Int4Kernel, tmp_path: Path
) -> None:
    config = config_of(case)
    folder = random_checkpoint(tmp_path / "float32", config)
    checkpoint = converted(folder, tmp_path / "converted", dtype)
    # Beyond a context of 128 longrope has other frequencies.
    settings: dict[str, Any] = {
        "width": 3, "depth": 5, "num_sequences": 3, "resident_share": 0.3, "context": 128,
    }  # fmt: skip
    out = tmp_path / "artifact"
    artifact = build_artifact(checkpoint, out, "residual", int4_kernel=kernel, **settings)
    with Engine.open(artifact) as engine:
        temporaries = temporary_bytes(engine, 125)
        unused = {name: arena.numel() for name, arena in engine.memory._free.items()}
        assert max(unused.values()) == 0, unused
        assert temporaries <= engine.placement.ledger.workspace


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_fast_memory_is_zeros_and_is_given_back_whoever_still_knows_of_it() -> None:
    before = resident_bytes()
    memory = FastMemory(torch.device("cpu"), Ledger(cache=64 << 20, resident=5000, guard=9))
    known = memory.take("cache", 64 << 20)
    assert not known.any() and resident_bytes() - before > 60 << 20
    known.fill_(7)
    memory.release()
    assert resident_bytes() - before < 8 << 20
    assert memory.arena_bytes == (64 << 20) + 5000


def test_a_closed_engine_leaves_room_for_the_next(artifact: Artifact) -> None:
    """Also while a variable still holds it, as after a `with`."""
    with Engine.open(replan(artifact, context=4096)) as engine:
        answer(engine, PROMPT, 4)
        arenas = engine.memory.arena_bytes
        before = resident_bytes()
    assert before - resident_bytes() > 0.8 * arenas > 8 << 20
    assert engine.peak.peak_bytes > arenas, "what it was is still known"


# Opening


def open_files(folder: Path) -> list[str]:
    """Those of the folder that this process has open."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    paths = [os.readlink(link) for link in links if link.is_symlink()]
    return [path for path in paths if path.startswith(str(folder))]


def readers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "subspec-reader"}


Failing = tuple[Any, str]
FAILURES: dict[str, Failing] = {
    "before the memory": (open_model, "FastMemory"),
    "before the embedding": (ArtifactWeights, "open_embedding"),
    "at a norm": (ArtifactWeights, "read_tensor"),
    "at a substitute": (ArtifactWeights, "read_substitute"),
    "at an exact weight": (ArtifactWeights, "read_stored"),
    "before the ring": (ArtifactWeights, "open_ring"),
    "at a digest": (ArtifactWeights, "finish"),
    "behind the ring": (open_model, "ExactWeights"),
    "at a cache": (open_model, "make_cache"),
    "at the draft": (open_model, "SubstituteDrafter"),
}


@pytest.mark.parametrize("where", FAILURES)
@pytest.mark.parametrize("error", [SubspecError(Exit.CORRUPT, "it failed"), KeyboardInterrupt()])
def test_an_open_that_fails_closes_what_it_opened(
    where: str, error: BaseException, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    owner, name = FAILURES[where]
    large = replan(artifact, context=16384)
    before, readers_before = resident_bytes(), readers()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(type(error)):
            Engine.open(large)
    assert open_files(artifact.path) == [] and readers() <= readers_before
    cache = large.plan.placements["substitute"].ledger.cache
    assert resident_bytes() - before < cache // 2 > 16 << 20
    with Engine.open(artifact) as engine:
        assert len(answer(engine, PROMPT, 3)) == 3


def test_threads_that_loaded_weights_end_with_the_loading(artifact: Artifact) -> None:
    """They have run torch, and would keep OpenMP threads that make every barrier slow."""

    def digests() -> set[threading.Thread]:
        return {one for one in threading.enumerate() if one.name.startswith("subspec-digest")}

    before = digests()
    with Engine.open(artifact):
        assert digests() <= before


def test_an_unknown_method_is_an_error(artifact: Artifact) -> None:
    with pytest.raises(SubspecError, match="no room for the method 'eagle'") as caught:
        Engine.open(artifact, OpenOptions(method="eagle"))  # type: ignore[arg-type]
    assert caught.value.exit_code == Exit.INFEASIBLE


def test_a_method_without_a_placement_is_infeasible(artifact: Artifact) -> None:
    only_plain = {"plain": artifact.plan.placements["plain"]}
    plan = replace(artifact.plan, method="plain", placements=only_plain)  # type: ignore[arg-type]
    with pytest.raises(SubspecError, match="no room for the method 'substitute'"):
        Engine.open(replace(artifact, plan=plan), OpenOptions("substitute"))


def test_a_plan_for_a_gpu_says_so_where_there_is_none(artifact: Artifact) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SubspecError) as caught:
        Engine.open(replan(artifact, device="cuda"))
    assert caught.value.exit_code == Exit.WRONG_MACHINE


def test_a_budget_larger_than_the_free_memory_is_refused_before_loading(
    artifact: Artifact,
) -> None:
    placement = artifact.plan.placements["substitute"]
    huge = replace(placement, ledger=replace(placement.ledger, guard=1 << 50))
    plan = replace(artifact.plan, placements={"substitute": huge})
    with pytest.raises(SubspecError) as caught:
        Engine.open(replace(artifact, plan=plan))
    assert caught.value.exit_code == Exit.RESOURCES


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan")])
def test_a_link_is_not_slowed_to_nothing(bandwidth: float) -> None:
    with pytest.raises(SubspecError, match="link_bandwidth is .*, expected more than 0"):
        OpenOptions(link_bandwidth=bandwidth)


def test_only_plain_decoding_is_ever_unpadded(artifact: Artifact) -> None:
    for method, padded in (("substitute", True), ("plain", False)):
        with Engine.open(artifact, OpenOptions(method, padded=False)) as engine:  # type: ignore[arg-type]
            assert engine.padded == padded


def test_a_path_is_opened_as_its_artifact(artifact: Artifact) -> None:
    said = []
    for given in (artifact, artifact.path, str(artifact.path)):
        with Engine.open(given) as engine:
            said.append(answer(engine, PROMPT, 5))
    assert said[0] == said[1] == said[2]


# Kernels and machines


@pytest.mark.parametrize(
    ("kernel", "residuals", "method", "sources"),
    [
        ("aten", (), "substitute", {"attention"}),
        ("aten", ("a part",), "plain", {"attention", "residual"}),
        ("w4a8", (), "plain", {"attention"}),
        ("w4a8", ("a part",), "plain", {"attention", "residual", "int4"}),
        ("w4a8", (), "substitute", {"attention", "int4", "draft_layers"}),
    ],
)
def test_only_kernels_that_the_method_calls_are_built(
    kernel: Int4Kernel, residuals: tuple[str, ...], method: Method, sources: set[str],
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Residuals are decoded over the layout of the 4-bit kernel, whoever drafts; products of bf16
    are ours where the processor has no instructions for them."""
    plan = replace(artifact.plan, int4_kernel=kernel, residuals=residuals)
    for native in (True, False):
        monkeypatch.setattr(bf16, "is_native", lambda native=native: native)
        needed = {source.stem for source, _ in needed_kernels(artifact.spec, plan, method)}
        assert needed == sources | (set() if native else {"bf16"})


def test_where_kernels_cannot_be_built_plain_twins_decode_within_the_ledger(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = replan(artifact, width=4, depth=14, num_sequences=3)
    with Engine.open(shared) as engine:
        assert engine.missing_kernels_reason is None
        expected = answer(engine, PROMPT, 12)
    for kernel in (attention, bf16):
        monkeypatch.setattr(kernel, "unavailable", lambda: "there is no C++ compiler")
    said = []
    for method in METHODS:
        with Engine.open(shared, OpenOptions(method)) as engine:
            assert engine.missing_kernels_reason == "there is no C++ compiler"
            said.append(answer(engine, PROMPT, 12))
            workspace = engine.placement.ledger.workspace
            assert 0.4 * workspace <= temporary_bytes(engine, 253) <= workspace
    assert said[0] == said[1]
    assert said[0][:4] == expected[:4]  # near-ties may round otherwise


def test_the_name_of_a_machine_does_not_depend_on_what_an_engine_sets() -> None:
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    name = machine_name(cpu)
    try:
        torch.set_num_threads(threads + 1)
        assert machine_name(cpu) == name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process has no set of its own")
def test_the_name_of_a_machine_counts_the_cpus_that_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_load, "own_groups", lambda controller: [])  # no quota grants fewer
    usable = os.sched_getaffinity(0)
    assert f", {len(usable)} cpus; torch " in machine_name(torch.device("cpu"))
    try:
        os.sched_setaffinity(0, {min(usable)})
        assert ", 1 cpus; torch " in machine_name(torch.device("cpu"))
    finally:
        os.sched_setaffinity(0, usable)


def test_the_name_of_a_machine_counts_the_cpus_that_a_quota_grants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(cpu_load, "own_groups", lambda controller: [Path("a group")])
    monkeypatch.setattr(cpu_load, "cpu_quota", lambda folder: 2.5)
    assert ", 3 cpus; torch " in machine_name(torch.device("cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process has no set of its own")
@pytest.mark.parametrize(
    "binding",
    [{"OMP_PROC_BIND": "true"}, {"OMP_PLACES": "cores"}, {"GOMP_CPU_AFFINITY": "0"}],
    ids=str,
)
def test_bindings_of_openmp_threads_do_not_take_cpus_away(binding: dict[str, str]) -> None:
    code = (
        "import os; before = os.sched_getaffinity(0); from subspec.artifacts.native import cpp; "
        "assert os.sched_getaffinity(0) == before, os.sched_getaffinity(0)"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | binding, check=True)


def test_two_engines_of_one_process_do_not_disturb_each_other(artifact: Artifact) -> None:
    """Plans of other numbers of threads: a result's bits depend on it."""
    plans = [replan(artifact, width=2, depth=3, num_threads=count) for count in (1, 2)]
    expected = []
    for plan in plans:
        with Engine.open(plan) as engine:
            expected.append(answer(engine, PROMPT, 16))
    with Engine.open(plans[0]) as first, Engine.open(plans[1]) as second:
        with first.new_sequence() as one, second.new_sequence() as two:
            one.begin(PROMPT, GenerationParams(16))
            first.step()
            assert torch.get_num_threads() == 1
            two.begin(PROMPT, GenerationParams(16))
            second.step()
            assert torch.get_num_threads() == 2
            while first.step():
                assert torch.get_num_threads() == 1
                second.step()
            while second.step():
                pass
            assert [one.take_new_tokens(), two.take_new_tokens()] == expected
    torch.set_num_threads(1)


# Sequences of one engine


def test_a_plan_of_one_sequence_has_one_at_a_time(artifact: Artifact) -> None:
    with Engine.open(artifact) as engine:
        one = engine.new_sequence()
        with pytest.raises(SubspecError, match="all 1 sequences of the plan are in use") as caught:
            engine.new_sequence()
        assert caught.value.exit_code == Exit.RESOURCES
        one.close()
        with engine.new_sequence() as another:
            assert len(generated(another, PROMPT, GenerationParams(3))) == 3


def test_closing_a_sequence_twice_gives_its_cache_back_once(artifact: Artifact) -> None:
    with Engine.open(replan(artifact, num_sequences=2)) as engine:
        one = engine.new_sequence()
        one.close()
        one.close()
        first, second = engine.new_sequence(), engine.new_sequence()
        one.close()
        assert first.cache is not second.cache
        with pytest.raises(SubspecError, match="all 2 sequences"):
            engine.new_sequence()


def test_a_step_without_answers_does_nothing(artifact: Artifact) -> None:
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        assert not engine.step()
        sequence.begin(PROMPT, GenerationParams(2))
        assert engine.step() and engine.step() and not engine.step()
        assert len(sequence.take_new_tokens()) == 2


def test_a_closed_engine_answers_no_more(artifact: Artifact) -> None:
    """Its memory is gone: zeros would give tokens too."""
    with Engine.open(replan(artifact, num_sequences=2)) as engine:
        sequence = engine.new_sequence()
        rounds = sequence.generate(PROMPT, GenerationParams(30))
        next(rounds)
    uses: tuple[Callable[[], object], ...] = (
        engine.step,
        engine.new_sequence,
        lambda: next(rounds),
        lambda: sequence.begin(PROMPT, GenerationParams(3)),
    )
    for use in uses:
        with pytest.raises(SubspecError, match="the engine is closed"):
            use()
    engine.close()


def begun(engine: Engine, count: int, num_tokens: int) -> list[Sequence]:
    sequences = [engine.new_sequence() for _ in range(count)]
    for index, sequence in enumerate(sequences):
        sequence.begin([20 + index, *PROMPT], GenerationParams(num_tokens))
    return sequences


def finished(engine: Engine, sequences: list[Sequence]) -> list[list[int]]:
    while engine.step():
        pass
    return [sequence.take_new_tokens() for sequence in sequences]


def test_sequences_share_unpadded_passes_too(artifact: Artifact) -> None:
    """The fastest plain decoding: a row's bits do not depend on the other sequences' rows."""
    shared = replan(artifact, num_sequences=3)
    with Engine.open(shared, OpenOptions("plain", padded=False)) as engine:
        alone = [answer(engine, [20 + index, *PROMPT], 24) for index in range(3)]
        assert finished(engine, begun(engine, 3, 24)) == alone


@pytest.mark.parametrize("method", METHODS)
def test_a_round_that_is_interrupted_anywhere_is_done_again_with_the_same_tokens(
    method: Method, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at some layer, in the middle of a stream, with three sequences decoding."""
    shared = replan(artifact, width=2, depth=3, num_sequences=3, resident_share=0.3)
    with Engine.open(shared, OpenOptions(method)) as engine:
        expected = finished(engine, begun(engine, 3, 24))
    with Engine.open(shared, OpenOptions(method)) as engine:
        sequences, real = begun(engine, 3, 24), Ring.take
        for takes in (0, 1, 5, 11):
            left = takes

            def take(ring: Ring, name: str) -> torch.Tensor:
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return real(ring, name)

            with monkeypatch.context() as patch:
                patch.setattr(Ring, "take", take)
                with pytest.raises(KeyboardInterrupt):
                    engine.step()
            assert engine.step()
        assert finished(engine, sequences) == expected


def test_an_error_of_one_answers_cut_ends_that_answer_alone(artifact: Artifact) -> None:
    calls = 0

    def fail_late(tokens: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise ValueError("the caller's own mistake")

    shared = replan(artifact, num_sequences=3)
    with Engine.open(shared) as engine:
        expected = finished(engine, begun(engine, 3, 24))
    with Engine.open(shared) as engine:
        first, failing, last = begun(engine, 3, 24)
        failing.begin([21, *PROMPT], GenerationParams(24, stopping_criteria=fail_late))
        assert engine.step() and engine.step()
        with pytest.raises(ValueError, match="own mistake"):
            engine.step()
        assert failing.finish_reason is None and not engine.is_active(failing)
        kept = failing.take_new_tokens()
        assert kept == expected[1][: len(kept)]
        assert finished(engine, [first, last]) == [expected[0], expected[2]]
        assert generated(failing, [21, *PROMPT], GenerationParams(24)) == expected[1]


def test_a_damaged_block_ends_the_round_of_all_who_would_read_it(
    artifact: Artifact, tmp_path: Path
) -> None:
    import shutil

    copy = replace(artifact, path=Path(shutil.copytree(artifact.path, tmp_path / "copy")))
    with open(copy.path / "exact.safetensors", "r+b") as file:
        last = copy.part_entries()[copy.stored_parts()[-1].name]
        file.seek(last.offset + 100)
        file.write(bytes(200))
    with Engine.open(replan(copy, resident_share=0.0, num_sequences=2)) as engine:
        first, second = engine.new_sequence(), engine.new_sequence()
        for sequence in (first, second, first):
            with pytest.raises(SubspecError, match="digest") as caught:
                generated(sequence, PROMPT, GenerationParams(5))
            assert caught.value.exit_code == Exit.CORRUPT
            assert not engine.is_active(sequence) and sequence.take_new_tokens() == []


def test_a_disk_that_fails_in_company_ends_every_answer(artifact: Artifact, tmp_path: Path) -> None:
    import shutil

    copy = replace(artifact, path=Path(shutil.copytree(artifact.path, tmp_path / "copy")))
    with Engine.open(replan(copy, resident_share=0.0, num_sequences=3)) as engine:
        sequences = begun(engine, 3, 24)
        engine.step()
        os.truncate(copy.path / "exact.safetensors", 1 << 20)
        for _ in range(3):
            with pytest.raises(SubspecError, match="exact.safetensors ends at byte"):
                while True:
                    engine.step()
        assert all(sequence.finish_reason is None for sequence in sequences)


@pytest.mark.parametrize(
    ("drafter", "proposed", "predicted"),
    [
        (None, (), True),
        ("substitute", (0, 0), True),
        ("substitute+lookup", (0, 0), True),
        ("substitute+lookup", (0, 2), False),  # levels that took no pass
        ("substitute+draft-model", (1, 2), True),  # the plan reckons with them
    ],
)
def test_plans_predict_answers_in_which_nothing_was_looked_up(
    drafter: DrafterName | None, proposed: tuple[int, ...], predicted: bool
) -> None:
    engine: Any = SimpleNamespace(drafter=drafter, uses_planned_drafter=True)
    stats = SimpleNamespace(proposed=proposed)
    sequence: Any = SimpleNamespace(stats=stats, params=SimpleNamespace(lossy=None))
    assert Engine.is_predicted_by_plan(engine, sequence) == predicted
    sequence.params.lossy = Lossy()
    assert not Engine.is_predicted_by_plan(engine, sequence)


@pytest.mark.parametrize(
    ("drafter", "temperature", "predicted"),
    [
        ("substitute", None, True),
        ("substitute", 0.5, False),
        ("lookup", None, False),
        (None, 0.5, True),  # it has nothing to rank
    ],
)
def test_plans_predict_drafts_at_their_own_temperature(
    drafter: DrafterName | None, temperature: float | None, predicted: bool
) -> None:
    engine: Any = SimpleNamespace(
        drafter=drafter, method="substitute", draft_temperature=temperature
    )
    assert Engine.uses_planned_drafter.fget(engine) == predicted  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("drafter", "method", "used"),
    [("substitute", None, 0.5), ("substitute+lookup", None, 0.5), ("lookup", None, None),
     (None, "plain", None)],
)  # fmt: skip
def test_an_engine_has_no_draft_temperature_if_nothing_ranks_its_tokens(
    artifact: Artifact, drafter: DrafterName | None, method: Method | None, used: float | None
) -> None:
    options = OpenOptions(method, drafter, draft_temperature=0.5)
    with Engine.open(artifact, options) as engine:
        assert engine.draft_temperature == used
