"""Chats that are asked again and again, and what became of them. Standard library only."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from server_process import is_idle

ANSWER_SECONDS = 120.0
RETRY_SECONDS = 0.5


@dataclass
class Load:
    """answered: chats that came to an end. retries: of those, how often one was asked again.
    failures: what was said of the others."""

    answered: int = 0
    retries: int = 0
    failures: list[str] = field(default_factory=list)


def chat_request(
    url: str, model: str, key: str, num_tokens: int | None, stream: bool
) -> urllib.request.Request:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Count the stars."}],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": stream,
    }
    return urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {key}"},
    )


def ask(url: str, model: str, key: str = "none", num_tokens: int = 40) -> int:
    """The answer's tokens. Raises OSError."""
    request = chat_request(url, model, key, num_tokens, stream=False)
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
        return int(json.load(response)["usage"]["completion_tokens"])


def check_disconnect(url: str, model: str, replicas: list[str], key: str = "none") -> None:
    """The replicas at these addresses end an answer whose client goes away from the router."""
    request = chat_request(url, model, key, None, stream=True)
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
        while b"content" not in response.readline():
            pass
    assert all([is_idle(replica) for replica in replicas]), "an answer goes on without its client"


@contextmanager
def load(
    url: str, model: str, num_clients: int, num_retries: int = 0, key: str = "none"
) -> Iterator[Load]:
    """Clients that ask until the block is left. num_retries: of a client's library, after a 5xx or
    a lost connection, as openai-python does."""
    found, lock, over = Load(), threading.Lock(), threading.Event()

    def client() -> None:
        while not over.is_set():
            for retry in range(num_retries + 1):
                try:
                    ask(url, model, key)
                except OSError as error:
                    body = error.read()[:300] if isinstance(error, urllib.error.HTTPError) else b""
                    if retry == num_retries:
                        with lock:
                            found.failures.append(f"{error} {body.decode(errors='replace')}")
                    time.sleep(RETRY_SECONDS * 2**retry)
                    continue
                with lock:
                    found.answered += 1
                    found.retries += retry
                break

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        over.set()
        for thread in threads:
            thread.join()


def wait_for_answers(found: Load, count: int) -> None:
    """Until `count` more chats have been answered."""
    wanted, limit = found.answered + count, time.monotonic() + ANSWER_SECONDS
    while found.answered < wanted:
        assert time.monotonic() < limit, f"only {found.answered} answers, and {found.failures[-3:]}"
        time.sleep(0.05)
