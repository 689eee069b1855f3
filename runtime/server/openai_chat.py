"""POST /v1/chat/completions: OpenAI's fields -> ChatRequest, ChatEvents -> OpenAI's chunks."""

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from subspec.runtime.server import response_metrics
from subspec.runtime.server.chat_events import (
    ChatAnswer,
    ChatEnd,
    ChatRequest,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
)
from subspec.runtime.server.errors import ApiError, invalid, openai_body
from subspec.runtime.server.model_info import check_model
from subspec.runtime.server.openai_chat_fields import (
    REFUSED_IN_CHAT,
    ChatFields,
    format_of,
    messages_of,
    thinking_of,
    tool_choice_of,
    tools_of,
)
from subspec.runtime.server.openai_fields import sampling_of
from subspec.runtime.server.request_bodies import read_body
from subspec.runtime.server.service import Service
from subspec.runtime.server.streaming import DONE, Event, event_stream, gone, whole
from subspec.runtime.server.token_text import chat_logprobs

JSON = dict[str, Any]


async def chat_completions(service: Service, request: Request) -> Response:
    service.engine.check_ready()
    asked = await read_body(request, ChatFields, REFUSED_IN_CHAT, service.refuse_unknown)
    check_model(service.model, asked.model)
    answer = await service.chat(chat_request(asked, service))
    head = Head(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), service.model.id)
    if asked.stream:
        events = chunks(answer, head, service, asked)
        return event_stream(events, answer, error_event, DONE)
    body = await whole(request, answer, completion(answer, head, service, asked.logprobs is True))
    return gone() if body is None else JSONResponse(body)


def chat_request(asked: ChatFields, service: Service) -> ChatRequest:
    """Convert the request. Raises ApiError for conflicting fields."""
    if asked.top_logprobs and not asked.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    effort, thinking = thinking_of(asked)
    limits = [one for one in (asked.max_completion_tokens, asked.max_tokens) if one is not None]
    return ChatRequest(
        messages=messages_of(asked),
        sampling=sampling_of(asked, service.sampling, service.model),
        max_tokens=limits[0] if limits else None,
        stop=asked.stop_texts,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        tools=tools_of(asked),
        tool_choice=tool_choice_of(asked),
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        output_format=format_of(asked),
        reasoning_effort=effort,
        enable_thinking=thinking,
        ignore_end=bool(asked.ignore_eos),
    )


@dataclass(frozen=True)
class Head:
    """Fields that every chunk of an answer begins with."""

    id: str
    created: int
    model: str

    def of(self, kind: str) -> JSON:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def error_event(error: ApiError) -> Event:
    return Event(openai_body(error))


def usage_of(end: ChatEnd) -> JSON:
    return response_metrics.usage(
        end.prompt_tokens,
        end.cached_tokens,
        end.completion_tokens,
        sum(end.outcome.stats.accepted),
        end.reasoning_tokens,
    )


# Streamed


async def chunks(
    answer: ChatAnswer, head: Head, service: Service, asked: ChatFields
) -> AsyncIterator[Event]:
    """One chunk per event, the first with the role."""

    def chunk(delta: JSON, logprobs: JSON | None = None, reason: str | None = None) -> JSON:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        found = {**head.of("chat.completion.chunk"), "choices": [choice]}
        if asked.wants_running_usage:
            counts = answer.num_prompt_tokens, answer.num_tokens
            names = ("prompt_tokens", "completion_tokens", "total_tokens")
            found["usage"] = dict(zip(names, (*counts, sum(counts)), strict=True))
        return found

    first = True
    async for event in answer:
        if first:
            yield Event(chunk({"role": "assistant", "content": ""}))
            first = False
        match event:
            case ReasoningDelta():
                yield Event(chunk({"reasoning_content": event.text}))
            case TextDelta():
                logprobs = None
                if asked.logprobs and event.logprobs:
                    logprobs = logprobs_of(event, service)
                yield Event(chunk({"content": event.text}, logprobs))
            case ToolCallStart():
                function = {"name": event.name, "arguments": ""}
                call = {"index": event.index, "id": event.id, "type": "function"}
                yield Event(chunk({"tool_calls": [{**call, "function": function}]}))
            case ToolCallDelta():
                call = {"index": event.index, "function": {"arguments": event.arguments}}
                yield Event(chunk({"tool_calls": [call]}))
            case ChatEnd():
                timings = response_metrics.timings(event.outcome, service.model)
                yield Event({**chunk({}, reason=event.reason), "timings": timings})
                if asked.wants_usage:
                    yield Event(
                        {
                            **head.of("chat.completion.chunk"),
                            "choices": [],
                            "usage": usage_of(event),
                            "metrics": response_metrics.metrics(event.outcome, service.model),
                            "timings": timings,
                        }
                    )


def logprobs_of(event: TextDelta, service: Service) -> JSON:
    tokenizer = service.tokenizer.tokenizer
    content = [chat_logprobs(tokenizer, one) for one in event.logprobs]
    return {"content": content, "refusal": None}


# Whole


async def completion(answer: ChatAnswer, head: Head, service: Service, with_logprobs: bool) -> JSON:
    text, reasoning, logprobs = "", "", list[JSON]()
    calls = dict[int, JSON]()
    end: ChatEnd | None = None
    async for event in answer:
        match event:
            case ReasoningDelta():
                reasoning += event.text
            case TextDelta():
                text += event.text
                logprobs += logprobs_of(event, service)["content"] if with_logprobs else []
            case ToolCallStart():
                function = {"name": event.name, "arguments": ""}
                calls[event.index] = {"id": event.id, "type": "function", "function": function}
            case ToolCallDelta():
                calls[event.index]["function"]["arguments"] += event.arguments
            case ChatEnd():
                end = event
    assert end is not None, "an answer has an end, or raises"
    message: JSON = {"role": "assistant", "content": text if text or not calls else None}
    message["refusal"] = None
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    choice = {
        "index": 0,
        "message": message,
        "logprobs": {"content": logprobs, "refusal": None} if with_logprobs else None,
        "finish_reason": end.reason,
    }
    return {
        **head.of("chat.completion"),
        "choices": [choice],
        "usage": usage_of(end),
        "metrics": response_metrics.metrics(end.outcome, service.model),
        "timings": response_metrics.timings(end.outcome, service.model),
    }
