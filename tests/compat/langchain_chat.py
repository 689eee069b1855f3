"""langchain-openai against a running server: `langchain_chat.py BASE_URL`."""

import argparse
import json
import urllib.request
from importlib.metadata import version
from typing import Any, Literal

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

MESSAGES = [SystemMessage("Be brief."), HumanMessage("What is the weather in Paris?")]


@tool
def get_weather(city: Literal["Paris", "Oslo", "Lima"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


class Place(BaseModel):
    """A place."""

    kind: Literal["city", "village"]
    residents: int = Field(ge=0, le=9999)


def check_invoke(chat: ChatOpenAI) -> None:
    found = chat.invoke(MESSAGES)
    assert found.usage_metadata is not None and found.usage_metadata["output_tokens"] > 0
    assert found.response_metadata["finish_reason"] in ("stop", "length")
    assert all(one.usage_metadata for one in chat.batch(["Hello.", "And you?"]))


def check_stream(chat: ChatOpenAI) -> None:
    whole = chat.invoke(MESSAGES)
    pieces = list(chat.stream(MESSAGES, stream_usage=True))
    assert "".join(str(one.content) for one in pieces) == whole.content
    total: Any = pieces[0]
    for piece in pieces[1:]:
        total += piece
    output_tokens = [one.usage_metadata["output_tokens"] for one in (total, whole)]
    assert output_tokens[0] == output_tokens[1] > 0


def check_tools(chat: ChatOpenAI) -> None:
    """The tool is called and its result goes back, as an agent does."""
    forced = chat.bind_tools([get_weather], tool_choice="any", strict=True)
    called = forced.invoke(MESSAGES)
    (call,) = called.tool_calls[:1]
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage) and "sunny" in result.content
    results = [get_weather.invoke(one) for one in called.tool_calls]
    free = chat.bind_tools([get_weather])
    assert free.invoke([*MESSAGES, called, *results]).response_metadata["finish_reason"]
    streamed: Any = None
    for piece in forced.stream(MESSAGES):
        streamed = piece if streamed is None else streamed + piece
    arguments = [[one["args"] for one in found.tool_calls] for found in (streamed, called)]
    assert arguments[0] == arguments[1]


def check_structured_output(chat: ChatOpenAI) -> None:
    for method in ("json_schema", "function_calling"):
        place = chat.with_structured_output(Place, method=method).invoke("Name a place.")
        assert isinstance(place, Place), (method, place)


def check_completion(base_url: str, model: str) -> None:
    llm = OpenAI(base_url=base_url, api_key="none", model=model, max_tokens=8, temperature=0)
    whole = llm.invoke("def read(path):")
    assert whole and "".join(llm.stream("def read(path):")) == whole


def check_responses(base_url: str, model: str) -> None:
    chat = ChatOpenAI(
        base_url=base_url, api_key="none", model=model, max_tokens=32, use_responses_api=True
    )
    assert chat.invoke(MESSAGES).usage_metadata
    assert list(chat.stream(MESSAGES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base_url", help="as in http://127.0.0.1:8000")
    options = parser.parse_args()
    base_url = options.base_url.rstrip("/") + "/v1"
    with urllib.request.urlopen(f"{base_url}/models") as response:
        model = json.load(response)["data"][0]["id"]
    chat = ChatOpenAI(
        base_url=base_url, api_key="none", model=model, max_tokens=128, temperature=0, max_retries=0
    )
    name = f"langchain-openai {version('langchain-openai')}"
    for check in (check_invoke, check_stream, check_tools, check_structured_output):
        check(chat)
        print(f"{name}: {check.__name__}", flush=True)
    for other in (check_completion, check_responses):
        other(base_url, model)
        print(f"{name}: {other.__name__}", flush=True)


if __name__ == "__main__":
    main()
