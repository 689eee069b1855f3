"""Combine a request's output format and tools into one constraint."""

import json
from collections.abc import Sequence

from llguidance import regex_to_lark

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.model.constraint import Constraint
from subspec.runtime.server.after_thinking import AfterThinking, Thinking
from subspec.runtime.server.call_grammar import (
    CallForm,
    Grammar,
    Tool,
    calls_grammar,
    optional_calls_grammar,
)
from subspec.runtime.server.chat_events import JSONValue, NamedTool, OutputFormat, ToolChoice
from subspec.runtime.server.grammar import HINT, GrammarConstraint
from subspec.runtime.server.grammar_tokens import GrammarTokens

# Indentation is allowed, endless white space is not.
JSON_SETTINGS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}


def constraint_for(
    tokens: GrammarTokens,
    output_format: OutputFormat | None = None,
    tools: Sequence[dict[str, JSONValue]] = (),
    tool_choice: ToolChoice = "auto",
    parallel_tool_calls: bool = True,
    call_form: CallForm | None = None,
    thinking: Thinking | None = None,
    thinking_is_open: bool = False,
) -> Constraint | None:
    """Return the answer's constraint, or None if it may be anything.

    tools, tool_choice and parallel are as in ChatRequest. call_form: syntax of the model's calls,
    None if no grammar is known for it. thinking: the model's thinking marks, if it may think;
    thinking_is_open: the prompt ends within the thinking. Tools that are only allowed constrain the
    answer if it has an output format or if one of them is `strict`. Takes up to a second: call it
    in a thread of GrammarThreads. Raises SubspecError(USAGE).
    """
    grammar, what = _grammar(
        tokens, output_format, tools, tool_choice, parallel_tool_calls, call_form
    )
    if grammar is None:
        return None
    constraint = GrammarConstraint(tokens, _text(grammar, what), what)
    return AfterThinking(thinking, thinking_is_open, constraint) if thinking else constraint


def _grammar(
    tokens: GrammarTokens,
    output_format: OutputFormat | None,
    tools: Sequence[dict[str, JSONValue]],
    tool_choice: ToolChoice,
    parallel: bool,
    form: CallForm | None,
) -> tuple[list[dict[str, JSONValue]] | None, str]:
    """llguidance's list of grammars, the answer's first, and a name for error messages."""
    must_call = tool_choice == "required" or isinstance(tool_choice, NamedTool)
    if must_call:
        chosen = _chosen(tools, tool_choice)
        if form is None:
            raise SubspecError(
                Exit.USAGE,
                "tool_choice cannot be honoured: there is no grammar for this model's tool calls",
                "use tool_choice auto",
            )
        one_or_more = parallel and tool_choice == "required"  # a tool by its name is called once
        calls = calls_grammar(form, chosen, one_or_more, tokens.special)
        return _list("start: calls", calls), "the schema of a tool"
    if output_format is not None:
        answer, what = _format(output_format)
        if tool_choice == "none" or not tools or form is None:
            return [answer], what
        calls = calls_grammar(form, _read(tools), parallel, tokens.special)
        named = {**answer, "name": "answer"}
        return [*_list("start: @answer | calls", calls), named], f"{what}, or the schema of a tool,"
    if tool_choice == "auto" and form is not None and any(_is_strict(tool) for tool in tools):
        calls = optional_calls_grammar(form, _read(tools), parallel, tokens.special)
        return _list("", calls), "the schema of a tool"
    return None, ""


def _list(start: str, grammar: Grammar) -> list[dict[str, JSONValue]]:
    first = {"lark_grammar": "\n".join([start, *grammar.rules])}
    return [first, *({"name": n, "json_schema": s} for n, s in grammar.schemas.items())]


def _format(output_format: OutputFormat) -> tuple[dict[str, JSONValue], str]:
    value = output_format.value
    if output_format.kind == "json_object":
        return {"json_schema": _with_settings({"type": "object"}, lenient=False)}, "json_object"
    if output_format.kind == "json_schema":
        return {"json_schema": _with_settings(value, lenient=False)}, "the JSON schema"
    if not isinstance(value, str):
        kind = type(value).__name__
        raise SubspecError(Exit.USAGE, f"the {output_format.kind} is a {kind}, expected a text")
    if output_format.kind == "regex":
        return {"lark_grammar": f"start: /{regex_to_lark(value, '')}/"}, "the regex"
    return {"lark_grammar": value}, "the Lark grammar"


def _chosen(tools: Sequence[dict[str, JSONValue]], choice: ToolChoice) -> list[Tool]:
    all_tools = _read(tools)
    if not isinstance(choice, NamedTool):
        if not all_tools:
            raise SubspecError(Exit.USAGE, "tool_choice is required, but there are no tools")
        return all_tools
    chosen = [tool for tool in all_tools if tool.name == choice.name]
    if not chosen:
        names = ", ".join(tool.name for tool in all_tools) or "none"
        raise SubspecError(
            Exit.USAGE, f"tool_choice names the tool {choice.name!r}, expected one of: {names}"
        )
    return chosen


def _read(tools: Sequence[dict[str, JSONValue]]) -> list[Tool]:
    """Read the tools. Schema features that cannot be enforced are allowed for tools that are not
    strict."""
    return [
        Tool(
            tool["function"]["name"],
            _with_settings(
                tool["function"].get("parameters") or {"type": "object", "properties": {}},
                lenient=not _is_strict(tool),
            ),
        )
        for tool in tools
    ]


def _is_strict(tool: dict[str, JSONValue]) -> bool:
    return tool["function"].get("strict") is True


def _with_settings(schema: JSONValue, lenient: bool) -> JSONValue:
    """Return the schema with our llguidance settings in place of its own. Raises
    SubspecError(USAGE) for an invalid schema."""
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        kind = type(schema).__name__
        raise SubspecError(Exit.USAGE, f"the JSON schema is a {kind}, expected an object")
    return {**schema, "x-guidance": {**JSON_SETTINGS, "lenient": lenient}}


def _text(grammar: list[dict[str, JSONValue]], what: str) -> str:
    try:
        return json.dumps({"grammars": grammar}, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise SubspecError(Exit.USAGE, f"{what} is nested too deeply", HINT) from None
    except ValueError as error:  # a number that is not finite or has too many digits
        raise SubspecError(Exit.USAGE, f"{what} is no JSON: {str(error)[:200]}", HINT) from None
