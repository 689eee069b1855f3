"""The MakeConstraint of chat.py: builds the constraint of a chat request's answer."""

import asyncio

from tokenizers import Tokenizer

from subspec.runtime.model.constraint import Constraint
from subspec.runtime.server.after_thinking import Thinking, read_thinking
from subspec.runtime.server.answer_grammar import constraint_for
from subspec.runtime.server.call_grammar import FORMS
from subspec.runtime.server.chat import Prompt, offered_tools
from subspec.runtime.server.chat_events import ChatRequest
from subspec.runtime.server.grammar import GrammarThreads
from subspec.runtime.server.grammar_tokens import GrammarTokens, read_grammar_tokens
from subspec.runtime.server.tools.formats import ToolFormat
from subspec.runtime.text.reasoning import ReasoningFormat


class Constraints:
    """Builds constraints for one model's answers. Token tables for grammars are read on first use.
    Close it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_tokens = end_tokens
        self._threads = GrammarThreads()
        self._reading = asyncio.Lock()
        self._tokens: GrammarTokens | None = None
        self._thinking: dict[ReasoningFormat, Thinking] = {}

    async def make(
        self, request: ChatRequest, tool_format: ToolFormat | None, prompt: Prompt
    ) -> Constraint | None:
        """Return the answer's constraint; None if it may be anything. Raises SubspecError: USAGE
        for a grammar that is wrong or too complex, UNSUPPORTED for a model whose tokens have no
        bytes."""
        if not is_asked(request):
            return None
        async with self._reading:
            if self._tokens is None:
                self._tokens = await asyncio.to_thread(
                    read_grammar_tokens, self._tokenizer, self._vocab_size, self._end_tokens
                )
            tokens, form = self._tokens, prompt.reasoning
            if form is not None and form not in self._thinking:
                self._thinking[form] = await asyncio.to_thread(
                    read_thinking, tokens, form.begin, form.end
                )
        return await self._threads.run(
            lambda: constraint_for(
                tokens,
                request.output_format,
                offered_tools(request),
                request.tool_choice,
                request.parallel_tool_calls,
                FORMS.get(tool_format.kind) if tool_format is not None else None,
                self._thinking[form] if form is not None else None,
                prompt.in_reasoning,
            ),
            "response_format" if request.output_format is not None else "tools",
        )

    def close(self) -> None:
        self._threads.close()


def is_asked(request: ChatRequest) -> bool:
    """Return True if the request constrains the form of its answer."""
    strict = (tool.get("function", {}).get("strict") is True for tool in offered_tools(request))
    asked = request.output_format is not None or request.tool_choice not in ("auto", "none")
    return asked or any(strict)
