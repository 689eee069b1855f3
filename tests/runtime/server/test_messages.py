"""/v1/messages: golden bodies and event sequences, and what is refused."""

import json
from typing import Any

import pytest
from scripted_chat import ScriptedChat, dialect_app, ended, numbered
from starlette.testclient import TestClient

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.server import messages
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
from subspec.runtime.server.errors import engine_error
from subspec.runtime.server.generation import PromptTooLong, QueueFull

JSON = dict[str, Any]
HELLO: tuple[ChatEvent, ...] = (TextDelta("Hel"), TextDelta("lo"), ended())
HI = [{"role": "user", "content": "Hi"}]
MINIMAL: JSON = {"model": "tiny", "max_tokens": 50, "messages": HI}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"name": "weather", "description": "Of a city.", "input_schema": SCHEMA}
# sha256 of "Hm."
SIGNATURE = "sha256:6e72d95cb4b4fe164ee677f8ddce4bde2e5af04e9e282ccd4a2a17fa6ec71d81"


@pytest.fixture(autouse=True)
def same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "random_id", numbered())


def played(*events: ChatEvent | Exception) -> tuple[ScriptedChat, TestClient]:
    chat = ScriptedChat(lambda request: events)
    return chat, TestClient(dialect_app(chat.service()))


def asked(**fields: Any) -> ChatRequest:
    """What the model gets."""
    chat, client = played(*HELLO)
    response = client.post("/v1/messages", json=MINIMAL | fields)
    assert response.status_code == 200, response.text
    return chat.requests[0]


def streamed(body: JSON, *events: ChatEvent | Exception) -> list[JSON]:
    _, client = played(*events)
    response = client.post("/v1/messages", json=MINIMAL | {"stream": True} | body)
    assert response.status_code == 200, response.text
    found = []
    for frame in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == "event: " + found[-1]["type"]
    return found


def test_a_whole_message_is_the_golden_body() -> None:
    _, client = played(ReasoningDelta("Hm."), *HELLO)
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b", "x-api-key": "k"}
    response = client.post("/v1/messages?beta=true", json=MINIMAL, headers=headers)
    assert response.json() == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": SIGNATURE},
            {"type": "text", "text": "Hello"},
        ],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 8,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": 5,
            "output_tokens_details": {"thinking_tokens": 2},
        },
    }


def test_an_answer_is_streamed_as_the_golden_sequence() -> None:
    events = streamed(
        {"thinking": {"type": "adaptive"}, "tools": [WEATHER]},
        ReasoningDelta("Hm."),
        TextDelta("I look."),
        ToolCallStart(0, "call_a", "weather"),
        ToolCallDelta(0, '{"city": '),
        ToolCallDelta(0, '"Bonn"}'),
        ended("tool_calls"),
    )
    zero = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 0}
    assert events == [
        {
            "type": "message_start",
            "message": {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": "tiny",
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {"input_tokens": 1, **zero},
            },
        },
        start(0, {"type": "thinking", "thinking": "", "signature": ""}),
        delta(0, {"type": "thinking_delta", "thinking": "Hm."}),
        delta(0, {"type": "signature_delta", "signature": SIGNATURE}),
        {"type": "content_block_stop", "index": 0},
        start(1, {"type": "text", "text": ""}),
        delta(1, {"type": "text_delta", "text": "I look."}),
        {"type": "content_block_stop", "index": 1},
        start(2, {"type": "tool_use", "id": "call_a", "name": "weather", "input": {}}),
        delta(2, {"type": "input_json_delta", "partial_json": '{"city": '}),
        delta(2, {"type": "input_json_delta", "partial_json": '"Bonn"}'}),
        {"type": "content_block_stop", "index": 2},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use", "stop_sequence": None},
            "usage": {
                "input_tokens": 8,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 4,
                "output_tokens": 5,
                "output_tokens_details": {"thinking_tokens": 2},
            },
        },
        {"type": "message_stop"},
    ]


def start(index: int, block: JSON) -> JSON:
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(index: int, value: JSON) -> JSON:
    return {"type": "content_block_delta", "index": index, "delta": value}


def test_omitted_thinking_leaves_its_block_and_no_text() -> None:
    thinking = {"type": "adaptive", "display": "omitted"}
    events = streamed({"thinking": thinking}, ReasoningDelta("Hm."), *HELLO)
    assert [event["type"] for event in events[1:4]] == [
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
    ]
    assert events[2]["delta"] == {"type": "signature_delta", "signature": SIGNATURE}


@pytest.mark.parametrize(
    ("end", "reason", "text"),
    [
        (ended(), "end_turn", None),
        (ended("length"), "max_tokens", None),
        (ended("stop", "END"), "stop_sequence", "END"),
        (ended("tool_calls"), "tool_use", None),
    ],
)
def test_the_reason_of_an_end_is_told(end: ChatEvent, reason: str, text: str | None) -> None:
    _, client = played(TextDelta("x"), end)
    found = client.post("/v1/messages", json=MINIMAL).json()
    assert (found["stop_reason"], found["stop_sequence"]) == (reason, text)


def test_arguments_that_a_limit_cuts_off_are_still_an_object() -> None:
    cut = (ToolCallStart(0, "c", "weather"), ToolCallDelta(0, '{"ci'), ended("length"))
    _, client = played(*cut)
    found = client.post("/v1/messages", json=MINIMAL).json()
    assert found["content"][0]["input"] == {"unfinished_arguments": '{"ci'}


def test_an_engine_that_fails_in_the_midst_ends_the_stream_with_an_error() -> None:
    error = engine_error(SubspecError(Exit.RESOURCES, "the disk is gone"))
    events = streamed({}, TextDelta("Hel"), error)
    assert events[-1] == {
        "type": "error",
        "error": {"type": "api_error", "message": "the disk is gone"},
    }


def test_what_refuses_a_request_is_a_status_also_for_a_stream() -> None:
    for error, status, kind in (
        (QueueFull(8, 17), 503, "overloaded_error"),
        (SubspecError(Exit.USAGE, "too long"), 400, "invalid_request_error"),
    ):
        _, client = played(error)
        for stream in (False, True):
            response = client.post("/v1/messages", json=MINIMAL | {"stream": stream})
            assert response.status_code == status
            assert response.json()["error"]["type"] == kind


@pytest.mark.parametrize(("num_tokens", "told"), [(600, 600), (None, 1)])
def test_a_prompt_that_is_too_long_is_refused_in_the_words_that_claude_code_looks_for(
    num_tokens: int | None, told: int
) -> None:
    """The second one was not counted yet: the scripted count is of words."""
    _, client = played(PromptTooLong(num_tokens, 512))
    for stream in (False, True):
        response = client.post("/v1/messages", json=MINIMAL | {"stream": stream})
        assert response.status_code == 400
        assert response.json()["error"] == {
            "type": "invalid_request_error",
            "message": f"prompt is too long: {told} tokens > 511 maximum",
        }


def test_a_conversation_with_tools_becomes_chat_messages() -> None:
    """As Claude Code sends it."""
    cache = {"cache_control": {"type": "ephemeral"}}
    request = asked(
        model="claude-sonnet-4-5-20250929",
        system=[
            {"type": "text", "text": "You code.", **cache},
            {"type": "text", "text": "Be brief."},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Fix it.", **cache}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I must look.", "signature": "x"},
                    {"type": "redacted_thinking", "data": "??"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "ls", "input": {"at": "é"}},
                    {"type": "tool_use", "id": "t2", "name": "ls", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Here."},
                    {"type": "tool_result", "tool_use_id": "t1", "content": "a.py"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "t2",
                        "is_error": True,
                        "content": [{"type": "text", "text": "no such folder"}],
                    },
                ],
            },
            {"role": "system", "content": "The date has changed."},
        ],
        metadata={"user_id": "me"},
        betas=["x"],
        context_management={"edits": []},
    )
    assert list(request.messages) == [
        {"role": "system", "content": "You code.\n\nBe brief."},
        {"role": "user", "content": "Fix it."},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "I must look.",
            "tool_calls": [call("t1", '{"at": "é"}'), call("t2", "{}")],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "a.py"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no such folder"},
        {"role": "user", "content": "Here.\n\nThe date has changed."},
    ]


@pytest.mark.parametrize("last", ["", "\nYou code."])
def test_a_line_for_billing_that_changes_each_time_does_not_reach_the_prompt(last: str) -> None:
    billing = "x-anthropic-billing-header: cc_version=2.1; cch=1a2b3;"
    blocks = [{"type": "text", "text": text} for text in (billing + last, "Be brief.")]
    expected = "You code.\n\nBe brief." if last else "Be brief."
    assert asked(system=blocks).messages[0] == {"role": "system", "content": expected}


def call(call_id: str, arguments: str) -> JSON:
    return {"id": call_id, "type": "function", "function": {"name": "ls", "arguments": arguments}}


def test_settings_reach_the_model() -> None:
    request = asked(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        stop_sequences=["END"],
        tools=[WEATHER, {"type": "web_search_20250305", "name": "web_search"}],
        tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}},
    )
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
    assert (request.max_tokens, request.stop) == (50, ("END",))
    function = {"name": "weather", "description": "Of a city.", "parameters": SCHEMA}
    assert request.tools == ({"type": "function", "function": function},)
    assert request.tool_choice == NamedTool("weather")
    assert not request.parallel_tool_calls
    assert request.output_format == OutputFormat("json_schema", SCHEMA)
    assert (request.reasoning_effort, request.enable_thinking) == ("high", True)


def test_a_strict_tool_stays_one() -> None:
    strict, plain = asked(tools=[{**WEATHER, "strict": True}, {**WEATHER, "name": "b"}]).tools
    assert strict["function"]["strict"] is True and "strict" not in plain["function"]


@pytest.mark.parametrize(
    ("choice", "expected"), [("auto", "auto"), ("any", "required"), ("none", "none")]
)
def test_a_choice_of_tools_is_translated(choice: str, expected: str) -> None:
    assert asked(tools=[WEATHER], tool_choice={"type": choice}).tool_choice == expected


@pytest.mark.parametrize(
    ("thinking", "enabled"),
    [(None, False), ("disabled", False), ("enabled", True), ("adaptive", True)],
)
def test_who_does_not_ask_for_thinking_gets_none(thinking: str | None, enabled: bool) -> None:
    fields = {"thinking": {"type": thinking, "budget_tokens": 1024}} if thinking else {}
    assert asked(**fields).enable_thinking is enabled


def test_tokens_are_counted_without_a_limit_on_the_answer() -> None:
    chat, client = played()
    body = {"model": "claude-x", "system": "a b", "messages": HI, "tools": [WEATHER]}
    response = client.post("/v1/messages/count_tokens", json=body)
    assert response.json() == {"input_tokens": 3}
    assert chat.requests[0].tools[0]["function"]["name"] == "weather"


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}
TOOL_USE = {"type": "tool_use", "id": "t", "name": "f"}


def said(role: str, *blocks: Any) -> JSON:
    return {"messages": [*HI, {"role": role, "content": list(blocks)}]}


CASES: list[tuple[JSON, str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    (said("user", IMAGE), "messages[1].content[0]"),
    (said("user", {"type": "tool_result", "content": "x"}), "messages[1].content[0].tool_use_id"),
    (
        said("user", {"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}),
        "messages[1].content[0].content[0]",
    ),
    (said("assistant", TOOL_USE), "messages[1].content[0].input"),
    (said("assistant", {"type": "text", "text": "It is"}), "messages"),
    (said("user", 3), "messages[1].content[0]"),
    ({"temperature": "1"}, "temperature"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name"),
    ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
    ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
    ({"model": 3}, "model"),
]


@pytest.mark.parametrize(("fields", "param"), CASES, ids=[param for _, param in CASES])
def test_what_cannot_be_honoured_is_refused_by_name(fields: JSON, param: str) -> None:
    _, client = played(*HELLO)
    body = {key: value for key, value in (MINIMAL | fields).items() if value is not None}
    response = client.post("/v1/messages", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]


def test_only_names_of_the_model_and_those_that_tools_have_in_them_are_taken() -> None:
    for name, status in (("tiny", 200), ("claude-opus-4-1", 200), ("gpt-5", 404)):
        _, client = played(*HELLO)
        response = client.post("/v1/messages", json=MINIMAL | {"model": name})
        assert response.status_code == status
        assert response.json().get("model", "tiny") == "tiny"
        if status == 404:
            assert response.json()["error"]["type"] == "not_found_error"
