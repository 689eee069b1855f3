"""A server for the chat page to talk to: the page's files as subspec-serve gives them, and answers
that a test decides."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from subspec.runtime.server.chat_page import page_router

FINAL = {
    "choices": [],
    "usage": {"prompt_tokens": 412, "completion_tokens": 256, "total_tokens": 668},
    "metrics": {
        "time_to_first_token_ms": 1890.0,
        "generation_time_ms": 19300.0,
        "tokens_per_second": 13.2,
        "speculative_decoding": {"mean_acceptance_length": 3.0, "draft_acceptance_rate": 0.4},
        "subspec": {"predicted_tokens_per_second": 14.06},
    },
    "timings": {"predicted_n": 256, "draft_n": 10, "draft_n_accepted": 4},
}
QUEUE_FULL = {
    "message": "8 requests are waiting; this engine serves one at a time",
    "type": "overloaded_error",
    "param": None,
    "code": "queue_full",
}

LOADING = {"message": "Loading model", "type": "unavailable_error", "param": None, "code": 503}


@dataclass
class ChatServer:
    """answer: what the next answers say. Each of `refusals` meets one request."""

    address: str = ""
    answer: str = "Hello."
    reasoning: str = ""
    chunk_chars: int = 16
    pause_seconds: float = 0.0
    fails_with: str | None = None  # "error" or "cut": after the text, instead of an end
    key: str | None = None
    model: str = "Qwen3-32B"
    verify: str | None = "exact"
    loads: bool = False  # what it says of itself; an answer is refused by `refusals`
    refusals: list[tuple[int, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    num_disconnected: int = 0

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            yield b": waiting, position 1\n\n"
            await asyncio.sleep(self.pause_seconds)
            for name, text in (("reasoning_content", self.reasoning), ("content", self.answer)):
                for at in range(0, len(text), self.chunk_chars):
                    piece = {name: text[at : at + self.chunk_chars]}
                    choice = {"index": 0, "delta": piece, "finish_reason": None}
                    yield event({"model": self.model, "choices": [choice]})
                    await asyncio.sleep(self.pause_seconds)
            if self.fails_with == "error":
                yield event({"error": {"message": "The device is lost", "code": "engine_error"}})
            if self.fails_with is None:
                yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                yield event(FINAL)
                yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.num_disconnected += 1
            raise


def event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def chat_app(server: ChatServer) -> FastAPI:
    app = FastAPI()
    app.include_router(page_router())

    def refusal(request: Request) -> Response | None:
        if server.key is None or request.headers.get("authorization") == f"Bearer {server.key}":
            return None
        return JSONResponse({"error": {"message": "no key", "code": "invalid_api_key"}}, 401)

    async def models(request: Request) -> Response:
        if server.loads:
            return JSONResponse({"error": LOADING}, 503)
        model = {"id": server.model, "object": "model", "meta": {"n_ctx": 4096}}
        return refusal(request) or JSONResponse({"object": "list", "data": [model]})

    async def props(request: Request) -> Response:
        memory = {"budget_bytes": 8_000_000_000, "peak_bytes": 7_912_000_000}
        caps = {"supports_enable_thinking": True, "supports_reasoning_effort": True}
        found = {"chat_template_caps": caps, "memory": memory, "subspec": {"verify": server.verify}}
        return refusal(request) or JSONResponse(found)

    async def chat(request: Request) -> Response:
        if refused := refusal(request):
            return refused
        server.requests.append(await request.json())
        if server.refusals:
            status, error, headers = server.refusals.pop(0)
            return JSONResponse({"error": error}, status, headers)
        return StreamingResponse(server.chunks(), media_type="text/event-stream")

    app.add_route("/v1/models", models)
    app.add_route("/props", props)
    app.add_route("/v1/chat/completions", chat, ["POST"])
    return app


@contextmanager
def serving(server: ChatServer) -> Iterator[ChatServer]:
    """Serves until the end of the block, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    settings = uvicorn.Config(
        chat_app(server), log_level="error", ws="none", lifespan="off", timeout_graceful_shutdown=1
    )
    web = uvicorn.Server(settings)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not web.started:
            time.sleep(0.01)
        yield server
    finally:
        web.should_exit = True
        thread.join(20)
        listener.close()
