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

# New tokens -> None to go on, or the number of them (1 or more) that the answer ends after.
StoppingCriteria = Callable[[Tokens[int]], int | None]
FinishReason = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True)
class GenerationParams:
    """Parameters of one answer.

    max_tokens: 1 or more. stop_token_ids: ids that end the answer, which includes the one met.
    stopping_criteria: called with each round's tokens before they are committed (stop strings).
    constraint: which tokens the answer may have; its state is this answer's own. logprobs: number
    of likeliest tokens to report with each token of the answer, prompt_logprobs: with each of the
    prompt; None: report nothing. lossy: which drafted tokens are kept although they are not the
    exact model's; with None, or under a constraint, none are.
    """

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
    """Statistics of one answer. Seconds and bytes are those of its rounds, the batch included."""

    method: Method
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the cache
    time_to_first_token_seconds: float = 0.0
    generated_tokens: int = 0
    includes_digest_check: bool = False  # the first token also waited for digests
    drafted: tuple[int, ...] = ()  # levels, per round
    drafted_tokens: int = 0  # in all levels
    proposed: tuple[int, ...] = ()  # levels that took no pass of the substitutes, per round
    accepted: tuple[int, ...] = ()  # drafted tokens in the answer, per round
    lossy_tokens: int = 0  # not the exact model's own
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
    """One conversation, made by Engine.new_sequence. Answers follow each other: the cache keeps the
    prefix that a prompt shares with the text before. Close it, or use it as a context manager."""

    def __init__(self, engine: "Engine", cache: Cache) -> None:
        self._engine = engine
        self.cache = cache
        self.params = GenerationParams()
        self.stats = Stats(engine.method)
        self.state = DecodeState(cache, root=0, max_tokens=0)
        self.logprobs: list[TokenLogprobs] = []  # of the answer's tokens, if requested
        self.prompt_logprobs: list[TokenLogprobs] = []  # of the prompt's, from the second one on
        self._prompt: list[int] = []
        self._num_prefilled = 0  # leading tokens of the cache that were prefilled, not decoded
        self.finish_reason: FinishReason | None = None  # None: decoding, or not begun
        self._new_tokens: list[int] = []  # not yet returned
        self._closed = False

    def generate(self, prompt: list[int], params: GenerationParams) -> Iterator[list[int]]:
        """Yield new token ids as they are decided. Other decoding sequences of the engine advance
        with it. The answer ends when the loop is left, at another `generate` or `begin`, or when
        the sequence is closed.

        Raises SubspecError(USAGE) for a prompt that is empty, leaves no room in the plan's context
        or has ids beyond the vocabulary.
        """
        self.begin(prompt, params)
        state = self.state  # each answer has its own
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
        """Begin an answer: Engine.step prefills the prompt, then decodes."""
        if params.constraint is not None:
            params = replace(params, lossy=None)
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
        # A constraint ends at these tokens, even if the answer goes on after them.
        ends = params.stop_token_ids.union(self._engine.artifact.spec.eos_token_ids)
        sampler = Sampler(params.sampling, prompt, ends, params.constraint)
        max_tokens = min(params.max_tokens, max_answer_tokens)
        self.state = DecodeState(
            cache, 0, max_tokens, sampler, params.logprobs, params.lossy, params.stop_token_ids
        )
        self._engine.add(self)

    @property
    def num_cacheable(self) -> int:
        """Number of tokens in the cache with the bits of a prefill: all, except those of an answer
        decoded without padding."""
        cache = self.cache
        return cache.length if self._engine.padded else cache.reachable(self._num_prefilled)

    def restore(
        self, tokens: list[int], checkpoints: Tokens[Checkpoint] = (), window_start: int = 0
    ) -> None:
        """Use slots that already hold the results of a prefill of `tokens`; layers with windows
        hold those from `window_start` on. checkpoints: of delta nets, the last one behind all
        tokens."""
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
        """Return the next `num_tokens` tokens of the prompt as a chunk to prefill."""
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

    def finish_chunk(self, chunk: PrefillChunk, result: PrefillResult, seconds: float) -> None:
        """Commit a chunk of the prompt. After the last one this sequence decodes."""
        with self._rolls_back_on_error():
            commit_chunk(chunk, result)
        self.prompt_logprobs += result.prompt_logprobs
        so_far = self.stats.time_to_first_token_seconds
        self.stats = replace(self.stats, time_to_first_token_seconds=so_far + seconds)
        if result.error is not None:
            self._engine.remove(self)
            raise result.error
        if result.first_token is None:
            return
        self.state.root = result.first_token
        try:
            kept = self._num_kept([result.first_token])
        except BaseException:
            self._engine.remove(self)
            raise
        self.state.max_tokens -= kept
        self.state.sampler.push(result.first_token)
        self._append([result.first_token], result.first_token_logprobs)
        self._engine.start_decoding(self)
        if self.finish_reason is not None:
            self._engine.remove(self)

    def finish_round(
        self,
        result: Round,
        draft_seconds: float,
        verify_seconds: float,
        wait_seconds: float,
        streamed_bytes: int,
    ) -> None:
        """Commit and give out what is kept of a round. An error of the answer's `stopping_criteria`
        or constraint ends this answer only."""
        try:
            if result.error is not None:
                raise result.error
            num_kept = self._num_kept(result.new_tokens)
        except BaseException:
            self._engine.remove(self)
            raise
        stats, began = self.stats, time.perf_counter()
        with self._rolls_back_on_error():
            commit_round(self.state, result, num_kept)
        verify_seconds += time.perf_counter() - began
        self.stats = replace(
            stats,
            drafted=(*stats.drafted, result.num_levels),
            drafted_tokens=stats.drafted_tokens + result.num_drafted,
            proposed=(*stats.proposed, result.num_proposed),
            accepted=(*stats.accepted, min(len(result.new_tokens) - 1, num_kept)),
            lossy_tokens=stats.lossy_tokens + sum(place < num_kept for place in result.lossy),
            draft_seconds=stats.draft_seconds + draft_seconds,
            verify_seconds=stats.verify_seconds + verify_seconds,
            stream_wait_seconds=stats.stream_wait_seconds + wait_seconds,
            streamed_bytes=stats.streamed_bytes + streamed_bytes,
        )
        self._append(result.new_tokens[:num_kept], result.logprobs[:num_kept])
        if self.finish_reason is not None:
            self._engine.remove(self)

    def take_new_tokens(self) -> list[int]:
        """Return the tokens since the last call."""
        new_tokens, self._new_tokens = self._new_tokens, []
        return new_tokens

    def stop(self) -> None:
        """End the answer, if one has begun; the cache keeps its tokens."""
        self._engine.remove(self)

    def reset(self) -> None:
        """Stop, and release the answer's grammar, which may take tens of MB, and its log
        probabilities: an idle sequence would keep them."""
        self.stop()
        self.params = replace(
            self.params, constraint=None, stopping_criteria=GenerationParams.stopping_criteria
        )
        self.state = DecodeState(self.cache, root=0, max_tokens=0)
        self.prompt_logprobs, self.logprobs = [], []

    def close(self) -> None:
        """Return the cache to the engine, once: another sequence may have it by the second call."""
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
        """End the answer and empty the cache if a commit fails, for example for lack of memory: it
        may have updated some layers and not others."""
        try:
            yield
        except BaseException:
            self._engine.remove(self)
            self.cache.roll_back(0)
            self.finish_reason = None
            raise

    def _num_cached_tokens(self, prompt: list[int], params: GenerationParams) -> int:
        """Number of the prompt's tokens that are in the cache with the bits of a prefill. The last
        one is always read, for its logits."""
        if params.prompt_logprobs is not None:
            return 0
        cache = self.cache
        shared = min(cache.common_prefix(prompt), self.num_cacheable, len(prompt) - 1)
        if cache.unread is not None and not cache.nets and not cache.unread.reaches(shared):
            # A draft head needs the hidden state before the next token, which is gone: redo one.
            shared = max(0, shared - 1)
        return cache.reachable(shared)

    def _checkpoint_offsets(self, first: int, end: int) -> list[int]:
        """Numbers of tokens behind `first`, up to `end`, after which states are kept as
        checkpoints. One is before the last tokens of the prompt: what a template ends a prompt with
        is not in the next one."""
        interval = CHECKPOINT_TOKENS
        found = {*range(interval * (first // interval + 1), end + 1, interval)}
        found.add(len(self._prompt) - TOKENS_BEHIND_CHECKPOINT)
        return sorted(offset - first for offset in found if first < offset <= end)

    def _max_answer_tokens(self, prompt: list[int], params: GenerationParams) -> int:
        """Largest number of tokens that an answer to the prompt can have. Raises
        SubspecError(USAGE) for a prompt that cannot be answered."""
        if self._closed:
            message = "the sequence is closed"
            raise SubspecError(Exit.USAGE, message, "make another one: engine.new_sequence()")
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
        if (wrong := next((token for token in prompt if not 0 <= token < size), None)) is not None:
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
        """Number of new tokens that are kept. Sets `finish_reason` if the answer ends."""
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
