"""Responses, streamed as server-sent events or whole, whose generation stops when the client
disconnects."""

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
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # prevents buffering by nginx

T = TypeVar("T")


class Cancellable(Protocol):
    """A Generation or a ChatAnswer."""

    @property
    def queue_position(self) -> int: ...

    def cancel(self) -> None: ...


@dataclass(frozen=True)
class Event:
    """One event of a stream. name: None for OpenAI's chat events."""

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
    """Return a response with `events`, then `last`; an error becomes a final event. During pauses
    it sends `ping`, or a comment with the queue position. `answer` is cancelled in all cases."""

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
    """A streaming response that also cancels its answer if the client disconnects during a
    write."""

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
    """Return the result of `body`; None if the client disconnects first. `answer` is cancelled in
    all cases."""
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
    """Cancel a task and wait for it. Its exception is retrieved, since asyncio would log it
    otherwise."""
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task


def is_expected(error: Exception) -> bool:
    """Return True if the client got the full error; otherwise it is a bug that must be logged."""
    return as_api_error(error).code != "internal_error"


def gone() -> JSONResponse:
    """The response to a disconnected client, which is never read."""
    return JSONResponse(None, 499)
