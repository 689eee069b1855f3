"""A token's text is what it adds to an answer, its leading space included."""

from collections.abc import Callable

import pytest
from grammars import demo_tokenizer, sentencepiece_like
from tokenizers import Tokenizer, decoders

from subspec.runtime.model.sampling import TokenLogprobs
from subspec.runtime.server.token_text import (
    chat_logprobs,
    completion_logprobs,
    token_bytes,
    token_text,
)


def stripping() -> Tokenizer:
    """As Llama 2's and Mistral's: the space that is put before a text is dropped again."""
    tokenizer = sentencepiece_like()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = sentencepiece_like()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize("make", [stripping, metaspace])
def test_a_token_keeps_its_leading_space(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    ids = tokenizer.encode("b a {b", add_special_tokens=False).ids
    texts = [token_text(tokenizer, one) for one in ids]
    assert "".join(texts) == " b a {b" and texts[:2] == [" b", " a"]
    assert token_bytes(tokenizer, ids[0]) == [*b" b"]
    assert chat_logprobs(tokenizer, TokenLogprobs(ids[1], -1.0, ()))["token"] == " a"


def test_offsets_are_places_in_the_text() -> None:
    tokenizer = stripping()
    text = "b a {b a"
    first, *others = tokenizer.encode(text, add_special_tokens=False).ids
    found = completion_logprobs(
        tokenizer, [first, *(TokenLogprobs(one, -1.0, ()) for one in others)], 0
    )
    assert "".join(found["tokens"]) == text
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert text[offset:].startswith(token)


def test_special_tokens_and_parts_of_characters_have_a_text() -> None:
    for tokenizer in (stripping(), demo_tokenizer()):
        ends = tokenizer.token_to_id("</s>") or tokenizer.token_to_id("<|im_end|>")
        assert token_text(tokenizer, ends) == tokenizer.id_to_token(ends)
    tokenizer = stripping()
    assert token_text(tokenizer, tokenizer.token_to_id("<0xC3>")) == "\ufffd"
    assert token_bytes(tokenizer, tokenizer.token_to_id("<0xC3>")) == [0xC3]
