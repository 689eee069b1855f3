"""Answers on the simulated device: drafted ones are the plain ones, of every kind of layer, and
a round waits no more often than it has to."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_artifact, demo_checkpoint, random_checkpoint, replan
from families import FAMILIES, config_of
from running import answer
from simcuda.answering import PROMPT, USUAL, captured_levels
from simcuda.device import simulated
from simcuda.simulation import Simulation

from subspec.artifacts.footprint import GRAPH_SETS, graph_kernels
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import Encoding
from subspec.artifacts.plan import Method
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import GenerationParams

Demo = Callable[[Encoding], Artifact]
SEEDED = SamplingParams(temperature=0.8, seed=3)
KINDS = {
    "full attention, half precision": ("demo", torch.float16),
    "full attention, f32": ("demo", torch.float32),
    "windows": ("olmo3, yarn on full layers", torch.float32),
    "tied, 7 heads to 1": ("qwen2, 7 heads to 1, tied", torch.float32),
    "norms of heads": ("qwen3, head size not hidden / heads", torch.float32),
}
# An RMS norm is one kernel on CUDA; here it is taken apart.
NORM_PIECES = Counter({"aten::pow": 1, "aten::mean": 1, "aten::rsqrt": 1})


def assert_lossless(artifact: Artifact, num_tokens: int, **plan: Any) -> None:
    """Greedy and seeded; the draft's levels are captured."""
    said = list[list[int]]()
    methods: tuple[Method, ...] = ("substitute", "plain")
    for method in methods:
        with simulated() as gpus:
            chosen = replan(artifact, **{**USUAL, "width": 2, "depth": 4, **plan})
            with Engine.open(chosen, OpenOptions(method)) as engine:
                for sampling in (SamplingParams(), SEEDED):
                    said.append(answer(engine, PROMPT, num_tokens, sampling))
                assert engine.missing_graphs_reason is None
        assert not gpus.races and not gpus.registered
    assert said[:2] == said[2:]
    assert all(len(tokens) == num_tokens for tokens in said)


@pytest.mark.parametrize("encoding", ["raw", "residual"])
def test_a_drafted_answer_is_the_plain_one(demo: Demo, encoding: Encoding) -> None:
    assert_lossless(demo(encoding), 8)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["raw", "residual"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_drafted_answer_is_the_plain_one_of_every_kind_of_layer(
    kind: str, encoding: Encoding, tmp_path: Path
) -> None:

    name, dtype = KINDS[kind]
    if name == "demo":
        folder = demo_checkpoint(tmp_path / "checkpoint", dtype)
    else:
        config = config_of(name)
        folder = random_checkpoint(tmp_path / "checkpoint", config)
    artifact = build_artifact(folder, tmp_path / "artifact", encoding, device="cuda", context=256)
    assert_lossless(artifact, 14, context=256)


def waits_of_a_round(gpus: Simulation, engine: Engine, sampling: SamplingParams) -> Counter[str]:
    """Of the host, by kind, once levels are replayed."""
    with engine.new_sequence() as sequence:
        sequence.begin(PROMPT, GenerationParams(60, sampling))
        for _ in range(4):
            engine.step()
        gpus.waits.clear()
        engine.step()
    found = Counter[str]()
    for (what, _), times in gpus.waits.items():
        found[what] += times
    return found


def test_a_round_waits_for_a_few_numbers_alone(demo: Demo) -> None:
    """Whatever the number of layers and levels: the root goes up, the verdict comes down, each
    phase ends; where residuals are decoded, whether they fit is read."""
    for encoding, more in (("raw", 0), ("residual", 1)):
        with simulated() as gpus:
            chosen = replan(demo(encoding), **USUAL)  # type: ignore[arg-type]
            with Engine.open(chosen, OpenOptions("substitute")) as engine:
                waits = waits_of_a_round(gpus, engine, SamplingParams())
        assert waits.pop("event.synchronize", 0) <= 40  # past ones, to add up how long they took
        assert waits == {
            "copy from the host": 1,
            "copy to the host": 1,
            "stream.synchronize": 2,
            **({"aten::_local_scalar_dense": more} if more else {}),
        }


def test_few_graphs_are_kept_and_each_has_the_kernels_that_the_ledger_counts(demo: Demo) -> None:
    with simulated():
        chosen = replan(demo("raw"), **{**USUAL, "width": 3, "depth": 4})
        with (
            Engine.open(chosen, OpenOptions("substitute")) as engine,
            engine.new_sequence() as sequence,
        ):
            for length in (20, 90, 150):
                list(sequence.generate([7] * length, GenerationParams(8)))
                levels = captured_levels(engine)
            assert list(levels) == [128, 192] and len(levels) == GRAPH_SETS
            assert_counted(engine)


def test_levels_of_a_company_have_no_more_kernels_than_the_ledger_counts_for_all(
    demo: Demo,
) -> None:
    with simulated() as gpus:
        chosen = replan(demo("raw"), **{**USUAL, "width": 2, "depth": 4, "num_sequences": 3})
        with Engine.open(chosen, OpenOptions("substitute")) as engine:
            sequences = [engine.new_sequence() for _ in range(3)]
            for index, sequence in enumerate(sequences):
                sequence.begin([7 + index] * 20, GenerationParams(24))
            for _ in range(3):
                engine.step()
            assert engine.missing_graphs_reason is None
            assert_counted(engine, num_sequences=3)
    assert not gpus.races


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith(("gemma", "olmo2"))])
def test_families_of_many_norms_have_no_more_kernels_than_the_ledger_counts(
    name: str, tmp_path: Path
) -> None:

    config = config_of(name)
    folder = random_checkpoint(tmp_path / "checkpoint", config)
    artifact = build_artifact(folder, tmp_path / "artifact", device="cuda", context=256)
    plan = {**USUAL, "width": 3, "depth": 3, "context": 256}
    with simulated(), Engine.open(replan(artifact, **plan), OpenOptions("substitute")) as engine:
        with engine.new_sequence() as sequence:
            list(sequence.generate([7] * 20, GenerationParams(8)))
            assert_counted(engine)


def assert_counted(engine: Engine, num_sequences: int = 1) -> None:
    """No captured level has more kernels than the ledger counts, nor far fewer."""
    most = num_sequences * graph_kernels(engine.artifact.spec)
    for graphs in captured_levels(engine).values():
        for graph in graphs:
            names = Counter(graph.graph.names)
            kernels = sum(names.values()) - names["aten::rsqrt"] * sum(NORM_PIECES.values())
            assert most / 3 < kernels <= most
