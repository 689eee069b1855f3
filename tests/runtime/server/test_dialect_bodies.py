"""Hostile bodies of Responses and Messages: never more than a refusal."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_chat import ScriptedChat, dialect_app, fitting
from served import ask, serve
from starlette.testclient import TestClient

PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
FULL_RESPONSE: dict[str, Any] = {
    "model": "tiny",
    "instructions": "Be brief.",
    "input": [
        {"type": "additional_tools", "tools": [{"type": "custom", "name": "c"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}], "content": []},
        {"type": "function_call", "call_id": "c", "namespace": "n", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "x"},
        {"type": "custom_tool_call", "call_id": "d", "name": "c", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": [{"type": "text"}]},
        {"role": "user", "content": "Go on."},
    ],
    "tools": [
        {"type": "function", "name": "f", "parameters": PARAMETERS, "strict": True},
        {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]},
    ],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "f"}]},
    "text": {"format": {"type": "json_schema", "name": "s", "schema": PARAMETERS}},
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["message.output_text.logprobs"],
    "metadata": {"a": "b"},
    "temperature": 0.5,
    "max_output_tokens": 20,
    "stop": ["x"],
    "stream": False,
}
FULL_MESSAGE: dict[str, Any] = {
    "model": "claude-x",
    "max_tokens": 20,
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "x", "signature": "y"},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"a": "b"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text"}]},
                {"type": "document", "source": {"type": "text", "data": "x"}},
                {"type": "text", "text": "Go on."},
            ],
        },
    ],
    "tools": [{"name": "f", "input_schema": PARAMETERS}],
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": PARAMETERS}},
    "stop_sequences": ["x"],
    "stream": False,
}
ODD: list[Any] = [
    None, True, False, 0, -1, 1 << 80, 0.5, 1e300, "", "x", "\x00", "x" * 5000, [], [[]], {},
    {"type": "text"}, {"type": []}, [{"type": None}], [None], {"": {}},
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", FULL_RESPONSE),
        ("/v1/messages", FULL_MESSAGE),
        ("/v1/messages/count_tokens", FULL_MESSAGE),
    ],
    ids=["responses", "messages", "count_tokens"],
)
def test_a_body_with_an_odd_value_anywhere_is_answered_or_refused(
    path: str, body: dict[str, Any]
) -> None:
    """Each place with each odd value; raises if the app does."""
    client = TestClient(dialect_app(ScriptedChat(fitting).service()))
    num_refused = 0
    for place in places(body):
        for odd in ODD:
            response = client.post(path, json=with_value(body, place, odd))
            assert response.status_code in (200, 400, 404), (place, odd, response.text)
            num_refused += response.status_code == 400
            if response.status_code == 400:
                assert response.json()["error"]["message"]
    assert num_refused > 100  # the values are odd


def test_pairs_of_odd_values_are_answered_or_refused() -> None:
    client = TestClient(dialect_app(ScriptedChat(fitting).service()))
    chosen = random.Random(7)
    for _ in range(400):
        path, body = chosen.choice(
            [("/v1/responses", FULL_RESPONSE), ("/v1/messages", FULL_MESSAGE)]
        )
        for _ in range(2):
            body = with_value(body, chosen.choice(list(places(body))), chosen.choice(ODD))
        body = {**body, "stream": chosen.random() < 0.5}
        response = client.post(path, json=body)
        assert response.status_code in (200, 400, 404), (body, response.text)


@pytest.mark.parametrize("depth", [150, 960, 100_000])
def test_deep_nesting_is_answered_or_refused(depth: int) -> None:
    client = TestClient(dialect_app(ScriptedChat(fitting).service()))
    deep = "[" * depth + "]" * depth
    texts = (
        f'{{"input": "x", "tools": [{{"type": "function", "name": "f", "parameters": {deep}}}]}}',
        f'{{"input": {deep}}}',
        deep,
    )
    for path in ("/v1/responses", "/v1/messages"):
        for text in texts:
            headers = {"content-type": "application/json"}
            response = client.post(path, content=text, headers=headers)
            assert response.status_code in (200, 400)


def test_what_a_response_repeats_is_never_nested_too_deep_to_be_written() -> None:
    """A large body is parsed in a thread, where the stack has more room than where one answers."""
    app, call = serve().app, '{"type": "function", "name": "f"'
    for stream in ("true", "false"):
        for depth in range(900, 1000, 5):
            deep = "[" * depth + "]" * depth
            text = f'{{"input": "x", "user": "{"u" * 20_000}", "tools": [{call}}}], '
            text += f'"stream": {stream}, "tool_choice": {call}, "x": {deep}}}}}'
            refused = ask(app, "/v1/responses", text.encode())
            assert refused.status == 400 and refused.error["code"] == "invalid_json"


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in inner:
        yield (*path, key)
        if isinstance(one, dict | list):
            yield from places(one, (*path, key))


def with_value(body: dict[str, Any], place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(body)
    at = changed
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    json.dumps(changed)
    return dict(changed)
