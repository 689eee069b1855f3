"""The engine's thread: who waits, who answers, who goes; every answer is what it would be alone."""

import asyncio
import gc
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_artifact, replan
from counted import Counted
from running import PREDICTED, generated

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.runs import read_runs
from subspec.planner.model.hub import DEMO
from subspec.runtime.decode import PrefillResult, Round
from subspec.runtime.draft.drafter import DecodeState
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.exact_pass import PrefillChunk
from subspec.runtime.lossy import Lossy
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import GenerationParams, Sequence
from subspec.runtime.server import scheduler
from subspec.runtime.server.generation import (
    Generation,
    GenerationRequest,
    Outcome,
    Piece,
    QueueFull,
)
from subspec.runtime.server.prefix_cache import Prefix, PrefixCache
from subspec.runtime.server.scheduler import Scheduler
from subspec.runtime.text.streaming import AnswerText
from subspec.runtime.text.tokenizer import ChatTokenizer, load_tokenizer

PROMPTS = [[3 + (17 * n + k) % 900 for n in range(30 + 25 * k)] for k in range(5)]
PARAMS = GenerationParams(24, SamplingParams(0.8, seed=4))
SLOW = 20_000_000.0  # bytes a second: a round takes a fifth of one

PassResult = tuple[list[Round], list[PrefillResult]]
Use = Callable[[Scheduler], Awaitable[None]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("scheduler") / "artifact"
    return build_artifact(
        DEMO, out, width=2, depth=5, num_sequences=3, context=512, resident_share=0.5
    )


@pytest.fixture(scope="module")
def tokenizer(artifact: Artifact) -> ChatTokenizer:
    return load_tokenizer(artifact.path / "tokenizer")


@pytest.fixture(scope="module")
def alone(artifact: Artifact) -> list[list[int]]:
    """The answer to each prompt by a fresh sequence."""
    found = []
    with Engine.open(artifact) as engine:
        for prompt in PROMPTS:
            with engine.new_sequence() as sequence:
                found.append(generated(sequence, prompt, PARAMS))
    return found


def use(
    artifact: Artifact,
    tokenizer: ChatTokenizer,
    use: Use,
    num_sequences: int = 3,
    queue_limit: int = 8,
    prefix_cache_bytes: int = 0,
    link_bandwidth: float | None = None,
    record: bool = False,
    lossy: Lossy | None = None,
) -> None:
    options = OpenOptions(link_bandwidth=link_bandwidth)

    async def run() -> None:
        scheduler = Scheduler(
            lambda progress: Engine.open(artifact, options, progress),
            tokenizer,
            num_sequences,
            queue_limit,
            prefix_cache_bytes,
            record,
            lossy,
        )
        scheduler.start()
        while scheduler.status.phase == "loading":
            await asyncio.sleep(0.01)
        assert scheduler.status.phase == "ready", scheduler.status.error
        try:
            await use(scheduler)
        finally:
            await scheduler.close(0)
        assert scheduler.status.phase in ("closed", "failed")

    asyncio.run(run())


def asked(prompt: list[int], params: GenerationParams = PARAMS) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), params)


async def pieces_of(generation: Generation) -> list[Piece]:
    return [piece async for piece in generation]


async def tokens_of(generation: Generation) -> list[int]:
    return [token for piece in await pieces_of(generation) for token in piece.token_ids]


def test_many_answers_together_are_what_each_is_alone(
    artifact: Artifact, tokenizer: ChatTokenizer, alone: list[list[int]]
) -> None:
    async def check(scheduler: Scheduler) -> None:
        generations = [scheduler.submit(asked(prompt)) for prompt in PROMPTS]
        assert [one.queue_position for one in generations][-2:] != [0, 0]
        assert await asyncio.gather(*map(tokens_of, generations)) == alone
        outcomes: list[Outcome] = [one.outcome for one in generations]
        assert {one.reason for one in outcomes} == {"length"}
        assert outcomes[4].queue_seconds > outcomes[0].queue_seconds
        assert all(one.stats.generated_tokens == 24 for one in outcomes)
        assert scheduler.num_running == scheduler.num_waiting == 0 < scheduler.peak_bytes

    use(artifact, tokenizer, check)


def test_the_text_is_that_of_the_tokens_and_ends_before_a_stop_text(
    artifact: Artifact, tokenizer: ChatTokenizer
) -> None:
    prompt = tokenizer.plain_ids("def read_file(path):")
    params = GenerationParams(60)

    async def check(scheduler: Scheduler) -> None:
        whole = scheduler.submit(asked(prompt, params))
        pieces = await pieces_of(whole)
        text = "".join(piece.text for piece in pieces)
        stop = text[20:24]
        request = GenerationRequest(tuple(prompt), params, stop=(stop,))
        stopped = scheduler.submit(request)
        some = await pieces_of(stopped)
        assert "".join(piece.text for piece in some) == text[: text.index(stop)]
        assert (stopped.outcome.reason, stopped.outcome.stop_text) == ("stop", stop)
        assert whole.outcome.stop_text is None

    use(artifact, tokenizer, check)


def test_more_requests_than_may_wait_are_refused_with_an_estimate(
    artifact: Artifact, tokenizer: ChatTokenizer
) -> None:
    async def check(scheduler: Scheduler) -> None:
        taken = [scheduler.submit(asked(PROMPTS[0])) for _ in range(3)]
        with pytest.raises(QueueFull) as caught:
            scheduler.submit(asked(PROMPTS[0]))
        assert caught.value.retry_after_seconds >= 1
        await asyncio.gather(*map(tokens_of, taken))
        await tokens_of(scheduler.submit(asked(PROMPTS[0])))

    use(artifact, tokenizer, check, num_sequences=1, queue_limit=2, link_bandwidth=SLOW)


def test_who_cancels_leaves_at_once_whether_waiting_reading_or_answering(
    artifact: Artifact, tokenizer: ChatTokenizer
) -> None:
    long = GenerationParams(300)

    async def check(scheduler: Scheduler) -> None:
        first, waiting = (scheduler.submit(asked(PROMPTS[0], long)) for _ in range(2))
        async for piece in first:
            if piece.token_ids:
                break
        assert (first.queue_position, waiting.queue_position) == (0, 1)
        waiting.cancel()
        assert scheduler.num_waiting == 0
        reading = scheduler.submit(asked(PROMPTS[4], long))
        first.cancel()
        first.cancel()
        assert await tokens_of(waiting) == []
        begun = time.monotonic()
        while reading.queue_position:
            await asyncio.sleep(0.01)
        reading.cancel()
        last = scheduler.submit(asked(PROMPTS[1], GenerationParams(3)))
        assert len(await tokens_of(last)) == 3
        assert time.monotonic() - begun < 20
        assert await tokens_of(reading) == []

    use(artifact, tokenizer, check, num_sequences=1, link_bandwidth=SLOW)


def test_a_next_turn_goes_where_its_prefix_is(artifact: Artifact, tokenizer: ChatTokenizer) -> None:
    async def check(scheduler: Scheduler) -> None:
        for prompt in PROMPTS[:3]:
            await tokens_of(scheduler.submit(asked(prompt)))
        for prompt in (PROMPTS[1], PROMPTS[0], PROMPTS[2]):
            following = scheduler.submit(asked([*prompt, 9]))
            await tokens_of(following)
            assert following.outcome.stats.cached_tokens == len(prompt)

    use(artifact, tokenizer, check)


def test_idle_prefixes_come_back_from_host_memory_with_the_same_bits(
    artifact: Artifact, tokenizer: ChatTokenizer, alone: list[list[int]]
) -> None:
    async def check(scheduler: Scheduler) -> None:
        said = [await tokens_of(scheduler.submit(asked(prompt))) for prompt in PROMPTS]
        assert said == alone
        turns = [[*prompt, *some, 9, 10] for prompt, some in zip(PROMPTS, said, strict=True)]
        with Engine.open(artifact) as engine:
            expected = []
            for turn in turns:
                with engine.new_sequence() as sequence:
                    expected.append(generated(sequence, turn, PARAMS))
        for turn, tokens in zip(turns, expected, strict=True):
            following = scheduler.submit(asked(turn))
            assert await tokens_of(following) == tokens
            assert following.outcome.stats.cached_tokens == len(turn) - 3
        assert 0 < scheduler._prefixes.num_bytes <= 8 << 20

    use(artifact, tokenizer, check, num_sequences=1, prefix_cache_bytes=8 << 20)


def test_a_prefix_comes_back_although_its_room_goes_to_what_was_in_its_place(
    artifact: Artifact, tokenizer: ChatTokenizer, alone: list[list[int]]
) -> None:
    """Two conversations take turns, and the host has room for one of them."""
    room = 400_000

    async def check(scheduler: Scheduler) -> None:
        for index in (1, 2, 1, 2, 1):
            generation = scheduler.submit(asked(PROMPTS[index]))
            assert await tokens_of(generation) == alone[index]
            assert scheduler._prefixes.num_bytes <= room
        assert generation.outcome.stats.cached_tokens == len(PROMPTS[1]) - 1

    use(artifact, tokenizer, check, num_sequences=1, prefix_cache_bytes=room)


def test_an_idle_engine_keeps_no_grammar_and_no_log_probabilities(
    artifact: Artifact, tokenizer: ChatTokenizer
) -> None:
    class Anything:
        def allowed(self) -> None:
            pass

        def push(self, token: int) -> None:
            pass

        def rollback(self, num_tokens: int) -> None:
            pass

    async def check(scheduler: Scheduler) -> None:
        grammar = Anything()
        known, watched = [None], weakref.ref(grammar)
        params = replace(PARAMS, constraint=grammar, logprobs=20, prompt_logprobs=20)
        generation = scheduler.submit(asked(PROMPTS[0], params))
        found = await pieces_of(generation)
        known = [weakref.ref(one) for piece in found for one in piece.logprobs]
        known += [weakref.ref(one) for one in generation.outcome.prompt_logprobs]
        assert watched() is grammar and len(known) == 24 + len(PROMPTS[0]) - 1
        del grammar, params, generation, found
        limit = time.monotonic() + 20  # the engine's thread goes on after the last piece
        while watched() is not None and time.monotonic() < limit:
            await asyncio.sleep(0.01)
            gc.collect()
        assert watched() is None and not any(one() for one in known)

    use(artifact, tokenizer, check)


def test_log_probabilities_come_with_their_tokens(
    artifact: Artifact, tokenizer: ChatTokenizer
) -> None:
    async def check(scheduler: Scheduler) -> None:
        params = replace(PARAMS, logprobs=2, prompt_logprobs=1)
        generation = scheduler.submit(asked(PROMPTS[0], params))
        for piece in await pieces_of(generation):
            assert [one.token for one in piece.logprobs] == list(piece.token_ids)
        said = [one.token for one in generation.outcome.prompt_logprobs]
        assert said == PROMPTS[0][1:]

    use(artifact, tokenizer, check)


def test_a_lossy_scheduler_says_of_each_answer_by_which_rule_it_was_verified(
    artifact: Artifact, tokenizer: ChatTokenizer, alone: list[list[int]]
) -> None:
    """Under a constraint there is none: that answer is exact, so it is predicted and recorded as an
    exact server's are. The lossy one is neither."""
    everything, before = Lossy("prob", 0, 0), len(read_runs(artifact.path))
    predicted = replace(artifact, plan=replace(artifact.plan, predicted={"substitute": PREDICTED}))

    async def check(scheduler: Scheduler) -> None:
        free = scheduler.submit(asked(PROMPTS[0]))
        assert await tokens_of(free) != alone[0]
        assert free.outcome.lossy == everything and free.outcome.stats.lossy_tokens > 0
        assert free.outcome.predicted_tokens_per_second is None
        assert len(read_runs(artifact.path)) == before
        held = scheduler.submit(asked(PROMPTS[0], replace(PARAMS, constraint=Counted(2048))))
        await tokens_of(held)
        assert held.outcome.lossy is None and held.outcome.stats.lossy_tokens == 0
        assert held.outcome.predicted_tokens_per_second == PREDICTED.tokens_per_second

    use(predicted, tokenizer, check, record=True, lossy=everything)
    assert len(read_runs(artifact.path)) == before + 1


def test_only_answers_without_company_are_recorded(
    artifact: Artifact, tokenizer: ChatTokenizer
) -> None:
    async def check(scheduler: Scheduler) -> None:
        await tokens_of(scheduler.submit(asked(PROMPTS[0])))
        assert len(read_runs(artifact.path)) == before + 1
        await asyncio.gather(*(tokens_of(scheduler.submit(asked(p))) for p in PROMPTS[:2]))
        assert len(read_runs(artifact.path)) == before + 1

    before = len(read_runs(artifact.path))
    use(artifact, tokenizer, check, record=True)


def test_a_closing_engine_ends_the_answers_that_are_left(
    artifact: Artifact, tokenizer: ChatTokenizer
) -> None:
    async def check(scheduler: Scheduler) -> None:
        answers = [scheduler.submit(asked(PROMPTS[0], GenerationParams(400))) for _ in range(5)]
        ended = asyncio.gather(*map(tokens_of, answers), return_exceptions=True)
        await asyncio.sleep(0.1)
        await scheduler.close(0)
        assert all(isinstance(one, SubspecError) for one in await ended)
        with pytest.raises(SubspecError, match="closed"):
            scheduler.submit(asked(PROMPTS[0]))

    use(artifact, tokenizer, check, link_bandwidth=SLOW)


def test_a_failed_engine_says_so_to_everybody(
    artifact: Artifact, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    import shutil

    copy = replace(artifact, path=Path(shutil.copytree(artifact.path, tmp_path / "copy")))
    with open(copy.path / "exact.safetensors", "r+b") as file:
        last = copy.part_entries()[copy.stored_parts()[-1].name]
        file.seek(last.offset + 100)
        file.write(bytes(200))

    async def check(scheduler: Scheduler) -> None:
        answers = [scheduler.submit(asked(PROMPTS[0])) for _ in range(4)]
        ended = await asyncio.gather(*map(tokens_of, answers), return_exceptions=True)
        for error in ended:
            assert isinstance(error, SubspecError) and error.exit_code == Exit.CORRUPT
        assert scheduler.status.phase == "failed"

    use(replan(copy, resident_share=0.0, num_sequences=3), tokenizer, check)


@pytest.mark.parametrize("place", ["its beginning", "its text", "what is sent", "its record"])
def test_a_bug_that_one_request_meets_is_told_to_it_and_to_the_log_and_ends_no_other(
    artifact: Artifact,
    tokenizer: ChatTokenizer,
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    owner, name = {
        "its beginning": (scheduler, "StreamingDetokenizer"),
        "its text": (AnswerText, "cut"),
        "what is sent": (AnswerText, "take_new_text"),
        "its record": (scheduler, "run_of"),
    }[place]
    work, is_broken = getattr(owner, name), True

    def broken(*given: Any) -> Any:
        nonlocal is_broken
        if is_broken:
            is_broken = False
            raise KeyError("a bug")
        return work(*given)

    monkeypatch.setattr(owner, name, broken)

    async def run(served: Scheduler) -> None:
        first = served.submit(asked(PROMPTS[0]))
        if place == "its record":
            assert await tokens_of(first) == alone[0], "the answer itself is whole"
        else:
            with pytest.raises(SubspecError, match="the server failed") as failed:
                await asyncio.wait_for(tokens_of(first), 20)
            assert failed.value.exit_code == Exit.UNEXPECTED
        again = [served.submit(asked(prompt)) for prompt in PROMPTS]
        assert [await tokens_of(job) for job in again] == alone
        assert served.status.phase == "ready"

    use(artifact, tokenizer, run, record=True)
    [said] = [one for one in caplog.records if one.message == "a request failed"]
    assert said.exc_info is not None and isinstance(said.exc_info[1], KeyError)


def test_a_bug_of_the_engine_is_told_to_all_who_wait(
    artifact: Artifact, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(engine: Engine, states: list[DecodeState], chunks: list[PrefillChunk]) -> PassResult:
        raise KeyError("a bug")

    monkeypatch.setattr(Engine, "_passes", broken)
    monkeypatch.setattr("threading.excepthook", lambda told: None)  # it goes to the log

    async def run(served: Scheduler) -> None:
        jobs = [served.submit(asked(prompt)) for prompt in PROMPTS]
        for job in jobs:
            with pytest.raises(SubspecError, match="the engine failed: KeyError"):
                await asyncio.wait_for(tokens_of(job), 20)
        assert served.status.phase == "failed"

    use(artifact, tokenizer, run)


def test_a_prefix_that_cannot_be_brought_back_leaves_no_wrong_cache(
    artifact: Artifact,
    tokenizer: ChatTokenizer,
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The copy fails when a part of the cache is another prompt's already."""
    restore = PrefixCache.restore

    def half(cache: PrefixCache, prefix: Prefix, count: int, sequence: Sequence) -> None:
        shorter = replace(prefix, kept=(*prefix.kept[:1], *(one[:, :2] for one in prefix.kept[1:])))
        restore(cache, shorter, count, sequence)

    async def run(served: Scheduler) -> None:
        for prompt in PROMPTS[:2]:
            await tokens_of(served.submit(asked(prompt)))
        monkeypatch.setattr(PrefixCache, "restore", half)
        with pytest.raises(SubspecError, match="the server failed"):
            await tokens_of(served.submit(asked(PROMPTS[0])))
        monkeypatch.setattr(PrefixCache, "restore", restore)
        assert await tokens_of(served.submit(asked(PROMPTS[1]))) == alone[1]
        assert await tokens_of(served.submit(asked(PROMPTS[0]))) == alone[0]

    use(artifact, tokenizer, run, num_sequences=1, prefix_cache_bytes=8 << 20)


@pytest.mark.parametrize(
    "error",
    [
        SubspecError(Exit.RESOURCES, "a system resource is exhausted: Input/output error"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_after_a_shortage_the_next_answers_are_what_they_would_be(
    artifact: Artifact,
    tokenizer: ChatTokenizer,
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    """It ends the answers that there are, in the middle of a stream of weights."""
    passes, count = Engine._passes, 0

    def short(engine: Engine, states: list[DecodeState], chunks: list[PrefillChunk]) -> PassResult:
        nonlocal count
        count += 1
        found = passes(engine, states, chunks)
        if count == 4:
            raise error
        return found

    monkeypatch.setattr(Engine, "_passes", short)

    async def run(scheduler: Scheduler) -> None:
        jobs = [scheduler.submit(asked(prompt)) for prompt in PROMPTS[:2]]
        for job in jobs:
            with pytest.raises(SubspecError) as failed:
                await tokens_of(job)
            assert failed.value.exit_code == Exit.RESOURCES
        again = [scheduler.submit(asked(prompt)) for prompt in PROMPTS]
        assert [await tokens_of(job) for job in again] == alone

    use(artifact, tokenizer, run)
