"""The engine's thread: requests wait in a queue, get a sequence each, and decode together.

The event loop submits and cancels; the thread loads the model, steps the engine and sends back
results. They share only a lock and a queue.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from math import ceil

import torch

from subspec.artifacts.common.command import shortage
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.progress import Progress
from subspec.artifacts.runs import append_run
from subspec.runtime.app.answer import run_of
from subspec.runtime.engine import Engine
from subspec.runtime.lossy import Lossy
from subspec.runtime.sequence import Sequence
from subspec.runtime.server.errors import INTERNAL
from subspec.runtime.server.generation import (
    Generation,
    GenerationRequest,
    Outcome,
    Piece,
    QueueFull,
    Status,
)
from subspec.runtime.server.log_format import NAME
from subspec.runtime.server.prefix_cache import PrefixCache, num_shared
from subspec.runtime.text.detokenizer import StreamingDetokenizer
from subspec.runtime.text.streaming import AnswerText
from subspec.runtime.text.tokenizer import ChatTokenizer

USUAL_SECONDS = 20.0  # assumed duration of an answer until one has ended
RECENT_SHARE = 0.2  # weight of the last answer in the estimated duration


class Job:
    """A `Generation`. The thread puts pieces, then an outcome, an error, or None if it was
    cancelled."""

    def __init__(self, scheduler: "Scheduler", request: GenerationRequest) -> None:
        self.request = request
        self.arrived = time.monotonic()
        self.cancelled = False
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._items = asyncio.Queue[Piece | Outcome | SubspecError | None]()
        self._outcome: Outcome | None = None

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while True:
            item = await self._items.get()
            if isinstance(item, Piece):
                yield item
            elif isinstance(item, SubspecError):
                raise item
            else:
                self._outcome = item
                return  # without an outcome, if it was cancelled

    @property
    def queue_position(self) -> int:
        return self._scheduler.position_of(self)

    @property
    def outcome(self) -> Outcome:
        assert self._outcome is not None, "asked for before the last piece"
        return self._outcome

    def cancel(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            self._scheduler.cancel(self)

    def put(self, item: Piece | Outcome | SubspecError | None) -> None:
        """Called in the engine's thread. Drops pieces after `cancel`."""
        if self.cancelled and isinstance(item, Piece):
            return
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the loop is closed
            self.cancelled = True


@dataclass
class Answer:
    """A job with a sequence."""

    job: Job
    sequence: Sequence
    text: AnswerText
    began: float
    num_sent: int = 0  # of its tokens
    alone: bool = True  # no other answer decoded meanwhile


class Scheduler:
    """An engine in a thread of its own (`generation.ServedEngine`).

    open_engine: called in the thread; may take minutes. queue_limit: maximum waiting requests.
        record: add answers that decoded alone to the artifact's run records. lossy: verification
        rule of all answers; None: exact, as always under a constraint.
    """

    def __init__(
        self,
        open_engine: Callable[[Progress], Engine],
        tokenizer: ChatTokenizer,
        num_sequences: int,
        queue_limit: int,
        prefix_cache_bytes: int = 0,
        record: bool = True,
        lossy: Lossy | None = None,
    ) -> None:
        self.status = Status("loading")
        self.peak_bytes = 0
        self._open_engine = open_engine
        self._tokenizer = tokenizer
        self._num_sequences = num_sequences
        self._queue_limit = queue_limit
        self._prefixes = PrefixCache(prefix_cache_bytes)
        self._record = record
        self._lossy = lossy
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Shared by the threads, under the lock
        self._changed = threading.Condition()
        self._waiting = deque[Job]()
        self._closing = False
        # The engine's thread's own
        self._answers: list[Answer] = []
        self._free: list[Sequence] = []  # the least recently used first
        self._answer_seconds = USUAL_SECONDS

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: GenerationRequest) -> Generation:
        with self._changed:
            if self._closing or self.status.phase != "ready":
                raise SubspecError(Exit.RESOURCES, f"the engine is {self.status.phase}")
            num_waiting = len(self._waiting)
            if num_waiting >= self._queue_limit + self._num_sequences - len(self._answers):
                ahead = (num_waiting + 1) / self._num_sequences
                raise QueueFull(num_waiting, max(1, ceil(ahead * self._answer_seconds)))
            job = Job(self, request)
            self._waiting.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.put(None)
            self._changed.notify()

    def position_of(self, job: Job) -> int:
        """Position in the queue from 1; 0 if it does not wait."""
        with self._changed:
            return self._waiting.index(job) + 1 if job in self._waiting else 0

    @property
    def num_running(self) -> int:
        return len(self._answers)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def close(self, timeout_seconds: float) -> None:
        """Wait up to `timeout_seconds` for running answers, end the others with an error, and free
        all memory."""
        until = time.monotonic() + timeout_seconds
        while (self._answers or self._waiting) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    # The engine's thread

    def _run(self) -> None:
        try:
            engine = self._open_engine(self._loading)
            with engine, torch.inference_mode():
                self.status = Status("ready")
                self._serve(engine)
            self.status = Status("closed")
            self._end_all(SubspecError(Exit.RESOURCES, "the server is shutting down"))
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, SubspecError):
                raise  # a bug: log its traceback

    def _loading(self, stage: str, share: float) -> None:
        self.status = Status("loading", stage, share)

    def _fail(self, error: BaseException) -> None:
        known = error if isinstance(error, SubspecError) else None
        if known is None and isinstance(error, Exception):
            known = shortage(error)
        known = known or SubspecError(Exit.UNEXPECTED, f"the engine failed: {error!r:.200}")
        with self._changed:
            self.status = Status("failed", error=known)
        self._end_all(known)

    def _end_all(self, error: SubspecError) -> None:
        with self._changed:
            jobs = [answer.job for answer in self._answers] + list(self._waiting)
            self._answers.clear()
            self._waiting.clear()
        for job in jobs:
            job.put(None if job.cancelled else error)

    def _serve(self, engine: Engine) -> None:
        """Run rounds until closed."""
        self._free = [engine.new_sequence() for _ in range(self._num_sequences)]
        while True:
            with self._changed:
                while not (self._closing or self._waiting or self._answers):
                    self._changed.wait()
                if self._closing:
                    return
            self._round(engine)

    def _round(self, engine: Engine) -> None:
        """Run one round. A separate function so that its locals do not keep the last answer
        alive."""
        self._drop_cancelled()
        self._admit()
        if not self._answers:
            return
        try:
            engine.step()
        except Exception as error:
            self._end_failed(engine, error)
        self.peak_bytes = engine.peak.peak_bytes
        for answer in list(self._answers):
            try:
                self._send(engine, answer)
            except Exception as error:
                self._end(answer, fault_of_a_request(error))

    def _drop_cancelled(self) -> None:
        for answer in [one for one in self._answers if one.job.cancelled]:
            self._release(answer)
            answer.job.put(None)

    def _admit(self) -> None:
        """Assign free sequences to waiting requests in FIFO order."""
        while self._free:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            try:
                self._begin(job)
            except Exception as error:
                job.put(fault_of_a_request(error))

    def _begin(self, job: Job) -> None:
        request = job.request
        sequence = self._sequence_for(request.prompt_ids)
        detokenizer = StreamingDetokenizer(
            self._tokenizer, request.stop, request.prompt_ids, request.shown, request.unstopped
        )
        text = AnswerText(detokenizer)
        self._free.remove(sequence)
        try:
            params = replace(request.params, stopping_criteria=text.cut, lossy=self._lossy)
            sequence.begin(list(request.prompt_ids), params)
        except BaseException:
            self._free.append(sequence)
            raise
        self._answers.append(Answer(job, sequence, text, time.monotonic()))
        if len(self._answers) > 1:
            for answer in self._answers:
                answer.alone = False

    def _sequence_for(self, prompt: tuple[int, ...]) -> Sequence:
        """Return the free sequence that shares the longest prefix with the prompt, else the least
        recently used one. Its cache is saved for returning conversations."""
        prompt = prompt[:-1]  # the last token is needed for its logits

        def shared(sequence: Sequence) -> int:
            same = num_shared(tuple(sequence.cache.tokens), prompt)
            return sequence.cache.reachable(min(sequence.num_cacheable, same))

        sequence = max(self._free, key=shared)  # of equals the first
        prefix, count = self._prefixes.longest(prompt)
        if prefix is not None and count > shared(sequence):
            sequence = self._free[0]
            self._prefixes.keep(sequence, 0)
            self._prefixes.restore(prefix, count, sequence)
        else:
            self._prefixes.keep(sequence, shared(sequence))
        return sequence

    def _send(self, engine: Engine, answer: Answer) -> None:
        """Send an answer's new tokens to its client."""
        job, sequence = answer.job, answer.sequence
        ids, text, first = (
            sequence.take_new_tokens(),
            answer.text.take_new_text(),
            answer.num_sent,
        )
        answer.num_sent += len(ids)
        reason = sequence.finish_reason
        if reason is not None:
            text += answer.text.finish()
        if ids or text:
            job.put(Piece(text, tuple(ids), tuple(sequence.logprobs[first : answer.num_sent])))
        if reason is None:
            return
        seconds = time.monotonic() - answer.began
        self._answer_seconds += RECENT_SHARE * (seconds - self._answer_seconds)
        outcome = Outcome(
            reason,
            answer.text.detokenizer.stop_text,
            sequence.stats,
            queue_seconds=answer.began - job.arrived,
            generation_seconds=seconds,
            predicted_tokens_per_second=engine.predicted_speed_of(sequence),
            prompt_logprobs=tuple(sequence.prompt_logprobs),
            lossy=sequence.params.lossy,
        )
        self._release(answer)
        try:
            recorded = self._record and answer.alone and engine.is_predicted_by_plan(sequence)
            if recorded and sequence.stats.accepted:
                append_run(engine.artifact.path, run_of(engine, sequence))
        finally:  # the answer is complete even if recording it fails
            job.put(outcome)

    def _end_failed(self, engine: Engine, error: Exception) -> None:
        """Handle a failed step: end the answer that caused it, or, if the machine lacks resources,
        all answers; the engine may then continue. Re-raises any other error."""
        of_answers = [
            one
            for one in self._answers
            if one.sequence.finish_reason is None and not engine.is_active(one.sequence)
        ]
        known = error if isinstance(error, SubspecError) else shortage(error)
        if not of_answers and (known is None or known.exit_code != Exit.RESOURCES):
            raise error
        told = fault_of_a_request(error)
        for answer in of_answers or list(self._answers):
            self._end(answer, told)

    def _end(self, answer: Answer, error: SubspecError) -> None:
        if answer in self._answers:
            self._release(answer)
            answer.job.put(error)

    def _release(self, answer: Answer) -> None:
        """Free the answer's sequence."""
        answer.sequence.reset()
        self._answers.remove(answer)
        self._free.append(answer.sequence)


def fault_of_a_request(error: Exception) -> SubspecError:
    """The error reported to the client of a single failed request. Tracebacks of bugs go to the
    log."""
    known = error if isinstance(error, SubspecError) else shortage(error)
    if known is None or known.exit_code == Exit.UNEXPECTED:
        logging.getLogger(NAME).error("a request failed", exc_info=error)
    return known or SubspecError(Exit.UNEXPECTED, INTERNAL)
