"""Does a server survive its clients?

    python benchmarks/hostile_server.py ARTIFACT [--link-bandwidth 40MB] [--requests 1000]
                                        [--clients 12] [--seed 0]

Starts subspec-serve and sends it what no client should: bodies of wrong types, sizes and nesting,
grammars and tools (hostile_bodies.py), and connections that dawdle, break the protocol or leave at
every stage (hostile_sockets.py), in one shuffled order, twice. Meanwhile /health is asked all the
time by another process. Afterwards nothing may have failed but the requests, nothing may be left
behind, a second round may take no more memory than the first, and a usual request must have the
answer that it had before.

Says what it found; the last line of stdout is one JSON object; exit code 1 if something is wrong.
"""

import argparse
import http.client
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hostile_bodies import Body, bodies
from hostile_sockets import Attack, attacks
from served_process import Served, Usage, served, wait_until

from subspec.runtime.server.serving import TRIM_SECONDS

JSON = dict[str, Any]
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
# Why a server may say that it cannot: the queue is full, bodies or connections are too many.
MEANT = (b'"queue_full"', b'"overloaded"', b'"overloaded_error"', b"Service Unavailable")
HEALTH_SECONDS = 0.05
MAX_GROWTH = 16 << 20  # bytes of memory that a second round of the same may add
SETTLED_SECONDS = 30.0  # until connections that were left are closed
USUAL = {"prompt": "def read_file(path):", "max_tokens": 60, "logprobs": 2, "temperature": 0.8,
         "seed": 7}  # fmt: skip
WATCH = """
import http.client, sys, time
while True:
    began, connection = time.monotonic(), http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except OSError:
        status = 0
    connection.close()
    print(status, time.monotonic() - began, flush=True)
    time.sleep(0.02)
"""


@dataclass
class Found:
    """statuses: of responses; 0: there was none. failed: 5xx that are not meant."""

    statuses: Counter[int] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    slowest: list[tuple[float, str]] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--link-bandwidth", default="40MB")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("build/hostile-server.log"))
    given = parser.parse_args()
    given.log.parent.mkdir(parents=True, exist_ok=True)
    options = ["--link-bandwidth", given.link_bandwidth]
    with served(given.artifact, given.log, options) as server:
        before = answers(server)
        todo = chosen(server, given.requests, given.seed)
        print(f"{len(todo)} requests, twice, by {given.clients} clients at once")
        rounds, usages = [], [settled(server)]
        with watched(server) as health:
            for _ in range(2):
                rounds.append(attacked(server, todo, given.clients))
                usages.append(settled(server))
        after = answers(server)
        left = server.is_idle()
    log = given.log.read_text("utf-8", "replace")
    problems = list(judge(rounds, usages, health, before == after, left, log))
    for line in problems:
        print(f"WRONG: {line}")
    print(json.dumps(summary(todo, rounds, usages, health, problems)))
    return 1 if problems else 0


def answers(server: Served) -> list[JSON]:
    """Of usual requests, as many at once as there are sequences: tokens and their probabilities."""
    num = json.loads(server.get("/props")[1])["total_slots"]
    with ThreadPoolExecutor(num) as threads:
        found = list(threads.map(lambda _: server.post("/v1/completions", USUAL), range(num)))
    assert all(status == 200 for status, _ in found), found
    return [body["choices"][0] for _, body in found]


def chosen(server: Served, count: int, seed: int) -> list[Body | Attack]:
    """Every attack on the protocol, and bodies up to `count`, in one order."""
    described = json.loads(server.get("/openapi.json")[1])
    schemas = {}
    for path, methods in described["paths"].items():
        if "post" in methods:
            content = methods["post"]["requestBody"]["content"]["application/json"]
            name = content["schema"]["$ref"].rpartition("/")[2]
            schemas[path] = described["components"]["schemas"][name]
    every, order = list(bodies(schemas)), random.Random(seed)
    on_protocol = list(attacks())
    num_bodies = max(0, count - len(on_protocol))
    todo: list[Body | Attack] = [*on_protocol, *order.sample(every, min(num_bodies, len(every)))]
    order.shuffle(todo)
    return todo


def attacked(server: Served, todo: list[Body | Attack], num_clients: int) -> Found:
    found = Found()

    def one(attack: Body | Attack) -> None:
        began = time.monotonic()
        if isinstance(attack, Body):
            name, raw = f"{attack.path} {attack.name}", sent(server, attack)
        else:
            name = attack.name
            try:
                raw = attack.run(server.port)
            except OSError as error:
                raw = repr(error).encode()
        statuses = [int(status) for status in STATUS.findall(raw)]
        found.statuses.update(statuses or [0])
        if any(s >= 500 and s != 503 for s in statuses) or (
            503 in statuses and not any(code in raw for code in MEANT)
        ):
            found.failed.append(f"{name}: {raw[-300:]!r}")
        found.slowest.append((round(time.monotonic() - began, 2), name))

    with ThreadPoolExecutor(num_clients) as threads:
        list(threads.map(one, todo))
    found.slowest.sort(reverse=True)
    return found


def sent(server: Served, attack: Body) -> bytes:
    """The whole response, with its status line."""

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    try:
        headers = {"content-type": "application/json", **dict(attack.headers)}
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        connection.request("POST", attack.path, attack.raw, encoded)
        response = connection.getresponse()
        return f"HTTP/1.1 {response.status} \r\n\r\n".encode() + response.read()
    except (OSError, http.client.HTTPException) as error:
        return repr(error).encode()
    finally:
        connection.close()


def settled(server: Served) -> Usage:
    """Once nothing runs any more, the number of open files no longer falls, and the C heap's free
    pages have gone back to the system."""
    wait_until(server.is_idle, SETTLED_SECONDS)
    counts = []

    def is_level() -> bool:
        counts.append(server.usage().num_files)
        return len(counts) > 20 and len(set(counts[-20:])) == 1

    wait_until(is_level, SETTLED_SECONDS)
    time.sleep(TRIM_SECONDS + 1)
    return server.usage()


@contextmanager
def watched(server: Served) -> Iterator[list[tuple[int, float]]]:
    """Status and seconds of /health, asked all the time; complete when the block has ended."""
    found: list[tuple[int, float]] = []
    words = [sys.executable, "-c", WATCH, str(server.port)]
    watcher = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        yield found
    finally:
        watcher.terminate()
        said, _ = watcher.communicate()
        pairs = (line.split() for line in said.splitlines())
        found += [(int(pair[0]), float(pair[1])) for pair in pairs if len(pair) == 2]


def judge(
    rounds: list[Found],
    usages: list[Usage],
    health: list[tuple[int, float]],
    same_answers: bool,
    is_idle: bool,
    log: str,
) -> Iterator[str]:
    for found in rounds:
        yield from found.failed
    yield from (f"a traceback in the log: {one[-400:]}" for one in log.split("Traceback")[1:4])
    if not same_answers:
        yield "a usual request has another answer than before"
    if not is_idle:
        yield "requests are left in the engine or its queue"
    for what in ("num_files", "num_threads"):
        first, *_, last = (getattr(usage, what) for usage in usages[1:])
        if last > first:
            yield f"{what} was {first} after the first round and is {last} after the second"
    grown = usages[2].resident_bytes - usages[1].resident_bytes
    if grown > MAX_GROWTH:
        yield f"a second round of the same took {grown / 1e6:.1f} MB more"
    if health_p99(health) > HEALTH_SECONDS:
        yield f"/health took {health_p99(health) * 1e3:.0f} ms at the 99th percentile"
    if bad := [status for status, _ in health if status != 200]:
        yield f"/health was not 200 {len(bad)} times: {Counter(bad)}"


def health_p99(health: list[tuple[int, float]]) -> float:
    return statistics.quantiles((seconds for _, seconds in health), n=100)[98]


def summary(
    todo: list[Body | Attack],
    rounds: list[Found],
    usages: list[Usage],
    health: list[tuple[int, float]],
    problems: list[str],
) -> JSON:
    return {
        "requests": len(todo) * len(rounds),
        "statuses": dict(sorted(sum((one.statuses for one in rounds), Counter()).items())),
        "usage": [asdict(usage) for usage in usages],
        "health_ms": {
            "count": len(health),
            "p99": round(health_p99(health) * 1e3, 1),
            "most": round(max(seconds for _, seconds in health) * 1e3, 1),
        },
        "slowest": list(itertools.islice(rounds[0].slowest, 8)),
        "problems": problems,
    }


if __name__ == "__main__":
    sys.exit(main())
