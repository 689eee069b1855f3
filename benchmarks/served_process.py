"""A subspec-serve of this environment as a child process: started, asked over HTTP, looked at from
outside."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READY_SECONDS = 120.0
ADDRESS = re.compile(rb"http://127\.0\.0\.1:(\d+)")
JSON = dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """What the kernel says that a process holds."""

    resident_bytes: int
    peak_bytes: int  # of its resident set
    num_threads: int
    num_files: int


@dataclass(frozen=True)
class Served:
    process: "subprocess.Popen[bytes]"
    port: int
    log: Path

    def usage(self) -> Usage:
        folder = Path("/proc") / str(self.process.pid)
        lines = (folder / "status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        return Usage(
            resident_bytes=int(status["VmRSS"].split()[0]) * 1024,
            peak_bytes=int(status["VmHWM"].split()[0]) * 1024,
            num_threads=int(status["Threads"]),
            num_files=len(os.listdir(folder / "fd")),
        )

    def get(self, path: str) -> tuple[int, bytes]:
        return self.ask("GET", path)

    def post(self, path: str, body: JSON, timeout: float = 120.0) -> tuple[int, JSON]:
        status, raw = self.ask("POST", path, json.dumps(body).encode(), timeout)
        return status, json.loads(raw)

    def ask(
        self, method: str, path: str, body: bytes | None = None, timeout: float = 120.0
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            headers = {"content-type": "application/json"} if body is not None else {}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """The sum over the labels of one of /metrics."""
        lines = self.get("/metrics")[1].decode().splitlines()
        found = [line for line in lines if re.match(rf"subspec:{name}[ {{]", line)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def is_idle(self) -> bool:
        return not self.metric("num_requests_running") and not self.metric("num_requests_waiting")


@contextmanager
def served(
    artifact: Path,
    log: Path,
    options: Sequence[str] = (),
    enter: Callable[[], None] | None = None,
) -> Iterator[Served]:
    """A server that is ready. Killed at the end, if it has not ended by itself. enter: called in
    the child before the program starts."""
    program = Path(sys.executable).with_name("subspec-serve")
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [str(program), str(artifact), "--port", "0", "--no-record", "--no-replan", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            preexec_fn=enter,
        )
    try:
        yield when_ready(process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def when_ready(process: "subprocess.Popen[bytes]", log: Path) -> Served:
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.1)
        if (found := ADDRESS.search(log.read_bytes())) is not None:
            server = Served(process, int(found[1]), log)
            if server.get("/health/ready")[0] == 200:
                return server
    raise RuntimeError(f"the server did not start: {log.read_text('utf-8', 'replace')[-2000:]}")


def wait_until(happened: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if happened():
            return True
        time.sleep(0.1)
    return happened()
