"""The life of a server process on a real socket: it loads, answers, drains, is cut, fails."""

import asyncio
import gc
import http.client
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from subspec.artifacts.common.errors import SubspecError
from subspec.runtime.server import serving
from subspec.runtime.server.generation import Status

PROGRAM = Path(__file__).parents[2] / "scripted_server.py"
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}]}
STREAMED = {**BODY, "stream": True}
SLOW = {"pause_seconds": 0.1, "num_words": 50}


@dataclass
class Process:
    child: "subprocess.Popen[str]"
    lines: list[str] = field(default_factory=list)
    host: str = ""
    connections: list[http.client.HTTPConnection] = field(default_factory=list)

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """The first line of stderr with `text`."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if found := next((line for line in self.lines if text in line), None):
                return found
            time.sleep(0.01)
        raise AssertionError(f"no {text!r} in {self.lines}")

    def ask(self, path: str, body: object = None) -> tuple[int, str]:
        connection = self.begin(path, body)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def begin(self, path: str, body: object = None) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.host, timeout=30)
        self.connections.append(connection)
        raw = None if body is None else json.dumps(body)
        headers = {} if raw is None else {"content-type": "application/json"}
        connection.request("GET" if raw is None else "POST", path, raw, headers)
        return connection

    def end(self, seconds: float = 20) -> int:
        return self.child.wait(seconds)


@contextmanager
def process(**life: Any) -> Iterator[Process]:
    command = [sys.executable, str(PROGRAM), json.dumps(life)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        found = Process(child)
        assert child.stderr is not None

        def read() -> None:
            for line in child.stderr or ():
                found.lines.append(line)

        reader = Thread(target=read)
        reader.start()
        try:
            line = found.wait_for("listening")
            address = re.search(r"http://(127\.0\.0\.1:[0-9]+)", line)
            assert address is not None
            found.host = address[1]
            yield found
        finally:
            if child.poll() is None:
                child.kill()
            reader.join()
            for connection in found.connections:
                connection.close()


def test_it_lives_while_it_loads_says_when_it_is_ready_and_ends_cleanly(tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"
    with process(loaded=str(loaded)) as server:
        assert server.ask("/health")[0] == 200
        status, body = server.ask("/health/ready")
        assert status == 503 and "Loading model" in body
        assert server.ask(CHAT, BODY)[0] == 503
        loaded.touch()
        assert "org/model, context 512, 2 at once" in server.wait_for(" ready ")
        assert server.ask("/health/ready")[0] == 200
        status, body = server.ask(CHAT, BODY)
        assert status == 200 and json.loads(body)["choices"][0]["message"]["content"]
        server.child.send_signal(signal.SIGTERM)
        assert server.end() == 0


def test_a_stream_that_runs_is_finished_and_no_request_is_taken_meanwhile() -> None:
    with process(**SLOW) as server:
        server.wait_for(" ready ")
        response = server.begin(CHAT, STREAMED).getresponse()
        assert response.readline().startswith(b"data: ")
        server.child.send_signal(signal.SIGTERM)
        server.wait_for("1 running")
        status, body = server.ask("/health/ready")
        assert status == 503 and "shutting down" in body
        assert server.ask(CHAT, BODY)[0] == 503
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert server.end() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_does_not_end_in_time_is_cut_with_an_error(number: int, code: int) -> None:
    with process(shutdown_seconds=0.3, pause_seconds=0.5) as server:
        server.wait_for(" ready ")
        response = server.begin(CHAT, STREAMED).getresponse()
        whole = server.begin(CHAT, BODY)
        response.readline()
        server.child.send_signal(number)
        blocks = response.read().decode().strip().split("\n\n")
        error = json.loads(blocks[-1].removeprefix("data: "))["error"]
        assert error["message"] == "the server is shutting down"
        refused = whole.getresponse()
        assert refused.status == 503 and b"shutting down" in refused.read()
        assert server.end() == code


def test_a_second_signal_ends_it_at_once() -> None:
    with process(pause_seconds=60, shutdown_seconds=60) as server:
        server.wait_for(" ready ")
        server.begin(CHAT, STREAMED).getresponse()
        server.child.send_signal(signal.SIGTERM)
        server.wait_for("1 running")
        assert server.child.poll() is None
        server.child.send_signal(signal.SIGTERM)
        assert server.end() == 143
    assert not any("POST" in line for line in server.lines), "the answer was ended first"


def test_a_signal_while_it_loads_ends_it(tmp_path: Path) -> None:
    with process(loaded=str(tmp_path / "never")) as server:
        assert server.ask("/health")[0] == 200
        server.child.send_signal(signal.SIGTERM)
        assert server.end() == 0


def test_an_engine_that_fails_ends_the_answers_and_the_process(tmp_path: Path) -> None:
    failed = tmp_path / "failed"
    with process(failed=str(failed), pause_seconds=60) as server:
        server.wait_for(" ready ")
        response = server.begin(CHAT, STREAMED).getresponse()
        failed.touch()
        assert "the engine has failed" in response.read().decode()
        assert server.end() == 1
        server.wait_for("error: a digest does not match")


def test_an_engine_that_cannot_load_ends_the_process_with_its_own_code(tmp_path: Path) -> None:
    failed = tmp_path / "failed"
    with process(loaded=str(tmp_path / "never"), failed=str(failed)) as server:
        failed.touch()
        assert server.end() == 4
        server.wait_for("error: a digest does not match")


def test_a_connection_without_a_request_is_closed_and_an_answer_is_not() -> None:
    with process(idle_seconds=1.0, pause_seconds=0.4) as server:
        server.wait_for(" ready ")
        host, port = server.host.split(":")
        with socket.create_connection((host, int(port))) as silent:
            silent.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: ")
            silent.settimeout(10)
            stream = server.begin(CHAT, STREAMED).getresponse()
            assert silent.recv(1) == b""
        assert stream.read().endswith(b"data: [DONE]\n\n")


def test_the_log_is_json_a_line_and_what_a_client_sends_breaks_none() -> None:
    with process(log_format="json") as server:
        server.wait_for('"ready"')
        server.ask("/v1/%0a%1b%5b2Jx")
        line = json.loads(server.wait_for('"request"'))
        assert line["path"] == "'/v1/\\n\\x1b[2Jx'" and line["status"] == 404
        assert {"time", "level", "message", "method", "seconds", "id"} <= set(line)
        server.child.send_signal(signal.SIGTERM)
        assert server.end() == 0
        assert all(json.loads(line) for line in server.lines)


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_lossy_server_says_so_when_it_starts(form: str) -> None:
    with process(log_format=form, lossy=True) as server:
        server.wait_for("ready")
        [line] = [line for line in server.lines if "lossy" in line]
    if form == "json":
        told = json.loads(line)
        assert (told["level"], told["verify"]) == ("warning", "lossy")
        assert told["lossy"] == {"threshold_method": "entropy", "threshold": 0.3, "window": 6}
    else:
        assert "lossy (entropy 0.3, window 6): answers may differ from the exact model's" in line


# Connections


class Transport:
    def __init__(self, num_waiting: int = 0) -> None:
        self.num_waiting = num_waiting
        self.ended = ""

    def get_write_buffer_size(self) -> int:
        return self.num_waiting

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"


class Connection(H11Protocol):
    """One that waits for a request, or is being answered."""

    def __init__(self, transport: Transport, answering: bool) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.cycle = SimpleNamespace(response_complete=False) if answering else None  # type: ignore[assignment]


def test_connections_beyond_the_limit_and_clients_that_read_nothing_are_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("SWEEP_SECONDS", 0.01), ("STALLED_SECONDS", 0.3)):
        monkeypatch.setattr(serving, name, value)
    monkeypatch.setattr(serving, "most_connections", lambda: 4)  # it raises this process's limit
    idle = [Connection(Transport(), False) for _ in range(3)]
    reading, stalled = (Connection(Transport(1 << 20), True) for _ in range(2))
    server = SimpleNamespace(server_state=SimpleNamespace(connections={*idle, reading, stalled}))

    async def sweep() -> None:
        task = asyncio.create_task(serving.close_idle(server))  # type: ignore[arg-type]
        more = 60  # steps, which take longer than STALLED_SECONDS once more
        while not stalled.transport.ended or (more := more - 1):  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
            reading.transport.num_waiting -= 1  # type: ignore[attr-defined]
        task.cancel()

    asyncio.run(asyncio.wait_for(sweep(), 30))
    assert stalled.transport.ended == "aborted"  # type: ignore[attr-defined]
    assert reading.transport.ended == ""  # type: ignore[attr-defined]
    assert [one.transport.ended for one in idle].count("closed") == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("limits", "raised", "connections"),
    [
        ((256, 1024), 1024, 512),
        ((256, 1 << 20), 4096, 512),
        ((256, 256), 256, 192),
        ((50, 50), 50, 1),
        ((1 << 16, 1 << 20), 1 << 16, 512),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), resource.RLIM_INFINITY, 512),
        ((256, resource.RLIM_INFINITY), 4096, 512),
    ],
    ids=str,
)
def test_connections_are_bounded_by_the_limit_of_open_files_which_is_raised_first(
    limits: tuple[int, int], raised: int, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: found[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, given: found.append(given))
    assert serving.most_connections() == connections
    assert found[-1] == (raised, limits[1])


def resolving(monkeypatch: pytest.MonkeyPatch, *families: socket.AddressFamily) -> None:
    real = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
    found = [(one, socket.SOCK_STREAM, 6, "", (real[one], 0)) for one in families]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


@pytest.mark.parametrize(
    ("families", "chosen"),
    [
        ([socket.AF_INET6], socket.AF_INET6),
        ([socket.AF_INET6, socket.AF_INET], socket.AF_INET),
        ([socket.AF_INET], socket.AF_INET),
    ],
)
def test_a_name_is_listened_on_in_the_family_that_it_has(
    families: list[socket.AddressFamily],
    chosen: socket.AddressFamily,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolving(monkeypatch, *families)
    assert serving.family_of("a-name") == chosen


def test_an_address_may_have_the_brackets_of_a_url_and_two_colons_are_everybody() -> None:
    try:
        listening = serving.listen("[::1]", 0)
    except SubspecError:
        pytest.skip("this machine has no IPv6")
    with listening:
        assert serving.address_of(listening).startswith("http://[::1]:")
    with serving.listen("::", 0) as both:
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, both.getsockname()[1]), timeout=5).close()


def test_no_collection_of_garbage_goes_through_what_the_engine_has_loaded() -> None:
    engine = SimpleNamespace(status=Status("loading"))
    loaded: list[list[int]] = [[] for _ in range(1000)]

    async def watch() -> tuple[int, bool]:
        said = list[str]()
        admission = SimpleNamespace(engine=engine)
        task = asyncio.create_task(
            serving.until_failed(admission, lambda one: said.append(one.phase))  # type: ignore[arg-type]
        )
        while "loading" not in said:
            await asyncio.sleep(0.01)
        assert gc.get_freeze_count() == before
        engine.status = Status("ready")
        while "ready" not in said:
            await asyncio.sleep(0.01)
        kept, engine.status = gc.get_freeze_count(), Status("failed")
        return kept, await task

    before = gc.get_freeze_count()
    try:
        kept, was_ready = asyncio.run(watch())
    finally:
        gc.unfreeze()
    assert kept > before + len(loaded) and was_ready


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_no_piece_of_an_answer_waits_for_the_receipt_of_the_last_one(host: str) -> None:
    try:
        listening = serving.listen(host, 0)
    except SubspecError:
        pytest.skip(f"this machine has no {host}")
    with listening, socket.create_connection(listening.getsockname()[:2]):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
