"""Convert tools of /v1/responses to functions that a chat template can show, and back.

A namespace (Codex sends an MCP server as one) holds functions: its name becomes their prefix. A
custom tool takes free text: it becomes a function with one string parameter. Tools that the
provider runs (web_search, file_search, ...) are skipped.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from subspec.runtime.server.chat_events import JSONValue
from subspec.runtime.server.request_bodies import Fields
from subspec.runtime.server.request_fields import MAX_TOOLS, JSONObject, Label, Name
from subspec.runtime.server.tools.json_text import strict_json

TOOL_TYPES = {"function", "custom", "namespace"}
INPUT = "input"  # the one parameter of a custom tool


def only_usable(tool: Any) -> Any:
    """Validate only the type of tools that are skipped."""
    if isinstance(tool, dict) and isinstance(tool.get("type"), str):
        if tool["type"] not in TOOL_TYPES:
            return {"type": tool["type"], "name": "skipped"}
    return tool


class CustomFormat(Fields):
    type: Label = "text"
    syntax: Label | None = None
    definition: str | None = None


class PlainTool(Fields):
    type: Label
    name: Name
    description: str | None = None
    parameters: JSONObject | None = None
    strict: bool | None = None
    format: CustomFormat | None = None  # of a custom tool
    tools: Annotated[
        list[Annotated["PlainTool", BeforeValidator(only_usable)]], Field(max_length=MAX_TOOLS)
    ] = []  # of a namespace


Tool = Annotated[PlainTool, BeforeValidator(only_usable)]


@dataclass(frozen=True)
class UsableTool:
    kind: Literal["function", "custom"]
    name: str
    namespace: str | None
    description: str
    parameters: JSONObject
    strict: bool = False


@dataclass(frozen=True)
class UsableTools:
    """Tools by the name shown to the model, in the request's order."""

    by_shown_name: dict[str, UsableTool]

    def as_functions(self) -> tuple[dict[str, JSONValue], ...]:
        return tuple(
            {
                "type": "function",
                "function": {
                    "name": shown,
                    "description": tool.description,
                    "parameters": tool.parameters,
                    **({"strict": True} if tool.strict else {}),
                },
            }
            for shown, tool in self.by_shown_name.items()
        )

    def only(self, names: set[str]) -> "UsableTools":
        kept = {self.find(name) for name in names}
        return UsableTools({s: t for s, t in self.by_shown_name.items() if s in kept})

    def find(self, name: str) -> str | None:
        """Return the shown name of a tool that a request refers to by either name."""
        if name in self.by_shown_name:
            return name
        return next((s for s, tool in self.by_shown_name.items() if tool.name == name), None)


def usable_tools(asked: list[PlainTool]) -> UsableTools:
    """Collect usable tools. Of several with one name, the first is used."""
    found: dict[str, UsableTool] = {}
    for namespace, tool in flattened(asked, None):
        shown = in_namespace(tool.name, namespace)
        if tool.type == "function":
            parameters = tool.parameters or {"type": "object", "properties": {}}
            description, strict = tool.description or "", bool(tool.strict)
            usable = UsableTool("function", tool.name, namespace, description, parameters, strict)
        else:
            usable = UsableTool(
                "custom", tool.name, namespace, custom_description(tool), CUSTOM_PARAMETERS
            )
        found.setdefault(shown, usable)
    return UsableTools(found)


def flattened(tools: list[PlainTool], namespace: str | None) -> list[tuple[str | None, PlainTool]]:
    """Flatten a namespace. Only functions and custom tools inside one are kept."""
    found: list[tuple[str | None, PlainTool]] = []
    for tool in tools:
        if tool.type in ("function", "custom"):
            found.append((namespace, tool))
        elif tool.type == "namespace" and namespace is None:
            found += flattened(tool.tools, tool.name)
    return found


def in_namespace(name: str, namespace: str | None) -> str:
    if not namespace:
        return name
    return namespace + name if namespace.endswith("__") else f"{namespace}__{name}"


CUSTOM_PARAMETERS: JSONObject = {
    "type": "object",
    "properties": {INPUT: {"type": "string", "description": "The tool's input, as plain text."}},
    "required": [INPUT],
    "additionalProperties": False,
}


def custom_description(tool: PlainTool) -> str:
    description = tool.description or ""
    if tool.format is None or not tool.format.definition:
        return description
    syntax = tool.format.syntax or "a"
    return f"{description}\n\nThe input follows this {syntax} grammar:\n{tool.format.definition}"


def custom_arguments(text: str) -> str:
    return json.dumps({INPUT: text}, ensure_ascii=False)


def custom_input(arguments: str) -> str:
    """Extract a custom tool's input from a call's arguments; if they have another form, return
    them."""
    try:
        value = strict_json(arguments)
    except ValueError:
        return arguments
    if isinstance(value, dict) and isinstance(value.get(INPUT), str):
        return str(value[INPUT])
    return arguments
