"""`subspec-serve` as a process of its own, and what it says about itself. Standard library only."""

import json
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
START_SECONDS = 120.0
STOP_SECONDS = 60.0
IDLE_SECONDS = 10.0  # until the last answer of a client that has gone is cancelled
IN_FLIGHT = ("num_requests_running", "num_requests_waiting")
SAMPLE = re.compile(r"^(subspec:\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Server:
    """base_url: without /v1."""

    base_url: str
    process: subprocess.Popen[bytes]


@contextmanager
def serving(command: Sequence[str], log: Path) -> Iterator[Server]:
    """Starts `command`, which has `--port 0 --log-format json`, and ends it with SIGTERM. What it
    writes goes to the end of `log`. Raises RuntimeError if it does not start, or does not end."""
    begin = log.stat().st_size if log.exists() else 0
    with log.open("ab") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        base_url = address_in(log, begin, process)
        wait_until_ready(base_url, process)
        yield Server(base_url, process)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(f"the server did not end within {STOP_SECONDS} s") from None


def address_in(log: Path, begin: int, process: "subprocess.Popen[bytes]") -> str:
    """The address that the server logs once it listens."""
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit and process.poll() is None:
        for line in log.read_bytes()[begin:].splitlines():
            with_address = line.startswith(b"{") and line.endswith(b"}") and b'"listening"' in line
            if with_address:
                return str(json.loads(line)["address"])
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start, see {log}")


def wait_until_ready(base_url: str, process: "subprocess.Popen[bytes]") -> None:
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit and process.poll() is None:
        try:
            get(f"{base_url}/health/ready")
            return
        except urllib.error.URLError:
            time.sleep(0.05)
    raise RuntimeError(f"the server at {base_url} did not get ready")


def get(url: str, key: str = "none") -> bytes:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        found: bytes = response.read()
    return found


def samples(base_url: str) -> dict[str, float]:
    """Of /metrics: `subspec:NAME`, with its labels' values behind a dot, -> value."""
    found: dict[str, float] = {}
    for name, labels, value in SAMPLE.findall(get(f"{base_url}/metrics").decode()):
        values = re.findall(r'"([^"]*)"', labels)
        key = ".".join([name.removeprefix("subspec:"), *values])
        found[key] = float(value)
    return found


def by_label(found: dict[str, float], name: str) -> dict[str, float]:
    """Of the samples of a counter, by its last label, as the status of an answer."""
    return {
        key.rpartition(".")[2]: value for key, value in found.items() if key.startswith(f"{name}.")
    }


def is_idle(base_url: str) -> bool:
    """Waits until no request runs or waits. Returns False if that takes too long."""
    limit = time.monotonic() + IDLE_SECONDS
    while time.monotonic() < limit:
        counts = [v for k, v in samples(base_url).items() if k.startswith(IN_FLIGHT)]
        if counts and not any(counts):
            return True
        time.sleep(0.1)
    return False
