"""Delta nets on a GPU: what their kernels read of paths is brought there once for all layers, and a
commit computes what states need."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, TypeVar

import pytest
import torch
from builders import build_artifact, converted, random_checkpoint, replan
from families import config_of
from interpreter import needs_interpreter
from simcuda.answering import PROMPT, USUAL
from simcuda.device import simulated
from simcuda.simulation import Simulation

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.footprint import make_host_ledger
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import make_blocks
from subspec.runtime import memory, open_model
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.model import delta_net as net
from subspec.runtime.model.delta_net import DeltaInputs, DeltaState, DeltaWeights, End
from subspec.runtime.model.paths import chain_paths, on_device, steps_of, tree_paths
from subspec.runtime.sequence import GenerationParams

pytest.importorskip("triton")
pytestmark = needs_interpreter

GPU = torch.device("cuda", 0)
HEADS, SIZE, TAPS = 4, 32, 4  # two key heads
Given = TypeVar("Given", DeltaWeights, DeltaState, DeltaInputs)


@pytest.fixture
def gpus() -> Iterator[Simulation]:
    from triton.language import core

    before = dict(vars(core)), dict(vars(core.tensor))
    with simulated() as simulation, torch.inference_mode():
        yield simulation
    assert not simulation.races
    assert before == (vars(core), vars(core.tensor)), "else later tests cannot compile kernels"


@pytest.fixture(scope="module", params=[2, 6], ids=["one net", "three nets"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Of every two layers one is a delta net."""
    folder = tmp_path_factory.mktemp("nets")
    config = config_of("qwen3_5_text", num_hidden_layers=request.param, full_attention_interval=2)
    source = random_checkpoint(folder / "f32", config)
    source = converted(source, folder / "bf16", torch.bfloat16)
    return build_artifact(source, folder / "artifact", device="cuda")


def test_states_for_which_the_host_has_no_room_are_told_before_anything_is_loaded(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {**USUAL, "num_sequences": 3, "context": 256}
    chosen = replan(artifact, **settings)
    streamed = sum(
        one.num_bytes for one in make_blocks(chosen.stored_parts(), chosen.plan.placement("plain"))
    )
    needed = make_host_ledger([chosen.spec], streamed, 3)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: needed.total_bytes - 1)
    monkeypatch.setattr(open_model, "load_weights", None)
    with simulated(), pytest.raises(SubspecError, match="of delta-net checkpoints") as caught:
        Engine.open(chosen, OpenOptions("plain"))
    assert caught.value.exit_code == Exit.RESOURCES
    assert caught.value.hint.endswith("a larger --vram, or fewer --sequences")


def waits(gpus: Simulation) -> dict[str, int]:
    found = Counter[str]()
    for (what, _), times in gpus.waits.items():
        found[what] += times
    gpus.waits.clear()
    found.pop("event.synchronize", None)  # past ones, to add up how long they took
    return found


def test_the_host_waits_as_often_in_a_model_of_many_delta_nets_as_of_one(
    artifact: Artifact,
) -> None:
    """Of a round: the root and the steps of the walk go up, the tree's parents and the verdict come
    down, each phase ends."""
    plan: dict[str, Any] = {**USUAL, "context": 256, "depth": 2}
    with simulated() as gpus:
        with (
            Engine.open(replan(artifact, **plan), OpenOptions("substitute")) as engine,
            engine.new_sequence() as sequence,
        ):
            sequence.begin(PROMPT[:6], GenerationParams(40))
            gpus.waits.clear()
            engine.step()
            assert waits(gpus) == {
                "copy from the host": 1,
                "aten::_local_scalar_dense": 1,
                "stream.synchronize": 1,
            }
            for _ in range(3):
                engine.step()
            gpus.waits.clear()
            engine.step()
            assert waits(gpus) == {
                "copy from the host": 2,
                "copy to the host": 2,
                "stream.synchronize": 2,
            }
        assert not gpus.races


@pytest.mark.usefixtures("gpus")
def test_paths_on_a_gpu_are_those_of_the_host() -> None:
    for count in (1, 2, 7):
        host, there = chain_paths(count, TAPS), chain_paths(count, TAPS, GPU)
        assert torch.equal(there.windows.cpu(), host.windows) and there.steps is not None
        steps = steps_of(host.sources.tolist(), host.slots.tolist(), [count - 1])
        assert there.steps.rows.tolist() == [list(step) for step in steps]
        assert (there.steps.num_slots, there.steps.num_ends) == (0, 1)
    host = tree_paths([-1, 0, 0, 1, 2, 2], TAPS)
    there = on_device(host, GPU)
    assert torch.equal(there.windows.cpu(), host.windows) and there.steps is not None
    assert there.steps.num_slots > 0 and there.steps.num_ends == 0


def test_a_commit_leaves_the_state_that_a_text_leaves_by_fewer_kernels(gpus: Simulation) -> None:
    generator = torch.Generator().manual_seed(1)

    def some(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).bfloat16()

    channels, count = 2 * HEADS * SIZE, 5
    conv, norm = some(channels, 1, TAPS), some(SIZE)
    weights = on_gpu(DeltaWeights(conv, some(HEADS), some(HEADS), norm, 1e-6))
    state = on_gpu(DeltaState(some(TAPS - 1, channels), some(HEADS, SIZE, SIZE).float()))
    inputs = on_gpu(DeltaInputs(some(count, channels), some(count, HEADS), some(count, HEADS)))
    paths, z = chain_paths(count, TAPS, GPU), some(count, HEADS * SIZE).cuda()

    read = DeltaState(state.conv.clone(), state.memory.clone())
    before = gpus.num_launches
    net.delta_net(weights, state, paths, inputs, z, [End(count - 1, read)])
    in_pass, before = gpus.num_launches - before, gpus.num_launches
    net.commit(weights, state, paths, inputs)
    assert gpus.num_launches - before < 0.7 * in_pass
    assert torch.equal(state.memory.cpu(), read.memory.cpu())
    assert torch.equal(state.conv.cpu(), read.conv.cpu())


def on_gpu(given: Given) -> Given:
    values = [getattr(given, field.name) for field in fields(given)]
    return type(given)(*(one.cuda() if isinstance(one, torch.Tensor) else one for one in values))
