"""Requests of Anthropic's /v1/messages -> ChatRequest."""

import json
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.server.chat_events import (
    ChatRequest,
    JSONValue,
    NamedTool,
    OutputFormat,
    ToolChoice,
)
from subspec.runtime.server.conversation import Conversation
from subspec.runtime.server.errors import invalid, unsupported
from subspec.runtime.server.openai_fields import EFFORTS
from subspec.runtime.server.request_bodies import Fields
from subspec.runtime.server.request_fields import (
    MAX_ITEMS,
    MAX_TOOLS,
    Count,
    JSONObject,
    Label,
    Name,
    StopTexts,
    Temperature,
    TopK,
    TopP,
    as_parts,
    missing,
    not_text,
    required,
    with_asked,
)

# Blocks shown to the model. Those of a provider's own tools
# (server_tool_use, web_search_tool_result, redacted_thinking, ...) are skipped.
BLOCK_TYPES = {"text", "thinking", "tool_use", "tool_result", "image", "document", "search_result"}
BILLING = "x-anthropic-billing-header:"


def only_known(block: Any) -> Any:
    """Validate only the type of blocks that are skipped."""
    if isinstance(block, dict) and isinstance(block.get("type"), str):
        if block["type"] not in BLOCK_TYPES:
            return {"type": block["type"]}
    return block


class ContentBlock(Fields):
    type: Label
    text: str | None = None
    thinking: str | None = None
    id: Name | None = None
    name: Name | None = None
    input: JSONObject | None = None
    tool_use_id: Name | None = None
    is_error: bool | None = None
    source: JSONValue = None
    # Content of a tool_result or a search_result
    content: Annotated[
        list[Annotated["ContentBlock", BeforeValidator(only_known)]],
        Field(max_length=MAX_ITEMS),
        BeforeValidator(as_parts),
    ] = []


Blocks = Annotated[
    list[Annotated[ContentBlock, BeforeValidator(only_known)]],
    Field(max_length=MAX_ITEMS),
    BeforeValidator(as_parts),
]


class Turn(Fields):
    role: Literal["user", "assistant", "system"]
    content: Blocks


class AnthropicTool(Fields):
    type: Label | None = None  # None or custom: a client's own tool
    name: Name
    description: str | None = None
    input_schema: JSONObject | None = None
    strict: bool | None = None


class Choice(Fields):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Fields):
    type: Label
    budget_tokens: Count | None = None
    display: Label | None = None


class JSONFormat(Fields):
    type: Literal["json_schema"]
    schema_: Annotated[JSONObject, Field(alias="schema")]


class OutputConfig(Fields):
    effort: Label | None = None
    format: JSONFormat | None = None


# Known unsupported fields, with the values besides null that have no effect: this server runs no
# tools itself.
REFUSED: dict[str, tuple[Any, ...]] = {"mcp_servers": ([],), "container": ()}


class CountTokens(Fields):
    model: Label
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_ITEMS)]
    system: Blocks = []
    tools: Annotated[list[AnthropicTool] | None, Field(max_length=MAX_TOOLS)] = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JSONFormat | None = None  # its name in a beta


class CreateMessage(CountTokens):
    max_tokens: Count
    stream: bool | None = None
    stop_sequences: StopTexts | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    # Ignored
    metadata: JSONValue = None
    cache_control: JSONValue = None
    context_management: JSONValue = None
    diagnostics: JSONValue = None
    service_tier: JSONValue = None
    inference_geo: JSONValue = None
    speed: JSONValue = None
    betas: JSONValue = None


@dataclass(frozen=True)
class AskedMessage:
    body: CreateMessage
    chat: ChatRequest

    @property
    def shows_thinking(self) -> bool:
        return self.body.thinking is None or self.body.thinking.display != "omitted"


def read_message(body: CreateMessage, defaults: SamplingParams, fresh_seed: int) -> AskedMessage:
    """Convert a request. defaults: for absent fields. Raises ApiError."""
    asked = {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
    sampling = replace(with_asked(defaults, asked), seed=fresh_seed)
    chat = read_conversation(body, sampling)
    stop = tuple(body.stop_sequences or ())
    return AskedMessage(body, replace(chat, max_tokens=body.max_tokens, stop=stop))


def read_conversation(body: CountTokens, sampling: SamplingParams) -> ChatRequest:
    """Collect the prompt's messages. Raises ApiError."""
    conversation = Conversation()
    system = [without_billing(block) for block in body.system]
    conversation.add_system(text_of(system, "system", separator="\n\n"))
    for index, message in enumerate(body.messages):
        add_message(conversation, message, f"messages[{index}].content")
    if not conversation.has_turns:
        raise invalid("messages has no text", "messages")
    if conversation.messages[-1]["role"] == "assistant":
        last = "messages ends with an assistant's turn, but this server does not support prefill"
        raise unsupported(last, "messages")
    tools = usable_tools(body.tools or [])
    config = body.output_config or OutputConfig()
    schema = config.format or body.output_format
    return ChatRequest(
        messages=tuple(conversation.messages),
        sampling=sampling,
        tools=tuple(tools.values()),
        tool_choice=tool_choice(body.tool_choice, set(tools)),
        parallel_tool_calls=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
        output_format=OutputFormat("json_schema", schema.schema_) if schema else None,
        reasoning_effort=EFFORTS.get(config.effort or ""),
        # As with Anthropic, thinking is off unless requested.
        enable_thinking=body.thinking is not None and body.thinking.type != "disabled",
    )


def without_billing(block: ContentBlock) -> ContentBlock:
    """Drop the billing line in Claude Code's system prompt: it changes with every request, so
    nothing after it would be found in a cache."""
    if block.text is None or not block.text.startswith(BILLING):
        return block
    return block.model_copy(update={"text": block.text.partition("\n")[2]})


def add_message(conversation: Conversation, message: Turn, where: str) -> None:
    if message.role == "system":  # Claude Code puts reminders between the turns
        conversation.add_system(text_of(message.content, where, separator="\n\n"))
    elif message.role == "user":
        results = [block for block in message.content if block.type == "tool_result"]
        for index, block in enumerate(message.content):
            if block.type == "tool_result":
                add_result(conversation, block, f"{where}[{index}]")
        said = [block for block in message.content if block not in results]
        conversation.add_user(text_of(said, where, separator="\n\n"))
    else:
        for index, block in enumerate(message.content):
            add_assistant_block(conversation, block, f"{where}[{index}]")


def add_result(conversation: Conversation, block: ContentBlock, where: str) -> None:
    text = text_of(block.content, f"{where}.content", separator="\n")
    if block.is_error:
        text = f"Error: {text}"  # the chat form has no other field for it
    conversation.add_result(required(block.tool_use_id, f"{where}.tool_use_id"), text)


def add_assistant_block(conversation: Conversation, block: ContentBlock, where: str) -> None:
    if block.type == "text":
        conversation.add_assistant(required(block.text, f"{where}.text"))
    elif block.type == "thinking":
        conversation.add_reasoning(required(block.thinking, f"{where}.thinking"))
    elif block.type == "tool_use":
        if block.input is None:
            raise missing(f"{where}.input")
        arguments = json.dumps(block.input, ensure_ascii=False)
        call_id, name = required(block.id, f"{where}.id"), required(block.name, f"{where}.name")
        conversation.add_call(call_id, name, arguments)
    elif block.type in BLOCK_TYPES:
        raise unsupported(f"{where} is not allowed in an assistant's turn", f"{where}.type")


def text_of(blocks: list[ContentBlock], where: str, separator: str) -> str:
    """Return the block's text. Raises ApiError for other content, such as an image."""
    texts = []
    for index, block in enumerate(blocks):
        path = f"{where}[{index}]"
        if block.type == "text":
            texts.append(required(block.text, f"{path}.text"))
        elif block.type == "search_result":
            texts.append(text_of(block.content, f"{path}.content", separator))
        elif block.type == "document" and is_text(block.source):
            texts.append(str(block.source["data"]))
        elif block.type in BLOCK_TYPES:
            raise not_text(block.type, path)
    return separator.join(text for text in texts if text)


def is_text(source: JSONValue) -> bool:
    return (
        isinstance(source, dict)
        and source.get("type") == "text"
        and isinstance(source.get("data"), str)
    )


def usable_tools(asked: list[AnthropicTool]) -> dict[str, dict[str, JSONValue]]:
    """Tools by name, in order. Those that the provider runs (web_search_20250305, ...) are
    skipped."""
    found: dict[str, dict[str, JSONValue]] = {}
    for tool in asked:
        if tool.type in (None, "custom"):
            function: dict[str, JSONValue] = {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.input_schema or {"type": "object", "properties": {}},
                **({"strict": True} if tool.strict else {}),
            }
            found.setdefault(tool.name, {"type": "function", "function": function})
    return found


def tool_choice(asked: Choice | None, names: set[str]) -> ToolChoice:
    if asked is None or asked.type == "auto":
        return "auto"
    if asked.type == "none":
        return "none"
    if asked.type == "any":
        if names:
            return "required"
        message = 'tool_choice.type is "any", but tools holds none that this server can offer'
        raise invalid(message, "tool_choice.type")
    name = required(asked.name, "tool_choice.name")
    if name not in names:
        message = f"tool_choice.name is {name[:100]!r}, which is not the name of a usable tool"
        raise invalid(message, "tool_choice.name")
    return NamedTool(name)
