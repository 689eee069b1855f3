"""The ASGI app: the routes of all endpoints."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from subspec.artifacts.common.errors import SubspecError
from subspec.runtime.server.admission import LOADING
from subspec.runtime.server.chat_page import page_router
from subspec.runtime.server.errors import (
    RETRY_SECONDS,
    ApiError,
    as_api_error,
    error_response,
)
from subspec.runtime.server.generation import QueueFull
from subspec.runtime.server.messages import count_tokens, create_message
from subspec.runtime.server.messages_request import CountTokens, CreateMessage
from subspec.runtime.server.middleware import GuardSettings, Log, RequestLog, guarded
from subspec.runtime.server.openai_chat import chat_completions
from subspec.runtime.server.openai_chat_fields import ChatFields
from subspec.runtime.server.openai_completions import completions
from subspec.runtime.server.openai_fields import (
    CompletionFields,
    DetokenizeFields,
    TokenizeFields,
)
from subspec.runtime.server.openai_models import (
    detokenize,
    list_models,
    one_model,
    props,
    tokenize,
)
from subspec.runtime.server.responses import create_response
from subspec.runtime.server.responses_request import CreateResponse
from subspec.runtime.server.service import Service

Endpoint = Callable[[Service, Request], Awaitable[Response]]

POSTS: tuple[tuple[str, Endpoint, type[BaseModel]], ...] = (
    ("/v1/chat/completions", chat_completions, ChatFields),
    ("/v1/completions", completions, CompletionFields),
    ("/tokenize", tokenize, TokenizeFields),
    ("/detokenize", detokenize, DetokenizeFields),
    ("/v1/responses", create_response, CreateResponse),
    ("/v1/messages", create_message, CreateMessage),
    ("/v1/messages/count_tokens", count_tokens, CountTokens),
)
GETS: tuple[tuple[str, Endpoint], ...] = (
    ("/v1/models", list_models),
    ("/v1/models/{model:path}", one_model),
    ("/props", props),
)


VERIFY_HEADER = "x-subspec-verify"  # sent by a lossy server
MODEL_IN_PATH = {
    "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
}


def make_app(
    service: Service,
    guards: GuardSettings,
    cors_origins: Sequence[str],
    log: Log,
) -> ASGIApp:
    """Build the app: endpoints and chat page behind the guard middleware."""
    app: ASGIApp = guarded(make_endpoints(service), guards)
    if cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-queue-depth", VERIFY_HEADER],
        )

    def logged(name: str, method: str, path: str, status: int, seconds: float) -> None:
        service.metrics.responded(status)
        log(name, method, path, status, seconds)

    lossy = service.model.lossy
    return RequestLog(app, logged, {} if lossy is None else {VERIFY_HEADER: str(lossy)})


def make_endpoints(service: Service) -> FastAPI:
    app = FastAPI(title="subspec", docs_url=None, redoc_url=None)
    schemas: dict[str, Any] = {}
    for path, endpoint, fields in POSTS:
        add(app, service, path, endpoint, "POST", body_schema(fields, schemas))
    for path, endpoint in GETS:
        add(app, service, path, endpoint, "GET", MODEL_IN_PATH if "{model" in path else None)
    for path, endpoint in (("/health", health), ("/health/ready", ready), ("/metrics", metrics)):
        add(app, service, path, endpoint, "GET")
    app.include_router(page_router())
    for kind in (ApiError, QueueFull, SubspecError, HTTPException, Exception):
        app.add_exception_handler(kind, told)
    describe_bodies(app, schemas)
    return app


def add(
    app: FastAPI,
    service: Service,
    path: str,
    endpoint: Endpoint,
    method: str,
    described: Mapping[str, Any] | None = None,
) -> None:
    async def answered(request: Request) -> Response:
        return await endpoint(service, request)

    if path.startswith("/health"):  # some supervisors send HEAD
        app.add_api_route(path, answered, methods=["HEAD"], include_in_schema=False)
    app.add_api_route(
        path,
        answered,
        methods=[method],
        name=endpoint.__name__,
        operation_id=endpoint.__name__,
        response_model=None,
        openapi_extra=dict(described or {}),
    )


def body_schema(fields: type[BaseModel], schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the endpoint's request schema for /openapi.json; its parts are added to `schemas`."""
    schema = fields.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas[fields.__name__] = schema
    place = {"$ref": f"#/components/schemas/{fields.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": place}}}}


def describe_bodies(app: FastAPI, schemas: dict[str, Any]) -> None:
    made = app.openapi

    def described() -> dict[str, Any]:
        schema = made()
        schema.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        return schema

    app.openapi = described  # type: ignore[method-assign]


async def told(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = no_such_thing(request, error)
    return error_response(as_api_error(error), request.url.path)


def no_such_thing(request: Request, error: HTTPException) -> ApiError:
    path = request.url.path[:100]
    if error.status_code == 405:
        message = f"{path!r} does not answer {request.method}"
        return ApiError(405, message, code="method_not_allowed", headers=error.headers or {})
    if error.status_code == 404:
        return ApiError(404, f"there is no endpoint {path!r}", code="not_found")
    return ApiError(error.status_code, str(error.detail))


async def health(service: Service, request: Request) -> Response:
    """Respond 200 as long as the process lives."""
    status = service.engine.engine.status
    body: dict[str, Any] = {"status": "ok", "engine": status.phase}
    if status.phase == "loading":
        body |= {"stage": status.stage, "share": round(status.share, 3)}
    return JSONResponse(body)


async def ready(service: Service, request: Request) -> Response:
    """Respond 503 unless requests are accepted; while weights load, with llama.cpp's body."""
    problem = service.engine.problem
    if problem is None:
        return JSONResponse({"status": "ok"})
    code = 503 if problem.message == LOADING else problem.code
    error = {"code": code, "message": problem.message, "type": problem.kind}
    headers = {"retry-after": str(RETRY_SECONDS)}
    return JSONResponse({"error": error}, 503, headers)


async def metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
