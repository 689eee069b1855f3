"""Marks between which a model writes its reasoning, found in the text of its chat template.

Sources: the models' chat templates (Qwen3, DeepSeek R1, SmolLM3, Magistral, Ministral 3, Gemma 4).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReasoningFormat:
    """Marks of reasoning. begin: counts only where an answer begins. after_begin: a name that may
    follow it."""

    begin: str
    end: str
    after_begin: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        return self.begin, self.end


THINK = ReasoningFormat("<think>", "</think>")
BRACKETS = ReasoningFormat("[THINK]", "[/THINK]")
CHANNEL = ReasoningFormat("<|channel>", "<channel|>", "thought")


def choose_reasoning(template: str) -> ReasoningFormat | None:
    """Return the template's format, or None if the model does not reason or its marks are
    unknown."""
    return next((one for one in (THINK, BRACKETS, CHANNEL) if one.begin in template), None)


def ends_in_reasoning(prompt: str, form: ReasoningFormat) -> bool:
    """Return True if the answer to a rendered prompt begins within the reasoning."""
    prompt = prompt.rstrip()
    return prompt.endswith((form.begin, form.begin + form.after_begin))


def has_ended_reasoning(prompt: str, form: ReasoningFormat) -> bool:
    """Return True if a rendered prompt already ends the reasoning."""
    return prompt.rstrip().endswith(form.end)


def reasoning_length(text: str, form: ReasoningFormat, is_open: bool) -> int:
    """Number of an answer's characters that are reasoning, including the marks and the newlines
    after it: all if it does not end. is_open: the prompt ends within the reasoning."""
    if not is_open and not text.lstrip().startswith(form.begin):
        return 0
    _, mark, answer = text.partition(form.end)
    return len(text) - len(answer.lstrip("\n")) if mark else len(text)
