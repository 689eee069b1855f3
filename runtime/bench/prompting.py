"""Prompts of items: rendered by the chat template, truncated if allowed; and the span of reasoning
in an answer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.text.chat_template import TemplateWorker
from subspec.runtime.text.reasoning import (
    THINK,
    ReasoningFormat,
    choose_reasoning,
    ends_in_reasoning,
)
from subspec.runtime.text.template_caps import find_caps
from subspec.runtime.text.tokenizer import ChatTokenizer, special_tokens

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """A prompt. in_reasoning: it opens the reasoning. cut: description of the truncation; "" if
    there is none."""

    ids: list[int]
    in_reasoning: bool
    cut: str = ""


def prompt_of(tokenizer: ChatTokenizer, messages: Messages, enable_thinking: bool | None) -> Prompt:
    """Render a prompt. enable_thinking: None: the template's default. Raises SubspecError as
    `render` does."""
    if tokenizer.template is None:
        return Prompt(tokenizer.chat_ids(list(messages)), False)
    text = tokenizer.render(list(messages), enable_thinking)
    return Prompt(tokenizer.rendered_ids(text), ends_in_reasoning(text, reasoning_of(tokenizer)))


def without_middle(
    whole: Prompt,
    tokenizer: ChatTokenizer,
    messages: Messages,
    enable_thinking: bool | None,
    most: int,
) -> Prompt:
    """Truncate the middle of the last message so that the prompt has at most `most` tokens, keeping
    equally many at both ends. It is longer if the rest alone is."""
    found, asked = whole, tokenizer.rendered_ids(messages[-1]["content"])
    num_kept = len(asked)
    while (excess := len(found.ids) - most) > 0:
        num_kept -= max(excess, 2)  # again, as halves may have more tokens than they were cut from
        if (half := num_kept // 2) < 1:
            break
        ends = (asked[:half], asked[-half:])
        text = "".join(tokenizer.tokenizer.decode(one, skip_special_tokens=True) for one in ends)
        last = {**messages[-1], "content": text}
        cut = prompt_of(tokenizer, [*messages[:-1], last], enable_thinking)
        words = f"its middle was left out: of {len(whole.ids)} tokens {len(cut.ids)} were read"
        found = replace(cut, cut=words)
    return found


def reasoning_of(tokenizer: ChatTokenizer) -> ReasoningFormat:
    """Return the reasoning format, <think> if the template has none: some models begin with it."""
    return choose_reasoning(tokenizer.template or "") or THINK


def reasoning_marks(tokenizer: ChatTokenizer) -> frozenset[str]:
    """Special tokens that must be decoded to find the end of the reasoning."""
    marks = reasoning_of(tokenizer).marks
    special = special_tokens(tokenizer.tokenizer).values()
    return frozenset(token for token in special if any(token in mark for mark in marks))


def check_no_thinking(tokenizer: ChatTokenizer) -> None:
    """Raise SubspecError(USAGE) if the chat template cannot turn thinking off."""
    with TemplateWorker() as worker:
        if find_caps(tokenizer, worker).supports_enable_thinking:
            return
    raise SubspecError(
        Exit.USAGE,
        "--no-thinking cannot be honoured: the model's chat template has no enable_thinking",
        "leave it out; a model that thinks all the same needs a larger --max-tokens",
    )
