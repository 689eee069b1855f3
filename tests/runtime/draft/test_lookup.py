"""What stood before is proposed again."""

import pytest

from subspec.runtime.draft.lookup import MAX_MATCH, MIN_MATCH, as_text, continuation

A, B, C = [1, 2, 3, 4], [5, 6, 7], [8, 9]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], []),
        ([1], []),
        ([*A, *B, *C], []),
        ([*B, 20, 21, 22, *B], [20, 21, 22]),
        ([*A, 20, 21, 22, 23, 24, *A], [20, 21, 22, 23]),
        ([*B, 20, *C, *B, 21, 22, 23, *B], [21, 22, 23]),  # of two places the last
        ([30, *B, 20, 31, *B, 21, 30, *B], [20, 31, 5, 6]),  # before it that with the longer past
        ([1, 2, 1, 2, 1, 2], [1, 2, 1, 2]),  # a repetition goes on
        ([7, 7, 7, 7], [7, 7, 7]),
        ([*C, 20, *C], []),  # fewer than MIN_MATCH
    ],
)
def test_what_followed_the_last_tokens_is_proposed(tokens: list[int], expected: list[int]) -> None:
    assert continuation(as_text(tokens), 8) == expected


def test_no_more_is_proposed_than_asked_for_nor_than_stood_before() -> None:
    once = list(range(100, 140))
    text = as_text([*once, *once])
    assert continuation(text, 100) == once[:MAX_MATCH]
    assert continuation(text, 5) == once[:5]
    assert continuation(text, 0) == []
    for length in range(MIN_MATCH, MAX_MATCH):
        assert continuation(as_text([*once, 1, *once[:length]]), 100) == [
            *once[length:], 1, *once
        ][:length]  # fmt: skip


def test_every_token_of_a_large_vocabulary_is_one_character() -> None:
    tokens = [0, 0xD800, 0xDFFF, 0x10FFFF, 262_143]
    assert continuation(as_text([*tokens, *tokens]), 5) == tokens
