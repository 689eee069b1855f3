"""POST /v1/completions: one or several raw prompts, without a chat template."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from subspec.runtime.model.sampling import TokenLogprobs
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.server import response_metrics
from subspec.runtime.server.errors import invalid, too_long, unsupported
from subspec.runtime.server.generation import (
    Generation,
    GenerationRequest,
    Generator,
    Outcome,
    Piece,
    PromptTooLong,
    QueueFull,
)
from subspec.runtime.server.model_info import check_model
from subspec.runtime.server.openai_chat import JSON, Head, error_event
from subspec.runtime.server.openai_fields import (
    REFUSED_IN_COMPLETIONS,
    CompletionFields,
    sampling_of,
)
from subspec.runtime.server.request_bodies import read_body
from subspec.runtime.server.service import Service
from subspec.runtime.server.streaming import DONE, Event, event_stream, gone, whole
from subspec.runtime.server.token_text import completion_logprobs

RETRY_SECONDS = 0.05  # between tries to submit later prompts while the queue is full


async def completions(service: Service, request: Request) -> Response:
    service.engine.check_ready()
    asked = await read_body(
        request, CompletionFields, REFUSED_IN_COMPLETIONS, service.refuse_unknown
    )
    check_model(service.model, asked.model)
    try:
        wanted = await wanted_of(asked, service)
        requests = [one.request for one in wanted]
        answers = Answers(service.engine, requests, service.model.num_sequences)
    except PromptTooLong as error:
        raise too_long(error, "prompt") from None
    head = Head(f"cmpl-{uuid.uuid4().hex}", int(time.time()), service.model.id)
    if asked.stream:
        events = chunks(answers, wanted, head, service, asked.wants_usage)
        return event_stream(events, answers, error_event, DONE)
    response = await whole(request, answers, completion(answers, wanted, head, service))
    return gone() if response is None else response


@dataclass(frozen=True)
class Wanted:
    """One prompt of a request, and which parts of its answer are returned."""

    request: GenerationRequest
    echo: str | None  # the prompt's text, if echoed
    hide_answer: bool  # max_tokens is 0


async def wanted_of(asked: CompletionFields, service: Service) -> list[Wanted]:
    """Convert the request. Raises ApiError."""
    if asked.structured_outputs is not None:
        raise unsupported(
            "structured_outputs works with /v1/chat/completions", "structured_outputs"
        )
    if asked.max_tokens == 0 and not asked.echo:
        raise invalid("max_tokens is 0, expected 1 or more without echo", "max_tokens")
    sampling = sampling_of(asked, service.sampling, service.model)
    params = GenerationParams(
        max_tokens=service.model.context if asked.max_tokens is None else max(1, asked.max_tokens),
        sampling=sampling,
        stop_token_ids=frozenset() if asked.ignore_eos else service.model.end_tokens,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.logprobs if asked.echo else None,
    )

    def tokenized() -> list[Wanted]:
        found = []
        for ids, text in prompts_of(asked.prompt, service):
            echo = text if asked.echo else None
            # Without a seed each prompt gets its own: some clients request samples by a list.
            own = sampling_of(asked, service.sampling, service.model)
            request = GenerationRequest(tuple(ids), replace(params, sampling=own), asked.stop_texts)
            found.append(Wanted(request, echo, asked.max_tokens == 0))
        return found

    return await asyncio.to_thread(tokenized)


def prompts_of(prompt: Any, service: Service) -> list[tuple[list[int], str]]:
    """Return ids and text of every prompt. Raises ApiError and PromptTooLong before any prompt is
    answered."""
    text = service.tokenizer
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    found = []
    for index, one in enumerate(prompt):
        if isinstance(one, str) and text.is_longer(one, service.model.context):
            raise PromptTooLong(None, service.model.context)
        ids = text.plain_ids(one) if isinstance(one, str) else one
        if not ids:
            raise invalid(f"prompt {index} has no tokens", "prompt")
        service.engine.check_prompt(ids)
        said = one if isinstance(one, str) else text.tokenizer.decode(one)
        found.append((ids, said))
    return found


class Answers:
    """The answers to several prompts, as many at once as there are sequences. The first one is
    already submitted. Raises QueueFull and ApiError as Generator.submit does."""

    def __init__(
        self, engine: Generator, requests: list[GenerationRequest], num_at_once: int
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._num_at_once = num_at_once
        self._begun: dict[int, Generation] = {0: engine.submit(requests[0])}
        self._over = False

    @property
    def queue_position(self) -> int:
        return self._begun[0].queue_position if len(self._begun) == 1 else 0

    def cancel(self) -> None:
        self._over = True
        for generation in self._begun.values():
            generation.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | Outcome]]:
        """Yield (index of the prompt, piece) as they come; each prompt ends with its Outcome."""
        coming = asyncio.Queue[tuple[int, Piece | Outcome] | Exception](maxsize=64)
        turns = asyncio.Semaphore(self._num_at_once)

        async def one(index: int) -> None:
            try:
                async with turns:
                    generation = await self._generation(index)
                    async for piece in generation:
                        await coming.put((index, piece))
                    await coming.put((index, generation.outcome))
            except Exception as error:
                await coming.put(error)

        tasks = [asyncio.create_task(one(index)) for index in range(len(self._requests))]
        try:
            num_left = len(tasks)
            while num_left:
                found = await coming.get()
                if isinstance(found, Exception):
                    raise found
                num_left -= isinstance(found[1], Outcome)
                yield found
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task

    async def _generation(self, index: int) -> Generation:
        while index not in self._begun and not self._over:
            try:
                self._begun[index] = self._engine.submit(self._requests[index])
            except QueueFull:  # the request was accepted as a whole
                await asyncio.sleep(RETRY_SECONDS)
        return self._begun[index]


FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


def finish_reason(wanted: Wanted, outcome: Outcome) -> str:
    """The finish reason; "length" for an answer that is not returned."""
    return "length" if wanted.hide_answer else FINISH_REASONS[outcome.reason]


def logprobs_of(
    wanted: Wanted,
    answer: list[TokenLogprobs],
    prompt: list[TokenLogprobs | int],
    begin: int,
    service: Service,
) -> JSON | None:
    if wanted.request.params.logprobs is None:
        return None
    return completion_logprobs(service.tokenizer.tokenizer, [*prompt, *answer], begin)


def prompt_logprobs(wanted: Wanted, outcome: Outcome) -> list[TokenLogprobs | int]:
    """Log probabilities of an echoed prompt; none for its first token."""
    if wanted.echo is None:
        return []
    return [wanted.request.prompt_ids[0], *outcome.prompt_logprobs]


# Whole


async def completion(
    answers: Answers, wanted: list[Wanted], head: Head, service: Service
) -> JSONResponse:
    texts = ["" for _ in wanted]
    logprobs: list[list[TokenLogprobs]] = [[] for _ in wanted]
    outcomes: dict[int, Outcome] = {}
    async for index, found in answers:
        if isinstance(found, Outcome):
            outcomes[index] = found
        elif not wanted[index].hide_answer:
            texts[index] += found.text
            logprobs[index] += found.logprobs

    def choice(index: int, one: Wanted) -> JSON:
        outcome = outcomes[index]
        return {
            "index": index,
            "text": (one.echo or "") + texts[index],
            "logprobs": logprobs_of(
                one, logprobs[index], prompt_logprobs(one, outcome), 0, service
            ),
            "finish_reason": finish_reason(one, outcome),
        }

    def response() -> JSONResponse:
        """Build the body. Log probabilities of a long prompt take seconds: not for the event
        loop."""
        body = {
            **head.of("text_completion"),
            "choices": [choice(index, one) for index, one in enumerate(wanted)],
            **summary(wanted, list(outcomes.values()), service),
        }
        return JSONResponse(body)

    return await asyncio.to_thread(response)


def summary(wanted: list[Wanted], outcomes: list[Outcome], service: Service) -> JSON:
    """usage, and for a single prompt also metrics and timings."""
    stats = [outcome.stats for outcome in outcomes]
    hidden = wanted[0].hide_answer
    found: JSON = {
        "usage": response_metrics.usage(
            sum(one.prompt_tokens for one in stats),
            sum(one.cached_tokens for one in stats),
            0 if hidden else sum(one.generated_tokens for one in stats),
            sum(sum(one.accepted) for one in stats),
        )
    }
    if len(outcomes) == 1:
        found["metrics"] = response_metrics.metrics(outcomes[0], service.model)
        found["timings"] = response_metrics.timings(outcomes[0], service.model)
    return found


# Streamed


async def chunks(
    answers: Answers, wanted: list[Wanted], head: Head, service: Service, with_usage: bool
) -> AsyncIterator[Event]:
    """Yield the stream's chunks, beginning with echoed prompts. Their log probabilities are known
    only after the first piece, so they are not streamed."""
    lengths = [0 for _ in wanted]
    begun = set[int]()
    outcomes = list[Outcome]()

    def chunk(index: int, text: str, logprobs: JSON | None, reason: str | None) -> Event:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return Event({**head.of("text_completion"), "choices": [choice]})

    async for index, found in answers:
        one = wanted[index]
        if one.echo is not None and index not in begun:
            begun.add(index)
            lengths[index] = len(one.echo)
            yield chunk(index, one.echo, None, None)
        if isinstance(found, Outcome):
            outcomes.append(found)
            yield chunk(index, "", None, finish_reason(one, found))
        elif not one.hide_answer:
            known = logprobs_of(one, list(found.logprobs), [], lengths[index], service)
            lengths[index] += len(found.text)
            yield chunk(index, found.text, known, None)
    if with_usage:
        yield Event(
            {**head.of("text_completion"), "choices": [], **summary(wanted, outcomes, service)}
        )
