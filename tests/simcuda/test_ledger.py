"""Real shapes through the allocator's model: what is reserved beside the arenas is what the ledger
says at most."""

import pytest
import torch
from simcuda.paper import MB, SPECS, paper_artifact, paper_engine

from subspec.artifacts.footprint import graph_bytes
from subspec.artifacts.plan import Method
from subspec.runtime.engine import Engine
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import GenerationParams

SAMPLED = SamplingParams(temperature=0.8, seed=3)


def decode_at(engine: Engine, length: int, num_tokens: int = 4) -> None:
    """The last chunk of a prompt of so many tokens, and a few rounds: the last ones replay what was
    captured."""
    with engine.new_sequence() as sequence:
        sequence.cache.commit([5] * max(0, length - engine.plan.prefill_chunk_tokens))
        params = GenerationParams(num_tokens, SAMPLED)
        for _ in sequence.generate([5] * length, params):
            pass
    assert engine.missing_graphs_reason is None


@pytest.mark.parametrize(
    ("name", "budget_gb"),
    [
        ("1.5B", 1.7),
        pytest.param("7B", 8, marks=pytest.mark.slow),
        pytest.param("14B", 12, marks=pytest.mark.slow),
        pytest.param("32B", 24, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", ["substitute", pytest.param("plain", marks=pytest.mark.slow)])
def test_what_passes_take_beside_the_arenas_is_within_the_ledger(
    name: str, budget_gb: float, method: Method
) -> None:
    spec = SPECS[name]
    artifact = paper_artifact(spec, int(budget_gb * 1000) * MB)
    plan = artifact.plan
    with paper_engine(artifact, method) as (engine, gpus):
        allocator = gpus.allocators[0]
        arenas = allocator.reserved
        for length in (plan.context - 40, 64, 700):
            decode_at(engine, min(length, plan.context - 40))
        taken = allocator.most_reserved - arenas
        graphs = graph_bytes(spec) if method == "substitute" else 0
        ledger = plan.placement(method).ledger
        room = ledger.workspace + ledger.guard
        print(
            f"{name}, {budget_gb} GB, {method}, tree {plan.tree.width}x{plan.tree.depth}, "
            f"context {plan.context}, prefill {plan.prefill_chunk_tokens}: beside the arenas "
            f"{room / MB:.0f} MB, graphs {graphs / MB:.0f}, reserved {taken / MB:.0f}"
        )
        assert taken + graphs <= room
        assert allocator.most_reserved + graphs + ledger.overhead <= plan.budget_bytes
    assert torch.cuda.is_available() is False
