"""The server's app with a scripted engine, and requests to it without a socket, so that a test says
when a body's pieces come and when the client goes."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scripted_generator import Script, ScriptedGenerator
from starlette.types import ASGIApp, Message

from subspec.planner.model.hub import DEMO
from subspec.runtime.lossy import Lossy
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.server.admission import Admission
from subspec.runtime.server.app import make_app
from subspec.runtime.server.chat_events import (
    Chat,
    ChatAnswer,
    ChatEnd,
    ChatEvent,
    ChatRequest,
    TextDelta,
)
from subspec.runtime.server.generation import Generation, GenerationRequest, Generator, Status
from subspec.runtime.server.metrics import Metrics
from subspec.runtime.server.middleware import GuardSettings
from subspec.runtime.server.model_info import ModelInfo
from subspec.runtime.server.service import Service
from subspec.runtime.text.tokenizer import ChatTokenizer, load_tokenizer

CONTEXT = 512
SCRIPTED_DEPTH = 5  # levels of a draft, as in the scripts' largest rounds
JSON = dict[str, Any]


class ScriptedEngine(ScriptedGenerator):
    """A ServedEngine."""

    def __init__(self, tokenizer: ChatTokenizer, scripts: Iterable[str | Script]) -> None:
        super().__init__(tokenizer, scripts, CONTEXT)
        self.status = Status("ready")
        self.num_running = 0
        self.num_waiting = 0
        self.peak_bytes = 7
        self.closed = False

    def start(self) -> None:
        pass

    async def close(self, timeout_seconds: float) -> None:
        self.closed = True


async def scripted_count(request: ChatRequest) -> int:
    return len(request.messages)


@dataclass
class ScriptedAnswer:
    """Text as it is, without a template, thinking or tools."""

    generation: Generation
    events: Sequence[ChatEvent] = ()  # in place of the first text

    num_prompt_tokens: int = 3
    num_tokens: int = 0

    @property
    def queue_position(self) -> int:
        return self.generation.queue_position

    def cancel(self) -> None:
        self.generation.cancel()

    async def __aiter__(self) -> AsyncIterator[ChatEvent]:
        for event in self.events:
            yield event
        async for piece in self.generation:
            self.num_tokens += len(piece.token_ids)
            if piece.text or piece.logprobs:
                yield TextDelta(piece.text, piece.logprobs)
        outcome = self.generation.outcome
        stats = outcome.stats
        reason = "stop" if outcome.reason in ("eos", "stop") else "length"
        yield ChatEnd(
            "tool_calls" if self.events else reason,  # type: ignore[arg-type]
            outcome.stop_text,
            stats.prompt_tokens,
            stats.cached_tokens,
            stats.generated_tokens,
            0,
            outcome,
        )


@dataclass
class Served:
    """An app and what is behind it. chats: the requests that it got."""

    app: ASGIApp
    engine: ScriptedEngine
    service: Service
    chats: list[ChatRequest] = field(default_factory=list)
    log: list[tuple[str, str, str, int]] = field(default_factory=list)


def model_of(tokenizer: ChatTokenizer) -> ModelInfo:
    return ModelInfo(
        id="org/model",
        created=1795000000,
        context=CONTEXT,
        vocab_size=tokenizer.tokenizer.get_vocab_size(),
        end_tokens=frozenset({0}),
        method="substitute",
        width=2,
        depth=SCRIPTED_DEPTH,
        num_sequences=2,
        max_positions=4096,
        weight_bytes=100,
        budget_bytes=50,
        names=frozenset({"model"}),
    )


def scripted_chat(
    engine: Generator,
    tokenizer: ChatTokenizer,
    chats: list[ChatRequest],
    events: Sequence[ChatEvent],
) -> Chat:
    async def chat(request: ChatRequest) -> ChatAnswer:
        chats.append(request)
        text = "\n".join(message["content"] or "" for message in request.messages)
        params = GenerationParams(
            max_tokens=request.max_tokens or CONTEXT,
            sampling=request.sampling,
            stop_token_ids=frozenset({0}),
            logprobs=request.logprobs,
        )
        ids = tuple(tokenizer.plain_ids(text))
        submitted = engine.submit(GenerationRequest(ids, params, request.stop))
        return ScriptedAnswer(submitted, events)

    return chat


def serve(
    *scripts: str | Script,
    guards: GuardSettings | None = None,
    cors_origins: Sequence[str] = (),
    sampling: SamplingParams | None = None,
    refuse_unknown: bool = False,
    events: Sequence[ChatEvent] = (),
    lossy: Lossy | None = None,
) -> Served:
    tokenizer = load_tokenizer(DEMO)
    engine = ScriptedEngine(tokenizer, scripts or ("Hello",))
    model = replace(model_of(tokenizer), lossy=lossy)
    metrics = Metrics(model.id, model.depth, 12.0)
    admission = Admission(engine, CONTEXT, model.vocab_size, metrics)
    chats: list[ChatRequest] = []
    chat = scripted_chat(admission, tokenizer, chats, events)
    service = Service(
        model,
        tokenizer,
        admission,
        chat,
        scripted_count,
        metrics,
        sampling or SamplingParams(),
        refuse_unknown,
    )
    log: list[tuple[str, str, str, int]] = []
    app = make_app(
        service,
        guards or GuardSettings(),
        cors_origins,
        lambda name, method, path, status, seconds: log.append((name, method, path, status)),
    )
    return Served(app, engine, service, chats, log)


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> JSON:
        found: JSON = self.json["error"]
        return found

    @property
    def events(self) -> list[str]:
        """Of a stream: what stands after `data: `, and comments."""
        blocks = self.body.decode().split("\n\n")
        assert blocks[-1] == ""
        return [block.removeprefix("data: ") for block in blocks[:-1]]

    @property
    def chunks(self) -> list[JSON]:
        return [json.loads(one) for one in self.events if one[0] == "{"]


class Client:
    """One request. gone: set it to disconnect. `begun`: the response's first body has come."""

    def __init__(
        self,
        method: str,
        path: str,
        pieces: Sequence[bytes] = (),
        headers: dict[str, str] | None = None,
        pause_seconds: float = 0.0,
    ) -> None:
        self.gone = asyncio.Event()
        self.begun = asyncio.Event()
        self.response = Response(0, {}, b"")
        self._pieces = list(pieces)
        self._pause_seconds = pause_seconds
        length = {"content-length": str(sum(map(len, pieces)))} if pieces else {}
        usual = {"host": "127.0.0.1:8000", **length}
        if pieces:
            usual["content-type"] = "application/json"
        every = {**usual, **(headers or {})}
        self._scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(k.encode(), v.encode("latin-1")) for k, v in every.items()],
            "client": ("127.0.0.1", 5),
            "server": ("127.0.0.1", 8000),
        }

    async def run(self, app: ASGIApp) -> Response:
        await app(self._scope, self._receive, self._send)
        return self.response

    async def _receive(self) -> Message:
        if self._pieces:
            await asyncio.sleep(self._pause_seconds)
            piece = self._pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.response.status = message["status"]
            self.response.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        elif body := message.get("body", b""):
            self.response.body += body
            self.begun.set()


def ask(
    app: ASGIApp,
    path: str,
    body: object = None,
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """A whole request and its response. body: JSON, or bytes as they are."""
    raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    pieces = [] if raw is None else [raw]
    client = Client(method or ("GET" if raw is None else "POST"), path, pieces, headers)
    return asyncio.run(client.run(app))
