"""Two replicas of one artifact on Ray Serve, as in examples/ray_serve.py: routing by model, one
killed while it answers, a rolling restart.

    python tests/compat/ray_replicas.py ARTIFACT SUBSPEC_SERVE

Runs in an environment with `ray[serve]` and `httpx`. The clients ask again as openai-python does:
what a replica had begun is lost with it.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import ray
from load import ask, check_disconnect, load, wait_for_answers
from ray import serve
from server_process import ROOT, get

EXAMPLES = str(ROOT / "examples")
sys.path.insert(0, EXAMPLES)
from ray_serve import replicas  # noqa: E402

PATH = "/demo"  # each model has its own
PLACE = {"env_vars": {"PYTHONPATH": EXAMPLES}}
NUM_CLIENTS = 4
NUM_RETRIES = 5
START_SECONDS = 120.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def processes(artifact: str) -> dict[int, str]:
    """Of `subspec-serve` with this artifact: process id -> address."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if artifact in words and "--port" in words:
            port = words[words.index("--port") + 1]
            found[int(path.parent.name)] = f"http://127.0.0.1:{port}"
    return found


def deploy(artifact: str, command: str, revision: str) -> None:
    arguments = {"artifact": artifact, "command": command, "revision": revision}
    serve.run(replicas(arguments), name="demo", route_prefix=PATH)


def check_routing(url: str, artifact: str) -> str:
    """The model's id. The path says which model it is."""
    model: str = json.loads(get(f"{url}/v1/models"))["data"][0]["id"]
    with load(url, model, NUM_CLIENTS) as found:
        wait_for_answers(found, 12)
    assert not found.failures, found.failures
    assert len(processes(artifact)) == 2
    try:
        ask(url.removesuffix(PATH) + "/another", model)
    except OSError as error:
        assert "404" in str(error), error
    else:
        raise AssertionError("another model was found")
    print(f"ray serve: {found.answered} chats", flush=True)
    return model


def check_kill(url: str, model: str, artifact: str, of_ray: bool) -> None:
    """of_ray: Ray's process is killed, whose child the server is; else the server."""
    before = processes(artifact)
    victim = min(before)
    if of_ray:
        victim = int(Path(f"/proc/{victim}/stat").read_text().rsplit(")")[-1].split()[1])
    with load(url, model, NUM_CLIENTS, NUM_RETRIES) as found:
        wait_for_answers(found, 4)
        os.kill(victim, signal.SIGKILL)
        wait_for_answers(found, 12)
        wait_for_another(artifact, before)
        wait_for_answers(found, 8)
    assert not found.failures, found.failures
    print(f"ray serve: {found.answered} chats around a kill, {found.retries} retries", flush=True)


def wait_for_another(artifact: str, before: dict[int, str]) -> None:
    """Until Ray has started a replica in place of the dead one."""
    limit = time.monotonic() + START_SECONDS
    while not (len(now := processes(artifact)) == 2 and now.keys() - before):
        assert time.monotonic() < limit, now
        time.sleep(0.2)


def check_rolling_restart(url: str, model: str, artifact: str, command: str) -> None:
    before = processes(artifact)
    with load(url, model, NUM_CLIENTS, NUM_RETRIES) as found:
        wait_for_answers(found, 4)
        deploy(artifact, command, "2")
        wait_for_answers(found, 8)
    assert not found.failures, found.failures
    now = processes(artifact)
    assert len(now) == 2 and not now.keys() & before, (before, now)
    print(f"ray serve: {found.answered} chats in a rolling restart, {found.retries} retries")


def main() -> None:
    artifact, command = sys.argv[1:]
    port = free_port()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=PLACE)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deploy(artifact, command, "1")
        url = f"http://127.0.0.1:{port}{PATH}"
        model = check_routing(url, artifact)
        check_disconnect(url, model, list(processes(artifact).values()))
        check_kill(url, model, artifact, of_ray=False)
        check_kill(url, model, artifact, of_ray=True)
        check_rolling_restart(url, model, artifact, command)
    finally:
        serve.shutdown()
        ray.shutdown()
    time.sleep(1)
    assert not processes(artifact), "a replica outlives Ray"


if __name__ == "__main__":
    main()
