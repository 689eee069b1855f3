"""What clients do below HTTP's bodies: they dawdle, leave at every stage, do not read, break the
protocol. Each attack is a function of the server's port; it returns what came back."""

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

HOST = "127.0.0.1"
PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "def f(x):"}]},
    "/v1/completions": {"prompt": "def f(x):", "logprobs": 20},
    "/v1/responses": {"input": "def f(x):"},
    "/v1/messages": {"messages": [{"role": "user", "content": "def f"}], "max_tokens": 200},
}
LONG = "def read_file(path):\n    return open(path).read()\n" * 8  # of which reading takes a while


@dataclass(frozen=True)
class Attack:
    name: str
    run: Callable[[int], bytes]


def connect(port: int, receive_bytes: int | None = None) -> socket.socket:
    one = socket.socket()
    if receive_bytes is not None:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    one.settimeout(60)
    one.connect((HOST, port))
    return one


def reset(one: socket.socket) -> None:
    """The connection is gone at once: the other side gets a reset."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()


def head(path: str, length: int, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {HOST}", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def request(path: str, *more: str, **changed: Any) -> bytes:
    raw = json.dumps({**PATHS[path], **changed}).encode()
    return head(path, len(raw), *more) + raw


def everything(one: socket.socket) -> bytes:
    found = b""
    with suppress(OSError):
        while piece := one.recv(65536):
            found += piece
    return found


def send(data: bytes, port: int) -> bytes:
    """All at once, then nothing more is said; all that comes back."""
    with connect(port) as one:
        with suppress(OSError):
            one.sendall(data)
            one.shutdown(socket.SHUT_WR)
        return everything(one)


def dribble(data: bytes, pause_seconds: float, most_seconds: float, port: int) -> bytes:
    """A byte at a time, and away."""
    with connect(port) as one, suppress(OSError):
        until = time.monotonic() + most_seconds
        for byte in data:
            if time.monotonic() > until:
                break
            one.sendall(bytes([byte]))
            time.sleep(pause_seconds)
    return b""


def leave(data: bytes, after_seconds: float, hard: bool, port: int) -> bytes:
    one = connect(port)
    with suppress(OSError):
        one.sendall(data)
        time.sleep(after_seconds)
    if hard:
        reset(one)
    else:
        one.close()
    return b""


def leave_in_stream(data: bytes, num_events: int, hard: bool, port: int) -> bytes:
    one, found = connect(port), b""
    one.settimeout(5)
    one.sendall(data)
    with suppress(OSError):
        while found.count(b"\n\n") < num_events and (piece := one.recv(512)):
            found += piece
    if hard:
        reset(one)
    else:
        one.close()
    return found[:200]


def read_slowly(data: bytes, seconds: float, port: int) -> bytes:
    """A few bytes now and then, through a small window."""
    with connect(port, 2048) as one:
        one.settimeout(seconds)
        one.sendall(data)
        until, found = time.monotonic() + seconds, b""
        with suppress(OSError):
            while time.monotonic() < until and (piece := one.recv(64)):
                found += piece
                time.sleep(0.05)
    return found[:200]


def half_closed(data: bytes, port: int) -> bytes:
    """The client says that it sends no more, and reads on."""
    return send(data, port)


def many(count: int, data: bytes, seconds: float, port: int) -> bytes:
    """Connections that all say this and then wait."""
    held = []
    with suppress(OSError):
        for _ in range(count):
            held.append(connect(port))
            held[-1].sendall(data)
    time.sleep(seconds)
    for one in held:
        reset(one)
    return b""


def protocol() -> Iterator[tuple[str, bytes]]:
    chat = "/v1/chat/completions"
    raw = json.dumps({**PATHS[chat], "max_tokens": 2}).encode()
    chunk = f"{len(raw):x}\r\n".encode() + raw + b"\r\n0\r\n\r\n"
    yield "HTTP/1.0", head(chat, len(raw)).replace(b"HTTP/1.1", b"HTTP/1.0") + raw
    yield "HTTP/0.9", b"GET /health\r\n"
    yield "HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield "TLS", bytes.fromhex("16030100a5010000a10303") + b"x" * 160
    yield "nothing", b""
    yield "newlines", b"\r\n" * 5000
    yield "noughts", b"\x00" * 5000
    yield "a long line", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    yield "large headers", head(chat, 0, *(f"X-{one}: {'y' * 100}" for one in range(1000)))
    yield "many headers", head(chat, 0, *(f"a{one}: b" for one in range(8000)))
    yield "length and chunks", head(chat, len(raw), "Transfer-Encoding: chunked") + chunk
    yield "two lengths", head(chat, len(raw), "Content-Length: 5") + raw
    for length in ("-1", "1e3", "0x10", "9" * 30, "", " ", "+5", "1, 1", "\u0663"):
        text = head(chat, 0).replace(b"Content-Length: 0", f"Content-Length: {length}".encode())
        yield f"the length {length[:6]!r}", text + raw
    chunked = head(chat, 0, "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
    yield "chunks", chunked + chunk
    yield "a chunk of a wrong length", chunked + b"ffffffffffffffffff\r\n" + raw
    yield "a chunk without end", chunked + b"5\r\nabcdefgh\r\n"
    yield "a negative chunk", chunked + b"-5\r\nabcde\r\n"
    yield "extensions", chunked + b"1;" + b"x" * 40_000 + b"\r\n{\r\n"
    yield "codings", chunked.replace(b"chunked", b"gzip, chunked") + chunk
    yield "300 MB", head(chat, 300 << 20)
    yield "300 MB, expected", head(chat, 300 << 20, "Expect: 100-continue")
    yield "300 MB in chunks", chunked + (b"100000\r\n" + b" " * (1 << 20) + b"\r\n") * 20
    for host in ("example.org", "", "127.0.0.1.nip.io", "[::1", "127.0.0.1:x", "a\tb", "\xff"):
        text = head(chat, len(raw)).replace(b"Host: 127.0.0.1", b"Host: " + host.encode("latin-1"))
        yield f"the host {host!r}", text + raw
    yield "two hosts", head(chat, len(raw), "Host: example.org") + raw
    yield "no host", head(chat, len(raw)).replace(b"Host: 127.0.0.1\r\n", b"") + raw
    yield "an id", head(chat, len(raw), "X-Request-Id: \x1b[31mred") + raw
    yield "a key", head(chat, len(raw), "Authorization: Bearer \xff\xfe") + raw
    for method in ("TRACE", "CONNECT", "PUT", "DELETE", "OPTIONS", "x" * 5000, "GET\x00"):
        yield f"method {method[:10]}", f"{method} {chat} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    for path in (
        "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/%00", "/%ff%fe", "//", "*",
        "/v1/models/%2F",
        "http://example.org/health", "/v1/models/" + "a" * 5000, "/page/../cli.py",
        "/\x1b]52;c;eA==\x07",
        "/health?" + "a=b&" * 10_000, "/v1/chat/completions/", "/metrics?name[]=x", "/%0d%0aX: y",
    ):  # fmt: skip
        yield f"path {path[:20]}", f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    yield "an upgrade", head(chat, 0, "Upgrade: websocket", "Connection: Upgrade")
    yield "pipelined", request(chat, max_tokens=2) * 20
    yield "pipelined streams", request(chat, max_tokens=8, stream=True) * 5
    yield "pipelined rubbish", request(chat, max_tokens=2) + b"\x00\xff" * 2000
    yield "a folded header", head(chat, 0, "X: a\r\n b\r\n\tc")
    yield "bare newlines", head(chat, 0).replace(b"\r\n", b"\n")


def attacks() -> Iterator[Attack]:
    for name, data in protocol():
        yield Attack(name, partial(send, data))
        yield Attack(f"{name}, and away", partial(leave, data, 0.01, True))
    for path in PATHS:
        for streamed in (True, False):
            whole = request(path, stream=streamed)
            long = request(path, stream=streamed, **prompt(path))
            for hard in (True, False):
                how = (
                    f"{path} {'streamed' if streamed else 'whole'}, {'reset' if hard else 'closed'}"
                )
                begin = whole[: whole.index(b"\r\n\r\n")]
                yield Attack(f"{how} in its head", partial(leave, begin, 0.05, hard))
                yield Attack(f"{how} in its body", partial(leave, whole[:-9], 0.05, hard))
                for seconds in (0.0, 0.01, 0.1, 0.5):
                    name = f"{how} after {seconds} s"
                    yield Attack(name, partial(leave, long, seconds, hard))
                if streamed:
                    for events in (1, 2, 5):
                        name = f"{how} after {events} events"
                        yield Attack(name, partial(leave_in_stream, whole, events, hard))
        yield Attack(f"{path}, half closed", partial(half_closed, request(path, stream=True)))
        yield Attack(
            f"{path}, read slowly",
            partial(read_slowly, request(path, "Connection: close", stream=True), 4),
        )
        dawdled = request(path, stream=True)
        yield Attack(f"{path}, slow head", partial(dribble, dawdled, 0.05, 4))
        yield Attack(f"{path}, slow body", partial(dribble, dawdled, 0.002, 4))
    yield Attack("connections without a word", partial(many, 300, b"", 2))
    yield Attack("connections with half a head", partial(many, 300, b"POST /v1/chat", 2))
    waiting = head("/v1/completions", 1 << 20) + b"{"
    yield Attack("connections with half a body", partial(many, 300, waiting, 2))
    stream = request("/v1/completions", stream=True)
    yield Attack("connections that wait in the queue", partial(many, 60, stream, 2))


def prompt(path: str) -> dict[str, Any]:
    """The field with a prompt of which reading takes a while."""
    if path == "/v1/completions":
        return {"prompt": LONG}
    if path == "/v1/responses":
        return {"input": LONG}
    return {"messages": [{"role": "user", "content": LONG}]}
