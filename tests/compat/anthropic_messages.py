"""anthropic-sdk-python against a running server: `anthropic_messages.py BASE_URL [--key KEY]`.

Shapes are checked, not what a model says: any model will do. Runs with the package
`anthropic` alone.
"""

import argparse
from typing import Any

import anthropic

# A name that tools have in them, and that is taken as the server's model.
CLAUDE = "claude-of-any-version"
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
    "cache_control": {"type": "ephemeral"},
}
SEARCH: Any = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
QUESTION: Any = {"role": "user", "content": "What is the weather in Paris?"}


def check_text(client: anthropic.Anthropic, model: str) -> None:
    """As Claude Code asks: system blocks, cache marks, a system message between the turns."""
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Hello.", "cache_control": CACHE}]},
        {"role": "assistant", "content": "Hello!"},
        {"role": "system", "content": "The date is 2026-11-29."},
        {"role": "user", "content": "What day is it?"},
    ]
    found = client.messages.create(
        model=model,
        max_tokens=64,
        system=[{"type": "text", "text": "Be brief.", "cache_control": CACHE}],
        messages=messages,
        metadata={"user_id": "someone"},
        extra_headers={"anthropic-beta": "prompt-caching-2024-07-31"},
    )
    assert found.type == "message" and found.role == "assistant" and found.id.startswith("msg_")
    assert found.stop_reason in ("end_turn", "max_tokens")
    assert found.usage.output_tokens > 0 and found.usage.cache_read_input_tokens is not None


CACHE: Any = {"type": "ephemeral"}


def check_stream(client: anthropic.Anthropic, model: str) -> None:
    with client.messages.stream(
        model=CLAUDE, max_tokens=64, messages=[{"role": "user", "content": "Say hello."}]
    ) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_message()
    assert events[0] == "message_start" and events[-1] == "message_stop", events
    assert final.stop_reason in ("end_turn", "max_tokens")
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) > 0


def check_thinking(client: anthropic.Anthropic, model: str) -> None:
    """What was thought is a block of its own, and goes back as it came."""
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    with client.messages.stream(
        model=model,
        max_tokens=1025,
        thinking=thinking,
        messages=[{"role": "user", "content": "Is 7 prime?"}],
    ) as stream:
        first = stream.get_final_message()
    for block in first.content:
        if block.type == "thinking":
            assert block.signature
    again: Any = [
        {"role": "user", "content": "Is 7 prime?"},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "And 8?"},
    ]
    client.messages.create(model=model, max_tokens=16, messages=again)


def check_tools(client: anthropic.Anthropic, model: str) -> None:
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    first = client.messages.create(
        model=model,
        max_tokens=512,
        messages=[QUESTION],
        tools=[WEATHER, SEARCH],
        tool_choice=choice,
    )
    if first.stop_reason == "max_tokens":
        return
    assert first.stop_reason == "tool_use"
    calls = [block for block in first.content if block.type == "tool_use"]
    assert len(calls) == 1 and calls[0].name == "get_weather" and isinstance(calls[0].input, dict)
    content = [{"type": "text", "text": "Sunny"}]
    result = {"type": "tool_result", "tool_use_id": calls[0].id, "content": content}
    messages: Any = [
        QUESTION,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]},
    ]
    none: Any = {"type": "none"}
    second = client.messages.create(
        model=model, max_tokens=32, messages=messages, tools=[WEATHER], tool_choice=none
    )
    assert second.stop_reason != "tool_use"


def check_streamed_tool(client: anthropic.Anthropic, model: str) -> None:
    choice: Any = {"type": "tool", "name": "get_weather"}
    with client.messages.stream(
        model=model, max_tokens=512, messages=[QUESTION], tools=[WEATHER], tool_choice=choice
    ) as stream:
        found = stream.get_final_message()
    if found.stop_reason == "tool_use":
        assert [block.name for block in found.content if block.type == "tool_use"]


def check_count(client: anthropic.Anthropic, model: str) -> None:
    messages: Any = [{"role": "user", "content": "one two three"}]
    short = client.messages.count_tokens(model=CLAUDE, messages=messages).input_tokens
    long = client.messages.count_tokens(
        model=model, messages=messages, system="four five six", tools=[WEATHER]
    ).input_tokens
    assert 0 < short < long


def check_refusals(client: anthropic.Anthropic, model: str) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    image: Any = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"messages": image}, "messages[0].content[0]"),
        ({"messages": [QUESTION], "extra_body": {"temperature": -1}}, "temperature"),
        ({"messages": [QUESTION, {"role": "assistant", "content": "It is"}]}, "messages"),
    ]
    for fields, named in refused:
        try:
            client.messages.create(model=model, max_tokens=8, **fields)
        except anthropic.BadRequestError as error:
            body: Any = error.body
            assert body["type"] == "error" and named in body["error"]["message"], body
            assert body["error"]["type"] == "invalid_request_error"
        else:
            raise AssertionError(f"{named} was not refused")
    try:
        client.messages.create(model="no-such-model", max_tokens=8, messages=[QUESTION])
    except anthropic.NotFoundError as error:
        body = error.body
        assert body["error"]["type"] == "not_found_error"
    else:
        raise AssertionError("another model was not refused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base_url", help="as in http://127.0.0.1:8000")
    parser.add_argument("--key", default="none")
    options = parser.parse_args()
    client = anthropic.Anthropic(
        base_url=options.base_url.rstrip("/"), api_key=options.key, max_retries=0
    )
    models: Any = client.get("/v1/models", cast_to=object)
    model = models["data"][0]["id"]
    for check in (
        check_text,
        check_stream,
        check_thinking,
        check_tools,
        check_streamed_tool,
        check_count,
        check_refusals,
    ):
        check(client, model)
        print(f"anthropic {anthropic.__version__}: {check.__name__}", flush=True)


if __name__ == "__main__":
    main()
