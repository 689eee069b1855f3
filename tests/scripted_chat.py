"""A chat function that plays given events, and an app with the dialects' endpoints around it.

`python tests/scripted_chat.py PORT` serves answers that fit any request, for tests/compat.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any

from served import serve
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.plan import Method
from subspec.runtime.model.sampling import TokenLogprobs
from subspec.runtime.sequence import Stats
from subspec.runtime.server.chat_events import (
    ChatAnswer,
    ChatEnd,
    ChatEvent,
    ChatRequest,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
)
from subspec.runtime.server.errors import ApiError, as_api_error, error_response
from subspec.runtime.server.generation import Outcome, QueueFull
from subspec.runtime.server.messages import count_tokens, create_message
from subspec.runtime.server.responses import create_response
from subspec.runtime.server.service import Service

MODEL = "tiny"
METHOD: Method = "substitute"
Script = Callable[[ChatRequest], Iterable[ChatEvent | Exception]]


def ended(reason: Any = "stop", stop_text: str | None = None, **tokens: int) -> ChatEnd:
    """An end with 12 tokens of prompt, 4 of them cached, and 5 of answer, 2 of them reasoning."""
    outcome = Outcome(
        "length" if reason == "length" else "eos", stop_text, Stats(METHOD), 0, 0, None
    )
    counts = {"prompt_tokens": 12, "cached_tokens": 4, "completion_tokens": 5}
    counts |= {"reasoning_tokens": 2, **tokens}
    return ChatEnd(reason, stop_text, **counts, outcome=outcome)


class ScriptedAnswer:
    def __init__(self, events: Iterable[ChatEvent | Exception]) -> None:
        self.queue_position = 0
        self.cancelled = False
        self._events = events

    async def __aiter__(self) -> AsyncIterator[ChatEvent]:
        for event in self._events:
            if isinstance(event, Exception):
                raise event
            await asyncio.sleep(0)
            yield event

    def cancel(self) -> None:
        self.cancelled = True


class ScriptedChat:
    """The service of an app: `requests` are those that came, `answers` those that were given. An
    exception that a script begins with is raised before there is an answer."""

    def __init__(self, script: Script) -> None:
        self.requests: list[ChatRequest] = []
        self.answers: list[ScriptedAnswer] = []
        self._script = script

    async def chat(self, request: ChatRequest) -> ChatAnswer:
        self.requests.append(request)
        events = list(self._script(request))
        if events and isinstance(events[0], Exception):
            raise events[0]
        self.answers.append(ScriptedAnswer(events))
        return self.answers[-1]

    async def count_tokens(self, request: ChatRequest) -> int:
        self.requests.append(request)
        return sum(len(str(message["content"]).split()) for message in request.messages)

    def service(self) -> Service:
        usual = usual_service()
        model = replace(usual.model, id=MODEL)
        return replace(usual, model=model, chat=self.chat, count_tokens=self.count_tokens)


@cache
def usual_service() -> Service:
    return serve().service


def numbered() -> Callable[[str], str]:
    """In place of `random_id`."""
    numbers = count(1)
    return lambda prefix: f"{prefix}{next(numbers)}"


def dialect_app(service: Service) -> Starlette:
    async def responses(request: Request) -> Response:
        return await create_response(service, request)

    async def messages(request: Request) -> Response:
        return await create_message(service, request)

    async def counted(request: Request) -> Response:
        return await count_tokens(service, request)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def told(request: Request, error: Exception) -> Response:
        return error_response(as_api_error(error), request.url.path)

    return Starlette(
        routes=[
            Route("/v1/responses", responses, methods=["POST"]),
            Route("/v1/messages", messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", counted, methods=["POST"]),
            Route("/v1/models", models),
        ],
        exception_handlers={
            kind: told for kind in (ApiError, QueueFull, SubspecError, HTTPException)
        },
    )


def fitting(request: ChatRequest) -> Iterable[ChatEvent]:
    """An answer of the kind that the request asks for: a call of its first tool, JSON, or text."""
    if request.enable_thinking is not False:
        yield ReasoningDelta("Let me ")
        yield ReasoningDelta("think.")
    if request.max_tokens is not None and request.max_tokens < 8:
        yield TextDelta("Cut")
        yield ended("length")
    elif request.tools and request.messages[-1]["role"] != "tool" and request.tool_choice != "none":
        function = request.tools[0]["function"]
        yield TextDelta("I look.")
        yield ToolCallStart(0, "call_0", function["name"])
        text = json.dumps(instance_of(function["parameters"]))
        yield ToolCallDelta(0, text[:5])
        yield ToolCallDelta(0, text[5:])
        yield ended("tool_calls")
    elif request.output_format is not None:
        schema = request.output_format.value or {"type": "object"}
        yield TextDelta(json.dumps(instance_of(schema)))
        yield ended()
    else:
        for word in ("Hello", " wor", "ld ✓"):
            logprob = TokenLogprobs(ord(word[0]), -0.5, ((ord("a"), -1.0),))
            yield TextDelta(word, (logprob,) if request.logprobs is not None else ())
        yield ended(stop_text=request.stop[0]) if request.stop else ended()


def instance_of(schema: dict[str, Any]) -> Any:
    """Something that a plain schema allows."""
    kind = schema.get("type")
    if kind == "object":
        return {key: instance_of(value) for key, value in schema.get("properties", {}).items()}
    return {"array": [], "integer": 3, "number": 0.5, "boolean": True}.get(str(kind), "Paris")


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(dialect_app(ScriptedChat(fitting).service()), port=int(sys.argv[1]))
