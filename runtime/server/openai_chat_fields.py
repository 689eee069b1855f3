"""The fields of /v1/chat/completions -> parts of a ChatRequest. docs/server.md lists them."""

from typing import Annotated, Any, Literal

from pydantic import Field

from subspec.runtime.server.chat_events import JSONValue, NamedTool, OutputFormat, ToolChoice
from subspec.runtime.server.conversation import Conversation
from subspec.runtime.server.errors import invalid, unsupported
from subspec.runtime.server.openai_fields import (
    EFFORTS,
    MAX_LOGPROBS,
    MAX_TOKENS,
    REFUSED,
    SamplingFields,
    StructuredOutputs,
)
from subspec.runtime.server.request_bodies import Fields

MAX_TOOLS = 256

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]

REFUSED_IN_CHAT: dict[str, tuple[Any, ...]] = {
    **REFUSED,
    "modalities": (["text"],),
    "audio": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "web_search_options": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}


class Part(Fields):
    """A part of a message. Only text is read; other kinds are refused by name."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Fields):
    name: Name
    arguments: str = "{}"


class ToolCall(Fields):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's name for it


class Function(Fields):
    name: Name
    description: str | None = None
    parameters: dict[str, JSONValue] | None = None
    strict: bool | None = None


class Tool(Fields):
    type: Literal["function"]
    function: Function


class FunctionName(Fields):
    name: Name


class ToolByName(Fields):
    type: Literal["function"]
    function: FunctionName


class SchemaFormat(Fields):
    schema_: dict[str, JSONValue] | None = Field(None, alias="schema")


class ResponseFormat(Fields):
    """schema: llama.cpp's field for it, with json_object."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None
    schema_: dict[str, JSONValue] | None = Field(None, alias="schema")


class TemplateSettings(Fields):
    enable_thinking: bool | None = None


class ChatFields(SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolByName | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, JSONValue] | None = None


def thinking_of(asked: ChatFields) -> tuple[str | None, bool | None]:
    """The template's reasoning_effort and enable_thinking. Raises ApiError."""
    settings = asked.chat_template_kwargs or {}
    if (other := next((key for key in settings if key != "enable_thinking"), None)) is not None:
        message = f"chat_template_kwargs has {other[:40]!r}; only enable_thinking can be set"
        raise unsupported(message, "chat_template_kwargs")
    enabled = settings.get("enable_thinking")
    if enabled is not None and not isinstance(enabled, bool):
        raise invalid("enable_thinking is true or false", "chat_template_kwargs")
    effort = (asked.reasoning_effort or "").lower()
    if enabled is None and effort == "none":
        enabled = False
    return EFFORTS.get(effort), enabled


def messages_of(asked: ChatFields) -> tuple[dict[str, JSONValue], ...]:
    """Convert messages to the chat template's form. Raises ApiError."""
    conversation = Conversation()
    for index, message in enumerate(asked.messages):
        add_message(conversation, message, f"messages[{index}].content")
    if not conversation.has_turns and asked.messages[-1].role == "user":
        conversation.messages.append({"role": "user", "content": ""})  # an empty question is valid
    return tuple(conversation.messages)


def add_message(conversation: Conversation, message: Message, where: str) -> None:
    text = text_of(message.content, where)
    if text is None and message.role != "assistant":
        raise invalid(f"{where} is missing", where)
    if message.role == "user":
        conversation.add_user(text or "")
    elif message.role == "tool":
        conversation.add_result(message.tool_call_id, text or "", message.name)
    elif message.role == "assistant":
        conversation.add_reasoning(message.reasoning_content or message.reasoning or "")
        conversation.add_assistant(text or "")
        for call in message.tool_calls or ():
            conversation.add_call(call.id, call.function.name, call.function.arguments)
    else:
        conversation.add_system(text or "")


def text_of(content: str | list[Part] | None, param: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if part.type not in ("text", "refusal"):
            message = f"{param}[{index}] is of the type {part.type[:40]!r}; this model reads text"
            raise unsupported(message, f"{param}[{index}].type")
        if part.text is None and part.refusal is None:
            raise invalid(f"{param}[{index}].text is missing", f"{param}[{index}].text")
    return "\n".join(part.text or part.refusal or "" for part in content)


def tools_of(asked: ChatFields) -> tuple[dict[str, JSONValue], ...]:
    names = [tool.function.name for tool in asked.tools or ()]
    if len(set(names)) < len(names):
        raise invalid("two tools have the same name", "tools")
    return tuple(
        {"type": "function", "function": tool.function.model_dump(exclude_none=True)}
        for tool in asked.tools or ()
    )


def tool_choice_of(asked: ChatFields) -> ToolChoice:
    choice = asked.tool_choice or "auto"
    names = [tool.function.name for tool in asked.tools or ()]
    if isinstance(choice, ToolByName):
        if choice.function.name not in names:
            message = f"tool_choice names {choice.function.name!r}, which is not one of the tools"
            raise invalid(message, "tool_choice")
        return NamedTool(choice.function.name)
    if choice == "required" and not names:
        raise invalid("tool_choice is required, and there are no tools", "tool_choice")
    return choice


def format_of(asked: ChatFields) -> OutputFormat | None:
    """Return the output format of response_format or structured_outputs. Raises ApiError."""
    given = asked.response_format
    if given is None or given.type == "text":
        return structured_output(asked.structured_outputs)
    if asked.structured_outputs is not None:
        raise invalid(
            "response_format and structured_outputs exclude each other", "structured_outputs"
        )
    schema = given.schema_
    if given.type == "json_schema":
        schema = given.json_schema.schema_ if given.json_schema else given.schema_
        if schema is None:
            raise invalid("json_schema.schema is missing", "response_format.json_schema.schema")
    return OutputFormat("json_object") if schema is None else OutputFormat("json_schema", schema)


def structured_output(asked: StructuredOutputs | None) -> OutputFormat | None:
    """Return the only form that is given. Raises ApiError for none or several."""
    if asked is None:
        return None
    given = []
    if asked.json_schema is not None:
        given.append(OutputFormat("json_schema", asked.json_schema))
    if asked.regex is not None:
        given.append(OutputFormat("regex", asked.regex))
    if asked.grammar is not None:
        given.append(OutputFormat("lark", asked.grammar))
    if len(given) != 1:
        raise invalid("structured_outputs has one of json, regex and grammar", "structured_outputs")
    return given[0]
