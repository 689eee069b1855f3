"""A Generator that plays given texts instead of asking a model: what the web side is tested with.

Tokens, stop texts, end tokens and limits are dealt with as an engine does.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.model.sampling import TokenLogprobs
from subspec.runtime.sequence import FinishReason, Stats
from subspec.runtime.server.generation import (
    Generation,
    GenerationRequest,
    Outcome,
    Piece,
    QueueFull,
)
from subspec.runtime.text.detokenizer import StreamingDetokenizer
from subspec.runtime.text.tokenizer import ChatTokenizer

ROUND_SECONDS = 0.01  # that each round is said to have taken


@dataclass(frozen=True)
class Script:
    """One answer. ends: with an end token of the request, if it names any; else it is cut off as if
    max_tokens had been reached. error: raised after the text. largest_round: tokens decided at
    once, at most. pause_seconds: before each round."""

    text: str
    ends: bool = True
    error: SubspecError | None = None
    largest_round: int = 5
    pause_seconds: float = 0.0


class ScriptedGenerator:
    """Answers the first request with the first script, and so on; the last one serves all that
    follow. `full`: raised by submit as long as it is set. Texts may hold special tokens."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        scripts: Iterable[str | Script],
        context: int = 4096,
        seed: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.full: QueueFull | None = None
        self.requests: list[GenerationRequest] = []
        self.generations: list[ScriptedGeneration] = []
        self._scripts = [one if isinstance(one, Script) else Script(one) for one in scripts]
        self._random = random.Random(seed)

    def submit(self, request: GenerationRequest) -> Generation:
        if self.full is not None:
            raise self.full
        if not 0 < len(request.prompt_ids) < self.context:
            message = f"the prompt has {len(request.prompt_ids)} tokens, expected 1 to "
            raise SubspecError(Exit.USAGE, f"{message}{self.context - 1}", "shorten it")
        script = self._scripts[min(len(self.requests), len(self._scripts) - 1)]
        self.requests.append(request)
        seed = self._random.getrandbits(32)
        self.generations.append(ScriptedGeneration(self, request, script, seed))
        return self.generations[-1]


class ScriptedGeneration:
    def __init__(
        self, generator: ScriptedGenerator, request: GenerationRequest, script: Script, seed: int
    ) -> None:
        self.request = request
        self.queue_position = 0
        self.cancelled = False
        self.token_ids: list[int] = []  # that were decided
        self._generator = generator
        self._script = script
        self._random = random.Random(seed)
        self._outcome: Outcome | None = None

    @property
    def outcome(self) -> Outcome:
        assert self._outcome is not None, "asked for before the last piece"
        return self._outcome

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Piece]:
        request, tokenizer = self.request, self._generator.tokenizer
        left = tokenizer.tokenizer.encode(self._script.text, add_special_tokens=False).ids
        if self._script.ends and request.params.stop_token_ids and self._script.error is None:
            left.append(min(request.params.stop_token_ids))
        room = self._generator.context - len(request.prompt_ids)
        most = min(room, request.params.max_tokens)
        at_most: FinishReason = "length" if request.params.max_tokens <= room else "context"
        detokenizer = StreamingDetokenizer(
            tokenizer,
            request.stop,
            request.prompt_ids,
            request.shown,
            request.unstopped,
        )
        rounds = list[int]()
        reason: FinishReason | None = None
        while reason is None:
            await asyncio.sleep(self._script.pause_seconds)
            if self.cancelled:
                return
            if not left and self._script.error is not None:
                raise self._script.error
            size = min(self._random.randint(1, self._script.largest_round), len(left))
            round_ids, left = left[:size], left[size:]
            if len(self.token_ids) + len(round_ids) >= most:
                round_ids, reason = round_ids[: most - len(self.token_ids)], at_most
            elif not left and self._script.error is None:
                reason = "length"
            ends = (at for at, one in enumerate(round_ids) if one in request.params.stop_token_ids)
            if (end := next(ends, None)) is not None:
                round_ids, reason = round_ids[: end + 1], "eos"
            before = detokenizer.num_tokens
            text = detokenizer.feed(round_ids)
            if detokenizer.stopped:
                round_ids, reason = round_ids[: detokenizer.num_tokens - before], "stop"
            self._push(round_ids)
            self.token_ids += round_ids
            rounds.append(len(round_ids))
            if reason is not None:
                text += detokenizer.finish()
                self._outcome = self._end(reason, detokenizer.stop_text, rounds)
            yield Piece(text, tuple(round_ids), self._logprobs(round_ids))

    def _push(self, round_ids: list[int]) -> None:
        """A script that breaks the request's constraint is the test's fault."""
        if (constraint := self.request.params.constraint) is None:
            return
        for token in round_ids:
            allowed = constraint.allowed()
            name = self._generator.tokenizer.tokenizer.id_to_token(token)
            assert allowed is None or allowed[token], f"the constraint forbids {name!r}"
            if token not in self.request.params.stop_token_ids:
                constraint.push(token)

    def _logprobs(self, round_ids: list[int]) -> tuple[TokenLogprobs, ...]:
        count = self.request.params.logprobs
        if count is None:
            return ()
        return tuple(
            TokenLogprobs(token, -0.25, tuple((token + n, -0.25 - n) for n in range(count)))
            for token in round_ids
        )

    def _end(self, reason: FinishReason, stop_text: str | None, rounds: list[int]) -> Outcome:
        stats = Stats(
            "substitute",
            prompt_tokens=len(self.request.prompt_ids),
            time_to_first_token_seconds=ROUND_SECONDS,
            generated_tokens=len(self.token_ids),
            drafted=tuple(self._script.largest_round for _ in rounds[1:]),
            drafted_tokens=2 * self._script.largest_round * len(rounds[1:]),
            accepted=tuple(count - 1 for count in rounds[1:]),
            draft_seconds=ROUND_SECONDS * len(rounds) / 2,
            verify_seconds=ROUND_SECONDS * len(rounds) / 2,
        )
        return Outcome(reason, stop_text, stats, 0.0, ROUND_SECONDS * len(rounds), None)
