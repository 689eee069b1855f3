"""An engine with one sequence, as a rehearsal has it, and answers decoded there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Method, Prediction, Usage
from subspec.planner.rehearse.rehearsal import DecodedSample, decode
from subspec.planner.rehearse.replay import Trees, judge, replay
from subspec.runtime.draft.drafter import SubstituteDrafter
from subspec.runtime.engine import Engine
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.sampling import Sampling
from subspec.runtime.sequence import GenerationParams, Sequence

LONG = float("inf")  # until when there is time
PROMPT = list(range(10, 50))
SAID = Prediction(50.0, 0.1, 9_000_000, 2.0, 0.01, 0.02, 0.01, 0.01, 0.0, 4_000_000)


def said(method: Method, usage: Usage) -> Prediction:
    return SAID


@dataclass(frozen=True)
class Stage:
    engine: Engine
    sequence: Sequence

    @property
    def cache(self) -> Cache:
        return self.sequence.cache

    @property
    def drafter(self) -> SubstituteDrafter:
        drafter = self.engine.model.drafter
        assert isinstance(drafter, SubstituteDrafter)
        return drafter

    def decode(self, prompt: list[int], num_tokens: int = 40) -> DecodedSample:
        return decode(self.engine, self.sequence, prompt, num_tokens, said, LONG)

    def answer(self, prompt: list[int], num_tokens: int) -> list[int]:
        params = GenerationParams(num_tokens, Sampling())
        return [token for some in self.sequence.generate(prompt, params) for token in some]

    def judge(self, known: list[int] | tuple[int, ...], width: int) -> tuple[int, int]:
        return judge(self.drafter, self.cache, known, width)

    def replay(self, answer: DecodedSample, kind: str, trees: Trees) -> None:
        replay(self.drafter, self.cache, answer.tokens, answer.starts, kind, trees, LONG)


@contextmanager
def on_stage(artifact: Artifact) -> Iterator[Stage]:
    with (
        Engine.open(artifact) as engine,
        engine.new_sequence() as sequence,
        torch.inference_mode(),
    ):
        yield Stage(engine, sequence)
