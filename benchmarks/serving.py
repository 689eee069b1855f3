"""Several clients of one subspec-serve: tokens per second together, and whether each answer is the
one that it is alone.

    python benchmarks/serving.py ARTIFACT [--clients 1,2,4,8] [--tokens 64] [--prompts 8]
                                          [--link-bandwidth SIZE]

The same prompts (of benchmarks/prompts.jsonl) are asked for by 1 client, one after the other, then
by 2, 4 and 8 at a time, greedily, over HTTP. Texts must be equal. What is divided: all tokens of
the answers, by the time from the first request to the end of the last answer, prompts included. The
last line of stdout is one JSON object.
"""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import click

PROMPTS = Path(__file__).with_name("prompts.jsonl")
STARTS_WITHIN_SECONDS = 300
ANSWERS_WITHIN_SECONDS = 900


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int
    first_token_seconds: float  # from the request


@dataclass(frozen=True)
class Load:
    """All prompts, by so many clients."""

    clients: int
    seconds: float
    tokens: int
    tokens_per_second: float
    against_one: float
    worst_first_token_seconds: float
    equal: int  # answers with the text that they have alone


@click.command()
@click.argument("artifact", type=click.Path(exists=True, path_type=Path))
@click.option("--clients", default="1,2,4,8", help="How many at a time, in turn; the first is 1.")
@click.option("--tokens", default=64, help="Longest answer.")
@click.option("--prompts", default=8, help="How many.")
@click.option("--link-bandwidth", help="As in subspec-serve.", metavar="SIZE")
def main(
    artifact: Path, clients: str, tokens: int, prompts: int, link_bandwidth: str | None
) -> None:
    numbers = [int(one) for one in clients.split(",")]
    if numbers[0] != 1:
        raise click.BadParameter("the first number of --clients must be 1")
    asked = questions(prompts)
    link = ["--link-bandwidth", link_bandwidth] if link_bandwidth else []
    with served(artifact, link) as address:
        loads = measured(address, asked, tokens, numbers)
        info = fetched(f"{address}/props")
    print(f"{'clients':>7} {'tokens/s':>9} {'against 1':>9} {'first token':>12}  equal")
    for one in loads:
        print(
            f"{one.clients:>7} {one.tokens_per_second:>9.2f} {one.against_one:>8.2f}x "
            f"{one.worst_first_token_seconds:>10.1f} s  {one.equal} of {len(asked)}"
        )
    found = {
        "schema": "subspec.serving/1",
        "sequences": info["total_slots"],
        "memory": info["memory"],
        "loads": [asdict(one) for one in loads],
    }
    print(json.dumps(found))
    if any(one.equal < len(asked) for one in loads):
        sys.exit("answers in a batch differ from those alone")


def questions(count: int) -> list[list[dict[str, str]]]:
    """Messages of prompts of one turn."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    texts = [one["chat"] for one in found if isinstance(one.get("chat"), str)]
    return [[{"role": "user", "content": text}] for text in texts[:count]]


@contextmanager
def served(artifact: Path, options: Sequence[str]) -> Iterator[str]:
    """A server of the artifact that is ready; its address."""
    command = [sys.executable, "-m", "subspec.runtime.server", str(artifact), "--port", "0"]
    command += ["--no-record", "--log-format", "json", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            yield address_when_ready(server)
        finally:
            server.terminate()
            server.wait(60)


def address_when_ready(server: "subprocess.Popen[str]") -> str:
    assert server.stderr is not None
    until = time.monotonic() + STARTS_WITHIN_SECONDS
    for line in server.stderr:
        sys.stderr.write(line)
        found = json.loads(line) if line.startswith("{") else {}
        if found.get("message") == "ready":
            Thread(target=server.stderr.read, daemon=True).start()  # else its pipe would fill
            return str(found["address"])
        if time.monotonic() > until:
            break
    raise SystemExit("the server did not become ready")


def measured(
    address: str, asked: list[list[dict[str, str]]], tokens: int, numbers: Sequence[int]
) -> list[Load]:
    ask(address, asked[0], 4)  # the first answer also waits for digests
    loads, alone = list[Load](), list[Answer]()
    for clients in numbers:
        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(lambda messages: ask(address, messages, tokens), asked))
        seconds = time.monotonic() - began
        alone = alone or answers
        count = sum(answer.num_tokens for answer in answers)
        rate = count / seconds
        loads.append(
            Load(
                clients,
                seconds,
                count,
                rate,
                rate / loads[0].tokens_per_second if loads else 1.0,
                max(answer.first_token_seconds for answer in answers),
                sum(a.text == b.text for a, b in zip(answers, alone, strict=True)),
            )
        )
    return loads


def ask(address: str, messages: list[dict[str, str]], tokens: int) -> Answer:
    body = {"messages": messages, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=ANSWERS_WITHIN_SECONDS) as response:
        answer = json.load(response)
    text, count = answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]
    return Answer(text, count, answer["metrics"]["time_to_first_token_ms"] / 1000)


def fetched(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=30) as response:
        return json.load(response)


if __name__ == "__main__":
    main()
