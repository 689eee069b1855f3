"""POST /v1/responses: OpenAI's Responses without stored state (docs/server-dialects.md)."""

import secrets
import time
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from subspec.runtime.server.chat_events import ChatAnswer, JSONValue
from subspec.runtime.server.errors import too_long
from subspec.runtime.server.generation import PromptTooLong
from subspec.runtime.server.model_info import check_model
from subspec.runtime.server.request_bodies import read_body
from subspec.runtime.server.responses_answer import ResponseWriter, exhaust
from subspec.runtime.server.responses_request import REFUSED, CreateResponse, read_request
from subspec.runtime.server.service import Service
from subspec.runtime.server.streaming import Event, event_stream, gone, whole


async def create_response(service: Service, request: Request) -> Response:
    service.engine.check_ready()
    body = await read_body(request, CreateResponse, REFUSED, service.refuse_unknown)
    check_model(service.model, body.model)
    asked = read_request(body, service.sampling, secrets.randbits(63))
    writer = ResponseWriter(asked, service, int(time.time()))
    try:
        answer = NoAnswer() if asked.chat is None else await service.chat(asked.chat)
    except PromptTooLong as error:
        raise too_long(error, "input") from None
    if body.stream:
        return event_stream(events_of(answer, writer), answer, writer.failed)
    response = await whole(request, answer, response_of(answer, writer))
    return gone() if response is None else JSONResponse(response)


class NoAnswer:
    """The answer to an empty input, without running the model."""

    queue_position = 0

    def cancel(self) -> None:
        pass


async def response_of(
    answer: ChatAnswer | NoAnswer, writer: ResponseWriter
) -> dict[str, JSONValue]:
    if isinstance(answer, NoAnswer):
        exhaust(writer.answer_nothing())
    else:
        async for event in answer:
            exhaust(writer.take(event))
    return writer.body


async def events_of(answer: ChatAnswer | NoAnswer, writer: ResponseWriter) -> AsyncIterator[Event]:
    for written in writer.begin():
        yield written
    if isinstance(answer, NoAnswer):
        for written in writer.answer_nothing():
            yield written
    else:
        async for event in answer:
            for written in writer.take(event):
                yield written
