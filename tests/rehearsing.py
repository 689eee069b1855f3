"""Answers decoded and trees grown along them, as a rehearsal does it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from running import generated

from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Method, Prediction, Usage
from subspec.planner.rehearse.rehearsal import decode_together
from subspec.planner.rehearse.replay import Answer, Grown, walk
from subspec.planner.rehearse.trail import Trail
from subspec.runtime.draft.drafter import SubstituteDrafter
from subspec.runtime.engine import Engine
from subspec.runtime.model.cache import Cache
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.sequence import Sequence as PlanSequence

LONG = float("inf")  # until when there is time
PROMPT = list(range(10, 50))
SAID = Prediction(50.0, 0.1, 9_000_000, 2.0, 4.0, 0.01, 0.02, 0.01, 0.01, 0.0, 4_000_000)


def said(method: Method, usage: Usage) -> Prediction:
    return SAID


@dataclass(frozen=True)
class Stage:
    """An engine, and all of its plan's sequences."""

    engine: Engine
    sequences: tuple[PlanSequence, ...]

    @property
    def caches(self) -> list[Cache]:
        return [one.cache for one in self.sequences]

    @cached_property
    def trails(self) -> list[Trail]:
        return [Trail(cache) for cache in self.caches]

    @property
    def drafter(self) -> SubstituteDrafter:
        drafter = self.engine.model.drafter
        assert isinstance(drafter, SubstituteDrafter)
        return drafter

    def decode(self, *prompts: list[int]) -> list[Answer]:
        return decode_together(self.engine, self.trails[: len(prompts)], list(prompts))

    def answer(self, *prompts: list[int], num_tokens: int = 60) -> list[Answer]:
        """By the loop that a user's answers take, whatever they repeat."""
        params = GenerationParams(num_tokens)
        pairs = list(zip(self.sequences, prompts, strict=False))
        texts = [[*prompt, *generated(one, prompt, params)] for one, prompt in pairs]
        return [
            Answer(text, len(prompt), False) for text, (_, prompt) in zip(texts, pairs, strict=True)
        ]

    def walk(self, answers: Sequence[Answer], width: int) -> list[list[Grown]]:
        return walk(self.drafter, self.trails[: len(answers)], answers, width)


@contextmanager
def on_stage(artifact: Artifact) -> Iterator[Stage]:
    with Engine.open(artifact) as engine, ExitStack() as stack, torch.inference_mode():
        several = range(engine.plan.num_sequences)
        yield Stage(engine, tuple(stack.enter_context(engine.new_sequence()) for _ in several))
