"""Anthropic's POST /v1/messages and /v1/messages/count_tokens (docs/server-dialects.md)."""

import hashlib
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from subspec.runtime.server.chat_events import (
    ChatAnswer,
    ChatEnd,
    ChatEvent,
    ChatRequest,
    JSONValue,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
)
from subspec.runtime.server.errors import ApiError, anthropic_body, invalid
from subspec.runtime.server.generation import PromptTooLong
from subspec.runtime.server.messages_request import (
    REFUSED,
    AskedMessage,
    CountTokens,
    CreateMessage,
    read_conversation,
    read_message,
)
from subspec.runtime.server.model_info import check_model
from subspec.runtime.server.request_bodies import read_body
from subspec.runtime.server.request_fields import random_id
from subspec.runtime.server.service import Service
from subspec.runtime.server.streaming import Event, event_stream, gone, whole
from subspec.runtime.server.tools.json_text import arguments_object

JSON = dict[str, JSONValue]
PING = Event({"type": "ping"}, "ping").encode()
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageWriter:
    """Writes one answer: `begin`, then `take` for each event, each yielding events of the stream;
    `message` is the body of an answer that is not streamed."""

    def __init__(self, asked: AskedMessage, model_id: str) -> None:
        self.message: JSON = {
            "id": random_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": model_id,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage(0, 0, 0),
        }
        self._shows_thinking = asked.shows_thinking
        self._block: JSON | None = None  # the open block, without its deltas
        self._text = ""  # of the open block

    def begin(self, input_tokens: int) -> Iterator[JSON]:
        start = self.message | {"content": [], "usage": usage(input_tokens, 0, 0)}
        yield {"type": "message_start", "message": start}

    def take(self, event: ChatEvent) -> Iterator[JSON]:
        if isinstance(event, ReasoningDelta):
            yield from self._open_text("thinking", {"thinking": "", "signature": ""})
            yield from self._grow(event.text)
        elif isinstance(event, TextDelta):
            if event.text:  # a delta may have only logprobs
                yield from self._open_text("text", {"text": ""})
                yield from self._grow(event.text)
        elif isinstance(event, ToolCallStart):
            call = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
            yield from self._open(call)
        elif isinstance(event, ToolCallDelta):
            yield from self._grow(event.arguments)
        else:
            yield from self._end(event)

    @property
    def _index(self) -> int:
        return len(self.message["content"])

    def _open_text(self, kind: Literal["thinking", "text"], empty: JSON) -> Iterator[JSON]:
        if self._block is None or self._block["type"] != kind:
            yield from self._open({"type": kind} | empty)

    def _open(self, block: JSON) -> Iterator[JSON]:
        yield from self._close()
        self._block = block
        start = {"index": self._index, "content_block": dict(block)}
        yield {"type": "content_block_start"} | start

    def _grow(self, text: str) -> Iterator[JSON]:
        assert self._block is not None
        self._text += text
        kind = self._block["type"]
        if kind == "text":
            yield self._delta({"type": "text_delta", "text": text})
        elif kind == "tool_use":
            yield self._delta({"type": "input_json_delta", "partial_json": text})
        elif self._shows_thinking:
            yield self._delta({"type": "thinking_delta", "thinking": text})

    def _delta(self, delta: JSON) -> JSON:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> Iterator[JSON]:
        block, text = self._block, self._text
        if block is None:
            return
        if block["type"] == "text":
            block["text"] = text
        elif block["type"] == "tool_use":
            block["input"] = arguments_object(text)
        else:
            block["thinking"] = text if self._shows_thinking else ""
            block["signature"] = signature(text)
            yield self._delta({"type": "signature_delta", "signature": block["signature"]})
        yield {"type": "content_block_stop", "index": self._index}
        self.message["content"].append(block)
        self._block, self._text = None, ""

    def _end(self, end: ChatEnd) -> Iterator[JSON]:
        yield from self._close()
        reason = "stop_sequence" if end.stop_text is not None else STOP_REASONS[end.reason]
        stop = {"stop_reason": reason, "stop_sequence": end.stop_text}
        used = usage(end.prompt_tokens, end.cached_tokens, end.completion_tokens)
        used["output_tokens_details"] = {"thinking_tokens": end.reasoning_tokens}
        self.message |= stop | {"usage": used}
        yield {"type": "message_delta", "delta": stop, "usage": used}
        yield {"type": "message_stop"}


def usage(prompt_tokens: int, cached_tokens: int, output_tokens: int) -> JSON:
    """Anthropic's usage: input_tokens excludes cached tokens."""
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
    }


def signature(thinking: str) -> str:
    """Return a digest of the text as its signature: clients expect the field and send it back. It
    is not checked."""
    return "sha256:" + hashlib.sha256(thinking.encode()).hexdigest()


async def create_message(service: Service, request: Request) -> Response:
    """POST /v1/messages"""
    service.engine.check_ready()
    body = await read_body(request, CreateMessage, REFUSED, service.refuse_unknown)
    check_name(body.model, service)
    asked = read_message(body, service.sampling, secrets.randbits(63))
    writer = MessageWriter(asked, service.model.id)
    if body.stream:
        # A stream begins with the prompt's length, known to the answer only at its end.
        input_tokens = await service.count_tokens(asked.chat)
        answer = await answer_to(asked.chat, service)
        return event_stream(events_of(answer, writer, input_tokens), answer, error_event, ping=PING)
    answer = await answer_to(asked.chat, service)
    message = await whole(request, answer, message_of(answer, writer))
    return gone() if message is None else JSONResponse(message)


async def answer_to(request: ChatRequest, service: Service) -> ChatAnswer:
    """Submit the request. A prompt that is too long is refused in Anthropic's wording with its
    length: Claude Code parses both numbers to decide how much of the conversation to drop."""
    try:
        return await service.chat(request)
    except PromptTooLong as error:
        count = error.num_tokens or await service.count_tokens(request)
        message = f"prompt is too long: {count} tokens > {error.context - 1} maximum"
        raise invalid(message, "messages", "context_length_exceeded") from None


async def count_tokens(service: Service, request: Request) -> Response:
    """POST /v1/messages/count_tokens"""
    body = await read_body(request, CountTokens, REFUSED, service.refuse_unknown)
    check_name(body.model, service)
    count = await service.count_tokens(read_conversation(body, service.sampling))
    return JSONResponse({"input_tokens": count})


def check_name(name: str, service: Service) -> None:
    """Accept names of Anthropic's models, which some programs hard-code, as ours. Other unknown
    names are errors."""
    if not name.startswith("claude"):
        check_model(service.model, name)


async def message_of(answer: ChatAnswer, writer: MessageWriter) -> JSON:
    async for event in answer:
        for _ in writer.take(event):
            pass
    return writer.message


async def events_of(
    answer: ChatAnswer, writer: MessageWriter, input_tokens: int
) -> AsyncIterator[Event]:
    for data in writer.begin(input_tokens):
        yield Event(data, data["type"])
    async for event in answer:
        for data in writer.take(event):
            yield Event(data, data["type"])


def error_event(error: ApiError) -> Event:
    return Event(anthropic_body(error), "error")
