"""/v1/chat/completions on the wire: what goes in, what comes out, what is refused."""

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from scripted_generator import Script
from served import SCRIPTED_DEPTH, Client, Response, Served, ask, model_of, serve

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.planner.model.hub import DEMO
from subspec.runtime.lossy import Lossy
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import Stats
from subspec.runtime.server import streaming
from subspec.runtime.server.chat_events import (
    NamedTool,
    OutputFormat,
    ReasoningDelta,
    ToolCallDelta,
    ToolCallStart,
)
from subspec.runtime.server.generation import Outcome, Piece, QueueFull
from subspec.runtime.server.metrics import Metrics
from subspec.runtime.server.response_metrics import metrics as metrics_of
from subspec.runtime.server.response_metrics import speculative_decoding
from subspec.runtime.text.tokenizer import load_tokenizer

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object"}, "strict": True},
}


def chat(served: Served, **fields: Any) -> Response:
    return ask(served.app, PATH, {"messages": HI, **fields})


def without_clock(value: Any) -> Any:
    """With what differs from run to run replaced."""
    if isinstance(value, dict):
        return {
            key: 0 if key == "created" else key if key == "id" else without_clock(one)
            for key, one in value.items()
        }
    return [without_clock(one) for one in value] if isinstance(value, list) else value


def test_a_whole_answer_is_openais_object_with_figures() -> None:
    found = chat(serve(Script("Hello", largest_round=2)))
    assert found.status == 200
    body = without_clock(found.json)
    assert body.pop("metrics")["speculative_decoding"]["num_spec_tokens"] == 5
    assert body.pop("timings")["predicted_n"] == body["usage"]["completion_tokens"]
    usage = body.pop("usage")
    assert body == {
        "id": "id",
        "object": "chat.completion",
        "created": 0,
        "model": "org/model",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
    }
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert set(usage["completion_tokens_details"]) == {
        "reasoning_tokens", "accepted_prediction_tokens",
    }  # fmt: skip


def test_a_stream_has_a_role_the_text_a_reason_the_usage_and_done() -> None:
    found = chat(serve("Hello"), stream=True, stream_options={"include_usage": True})
    assert found.headers["content-type"].startswith("text/event-stream")
    assert found.events[-1] == "[DONE]"
    chunks = [without_clock(one) for one in found.chunks]
    head = {
        "id": "id", "object": "chat.completion.chunk", "created": 0, "model": "org/model",
    }  # fmt: skip

    def chunk(delta: Any, reason: str | None = None) -> Any:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**head, "choices": [choice]}

    assert chunks[0] == chunk({"role": "assistant", "content": ""})
    ended = chunks[-2]
    assert ended.pop("timings")["predicted_n"] > 0
    assert ended == chunk({}, "stop")
    last = chunks[-1]
    assert last["choices"] == [] and set(last) == {*head, "choices", "usage", "metrics", "timings"}
    assert "".join(one["choices"][0]["delta"]["content"] for one in chunks[1:-2]) == "Hello"


def test_every_chunk_may_have_the_tokens_so_far() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = chat(serve("one two three four five"), stream=True, stream_options=options)
    *chunks, last = found.chunks
    counts = [one["usage"]["completion_tokens"] for one in chunks]
    assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"] > 0
    assert all(one["usage"]["prompt_tokens"] == 3 for one in chunks)


def test_without_include_usage_no_chunk_has_it() -> None:
    found = chat(serve("Hello"), stream=True)
    assert all("usage" not in one and one["choices"] for one in found.chunks)


def test_streamed_or_not_the_text_is_the_same() -> None:
    text = "def add(a, b):\n    return a + b  # naïve 🙂\n"
    streamed = chat(serve(text), stream=True)
    whole = chat(serve(text)).json["choices"][0]["message"]["content"]
    deltas = [one["choices"][0]["delta"] for one in streamed.chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == whole == text


def test_the_metrics_keep_what_aiperf_checks() -> None:
    found = chat(serve(Script("def add(a, b): return a + b", largest_round=4))).json
    shown = found["metrics"]["speculative_decoding"]
    histogram = shown["acceptance_histogram"]
    assert len(histogram) == shown["num_spec_tokens"] + 1
    assert all(type(count) is int for count in histogram)
    assert sum(histogram) == shown["num_spec_steps"]
    accepted = sum(j * count for j, count in enumerate(histogram))
    assert accepted == shown["num_accepted_draft_tokens"] > 0
    by_length = shown["acceptance_histogram_by_draft_length"]
    assert all(len(counts) == int(length) + 1 for length, counts in by_length.items())
    steps = shown["num_spec_steps"]
    assert shown["mean_acceptance_length"] == 1 + accepted / steps
    assert found["timings"]["draft_n_accepted"] == accepted
    details = found["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == accepted


def test_rounds_deeper_than_the_plans_own_tree_are_counted_too() -> None:
    """What is drafted in a batch may be narrower and deeper."""
    deep = SCRIPTED_DEPTH + 3
    stats = Stats("substitute", drafted=(deep, 2), drafted_tokens=deep + 2, accepted=(deep, 0))
    outcome = Outcome("eos", None, stats, 0.0, 1.0, None)
    shown = speculative_decoding(outcome, model_of(load_tokenizer(DEMO)))
    assert shown is not None
    assert shown["acceptance_histogram"] == [1, *[0] * (deep - 1), 1]
    assert shown["draft_acceptance_rate"] == deep / (deep + 2)
    metrics = Metrics("m", SCRIPTED_DEPTH, None)
    metrics.answered(outcome, 0.5, 1.0)
    assert f'position="{deep - 1}"}} 1.0'.encode() in metrics.text()


def test_figures_say_by_which_rule_an_answer_was_verified() -> None:
    model = model_of(load_tokenizer(DEMO))
    stats = Stats("substitute", drafted=(2,), drafted_tokens=2, accepted=(2,), lossy_tokens=1)
    exact = Outcome("eos", None, stats, 0.0, 1.0, None)
    assert metrics_of(exact, model)["subspec"]["verify"] == "exact"
    told = metrics_of(replace(exact, lossy=Lossy()), model)["subspec"]
    assert (told["verify"], told["lossy_tokens"]) == ("lossy", 1)
    assert told["lossy"] == {"threshold_method": "entropy", "threshold": 0.3, "window": 6}


def test_thinking_and_tool_calls_have_their_own_fields() -> None:
    events = [
        ReasoningDelta("Hm."),
        ToolCallStart(0, "call_1", "look"),
        ToolCallDelta(0, '{"a":'),
        ToolCallDelta(0, "1}"),
        ToolCallStart(1, "call_2", "look"),
        ToolCallDelta(1, "{}"),
    ]
    whole = chat(serve("", events=events), tools=[TOOL]).json["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "Hm.",
        "tool_calls": [
            {"id": "call_1", "type": "function",
             "function": {"name": "look", "arguments": '{"a":1}'}},
            {"id": "call_2", "type": "function", "function": {"name": "look", "arguments": "{}"}},
        ],
    }  # fmt: skip
    streamed = chat(serve("", events=events), tools=[TOOL], stream=True)
    deltas = [one["choices"][0]["delta"] for one in streamed.chunks]
    assert {"reasoning_content": "Hm."} in deltas
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0] == {
        "index": 0, "id": "call_1", "type": "function",
        "function": {"name": "look", "arguments": ""},
    }  # fmt: skip
    assert calls[1] == {"index": 0, "function": {"arguments": '{"a":'}}
    assert [one["index"] for one in calls] == [0, 0, 0, 1, 1]


def test_log_probabilities_have_text_and_bytes() -> None:
    whole = chat(serve("Hi é"), logprobs=True, top_logprobs=2).json["choices"][0]
    content = whole["logprobs"]["content"]
    assert all(set(one) == {"token", "logprob", "bytes", "top_logprobs"} for one in content)
    assert all(len(one["top_logprobs"]) == 2 for one in content)
    said = bytes(byte for one in content[:-1] for byte in one["bytes"])  # the last ends the answer
    assert said.decode() == "Hi é"
    streamed = chat(serve("Hi é"), logprobs=True, top_logprobs=2, stream=True)
    pieces = [one["choices"][0]["logprobs"] for one in streamed.chunks]
    assert [entry for one in pieces if one for entry in one["content"]] == content


def test_every_field_reaches_the_engine_side() -> None:
    served = serve()
    found = chat(
        served, model="model", temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=3,
        repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=-0.3,
        logit_bias={"5": -100}, stop="x", max_tokens=9, max_completion_tokens=8, logprobs=True,
        top_logprobs=4, tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "look"}},
        parallel_tool_calls=False, reasoning_effort="minimal", ignore_eos=True,
        chat_template_kwargs={"enable_thinking": True},
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"a": 1}}},
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "seen"},
        ],
    )  # fmt: skip
    assert found.status == 200, found.body
    (asked,) = served.chats
    assert asked.sampling == SamplingParams(0.5, 7, 0.9, 3, 0.1, 1.1, 0.2, -0.3, ((5, -100.0),))
    assert asked.max_tokens == 8 and asked.stop == ("x",) and asked.logprobs == 4
    assert asked.tools == (TOOL,) and asked.tool_choice == NamedTool("look")
    assert not asked.parallel_tool_calls and asked.ignore_end
    assert asked.output_format == OutputFormat("json_schema", {"a": 1})
    assert asked.reasoning_effort == "low" and asked.enable_thinking is True
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    assert asked.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "content": "seen", "tool_call_id": "c"},
    )


def test_messages_have_the_shape_that_templates_take() -> None:
    """As those of /v1/responses and /v1/messages have."""
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    served = serve()
    found = chat(
        served, tools=[TOOL],
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": "a"},
            {"role": "user", "content": "b"},
            {"role": "system", "content": "It is late."},
            {"role": "assistant", "content": "Let me look."},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "name": "look", "content": ""},
            {"role": "user", "content": ""},
        ],
    )  # fmt: skip
    assert found.status == 200, found.body
    assert served.chats[0].messages == (
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "a\n\nb\n\nIt is late."},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "name": "look", "content": ""},
    )
    empty = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": ""})
    assert chat(served, messages=[*empty]).status == 200
    assert served.chats[1].messages == empty


def test_null_is_the_same_as_leaving_a_field_out_also_within_messages() -> None:
    served = serve()
    call = {"id": None, "type": None, "function": {"name": "look", "arguments": None}}
    part = {"type": "text", "text": "a", "refusal": None, "cache_control": None}
    found = chat(
        served, temperature=None, stop=None, tools=[TOOL], tool_choice=None, stream_options=None,
        messages=[
            {"role": "user", "content": [part], "name": None, "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": None, "content": "seen"},
        ],
    )  # fmt: skip
    assert found.status == 200, found.body
    (asked,) = served.chats
    filled = {"id": "", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    assert asked.messages[1] == {"role": "assistant", "content": None, "tool_calls": [filled]}


def test_what_a_request_does_not_say_is_the_servers_and_its_seed_is_another_one_each_time() -> None:
    served = serve("a", sampling=SamplingParams(0.7, 20, 0.8))
    for _ in range(2):
        assert chat(served).status == 200
    first, second = (one.sampling for one in served.chats)
    assert (first.temperature, first.top_k, first.top_p) == (0.7, 20, 0.8)
    assert first.seed != second.seed
    assert served.chats[0].max_tokens is None
    assert serve().service.sampling.temperature == 0


@pytest.mark.parametrize(
    ("effort", "passed", "thinking"),
    [("none", None, False), ("xhigh", "xhigh", None), ("MAX", "xhigh", None), ("odd", None, None)],
)
def test_an_unknown_effort_is_never_refused(effort: str, passed: str, thinking: bool) -> None:
    served = serve()
    assert chat(served, reasoning_effort=effort).status == 200
    (asked,) = served.chats
    assert (asked.reasoning_effort, asked.enable_thinking) == (passed, thinking)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, OutputFormat("json_object")),
        (
            {"response_format": {"type": "json_object", "schema": {}}},
            OutputFormat("json_schema", {}),
        ),
        ({"structured_outputs": {"regex": "a+"}}, OutputFormat("regex", "a+")),
        ({"structured_outputs": {"grammar": "start: A"}}, OutputFormat("lark", "start: A")),
        ({"structured_outputs": {"json": {}}}, OutputFormat("json_schema", {})),
    ],
)
def test_each_form_of_structured_output_is_understood(
    form: dict[str, Any], expected: OutputFormat | None
) -> None:
    served = serve()
    assert chat(served, **form).status == 200
    assert served.chats[0].output_format == expected


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 2}, "n", "unsupported_value"),
    ({"best_of": 3}, "best_of", "unsupported_value"),
    ({"functions": [{}]}, "functions", "unsupported_value"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_value"),
    ({"chat_template": "{{ x }}"}, "chat_template", "unsupported_value"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "unsupported_value"),
    ({"grammar": "root ::= x"}, "grammar", "unsupported_value"),
    ({"temperature": False}, "temperature", "invalid_value"),
    ({"temperature": -1}, "temperature", "invalid_value"),
    ({"temperature": "1"}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_k": 1.5}, "top_k", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1 << 63}, "max_tokens", "invalid_value"),
    ({"seed": 1 << 64}, "seed", "invalid_value"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["x"] * 17}, "stop", "invalid_value"),
    ({"stop": "x" * 257}, "stop", "invalid_value"),
    ({"logit_bias": {"-1": 0}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"99999999": 0}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {str(n): 0 for n in range(1025)}}, "logit_bias", "invalid_value"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tools": [TOOL, TOOL]}, "tools", "invalid_value"),
    ({"tools": [TOOL] * 300}, "tools", "invalid_value"),
    ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type", "invalid_value"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "no"}}},
        "tool_choice",
        "invalid_value",
    ),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema",
     "invalid_value"),
    ({"structured_outputs": {}}, "structured_outputs", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content", "invalid_value"),
    (
        {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
        "messages[0].content[0].type",
        "unsupported_value",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "code"), REFUSED)
def test_what_cannot_be_honoured_is_a_400_that_names_the_field(
    fields: dict[str, Any], param: str, code: str
) -> None:
    served = serve()
    found = chat(served, **fields)
    assert found.status == 400 and not served.engine.requests
    assert found.headers["x-should-retry"] == "false"
    assert found.error["param"].startswith(param) and found.error["code"] == code
    assert found.error["type"] == "invalid_request_error"
    assert 10 < len(found.error["message"]) < 500


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages is a list of 0, expected at least 1 item"),
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"top_p": 2}, "top_p is 2, expected at most 1"),
        ({"temperature": "1"}, "temperature is '1', expected a valid number"),
    ],
)
def test_what_is_wrong_with_a_value_is_one_sentence(fields: dict[str, Any], message: str) -> None:
    found = chat(serve(), **fields)
    assert found.status == 400 and found.error["message"] == message


def test_a_missing_field_is_named() -> None:
    found = ask(serve().app, PATH, {"model": "model"})
    assert found.error["param"] == "messages"
    assert found.error["code"] == "missing_required_parameter"


def test_unknown_fields_are_ignored_unless_the_server_is_strict() -> None:
    assert chat(serve(), some_new_field={"a": 1}).status == 200
    found = chat(serve(refuse_unknown=True), some_new_field=1)
    assert (found.status, found.error["param"]) == (400, "some_new_field")


def test_an_unknown_model_is_not_found() -> None:
    served = serve()
    for name in ("org/model", "model", None):
        assert chat(served, model=name).status == 200
    found = chat(served, model="gpt-4\x1b[2J")
    assert found.status == 404 and found.error["code"] == "model_not_found"
    assert found.error["param"] == "model" and "\x1b" not in found.error["message"]


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers_before_it_waits() -> None:
    served = serve()
    found = chat(served, messages=[{"role": "user", "content": "word " * 2000}])
    assert found.status == 400 and found.error["code"] == "context_length_exceeded"
    assert "512" in found.error["message"]
    assert not served.engine.requests


def test_a_full_queue_is_503_with_when_to_come_back() -> None:
    served = serve()
    served.engine.full = QueueFull(8, 17)
    found = chat(served)
    assert found.status == 503
    assert found.headers["retry-after"] == "17" and found.headers["x-queue-depth"] == "8"
    assert "x-should-retry" not in found.headers
    assert found.json == {
        "error": {
            "message": "8 requests are waiting: the queue is full",
            "type": "overloaded_error",
            "param": None,
            "code": "queue_full",
        }
    }
    assert b'subspec:rejected_total{model_name="org/model",reason="queue_full"} 1.0' in (
        served.service.metrics.text()
    )


def test_an_engine_that_fails_in_the_middle_ends_the_stream_with_an_error() -> None:
    failure = SubspecError(Exit.RESOURCES, "the GPU ran out of memory", "use less")
    found = chat(serve(Script("Hello", ends=False, error=failure)), stream=True)
    assert found.status == 200
    assert json.loads(found.events[-1]) == {
        "error": {
            "message": "the GPU ran out of memory (use less)",
            "type": "server_error",
            "param": None,
            "code": "engine_error",
        }
    }
    whole = chat(serve(Script("Hello", ends=False, error=failure)))
    assert whole.status == 500 and whole.error["code"] == "engine_error"


def test_a_grammar_that_cannot_be_followed_further_is_the_clients_error() -> None:
    failure = SubspecError(Exit.USAGE, "the grammar takes too long to follow", "make it simpler")
    found = chat(serve(Script("Hello", ends=False, error=failure)))
    assert found.status == 400 and found.error["code"] == "invalid_value"
    streamed = chat(serve(Script("Hello", ends=False, error=failure)), stream=True)
    assert json.loads(streamed.events[-1])["error"]["code"] == "invalid_value"


def test_the_place_in_the_queue_and_signs_of_life_are_comments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.02)
    served = serve(Script("Hello", largest_round=50, pause_seconds=0.1))

    async def slow() -> Response:
        client = Client("POST", PATH, [json.dumps({"messages": HI, "stream": True}).encode()])
        task = asyncio.create_task(client.run(served.app))
        while not served.engine.generations:
            await asyncio.sleep(0.001)
        served.engine.generations[0].queue_position = 3
        await asyncio.sleep(0.05)
        served.engine.generations[0].queue_position = 0
        return await task

    found = asyncio.run(slow())
    assert ": waiting, position 3" in found.events and ": ping" in found.events
    assert found.events[-1] == "[DONE]"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after_the_first_token", [True, False])
def test_an_answer_ends_when_its_client_goes(stream: bool, after_the_first_token: bool) -> None:
    pause = 0.2 if after_the_first_token else 60.0
    served = serve(Script("word " * 400, largest_round=1, pause_seconds=pause))

    async def leave() -> None:
        body = json.dumps({"messages": HI, "stream": stream}).encode()
        client = Client("POST", PATH, [body])
        task = asyncio.create_task(client.run(served.app))
        while not served.engine.generations:
            await asyncio.sleep(0.001)
        if after_the_first_token:
            while not served.engine.generations[0].token_ids:
                await asyncio.sleep(0.001)
        client.gone.set()
        await asyncio.wait_for(task, 30)

    asyncio.run(leave())
    assert served.engine.generations[0].cancelled
    said = served.service.metrics.text().decode()
    assert 'request_success_total{finished_reason="abort",model_name="org/model"} 1.0' in said


class Waiting:
    """A Generation that waits in the queue, and ends as soon as it is cancelled."""

    queue_position = 1

    def __init__(self) -> None:
        self._cancelled = asyncio.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        await self._cancelled.wait()
        return
        yield


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_the_queue_is_no_error_in_the_log(
    stream: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    monkeypatch.setattr(served.engine, "submit", lambda request: Waiting())

    async def leave() -> None:
        client = Client("POST", PATH, [json.dumps({"messages": HI, "stream": stream}).encode()])
        task = asyncio.create_task(client.run(served.app))
        await asyncio.sleep(0.05)
        client.gone.set()
        await asyncio.wait_for(task, 30)
        gc.collect()  # asyncio tells of errors that nobody asks for when they are forgotten

    asyncio.run(leave())
    assert not caplog.records and not served.service.engine.num_live


def test_while_weights_load_a_request_is_told_to_come_back() -> None:
    served = serve()
    served.engine.status = served.engine.status.__class__("loading", "weights", 0.5)
    found = chat(served)
    assert found.status == 503 and found.headers["retry-after"] == "5"
    assert found.error["message"] == "Loading model"
