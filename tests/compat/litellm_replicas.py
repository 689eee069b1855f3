"""Two replicas of one artifact behind a LiteLLM proxy, as in examples/litellm_router.yaml: routing
by model, one killed while it answers, a rolling restart.

    python tests/compat/litellm_replicas.py ARTIFACT SUBSPEC_SERVE LITELLM FOLDER

Standard library only; LITELLM is the proxy's command in an environment of its own. FOLDER: logs.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from load import ask, check_disconnect, load, wait_for_answers
from server_process import ROOT, get, samples, wait_until_ready

KEY = f"sk-{secrets.token_hex(16)}"  # of the proxy
MODEL = "qwen2.5-32b"  # as in the example, whatever answers
CONFIG = ROOT / "examples" / "litellm_router.yaml"
COOLDOWN_SECONDS = 6.0  # a little more than the example's
PROXY_START_SECONDS = 180.0


class Replica:
    """A `subspec-serve` that can be started again on its port."""

    def __init__(self, command: str, artifact: str, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [command, artifact, "--port", str(self.port), "--model-name", MODEL]
        self._command += ["--queue", "16", "--no-record"]
        self._log = log
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(self._command, stderr=out)
        wait_until_ready(self.url, self.process)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)

    @property
    def num_answered(self) -> float:
        found = samples(self.url)
        return sum(v for k, v in found.items() if k.startswith("request_success_total"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def start_proxy(command: str, replicas: list[Replica], log: Path) -> tuple[str, subprocess.Popen]:
    port = free_port()
    settings = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HOME": str(log.parent),
        "NO_PROXY": "*",
        "PROXY_KEY": KEY,
    }
    settings |= {f"REPLICA_{n}": f"{one.url}/v1" for n, one in enumerate(replicas, 1)}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [command, "--config", CONFIG, "--host", "127.0.0.1", "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings},
        )
    url, limit = f"http://127.0.0.1:{port}", time.monotonic() + PROXY_START_SECONDS
    while True:
        try:
            get(f"{url}/health/liveliness")
            return url, process
        except OSError:
            assert process.poll() is None and time.monotonic() < limit, f"no proxy, see {log}"
            time.sleep(0.2)


def check_routing(url: str, replicas: list[Replica]) -> None:
    """Chats are shared out among the replicas; a model that nobody has is refused."""
    listed = json.loads(get(f"{url}/v1/models", KEY))["data"]
    assert [one["id"] for one in listed] == [MODEL], listed
    with load(url, MODEL, num_clients=4, key=KEY) as found:
        wait_for_answers(found, 12)
    assert not found.failures, found.failures
    shares = [one.num_answered for one in replicas]
    assert all(shares), shares
    try:
        ask(url, "another-model", KEY)
    except urllib.error.HTTPError as error:
        assert error.code in (400, 404), error
    else:
        raise AssertionError("another model was found")
    print(f"litellm proxy: {found.answered} chats, by replica {shares}", flush=True)


def check_kill(url: str, replicas: list[Replica]) -> None:
    """Who asks the proxy sees nothing of it: what the dead replica had begun is asked again."""
    first = replicas[0]
    with load(url, MODEL, num_clients=4, key=KEY) as found:
        wait_for_answers(found, 4)
        first.process.kill()
        first.process.wait()
        wait_for_answers(found, 12)
        first.start()
        time.sleep(COOLDOWN_SECONDS)
        wait_for_answers(found, 8)
    assert not found.failures, found.failures
    assert first.num_answered, "the replica that came back is not asked"
    print(f"litellm proxy: {found.answered} chats around a kill, none lost", flush=True)


def check_rolling_restart(url: str, replicas: list[Replica]) -> None:
    with load(url, MODEL, num_clients=3, key=KEY) as found:
        for replica in replicas:
            wait_for_answers(found, 3)
            code = replica.stop()
            assert code == 0, f"the replica ended with {code}"
            wait_for_answers(found, 3)
            replica.start()
            time.sleep(COOLDOWN_SECONDS)
    assert not found.failures, found.failures
    print(f"litellm proxy: {found.answered} chats in a rolling restart, none lost", flush=True)


def main() -> None:
    artifact, command, proxy_command, place = sys.argv[1:]
    folder = Path(place)
    with ExitStack() as ends:
        replicas = []
        for number in (1, 2):
            replicas.append(Replica(command, artifact, folder / f"replica-{number}.log"))
            ends.callback(replicas[-1].stop)
        url, proxy = start_proxy(proxy_command, replicas, folder / "litellm-proxy-server.log")
        ends.callback(proxy.wait, 60)
        ends.callback(proxy.terminate)
        check_routing(url, replicas)
        check_disconnect(url, MODEL, [one.url for one in replicas], KEY)
        check_kill(url, replicas)
        check_rolling_restart(url, replicas)


if __name__ == "__main__":
    main()
