"""openai-python's chat and completions against a running server: `openai_chat.py BASE_URL`.

Shapes are checked, and what a grammar forces, not what a model says: any model with tools in its
template will do. Runs with the package `openai` alone, 2.x and 3.x.
"""

import argparse
import json
import re
import threading
import time
import urllib.request
from typing import Any, Literal

import openai
from pydantic import BaseModel, Field

CITIES = ["Paris", "Oslo", "Lima"]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": CITIES}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
ENDLESS: Any = {"ignore_eos": True}
MAX_STREAMS = 30  # that are opened to fill the server


class Place(BaseModel):
    kind: Literal["city", "village"]
    residents: int = Field(ge=0, le=9999)


def check_models(client: openai.OpenAI, model: str) -> None:
    assert client.models.retrieve(model).id == model
    try:
        client.models.retrieve("no-such-model")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found" and error.param == "model", error
    else:
        raise AssertionError("another model was found")


def check_chat(client: openai.OpenAI, model: str) -> None:
    parts = [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}]
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
    ]
    found = client.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=32, seed=1, temperature=0.5
    )
    assert found.object == "chat.completion" and found.choices[0].finish_reason in ENDS
    assert found.usage is not None and found.usage.completion_tokens > 0
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    again = client.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=32, seed=1, temperature=0.5
    )
    assert again.choices[0].message.content == found.choices[0].message.content


ENDS = ("stop", "length")


def check_stream(client: openai.OpenAI, model: str) -> None:
    """A stream says the same as a whole answer, and its last chunk has the figures of drafts."""
    common: Any = {"model": model, "messages": QUESTION, "max_tokens": 48}
    whole = client.chat.completions.create(**common)
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(**common, stream=True, stream_options=options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == (whole.choices[0].message.content or "")
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])
    last: Any = chunks[-1]
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.model_extra["metrics"]["speculative_decoding"]["num_spec_steps"] > 0
    with client.chat.completions.stream(**common) as stream:
        final = stream.until_done().current_completion_snapshot  # also of an answer that was cut
    assert final.choices[0].message.content == whole.choices[0].message.content


def check_stop(client: openai.OpenAI, model: str) -> None:
    common: Any = {"model": model, "prompt": "def read(path):", "max_tokens": 48}
    text = client.completions.create(**common).choices[0].text
    stop = text[len(text) // 2 :][:3]
    stopped = client.completions.create(**common, stop=[stop]).choices[0]
    assert stopped.text == text[: text.index(stop)] and stopped.finish_reason == "stop"


def check_disconnect(client: openai.OpenAI, model: str) -> None:
    """The server sees that a stream is closed, and ends its answer."""
    before = running(client)
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, stream=True, extra_body=ENDLESS
    )
    next(iter(stream))
    assert running(client) == before + 1
    stream.close()
    wait_for(lambda: running(client) == before, 5)


def check_tools(client: openai.OpenAI, model: str) -> None:
    """A call that is forced, its result, and the answer to it."""
    common: Any = {"model": model, "tools": [WEATHER], "max_tokens": 256}
    first = client.chat.completions.create(
        messages=QUESTION, tool_choice="required", parallel_tool_calls=False, **common
    )
    assert first.choices[0].finish_reason == "tool_calls", first
    message = first.choices[0].message
    calls: Any = message.tool_calls
    assert len(calls) == 1 and calls[0].function.name == "get_weather" and calls[0].id
    assert json.loads(calls[0].function.arguments)["city"] in CITIES
    result: Any = {"role": "tool", "tool_call_id": calls[0].id, "content": "sunny"}
    back: Any = message.model_dump(exclude_none=True)
    messages = [*QUESTION, back, result]
    second = client.chat.completions.create(messages=messages, tool_choice="none", **common)
    assert not second.choices[0].message.tool_calls


def check_streamed_tools(client: openai.OpenAI, model: str) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    with client.chat.completions.stream(
        model=model, messages=QUESTION, tools=[WEATHER], tool_choice=named, max_tokens=256
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    calls: Any = final.choices[0].message.tool_calls
    assert "tool_calls.function.arguments.done" in kinds, kinds
    assert calls[0].function.parsed_arguments["city"] in CITIES  # as the tool is strict


def check_allowed_tools(client: openai.OpenAI, model: str) -> None:
    """Text or a call, as the model likes: a call of a strict tool is held to its schema."""
    for tool in (WEATHER, {**WEATHER, "function": {**WEATHER["function"], "strict": False}}):
        found = client.chat.completions.create(
            model=model, messages=QUESTION, tools=[tool], max_tokens=64
        )
        assert found.choices[0].finish_reason in (*ENDS, "tool_calls")
        assert found.choices[0].message.content or found.choices[0].message.tool_calls


def check_parse(client: openai.OpenAI, model: str) -> None:
    found = client.chat.completions.parse(
        model=model, messages=QUESTION, response_format=Place, max_tokens=256
    )
    place = found.choices[0].message.parsed
    assert isinstance(place, Place) and 0 <= place.residents <= 9999, found


def check_logprobs(client: openai.OpenAI, model: str) -> None:
    found = client.chat.completions.create(
        model=model, messages=QUESTION, max_tokens=16, logprobs=True, top_logprobs=3
    )
    known = found.choices[0].logprobs
    assert known is not None and known.content and found.usage is not None
    for one in known.content:
        assert len(one.top_logprobs) == 3 and one.logprob == one.top_logprobs[0].logprob
    text = "".join(one.token for one in known.content)
    assert text.startswith((found.choices[0].message.content or "")[:4])


def check_completions(client: openai.OpenAI, model: str) -> None:
    """What evaluations send: token ids, echoed, with their log probabilities."""
    ids = [5, 6, 7, 8]
    found = client.completions.create(
        model=model, prompt=[ids, ids[:2]], echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    assert [one.index for one in found.choices] == [0, 1]
    for choice, num_tokens in zip(found.choices, (4, 2), strict=True):
        known = choice.logprobs
        assert known is not None and known.token_logprobs is not None
        assert len(known.token_logprobs) == num_tokens + 1 and known.token_logprobs[0] is None
        assert all(one is not None and one <= 0 for one in known.token_logprobs[1:])


def check_refusals(client: openai.OpenAI, model: str) -> None:
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"messages": QUESTION, "n": 2}, "n"),
        ({"messages": QUESTION, "temperature": -1}, "temperature"),
        ({"messages": image}, "messages[0].content[0].type"),
    ]
    for fields, param in refused:
        try:
            client.chat.completions.create(model=model, **fields)
        except openai.BadRequestError as error:
            assert error.param == param, error
        else:
            raise AssertionError(f"{param} was not refused")
    long: Any = [{"role": "user", "content": "far too long " * 20_000}]
    try:
        client.chat.completions.create(model=model, messages=long)
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded", error
    else:
        raise AssertionError("a prompt that is too long was not refused")


def check_retries(client: openai.OpenAI, model: str) -> None:
    """A server that is full says 503, and the library asks again until there is room."""
    streams: list[Any] = []
    opened = threading.Thread(target=fill, args=(client, model, streams))
    opened.start()
    wait_for(lambda: rejected(client) > 0, 20)
    opened.join()
    patient = client.with_options(max_retries=10)
    answers: list[Any] = []
    asked = threading.Thread(target=lambda: answers.append(ask_raw(patient, model)))
    before = rejected(client)
    asked.start()
    wait_for(lambda: rejected(client) > before, 20)
    for stream in streams:
        stream.close()
    asked.join(120)
    assert answers and answers[0].retries_taken > 0, answers
    assert answers[0].parse().choices[0].finish_reason in ENDS


def ask_raw(client: openai.OpenAI, model: str) -> Any:
    return client.chat.completions.with_raw_response.create(
        model=model, messages=QUESTION, max_tokens=4
    )


def fill(client: openai.OpenAI, model: str, streams: list[Any]) -> None:
    """Opens streams until one is refused. Their responses begin before they have an answer."""
    for _ in range(MAX_STREAMS):
        try:
            stream = client.chat.completions.create(
                model=model, messages=QUESTION, stream=True, extra_body=ENDLESS
            )
        except openai.InternalServerError as error:
            assert error.status_code == 503 and error.code == "queue_full", error
            assert int(error.response.headers["retry-after"]) > 0
            return
        streams.append(stream)
    raise AssertionError(f"{MAX_STREAMS} streams were taken")


def running(client: openai.OpenAI) -> float:
    return counted(client, "num_requests_running") + counted(client, "num_requests_waiting")


def rejected(client: openai.OpenAI) -> float:
    return counted(client, "rejected_total")


def counted(client: openai.OpenAI, name: str) -> float:
    url = str(client.base_url).removesuffix("/").removesuffix("/v1") + "/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    return sum(float(one) for one in re.findall(rf"^subspec:{name}(?:{{.*}})? (\S+)$", text, re.M))


def wait_for(holds: Any, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base_url", help="as in http://127.0.0.1:8000")
    options = parser.parse_args()
    client = openai.OpenAI(
        base_url=options.base_url.rstrip("/") + "/v1", api_key="none", max_retries=0
    )
    model = client.models.list().data[0].id
    for check in (
        check_models,
        check_chat,
        check_stream,
        check_stop,
        check_disconnect,
        check_tools,
        check_streamed_tools,
        check_allowed_tools,
        check_parse,
        check_logprobs,
        check_completions,
        check_refusals,
        check_retries,
    ):
        check(client, model)
        print(f"openai {openai.__version__}: {check.__name__}", flush=True)


if __name__ == "__main__":
    main()
