"""Prompts of items: thinking or not, and without their middle."""

import pytest
from chat_templates import GEMMA4, MISTRAL, NO_SYSTEM, QWEN3, QWEN35, family_tokenizer

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.bench.prompting import (
    check_no_thinking,
    prompt_of,
    reasoning_marks,
    without_middle,
)

HI = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("template", "by_default", "if_not_to_think"),
    [(QWEN3, False, False), (QWEN35, True, False), (NO_SYSTEM, False, False), (None, False, False)],
)
def test_a_prompt_says_whether_it_has_opened_the_reasoning(
    template: str | None, by_default: bool, if_not_to_think: bool
) -> None:
    tokenizer = family_tokenizer(template)
    assert prompt_of(tokenizer, HI, None).in_reasoning is by_default
    told = prompt_of(tokenizer, HI, False)
    assert told.in_reasoning is if_not_to_think
    assert ("</think>" in tokenizer.tokenizer.decode(told.ids)) == (template in (QWEN3, QWEN35))


@pytest.mark.parametrize("template", [MISTRAL, NO_SYSTEM, None])
def test_models_that_cannot_be_told_not_to_think_are_refused(template: str | None) -> None:
    for good in (QWEN3, GEMMA4):
        check_no_thinking(family_tokenizer(good))
    with pytest.raises(SubspecError, match="no enable_thinking") as error:
        check_no_thinking(family_tokenizer(template))
    assert error.value.exit_code == Exit.USAGE and error.value.hint


def test_marks_of_reasoning_that_are_special_tokens_are_shown() -> None:
    assert reasoning_marks(family_tokenizer(MISTRAL)) == {"[THINK]", "[/THINK]"}
    assert reasoning_marks(family_tokenizer(GEMMA4)) == {"<|channel>", "<channel|>"}
    assert reasoning_marks(family_tokenizer(QWEN3)) == frozenset()


@pytest.mark.parametrize("template", [QWEN3, None])
@pytest.mark.parametrize("most", [40, 41, 97])
def test_of_a_long_prompt_the_first_and_the_last_tokens_remain(
    template: str | None, most: int
) -> None:
    tokenizer = family_tokenizer(template)
    content = "First " + " ".join(f"über {at} 🙂" for at in range(400)) + " last"
    messages = [{"role": "user", "content": content}]
    whole = prompt_of(tokenizer, messages, None)
    found = without_middle(whole, tokenizer, messages, None, most)
    assert most - 8 <= len(found.ids) <= most
    text = tokenizer.tokenizer.decode(found.ids)
    begin, end = "First über 0", "399 🙂 last"
    assert begin in text and end in text and " 200 " not in text
    assert (
        found.cut
        == f"its middle was left out: of {len(whole.ids)} tokens {len(found.ids)} were read"
    )
    assert without_middle(whole, tokenizer, messages, None, len(whole.ids)) == whole


def test_what_cannot_be_cut_enough_ends_and_stays_too_long() -> None:
    tokenizer = family_tokenizer(QWEN3)
    for content in ("", "x", "one two three four five"):
        messages = [{"role": "user", "content": content}]
        whole = prompt_of(tokenizer, messages, None)
        assert len(without_middle(whole, tokenizer, messages, None, 2).ids) > 2
