"""Hostile requests: keys, hosts, bodies; each is refused, and never a 5xx."""

import asyncio
import json
from pathlib import Path

import pytest
from served import Client, Response, ask, serve

from subspec.runtime.server.generation import Status
from subspec.runtime.server.middleware import GuardSettings, host_of, is_loopback

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}]}
PATHS = ["/v1/models", "/v1/models/x", "/props", "/metrics", "/openapi.json", "/", "/nothing"]


def test_every_path_but_health_needs_a_key() -> None:
    app = serve(guards=GuardSettings(keys=("secret", "other"))).app
    for path in PATHS:
        found = ask(app, path)
        assert found.status == 401 and found.error["code"] == "invalid_api_key", path
        assert found.headers["www-authenticate"] == "Bearer"
    for path in ("/tokenize", "/detokenize", CHAT, "/v1/completions"):
        assert ask(app, path, BODY).status == 401
    assert ask(app, "/health").status == 200
    assert ask(app, "/health/ready").status == 200
    assert ask(app, "/healthy").status == 401 and ask(app, "/health/x").status == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": "Bearer secret"}, 200),
        ({"authorization": "bearer other"}, 200),
        ({"x-api-key": "secret"}, 200),
        ({"authorization": "Bearer wrong", "x-api-key": "secret"}, 200),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Basic secret"}, 401),
        ({"authorization": "secret"}, 401),
        ({"authorization": "Bearer secre\xff"}, 401),
        ({"x-api-key": "secretsecret"}, 401),
        ({}, 401),
    ],
)
def test_each_of_the_keys_opens_and_nothing_else_does(headers: dict[str, str], status: int) -> None:
    app = serve(guards=GuardSettings(keys=("secret", "other"))).app
    found = ask(app, "/v1/models", headers=headers)
    assert found.status == status and b"secret" not in found.body


def test_an_error_for_anthropics_clients_has_their_form() -> None:
    app = serve(guards=GuardSettings(keys=("secret",))).app
    found = ask(app, "/v1/messages", BODY)
    assert found.status == 401
    assert found.json["type"] == "error" and found.error["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("", 403),
    ],
)
def test_a_page_whose_name_points_here_is_kept_out(host: str, status: int) -> None:
    app = serve(guards=GuardSettings(hosts=("localhost", "127.0.0.1", "::1"))).app
    assert ask(app, "/v1/models", headers={"host": host}).status == status


def test_loopback_is_known_by_address_and_name() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "[::]", "10.0.0.1", "example.org", "")))
    assert host_of("[::1]:80") == "::1" and host_of("A.b:80") == "a.b"


def test_other_origins_are_let_in_only_by_name_and_without_credentials() -> None:
    preflight = {"origin": "https://app.example", "access-control-request-method": "POST"}
    closed = ask(serve().app, CHAT, method="OPTIONS", headers=preflight)
    assert closed.status == 405 and "access-control-allow-origin" not in closed.headers
    keys = GuardSettings(keys=("secret",))
    app = serve(guards=keys, cors_origins=["https://app.example"]).app
    opened = ask(app, CHAT, method="OPTIONS", headers=preflight)
    assert opened.status == 200
    assert opened.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in opened.headers
    other = ask(app, CHAT, method="OPTIONS", headers={**preflight, "origin": "https://x.example"})
    assert "access-control-allow-origin" not in other.headers
    assert ask(app, CHAT, BODY, headers={"origin": "https://app.example"}).status == 401


HOSTILE: list[bytes] = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"{}",
    b"\xff\xfe",
    b"\x1f\x8b\x08\x00",
    b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"messages":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    b'{"max_tokens":' + b"9" * 5000 + b',"messages":[{"role":"user","content":"x"}]}',
    b'{"temperature":NaN,"messages":[{"role":"user","content":"x"}]}',
    b'{"temperature":1e999,"messages":[{"role":"user","content":"x"}]}',
    b'{"temperature":-Infinity,"messages":[{"role":"user","content":"x"}]}',
    b'{"messages":[{"role":"user","content":"\\ud800"}]}',
    b'{"messages":[{"role":"user","content":"a"}],"messages":[{"role":"user","content":"b"}]}',
    b'\xef\xbb\xbf{"messages":[{"role":"user","content":"x"}]}',
    b'{"messages":' + json.dumps([{}] * 200_000).encode() + b"}",
    b'{"messages":[{"role":"user","content":' + json.dumps([{}] * 100_000).encode() + b"}]}",
    b'{"model":"\\u0000\\n","messages":[{"role":"user","content":"x"}]}',
    b'{"logit_bias":{"' + b"1" * 5000 + b'":1},"messages":[{"role":"user","content":"x"}]}',
]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", HOSTILE, ids=lambda body: repr(body[:40]))
def test_a_hostile_body_is_a_4xx(path: str, body: bytes) -> None:
    served = serve()
    found = ask(served.app, path, body)
    assert 400 <= found.status < 500, found.body[:300]
    assert set(found.error) == {"message", "type", "param", "code"}
    assert len(found.body) < 2000 and b"Traceback" not in found.body
    assert not served.engine.requests


@pytest.mark.parametrize(
    "field", ["temperature", "top_k", "max_tokens", "seed", "n", "top_logprobs"]
)
@pytest.mark.parametrize("value", [-(1 << 63), -1, 1 << 63, 1 << 200, 0.5, True, "1", [], {}])
def test_a_number_of_any_kind_is_a_200_or_a_400(field: str, value: object) -> None:
    found = ask(serve().app, CHAT, {**BODY, field: value})
    assert found.status in (200, 400)
    if found.status == 400:
        assert found.error["param"] == field or field == "top_logprobs"


def test_a_body_must_say_that_it_is_json() -> None:
    served = serve()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert ask(served.app, CHAT, BODY, headers={"content-type": kind}).status == 415
    assert ask(served.app, CHAT, BODY, headers={"content-encoding": "gzip"}).status == 415
    good = {"content-type": "application/json; charset=utf-8"}
    assert ask(served.app, CHAT, BODY, headers=good).status == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_read() -> None:
    app = serve(guards=GuardSettings(max_body=1000)).app
    found = ask(app, CHAT, b"x" * 1001)
    assert found.status == 413 and found.headers["connection"] == "close"
    assert found.error["code"] == "body_too_large"
    assert ask(app, CHAT, b"x", headers={"content-length": "9" * 30}).status == 400
    assert ask(app, CHAT, b"x", headers={"content-length": "-1"}).status == 400


def post(pieces: list[bytes], pause_seconds: float, guards: GuardSettings) -> Response:
    """Without a length, in pieces, as Transfer-Encoding: chunked sends them."""
    served = serve(guards=guards)
    client = Client("POST", CHAT, pieces, {"transfer-encoding": "chunked"}, pause_seconds)
    client._scope["headers"] = [h for h in client._scope["headers"] if h[0] != b"content-length"]
    return asyncio.run(client.run(served.app))


def test_a_body_without_a_length_has_the_same_limits() -> None:
    found = post([b"x" * 600, b"x" * 600], 0, GuardSettings(max_body=1000))
    assert found.status == 413
    found = post([b"x"] * 100, 0.01, GuardSettings(body_seconds=0.1))
    assert found.status == 408 and found.error["code"] == "request_timeout"
    raw = json.dumps(BODY).encode()
    both = {"transfer-encoding": "chunked"}
    assert ask(serve().app, CHAT, raw, headers=both).status == 400
    assert post([raw[:9], raw[9:]], 0, GuardSettings()).status == 200


def test_bodies_together_have_a_limit_which_is_given_back() -> None:
    served = serve(guards=GuardSettings(max_held=60))
    raw = json.dumps(BODY).encode()
    assert len(raw) < 60 < 2 * len(raw)

    async def two_at_once() -> list[int]:
        slow = Client("POST", CHAT, [raw[:-5], raw[-5:]], pause_seconds=0.1)
        slow_task = asyncio.create_task(slow.run(served.app))
        await asyncio.sleep(0.15)
        second = await Client("POST", CHAT, [raw * 2]).run(served.app)
        return [(await slow_task).status, second.status]

    assert asyncio.run(two_at_once()) == [200, 503]
    assert ask(served.app, CHAT, BODY).status == 200


def test_a_client_that_goes_before_its_body_has_come_leaves_nothing() -> None:
    served = serve(guards=GuardSettings(body_seconds=300))

    async def leave() -> None:
        client = Client("POST", CHAT, [b"{"], {"content-length": "100"})
        client._pieces, client._scope = [], client._scope
        client.gone.set()
        await asyncio.wait_for(client.run(served.app), 30)

    asyncio.run(leave())
    assert not served.engine.requests


def test_a_request_id_is_echoed_if_it_is_sane() -> None:
    app = serve().app
    assert ask(app, "/health", headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
    for odd in ("a\nb", "x" * 200, "\x1b[2J", ""):
        found = ask(app, "/health", headers={"x-request-id": odd}).headers["x-request-id"]
        assert len(found) == 16 and found != odd


def test_unknown_paths_and_methods_have_the_apis_form() -> None:
    app = serve().app
    assert ask(app, "/v1/embeddings", BODY).error["code"] == "not_found"
    assert ask(app, CHAT).error["code"] == "method_not_allowed"
    assert ask(app, "/v1/../../etc/passwd").status == 404


def test_health_lives_while_weights_load_and_ready_has_llama_cpps_body() -> None:
    served = serve()
    served.engine.status = Status("loading", "weights", 0.25)
    alive = ask(served.app, "/health")
    assert alive.status == 200
    assert alive.json == {"status": "ok", "engine": "loading", "stage": "weights", "share": 0.25}
    waiting = ask(served.app, "/health/ready")
    assert waiting.status == 503
    assert waiting.json == {
        "error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}
    }
    served.engine.status = Status("ready")
    assert ask(served.app, "/health/ready").status == 200
    served.service.engine.closing = True
    assert ask(served.app, "/health/ready").error["code"] == "shutting_down"
    served.engine.status = Status("failed")
    assert ask(served.app, "/health/ready").error["code"] == "engine_failed"
    assert ask(served.app, CHAT, BODY).status == 503
    assert ask(served.app, "/health", method="HEAD").status == 200


def test_a_bug_is_a_500_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()

    def broken(request: object) -> None:
        raise ValueError("at 0x7f00 in /secret/path")

    monkeypatch.setattr(served.engine, "submit", broken)
    client = Client("POST", CHAT, [json.dumps(BODY).encode()])
    with pytest.raises(ValueError):  # for the log
        asyncio.run(client.run(served.app))
    assert client.response.status == 500 and b"secret" not in client.response.body
    assert client.response.error["code"] == "internal_error"


def test_metrics_have_vllms_names(tmp_path: Path) -> None:
    served = serve("def add(a, b): return a + b")
    ask(served.app, CHAT, BODY)
    found = ask(served.app, "/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    said = found.body.decode()
    for name in (
        "num_requests_running", "num_requests_waiting", "queue_depth", "prompt_tokens_total",
        "generation_tokens_total", "time_to_first_token_seconds_bucket",
        "time_per_output_token_seconds_bucket", "e2e_request_latency_seconds_bucket",
        "request_queue_time_seconds_bucket", "spec_decode_num_drafts_total",
        "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total",
        "spec_decode_num_accepted_tokens_per_pos_total", "streamed_bytes_total",
        "stream_wait_seconds_total", "predicted_tokens_per_second", "last_tokens_per_second",
    ):  # fmt: skip
        assert f"\nsubspec:{name}{{" in said, name
    assert 'subspec:http_responses_total{model_name="org/model",status="200"} 1.0' in said
    assert 'subspec:spec_decode_num_accepted_tokens_per_pos_total{model_name="org/model",' in said


def test_with_too_many_requests_a_supervisor_is_still_answered() -> None:
    app = serve(guards=GuardSettings(max_requests=0)).app
    found = ask(app, CHAT, BODY)
    assert found.status == 503 and found.error["code"] == "overloaded"
    assert found.headers["retry-after"] == "1"
    assert ask(app, "/health").status == ask(app, "/health/ready").status == 200


def test_a_request_counts_until_it_is_answered() -> None:
    app = serve(guards=GuardSettings(max_requests=1)).app
    for _ in range(3):
        assert ask(app, CHAT, BODY).status == 200
