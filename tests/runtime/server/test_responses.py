"""/v1/responses: golden bodies and event sequences, and what is refused."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from scripted_chat import ScriptedChat, dialect_app, ended, numbered, usual_service
from starlette.testclient import TestClient

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.model.sampling import TokenLogprobs
from subspec.runtime.server import responses, responses_answer
from subspec.runtime.server.chat_events import (
    ChatEvent,
    ChatRequest,
    NamedTool,
    OutputFormat,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
)
from subspec.runtime.server.generation import PromptTooLong, QueueFull

JSON = dict[str, Any]
HELLO: tuple[ChatEvent, ...] = (TextDelta("Hel"), TextDelta("lo"), ended())
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "name": "weather", "description": "", "parameters": PARAMETERS}


@pytest.fixture(autouse=True)
def same_time_and_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses.time, "time", lambda: 1_795_000_000.5)
    monkeypatch.setattr(responses_answer, "random_id", numbered())


def played(*events: ChatEvent | Exception) -> tuple[ScriptedChat, TestClient]:
    chat = ScriptedChat(lambda request: events)
    return chat, TestClient(dialect_app(chat.service()))


def asked(body: JSON, *events: ChatEvent) -> ChatRequest:
    """What the model gets."""
    chat, client = played(*(events or HELLO))
    response = client.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    return chat.requests[0]


def streamed(body: JSON, *events: ChatEvent | Exception) -> list[JSON]:
    _, client = played(*events)
    response = client.post("/v1/responses", json={"stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for frame in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == "event: " + found[-1]["type"]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def refused(body: JSON) -> JSON:
    _, client = played(*HELLO)
    response = client.post("/v1/responses", json=body)
    assert response.status_code in (400, 404), response.text
    error: JSON = response.json()["error"]
    return error


def test_a_whole_answer_is_the_golden_body() -> None:
    _, client = played(ReasoningDelta("Hm."), *HELLO)
    response = client.post("/v1/responses", json={"model": "tiny", "input": "Hi", "user": "me"})
    body = response.json()
    assert body.pop("metrics")["subspec"]["method"] == "substitute" and body.pop("timings")
    assert body == {
        "id": "resp_1",
        "object": "response",
        "created_at": 1795000000,
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "model": "tiny",
        "output": [
            {
                "id": "rs_2",
                "type": "reasoning",
                "summary": [],
                "status": "completed",
                "content": [{"type": "reasoning_text", "text": "Hm."}],
                "encrypted_content": None,
            },
            {
                "id": "msg_3",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [
                    {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
                ],
            },
        ],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 0.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 12,
            "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 2},
            "total_tokens": 17,
        },
        "user": "me",
    }


def test_a_text_is_streamed_as_the_golden_sequence() -> None:
    events = streamed({"input": "Hi"}, *HELLO)
    place = {"item_id": "msg_2", "output_index": 0}
    part = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    item = {"id": "msg_2", "type": "message", "role": "assistant"}
    done = {**item, "status": "completed", "content": [part]}
    first, last = events[0]["response"], events[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert (last["status"], last["output"]) == ("completed", [done])
    assert last["id"] == first["id"] == "resp_1"
    assert [without_number(event) for event in events[2:-1]] == [
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": {**item, "status": "in_progress", "content": []},
        },
        {
            "type": "response.content_part.added",
            **place,
            "content_index": 0,
            "part": {**part, "text": ""},
        },
        delta("Hel", place),
        delta("lo", place),
        {
            "type": "response.output_text.done",
            **place,
            "content_index": 0,
            "text": "Hello",
            "logprobs": [],
        },
        {"type": "response.content_part.done", **place, "content_index": 0, "part": part},
        {"type": "response.output_item.done", "output_index": 0, "item": done},
    ]
    assert [event["type"] for event in (*events[:2], events[-1])] == [
        "response.created",
        "response.in_progress",
        "response.completed",
    ]


def delta(text: str, place: JSON) -> JSON:
    kind = "response.output_text.delta"
    return {"type": kind, **place, "content_index": 0, "delta": text, "logprobs": []}


def without_number(event: JSON) -> JSON:
    return {key: value for key, value in event.items() if key != "sequence_number"}


def test_calls_follow_text_in_the_golden_order() -> None:
    events = streamed(
        {"input": "Hi", "tools": [WEATHER]},
        ReasoningDelta("Hm."),
        TextDelta("I look."),
        ToolCallStart(0, "call_a", "weather"),
        ToolCallDelta(0, '{"city": '),
        ToolCallDelta(0, '"Bonn"}'),
        ToolCallStart(1, "call_b", "weather"),
        ToolCallDelta(1, "{}"),
        ended("tool_calls"),
    )
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event["output_index"] for event in events[2:-1]] == [0] * 6 + [1] * 6 + [2] * 5 + [
        3
    ] * 4
    assert events[-1]["response"]["output"][2] == {
        "id": "fc_4",
        "type": "function_call",
        "call_id": "call_a",
        "name": "weather",
        "status": "completed",
        "arguments": '{"city": "Bonn"}',
    }


def test_thoughts_are_a_summary_for_who_asks_for_one() -> None:
    events = streamed(
        {"input": "Hi", "reasoning": {"effort": "low", "summary": "auto"}},
        ReasoningDelta("Hm."),
        *HELLO,
    )
    assert [event["type"].removeprefix("response.") for event in events[2:8]] == [
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
    ]
    assert events[7]["item"]["summary"] == [{"type": "summary_text", "text": "Hm."}]


def test_a_limit_leaves_an_incomplete_answer() -> None:
    events = streamed({"input": "Hi"}, TextDelta("Hel"), ended("length"))
    last = events[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_an_engine_that_fails_in_the_midst_ends_the_stream_with_what_there_is() -> None:
    error = SubspecError(Exit.RESOURCES, "the disk is gone", "look for it")
    events = streamed({"input": "Hi"}, TextDelta("Hel"), error)
    last = events[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["message"] == "the disk is gone (look for it)"
    assert last["response"]["output"][0]["content"][0]["text"] == "Hel"


def test_what_refuses_a_request_is_a_status_also_for_a_stream() -> None:
    for error, status in ((QueueFull(8, 17), 503), (SubspecError(Exit.USAGE, "too long"), 400)):
        _, client = played(error)
        for stream in (False, True):
            response = client.post("/v1/responses", json={"input": "Hi", "stream": stream})
            assert response.status_code == status
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    _, client = played(PromptTooLong(600, 512))
    error = client.post("/v1/responses", json={"input": "Hi"}).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")


def test_an_answer_ends_with_its_stream() -> None:
    chat, client = played(*HELLO)
    client.post("/v1/responses", json={"input": "Hi", "stream": True})
    client.post("/v1/responses", json={"input": "Hi"})
    assert [answer.cancelled for answer in chat.answers] == [True, True]


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": []}, {"instructions": "Be."}])
def test_an_empty_input_is_answered_without_the_model(empty: JSON) -> None:
    chat, client = played()
    found = client.post("/v1/responses", json=empty).json()
    assert (found["status"], found["output"]) == ("completed", [])
    assert found["usage"]["total_tokens"] == 0
    kinds = [event["type"] for event in streamed(empty)]
    assert kinds == ["response.created", "response.in_progress", "response.completed"]
    assert chat.requests == []


def test_a_coding_agents_conversation_becomes_chat_messages() -> None:
    """Items as Codex keeps and sends them."""
    request = asked(
        {
            "instructions": "You code.",
            "input": [
                message("developer", "Never push."),
                message("user", "<environment>linux</environment>"),
                message("user", "Fix it."),
                {
                    "type": "reasoning",
                    "id": "rs_1",
                    "summary": [{"type": "summary_text", "text": "short"}],
                    "content": [{"type": "reasoning_text", "text": "I must look."}],
                    "encrypted_content": None,
                },
                message("assistant", "I look.", "output_text"),
                {
                    "type": "function_call",
                    "call_id": "c1",
                    "name": "shell",
                    "arguments": '{"cmd":"ls"}',
                },
                {"type": "function_call_output", "call_id": "c1", "output": "a.py"},
                {"type": "web_search_call", "id": "ws_1", "status": "completed"},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "sum"}]},
                {
                    "type": "function_call",
                    "call_id": "c2",
                    "namespace": "mcp__files__",
                    "name": "read",
                    "arguments": "{}",
                },
                {
                    "type": "function_call_output",
                    "call_id": "c2",
                    "output": [{"type": "input_text", "text": "print()"}],
                },
                message("developer", "Be quick."),
                message("user", "Go on."),
            ],
            "include": ["reasoning.encrypted_content"],
            "store": False,
            "prompt_cache_key": "k",
        }
    )
    assert list(request.messages) == [
        {"role": "system", "content": "You code.\n\nNever push."},
        {"role": "user", "content": "<environment>linux</environment>\n\nFix it."},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "I must look.",
            "tool_calls": [call("c1", "shell", '{"cmd":"ls"}')],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "a.py"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "sum",
            "tool_calls": [call("c2", "mcp__files__read", "{}")],
        },
        {"role": "tool", "tool_call_id": "c2", "content": "print()"},
        {"role": "user", "content": "Be quick.\n\nGo on."},
    ]


def message(role: str, text: str, kind: str = "input_text") -> JSON:
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def call(call_id: str, name: str, arguments: str) -> JSON:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def test_tools_of_namespaces_and_free_text_are_shown_as_functions() -> None:
    """Also those that Codex sends as an item of the input; a provider's own are skipped."""
    patch = {"type": "custom", "name": "patch", "description": "Edits.", "format": LARK}
    files = {"type": "namespace", "name": "mcp__files__", "description": "", "tools": [WEATHER]}
    body = {
        "input": [
            {"type": "additional_tools", "role": "developer", "tools": [patch]},
            message("user", "Hi"),
        ],
        "tools": [WEATHER, files, {"type": "web_search", "name": 3}, {"type": "local_shell"}],
    }
    request = asked(body)
    shown = [tool["function"] for tool in request.tools]
    assert [one["name"] for one in shown] == ["weather", "mcp__files__weather", "patch"]
    assert shown[0]["parameters"] == shown[1]["parameters"] == PARAMETERS
    assert shown[2]["description"] == "Edits.\n\nThe input follows this lark grammar:\nstart: /a/"
    assert shown[2]["parameters"]["required"] == ["input"]

    events = streamed(
        body,
        ToolCallStart(0, "call_a", "mcp__files__weather"),
        ToolCallDelta(0, "{}"),
        ToolCallStart(1, "call_b", "patch"),
        ToolCallDelta(1, '{"input": "*** '),
        ToolCallDelta(1, 'Begin"}'),
        ended("tool_calls"),
    )
    first, second = events[-1]["response"]["output"]
    assert (first["type"], first["namespace"]) == ("function_call", "mcp__files__")
    assert first["name"] == "weather"
    assert second["type"] == "custom_tool_call"
    assert (second["name"], second["input"]) == ("patch", "*** Begin")
    custom = [event for event in events if "custom_tool_call_input" in event["type"]]
    assert [(event.get("delta"), event.get("input")) for event in custom] == [
        ("*** Begin", None),
        (None, "*** Begin"),
    ]


def test_a_strict_tool_stays_one() -> None:
    tools = [{**WEATHER, "strict": True}, {**WEATHER, "name": "b", "strict": False}]
    strict, plain = asked({"input": "Hi", "tools": tools}).tools
    assert strict["function"]["strict"] is True and "strict" not in plain["function"]


LARK = {"type": "grammar", "syntax": "lark", "definition": "start: /a/"}


def test_a_free_text_call_comes_back_as_the_function_call_that_it_was() -> None:
    history = [
        message("user", "Hi"),
        {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": 'say "é"'},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "done"},
    ]
    request = asked({"input": history})
    assert request.messages[1]["tool_calls"] == [call("c", "patch", '{"input": "say \\"é\\""}')]
    assert request.messages[2] == {"role": "tool", "tool_call_id": "c", "content": "done"}


def test_settings_reach_the_model() -> None:
    request = asked(
        {
            "input": "Hi",
            "max_output_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 3,
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "name": "weather"},
            "parallel_tool_calls": False,
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "null"}}},
            "reasoning": {"effort": "none"},
            "truncation": "auto",
        }
    )
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.9, 3)
    assert request.max_tokens == 7
    assert request.tool_choice == NamedTool("weather")
    assert not request.parallel_tool_calls
    assert request.output_format == OutputFormat("json_schema", {"type": "null"})
    assert (request.reasoning_effort, request.enable_thinking) == (None, False)
    assert request.logprobs is None


def test_allowed_tools_leave_out_the_others() -> None:
    other = {**WEATHER, "name": "other"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"name": "other"}]}
    request = asked({"input": "Hi", "tools": [WEATHER, other], "tool_choice": allowed})
    assert [tool["function"]["name"] for tool in request.tools] == ["other"]
    assert request.tool_choice == "required"


def test_log_probabilities_come_with_the_text_that_they_belong_to() -> None:
    big, small, last = map(usual_service().tokenizer.tokenizer.token_to_id, "Hhi")
    early, late = TokenLogprobs(big, -0.5, ((small, -1.0),)), TokenLogprobs(last, -0.25)
    body = {"input": "x", "top_logprobs": 1, "include": ["message.output_text.logprobs"]}
    events = streamed(body, TextDelta("", (early,)), TextDelta("Hi", (late,)), ended())
    top = [{"token": "h", "logprob": -1.0, "bytes": [104]}]
    expected = [
        {"token": "H", "logprob": -0.5, "bytes": [72], "top_logprobs": top},
        {"token": "i", "logprob": -0.25, "bytes": [105], "top_logprobs": []},
    ]
    deltas = [one for one in events if one["type"] == "response.output_text.delta"]
    assert [one["logprobs"] for one in deltas] == [expected]
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == expected
    assert asked(body).logprobs == 1


def items_of(*items: JSON) -> JSON:
    return {"input": list(items)}


IMAGE = {"type": "message", "role": "user", "content": [{"type": "input_image"}]}
CASES: Iterable[tuple[JSON, str]] = [
    ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
    ({"input": "x", "conversation": {"id": "c"}}, "conversation"),
    ({"input": "x", "background": True}, "background"),
    ({"input": "x", "prompt": {"id": "p"}}, "prompt"),
    ({"input": 3}, "input"),
    ({"input": [3]}, "input[0]"),
    (items_of(IMAGE), "input[0].content[0].type"),
    (items_of({"role": "alien", "content": "x"}), "input[0].role"),
    (items_of({"content": "x"}), "input[0].role"),
    (items_of({"type": "item_reference", "id": "x"}), "input[0]"),
    (items_of({"type": "function_call", "call_id": "c", "name": "f"}), "input[0].arguments"),
    (items_of({"type": "function_call", "name": "f", "arguments": ""}), "input[0].call_id"),
    (items_of({"type": "function_call_output", "output": "x"}), "input[0].call_id"),
    (items_of({"role": "user", "content": [{"type": "input_text"}]}), "input[0].content[0].text"),
    ({"input": "x", "temperature": True}, "temperature"),
    ({"input": "x", "temperature": "1"}, "temperature"),
    ({"input": "x", "top_p": 0}, "top_p"),
    ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
    ({"input": "x", "top_logprobs": 21}, "top_logprobs"),
    ({"input": "x", "tools": [{"type": "function"}]}, "tools[0].name"),
    ({"input": "x", "tool_choice": "required"}, "tool_choice"),
    ({"input": "x", "tool_choice": "perhaps"}, "tool_choice"),
    ({"input": "x", "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"input": "x", "tool_choice": {"type": "allowed_tools", "mode": []}}, "tool_choice"),
    ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"input": "x", "metadata": {"a": 1}}, "metadata.a"),
    ({"input": "x", "model": "other"}, "model"),
]


@pytest.mark.parametrize(("body", "param"), CASES, ids=[param for _, param in CASES])
def test_what_cannot_be_honoured_is_refused_by_name(body: JSON, param: str) -> None:
    error = refused(body)
    assert error["param"] == param, error
    assert param.removesuffix(".type") in error["message"]
