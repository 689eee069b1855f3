"""Events of tool call parsers: a call's name, then its arguments in pieces."""

import re
import secrets
from collections.abc import Mapping
from typing import Any

from subspec.runtime.server.chat_events import ChatEvent, ToolCallDelta, ToolCallStart
from subspec.runtime.server.tools.feed import Malformed

NAME = re.compile(r"[\w.\-:/]{1,128}")


class Calls:
    """The calls of one answer. parameters: JSON schema of the arguments by tool name."""

    def __init__(self, tools: tuple[dict[str, Any], ...]) -> None:
        self.parameters = {name_of(tool): parameters_of(tool) for tool in tools}
        self.count = 0
        self.is_open = False  # the last call's arguments are not complete
        self._events: list[ChatEvent] = []

    def start(self, name: str) -> None:
        """Begin a call. Raises Malformed for an invalid name."""
        check_name(name)
        identifier = f"call_{secrets.token_hex(12)}"
        self._events.append(ToolCallStart(self.count, identifier, name))
        self.count += 1
        self.is_open = True

    def arguments(self, text: str) -> None:
        """Append to the last call's arguments."""
        self._events.append(ToolCallDelta(self.count - 1, text))

    def end(self) -> None:
        self.is_open = False

    def take_events(self) -> list[ChatEvent]:
        events, self._events = self._events, []
        return events


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise Malformed


def name_of(tool: Mapping[str, Any]) -> str:
    name = tool["function"]["name"]
    assert isinstance(name, str)
    return name


def parameters_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The tool's parameters as a JSON schema; an object without properties if it has none."""
    found = tool["function"].get("parameters")
    return found if isinstance(found, dict) else {"type": "object", "properties": {}}
