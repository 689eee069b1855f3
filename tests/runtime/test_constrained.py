"""Constraints, penalties and biases in an engine: what they say holds for every token, and neither
a draft nor a batch changes a token."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
import torch
from builders import build_artifact, replan
from counted import END, LONG, Counted
from running import generated
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import DrafterName
from subspec.planner.model.hub import DEMO
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.lossy import Lossy
from subspec.runtime.model.sampling import Sampler, SamplingParams
from subspec.runtime.sequence import GenerationParams

PROMPT = [3 + (17 * n) % 900 for n in range(40)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("constrained") / "artifact"
    return build_artifact(DEMO, out, resident_share=1.0)


def params(artifact: Artifact, sampling: SamplingParams) -> GenerationParams:
    constraint = Counted(artifact.spec.vocab_size)
    ends = frozenset({END})
    return GenerationParams(60, sampling, stop_token_ids=ends, constraint=constraint)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=0.9, seed=5, top_p=0.95)], ids=str
)
def test_a_constraint_holds_and_a_draft_within_it_changes_no_token(
    artifact: Artifact, sampling: SamplingParams, width: int
) -> None:
    chosen = replan(artifact, width=width, depth=7, resident_share=1.0)
    with Engine.open(chosen, OpenOptions("plain")) as engine, engine.new_sequence() as sequence:
        expected = generated(sequence, PROMPT, params(artifact, sampling))
    with Engine.open(chosen) as engine, engine.new_sequence() as sequence:
        asked = params(artifact, sampling)
        assert generated(sequence, PROMPT, asked) == expected
        assert isinstance(asked.constraint, Counted)
        said = asked.constraint.said  # what the last round emitted, nobody asked about
        assert len(said) >= LONG and said == expected[: len(said)]
        assert sequence.finish_reason == "eos" and LONG < len(expected) <= 2 * LONG + 1
        assert sum(sequence.stats.accepted) > len(expected) // 3, "drafts were within it"


@pytest.mark.parametrize("drafter", ["lookup", "substitute+lookup"])
def test_looked_up_tokens_do_not_leave_a_constraint(
    artifact: Artifact, drafter: DrafterName
) -> None:
    with Engine.open(artifact, OpenOptions("plain")) as engine, engine.new_sequence() as sequence:
        expected = generated(sequence, PROMPT, params(artifact, SamplingParams()))
    how, prompt = OpenOptions(drafter=drafter), [*PROMPT, *expected, *PROMPT]
    with Engine.open(artifact, OpenOptions("plain")) as engine, engine.new_sequence() as sequence:
        expected = generated(sequence, prompt, params(artifact, SamplingParams()))
    with Engine.open(artifact, how) as engine, engine.new_sequence() as sequence:
        assert generated(sequence, prompt, params(artifact, SamplingParams())) == expected
        assert sum(sequence.stats.proposed) > 0


def test_constrained_and_free_answers_keep_each_other_company(artifact: Artifact) -> None:
    shared = replan(artifact, width=2, depth=5, resident_share=1.0, num_sequences=2)
    with Engine.open(shared) as engine:
        with engine.new_sequence() as sequence:
            free = generated(sequence, PROMPT, GenerationParams(40))
            bound = generated(sequence, PROMPT, params(artifact, SamplingParams()))
        with engine.new_sequence() as first, engine.new_sequence() as second:
            first.begin(PROMPT, GenerationParams(40))
            second.begin(PROMPT, params(artifact, SamplingParams()))
            while engine.step():
                pass
            assert (first.take_new_tokens(), second.take_new_tokens()) == (free, bound)


PENALTIES = [
    SamplingParams(repetition_penalty=1.4),
    SamplingParams(presence_penalty=2.0, frequency_penalty=0.7),
    SamplingParams(0.8, seed=2, min_p=0.05, frequency_penalty=1.0),
    SamplingParams(logit_bias=((11, 4.0), (12, -50.0))),
]


@pytest.mark.parametrize("sampling", PENALTIES, ids=str)
def test_penalties_and_biases_are_the_same_with_a_draft(
    artifact: Artifact, sampling: SamplingParams
) -> None:
    chosen = replan(artifact, width=2, depth=7, resident_share=1.0)
    said = []
    for how in (OpenOptions("plain"), OpenOptions()):
        with Engine.open(chosen, how) as engine, engine.new_sequence() as sequence:
            said.append(generated(sequence, PROMPT, GenerationParams(60, sampling)))
    assert said[0] == said[1]
    with Engine.open(chosen) as engine, engine.new_sequence() as sequence:
        usual = SamplingParams(sampling.temperature, seed=sampling.seed)
        assert generated(sequence, PROMPT, GenerationParams(60, usual)) != said[0]


def test_a_bias_of_a_token_that_the_model_lacks_is_refused(artifact: Artifact) -> None:
    sampling = SamplingParams(logit_bias=((10**6, 1.0),))
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        with pytest.raises(SubspecError, match="logit_bias has the token id 1000000"):
            generated(sequence, PROMPT, GenerationParams(5, sampling))


def test_what_a_draft_may_propose_ends_with_the_constraint() -> None:
    constraint = Counted(50)
    sampler = Sampler(SamplingParams(), end_tokens=frozenset({END}), constraint=constraint)
    follower = sampler.constraint
    assert follower is not None
    sampler.push(10)
    after = follower.allowed_after([16, 22], 50)
    assert after is not None and after.nonzero().flatten().tolist() == list(range(3, 50, 5))
    assert follower.allowed_after([17], 50) is None, "the path itself is not allowed"
    assert constraint.said == [10]
    for token in (11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21):
        sampler.push(token)
    assert (
        follower.allowed_after([END], 50) is None and follower.allowed_after([END, 3], 50) is None
    )
    with sampler.ahead():
        sampler.push(END)
        sampler.push(9)
        assert sampler.sample(torch.arange(50.0), 0) == 49, "what follows the end is nobody's"
    assert len(constraint.said) == LONG


@dataclass
class Failing(Counted):
    """It can say no more after some tokens."""

    def allowed(self) -> Tensor:
        if len(self.said) >= 6:
            raise SubspecError(Exit.USAGE, "the grammar is too complex")
        return super().allowed()


def test_lossy_acceptance_is_exact_under_a_constraint(artifact: Artifact) -> None:
    everything = Lossy("prob", 0, 0)
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        ends = frozenset({2, 3})
        sequence.begin(PROMPT, GenerationParams(4, stop_token_ids=ends, lossy=everything))
        assert sequence.state.lossy == everything and sequence.state.end_tokens == ends
        sequence.begin(PROMPT, replace(params(artifact, SamplingParams()), lossy=everything))
        assert sequence.state.lossy is None


@dataclass
class OddMask(Counted):
    """What it gives after some tokens is no mask."""

    def allowed(self) -> Tensor:
        return super().allowed()[:-1] if len(self.said) >= 6 else super().allowed()


@pytest.mark.parametrize("method", ["substitute", "plain"])
@pytest.mark.parametrize(
    ("kind", "told"), [(Failing, "too complex"), (OddMask, "expected torch.bool")]
)
def test_a_constraint_that_fails_ends_its_own_answer_only(
    artifact: Artifact, method: Literal["substitute", "plain"], kind: type[Counted], told: str
) -> None:
    shared = replan(artifact, width=2, depth=5, resident_share=1.0, num_sequences=2)
    with Engine.open(shared, OpenOptions(method)) as engine:
        with engine.new_sequence() as sequence:
            expected = generated(sequence, PROMPT, GenerationParams(40))
        with engine.new_sequence() as free, engine.new_sequence() as failing:
            constraint = kind(artifact.spec.vocab_size)
            free.begin(PROMPT, GenerationParams(40))
            failing.begin(PROMPT, GenerationParams(40, constraint=constraint))
            with pytest.raises(SubspecError, match=told):
                while engine.step():
                    pass
            assert engine.is_active(free) and not engine.is_active(failing)
            assert failing.finish_reason is None
            while engine.step():
                pass
            assert free.take_new_tokens() == expected
            assert generated(failing, PROMPT, GenerationParams(40)) == expected


@dataclass
class FailingElsewhere(Counted):
    """It can say nothing of texts that `answer` does not begin with."""

    answer: list[int] = field(default_factory=list)
    num_failures: int = 0

    def allowed(self) -> Tensor:
        if self.said != self.answer[: len(self.said)]:
            self.num_failures += 1
            raise SubspecError(Exit.USAGE, "the grammar is too complex")
        return super().allowed()

    def push(self, token: int) -> None:
        self.said.append(token)


def test_a_constraint_that_fails_where_only_drafts_go_ends_no_answer(artifact: Artifact) -> None:
    chosen = replan(artifact, width=3, depth=5, resident_share=1.0)
    with Engine.open(chosen) as engine, engine.new_sequence() as sequence:
        expected = generated(sequence, PROMPT, params(artifact, SamplingParams()))
        elsewhere = FailingElsewhere(artifact.spec.vocab_size, answer=expected)
        asked = replace(params(artifact, SamplingParams()), constraint=elsewhere)
        assert generated(sequence, PROMPT, asked) == expected
        assert elsewhere.num_failures > 0, "no draft left the answer"


@pytest.mark.parametrize("how", [OpenOptions("plain"), OpenOptions()], ids=["plain", "draft"])
def test_an_answer_that_a_stop_text_ends_does_not_hear_of_what_fails_behind_it(
    artifact: Artifact, how: OpenOptions
) -> None:
    chosen = replan(artifact, width=3, depth=7, resident_share=1.0)
    counts = []

    def cut(tokens: Sequence[int]) -> int | None:
        counts.append(len(tokens))
        return 6 - sum(counts[:-1]) if sum(counts) >= 6 else None

    with Engine.open(chosen, how) as engine, engine.new_sequence() as sequence:
        constraint = Failing(artifact.spec.vocab_size)
        asked = GenerationParams(40, constraint=constraint, stopping_criteria=cut)
        assert len(generated(sequence, PROMPT, asked)) == 6
        assert sequence.finish_reason == "stop"


class FailingAtOnce(Counted):
    def allowed(self) -> Tensor:
        raise SubspecError(Exit.USAGE, "nothing can follow")


def test_a_prompt_whose_answer_cannot_begin_holds_up_no_other(artifact: Artifact) -> None:
    """Both prompts are read by one pass."""
    shared = replan(artifact, width=2, depth=5, resident_share=1.0, num_sequences=2)
    with Engine.open(shared) as engine:
        with engine.new_sequence() as sequence:
            expected = generated(sequence, PROMPT, GenerationParams(10))
        with engine.new_sequence() as failing, engine.new_sequence() as free:
            constraint = FailingAtOnce(artifact.spec.vocab_size)
            failing.begin(PROMPT, GenerationParams(10, constraint=constraint))
            free.begin(PROMPT, GenerationParams(10))
            with pytest.raises(SubspecError, match="nothing can follow"):
                engine.step()
            assert not engine.is_active(failing)
            while engine.step():
                pass
            assert free.take_new_tokens() == expected


def test_an_answer_that_goes_on_after_its_end_token_is_free_from_there(artifact: Artifact) -> None:
    """Without `stop_token_ids`, as of requests that ignore the end: Counted fails if asked."""
    known = replace(artifact, spec=replace(artifact.spec, eos_token_ids=(END,)))
    said = []
    for how in (OpenOptions("plain"), OpenOptions()):
        with Engine.open(known, how) as engine, engine.new_sequence() as sequence:
            constraint = Counted(artifact.spec.vocab_size)
            said.append(generated(sequence, PROMPT, GenerationParams(60, constraint=constraint)))
    assert said[0] == said[1] and END in said[0] and len(said[0]) == 60


def test_a_prompt_is_the_callers_to_change(artifact: Artifact) -> None:
    prompt = list(PROMPT)
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        expected = generated(sequence, PROMPT, GenerationParams(8))
        sequence.begin(prompt, GenerationParams(8))
        prompt.clear()
        while engine.step():
            pass
        assert sequence.take_new_tokens() == expected
