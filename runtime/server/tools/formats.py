"""Tool call formats, detected from the chat template's text.

Sources: the models' chat templates (Qwen3, Qwen3-Coder, Llama 3.1 and 3.2, Mistral Nemo, Ministral
    3, FunctionGemma, Gemma 4), Hermes' function calling format, llama.cpp's
    docs/function-calling.md.
"""

from dataclasses import dataclass
from typing import Literal

from subspec.runtime.server.tools.calls import Calls
from subspec.runtime.server.tools.feed import SPACE, Malformed, TextFeed, Wait
from subspec.runtime.server.tools.gemma_calls import gemma_call
from subspec.runtime.server.tools.json_calls import bare_calls, json_calls, mistral_calls
from subspec.runtime.server.tools.xml_calls import FUNCTION, xml_call

MAX_CLOSING = 64  # characters between a call and its end mark
Kind = Literal["hermes", "xml", "llama", "mistral list", "mistral args", "gemma", "function gemma"]


@dataclass(frozen=True)
class ToolFormat:
    """begins: marks that begin a call, the usual one first. follows: texts of which one must come
    next, possibly after white space, for it to be a call. end: closing mark, if any. bare: a call
    may begin the answer without marks. in_reasoning: calls count in reasoning too. quote: Gemma's
    string quote."""

    kind: Kind
    begins: tuple[str, ...]
    end: str | None = None
    follows: tuple[str, ...] = ()
    bare: bool = False
    in_reasoning: bool = False
    quote: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks to detect, some of which are special tokens in some tokenizers."""
        more = ("[ARGS]", "[CALL_ID]") if self.kind.startswith("mistral") else ()
        return (*self.begins, *(one for one in (self.end, self.quote) if one), *more)


TAGGED = ("{", "[", FUNCTION)
HERMES = ToolFormat("hermes", ("<tool_call>",), "</tool_call>", TAGGED)
XML = ToolFormat("xml", ("<tool_call>", FUNCTION), "</tool_call>", TAGGED, in_reasoning=True)
LLAMA = ToolFormat("llama", ("<|python_tag|>",), bare=True)
MISTRAL_LIST = ToolFormat("mistral list", ("[TOOL_CALLS]",))
MISTRAL_ARGS = ToolFormat("mistral args", ("[TOOL_CALLS]",))
GEMMA_4 = ToolFormat("gemma", ("<|tool_call>",), "<tool_call|>", ("call:",), quote='<|"|>')
FUNCTION_GEMMA = ToolFormat(
    "function gemma",
    ("<start_function_call>",),
    "<end_function_call>",
    ("call:",),
    quote="<escape>",
)


def choose_tool_format(template: str) -> ToolFormat | None:
    """Return the template's format; None if it has none or it is unknown."""
    if "<tool_call>" in template:
        if "<arg_key>" in template:  # GLM 4.5's
            return None
        return XML if FUNCTION in template else HERMES
    if "<|tool_call>" in template:
        return GEMMA_4
    if "<start_function_call>" in template:
        return FUNCTION_GEMMA
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL_LIST
    if "tools" in template and ("<|python_tag|>" in template or '"parameters"' in template):
        return LLAMA
    return None


def read_call(form: ToolFormat, begin: str, feed: TextFeed, calls: Calls) -> Wait:
    """Take one call or a list of calls whose begin mark comes next; "": a bare call. Raises
    Malformed."""
    if begin != FUNCTION:
        feed.take(len(begin))
    if form.follows:
        yield from feed.skip_space()
        if (yield from feed.begins(*form.follows)) is None:
            raise Malformed
    if form.kind in ("hermes", "xml"):
        if (yield from feed.begins(FUNCTION)) is not None:
            yield from xml_call(feed, calls, must_be_offered=begin == FUNCTION)
        else:
            yield from json_calls(feed, calls)
    elif form.kind == "llama":
        yield from bare_calls(feed, calls)
    elif form.kind in ("gemma", "function gemma"):
        yield from gemma_call(feed, calls, form.quote)
    else:
        yield from mistral_calls(feed, calls)
    if form.end is not None:
        yield from take_end(feed, form.end)


def take_end(feed: TextFeed, end: str) -> Wait:
    """Take the end mark, and a superfluous bracket before it, if present."""
    count = yield from feed.length_of(SPACE + "}]", MAX_CLOSING)
    if (yield from feed.begins(end, beyond=count)) is not None:
        feed.take(count + len(end))
