"""Where the reasoning of an answer ends, as the server's parser sees it too."""

import pytest

from subspec.runtime.server.answer_parser import AnswerParser
from subspec.runtime.server.chat_events import TextDelta
from subspec.runtime.text.reasoning import (
    BRACKETS,
    CHANNEL,
    THINK,
    ReasoningFormat,
    reasoning_length,
)


@pytest.mark.parametrize(
    ("text", "form", "is_open", "answer"),
    [
        ("<think>\n4?\n</think>\n\nAnswer: 5", THINK, False, "Answer: 5"),
        ("4?\n</think>\n\nAnswer: 5", THINK, True, "Answer: 5"),
        ("<think>4?</think>5", THINK, True, "5"),
        ("\n<think></think>\n\n    return x", THINK, False, "    return x"),
        ("Answer: 5", THINK, False, "Answer: 5"),
        ("5 </think> 6", THINK, False, "5 </think> 6"),
        ("<think>4? 5", THINK, False, ""),
        ("4? 5", THINK, True, ""),
        ("", THINK, True, ""),
        ("[THINK]4?[/THINK]5 [THINK]6[/THINK]", BRACKETS, False, "5 [THINK]6[/THINK]"),
        ("<|channel>thought\n4?<channel|>5", CHANNEL, False, "5"),
    ],
)
def test_an_answer_begins_after_the_reasoning(
    text: str, form: ReasoningFormat, is_open: bool, answer: str
) -> None:
    assert text[reasoning_length(text, form, is_open) :] == answer
    parser = AnswerParser(form, is_open, None)
    events = [*parser.feed(text), *parser.finish()]
    said = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert said.strip() == answer.strip()
