"""A grammar that waits for the end of the thinking, forwards and backwards."""

import random

import pytest
from grammars import allowed_ids, demo_tokens, qwen_tokens, spell

from subspec.runtime.server.after_thinking import AfterThinking, read_thinking
from subspec.runtime.server.answer_grammar import constraint_for
from subspec.runtime.server.chat_events import OutputFormat
from subspec.runtime.server.grammar_tokens import GrammarTokens

REGEX = OutputFormat("regex", "[0-9]{3}")


def thinking_first(tokens: GrammarTokens, is_open: bool = True) -> AfterThinking:
    made = constraint_for(
        tokens,
        REGEX,
        thinking=read_thinking(tokens, "<think>", "</think>"),
        thinking_is_open=is_open,
    )
    assert isinstance(made, AfterThinking)
    return made


def push(constraint: AfterThinking, ids: list[int]) -> None:
    for token in ids:
        constraint.push(token)


def digits(tokens: GrammarTokens) -> set[int]:
    plain = constraint_for(tokens, REGEX)
    assert plain is not None
    return set(allowed_ids(plain) or [])


def newlines(tokens: GrammarTokens, most: int) -> set[int]:
    texts = [b"\n" * count for count in range(1, most + 1)]
    return {index for index, text in enumerate(tokens.contents) if text in texts}


@pytest.mark.parametrize("tokens", [demo_tokens, qwen_tokens])
def test_everything_passes_until_the_thinking_has_ended(tokens):
    """</think> is one token of one model, and several of the other."""
    model = tokens()
    one = thinking_first(model)
    end = spell(model, "</think>")
    assert (len(end) == 1) == (model is qwen_tokens())
    push(one, spell(model, 'I think, {"a": 1} </thin, or <'))
    assert set(allowed_ids(one)) >= set(range(len(model.contents))) - model.ends - {
        token for token, text in enumerate(model.contents) if b">" in text
    }
    push(one, end)
    assert set(allowed_ids(one)) == digits(model) | newlines(model, 2)
    push(one, spell(model, "\n"))
    assert set(allowed_ids(one)) == digits(model) | newlines(model, 1)
    push(one, spell(model, "123"))
    assert set(allowed_ids(one)) == set(model.ends)


def test_a_token_that_ends_the_thinking_and_says_more_is_not_allowed():
    model = demo_tokens()
    one = thinking_first(model)
    *first, last = spell(model, "</think>")
    push(one, first)
    said = b"".join(model.contents[token] for token in first)
    rest = b"</think>"[len(said) :]
    allowed = one.allowed()
    for token, text in enumerate(model.contents):
        if text.startswith(rest) and text[len(rest) :].strip(b"\n"):
            assert allowed is not None
            assert not allowed[token]
    one.push(last)
    assert set(allowed_ids(one)) >= digits(model)


@pytest.mark.parametrize("tokens", [demo_tokens, qwen_tokens])
def test_an_answer_that_must_have_a_form_does_not_end_in_its_thinking(tokens):
    model = tokens()
    one = thinking_first(model)
    for text in ("I think", " so", "</thi", "nk", "</think>"):
        assert not model.ends & set(allowed_ids(one)), text
        push(one, spell(model, text))
    push(one, spell(model, "123"))
    assert set(allowed_ids(one)) == set(model.ends)


def test_a_model_that_may_think_begins_with_the_tag_or_answers_at_once():
    model = qwen_tokens()
    begin = model.special["<think>"]
    one = thinking_first(model, is_open=False)
    assert set(allowed_ids(one)) == digits(model) | {begin}
    one.push(begin)
    assert set(allowed_ids(one)) > digits(model)
    one.rollback(1)
    push(one, spell(model, "1"))
    assert begin not in allowed_ids(one)
    assert set(allowed_ids(one)) <= digits(model)


def test_a_model_without_a_token_that_begins_the_thinking_answers_at_once():
    model = demo_tokens()
    assert set(allowed_ids(thinking_first(model, is_open=False))) == digits(model)


@pytest.mark.parametrize("tokens", [demo_tokens, qwen_tokens])
@pytest.mark.parametrize("seed", range(4))
def test_pop_is_exact_across_the_end_of_the_thinking(tokens, seed):
    model, chance = tokens(), random.Random(seed)
    answer = spell(model, "so </think") + spell(model, "</think>") + spell(model, "\n\n12")
    answer += spell(model, "3")
    expected = []
    fresh = thinking_first(model)
    for token in answer:
        expected.append(allowed_ids(fresh))
        fresh.push(token)
    one, said = thinking_first(model), 0
    for _ in range(150):
        if chance.random() < 0.6 and said < len(answer):
            one.push(answer[said])
            said += 1
        else:
            count = chance.randint(0, said)
            one.rollback(count)
            said -= count
        if said < len(answer):
            assert allowed_ids(one) == expected[said]
