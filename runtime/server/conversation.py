"""Build messages in OpenAI's chat form from what clients of any API send item by item.

Chat templates accept fewer forms than the APIs: a system message comes first, roles alternate, and
    an assistant's reasoning, text and calls before the next turn are one message.
"""

from subspec.runtime.server.chat_events import JSONValue


class Conversation:
    """Collects messages. System texts at the beginning become the first message. A later one
    becomes a user message: templates reject it elsewhere, and moving it to the front would change
    the prompt's beginning, which a cache may hold. Empty texts are dropped."""

    def __init__(self) -> None:
        self.messages: list[dict[str, JSONValue]] = []

    @property
    def has_turns(self) -> bool:
        """True if there is more than a system message."""
        return any(message["role"] != "system" for message in self.messages)

    def add_system(self, text: str) -> None:
        role = "user" if self.has_turns else "system"
        self._add_text(role, text, "content", separator="\n\n")

    def add_user(self, text: str) -> None:
        self._add_text("user", text, "content", separator="\n\n")

    def add_assistant(self, text: str) -> None:
        self._add_text("assistant", text, "content", separator="")

    def add_reasoning(self, text: str) -> None:
        self._add_text("assistant", text, "reasoning_content", separator="\n\n")

    def add_call(self, call_id: str, name: str, arguments: str) -> None:
        function = {"name": name, "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        self._last("assistant").setdefault("tool_calls", []).append(call)

    def add_result(self, call_id: str | None, text: str, name: str | None = None) -> None:
        """Add a tool's result. name: the tool's name, if the client sends it."""
        said = {"tool_call_id": call_id, "name": name}
        known = {key: value for key, value in said.items() if value is not None}
        self.messages.append({"role": "tool", **known, "content": text})

    def _add_text(self, role: str, text: str, field: str, separator: str) -> None:
        if not text:
            return
        message = self._last(role)
        before = message.get(field)
        message[field] = f"{before}{separator}{text}" if before else text

    def _last(self, role: str) -> dict[str, JSONValue]:
        """Return the last message if it has this role, else append a new one."""
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": None})
        return self.messages[-1]
