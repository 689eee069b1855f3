"""Incremental parser: splits model text into reasoning, answer and tool calls."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

from subspec.runtime.server.chat_events import ChatEvent, ReasoningDelta, TextDelta
from subspec.runtime.server.tools.calls import Calls
from subspec.runtime.server.tools.feed import SPACE, Malformed, TextFeed, Wait
from subspec.runtime.server.tools.formats import ToolFormat, read_call
from subspec.runtime.text.reasoning import ReasoningFormat

MAX_RESCAN = 4096  # characters of a malformed call in which another may begin


class AnswerParser:
    """`feed` and `finish` return events.

    The result does not depend on how the text was split, except for the division into deltas. No
    text is lost: malformed calls are returned as text, and text that cannot belong to a call
    already announced becomes the rest of its arguments. White space around reasoning and next to
    calls is dropped.

    is_reasoning: the prompt has opened the reasoning already.
    """

    def __init__(
        self,
        reasoning: ReasoningFormat | None,
        is_reasoning: bool,
        tool_format: ToolFormat | None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.is_reasoning = is_reasoning  # the text that comes next is reasoning
        self.has_reasoned = is_reasoning
        self._reasoning = reasoning
        self._tool_format = tool_format
        self._calls = Calls(tuple(tools))
        self._feed = TextFeed()
        self._space = ""  # withheld until other text follows
        self._follows_call = False  # nothing but white space has come since a call
        self._events: list[ChatEvent] = []
        self._reader = self._read()
        self._advance()

    @property
    def num_calls(self) -> int:
        return self._calls.count

    def feed(self, text: str) -> list[ChatEvent]:
        self._feed.add(text)
        return self._advance()

    def finish(self) -> list[ChatEvent]:
        """Return the events of the text withheld as a possible mark."""
        self._feed.ended = True
        return self._advance()

    def _advance(self) -> list[ChatEvent]:
        next(self._reader, None)
        self._take_call_events()
        events, self._events = self._events, []
        return events

    def _read(self) -> Wait:
        if self._reasoning is not None:
            yield from self._read_reasoning(self._reasoning)
        yield from self._read_answer()

    def _read_reasoning(self, form: ReasoningFormat) -> Wait:
        """Read the reasoning at the beginning of the answer, if there is one."""
        feed = self._feed
        self._space = yield from feed.skip_space()
        if (yield from feed.begins(form.begin)) is not None:  # perhaps once more than the prompt
            feed.take(len(form.begin))
            self.is_reasoning = self.has_reasoned = True
        if not self.is_reasoning:
            return
        if (yield from feed.begins(form.after_begin)) is not None:
            feed.take(len(form.after_begin))
        yield from feed.skip_space()
        self._space = ""
        tools = self._tool_format
        begins = tools.begins if tools is not None and tools.in_reasoning else ()
        while True:
            mark = yield from feed.until((form.end, *begins), self._reason)
            if mark is None or mark == form.end:
                break
            yield from self._read_call(mark, self._reason)
        if mark is not None:
            feed.take(len(mark))
            self.is_reasoning = False
            yield from feed.skip_space()
        self._space = ""

    def _read_answer(self) -> Wait:
        feed, form = self._feed, self._tool_format
        may_be_bare = form is not None and form.bare
        while True:
            while may_be_bare:
                may_be_bare = yield from self._read_bare_call()
            begins = form.begins if form is not None else ()
            mark = yield from feed.until(begins, self._say)
            if mark is None:
                break
            yield from self._read_call(mark, self._say)
            may_be_bare = form is not None and form.bare and self._follows_call
        if self._space and not self._follows_call:
            self._events.append(TextDelta(self._space))

    def _read_bare_call(self) -> Generator[None, None, bool]:
        """Read a call without marks. Returns True if there was one: another may follow."""
        feed, before, separator = self._feed, self.num_calls, ""
        self._space += yield from feed.skip_space()
        if before:
            count = yield from feed.length_of(";,", 1)
            if (yield from feed.begins("{", " {", "\n{", beyond=count)) is None:
                return False
            separator = feed.take(count) + (yield from feed.skip_space())
        yield from self._read_call("", self._say)
        if self.num_calls > before:
            return True
        self._say(separator)  # of what is no call
        return False

    def _read_call(self, mark: str, say: Callable[[str], None]) -> Wait:
        feed, calls, form = self._feed, self._calls, self._tool_format
        assert form is not None
        before = calls.count
        feed.keep()
        try:
            yield from read_call(form, mark, feed, calls)
        except Malformed:
            if calls.is_open:
                yield from self._read_rest_of_call(form)
            elif calls.count == before:
                kept = feed.kept
                count = len(kept) if mark and len(kept) >= MAX_RESCAN else len(mark)
                feed.put_back(count)
                say(kept[:count])
        feed.forget()
        if calls.count > before:
            self._take_call_events()
            self._space, self._follows_call = "", True

    def _read_rest_of_call(self, form: ToolFormat) -> Wait:
        feed, end = self._feed, form.end
        ends = (*form.begins, end) if end is not None else form.begins
        mark = yield from feed.until(ends, self._calls.arguments)
        self._calls.end()
        if mark is not None and mark == end:
            feed.take(len(mark))

    def _take_call_events(self) -> None:
        self._events += self._calls.take_events()

    def _reason(self, text: str) -> None:
        self._events += [ReasoningDelta(one) for one in self._with_space(text)]

    def _say(self, text: str) -> None:
        self._events += [TextDelta(one) for one in self._with_space(text)]

    def _with_space(self, text: str) -> list[str]:
        """Return the text without its trailing white space, which is withheld."""
        text = self._space + text
        if self._follows_call:
            text = text.lstrip(SPACE)
            self._follows_call = not text
        said = text.rstrip(SPACE)
        self._space = text[len(said) :]
        return [said] if said else []
