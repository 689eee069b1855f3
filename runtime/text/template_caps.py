"""Capabilities of a chat template, found by rendering probes.

The names are those of llama.cpp's `chat_template_caps`, on which careful clients branch.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from subspec.artifacts.common.errors import SubspecError
from subspec.runtime.text.chat_template import TemplateWorker
from subspec.runtime.text.tokenizer import ChatTokenizer, Conversation

USER = {"role": "user", "content": "probe-user"}
CALL_ID = "probe0123"  # Mistral's templates want nine letters or digits
RESULT = {"role": "tool", "content": "probe-result", "tool_call_id": CALL_ID, "name": "probe_tool"}
TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe-description",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string", "description": "probe"}},
            "required": ["probe_key"],
        },
    },
}


@dataclass(frozen=True)
class TemplateCaps:
    """Capabilities; supports_user_after_result and supports_enable_thinking are not llama.cpp's."""

    supports_string_content: bool = True
    supports_typed_content: bool = False
    supports_system_role: bool = True
    supports_tools: bool = False
    supports_tool_calls: bool = False
    supports_parallel_tool_calls: bool = False
    supports_object_arguments: bool = False
    supports_user_after_result: bool = False
    supports_preserve_reasoning: bool = False
    supports_reasoning_effort: bool = False
    supports_enable_thinking: bool = False

    def as_dict(self) -> dict[str, bool]:
        return {one.name: getattr(self, one.name) for one in fields(self)}


Rendered = Callable[[Conversation], str]  # "" if the template refuses or fails


def find_caps(tokenizer: ChatTokenizer, worker: TemplateWorker) -> TemplateCaps:
    """Render about 15 probes, a few ms each. Without a template messages are plain text."""
    template = tokenizer.template
    if template is None:
        return TemplateCaps()

    def rendered(conversation: Conversation) -> str:
        try:
            return worker.render(template, tokenizer.template_variables(conversation))
        except SubspecError:
            return ""

    plain = rendered(Conversation([USER]))
    parts = {"role": "user", "content": [{"type": "text", "text": "probe-user"}]}
    system = {"role": "system", "content": "probe-system"}
    return TemplateCaps(
        supports_string_content="probe-user" in plain,
        supports_typed_content=rendered(Conversation([parts])) == plain != "",
        supports_system_role="probe-system" in rendered(Conversation([system, USER])),
        supports_tools="probe_tool" in rendered(Conversation([USER], [TOOL])),
        **_call_caps(rendered),
        supports_preserve_reasoning=_preserves_reasoning(rendered),
        supports_reasoning_effort=_differ(
            rendered, *({"reasoning_effort": effort} for effort in ("low", "high"))
        ),
        supports_enable_thinking=_differ(
            rendered, *({"enable_thinking": thinking} for thinking in (True, False))
        ),
    )


def _differ(rendered: Rendered, one: dict[str, Any], other: dict[str, Any]) -> bool:
    return rendered(Conversation([USER], **one)) != rendered(Conversation([USER], **other))


def _call_caps(rendered: Rendered) -> dict[str, bool]:
    objects: list[Any] = [{"probe_key": "probe-1"}, {"probe_key": "probe-2"}]
    texts: list[Any] = [json.dumps(one) for one in objects]
    with_object = _with_calls(rendered, objects[:1])
    # A template that takes texts prints an object as Python does.
    takes_objects = "probe-1" in with_object and "'probe_key'" not in with_object
    given = objects if takes_objects else texts
    takes_calls = "probe-1" in _with_calls(rendered, given[:1])
    both = _with_calls(rendered, given)
    said = {"role": "user", "content": "probe-more"}
    return {
        "supports_tool_calls": takes_calls,
        "supports_object_arguments": takes_objects,
        "supports_parallel_tool_calls": "probe-1" in both and "probe-2" in both,
        "supports_user_after_result": takes_calls
        and "probe-more" in _with_calls(rendered, given[:1], said),
    }


def _with_calls(rendered: Rendered, arguments: list[Any], *after: dict[str, Any]) -> str:
    """Render a conversation with these calls, their results and the messages `after`."""
    calls = [
        {
            "id": f"{CALL_ID[:-1]}{index}",
            "type": "function",
            "function": {"name": "probe_tool", "arguments": one},
        }
        for index, one in enumerate(arguments)
    ]
    asked = {"role": "assistant", "content": "", "tool_calls": calls}
    results = [{**RESULT, "tool_call_id": call["id"]} for call in calls]
    return rendered(Conversation([USER, asked, *results, *after], [TOOL]))


def _preserves_reasoning(rendered: Rendered) -> bool:
    """Return True if the reasoning of the previous turn is rendered, or that before a call."""
    thought = {"role": "assistant", "content": "probe", "reasoning_content": "probe-thought"}
    function = {"name": "probe_tool", "arguments": {"probe_key": "probe"}}
    call = {"id": CALL_ID, "type": "function", "function": function}
    conversations: list[list[dict[str, Any]]]
    conversations = [[USER, thought, USER], [USER, {**thought, "tool_calls": [call]}, RESULT]]
    return any("probe-thought" in rendered(Conversation(one, [TOOL])) for one in conversations)
