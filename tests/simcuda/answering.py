"""Answers on the simulated device."""

from typing import Any

from builders import replan
from running import answer
from simcuda.device import simulated
from simcuda.simulation import Simulation

from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Method
from subspec.runtime.draft.drafter import SubstituteDrafter
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.model.sampling import SamplingParams

PROMPT = [*range(40, 60)]
USUAL = {"width": 1, "depth": 6, "resident_share": 0.3, "context": 512, "device": "cuda"}


def answered(
    artifact: Artifact,
    num_tokens: int,
    options: OpenOptions | None = None,
    sampling: SamplingParams | None = None,
    prompt: list[int] | None = None,
    **plan: Any,
) -> tuple[list[int], Simulation]:
    """Tokens, by a GPU of its own. Fails if anything is found, or anything stays behind."""
    options = options or OpenOptions("substitute")
    with simulated() as simulation:
        chosen = replan(artifact, **{**USUAL, **plan})
        with Engine.open(chosen, options) as engine:
            said = answer(engine, prompt or PROMPT, num_tokens, sampling)
            assert engine.missing_graphs_reason is None, engine.missing_graphs_reason
    assert not simulation.races, simulation.races
    assert not simulation.registered, "host memory stays registered"
    return said, simulation


def drafted(artifact: Artifact, method: Method, num_tokens: int, **settings: Any) -> list[int]:
    return answered(artifact, num_tokens, OpenOptions(method), **settings)[0]


def captured_levels(engine: Engine) -> dict[int, Any]:
    """By live slots: the two graphs of a draft's levels."""
    drafter = engine.model.drafter
    assert isinstance(drafter, SubstituteDrafter)
    [graphs] = drafter.captured.values()
    return dict(graphs.replays)
