"""Admission: every API submits its requests here, where they are checked, counted and, at shutdown,
ended."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from subspec.artifacts.common.errors import SubspecError
from subspec.runtime.server.errors import ApiError, engine_error, invalid, unavailable
from subspec.runtime.server.generation import (
    Generation,
    GenerationRequest,
    Outcome,
    Piece,
    PromptTooLong,
    QueueFull,
    ServedEngine,
)
from subspec.runtime.server.metrics import Metrics
from subspec.runtime.server.streaming import dropped

LOADING = "Loading model"  # llama.cpp's words, which clients wait for
POLL_SECONDS = 0.05


def shutting_down() -> ApiError:
    return unavailable("the server is shutting down", "shutting_down")


def engine_failed() -> ApiError:
    return unavailable("the engine has failed", "engine_failed")


class Admission:
    """A `Generator` in front of the engine. context: maximum tokens of prompt and answer
    together."""

    def __init__(
        self, engine: ServedEngine, context: int, vocab_size: int, metrics: Metrics
    ) -> None:
        self.engine = engine
        self.closing = False
        self._context = context
        self._vocab_size = vocab_size
        self._metrics = metrics
        self._live = set[AdmittedGeneration]()
        self._cut: asyncio.Future[None] | None = None  # done: answers must end
        self._ending = shutting_down()
        metrics.watch(
            lambda: engine.num_running, lambda: engine.num_waiting, lambda: engine.peak_bytes
        )

    @property
    def problem(self) -> ApiError | None:
        """The error that new requests get now; None if requests are accepted."""
        status = self.engine.status
        if status.phase == "failed":
            return engine_failed()
        if self.closing or status.phase == "closed":
            return shutting_down()
        return unavailable(LOADING, 503) if status.phase == "loading" else None

    def check_ready(self) -> None:
        """Raise ApiError(503) unless requests are accepted."""
        if (problem := self.problem) is not None:
            self._metrics.rejected(str(problem.code))
            raise problem

    def submit(self, request: GenerationRequest) -> Generation:
        """Submit a request. Raises ApiError, QueueFull and SubspecError."""
        self.check_ready()
        self.check_prompt(request.prompt_ids)
        try:
            generation = self.engine.submit(request)
        except QueueFull:
            self._metrics.rejected("queue_full")
            raise
        admitted = AdmittedGeneration(self, generation, self._metrics)
        self._live.add(admitted)
        return admitted

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Check a prompt. Raises ApiError or PromptTooLong if it can never be accepted."""
        if len(ids) >= self._context:
            self._metrics.rejected("context_length_exceeded")
            raise PromptTooLong(len(ids), self._context)
        if not ids:
            raise invalid("the prompt is empty")
        if not all(0 <= one < self._vocab_size for one in ids):
            raise invalid(f"a token id of the prompt is not in 0 to {self._vocab_size - 1}")

    @property
    def num_live(self) -> int:
        """Number of running answers."""
        return len(self._live)

    async def drained(self, timeout_seconds: float) -> bool:
        """Wait for running answers. Returns False if some are left after `timeout_seconds`."""
        limit = time.monotonic() + timeout_seconds
        while self._live and time.monotonic() < limit:
            await asyncio.sleep(POLL_SECONDS)
        return not self._live

    def cut(self, error: ApiError) -> None:
        """End every answer with `error`."""
        self._ending = error
        self.ended_early().set_result(None)

    def ended_early(self) -> "asyncio.Future[None]":
        """A future that is done when answers must end."""
        self._cut = self._cut or asyncio.get_running_loop().create_future()
        return self._cut

    @property
    def ending(self) -> ApiError:
        return self._ending

    def forget(self, generation: "AdmittedGeneration") -> None:
        self._live.discard(generation)


class AdmittedGeneration:
    """A `Generation` that can be aborted and whose metrics are recorded."""

    def __init__(self, admission: Admission, inner: Generation, metrics: Metrics) -> None:
        self._admission = admission
        self._inner = inner
        self._metrics = metrics
        self._began = time.monotonic()
        self._over = False

    @property
    def queue_position(self) -> int:
        return self._inner.queue_position

    @property
    def outcome(self) -> Outcome:
        return self._inner.outcome

    def cancel(self) -> None:
        self._inner.cancel()
        self._end("abort")

    async def __aiter__(self) -> AsyncIterator[Piece]:
        pieces = aiter(self._inner)
        first_seconds: float | None = None
        coming: asyncio.Future[Piece] | None = None
        cut = self._admission.ended_early()
        try:
            while True:
                coming = asyncio.ensure_future(anext(pieces))
                both: set[asyncio.Future[Any]] = {coming, cut}
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    raise self._admission.ending
                try:
                    piece = coming.result()
                except StopAsyncIteration:
                    break
                if first_seconds is None and piece.token_ids:
                    first_seconds = time.monotonic() - self._began
                yield piece
        except SubspecError as error:
            self._end("error")
            raise engine_error(error) from error
        except ApiError:
            self._end("error")
            raise
        finally:
            if coming is not None:
                await dropped(coming)
            self._inner.cancel()
            self._admission.forget(self)
        if not self._over:  # not cancelled
            self._end(self._inner.outcome.reason)
            seconds = time.monotonic() - self._began
            self._metrics.answered(self._inner.outcome, first_seconds or seconds, seconds)

    def _end(self, reason: str) -> None:
        if not self._over:
            self._over = True
            self._metrics.ended(reason)
        self._admission.forget(self)
