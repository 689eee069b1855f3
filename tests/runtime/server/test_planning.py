"""The server while subspec-plan runs: it listens, says so, and serves when there is a plan."""

import http.client
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import demo_artifact, own_cache

WAITING_PLANNER = """
import pathlib, shutil, sys, time
source, gate, *words = sys.argv[1:]
while not pathlib.Path(gate).exists():
    time.sleep(0.01)
shutil.copytree(source, words[words.index("--out") + 1])
print("{}")
"""
SERVER = """
import json, sys
from subspec.runtime.app import planner_command
planner_command.PLANNER = json.loads(sys.argv[1])
from subspec.runtime.server.cli import main
main(sys.argv[2:])
"""


def test_it_listens_while_it_plans_and_then_serves(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache(tmp_path, monkeypatch)
    demo, gate = demo_artifact(tmp_path_factory.getbasetemp()), tmp_path / "gate"
    planner = [sys.executable, "-c", WAITING_PLANNER, str(demo), str(gate)]
    words = ["--model", "demo", "--vram", "9MB", "--sequences", "1", "--port", "0", "--no-replan"]
    command = [sys.executable, "-c", SERVER, json.dumps(planner), *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        try:
            lines = iter(child.stderr)
            address = re.search(r"http://(\S+)", next(lines))
            assert address is not None
            host = address[1]
            assert any("planning demo for 9.00 MB" in line for line in lines)

            def ask(path: str, method: str = "GET") -> tuple[int, str]:
                connection = http.client.HTTPConnection(host, timeout=30)
                connection.request(method, path)
                response = connection.getresponse()
                found = response.status, response.read().decode()
                connection.close()
                return found

            assert ask("/health") == (200, '{"status":"ok","engine":"planning"}')
            assert ask("/")[0] == ask("/", "HEAD")[0] == 200
            for path in ("/health/ready", "/v1/models", "/props"):
                status, body = ask(path)
                assert status == 503 and "Loading model" in body
            gate.touch()
            assert any(" ready on " in line for line in lines)
            assert ask("/health") == (200, '{"status":"ok","engine":"ready"}')
            assert ask("/v1/models")[0] == ask("/", "HEAD")[0] == 200
            child.send_signal(signal.SIGTERM)
            assert child.wait(20) == 0
        finally:
            child.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_while_it_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    own_cache(tmp_path, monkeypatch)
    planner = [sys.executable, "-c", WAITING_PLANNER, "nothing", str(tmp_path / "gate")]
    words = ["--model", "demo", "--vram", "9MB", "--port", "0"]
    command = [sys.executable, "-c", SERVER, json.dumps(planner), *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert any("planning demo" in line for line in child.stderr)
        child.send_signal(number)
        rest = child.stderr.read()
        assert child.wait(20) == code
    assert "Traceback" not in rest
