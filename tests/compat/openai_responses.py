"""openai-python's Responses against a running server: `openai_responses.py BASE_URL [--key KEY]`.

Shapes are checked, not what a model says: any model will do. Runs with the package
`openai` alone, 2.x and 3.x.
"""

import argparse
import json
from typing import Any

import openai
from pydantic import BaseModel

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
QUESTION = "What is the weather in Paris?"


class Place(BaseModel):
    name: str
    residents: int


def check_text(client: openai.OpenAI, model: str) -> None:
    found = client.responses.create(
        model=model,
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "Answer in English."},
            {"role": "user", "content": [{"type": "input_text", "text": "Say hello."}]},
        ],
        max_output_tokens=64,
        temperature=0,
        metadata={"run": "1"},
        store=True,
        user="someone",
    )
    assert found.status in ("completed", "incomplete") and found.object == "response"
    assert found.id.startswith("resp_") and found.store is False
    assert found.usage is not None and found.usage.output_tokens > 0
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert found.usage.input_tokens_details.cached_tokens >= 0
    assert found.metadata == {"run": "1"}


def check_stream(client: openai.OpenAI, model: str) -> None:
    with client.responses.stream(
        model=model, input="Say hello.", max_output_tokens=64, include=LOGPROBS, top_logprobs=2
    ) as stream:
        events = list(stream)
        final = stream.get_final_response() if events[-1].type == "response.completed" else None
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"], kinds
    assert kinds[-1] in ("response.completed", "response.incomplete"), kinds
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    if final is not None:
        assert final.output_text == text
        said = [one for one in final.output if one.type == "message"]
        assert all(part.logprobs for one in said for part in one.content if part.text)


LOGPROBS: Any = ["message.output_text.logprobs", "reasoning.encrypted_content"]


def check_cut_off(client: openai.OpenAI, model: str) -> None:
    found = client.responses.create(model=model, input="Count to 1000.", max_output_tokens=4)
    assert found.status == "incomplete" and found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"


def check_parse(client: openai.OpenAI, model: str) -> None:
    found = client.responses.parse(
        model=model,
        input="Name a place and how many live there.",
        text_format=Place,
        reasoning={"effort": "none"},
        max_output_tokens=512,
    )
    if found.status == "completed":
        assert isinstance(found.output_parsed, Place), found


def check_tools(client: openai.OpenAI, model: str) -> None:
    """A call, its output, and the answer to it, as an agent does."""
    tools: Any = [WEATHER, {"type": "web_search"}, {"type": "local_shell"}]
    asked: list[Any] = [{"role": "user", "content": QUESTION}]
    first = client.responses.create(
        model=model, input=asked, tools=tools, tool_choice="required", max_output_tokens=512
    )
    calls = [one for one in first.output if one.type == "function_call"]
    if first.status != "completed":
        return  # a model that thinks for too long
    assert calls and calls[0].name == "get_weather" and calls[0].call_id
    json.loads(calls[0].arguments)
    asked += [item.model_dump(exclude_none=True) for item in first.output]
    for call in calls:
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}
        asked.append(output)
    second = client.responses.create(
        model=model, input=asked, tools=tools, tool_choice="none", max_output_tokens=32
    )
    assert not [one for one in second.output if one.type == "function_call"]


def check_streamed_tool(client: openai.OpenAI, model: str) -> None:
    with client.responses.stream(
        model=model,
        input=QUESTION,
        tools=[WEATHER],
        tool_choice={"type": "function", "name": "get_weather"},
        max_output_tokens=512,
    ) as stream:
        events = list(stream)
    done = [one for one in events if one.type == "response.function_call_arguments.done"]
    deltas = [one for one in events if one.type == "response.function_call_arguments.delta"]
    if events[-1].type == "response.completed":
        assert len(done) == 1
        assert "".join(one.delta for one in deltas) == done[0].arguments


def check_probe(client: openai.OpenAI, model: str) -> None:
    empty: Any = []
    found = client.responses.create(model=model, input=empty, max_output_tokens=1)
    assert found.status == "completed" and found.output == []


def check_refusals(client: openai.OpenAI, model: str) -> None:
    image: Any = [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "temperature": -1}, "temperature"),
        ({"input": image}, "input[0].content[0].type"),
    ]
    for fields, param in refused:
        try:
            client.responses.create(model=model, **fields)
        except openai.BadRequestError as error:
            assert error.param == param, error
        else:
            raise AssertionError(f"{param} was not refused")
    try:
        client.responses.create(model="no-such-model", input="x")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found"
    else:
        raise AssertionError("another model was not refused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base_url", help="as in http://127.0.0.1:8000")
    parser.add_argument("--key", default="none")
    options = parser.parse_args()
    client = openai.OpenAI(
        base_url=options.base_url.rstrip("/") + "/v1", api_key=options.key, max_retries=0
    )
    model = client.models.list().data[0].id
    for check in (
        check_text,
        check_stream,
        check_cut_off,
        check_parse,
        check_tools,
        check_streamed_tool,
        check_probe,
        check_refusals,
    ):
        check(client, model)
        print(f"openai {openai.__version__}: {check.__name__}", flush=True)


if __name__ == "__main__":
    main()
