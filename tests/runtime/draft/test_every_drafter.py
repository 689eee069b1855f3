"""Whoever drafts: an answer under a grammar, a bias, a penalty or a seed is the one of plain
decoding, alone and in a batch, and lossy acceptance keeps its rule."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from builders import build_artifact, converted
from counted import END, Counted
from grammars import END as END_OF_TEXT
from grammars import demo_tokens, text_of
from heads import head_checkpoints
from running import generated
from torch import Tensor

from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.format.checks import check_plan
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import Source
from subspec.artifacts.plan import OF_HEADS, PROPOSER_OF, DrafterName, head_of
from subspec.planner.model.hub import DEMO, Resolved
from subspec.planner.planning import DraftModelRef
from subspec.runtime.draft import beam
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.kernels import int4
from subspec.runtime.lossy import Lossy
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.server.answer_grammar import constraint_for
from subspec.runtime.server.chat_events import OutputFormat

KERNEL = "aten" if int4.unavailable() else "w4a8"
DRAFTERS: tuple[DrafterName, ...] = (
    "substitute", "lookup", "draft-model", *OF_HEADS, *PROPOSER_OF,
)  # fmt: skip
NUM_TOKENS = 24
SAID = [*range(40, 75), 300, 301, 302]
PROMPTS = [SAID * 2, [*range(900, 960)], [*SAID, 77, *SAID[:-2]]]
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, seed=5)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["red", "green"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def counted(sampling: SamplingParams) -> GenerationParams:
    ends = frozenset({END})
    return GenerationParams(NUM_TOKENS, sampling, ends, constraint=Counted(2048))


def by_schema(sampling: SamplingParams) -> GenerationParams:
    constraint = constraint_for(demo_tokens(), OutputFormat("json_schema", SCHEMA))
    ends = frozenset({END_OF_TEXT})
    return GenerationParams(NUM_TOKENS, sampling, ends, constraint=constraint)


def free(sampling: SamplingParams) -> GenerationParams:
    return GenerationParams(NUM_TOKENS, sampling)


# What is asked of an answer; a constraint is a state of one answer.
ASKED: dict[str, Callable[[], GenerationParams]] = {
    "seed": lambda: free(SEEDED),
    "class by class": lambda: counted(SamplingParams()),
    "class by class, seed": lambda: counted(SEEDED),
    "schema": lambda: by_schema(SamplingParams()),
    "schema, seed": lambda: by_schema(SEEDED),
    "penalties": lambda: free(SamplingParams(presence_penalty=1.5, frequency_penalty=0.7)),
    "repetition penalty, seed": lambda: free(SamplingParams(0.7, seed=2, repetition_penalty=1.3)),
    "bias": lambda: free(SamplingParams(logit_bias=((11, 3.0), (12, -50.0)))),
    "bias, min-p, seed": lambda: free(
        SamplingParams(0.8, seed=3, min_p=0.05, logit_bias=((50, 2.0),))
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


class Made:
    """Artifacts, each made when it is first asked for, and what plain decoding says."""

    def __init__(self, base: Path) -> None:
        self.artifact = cache(lambda dtype, kind: build(base / f"{kind}-{dtype}", dtype, kind))
        self.said = cache(self._said)

    def _said(self, dtype: str, kind: str, asked: str, number: int = 0) -> list[int]:
        """To one of the prompts."""
        with Engine.open(self.artifact(dtype, kind), OpenOptions("plain")) as engine:
            with engine.new_sequence() as sequence:
                return generated(sequence, PROMPTS[number], ASKED[asked]())


def build(folder: Path, dtype: str, kind: str) -> Artifact:
    """The demo model that drafts for itself, or a model with a head of the layout `kind`."""
    kind_of_numbers = getattr(torch, dtype)
    folder.mkdir()
    if kind == "demo":
        source, head = converted(DEMO, folder / "model", kind_of_numbers), None
    else:
        source, head = head_checkpoints(kind, folder, kind_of_numbers, foreseen=True)
    other = DraftModelRef(Resolved(DEMO, Source("test/small"))) if kind == "demo" else None
    return build_artifact(
        source, folder / "artifact", "residual", other, head, width=2, depth=4, resident_share=0.3,
        num_sequences=3, int4_kernel=KERNEL, drafts_with_head=kind != "demo",
    )  # fmt: skip


def kind_of(drafter: DrafterName) -> str:
    """Which artifact it drafts for; one with the head of mtp has delta nets."""
    return head_of(drafter) or "demo"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("drafters"))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((dtype, drafter), marks=[pytest.mark.slow] if dtype == "float32" else [])
        for dtype in ("bfloat16", "float32")
        for drafter in DRAFTERS
    ],
    ids="-".join,
)
def opened(request: pytest.FixtureRequest, made: Made) -> Iterator[tuple[str, str, Engine]]:
    dtype, drafter = request.param
    with Engine.open(
        made.artifact(dtype, kind_of(drafter)), OpenOptions(drafter=drafter)
    ) as engine:
        yield dtype, kind_of(drafter), engine


@pytest.mark.parametrize(
    "asked",
    [
        asked if asked in ("seed", "schema", "penalties")
        else pytest.param(asked, marks=pytest.mark.slow)  # the next test asks for all of them
        for asked in ASKED
    ],
)  # fmt: skip
def test_an_answer_is_that_of_plain_decoding_whatever_is_asked_of_it(
    opened: tuple[str, str, Engine], made: Made, asked: str
) -> None:
    dtype, kind, engine = opened
    with engine.new_sequence() as sequence:
        assert generated(sequence, PROMPTS[0], ASKED[asked]()) == made.said(dtype, kind, asked)


def test_answers_of_which_different_things_are_asked_keep_each_other_company(
    opened: tuple[str, str, Engine], made: Made
) -> None:
    dtype, kind, engine = opened
    accepted, proposed = 0, 0
    with ExitStack() as stack:
        several = [stack.enter_context(engine.new_sequence()) for _ in range(3)]
        waiting = [(n % len(PROMPTS), asked) for n, asked in enumerate(ASKED)]
        running = dict[int, tuple[int, str]]()
        while waiting or running:
            for index, sequence in enumerate(several):
                if index not in running and waiting:
                    number, asked = running[index] = waiting.pop(0)
                    sequence.begin(PROMPTS[number], ASKED[asked]())
            engine.step()
            for index, (number, asked) in list(running.items()):
                if several[index].finish_reason is not None:
                    said = several[index].take_new_tokens()
                    assert said == made.said(dtype, kind, asked, number), asked
                    accepted += sum(several[index].stats.accepted)
                    proposed += sum(several[index].stats.proposed)
                    del running[index]
    assert accepted > 10
    assert proposed > 4 or engine.drafter not in PROPOSER_OF
    assert engine.peak.peak_bytes <= engine.plan.budget_bytes


def test_the_answers_are_what_was_asked_for(made: Made) -> None:
    """Else the tests above would show less than they say."""
    said = made.said("bfloat16", "demo", "schema")
    text = text_of(demo_tokens(), [token for token in said if token != END_OF_TEXT])
    assert text.startswith("{"), text
    assert len(said) == NUM_TOKENS or set(json.loads(text)) == {"a", "b"}
    usual = [made.said("bfloat16", "demo", asked) for asked in ASKED]
    assert all(one != other for n, one in enumerate(usual) for other in usual[:n])


@pytest.mark.parametrize("drafter", [one for one in DRAFTERS if one != "lookup"])
def test_a_draft_temperature_changes_what_is_drafted_and_no_token(
    made: Made, monkeypatch: pytest.MonkeyPatch, drafter: DrafterName
) -> None:
    kind, used, temperature = kind_of(drafter), set[float](), 5.0
    real = beam.log_probabilities

    def noted(some: Tensor, logits: Tensor, temperature: float) -> Tensor:
        used.add(temperature)
        return real(some, logits, temperature)

    monkeypatch.setattr(beam, "log_probabilities", noted)
    options = OpenOptions(drafter=drafter, draft_temperature=temperature)
    with Engine.open(made.artifact("bfloat16", kind), options) as engine:
        with engine.new_sequence() as sequence:
            said = generated(sequence, PROMPTS[0], ASKED["seed"]())
    assert said == made.said("bfloat16", kind, "seed") and used == {temperature}
    with pytest.raises(SubspecError, match="draft_temperature is 0.0, expected more than 0"):
        OpenOptions(draft_temperature=0.0)


LOSSY = Lossy("prob", 0.02, 1)


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(SamplingParams(), id="greedy"),
        pytest.param(SEEDED, id="seeded", marks=pytest.mark.slow),
    ],
)
def test_lossy_acceptance_keeps_its_rule_whoever_drafts(
    opened: tuple[str, str, Engine], made: Made, sampling: SamplingParams
) -> None:
    """What is not the exact model's choice after the tokens before it is counted, and likely."""
    dtype, kind, engine = opened
    params = GenerationParams(16, sampling, logprobs=0, lossy=LOSSY)
    with (
        Engine.open(made.artifact(dtype, kind), OpenOptions("plain")) as plain,
        ExitStack() as stack,
    ):
        judge = stack.enter_context(plain.new_sequence())
        both = [stack.enter_context(engine.new_sequence()) for _ in PROMPTS[1:]]
        for sequence, prompt in zip(both, PROMPTS[1:], strict=True):
            sequence.begin(prompt, params)
        while engine.step():
            pass
        for sequence, prompt in zip(both, PROMPTS[1:], strict=True):
            said, wrong = sequence.take_new_tokens(), list[int]()
            for place, token in enumerate(said):
                [own] = generated(judge, [*prompt, *said[:place]], GenerationParams(1, sampling))
                if token != own:
                    wrong.append(place)
                    assert sequence.logprobs[place].logprob >= math.log(LOSSY.threshold)
            assert len(wrong) == sequence.stats.lossy_tokens
            assert sum(sequence.stats.accepted) >= len(wrong)


def test_what_a_model_with_delta_nets_repeats_is_checked_in_one_pass(made: Made) -> None:
    """Its next token depends most on the last one: it goes on as it did before."""
    artifact, params, said = made.artifact("bfloat16", "mtp"), GenerationParams(NUM_TOKENS), []
    with Engine.open(artifact, OpenOptions("plain")) as engine:
        with engine.new_sequence() as sequence:
            before = generated(sequence, PROMPTS[1], params)
    prompt = [*PROMPTS[1], *before, *before[:6]]
    for options in (OpenOptions("plain"), OpenOptions(drafter="substitute+lookup")):
        with Engine.open(artifact, options) as engine, engine.new_sequence() as sequence:
            said.append(generated(sequence, prompt, params))
            assert engine.method == "plain" or sum(sequence.stats.proposed) > 0
    assert said[0] == said[1]


def test_an_open_engine_drafts_with_all_that_its_memory_has_room_for(made: Made) -> None:
    expected = made.said("bfloat16", "eagle", "seed")
    with Engine.open(made.artifact("bfloat16", "eagle"), OpenOptions(drafter="eagle")) as engine:
        assert set(engine.drafters) == {
            "substitute", "substitute+lookup", "eagle", "substitute+eagle",
        }  # fmt: skip
        for drafter in engine.drafters:
            engine.set_drafter(drafter)
            with engine.new_sequence() as sequence:
                assert generated(sequence, PROMPTS[0], ASKED["seed"]()) == expected, drafter


def test_a_plan_says_who_drafts_where_nothing_is_asked_for(made: Made) -> None:
    artifact = made.artifact("bfloat16", "eagle")
    chosen = replace(artifact, plan=replace(artifact.plan, drafter="substitute+eagle"))
    check_plan(chosen.spec, chosen.stored_parts(), chosen.plan)
    for options, drafter in (
        (OpenOptions(), "substitute+eagle"),
        (OpenOptions("substitute"), "substitute"),
        (OpenOptions(drafter="eagle"), "eagle"),
        (OpenOptions("plain"), None),
    ):
        with Engine.open(chosen, options) as engine:
            assert engine.drafter == drafter
    wrong = replace(chosen.plan, drafter="lookup")
    with pytest.raises(SubspecError, match="inconsistent"):
        check_plan(chosen.spec, chosen.stored_parts(), wrong)
