"""gemlite's use of a GPU's memory, with a double of its product: a plan that drafts with it tunes
while fast memory is free, and is made only for shapes that it reads no further than it may."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_artifact, random_checkpoint, replan
from families import FAMILIES
from heads import eagle_checkpoints
from simcuda.answering import PROMPT
from simcuda.device import simulated
from simcuda.kernels import unpack_gemlite
from simcuda.simulation import Simulation
from simcuda.tensors import is_sim
from torch import Tensor
from toys import make_spec

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.footprint import substitutes_bytes
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import Source
from subspec.artifacts.plan import DrafterName
from subspec.artifacts.profile import Timing
from subspec.planner.machine import microbench
from subspec.planner.machine.microbench import Bench
from subspec.planner.machine.timing import Effort
from subspec.planner.model.hub import Resolved
from subspec.planner.planning import DraftModelRef
from subspec.planner.rehearse.rehearsal import AT_ONCE, HEAD_TREES
from subspec.planner.rehearse.replay import WIDTHS
from subspec.runtime import load
from subspec.runtime.draft import drafter, hierarchical
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.kernels import gemlite_kernel
from subspec.runtime.kernels.gemlite_kernel import GemliteWeight, unavailable
from subspec.runtime.programs import most_draft_rows
from subspec.runtime.sequence import GenerationParams

FLUSHED_BYTES = 256 << 20  # by triton.testing.do_bench, before each call that it times
ROWS_RESTORED = 4  # up to so many rows the kernel adds to its output: the codes are cloned as well
BOUNDS = (1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # M_MAPPING of gemlite 0.6


class Double:
    """Computes, and takes the memory that Triton's timing takes where gemlite's autotuner has a new
    key."""

    def __init__(self) -> None:
        self.tuned, self.compiled = set[tuple[object, ...]](), set[tuple[object, ...]]()
        self.rows = set[int]()

    def __call__(self, x: Tensor, weight: GemliteWeight) -> Tensor:
        assert all(is_sim(one) for one in (x, weight.codes, weight.scales, weight.offsets))
        key = tuned_as(len(x), tuple(weight.codes.shape))
        if key not in self.tuned:
            self.tuned.add(key)
            copies = [x.clone(), weight.codes.clone()] if len(x) <= ROWS_RESTORED else []
            flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=x.device)
            del copies, flushed
        self.compiled.add(compiled_as(len(x), tuple(weight.codes.shape)))
        self.rows.add(len(x))
        shifts = 4 * torch.arange(8, device=x.device)[None, :, None].int()
        codes = ((weight.codes[:, None, :] >> shifts) & 15).flatten(0, 1).bfloat16()
        scales, offsets = (
            some.repeat_interleave(64, 0, output_size=len(codes))
            for some in (weight.scales, weight.offsets)
        )
        return x @ (codes * scales + offsets)


def tuned_as(rows: int, shape: tuple[int, ...]) -> tuple[object, ...]:
    """The key of gemlite's autotuner, and its kernel."""
    kernel = "gemm" if rows >= 64 else "gemm_splitK" if rows > 4 else "gemv_revsplitK"
    return kernel, next(bound for bound in BOUNDS if bound >= rows), *shape


def compiled_as(rows: int, shape: tuple[int, ...]) -> tuple[object, ...]:
    """Triton compiles a kernel for numbers that 16 divides, and for others."""
    return *tuned_as(rows, shape), rows % 16 == 0


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Double:
    found = Double()
    monkeypatch.setattr(gemlite_kernel, "product", found)
    monkeypatch.setattr(gemlite_kernel, "keep_tuning", lambda device: None)
    monkeypatch.setattr(gemlite_kernel, "is_installed", lambda: True)
    return found


@pytest.fixture
def gpus() -> Iterator[Simulation]:
    with simulated() as simulation:
        yield simulation
    assert not simulation.races


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Whole 256 columns everywhere."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config = AutoConfig.for_model(**{**FAMILIES["granite"], **sizes})
    folder = tmp_path_factory.mktemp("gemlite")
    checkpoint = random_checkpoint(folder / "checkpoint", config)
    return build_artifact(checkpoint, folder / "artifact", device="cuda", context=256)


def planned(artifact: Artifact, **plan: Any) -> Artifact:
    settings = {"width": 3, "depth": 3, "context": 256, "device": "cuda", "int4_kernel": "gemlite"}
    return replan(artifact, **{**settings, **plan})


def filled(artifact: Artifact) -> Artifact:
    """As a plan of a large model: the arenas fill what the rest of the budget leaves."""
    plan, budget = artifact.plan, 2 * FLUSHED_BYTES
    placements = {}
    for method, one in plan.placements.items():
        resident = one.ledger.resident + budget - one.ledger.total_bytes
        placements[method] = replace(one, ledger=replace(one.ledger, resident=resident))
    return replace(artifact, plan=replace(plan, budget_bytes=budget, placements=placements))


def test_kernels_are_tuned_while_fast_memory_is_free_and_never_later(
    gpus: Simulation, double: Double, artifact: Artifact
) -> None:
    """Beside the arenas there is not room for it."""
    chosen = filled(planned(artifact, num_sequences=2))
    ledger = chosen.plan.placement("substitute").ledger
    assert ledger.workspace + ledger.guard < FLUSHED_BYTES
    with Engine.open(chosen, OpenOptions("substitute")) as engine:
        tuned = set(double.tuned)
        assert max(double.rows) >= most_draft_rows(chosen.plan, "substitute") == 2 * (3 + 15)
        assert answers_of_two(engine, PROMPT, 12) == 24
        assert double.tuned == tuned


ALL_DRAFT = pytest.mark.parametrize(
    ("opened", "others"),
    [
        ("substitute", ["substitute+lookup"]),
        ("draft-model", []),
        ("substitute+draft-model", []),
        ("eagle", ["substitute+eagle", "substitute+lookup"]),
    ],
)


@ALL_DRAFT
def test_nothing_is_tuned_or_compiled_in_an_answer_whoever_drafts(
    opened: DrafterName,
    others: list[DrafterName],
    gpus: Simulation,
    double: Double,
    artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lookup, a draft model and a head propose more rows than a level has, and a draft model reads
    texts."""
    for module in (hierarchical, drafter):  # a text in which lookup finds as much as it may
        monkeypatch.setattr(module, "continuation", lambda text, room: [7] * room)
    settings: dict[str, Any] = {"num_sequences": 2, "context": 512, "depth": 18}
    if opened == "eagle":
        monkeypatch.setattr(gemlite_kernel, "unavailable", lambda *_: None)  # for 128 columns
        source, head = eagle_checkpoints(tmp_path, torch.bfloat16, foreseen=True)
        settings["drafts_with_head"] = True
        artifact = build_artifact(source, tmp_path / "artifact", draft_head=head, device="cuda")
    elif opened != "substitute":
        own = DraftModelRef(Resolved(artifact.path.parent / "checkpoint", Source("test/small")))
        artifact = build_artifact(
            own.model.path, tmp_path / "artifact", draft_model=own, device="cuda"
        )
    chosen = filled(planned(artifact, **settings))
    with Engine.open(chosen, OpenOptions(drafter=opened)) as engine:
        tuned, compiled = set(double.tuned), set(double.compiled)
        for name in (opened, *others):
            engine.set_drafter(name)
            double.rows.clear()
            assert answers_of_two(engine, [*range(40, 190)], 24) == 48
            if name.endswith("lookup"):
                assert max(double.rows) == most_draft_rows(chosen.plan, "substitute")
            assert (max(double.rows) > 2 * 3) is (name not in ("substitute", "eagle"))
        assert double.tuned == tuned and double.compiled == compiled


def test_a_kernel_that_is_slower_but_takes_less_memory_is_timed_too_and_runs_a_plan(
    gpus: Simulation, double: Double, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gemlite a second copy of scales and zero points lies in fast memory; ATen's has none."""
    monkeypatch.setattr(microbench, "DRAFT_WIDTHS", (1, 4))
    monkeypatch.setattr(microbench, "CUDA_DRAFT_WIDTHS", ())
    spec, device = artifact.spec, torch.device("cuda", 0)
    timed, double_rows = Bench.draft_timings, list[int]()
    for seconds, expected in (
        ({"aten": 2e-4, "gemlite": 1e-4}, ["gemlite", "aten"]),
        ({"aten": 1e-4, "gemlite": 2e-4}, ["aten"]),
    ):
        pretended = iter(seconds.values())

        def draft_timings(bench: Bench, packed: Substitutes, pretended: Any = pretended) -> Any:
            found, each = timed(bench, packed), next(pretended)
            double_rows.append(len(double.rows))
            return replace(found, layer=tuple(Timing(one.width, each) for one in found.layer))

        monkeypatch.setattr(Bench, "draft_timings", draft_timings)
        with torch.inference_mode():
            bench = Bench(spec, device, Effort(fewest_samples=1, action_seconds=0.0))
            assert list(bench.timed_kernels()) == expected
    assert double_rows[0] == 0 < double_rows[1], "each was run"
    small, large = (substitutes_bytes(spec, kernel) for kernel in ("aten", "gemlite"))
    assert large == pytest.approx(1.11 * small, rel=0.01)
    with Engine.open(planned(artifact, int4_kernel="aten", num_sequences=2)) as engine:
        assert answers_of_two(engine, PROMPT, 12) == 24


@pytest.mark.parametrize("most", [18, 36, 128, 144])
def test_some_numbers_of_rows_stand_for_all_up_to_the_most(most: int) -> None:
    shape = 32, 64
    for kind in (tuned_as, compiled_as):
        tuned = {kind(rows, shape) for rows in gemlite_kernel.tuned_rows(most)}
        assert {kind(rows, shape) for rows in range(1, most + 1)} <= tuned


def test_the_trees_that_the_planner_tries_have_no_more_rows_than_are_tuned(
    artifact: Artifact,
) -> None:
    """While it learns acceptance, and for a draft head."""
    for num_sequences in AT_ONCE:
        most = most_draft_rows(planned(artifact, num_sequences=num_sequences).plan, "substitute")
        widths = (*WIDTHS["cuda"], *(tree.width for tree in HEAD_TREES))
        assert most >= num_sequences * max(widths)


def answers_of_two(engine: Engine, prompt: list[int], num_tokens: int) -> int:
    """Tokens of two sequences that decode together."""
    sequences = [engine.new_sequence() for _ in range(2)]
    for sequence in sequences:
        sequence.begin(prompt, GenerationParams(num_tokens))
    while engine.step():
        pass
    said = sum(len(sequence.take_new_tokens()) for sequence in sequences)
    for sequence in sequences:
        sequence.close()
    return said


def test_a_plan_for_columns_that_gemlite_would_read_beyond_is_refused(
    gpus: Simulation, double: Double, artifact: Artifact
) -> None:
    """It takes 256 columns at a time, and a NaN behind the grid would make every result one."""
    odd = make_spec(intermediate_size=448)
    columns = [one.in_features for one in odd.linears if one.has_substitute]
    device = torch.device("cuda", 0)
    assert 448 in columns and unavailable(device, columns) == (
        "it takes whole 256 columns, and one has 448"
    )
    assert unavailable(device, [256, 512, 18944, 27648]) is None
    chosen = planned(artifact)
    with pytest.raises(SubspecError, match="gemlite, cannot run here: it takes whole") as caught:
        load.check_kernel(replace(chosen, spec=odd), chosen.plan, device)
    assert caught.value.exit_code == Exit.WRONG_MACHINE


def test_a_plan_that_needs_gemlite_says_so_where_it_is_not_installed(
    gpus: Simulation, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemlite_kernel, "is_installed", lambda: False)
    with pytest.raises(SubspecError, match="gemlite is not installed") as caught:
        Engine.open(planned(artifact), OpenOptions("substitute"))
    assert caught.value.hint is not None and "subspec[gpu]" in caught.value.hint


def test_the_double_computes_what_gemlites_layout_says(gpus: Simulation, double: Double) -> None:
    room = [torch.zeros(n, dtype=torch.uint8, device="cuda") for n in (256 * 32, 256 * 4 * 2 * 4)]
    weight = gemlite_kernel.empty(64, 256, room[0], room[1][: 64 * 256 // 64 * 4])
    codes = torch.randint(256, (64, 128), dtype=torch.uint8)
    gemlite_kernel.pack_rows(weight, 0, codes)
    weight.scales.fill_(1.0)
    x = torch.eye(256, dtype=torch.bfloat16).cuda()
    got = double(x, weight).cpu().t()
    assert torch.equal(got.to(torch.uint8), unpack_gemlite(weight.codes.cpu()))


def test_the_version_is_pinned_as_tensors_are_handed_over_by_position() -> None:
    root = Path(__file__).parents[2]
    [line] = [x for x in (root / "constraints.txt").read_text().splitlines() if "gemlite" in x]
    assert f'"{line}"' in (root / "pyproject.toml").read_text()
