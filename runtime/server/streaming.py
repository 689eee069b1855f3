"""Answers that end when their client goes, streamed as server-sent events or whole."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from subspec.runtime.server.errors import ApiError, as_api_error

PING_SECONDS = 10.0
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # nginx would gather events

T = TypeVar("T")


class Cancellable(Protocol):
    """A Generation or a ChatAnswer."""

    @property
    def queue_position(self) -> int: ...

    def cancel(self) -> None: ...


@dataclass(frozen=True)
class Event:
    """One event of a stream. name: None for OpenAI's chat events, which have none."""

    data: dict[str, Any]
    name: str | None = None

    def encode(self) -> bytes:
        text = json.dumps(self.data, ensure_ascii=False, separators=(",", ":"))
        head = f"event: {self.name}\n" if self.name else ""
        return f"{head}data: {text}\n\n".encode()


def event_stream(
    events: AsyncIterator[Event],
    answer: Cancellable,
    error_event: Callable[[ApiError], Event],
    last: bytes = b"",
    ping: bytes = PING,
) -> StreamingResponse:
    """A response with `events`, then `last`; an error is one more event, and the end. While there
    is none for a while `ping` is sent, or a comment that tells the place in the queue. However it
    ends, `answer` is cancelled."""

    async def stream() -> AsyncIterator[bytes]:
        coming: asyncio.Future[Event] | None = None
        try:
            if position := answer.queue_position:
                yield waiting(position)
            while True:
                coming = coming or asyncio.ensure_future(anext(events))
                await asyncio.wait({coming}, timeout=PING_SECONDS)
                if not coming.done():
                    position = answer.queue_position
                    yield waiting(position) if position else ping
                    continue
                try:
                    event = coming.result()
                except StopAsyncIteration:
                    break
                coming = None
                yield event.encode()
            yield last
        except Exception as error:
            yield error_event(as_api_error(error)).encode()
            if not is_expected(error):
                raise
        finally:
            answer.cancel()
            if coming is not None:
                await dropped(coming)

    return EventStream(answer, stream())


class EventStream(StreamingResponse):
    """Cancels its answer also if the client goes while an event is sent."""

    def __init__(self, answer: Cancellable, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=HEADERS)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


def waiting(position: int) -> bytes:
    return f": waiting, position {position}\n\n".encode()


async def whole(request: Request, answer: Cancellable, body: Awaitable[T]) -> T | None:
    """What `body` gives; None if the client goes before. However it ends, `answer` is cancelled."""
    work = asyncio.ensure_future(body)
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        answer.cancel()
        await dropped(work)
        await dropped(gone)


async def disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def dropped(task: "asyncio.Future[Any]") -> None:
    """Cancels a task and waits for its end; what it raises is of no interest any more, but must be
    asked for, or asyncio writes it to the log."""
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task


def is_expected(error: Exception) -> bool:
    """Whether a client was told all of it; else it is a bug, which the log should have."""
    return as_api_error(error).code != "internal_error"


def gone() -> JSONResponse:
    """The response to a client that has gone: nobody reads it."""
    return JSONResponse(None, 499)
