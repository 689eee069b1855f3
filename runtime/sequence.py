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
from subspec.runtime.decode import Read, Round, keep, keep_piece
from subspec.runtime.draft.drafter import Turn
from subspec.runtime.exact_pass import Piece
from subspec.runtime.lossy import Lossy
from subspec.runtime.model.cache import Cache, Checkpoint
from subspec.runtime.model.constraint import Constraint
from subspec.runtime.model.sampling import Chooser, Sampling, TokenLogprobs

if TYPE_CHECKING:
    from subspec.runtime.engine import Engine

# Of newly emitted tokens: None to go on, or how many of them the answer ends after (1 or more).
Cut = Callable[[Tokens[int]], int | None]
FinishReason = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True)
class GenerationParams:
    """max_tokens: 1 or more. end_tokens: ids that end the answer; the one met is part of it. cut:
    asked about each round's tokens before they are committed (stop strings). constraint: what the
    answer may say, a state of its own. logprobs: how many of the likeliest tokens to report with
    each token of the answer, prompt_logprobs: with each of the prompt; None: report nothing.
    lossy: which drafted tokens are kept although they are not the exact model's; None: none, as
    under a constraint."""

    max_tokens: int = 512
    sampling: Sampling = Sampling()
    end_tokens: frozenset[int] = frozenset()
    cut: Cut = lambda tokens: None
    constraint: Constraint | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    lossy: Lossy | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise SubspecError(Exit.USAGE, f"max_tokens is {self.max_tokens}, expected 1 or more")


@dataclass(frozen=True)
class Stats:
    """What one answer took. Seconds and bytes are those of its rounds, company included."""

    method: Method
    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, that were in the cache already
    time_to_first_token_seconds: float = 0.0
    generated_tokens: int = 0
    first_of_engine: bool = False  # its first token waited for digests too
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
        self.turn = Turn(cache, root=0, max_tokens=0)
        self.logprobs: list[TokenLogprobs] = []  # of the answer's tokens, if it asked for them
        self.prompt_logprobs: list[TokenLogprobs] = []  # of the prompt's, from the second one on
        self._prompt: list[int] = []
        self._num_read = 0  # leading tokens of the cache that were read, not decoded
        self.finish_reason: FinishReason | None = None  # None: it is decoding, or never was
        self._fresh: list[int] = []  # emitted and not yet given out
        self._closed = False

    def generate(self, prompt: list[int], params: GenerationParams) -> Iterator[list[int]]:
        """Yields new token ids as they are decided. Other sequences of the engine that are decoding
        advance with it. Leaving the loop ends the answer, and so does another `generate` or
        `begin`, or closing the sequence.

        Raises SubspecError(USAGE) for a prompt that is empty, leaves no room in the plan's context
        or has ids beyond the vocabulary.
        """
        self.begin(prompt, params)
        turn = self.turn  # another answer has another one
        try:
            while self.turn is turn and (self._fresh or self._engine.is_active(self)):
                if not self._fresh:
                    self._engine.step()
                if self._fresh:
                    yield self.take_fresh()
        finally:
            if self.turn is turn:
                self._engine.leave(self)

    def begin(self, prompt: list[int], params: GenerationParams) -> None:
        """Begins an answer: Engine.step reads the prompt, and then decodes."""
        room = self._room_after(prompt, params)
        self._engine.leave(self)
        cache = self.cache
        cache.roll_back(self._reusable(prompt, params))
        cache.begin_prompt(len(prompt) - TOKENS_BEHIND_CHECKPOINT)
        self.params, self.finish_reason, self._fresh = params, None, []
        self.prompt_logprobs, self.logprobs = [], []
        self._prompt, self._num_read = list(prompt), len(prompt)  # the caller's may change
        self.stats = Stats(
            self._engine.method,
            prompt_tokens=len(prompt),
            reused_tokens=cache.length,
            first_of_engine=self._engine.num_reads == 0,
        )
        # Also where the answer goes on after them, what a constraint has to say ends there.
        ends = params.end_tokens.union(self._engine.artifact.spec.eos_token_ids)
        chooser = Chooser(params.sampling, prompt, ends, params.constraint)
        most = min(params.max_tokens, room)
        lossy = params.lossy if params.constraint is None else None
        self.turn = Turn(cache, 0, most, chooser, params.logprobs, lossy, params.end_tokens)
        self._engine.join(self)

    @property
    def num_reusable(self) -> int:
        """How many tokens of the cache have the bits that reading them would give: all, but with
        unpadded decoding, which computes those of an answer in another way."""
        cache = self.cache
        return cache.length if self._engine.padded else cache.reachable(self._num_read)

    def restored(
        self, tokens: list[int], checkpoints: Tokens[Checkpoint] = (), window_start: int = 0
    ) -> None:
        """The slots hold what reading `tokens` gave, in layers with windows of those from
        `window_start` on, as delta nets' checkpoints do, of which the last one is behind all of
        them."""
        self.cache.resume(tokens, checkpoints, window_start)
        self._num_read = len(tokens)

    @property
    def unread(self) -> list[int]:
        """Tokens of the prompt that are not in the cache yet."""
        return self._prompt[self.cache.length :]

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None

    def piece(self, num_tokens: int) -> Piece:
        """The next tokens of the prompt, to be read."""
        first, params = self.cache.length, self.params
        end = first + num_tokens
        ends = end == len(self._prompt)
        piece = Piece(
            self.cache,
            self._prompt[first:end],
            self.turn.chooser if ends else None,
            params.logprobs,
            stops=self._stops(first, end) if self.cache.nets else (),
        )
        if params.prompt_logprobs is None:
            return piece
        return replace(
            piece,
            following=self._prompt[first + 1 : end + 1],
            num_following_logprobs=params.prompt_logprobs,
        )

    def take_read(self, piece: Piece, done: Read, seconds: float) -> None:
        """A piece of the prompt was read. After the last one this sequence decodes."""
        with self._committing():
            keep_piece(piece, done)
        self.prompt_logprobs += done.prompt_logprobs
        so_far = self.stats.time_to_first_token_seconds
        self.stats = replace(self.stats, time_to_first_token_seconds=so_far + seconds)
        if done.problem is not None:
            self._engine.leave(self)
            raise done.problem
        if done.first is None:
            return
        self.turn.root = done.first
        try:
            kept = self._cut([done.first])
        except BaseException:
            self._engine.leave(self)
            raise
        self.turn.max_tokens -= kept
        self.turn.chooser.push(done.first)
        self._emit([done.first], done.first_logprobs)
        self._engine.begin_to_decode(self)
        if self.finish_reason is not None:
            self._engine.leave(self)

    def take(
        self,
        done: Round,
        draft_seconds: float,
        verify_seconds: float,
        wait_seconds: float,
        streamed_bytes: int,
    ) -> None:
        """A round of this sequence: what is kept of it is committed and given out. An error of the
        answer's `cut` or constraint ends it: the others go on without it."""
        try:
            if done.problem is not None:
                raise done.problem
            num_kept = self._cut(done.emitted)
        except BaseException:
            self._engine.leave(self)
            raise
        stats, began = self.stats, time.perf_counter()
        with self._committing():
            keep(self.turn, done, num_kept)
        verify_seconds += time.perf_counter() - began
        self.stats = replace(
            stats,
            drafted=(*stats.drafted, done.num_levels),
            drafted_tokens=stats.drafted_tokens + done.num_drafted,
            proposed=(*stats.proposed, done.num_proposed),
            accepted=(*stats.accepted, min(len(done.emitted) - 1, num_kept)),
            lossy_tokens=stats.lossy_tokens + sum(place < num_kept for place in done.lossy),
            draft_seconds=stats.draft_seconds + draft_seconds,
            verify_seconds=stats.verify_seconds + verify_seconds,
            stream_wait_seconds=stats.stream_wait_seconds + wait_seconds,
            streamed_bytes=stats.streamed_bytes + streamed_bytes,
        )
        self._emit(done.emitted[:num_kept], done.logprobs[:num_kept])
        if self.finish_reason is not None:
            self._engine.leave(self)

    def take_fresh(self) -> list[int]:
        """Tokens since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def stop(self) -> None:
        """Ends the answer, if one has begun; the cache keeps what it has."""
        self._engine.leave(self)

    def forget(self) -> None:
        """Stops, and releases the answer's grammar, which may have tens of MB, and its log
        probabilities: an idle sequence would keep them."""
        self.stop()
        self.params = replace(self.params, constraint=None, cut=GenerationParams.cut)
        self.turn = Turn(self.cache, root=0, max_tokens=0)
        self.prompt_logprobs, self.logprobs = [], []

    def close(self) -> None:
        """Gives the cache back to the engine, once: another sequence may have it by now."""
        if not self._closed:
            self._closed = True
            self._engine.leave(self)
            self._engine.give_back(self.cache)

    def __enter__(self) -> "Sequence":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _committing(self) -> Iterator[None]:
        """A commit that fails, for want of memory, may have moved some layers on and others not:
        the answer ends, and nothing of its cache is used again."""
        try:
            yield
        except BaseException:
            self._engine.leave(self)
            self.cache.roll_back(0)
            self.finish_reason = None
            raise

    def _reusable(self, prompt: list[int], params: GenerationParams) -> int:
        """How many of the prompt's tokens are in the cache, with the bits that reading them would
        give. The last one is read, for its logits."""
        if params.prompt_logprobs is not None:
            return 0
        cache = self.cache
        shared = min(cache.common_prefix(prompt), self.num_reusable, len(prompt) - 1)
        if cache.unread is not None and not cache.nets and not cache.unread.reaches(shared):
            # A draft head reads a token with the hidden state before it, which is gone: once more.
            shared = max(0, shared - 1)
        return cache.reachable(shared)

    def _stops(self, first: int, end: int) -> list[int]:
        """Where the prompt's tokens from `first` on, up to `end`, have checkpoints: what templates
        end a prompt with is not what the next prompt has in its place."""
        few = CHECKPOINT_TOKENS
        found = {*range(few * (first // few + 1), end + 1, few)}
        found.add(len(self._prompt) - TOKENS_BEHIND_CHECKPOINT)
        return sorted(one - first for one in found if first < one <= end)

    def _room_after(self, prompt: list[int], params: GenerationParams) -> int:
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

    def _emit(self, tokens: list[int], logprobs: Tokens[TokenLogprobs]) -> None:
        self._fresh += tokens
        self.logprobs += logprobs
        count = self.stats.generated_tokens + len(tokens)
        self.stats = replace(self.stats, generated_tokens=count)

    def _cut(self, emitted: list[int]) -> int:
        """How many of the emitted tokens are kept; says in `finish_reason` if the answer ends."""
        left, reason = self.turn.max_tokens, self.finish_reason
        kept = emitted[:left]
        if len(emitted) >= left:
            short = self.stats.generated_tokens + left < self.params.max_tokens
            reason = "context" if short else "length"
        ends = (index for index, token in enumerate(kept) if token in self.params.end_tokens)
        if (end := next(ends, None)) is not None:
            kept, reason = kept[: end + 1], "eos"
        if (count := self.params.cut(kept)) is not None:
            if count < 1:
                raise SubspecError(Exit.USAGE, f"cut returned {count}, expected 1 or more, or None")
            kept, reason = kept[:count], "stop"
        self.finish_reason = reason
        return len(kept)
