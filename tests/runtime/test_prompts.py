"""Prompts are read in chunks, in a batch, after what is in the cache already: no bit of an answer
depends on that. Log probabilities of both."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import build_artifact, demo_checkpoint, replan
from invariance import widths_here
from running import generated
from torch import Tensor

from subspec.artifacts.footprint import MIXED_PREFILL_ROWS
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Method, split_rows
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.exact_pass import tokens_that_fit
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import GenerationParams, Sequence

PROMPT = [3 + (17 * n) % 900 for n in range(150)]
OTHER = [7 + (29 * n) % 900 for n in range(40)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(
    scope="module", params=["bfloat16", pytest.param("float32", marks=pytest.mark.slow)]
)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder: Path = tmp_path_factory.mktemp("prompts")
    source = demo_checkpoint(folder / "model", getattr(torch, request.param))
    built = build_artifact(source, folder / "artifact", resident_share=1.0)
    widths = widths_here(built.spec, "cpu", 15)
    return replan(
        built, width=2, depth=7, verify_widths=widths, num_sequences=3, context=320,
        resident_share=1.0,
    )  # fmt: skip


def bits(cache: Cache) -> list[Tensor]:
    """Keys and values of what is committed."""
    return [kept[:, : cache.length].clone() for kept in (*cache.keys, *cache.values)]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, some, others))


def read_alone(artifact: Artifact, prompt: list[int], prefill_chunk_tokens: int) -> list[Tensor]:
    plan = replace(artifact.plan, prefill_chunk_tokens=prefill_chunk_tokens)
    with Engine.open(replace(artifact, plan=plan)) as engine, engine.new_sequence() as sequence:
        generated(sequence, prompt, GenerationParams(1))
        return bits(sequence.cache)


def test_a_prompts_bits_do_not_depend_on_its_pieces(artifact: Artifact) -> None:
    expected = read_alone(artifact, PROMPT, 256)
    for prefill_chunk_tokens in (16, 40, 64, 150):
        assert equal(read_alone(artifact, PROMPT, prefill_chunk_tokens), expected), (
            prefill_chunk_tokens
        )


def test_what_answers_leave_in_the_cache_is_what_reading_them_would_give(
    artifact: Artifact,
) -> None:
    """So a next turn, which reuses it, has the answer of a fresh one."""
    for method in ("substitute", "plain"):
        how = OpenOptions(method)
        with Engine.open(artifact, how) as engine, engine.new_sequence() as sequence:
            said = generated(sequence, PROMPT, GenerationParams(60))
            whole = [*PROMPT, *said]
            kept, expected = bits(sequence.cache), read_alone(artifact, whole[:-1], 256)
            assert equal(kept, expected), method
            again = [*whole, 9, 10, 11]
            following = generated(sequence, again, GenerationParams(30))
            assert sequence.stats.cached_tokens == len(whole) - 1
            with engine.new_sequence() as fresh:
                assert generated(fresh, again, GenerationParams(30)) == following


def test_unpadded_decoding_reuses_what_was_read_as_a_prompt(artifact: Artifact) -> None:
    how = OpenOptions("plain", padded=False)
    with Engine.open(artifact, how) as engine, engine.new_sequence() as sequence:
        whole = [*OTHER, *generated(sequence, OTHER, GenerationParams(20))]
        following = generated(sequence, [*whole, 9], GenerationParams(20))
        assert sequence.stats.cached_tokens == len(OTHER)
        with engine.new_sequence() as fresh:
            assert generated(fresh, [*whole, 9], GenerationParams(20)) == following


def test_prompts_are_read_while_others_answer_and_change_nothing_of_them(
    artifact: Artifact,
) -> None:
    def params() -> GenerationParams:
        return GenerationParams(40, SamplingParams(0.7, seed=3))

    with Engine.open(artifact) as engine, engine.new_sequence() as alone:
        expected = {n: generated(alone, prompt, params()) for n, prompt in enumerate(prompts())}
    with Engine.open(artifact) as engine:
        first, second, third = (engine.new_sequence() for _ in range(3))
        said: dict[Sequence, list[int]] = {first: [], second: [], third: []}

        def step() -> None:
            assert engine.step()
            for sequence, tokens in said.items():
                tokens += sequence.take_new_tokens()

        first.begin(prompts()[0], params())
        while len(said[first]) < 5:
            step()
        before = len(said[first])
        second.begin(prompts()[1], params())
        third.begin(prompts()[2], params())
        step()
        assert 0 < second.cache.length <= MIXED_PREFILL_ROWS < len(prompts()[1])
        assert len(said[first]) > before, "it did not wait for the prompt"
        while any(map(engine.is_active, said)):
            step()
        assert dict(enumerate(said.values())) == expected
        for sequence, prompt in zip(said, prompts(), strict=True):
            whole = [*prompt, *said[sequence]]
            assert equal(bits(sequence.cache), read_alone(artifact, whole[:-1], 256))


def prompts() -> list[list[int]]:
    return [OTHER, [*PROMPT, *OTHER], OTHER[5:]]


def test_short_prompts_share_one_stream(artifact: Artifact) -> None:
    with Engine.open(artifact) as engine:
        sequences = [engine.new_sequence() for _ in range(3)]
        for n, sequence in enumerate(sequences):
            sequence.begin(OTHER[n:], GenerationParams(1))
        assert engine.step() and not engine.step()
        assert [len(sequence.take_new_tokens()) for sequence in sequences] == [1, 1, 1]


def test_a_prompts_calls_have_room_for_it_and_waste_little(artifact: Artifact) -> None:
    plan = replace(artifact.plan, prompt_widths=(8, 16, 64))
    assert split_rows(plan.prompt_widths, 1) == [8]
    assert split_rows(plan.prompt_widths, 64) == [64]
    assert split_rows(plan.prompt_widths, 150) == [64, 64, 64]
    assert split_rows(plan.prompt_widths, 140) == [64, 64, 16]
    for num_rows in range(8, 300):
        for num_tokens in (1, 7, 8, 9, 65, 150, 1000):
            count = tokens_that_fit(plan, num_tokens, num_rows)
            assert 0 < count <= num_tokens
            assert sum(split_rows(plan.prompt_widths, count)) <= num_rows
    assert tokens_that_fit(plan, 5, 7) == 0


# Log probabilities


@pytest.mark.parametrize("method", ["substitute", "plain"])
def test_log_probabilities_are_the_exact_models(artifact: Artifact, method: Method) -> None:
    """The same for a token wherever it is computed: in an answer, in a prompt, alone."""
    params = GenerationParams(30, SamplingParams(0.8, seed=1), logprobs=3)
    with Engine.open(artifact, OpenOptions(method)) as engine:
        with engine.new_sequence() as sequence:
            said = generated(sequence, OTHER, params)
            found = sequence.logprobs
            assert [one.token for one in found] == said and len(said) == 30
        with engine.new_sequence() as sequence:
            whole = [*OTHER, *said]
            generated(sequence, whole, GenerationParams(1, prompt_logprobs=3))
            of_prompt = sequence.prompt_logprobs
        assert [one.token for one in of_prompt] == whole[1:]
        assert of_prompt[len(OTHER) - 1 :] == found
        for one in found:
            values = [value for _, value in one.top]
            assert len(values) == 3 and values == sorted(values, reverse=True)
            assert one.logprob <= values[0] <= 0
            assert dict(one.top).get(one.token, one.logprob) == one.logprob


def test_a_greedy_answers_tokens_are_the_likeliest(artifact: Artifact) -> None:
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        generated(sequence, OTHER, GenerationParams(20, logprobs=1))
        assert all(one.top == ((one.token, one.logprob),) for one in sequence.logprobs)
        generated(sequence, OTHER, GenerationParams(20, logprobs=0))
        assert all(one.top == () for one in sequence.logprobs) and len(sequence.logprobs) == 20
        generated(sequence, OTHER, GenerationParams(20))
        assert sequence.logprobs == []


def test_prompts_of_which_log_probabilities_are_wanted_are_read_beside_others(
    artifact: Artifact,
) -> None:
    long = [11 + n % 700 for n in range(200)]
    asked = [(long, 3), (OTHER, None), (PROMPT, 2)]
    with Engine.open(artifact) as engine:
        expected = []
        for prompt, wanted in asked:
            with engine.new_sequence() as sequence:
                said = generated(sequence, prompt, GenerationParams(3, prompt_logprobs=wanted))
                expected.append((said, sequence.prompt_logprobs))
        several = [engine.new_sequence() for _ in asked]
        for sequence, (prompt, wanted) in zip(several, asked, strict=True):
            sequence.begin(prompt, GenerationParams(3, prompt_logprobs=wanted))
        first = engine._next_chunks().values()
        most = engine.plan.verify_width
        assert [len(chunk.tokens) for chunk in first] == [most, len(OTHER), most]
        while engine.step():
            pass
        assert [(one.take_new_tokens(), one.prompt_logprobs) for one in several] == expected


def test_a_prompt_is_read_beside_an_answer_also_where_no_width_of_prompts_is_narrow(
    artifact: Artifact,
) -> None:
    with Engine.open(artifact) as engine:
        narrow = MIXED_PREFILL_ROWS + 8
        engine.plan = replace(engine.plan, prefill_chunk_tokens=512, prompt_widths=(narrow,))
        reading, answering = engine.new_sequence(), engine.new_sequence()
        reading.begin(PROMPT, GenerationParams(4))
        engine.add(answering)
        engine.start_decoding(answering)
        assert [len(chunk.tokens) for chunk in engine._next_chunks().values()] == [narrow]


def test_log_probabilities_of_a_prompt_need_not_fit_the_rows_of_one_pass(
    artifact: Artifact,
) -> None:
    params = GenerationParams(2, prompt_logprobs=2)
    with Engine.open(artifact) as engine:
        with engine.new_sequence() as sequence:
            generated(sequence, PROMPT, params)
            expected = sequence.prompt_logprobs
        others = [engine.new_sequence() for _ in range(2)]
        for other in others:
            other.begin(OTHER, GenerationParams(100))
        with engine.new_sequence() as sequence:
            generated(sequence, PROMPT, params)
            assert sequence.prompt_logprobs == expected and len(expected) == len(PROMPT) - 1
