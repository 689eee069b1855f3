"""A draft model must have the model's ids for the model's strings."""

import json

import pytest

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.planner.model.hub import DEMO
from subspec.planner.model.tokenizer_files import read_tokenizer
from subspec.planner.model.vocabulary import check_vocabulary, tokens_by_id


def tokenizer(tokens: list[str], **added: int) -> str:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    more = [{"content": content, "id": number} for content, number in added.items()]
    return json.dumps({"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": more})


WORDS = [f"word{n}" for n in range(200)]


def test_the_same_tokenizer_is_the_same_vocabulary() -> None:
    text = read_tokenizer(DEMO).tokenizer_json
    check_vocabulary(text, text, "demo")
    assert len(tokens_by_id(text)) == 2048


def test_more_tokens_and_a_few_missing_ones_do_no_harm() -> None:
    check_vocabulary(tokenizer(WORDS), tokenizer([*WORDS, "more"], end=300), "small")
    check_vocabulary(tokenizer(WORDS, end=200), tokenizer(WORDS), "small")


def test_unigram_vocabularies_are_lists() -> None:
    pairs = json.dumps({"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}})
    assert tokens_by_id(pairs) == {0: "a", 1: "b"}


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (
            tokenizer([*WORDS[:7], "other", *WORDS[8:]]),
            "token 7 is 'other' there, expected 'word7'",
        ),
        (tokenizer(WORDS[::-1]), "token 0 is 'word199' there, expected 'word0'"),
        (tokenizer(WORDS, end=3), "token 3 is 'end' there"),
        (tokenizer(WORDS[:190]), "has 190 of the model's 200 tokens, expected all"),
    ],
)
def test_another_vocabulary_is_refused(theirs: str, said: str) -> None:
    with pytest.raises(SubspecError, match=said) as failed:
        check_vocabulary(tokenizer(WORDS), theirs, "small")
    assert failed.value.exit_code == Exit.USAGE
    assert "draft model small" in failed.value.message and "same family" in failed.value.hint
