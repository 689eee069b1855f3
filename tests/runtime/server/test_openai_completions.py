"""/v1/completions, /tokenize, /detokenize, /v1/models and /props on the wire."""

import asyncio
import json
import threading
from typing import Any

import pytest
from scripted_generator import Script
from served import Client, Response, Served, ask, serve

from subspec.planner.model.hub import DEMO
from subspec.runtime.lossy import Lossy
from subspec.runtime.server import openai_completions
from subspec.runtime.server.generation import Generation, GenerationRequest, QueueFull
from subspec.runtime.server.openai_models import text_of
from subspec.runtime.text.tokenizer import load_tokenizer

PATH = "/v1/completions"


def complete(served: Served, prompt: Any = "Hi", **fields: Any) -> Response:
    return ask(served.app, PATH, {"prompt": prompt, **fields})


def test_a_completion_continues_the_prompt_as_it_is() -> None:
    served = serve(" world")
    found = complete(served, "Hello", max_tokens=50)
    assert found.status == 200
    body = found.json
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert body["choices"] == [
        {"index": 0, "text": " world", "logprobs": None, "finish_reason": "stop"}
    ]
    assert {"usage", "metrics", "timings"} <= set(body)
    (asked,) = served.engine.requests
    assert list(asked.prompt_ids) == served.service.tokenizer.plain_ids("Hello")
    assert asked.params.max_tokens == 50


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]]])
def test_token_ids_are_a_prompt(prompt: list[Any]) -> None:
    served = serve("x")
    assert complete(served, prompt).status == 200
    assert served.engine.requests[0].prompt_ids == (5, 6, 7)


def test_several_prompts_have_an_answer_each_in_their_order() -> None:
    served = serve(Script("one", pause_seconds=0.05), "two", "three")
    body = complete(served, ["a b", "c", "d"]).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["text"] for choice in body["choices"]} == {"one", "two", "three"}
    assert body["choices"][0]["text"] == "one"
    prompts = [request.prompt_ids for request in served.engine.requests]
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert "metrics" not in body


@pytest.mark.parametrize(("seed", "count"), [(None, 3), (-1, 3), (7, 1)])
def test_prompts_of_a_request_have_seeds_of_their_own_unless_it_names_one(
    seed: int | None, count: int
) -> None:
    """Three times one prompt is how three samples are asked for."""
    served = serve("x")
    complete(served, ["a b"] * 3, temperature=1.0, **({} if seed is None else {"seed": seed}))
    assert len({request.params.sampling.seed for request in served.engine.requests}) == count


def test_later_prompts_of_a_request_wait_while_the_queue_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = serve("x")
    submit, refusals = served.engine.submit, [QueueFull(8, 1), QueueFull(8, 1)]

    def full_twice(request: GenerationRequest) -> Generation:
        if served.engine.requests and refusals:
            raise refusals.pop()
        return submit(request)

    monkeypatch.setattr(served.engine, "submit", full_twice)
    assert len(complete(served, ["a", "b"]).json["choices"]) == 2 and not refusals


def test_what_lm_eval_sends_gets_the_log_probabilities_of_the_prompt() -> None:
    """echo, logprobs and one token: choices are compared by the prompt's tokens."""
    served = serve("x")
    found = complete(served, [[5, 6, 7]], echo=True, logprobs=1, max_tokens=1, temperature=0)
    (asked,) = served.engine.requests
    assert asked.params.prompt_logprobs == 1 and asked.params.logprobs == 1
    shown = found.json["choices"][0]["logprobs"]
    assert set(shown) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    # This engine knows nothing of the prompt: its first token and the answer's are there.
    assert shown["token_logprobs"][0] is None and shown["top_logprobs"][0] is None
    assert shown["token_logprobs"][-1] == -0.25
    text = found.json["choices"][0]["text"]
    assert text.startswith(served.service.tokenizer.tokenizer.decode([5, 6, 7]))


def test_log_probabilities_are_told_in_a_thread_for_which_the_event_loop_need_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, threads = openai_completions.completion_logprobs, list[threading.Thread]()

    def watched(*given: Any) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return told(*given)

    monkeypatch.setattr(openai_completions, "completion_logprobs", watched)
    assert complete(serve("x"), "Hello", echo=True, logprobs=20, max_tokens=0).status == 200
    assert threads and threading.current_thread() not in threads


def test_an_echo_without_an_answer_is_the_prompt_alone() -> None:
    found = complete(serve("x"), "Hello", echo=True, max_tokens=0).json
    assert found["choices"][0]["text"] == "Hello"
    assert found["usage"]["completion_tokens"] == 0
    assert complete(serve(), max_tokens=0).error["param"] == "max_tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_not_shown_ends_for_its_length_whatever_it_would_have_said(
    stream: bool,
) -> None:
    found = complete(serve("x"), "Hello", echo=True, max_tokens=0, stop="x", stream=stream)
    ends = [body["choices"][0] for body in (found.chunks if stream else [found.json])]
    assert ends[-1]["finish_reason"] == "length"
    assert "".join(end["text"] for end in ends) == "Hello"


@pytest.mark.parametrize("echo", [True, False])
def test_a_streamed_completion_is_the_same_text(echo: bool) -> None:
    text = "def add(a, b):  # naïve 🙂"
    whole = complete(serve(text), "Hi ", echo=echo, logprobs=2).json
    found = complete(
        serve(text), "Hi ", echo=echo, logprobs=2, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert found.events[-1] == "[DONE]"
    chunks = found.chunks
    choices = [one["choices"][0] for one in chunks[:-1]]
    assert "".join(one["text"] for one in choices) == whole["choices"][0]["text"]
    assert choices[-1]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert "speculative_decoding" in chunks[-1]["metrics"]


def test_streamed_prompts_say_which_they_are() -> None:
    found = complete(serve("one", "two"), ["a", "b"], stream=True)
    texts = {0: "", 1: ""}
    for chunk in found.chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "one", 1: "two"}


def test_a_stop_text_ends_the_text_before_it() -> None:
    found = complete(serve("one two three"), stop=["two"]).json["choices"][0]
    assert found["text"] == "one " and found["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"n": 2}, "n"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["x"] * 257}, "prompt"),
        ({"prompt": ["a", [5]]}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(fields: dict[str, Any], param: str) -> None:
    served = serve()
    found = complete(served, **fields)
    assert found.status == 400 and not served.engine.requests
    assert found.error["param"] is not None
    assert found.error["param"].partition("[")[0] == param


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    found = complete(serve(), [999999])
    assert found.status == 400 and "999999" not in found.error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "code"), [([5] * 600, "context_length_exceeded"), ([5, 999_999], "invalid_value")]
)
def test_a_later_prompt_that_is_never_taken_is_refused_before_another_one_is_answered(
    prompt: list[int], code: str, stream: bool
) -> None:
    served = serve("x")
    refused = complete(served, [[5, 6], prompt], stream=stream)
    assert refused.status == 400 and refused.error["code"] == code
    assert not served.engine.requests


def test_several_answers_end_when_their_client_goes() -> None:
    served = serve(Script("word " * 100, largest_round=1, pause_seconds=60))

    async def leave() -> None:
        client = Client("POST", PATH, [json.dumps({"prompt": ["a", "b", "c"]}).encode()])
        task = asyncio.create_task(client.run(served.app))
        while len(served.engine.generations) < 2:
            await asyncio.sleep(0.001)
        client.gone.set()
        await asyncio.wait_for(task, 30)

    asyncio.run(leave())
    assert len(served.engine.generations) == 2  # the third had not had its turn
    assert all(one.cancelled for one in served.engine.generations)


# Tokens


def test_llama_cpps_form_adds_special_tokens_if_asked_and_vllms_unless_told_not_to() -> None:
    served = serve()
    tokenizer = served.service.tokenizer
    bare = tokenizer.tokenizer.encode("Hi there", add_special_tokens=False).ids
    full = tokenizer.plain_ids("Hi there")
    for fields, expected in (
        ({"content": "Hi there"}, bare),
        ({"content": "Hi there", "add_special": True}, full),
        ({"prompt": "Hi there"}, full),
        ({"prompt": "Hi there", "add_special_tokens": False}, bare),
    ):
        found = ask(served.app, "/tokenize", fields).json
        assert found["tokens"] == expected and found["count"] == len(expected)
        assert found["max_model_len"] == 512
    pieces = ask(served.app, "/tokenize", {"content": "Hi", "with_pieces": True}).json["tokens"]
    assert "".join(one["piece"] for one in pieces) == "Hi"
    assert ask(served.app, "/tokenize", {}).error["param"] == "content"


def test_other_threads_run_while_a_million_tokens_become_text() -> None:
    num_turns, ended = 0, threading.Event()

    def count() -> None:
        nonlocal num_turns
        while not ended.wait(0.001):
            num_turns += 1

    counting = threading.Thread(target=count)
    counting.start()
    before = num_turns
    text = text_of(load_tokenizer(DEMO).tokenizer, [300] * 1_000_000)
    after = num_turns
    ended.set()
    counting.join()
    assert text and after - before > 10


def test_tokens_become_their_text_again() -> None:
    served = serve()
    ids = ask(served.app, "/tokenize", {"content": "Hi é 🙂"}).json["tokens"]
    found = ask(served.app, "/detokenize", {"tokens": ids}).json
    assert found == {"content": "Hi é 🙂", "prompt": "Hi é 🙂"}
    for wrong in ([999999], [-1], ["a"], "x"):
        assert ask(served.app, "/detokenize", {"tokens": wrong}).status == 400


# The model


def test_the_context_is_there_in_every_spelling() -> None:
    served = serve()
    listed = ask(served.app, "/v1/models").json
    (card,) = listed["data"]
    assert card["id"] == "org/model" and card["object"] == "model" and card["owned_by"]
    assert card["meta"]["n_ctx"] == card["max_model_len"] == card["context_length"] == 512
    assert listed["models"][0]["name"] == "org/model"
    assert ask(served.app, "/v1/models/org/model").json == card
    assert ask(served.app, "/v1/models/model").json == card
    missing = ask(served.app, "/v1/models/gpt-4")
    assert missing.status == 404 and missing.error["code"] == "model_not_found"


def test_props_have_what_clients_branch_on_and_no_path() -> None:
    found = ask(serve().app, "/props").json
    assert found["default_generation_settings"]["n_ctx"] == 512
    assert found["default_generation_settings"]["params"]["temperature"] == 0
    assert found["total_slots"] == 2 and found["model_path"] == "org/model"
    assert found["chat_template"] and found["chat_template_caps"] == {}
    assert found["memory"] == {"budget_bytes": 50, "peak_bytes": 7}


def test_a_lossy_server_says_so_in_its_props_and_in_every_response() -> None:
    usual, lossy = serve("Hello").app, serve("Hello", lossy=Lossy("prob", 0.2, 3)).app
    asked = {"prompt": "x", "max_tokens": 4}
    for app, rule in ((usual, None), (lossy, "lossy (prob 0.2, window 3)")):
        for path, body in (("/props", None), ("/nothing", None), (PATH, asked)):
            response = ask(app, path, body)
            assert response.headers.get("x-subspec-verify") == rule
    told = ask(lossy, "/props").json["subspec"]
    assert told["verify"] == "lossy"
    assert told["lossy"] == {"threshold_method": "prob", "threshold": 0.2, "window": 3}
    told = ask(usual, "/props").json["subspec"]
    assert told["verify"] == "exact" and told["lossy"] is None


def test_the_api_is_described() -> None:
    found = ask(serve().app, "/openapi.json").json
    place = found["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    assert place["application/json"]["schema"]["$ref"] == "#/components/schemas/ChatFields"
    assert "messages" in found["components"]["schemas"]["ChatFields"]["properties"]
    assert "Message" in found["components"]["schemas"]
    (parameter,) = found["paths"]["/v1/models/{model}"]["get"]["parameters"]
    assert parameter["name"] == "model"


def test_texts_of_very_many_tokens_are_not_told_one_by_one() -> None:
    """It would take the server minutes."""
    app = serve().app
    long = "a b " * 50_000
    found = ask(app, "/tokenize", {"content": long})
    assert found.status == 200 and found.json["count"] > 65536
    for field in ("with_pieces", "return_token_strs"):
        refused = ask(app, "/tokenize", {"content": long, field: True})
        assert refused.status == 400 and refused.error["param"] == field
    endless = ask(app, "/tokenize", {"prompt": "a b " * 500_000})
    assert endless.status == 400 and endless.error["param"] == "prompt"
    prompt = ask(app, "/v1/completions", {"prompt": long})
    assert prompt.error["code"] == "context_length_exceeded"
    assert prompt.error["param"] == "prompt"
    assert "more than 512" in prompt.error["message"]
