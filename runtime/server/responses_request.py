"""Requests of OpenAI's /v1/responses -> ChatRequest."""

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
from subspec.runtime.server.request_bodies import Fields, shown
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
from subspec.runtime.server.responses_tools import (
    Tool,
    UsableTools,
    custom_arguments,
    in_namespace,
    usable_tools,
)

# Items that stateless clients send. Other types are a provider's own (a web search, a compaction)
# and are skipped.
ITEM_TYPES = {
    "message",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "reasoning",
    "additional_tools",
    "item_reference",
}
TEXT_PARTS = {"text", "input_text", "output_text", "reasoning_text", "summary_text"}


class InputPart(Fields):
    type: Label
    text: str | None = None
    refusal: str | None = None


Parts = Annotated[list[InputPart], Field(max_length=MAX_ITEMS), BeforeValidator(as_parts)]


def only_known(item: Any) -> Any:
    """Treat an item without a type as a message. Validate only the type of items that are
    skipped."""
    if isinstance(item, dict):
        kind = item.get("type") or "message"
        if isinstance(kind, str):
            return item | {"type": kind} if kind in ITEM_TYPES else {"type": kind}
    return item


class InputItem(Fields):
    type: str
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Parts = []
    summary: Parts = []
    call_id: Name | None = None
    name: Name | None = None
    namespace: Label | None = None
    arguments: str | None = None  # of a function_call
    input: str | None = None  # of a custom_tool_call
    output: Parts = []
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = []


class TextFormat(Fields):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Label | None = None
    schema_: Annotated[JSONObject | None, Field(alias="schema")] = None


class TextConfig(Fields):
    format: TextFormat | None = None


class Reasoning(Fields):
    effort: Label | None = None
    summary: Label | None = None
    generate_summary: Label | None = None  # its old name


def as_items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}] if value else []
    return [] if value is None else value


# Known unsupported fields, with the values besides null that have no effect: this server stores no
# responses.
REFUSED: dict[str, tuple[Any, ...]] = {
    "previous_response_id": ("",),
    "conversation": (),
    "prompt": (),
    "background": (False,),
}


class CreateResponse(Fields):
    model: Label | None = None
    input: Annotated[
        list[Annotated[InputItem, BeforeValidator(only_known)]],
        Field(max_length=MAX_ITEMS),
        BeforeValidator(as_items),
    ] = []
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    tools: Annotated[list[Tool] | None, Field(max_length=MAX_TOOLS)] = None
    tool_choice: JSONValue = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[Label] | None, Field(max_length=64)] = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: Annotated[dict[str, str] | None, Field(max_length=64)] = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None
    # Ignored: nothing is stored, and prefix caching is always on
    store: JSONValue = None
    service_tier: JSONValue = None
    safety_identifier: JSONValue = None
    prompt_cache_key: JSONValue = None
    prompt_cache_retention: JSONValue = None
    stream_options: JSONValue = None
    client_metadata: JSONValue = None
    max_tool_calls: JSONValue = None  # of the provider's own tools
    # Not OpenAI's, but understood by other servers too
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: StopTexts | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None


@dataclass(frozen=True)
class Asked:
    """A request as sent, and as a ChatRequest. chat is None for an empty input, with which some
    clients probe the endpoint."""

    body: CreateResponse
    tools: UsableTools
    chat: ChatRequest | None


def read_request(body: CreateResponse, defaults: SamplingParams, fresh_seed: int) -> Asked:
    """Convert a request. defaults: for absent fields. fresh_seed: used if it has no seed. Raises
    ApiError."""
    late = [tool for item in body.input for tool in item.tools]  # of additional_tools
    tools = usable_tools([*(body.tools or []), *late])
    choice, tools = tool_choice(body.tool_choice, tools)
    conversation = read_items(body)
    if not conversation.has_turns:
        return Asked(body, tools, None)
    effort = body.reasoning.effort if body.reasoning else None
    wants_logprobs = body.top_logprobs or "message.output_text.logprobs" in (body.include or [])
    return Asked(
        body,
        tools,
        ChatRequest(
            messages=tuple(conversation.messages),
            sampling=read_sampling(body, defaults, fresh_seed),
            max_tokens=body.max_output_tokens,
            stop=tuple(body.stop or ()),
            logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
            tools=tools.as_functions(),
            tool_choice=choice,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            output_format=output_format(body.text.format if body.text else None),
            reasoning_effort=EFFORTS.get(effort or ""),
            enable_thinking=False if effort == "none" else None,
        ),
    )


def read_sampling(
    body: CreateResponse, defaults: SamplingParams, fresh_seed: int
) -> SamplingParams:
    asked = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
    }
    seed = fresh_seed if body.seed is None else body.seed
    return replace(with_asked(defaults, asked), seed=seed)


def read_items(body: CreateResponse) -> Conversation:
    conversation = Conversation()
    conversation.add_system(body.instructions or "")
    for index, item in enumerate(body.input):
        add_item(conversation, item, f"input[{index}]")
    return conversation


def add_item(conversation: Conversation, item: InputItem, where: str) -> None:
    if item.type == "message":
        text = joined(item.content, f"{where}.content")
        if item.role == "assistant":
            conversation.add_assistant(text)
        elif item.role == "user":
            conversation.add_user(text)
        elif item.role is None:
            raise missing(f"{where}.role")
        else:
            conversation.add_system(text)
    elif item.type == "reasoning":
        # The reasoning's text, else its summary; content that another provider has
        # encrypted cannot be read.
        text = joined(item.content, f"{where}.content")
        conversation.add_reasoning(text or joined(item.summary, f"{where}.summary"))
    elif item.type in ("function_call", "custom_tool_call"):
        name = in_namespace(required(item.name, f"{where}.name"), item.namespace)
        if item.type == "function_call":
            arguments = required(item.arguments, f"{where}.arguments")
        else:
            arguments = custom_arguments(required(item.input, f"{where}.input"))
        conversation.add_call(required(item.call_id, f"{where}.call_id"), name, arguments)
    elif item.type in ("function_call_output", "custom_tool_call_output"):
        text = joined(item.output, f"{where}.output")
        conversation.add_result(required(item.call_id, f"{where}.call_id"), text)
    elif item.type == "item_reference":
        message = f"{where} is an item_reference, but this server stores no items: send the item"
        raise unsupported(message, where)


def joined(parts: list[InputPart], where: str) -> str:
    """Return the parts' joined text. Raises ApiError for an image, a file or audio."""
    texts = []
    for index, part in enumerate(parts):
        if part.type == "refusal":
            texts.append(required(part.refusal, f"{where}[{index}].refusal"))
        elif part.type in TEXT_PARTS:
            texts.append(required(part.text, f"{where}[{index}].text"))
        else:
            raise not_text(part.type, f"{where}[{index}]")
    return "".join(texts)


def output_format(asked: TextFormat | None) -> OutputFormat | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return OutputFormat("json_object")
    if asked.schema_ is None:
        raise missing("text.format.schema")
    return OutputFormat("json_schema", asked.schema_)


def tool_choice(asked: JSONValue, tools: UsableTools) -> tuple[ToolChoice, UsableTools]:
    """Return the tool choice and the tools that may be called. Raises ApiError for an unsupported
    choice."""
    if isinstance(asked, dict) and asked.get("type") == "allowed_tools":
        listed = asked.get("tools")
        allowed = listed if isinstance(listed, list) else []
        names = [one.get("name") for one in allowed if isinstance(one, dict)]
        tools = tools.only({name for name in names if isinstance(name, str)})
        asked = asked.get("mode", "auto")
    if isinstance(asked, dict):
        kind, name = asked.get("type"), asked.get("name")
        found = tools.find(name) if isinstance(name, str) else None
        if kind not in ("function", "custom") or found is None:
            raise invalid(
                "tool_choice does not name a function or custom tool in tools", "tool_choice"
            )
        return NamedTool(found), tools
    if asked == "required" and not tools.by_shown_name:
        message = 'tool_choice is "required", but tools holds none that this server can offer'
        raise invalid(message, "tool_choice")
    if asked is None or asked == "auto":
        return "auto", tools
    if asked == "none":
        return "none", tools
    if asked == "required":
        return "required", tools
    message = f'tool_choice is {shown(asked)}, expected "auto", "none", "required" or a tool'
    raise invalid(message, "tool_choice")
