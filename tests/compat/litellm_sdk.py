"""LiteLLM's SDK and Router against a running server: `litellm_sdk.py BASE_URL`.

LITELLM_LOCAL_MODEL_COST_MAP=True keeps it from asking the network for prices.
"""

import argparse
import json
from importlib.metadata import version
from typing import Any

import litellm
from openai_chat import CITIES, QUESTION, WEATHER

DEAD = "http://127.0.0.1:9/v1"  # nobody listens at the discard port


def check_completion(base: dict[str, Any]) -> None:
    found: Any = litellm.completion(messages=QUESTION, max_tokens=16, **base)
    assert found.choices[0].finish_reason in ("stop", "length") and found.usage.total_tokens > 0
    pieces: Any = litellm.completion(
        messages=QUESTION,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
        **base,
    )
    chunks = list(pieces)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == (found.choices[0].message.content or "")
    assert chunks[-1].usage.completion_tokens == found.usage.completion_tokens


def check_tools(base: dict[str, Any]) -> None:
    found: Any = litellm.completion(
        messages=QUESTION, tools=[WEATHER], tool_choice="required", max_tokens=256, **base
    )
    (call,) = found.choices[0].message.tool_calls[:1]
    assert json.loads(call.function.arguments)["city"] in CITIES
    pieces: Any = litellm.completion(
        messages=QUESTION, tools=[WEATHER], tool_choice="required", max_tokens=256, stream=True,
        **base,
    )  # fmt: skip
    whole: Any = litellm.stream_chunk_builder(list(pieces))
    assert whole.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


def check_text_completion(base: dict[str, Any]) -> None:
    other = {**base, "model": base["model"].replace("openai/", "text-completion-openai/", 1)}
    found: Any = litellm.text_completion(prompt="def read(path):", max_tokens=8, **other)
    assert found.choices[0].text


def check_errors(base: dict[str, Any]) -> None:
    long: Any = [{"role": "user", "content": "far too long " * 20_000}]
    try:
        litellm.completion(messages=long, **base)
    except litellm.ContextWindowExceededError:
        pass
    else:
        raise AssertionError("a prompt that is too long was not refused")
    try:
        litellm.completion(messages=QUESTION, **{**base, "model": "openai/no-such-model"})
    except litellm.NotFoundError:
        pass
    else:
        raise AssertionError("another model was not refused")


def check_dialects(base: dict[str, Any]) -> None:
    """Responses, and Anthropic's messages, as LiteLLM sends them on."""
    found: Any = litellm.responses(input="Say hello.", max_output_tokens=16, **base)
    assert found.status in ("completed", "incomplete") and found.usage.output_tokens > 0
    claude = base["api_base"].removesuffix("/v1")
    said: Any = litellm.completion(
        model="anthropic/claude-of-any-version", messages=QUESTION, max_tokens=16,
        api_base=claude, api_key="none",
    )  # fmt: skip
    assert said.choices[0].finish_reason in ("stop", "length")


def check_router(base: dict[str, Any]) -> None:
    """A replica that is dead costs a retry, and no answer."""
    replicas: Any = [
        {"model_name": "replicas", "litellm_params": {**base, "api_base": one}}
        for one in (base["api_base"], DEAD)
    ]
    router = litellm.Router(model_list=replicas, num_retries=3, cooldown_time=30, allowed_fails=0)
    for _ in range(6):
        found: Any = router.completion(model="replicas", messages=QUESTION, max_tokens=4)
        assert found.usage.completion_tokens > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base_url", help="as in http://127.0.0.1:8000")
    options = parser.parse_args()
    api_base = options.base_url.rstrip("/") + "/v1"
    base = {"api_base": api_base, "api_key": "none"}
    model = litellm.get_valid_models(
        check_provider_endpoint=True, custom_llm_provider="openai", **base
    )[0]
    base["model"] = f"openai/{model.removeprefix('openai/')}"
    for check in (
        check_completion,
        check_tools,
        check_text_completion,
        check_errors,
        check_dialects,
        check_router,
    ):
        check(base)
        print(f"litellm {version('litellm')}: {check.__name__}", flush=True)


if __name__ == "__main__":
    main()
