"""The agent of examples/ against a server that plays given calls."""

import importlib.util
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "agent.py"
NO_TOOLS = "tools cannot be honoured: the model's chat template has no place for them"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def agent() -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("agent_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


@dataclass
class Script:
    """calls: what the model calls, one after the other. with_tools: whether its template has a
    place for them."""

    calls: Sequence[tuple[str, dict[str, str]]]
    with_tools: bool = True
    cut: bool = False  # the last call, by max_tokens
    models: tuple[int, Any] = (200, {"data": [{"id": "tiny"}]})  # status and body of /models
    requests: list[dict[str, Any]] = field(default_factory=list)
    base_url: str = ""

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if "tools" in body and not self.with_tools:
            return 400, {"error": {"message": NO_TOOLS, "code": None}}
        self.requests.append(body)
        name, arguments = self.calls[len(self.requests) - 1]
        message: dict[str, Any] = {"role": "assistant", "content": None}
        if "tools" in body:
            function = {"name": name, "arguments": json.dumps(arguments)}
            call = {"id": f"call_{len(self.requests)}", "type": "function", "function": function}
            message["tool_calls"] = [call]
        else:
            message["content"] = json.dumps({"tool": name, "arguments": arguments})
        draft = {"mean_acceptance_length": 3.5}
        metrics = {"tokens_per_second": 12.0, "speculative_decoding": draft}
        reason = "stop"
        if self.cut and len(self.requests) == len(self.calls):
            reason = "length"
            written = message["tool_calls"][0]["function"] if "tools" in body else message
            key = "arguments" if "tools" in body else "content"
            written[key] = written[key][:-9]
        choice = {"message": message, "finish_reason": reason}
        return 200, {"choices": [choice], "usage": {"completion_tokens": 9}, "metrics": metrics}


@contextmanager
def serving(script: Script) -> Iterator[Script]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.give(*script.models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.give(*script.answer(body))

        def give(self, status: int, value: Any) -> None:
            raw = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        script.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        try:
            yield script
        finally:
            server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.md").write_text("one\ntwo\n")
    (tmp_path / "b.md").write_text("three\n")
    return tmp_path


CALLS = [
    ("list_files", {}),
    ("count_lines", {"name": "a.md"}),
    ("calculate", {"expression": "2 + 1"}),
    ("final_answer", {"answer": "3 lines"}),
]


@pytest.mark.parametrize("with_tools", [True, False])
def test_calls_are_run_and_their_results_go_back(
    agent: ModuleType, folder: Path, capsys: Capture, with_tools: bool
) -> None:
    with serving(Script(CALLS, with_tools)) as script:
        agent.main(["count", "--base-url", script.base_url, "--folder", str(folder)])
    said = capsys.readouterr()
    assert said.out == "3 lines\n"
    assert ("asked for as JSON" in said.err) == (not with_tools)
    assert "12.0 tokens/s, 3.5 tokens per round" in said.err
    last = script.requests[-1]["messages"]
    results = [message["content"] for message in last if message["role"] != "assistant"][2:]
    assert [one.removeprefix("The result of ").partition(": ")[2] or one for one in results] == [
        "a.md\nb.md", "2", "3",
    ]  # fmt: skip
    assert ("tools" in script.requests[0]) == with_tools
    assert ("response_format" in script.requests[0]) == (not with_tools)


def test_the_last_step_can_only_be_the_answer(agent: ModuleType, folder: Path) -> None:
    calls = [("list_files", {}), ("final_answer", {"answer": "done"})]
    with serving(Script(calls)) as script:
        server = agent.Server(script.base_url, "tiny")
        assert agent.solve(server, "task", agent.tools_over(folder), 2) == "done"
    offered = [[one["function"]["name"] for one in body["tools"]] for body in script.requests]
    assert len(offered[0]) == 5 and offered[1] == ["final_answer"]
    assert all(body["tool_choice"] == "required" for body in script.requests)


def test_a_call_that_cannot_be_run_is_a_result_that_says_so(
    agent: ModuleType, folder: Path
) -> None:
    calls = [
        ("read_file", {"name": "../secret"}),
        ("calculate", {"expression": "__import__('os')"}),
        ("fly", {}),
        ("calculate", {"expression": "9**9**9**9"}),
        ("final_answer", {"answer": "no"}),
    ]
    with serving(Script(calls)) as script:
        server = agent.Server(script.base_url, "tiny")
        agent.solve(server, "task", agent.tools_over(folder), 8)
    results = [m["content"] for m in script.requests[-1]["messages"] if m["role"] == "tool"]
    assert len(results) == 4 and all(one.startswith("error: ") for one in results)


def test_a_server_that_refuses_or_is_not_there_is_one_sentence(agent: ModuleType) -> None:
    with pytest.raises(SystemExit, match="error: no server at http://127.0.0.1:9/v1"):
        agent.main(["task", "--base-url", "http://127.0.0.1:9/v1"])
    with serving(Script([])) as script:
        script.answer = lambda body: (503, {"error": {"message": "full"}})  # type: ignore[method-assign]
        with pytest.raises(SystemExit, match="error: full"):
            agent.main(["task", "--base-url", script.base_url])


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ((401, {"error": {"message": "wrong API key"}}), "^error: wrong API key$"),
        ((404, "not here"), "^error: http://.*/v1/models: HTTP Error 404"),  # of another program
    ],
)
def test_a_server_that_refuses_a_key_is_not_said_to_be_absent(
    agent: ModuleType, models: tuple[int, Any], said: str
) -> None:
    with serving(Script([], models=models)) as script, pytest.raises(SystemExit, match=said):
        agent.main(["task", "--base-url", script.base_url, "--key", "wrong"])


@pytest.mark.parametrize("with_tools", [True, False])
def test_a_step_that_is_cut_off_is_one_sentence(
    agent: ModuleType, folder: Path, with_tools: bool
) -> None:
    calls = [("list_files", {}), ("final_answer", {"answer": "a long story"})]
    with serving(Script(calls, with_tools, cut=True)) as script:
        words = ["task", "--base-url", script.base_url, "--folder", str(folder)]
        with pytest.raises(SystemExit, match="^error: a step was cut off after 9 tokens: .*"):
            agent.main([*words, "--max-tokens", "9"])
    assert [one["max_tokens"] for one in script.requests] == [9, 9]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("(3 + 4) * 12", "84"), ("-7 // 2", "-4"), ("12345678 + 1", "12345679"),
        ("2**100", str(2**100)), ("7 / 2", "3.5"), ("2**-1", "0.5"),
        ("1234567.25 * 1", "1234567.25"),
    ],
)  # fmt: skip
def test_arithmetic(agent: ModuleType, expression: str, expected: str) -> None:
    assert agent.calculate(expression) == expected


@pytest.mark.parametrize(
    "expression", ["2**1000000000", "10**999 * 10**999", "(-8)**0.5", "1e308 * 10", "1 / 0", "True"]
)
def test_a_number_that_is_too_large_or_none_is_refused(agent: ModuleType, expression: str) -> None:
    with pytest.raises(agent.ToolError, match="cannot be calculated"):
        agent.calculate(expression)
