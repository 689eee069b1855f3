"""A small agent that uses tools, against subspec-serve. Standard library only.

    subspec-serve --model Qwen2.5-7B-Instruct --vram 8GB --context 4096
    python examples/agent.py "How many lines have the Markdown files here?" --folder docs --steps 16

Each step is one request: the model must call a tool, the result goes back as a message, and the
last step may only be the answer. A model whose chat template has no place for tools is asked for
the same call as JSON of a schema, which the server's grammar forces.
"""

import argparse
import ast
import json
import math
import operator
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_RESULT = 2000  # characters of a tool's result that the model reads
MAX_INTEGER = 4096  # bits
SYSTEM = (
    "You solve a task step by step with tools. Call one tool at a time, read its result, and call "
    "final_answer as soon as you know the answer."
)
Message = dict[str, Any]


class ToolError(Exception):
    """What a model reads of a call that cannot be run."""


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    arguments: dict[str, str]  # name -> what it is; all are texts
    run: Callable[..., str]

    @property
    def schema(self) -> dict[str, Any]:
        properties = {k: {"type": "string", "description": v} for k, v in self.arguments.items()}
        required = list(self.arguments)
        return {
            "type": "object", "properties": properties, "required": required,
            "additionalProperties": False,
        }  # fmt: skip


@dataclass(frozen=True)
class Call:
    tool: str
    arguments: dict[str, str]
    message: Message  # the assistant's, as the model reads it later
    id: str | None  # None: by a schema, without a tool message


@dataclass(frozen=True)
class Server:
    base_url: str  # with /v1
    model: str
    key: str = "none"
    max_tokens: int = 512  # of one step


class Refused(Exception):
    """The server's own sentence."""


class CutOff(Exception):
    """A step that has no end."""


def post(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{server.base_url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"},
    )
    return fetched(request, 3600)


def model_of(base_url: str, key: str) -> str:
    request = urllib.request.Request(
        f"{base_url}/models", headers={"Authorization": f"Bearer {key}"}
    )
    return str(fetched(request, 60)["data"][0]["id"])


def fetched(request: urllib.request.Request, timeout: float) -> dict[str, Any]:
    """The server's answer. Raises Refused; URLError without a server."""
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            found: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        try:
            message = json.load(error)["error"]["message"]
        except (ValueError, LookupError, TypeError):  # of another program, such as a proxy
            message = f"{request.full_url}: {error}"
        raise Refused(message) from None
    return found


# ---- one step ----


def message_of(server: Server, body: dict[str, Any]) -> Message:
    """What the model says. Raises CutOff, Refused."""
    done = post(server, {"model": server.model, "max_tokens": server.max_tokens, **body})
    told(done)
    [choice] = done["choices"]
    if choice["finish_reason"] == "length":
        raise CutOff(
            f"a step was cut off after {done['usage']['completion_tokens']} tokens: give the agent "
            "more with --max-tokens, or the server a larger --context"
        )
    message: Message = choice["message"]
    return message


def call_by_tools(server: Server, messages: Sequence[Message], tools: Sequence[Tool]) -> Call:
    """The model's next call, in the form that it was trained for."""
    offered = [
        {
            "type": "function",
            "function": {
                "name": tool.name, "description": tool.description, "parameters": tool.schema,
                "strict": True,
            },
        }
        for tool in tools
    ]  # fmt: skip
    asked = {"messages": [*messages], "tools": offered, "tool_choice": "required"}
    message = message_of(server, asked)
    [call, *_] = message["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    kept = {**message, "tool_calls": [call]}  # one at a time
    return Call(call["function"]["name"], arguments, kept, call["id"])


def call_by_schema(server: Server, messages: Sequence[Message], tools: Sequence[Tool]) -> Call:
    """The same as JSON, with the tools described in the system message."""
    lines = [f"{tool.name}({', '.join(tool.arguments)}): {tool.description}" for tool in tools]
    described = f'{SYSTEM}\nAnswer with JSON, {{"tool": ..., "arguments": ...}}. The tools:\n'
    system = {"role": "system", "content": described + "\n".join(lines)}
    options = [
        {
            "type": "object",
            "properties": {"tool": {"const": tool.name}, "arguments": tool.schema},
            "required": ["tool", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    form = {"type": "json_schema", "json_schema": {"name": "call", "schema": {"anyOf": options}}}
    asked = {"messages": [system, *messages[1:]], "response_format": form}
    text = message_of(server, asked)["content"]
    found = json.loads(text)
    kept = {"role": "assistant", "content": text}
    return Call(found["tool"], found["arguments"], kept, None)


def told(done: dict[str, Any]) -> None:
    """How fast the step was, if the server says so."""
    metrics = done.get("metrics") or {}
    draft = metrics.get("speculative_decoding") or {}
    said = [f"{done['usage']['completion_tokens']} tokens"]
    if metrics.get("tokens_per_second"):
        said.append(f"{metrics['tokens_per_second']:.1f} tokens/s")
    if draft.get("mean_acceptance_length"):
        said.append(f"{draft['mean_acceptance_length']:.1f} tokens per round")
    print(f"  ({', '.join(said)})", file=sys.stderr)


def solve(server: Server, task: str, tools: Sequence[Tool], most_steps: int) -> str:
    """The answer to the task. Raises CutOff, Refused."""
    messages: list[Message] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": task},
    ]
    answering = tools[-1:]  # final_answer
    ask = call_by_tools
    for step in range(1, most_steps + 1):
        offered = answering if step == most_steps else tools
        try:
            call = ask(server, messages, offered)
        except Refused as refused:
            if ask is call_by_schema or "tools cannot be honoured" not in str(refused):
                raise
            print(f"note: {refused}: calls are asked for as JSON", file=sys.stderr)
            ask = call_by_schema
            call = ask(server, messages, offered)
        result = run(call, offered)
        print(f"{step}. {call.tool}({json.dumps(call.arguments)})", file=sys.stderr)
        if call.tool == answering[0].name:
            return result
        print(f"   {result[:200]}", file=sys.stderr)
        messages += [call.message, answer_of(call, result)]
    raise AssertionError("the last step can only be the answer")


def run(call: Call, tools: Sequence[Tool]) -> str:
    """The result that the model reads; an error is one too."""
    tool = next((one for one in tools if one.name == call.tool), None)
    if tool is None or set(call.arguments) != set(tool.arguments):
        return f"error: there is no {call.tool} with {', '.join(call.arguments) or 'no arguments'}"
    try:
        return tool.run(**call.arguments)[:MAX_RESULT]
    except ToolError as error:
        return f"error: {error}"


def answer_of(call: Call, result: str) -> Message:
    if call.id is None:
        return {"role": "user", "content": f"The result of {call.tool}: {result}"}
    return {"role": "tool", "tool_call_id": call.id, "content": result}


# ---- the tools ----

Number = int | float
OPERATIONS: dict[type[ast.AST], Callable[..., Number]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


def calculate(expression: str) -> str:
    """Arithmetic only: nothing of what the model writes is executed. Integers are exact."""
    try:
        return str(value_of(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, TypeError) as error:
        raise ToolError(f"{expression[:100]!r} cannot be calculated: {error}") from None


def value_of(node: ast.AST) -> Number:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return checked(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](value_of(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        left, right = value_of(node.left), value_of(node.right)
        if isinstance(node.op, ast.Pow) and isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() * right)  # before it is computed
        return checked(OPERATIONS[type(node.op)](left, right))
    raise ValueError("it is not arithmetic")


def checked(value: Any) -> Number:
    if isinstance(value, int):
        check_bits(value.bit_length())
        return value
    if not isinstance(value, float) or not math.isfinite(value):
        raise ValueError("it has no finite real value")
    return value


def check_bits(bits: int) -> None:
    if bits > MAX_INTEGER:
        raise ValueError("the number is too large")


def tools_over(folder: Path) -> list[Tool]:
    """final_answer is the last one."""
    root = folder.resolve()

    def place(name: str) -> Path:
        path = (root / name).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            raise ToolError(f"there is no file {name!r}")
        return path

    def text_of(name: str) -> str:
        try:
            return place(name).read_text("utf-8", "replace")
        except (OSError, ValueError) as error:
            raise ToolError(f"{name!r} cannot be read: {error}") from None

    def list_files() -> str:
        return "\n".join(sorted(one.name for one in root.iterdir() if one.is_file())) or "no files"

    return [
        Tool("list_files", "Names of all files.", {}, list_files),
        Tool("read_file", "Beginning of a file.", {"name": "of the file"}, text_of),
        Tool(
            "count_lines", "Number of lines of a file.", {"name": "of the file"},
            lambda name: str(len(text_of(name).splitlines())),
        ),
        Tool("calculate", "Arithmetic.", {"expression": "such as (3 + 4) * 12"}, calculate),
        Tool("final_answer", "Ends the task.", {"answer": "to the task"}, lambda answer: answer),
    ]  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none", help="API key of the server")
    parser.add_argument("--folder", type=Path, default=Path(), help="of the files to be read")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest step, in tokens")
    parser.add_argument("--steps", type=int, default=8, help="the last one can only be the answer")
    given = parser.parse_args(words)
    base_url = given.base_url.rstrip("/")
    try:
        server = Server(base_url, model_of(base_url, given.key), given.key, given.max_tokens)
        print(solve(server, given.task, tools_over(given.folder), max(1, given.steps)))
    except (urllib.error.URLError, ConnectionError) as error:
        sys.exit(f"error: no server at {base_url}: {error}")
    except (CutOff, Refused) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
