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
from running import answer
from simcuda.answering import PROMPT
from simcuda.device import simulated
from simcuda.kernels import unpack_gemlite
from simcuda.simulation import Simulation
from simcuda.tensors import is_sim
from torch import Tensor
from toys import make_spec

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact
from subspec.runtime import load
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.kernels import gemlite_kernel
from subspec.runtime.kernels.gemlite_kernel import GemliteWeight, unavailable
from subspec.runtime.programs import draft_rows
from subspec.runtime.sequence import GenerationParams

FLUSHED_BYTES = 256 << 20  # by triton.testing.do_bench, before each call that it times
ROWS_RESTORED = 4  # up to so many rows the kernel adds to its output: the codes are cloned as well


class Double:
    """Computes, and takes the memory that Triton's timing takes at a shape's first call."""

    def __init__(self) -> None:
        self.tuned = set[tuple[int, ...]]()

    def __call__(self, x: Tensor, weight: GemliteWeight) -> Tensor:
        assert all(is_sim(one) for one in (x, weight.codes, weight.scales, weight.offsets))
        key = len(x), *weight.codes.shape
        if key not in self.tuned:
            self.tuned.add(key)
            copies = [x.clone(), weight.codes.clone()] if len(x) <= ROWS_RESTORED else []
            flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=x.device)
            del copies, flushed
        shifts = 4 * torch.arange(8, device=x.device)[None, :, None].int()
        codes = ((weight.codes[:, None, :] >> shifts) & 15).flatten(0, 1).bfloat16()
        scales, offsets = (
            some.repeat_interleave(64, 0, output_size=len(codes))
            for some in (weight.scales, weight.offsets)
        )
        return x @ (codes * scales + offsets)


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


def test_kernels_are_tuned_while_fast_memory_is_free_and_never_later(
    gpus: Simulation, double: Double, artifact: Artifact
) -> None:
    """Beside the arenas there is not room for it."""
    chosen = planned(artifact, num_sequences=2)
    budget = 2 * FLUSHED_BYTES
    ledger = chosen.plan.placement("substitute").ledger
    assert ledger.workspace + ledger.guard < FLUSHED_BYTES
    # As in a plan of a large model: the arenas fill what the rest leaves.
    filled = replace(ledger, resident=ledger.resident + budget - ledger.total_bytes)
    placements = {name: replace(one, ledger=filled) for name, one in chosen.plan.placements.items()}
    chosen = replace(chosen, plan=replace(chosen.plan, budget_bytes=budget, placements=placements))
    with Engine.open(chosen, OpenOptions("substitute")) as engine:
        tuned = set(double.tuned)
        assert {rows for rows, *_ in tuned} == draft_rows(chosen.plan, "substitute") == {1, 2, 3, 6}
        sequences = [engine.new_sequence() for _ in range(2)]
        for sequence in sequences:
            sequence.begin(PROMPT, GenerationParams(12))
        while engine.step():
            pass
        for sequence in sequences:
            sequence.close()
        assert len(answer(engine, PROMPT, 12)) == 12
        assert double.tuned == tuned


def test_a_plan_for_columns_that_gemlite_would_read_beyond_is_refused(
    gpus: Simulation, double: Double, artifact: Artifact
) -> None:
    """It takes 256 columns at a time, and a NaN behind the grid would make every result one."""
    odd = make_spec(inner_size=448)
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
