"""Does the budget hold while several clients use a server for minutes?

    python benchmarks/mixed_load.py ARTIFACT [--minutes 10] [--clients 6] [--link-bandwidth 40MB]
                                    [--prefix-cache 8MB] [--seed 0]

Clients send chats, completions, JSON by a schema, long prompts, streamed and not, and leave some
of them. The process may hold what an idle interpreter holds, plus the plan's budget, the prefix
cache, and 64 MB. Each answer must be the one that its request got alone, before. The last line of
stdout is one JSON object; exit code 1 if something is wrong.
"""

import argparse
import http.client
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import memory_limit
from hostile_sockets import request
from served_process import Served, served, wait_until

from subspec.artifacts.common.sizes import parse_size

JSON = dict[str, Any]
# Beside the engine, what a server has imported.
IDLE = memory_limit.IDLE + "; import subspec.runtime.server.assembly, uvicorn, llguidance"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
BEGINNINGS = ("def read_file(path):", "class Queue:\n", "import os\n", "The weather is", "x = [")


def kinds(count: int) -> list[tuple[str, JSON]]:
    """Requests, each with a seed of its own."""
    found: list[tuple[str, JSON]] = []
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    for seed in range(count):
        text = BEGINNINGS[seed % len(BEGINNINGS)]
        drawn = {"temperature": (seed % 3) / 2, "seed": seed, "max_tokens": 10 + 5 * (seed % 7)}
        if seed % 4 == 0:
            text = text * (1 + seed % 9)
        chat = {"messages": [{"role": "user", "content": text}], **drawn}
        found.append(("/v1/completions", {"prompt": text, **drawn}))
        found.append(("/v1/chat/completions", chat))
        found.append(("/v1/chat/completions", {**chat, "response_format": form}))
    return found


def answer_of(body: JSON) -> str:
    choice = body["choices"][0]
    return str(choice.get("text", choice.get("message", {}).get("content")))


def streamed(server: Served, path: str, body: JSON) -> str:
    raw = json.dumps({**body, "stream": True}).encode()
    said = server.ask("POST", path, raw)[1].decode()
    chunks = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    return "".join(one.get("text", one.get("delta", {}).get("content", "")) for one in choices)


def answered(server: Served, how: str, path: str, body: JSON) -> str:
    """The answer's text, or what came in its place."""
    try:
        if how == "streamed":
            return streamed(server, path, body)
        status, got = server.post(path, body)
        return answer_of(got) if status == 200 else f"{status} {got}"
    except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
        return repr(error)


def leave(server: Served, path: str, body: JSON, seconds: float) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as one:
        one.sendall(request(path, **body, stream=True))
        time.sleep(seconds)


def client(
    server: Served,
    known: list[tuple[str, JSON, str]],
    until: float,
    chance: random.Random,
    counts: Counter[str],
    wrong: list[str],
) -> None:
    while time.monotonic() < until:
        path, body, expected = chance.choice(known)
        how = chance.choice(("whole", "streamed", "left"))
        if how == "left":
            with suppress(OSError):
                leave(server, path, body, chance.random())
        else:
            found = answered(server, how, path, body)
            if found != expected:
                wrong.append(f"{how} {path} {body}: {found!r}, alone {expected!r}")
        counts[how] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--link-bandwidth", default="40MB")
    parser.add_argument("--prefix-cache", default="8MB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("build/mixed-load.log"))
    given = parser.parse_args()
    given.log.parent.mkdir(parents=True, exist_ok=True)
    budget = json.loads((given.artifact / "plan.json").read_text("utf-8"))["budget_bytes"]
    cache = parse_size(given.prefix_cache)
    idle = memory_limit.idle_bytes(IDLE)
    limit = idle + budget + cache + memory_limit.ALLOWANCE_BYTES
    counts, wrong, resident = Counter[str](), list[str](), list[int]()
    options = ["--link-bandwidth", given.link_bandwidth, "--prefix-cache", given.prefix_cache]
    with served(given.artifact, given.log, options) as server:
        known = [(path, body, answer_of(server.post(path, body)[1])) for path, body in kinds(12)]
        until = time.monotonic() + given.minutes * 60
        threads = [
            threading.Thread(
                target=client,
                args=(server, known, until, random.Random(given.seed + one), counts, wrong),
            )
            for one in range(given.clients)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            resident.append(server.usage().resident_bytes)
            time.sleep(1)
        if not wait_until(server.is_idle, 10):
            wrong.append("requests are left in the engine or its queue")
        peak = server.usage().peak_bytes
    holds = peak <= limit
    print(f"peak {peak / 1e6:.0f} MB of {limit / 1e6:.0f} MB: {'holds' if holds else 'TOO MUCH'}")
    for line in wrong[:5]:
        print(f"WRONG: {line[:500]}")
    middle = resident[len(resident) // 2] if resident else 0
    print(
        json.dumps(
            {
                "minutes": given.minutes,
                "answers": dict(counts),
                "wrong": len(wrong),
                "idle_bytes": idle,
                "budget_bytes": budget,
                "prefix_cache_bytes": cache,
                "limit_bytes": limit,
                "peak_bytes": peak,
                "resident_bytes": {"half_time": middle, "end": resident[-1] if resident else 0},
                "holds": holds,
            }
        )
    )
    return 0 if holds and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
