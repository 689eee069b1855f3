"""docs/server.md says what the server does."""

from pathlib import Path

from served import serve

from subspec.runtime.server.app import GETS, POSTS
from subspec.runtime.server.middleware import (
    BODY_SECONDS,
    MAX_BODY,
    MAX_HELD,
    MAX_REQUESTS,
    OPEN_PATHS,
)
from subspec.runtime.server.openai_chat_fields import MAX_TOOLS, ChatFields
from subspec.runtime.server.openai_fields import (
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_PROMPTS,
    MAX_STOPS,
    CompletionFields,
)
from subspec.runtime.server.serving import IDLE_SECONDS, MAX_CONNECTIONS, STALLED_SECONDS

PAGE = (Path(__file__).parents[3] / "docs/server.md").read_text("utf-8")


def section(name: str) -> str:
    return PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_every_endpoint_is_listed() -> None:
    listed = section("Endpoints")
    for path, *_ in (*POSTS, *GETS, *((path,) for path in OPEN_PATHS)):
        assert path.replace("{model:path}", "{id}") in listed, path
    assert "/metrics" in listed and "`GET /`" in listed


def test_every_field_that_is_read_is_listed() -> None:
    listed = section("Fields of a request") + section("Endpoints")
    for fields in (ChatFields, CompletionFields):
        for name in fields.model_fields:
            assert f"`{name}" in listed or name == "model", name


def test_every_limit_is_the_codes() -> None:
    limits, fields = section("Limits"), section("Fields of a request")
    for number in (
        f"{MAX_BODY >> 20} MiB", f"{MAX_HELD >> 20} MiB", f"{BODY_SECONDS:g} s",
        str(MAX_CONNECTIONS), f"{IDLE_SECONDS:g} s", str(MAX_REQUESTS), f"{STALLED_SECONDS:g} s",
    ):  # fmt: skip
        assert number in limits
    for count in (MAX_BIASES, MAX_LOGPROBS, MAX_PROMPTS, MAX_STOPS, MAX_TOOLS):
        assert f"to {count} " in fields or f"to {count}," in fields, count


def test_every_metric_is_named() -> None:
    listed = section("Metrics")
    for family in serve().service.metrics.registry.collect():
        name = family.name.removeprefix("subspec:")
        assert name in listed, name
