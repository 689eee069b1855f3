"""ChatEvents -> the events of /v1/responses; the last one holds the whole body."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from subspec.runtime.server import response_metrics
from subspec.runtime.server.chat_events import (
    ChatEnd,
    ChatEvent,
    JSONValue,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
)
from subspec.runtime.server.errors import ApiError
from subspec.runtime.server.request_fields import random_id
from subspec.runtime.server.responses_request import Asked, TextFormat
from subspec.runtime.server.responses_tools import PlainTool, custom_input
from subspec.runtime.server.service import Service
from subspec.runtime.server.streaming import Event
from subspec.runtime.server.token_text import chat_logprobs

JSON = dict[str, JSONValue]


@dataclass
class OpenItem:
    """The output item being written."""

    kind: Literal["message", "reasoning", "summary", "function", "custom"]
    value: JSON  # as sent, without its deltas
    text: str = ""


class ResponseWriter:
    """Writes one answer: `begin`, `take` for each event, and `fail` on an error. Each yields events
    of the stream."""

    def __init__(self, asked: Asked, service: Service, created_at: int) -> None:
        self.body = response_body(asked, service, created_at)
        self._asked = asked
        self._service = service
        self._number = 0
        self._item: OpenItem | None = None
        self._logprobs: list[JSONValue] = []  # of the open message
        self._early: list[JSONValue] = []  # of tokens whose text is not complete yet

    def begin(self) -> Iterator[Event]:
        yield self._event("response.created", response=self.body | {"output": []})
        yield self._event("response.in_progress", response=self.body | {"output": []})

    def take(self, event: ChatEvent) -> Iterator[Event]:
        if isinstance(event, ReasoningDelta):
            kind: Literal["summary", "reasoning"] = "summary" if self._summarizes else "reasoning"
            yield from self._open_text(kind)
            yield from self._grow(event.text, [])
        elif isinstance(event, TextDelta):
            tokenizer = self._service.tokenizer.tokenizer
            self._early += [chat_logprobs(tokenizer, one) for one in event.logprobs]
            if event.text:
                yield from self._open_text("message")
                logprobs, self._early = self._early, []
                yield from self._grow(event.text, logprobs)
        elif isinstance(event, ToolCallStart):
            yield from self._open_call(event)
        elif isinstance(event, ToolCallDelta):
            yield from self._grow(event.arguments, [])
        else:
            yield from self._end(event)

    def answer_nothing(self) -> Iterator[Event]:
        """Complete the answer to an empty input."""
        self.body |= {"status": "completed", "usage": usage(0, 0, 0, 0)}
        yield self._event("response.completed", response=self.body)

    def failed(self, error: ApiError) -> Event:
        """Write the end of a failed answer: the partial output and the error."""
        number = self._number
        exhaust(self._close("incomplete"))
        self._number = number
        reason = {"code": error.code, "message": error.message}
        self.body |= {"status": "failed", "error": reason}
        return self._event("response.failed", response=self.body)

    @property
    def _summarizes(self) -> bool:
        reasoning = self._asked.body.reasoning
        return bool(reasoning and (reasoning.summary or reasoning.generate_summary))

    @property
    def _index(self) -> int:
        return len(self.body["output"])

    def _event(self, kind: str, **fields: JSONValue) -> Event:
        self._number += 1
        data = {"type": kind, "sequence_number": self._number - 1} | fields
        return Event(data, kind)

    def _of_item(self, kind: str, **fields: JSONValue) -> Event:
        assert self._item is not None
        place = {"item_id": self._item.value["id"], "output_index": self._index}
        return self._event(kind, **(place | fields))

    def _open(self, item: OpenItem) -> Iterator[Event]:
        yield from self._close("completed")
        self._item = item
        yield self._event(
            "response.output_item.added", output_index=self._index, item=dict(item.value)
        )

    def _open_text(self, kind: Literal["message", "reasoning", "summary"]) -> Iterator[Event]:
        if self._item is not None and self._item.kind == kind:
            return
        value: JSON
        if kind == "message":
            value = {"id": random_id("msg_"), "type": "message", "role": "assistant"}
            value |= {"status": "in_progress", "content": []}
        else:
            value = {"id": random_id("rs_"), "type": "reasoning", "summary": []}
            value |= {"status": "in_progress", "content": [], "encrypted_content": None}
        yield from self._open(OpenItem(kind, value))
        if kind == "summary":
            part = {"type": "summary_text", "text": ""}
            yield self._of_item("response.reasoning_summary_part.added", summary_index=0, part=part)
        else:
            yield self._of_item(
                "response.content_part.added", content_index=0, part=content_part(kind, "", [])
            )

    def _open_call(self, call: ToolCallStart) -> Iterator[Event]:
        tool = self._asked.tools.by_shown_name.get(call.name)
        value: JSON = {"call_id": call.id, "name": tool.name if tool else call.name}
        if tool and tool.namespace:
            value["namespace"] = tool.namespace
        value["status"] = "in_progress"
        if tool and tool.kind == "custom":
            value = {"id": random_id("ctc_"), "type": "custom_tool_call", **value, "input": ""}
            yield from self._open(OpenItem("custom", value))
        else:
            value = {"id": random_id("fc_"), "type": "function_call", **value, "arguments": ""}
            yield from self._open(OpenItem("function", value))

    def _grow(self, text: str, logprobs: list[JSONValue]) -> Iterator[Event]:
        item = self._item
        assert item is not None
        item.text += text
        if item.kind == "message":
            self._logprobs += logprobs
            yield self._of_item(
                "response.output_text.delta", content_index=0, delta=text, logprobs=logprobs
            )
        elif item.kind == "reasoning":
            yield self._of_item("response.reasoning_text.delta", content_index=0, delta=text)
        elif item.kind == "summary":
            kind = "response.reasoning_summary_text.delta"
            yield self._of_item(kind, summary_index=0, delta=text)
        elif item.kind == "function":
            yield self._of_item("response.function_call_arguments.delta", delta=text)
        # A custom tool's text is in a JSON string, parsed once complete.

    def _close(self, status: str) -> Iterator[Event]:
        item = self._item
        if item is None:
            return
        text, value = item.text, item.value
        value["status"] = status
        if item.kind == "function":
            value["arguments"] = text
            yield self._of_item("response.function_call_arguments.done", arguments=text)
        elif item.kind == "custom":
            value["input"] = custom_input(text)
            given = {"delta": value["input"]}
            yield self._of_item("response.custom_tool_call_input.delta", **given)
            given = {"input": value["input"]}
            yield self._of_item("response.custom_tool_call_input.done", **given)
        elif item.kind == "summary":
            part = {"type": "summary_text", "text": text}
            value["summary"] = [part]
            place = {"summary_index": 0}
            yield self._of_item("response.reasoning_summary_text.done", **place, text=text)
            yield self._of_item("response.reasoning_summary_part.done", **place, part=part)
        else:
            part = content_part(item.kind, text, self._logprobs)
            value["content"] = [part]
            if item.kind == "message":
                done: JSON = {"text": text, "logprobs": self._logprobs}
                yield self._of_item("response.output_text.done", content_index=0, **done)
            else:
                yield self._of_item("response.reasoning_text.done", content_index=0, text=text)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=self._index, item=value)
        self.body["output"].append(value)
        self._item, self._logprobs = None, []

    def _end(self, end: ChatEnd) -> Iterator[Event]:
        whole = end.reason != "length"
        yield from self._close("completed" if whole else "incomplete")
        self.body |= {
            "status": "completed" if whole else "incomplete",
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "usage": usage(
                end.prompt_tokens, end.cached_tokens, end.completion_tokens, end.reasoning_tokens
            ),
        }
        model = self._service.model
        self.body["metrics"] = response_metrics.metrics(end.outcome, model)
        self.body["timings"] = response_metrics.timings(end.outcome, model)
        yield self._event(
            "response.completed" if whole else "response.incomplete", response=self.body
        )


def exhaust(events: Iterable[Event]) -> None:
    """Consume stream events for their effect on the body."""
    for _ in events:
        pass


def content_part(kind: str, text: str, logprobs: list[JSONValue]) -> JSON:
    if kind == "message":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
    return {"type": "reasoning_text", "text": text}


def usage(input_tokens: int, cached_tokens: int, output_tokens: int, reasoning_tokens: int) -> JSON:
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": input_tokens + output_tokens,
    }


def response_body(request: Asked, service: Service, created_at: int) -> JSON:
    """The body before anything is generated."""
    asked, reasoning = request.body, request.body.reasoning
    sampling = request.chat.sampling if request.chat else None
    return {
        "id": random_id("resp_"),
        "object": "response",
        "created_at": created_at,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "model": service.model.id,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": reasoning.summary if reasoning else None,
        },
        "store": False,
        "temperature": sampling.temperature if sampling else None,
        "text": {"format": sent_format(asked.text.format if asked.text else None)},
        "tool_choice": asked.tool_choice or "auto",
        "tools": [sent_tool(tool) for tool in asked.tools or [] if tool.type == "function"],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": sampling.top_p if sampling else None,
        "truncation": "disabled",
        "usage": None,
        "user": asked.user,
    }


def sent_tool(tool: PlainTool) -> JSON:
    """A function tool as sent by the client; other types are dropped."""
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }


def sent_format(asked: TextFormat | None) -> JSON:
    if asked is None or asked.type != "json_schema":
        return {"type": asked.type if asked else "text"}
    return {"type": "json_schema", "name": asked.name or "answer", "schema": asked.schema_}
