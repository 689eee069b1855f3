"""What coding agents really send, recorded once and shortened, is understood to the last field."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_chat import ScriptedChat, dialect_app, ended
from starlette.testclient import TestClient

from subspec.runtime.server.chat_events import ChatRequest, TextDelta

REQUESTS = Path(__file__).parent / "requests"
CASES = {
    "codex-0.171.json": ("/v1/responses", "tiny"),
    "claude-code-2.1.json": ("/v1/messages?beta=true", None),  # it names a model of Anthropic's
}


def sent(name: str) -> ChatRequest:
    """What the model gets of it, by a server that refuses unknown fields."""
    path, model = CASES[name]
    body: dict[str, Any] = json.loads((REQUESTS / name).read_text())
    chat = ScriptedChat(lambda request: [TextDelta("It says forty-2."), ended()])
    service = replace(chat.service(), refuse_unknown=True)
    client = TestClient(dialect_app(service))
    response = client.post(path, json=body | ({"model": model} if model else {}))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return chat.requests[-1]


@pytest.mark.parametrize("name", CASES)
def test_an_agents_request_is_understood(name: str) -> None:
    request = sent(name)
    system, user, call, result = request.messages
    assert [one["role"] for one in request.messages] == ["system", "user", "assistant", "tool"]
    assert system["content"].startswith("You are a ") and "billing" not in system["content"]
    assert "What does it say?" in user["content"]
    (called,) = call["tool_calls"]
    assert call["content"] == "I look." and called["id"] == result["tool_call_id"]
    assert "echo forty-$((1+1))" in json.loads(called["function"]["arguments"]).values()
    assert "forty-2" in result["content"]
    assert called["function"]["name"] in [tool["function"]["name"] for tool in request.tools]
    assert request.tool_choice == "auto" and request.parallel_tool_calls


def test_codex_sends_tools_in_a_namespace_and_one_that_it_runs_itself() -> None:
    names = [tool["function"]["name"] for tool in sent("codex-0.171.json").tools]
    assert names == ["exec_command", "get_goal", "multi_agent_v1__close_agent"]


def test_claude_code_sends_a_system_message_after_the_users_and_asks_for_thought() -> None:
    request = sent("claude-code-2.1.json")
    assert request.messages[1]["content"].endswith("for the Agent tool:\n- claude:...")
    assert (request.enable_thinking, request.reasoning_effort) == (True, "high")
    assert request.max_tokens == 64000
