"""What the scripts of coding agents share. Standard library only."""

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from server_process import by_label, get, samples, serving

HERE = Path(__file__).parent
AGENT_SECONDS = 240.0
SAID = "It says forty-two."


@dataclass(frozen=True)
class Agent:
    """base_url: of the real server. program: the agent. python: one that has subspec."""

    base_url: str
    program: str
    python: str

    @property
    def model_id(self) -> str:
        return model_at(self.base_url)


def read_agent(description: str | None) -> Agent:
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("base_url")
    parser.add_argument("--program", required=True)
    parser.add_argument("--python", required=True)
    options = parser.parse_args()
    return Agent(options.base_url, options.program, options.python)


def model_at(base_url: str) -> str:
    return str(json.loads(get(f"{base_url}/v1/models"))["data"][0]["id"])


def run(command: Sequence[str], **environment: str) -> str:
    """What it printed, in a folder of its own. Raises AssertionError unless that is something."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=AGENT_SECONDS,
            env={**os.environ, **environment},
            text=True,
        )
    print(done.stdout, flush=True)
    assert done.stdout, f"{command[0]} printed nothing, exit code {done.returncode}"
    return done.stdout


def events_in(printed: str) -> list[dict[str, object]]:
    """Of an output that has one JSON object a line, and words between them."""
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


@contextmanager
def told_to_call(agent: Agent, tool: str, arguments: dict[str, str]) -> Iterator[str]:
    """The address of a server whose model calls `tool` and then says SAID. Raises AssertionError at
    the end unless it was asked twice and answered nothing but 200."""
    call = json.dumps({"name": tool, "arguments": arguments})
    answers = [f"I look.\n<tool_call>\n{call}\n</tool_call>", SAID]
    command = [agent.python, str(HERE / "scripted_model.py"), json.dumps(answers)]
    with tempfile.TemporaryDirectory() as folder:
        with serving(command, Path(folder) / "server.log") as server:
            yield server.base_url
            found = samples(server.base_url)
    assert set(by_label(found, "http_responses_total")) == {"200"}, found
    assert sum(by_label(found, "request_success_total").values()) == 2, found
