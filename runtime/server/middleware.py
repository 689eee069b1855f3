"""ASGI middleware in front of every endpoint: checks of request id, origin, host, key, and size and
time of the body. Requests that are not explicitly allowed are refused."""

import asyncio
import hashlib
import hmac
import ipaddress
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from subspec.runtime.server.errors import FINAL, ApiError, error_response

MAX_BODY = 8 << 20  # bytes; a prompt of a million token ids has 7 MB, and no images are read
MAX_HELD = 128 << 20  # bytes of all bodies being read
MAX_REQUESTS = 256  # being answered or refused
BODY_SECONDS = 30.0  # for a whole body
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Health checks, which need no key.
OPEN_PATHS = ("/health", "/health/ready")

Log = Callable[[str, str, str, int, float], None]  # request id, method, path, status, seconds


@dataclass(frozen=True)
class GuardSettings:
    """keys: accepted API keys; empty: no key is needed. hosts: accepted Host names; empty: any.
    open_paths: paths that need no key."""

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    open_paths: tuple[str, ...] = OPEN_PATHS
    max_body: int = MAX_BODY
    body_seconds: float = BODY_SECONDS
    max_held: int = MAX_HELD
    max_requests: int = MAX_REQUESTS


def guarded(app: ASGIApp, settings: GuardSettings) -> ASGIApp:
    """Wrap `app` in the checks of host, key, number of requests and body, in this order."""
    app = NumberGuard(BodyGuard(app, settings), settings)
    if settings.keys:
        app = KeyGuard(app, settings.keys, settings.open_paths)
    return HostGuard(app, settings.hosts) if settings.hosts else app


class RequestLog:
    """Outermost: adds an X-Request-Id to every response, the client's if it is valid, and the
    headers `also`."""

    def __init__(self, app: ASGIApp, log: Log, also: Mapping[str, str]) -> None:
        self._app = app
        self._log = log
        self._also = also

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        began, status = time.monotonic(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                headers["x-content-type-options"] = "nosniff"
                headers.update(self._also)
            await send(message)

        try:
            await self._app(scope, receive, named)
        finally:
            self._log(name, scope["method"], scope["path"], status, time.monotonic() - began)


class HostGuard:
    """Refuses requests with a Host other than the server's. Otherwise a web page whose name
    resolves to this machine (DNS rebinding) would have access."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = Headers(scope=scope).getlist("host")
            if len(given) != 1 or host_of(given[0]) not in self._hosts:
                message = "the Host header is not a name of this server"
                refusal = ApiError(403, message, code="host_not_allowed", headers=FINAL)
                await error_response(refusal, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def host_of(header: str) -> str:
    """A Host header without its port."""
    if header.startswith("["):
        return header.partition("]")[0].lstrip("[").lower()
    return header.partition(":")[0].lower()


def without_brackets(host: str) -> str:
    """Remove the brackets of an IPv6 address in a URL: [::1]."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(without_brackets(host)).is_loopback
    except ValueError:
        return False


class KeyGuard:
    """Requires one of the keys on all but open paths: Authorization: Bearer KEY, or Anthropic's
    x-api-key."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: Sequence[str]) -> None:
        self._app = app
        self._digests = [digest(key) for key in keys]
        self._open = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open:
            if not self._knows(Headers(scope=scope)):
                refusal = ApiError(
                    401,
                    "a valid API key is needed: Authorization: Bearer KEY",
                    "authentication_error",
                    "invalid_api_key",
                    headers={**FINAL, "www-authenticate": "Bearer"},
                )
                await error_response(refusal, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer.strip()] if scheme.lower() == "bearer" else []
        given += headers.getlist("x-api-key")[:1]
        # Constant time: digests of equal length, all of them compared.
        found = [
            hmac.compare_digest(digest(one), known) for one in given for known in self._digests
        ]
        return any(found)


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class NumberGuard:
    """Refuses requests beyond `max_requests` at once, except health checks."""

    def __init__(self, app: ASGIApp, settings: GuardSettings) -> None:
        self._app = app
        self._settings = settings
        self._num = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        if self._num >= self._settings.max_requests:
            message = f"{self._num} requests are being answered, the maximum"
            busy = {"retry-after": "1"}
            refusal = ApiError(503, message, "overloaded_error", "overloaded", headers=busy)
            await error_response(refusal, scope["path"])(scope, receive, send)
            return
        self._num += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num -= 1


class BodyGuard:
    """Reads the body before the endpoint runs. Limits: `max_body` bytes, `body_seconds`, and
    `max_held` bytes of all requests together."""

    def __init__(self, app: ASGIApp, settings: GuardSettings) -> None:
        self._app = app
        self._settings = settings
        self._held = 0  # bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if "content-length" not in headers and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        body = bytearray()
        try:
            try:
                self._check(headers)
                async with asyncio.timeout(self._settings.body_seconds):
                    await self._read(receive, body)
            except TimeoutError:
                message = f"the body was not received within {self._settings.body_seconds:g} s"
                raise ApiError(408, message, code="request_timeout") from None
        except ApiError as error:
            self._held -= len(body)
            closing = {**error.headers, "connection": "close"}
            refusal = ApiError(error.status, error.message, error.kind, error.code, None, closing)
            await error_response(refusal, scope["path"])(scope, receive, send)
            return
        except BaseException:
            self._held -= len(body)
            raise
        held, whole, given = len(body), bytes(body), False
        body.clear()

        async def replay() -> Message:
            nonlocal given, held
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": whole, "more_body": False}

        try:
            await self._app(scope, replay, send)
        finally:
            self._held -= held

    def _check(self, headers: Headers) -> None:
        """Check the announced length. Raises ApiError."""
        encoding = headers.get("content-encoding", "identity")
        if encoding != "identity":
            message = "compressed bodies are not supported"
            raise ApiError(415, message, code="unsupported_media_type", headers=FINAL)
        if "content-length" in headers and "transfer-encoding" in headers:
            message = "a request has a Content-Length or a Transfer-Encoding, not both"
            raise ApiError(400, message, headers=FINAL)  # a proxy may have parsed another body
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or len(length) > 18:
            raise ApiError(400, "Content-Length is not a number", headers=FINAL)
        self._check_size(int(length))

    def _check_size(self, num_bytes: int) -> None:
        most = self._settings.max_body
        if num_bytes > most:
            message = f"the body has more than {most} bytes"
            raise ApiError(413, message, code="body_too_large", headers=FINAL)

    async def _read(self, receive: Receive, body: bytearray) -> None:
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ApiError(400, "the client disconnected before sending its body")
            piece = message.get("body", b"")
            self._check_size(len(body) + len(piece))
            if self._held + len(piece) > self._settings.max_held:
                busy = {"retry-after": "1"}
                text = "too many large requests are being read"
                raise ApiError(503, text, "overloaded_error", "overloaded", headers=busy)
            body += piece
            self._held += len(piece)
            if not message.get("more_body", False):
                return
