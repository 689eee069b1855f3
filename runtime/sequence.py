"""Sequence: one conversation in an engine: its cache, its position, its statistics."""

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.footprint import (
    CHECKPOINT_TOKENS,
    TOKENS_BEHIND_CHECKPOINT,
)
from subspec.artifacts.plan import Method
from subspec.runtime.decode import PrefillResult, Round, commit_chunk, commit_round
from subspec.runtime.draft.drafter import DecodeState
from subspec.runtime.exact_pass import PrefillChunk
from subspec.runtime.lossy import Lossy
from subspec.runtime.model.cache import Cache, Checkpoint
from subspec.runtime.model.constraint import Constraint
from subspec.runtime.model.sampling import Sampler, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from subspec.runtime.engine import Engine

# Of new tokens: None to go on, or how many of them the answer ends after (1 or more).
StoppingCriteria = Callable[[Tokens[int]], int | None]
FinishReason = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True)
class GenerationParams:
    """max_tokens: 1 or more. stop_token_ids: ids that end the answer; the one met is part of it.
    stopping_criteria: asked about each round's tokens before they are committed (stop strings).
    constraint: what the answer may say, a state of its own. logprobs: how many of the likeliest
    tokens to report with each token of the answer, prompt_logprobs: with each of the prompt; None:
    report nothing. lossy: which drafted tokens are kept although they are not the exact model's;
    None: none, as under a constraint."""

    max_tokens: int = 512
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: frozenset[int] = frozenset()
    stopping_criteria: StoppingCriteria = lambda tokens: None
    constraint: Constraint | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    lossy: Lossy | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise SubspecError(Exit.USAGE, f"max_tokens is {self.max_tokens}, expected 1 or more")


@dataclass(frozen=True)
class Stats:
    """What one answer took. Seconds and bytes are those of its rounds, the batch included."""

    method: Method
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, that were in the cache already
    time_to_first_token_seconds: float = 0.0
    generated_tokens: int = 0
    includes_digest_check: bool = False  # its first token waited for digests too
    drafted: tuple[int, ...] = ()  # levels, by round
    drafted_tokens: int = 0  # of all levels
    proposed: tuple[int, ...] = ()  # levels that took no pass of the substitutes, by round
    accepted: tuple[int, ...] = ()  # drafted tokens that the answer has, by round
    lossy_tokens: int = 0  # of the answer, that are not the exact model's own
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    stream_wait_seconds: float = 0.0
    streamed_bytes: int = 0  # while decoding; the prompt's pass is not counted

    @property
    def drafted_levels(self) -> int:
        return sum(self.drafted)

    @property
    def decode_seconds(self) -> float:
        return self.draft_seconds + self.verify_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first one over the seconds after the first one."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


class Sequence:
    """Made by Engine.new_sequence. Answers follow each other: the cache keeps what a prompt shares
    with what came before. Close it, or use it as a context manager."""

    def __init__(self, engine: "Engine", cache: Cache) -> None:
        self._engine = engine
        self.cache = cache
        self.params = GenerationParams()
        self.stats = Stats(engine.method)
        self.state = DecodeState(cache, root=0, max_tokens=0)
        self.logprobs: list[TokenLogprobs] = []  # of the answer's tokens, if it asked for them
        self.prompt_logprobs: list[TokenLogprobs] = []  # of the prompt's, from the second one on
        self._prompt: list[int] = []
        self._num_prefilled = 0  # leading tokens of the cache that were read, not decoded
        self.finish_reason: FinishReason | None = None  # None: it is decoding, or never was
        self._new_tokens: list[int] = []  # not yet given out
        self._closed = False

    def generate(self, prompt: list[int], params: GenerationParams) -> Iterator[list[int]]:
        """Yields new token ids as they are decided. Other sequences of the engine that are decoding
        advance with it. Leaving the loop ends the answer, and so does another `generate` or
        `begin`, or closing the sequence.

        Raises SubspecError(USAGE) for a prompt that is empty, leaves no room in the plan's context
        or has ids beyond the vocabulary.
        """
        self.begin(prompt, params)
        state = self.state  # another answer has another one
        try:
            while self.state is state and (self._new_tokens or self._engine.is_active(self)):
                if not self._new_tokens:
                    self._engine.step()
                if self._new_tokens:
                    yield self.take_new_tokens()
        finally:
            if self.state is state:
                self._engine.remove(self)

    def begin(self, prompt: list[int], params: GenerationParams) -> None:
        """Begins an answer: Engine.step reads the prompt, and then decodes."""
        max_answer_tokens = self._max_answer_tokens(prompt, params)
        self._engine.remove(self)
        cache = self.cache
        cache.roll_back(self._num_cached_tokens(prompt, params))
        cache.begin_prompt(len(prompt) - TOKENS_BEHIND_CHECKPOINT)
        self.params, self.finish_reason, self._new_tokens = params, None, []
        self.prompt_logprobs, self.logprobs = [], []
        self._prompt, self._num_prefilled = list(prompt), len(prompt)  # the caller's may change
        self.stats = Stats(
            self._engine.method,
            prompt_tokens=len(prompt),
            cached_tokens=cache.length,
            includes_digest_check=self._engine.num_prefill_chunks == 0,
        )
        # Also where the answer goes on after them, what a constraint has to say ends there.
        ends = params.stop_token_ids.union(self._engine.artifact.spec.eos_token_ids)
        sampler = Sampler(params.sampling, prompt, ends, params.constraint)
        max_tokens = min(params.max_tokens, max_answer_tokens)
        lossy = params.lossy if params.constraint is None else None
        self.state = DecodeState(
            cache, 0, max_tokens, sampler, params.logprobs, lossy, params.stop_token_ids
        )
        self._engine.add(self)

    @property
    def num_cacheable(self) -> int:
        """How many tokens of the cache have the bits that reading them would give: all, but with
        unpadded decoding, which computes those of an answer in another way."""
        cache = self.cache
        return cache.length if self._engine.padded else cache.reachable(self._num_prefilled)

    def restore(
        self, tokens: list[int], checkpoints: Tokens[Checkpoint] = (), window_start: int = 0
    ) -> None:
        """The slots hold what reading `tokens` gave, in layers with windows of those from
        `window_start` on, as delta nets' checkpoints do, of which the last one is behind all of
        them."""
        self.cache.resume(tokens, checkpoints, window_start)
        self._num_prefilled = len(tokens)

    @property
    def unread(self) -> list[int]:
        """Tokens of the prompt that are not in the cache yet."""
        return self._prompt[self.cache.length :]

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None

    def next_chunk(self, num_tokens: int) -> PrefillChunk:
        """The next tokens of the prompt, to be read."""
        first, params = self.cache.length, self.params
        end = first + num_tokens
        ends = end == len(self._prompt)
        chunk = PrefillChunk(
            self.cache,
            self._prompt[first:end],
            self.state.sampler if ends else None,
            params.logprobs,
            checkpoints_at=self._checkpoint_offsets(first, end) if self.cache.nets else (),
        )
        if params.prompt_logprobs is None:
            return chunk
        return replace(
            chunk,
            next_tokens=self._prompt[first + 1 : end + 1],
            num_prompt_logprobs=params.prompt_logprobs,
        )

    def finish_chunk(self, chunk: PrefillChunk, done: PrefillResult, seconds: float) -> None:
        """A chunk of the prompt was read. After the last one this sequence decodes."""
        with self._rolls_back_on_error():
            commit_chunk(chunk, done)
        self.prompt_logprobs += done.prompt_logprobs
        so_far = self.stats.time_to_first_token_seconds
        self.stats = replace(self.stats, time_to_first_token_seconds=so_far + seconds)
        if done.error is not None:
            self._engine.remove(self)
            raise done.error
        if done.first_token is None:
            return
        self.state.root = done.first_token
        try:
            kept = self._num_kept([done.first_token])
        except BaseException:
            self._engine.remove(self)
            raise
        self.state.max_tokens -= kept
        self.state.sampler.push(done.first_token)
        self._append([done.first_token], done.first_token_logprobs)
        self._engine.start_decoding(self)
        if self.finish_reason is not None:
            self._engine.remove(self)

    def finish_round(
        self,
        done: Round,
        draft_seconds: float,
        verify_seconds: float,
        wait_seconds: float,
        streamed_bytes: int,
    ) -> None:
        """A round of this sequence: what is kept of it is committed and given out. An error of the
        answer's `stopping_criteria` or constraint ends it: the others go on without it."""
        try:
            if done.error is not None:
                raise done.error
            num_kept = self._num_kept(done.new_tokens)
        except BaseException:
            self._engine.remove(self)
            raise
        stats, began = self.stats, time.perf_counter()
        with self._rolls_back_on_error():
            commit_round(self.state, done, num_kept)
        verify_seconds += time.perf_counter() - began
        self.stats = replace(
            stats,
            drafted=(*stats.drafted, done.num_levels),
            drafted_tokens=stats.drafted_tokens + done.num_drafted,
            proposed=(*stats.proposed, done.num_proposed),
            accepted=(*stats.accepted, min(len(done.new_tokens) - 1, num_kept)),
            lossy_tokens=stats.lossy_tokens + sum(place < num_kept for place in done.lossy),
            draft_seconds=stats.draft_seconds + draft_seconds,
            verify_seconds=stats.verify_seconds + verify_seconds,
            stream_wait_seconds=stats.stream_wait_seconds + wait_seconds,
            streamed_bytes=stats.streamed_bytes + streamed_bytes,
        )
        self._append(done.new_tokens[:num_kept], done.logprobs[:num_kept])
        if self.finish_reason is not None:
            self._engine.remove(self)

    def take_new_tokens(self) -> list[int]:
        """Tokens since the last call."""
        new_tokens, self._new_tokens = self._new_tokens, []
        return new_tokens

    def stop(self) -> None:
        """Ends the answer, if one has begun; the cache keeps what it has."""
        self._engine.remove(self)

    def reset(self) -> None:
        """Stops, and releases the answer's grammar, which may have tens of MB, and its log
        probabilities: an idle sequence would keep them."""
        self.stop()
        self.params = replace(
            self.params, constraint=None, stopping_criteria=GenerationParams.stopping_criteria
        )
        self.state = DecodeState(self.cache, root=0, max_tokens=0)
        self.prompt_logprobs, self.logprobs = [], []

    def close(self) -> None:
        """Gives the cache back to the engine, once: another sequence may have it by now."""
        if not self._closed:
            self._closed = True
            self._engine.remove(self)
            self._engine.release_cache(self.cache)

    def __enter__(self) -> "Sequence":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _rolls_back_on_error(self) -> Iterator[None]:
        """A commit that fails, for want of memory, may have moved some layers on and others not:
        the answer ends, and nothing of its cache is used again."""
        try:
            yield
        except BaseException:
            self._engine.remove(self)
            self.cache.roll_back(0)
            self.finish_reason = None
            raise

    def _num_cached_tokens(self, prompt: list[int], params: GenerationParams) -> int:
        """How many of the prompt's tokens are in the cache, with the bits that reading them would
        give. The last one is read, for its logits."""
        if params.prompt_logprobs is not None:
            return 0
        cache = self.cache
        shared = min(cache.common_prefix(prompt), self.num_cacheable, len(prompt) - 1)
        if cache.unread is not None and not cache.nets and not cache.unread.reaches(shared):
            # A draft head reads a token with the hidden state before it, which is gone: once more.
            shared = max(0, shared - 1)
        return cache.reachable(shared)

    def _checkpoint_offsets(self, first: int, end: int) -> list[int]:
        """Where the prompt's tokens from `first` on, up to `end`, have checkpoints: what templates
        end a prompt with is not what the next prompt has in its place."""
        interval = CHECKPOINT_TOKENS
        found = {*range(interval * (first // interval + 1), end + 1, interval)}
        found.add(len(self._prompt) - TOKENS_BEHIND_CHECKPOINT)
        return sorted(offset - first for offset in found if first < offset <= end)

    def _max_answer_tokens(self, prompt: list[int], params: GenerationParams) -> int:
        """How many tokens an answer to the prompt can have."""
        if self._closed:
            message = "the sequence is closed"
            raise SubspecError(Exit.USAGE, message, "another one: engine.new_sequence()")
        self._engine.check_open()
        context = self._engine.plan.context
        if not 0 < len(prompt) < context:
            shorter = f"shorten it, or plan with --context {len(prompt) + 256} or more"
            raise SubspecError(
                Exit.USAGE,
                f"the prompt has {len(prompt)} tokens, expected 1 to {context - 1}",
                shorter if prompt else "give some text",
            )
        size = self._engine.artifact.spec.vocab_size
        if (wrong := next((one for one in prompt if not 0 <= one < size), None)) is not None:
            message = f"the prompt has the token id {wrong}, expected 0 to {size - 1}"
            raise SubspecError(Exit.USAGE, message, "use the model's own tokenizer")
        biased = (token for token, _ in params.sampling.logit_bias if not 0 <= token < size)
        if (wrong := next(biased, None)) is not None:
            message = f"logit_bias has the token id {wrong}, expected 0 to {size - 1}"
            raise SubspecError(Exit.USAGE, message)
        return context - len(prompt)

    def _append(self, tokens: list[int], logprobs: Tokens[TokenLogprobs]) -> None:
        self._new_tokens += tokens
        self.logprobs += logprobs
        count = self.stats.generated_tokens + len(tokens)
        self.stats = replace(self.stats, generated_tokens=count)

    def _num_kept(self, new_tokens: list[int]) -> int:
        """How many of the new tokens are kept; says in `finish_reason` if the answer ends."""
        left, reason = self.state.max_tokens, self.finish_reason
        kept = new_tokens[:left]
        if len(new_tokens) >= left:
            short = self.stats.generated_tokens + left < self.params.max_tokens
            reason = "context" if short else "length"
        ends = (index for index, token in enumerate(kept) if token in self.params.stop_token_ids)
        if (end := next(ends, None)) is not None:
            kept, reason = kept[: end + 1], "eos"
        if (count := self.params.stopping_criteria(kept)) is not None:
            if count < 1:
                raise SubspecError(
                    Exit.USAGE, f"stopping_criteria returned {count}, expected 1 or more, or None"
                )
            kept, reason = kept[:count], "stop"
        self.finish_reason = reason
        return len(kept)
