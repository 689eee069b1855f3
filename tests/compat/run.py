"""Unmodified clients against a real `subspec-serve`: one line a client, then one JSON line.

    python tests/compat/run.py [CLIENT ...] [--bin DIR] [--folder DIR] [--smollm2 DIR]

Each client has a virtual environment of its own. Standard library only. The exit code is 1 if a
client failed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from clients import CLIENTS, Client, environment, program
from models import DEMO, HERE, ROOT, make_artifact
from server_process import by_label, is_idle, samples, serving

FAULTS = ("500", "502", "504")  # 503 is what a full server says
SERVE = ("--port", "0", "--log-format", "json", "--sequences", "2", "--queue", "2", "--no-record")


def run_script(
    python: Path, script: str, arguments: Sequence[str], limit_seconds: float, log: Path
) -> str:
    """What went wrong; "": nothing. The script's output goes to the end of `log`."""
    # No client may look for anything outside this machine, or find another one's files here.
    offline = {
        "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HOME": str(log.parent / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    (log.parent / "home").mkdir(exist_ok=True)
    command = [python, HERE / script, *arguments]
    with log.open("ab") as out:
        begin = out.tell()
        try:
            code = subprocess.run(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=limit_seconds,
                env={**os.environ, **offline},
            ).returncode
        except subprocess.TimeoutExpired:
            return f"{script} took more than {limit_seconds:.0f} s"
    if not code:
        return ""
    lines = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    return f"{script}: {lines[-1] if lines else f'exit code {code}'}"


def try_client(
    client: Client, base_url: str, folder: Path, checkpoint: Path, binaries: Path
) -> dict[str, Any]:
    """What its scripts said, and whether the server is as it was before them."""
    log = folder / f"{client.name}.log"
    log.unlink(missing_ok=True)
    arguments = [base_url, *(("--tokenizer", str(checkpoint)) if client.tokenizer else ())]
    try:
        python = environment(client, folder)
        if client.npm is not None:
            program_of_client, ours = program(client, folder), binaries.absolute() / "python"
            arguments += ["--program", str(program_of_client), "--python", str(ours)]
    except (RuntimeError, subprocess.CalledProcessError) as error:
        return not_tried(client.name, error)
    before, began = samples(base_url), time.monotonic()
    problems = [
        run_script(python, script, arguments, client.limit_seconds, log)
        for script in client.scripts
    ]
    seconds = time.monotonic() - began
    if not is_idle(base_url):
        problems.append("the server still answers a client that has gone")
    earlier = by_label(before, "http_responses_total")
    now = by_label(samples(base_url), "http_responses_total")
    answered = {status: count - earlier.get(status, 0) for status, count in now.items()}
    if faults := sum(answered.get(status, 0) for status in FAULTS):
        problems.append(f"the server answered {faults:.0f} requests with a fault of its own")
    problem = "; ".join(one for one in problems if one)
    return {
        "client": client.name,
        "ok": not problem,
        "requests": round(sum(answered.values())),
        "seconds": round(seconds, 1),
        **({"problem": problem} if problem else {}),
    }


def not_tried(name: str, error: Exception) -> dict[str, Any]:
    return {"client": name, "ok": False, "requests": 0, "seconds": 0.0, "problem": str(error)}


def try_clients(
    clients: Sequence[Client], name: str, checkpoint: Path, folder: Path, binaries: Path
) -> Iterator[dict[str, Any]]:
    """Of each client; clients: those that the artifact `name` answers."""
    waiting = list(clients)
    try:
        artifact = make_artifact(name, checkpoint, binaries, folder)
        command = [str(binaries / "subspec-serve"), str(artifact), *SERVE]
        with serving(command, folder / f"server-{name}.log") as server:
            read = folder / f"{name}-checkpoint"
            while waiting:
                result = try_client(waiting[0], server.base_url, folder, read, binaries)
                del waiting[0]
                yield result
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        # The server did not start, has gone or did not end: what others are asked still counts.
        names = [client.name for client in waiting] or [f"server of {name}"]
        yield from (not_tried(one, error) for one in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("clients", nargs="*", help=f"of {', '.join(c.name for c in CLIENTS)}")
    parser.add_argument("--bin", type=Path, default=ROOT / ".venv" / "bin", help="of subspec")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "compat")
    parser.add_argument("--smollm2", type=Path, default=ROOT / "build" / "smollm2")
    options = parser.parse_args()
    wanted = [one for one in CLIENTS if not options.clients or one.name in options.clients]
    if unknown := set(options.clients) - {one.name for one in CLIENTS}:
        parser.error(f"there is no client {sorted(unknown)[0]}")
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = {"demo": DEMO, "smollm2": options.smollm2}
    results = []
    for name, group in groupby(sorted(wanted, key=lambda one: one.model), lambda one: one.model):
        for result in try_clients(list(group), name, checkpoints[name], folder, options.bin):
            results.append(result)
            said = "ok" if result["ok"] else result["problem"]
            figures = f"{result['requests']} requests, {result['seconds']} s"
            print(f"{result['client']:12} {said} ({figures})", flush=True)
    print(json.dumps({"clients": results, "failed": sum(not one["ok"] for one in results)}))
    return int(any(not one["ok"] for one in results))


if __name__ == "__main__":
    sys.exit(main())
