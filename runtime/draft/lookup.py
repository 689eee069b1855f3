"""Lookup (prompt lookup decoding): the tokens that followed an earlier occurrence of the last few,
in the prompt or in the answer. It has no weights and no state."""

from collections.abc import Sequence

MIN_MATCH = 3  # least tokens of a match
MAX_MATCH = 24  # tokens compared at most, to choose among matches


def as_text(tokens: Sequence[int]) -> str:
    """Return a string of one character per token: string search is fast, and characters do not
    overlap."""
    return "".join(map(chr, tokens))


def continuation(text: str, max_tokens: int) -> list[int]:
    """Return at most `max_tokens` tokens that may follow `text`, no more than the length of the
    match; [] if its last MIN_MATCH tokens have no earlier occurrence.

    The longest match wins, then the last one. A periodic text is expected to go on periodically.
    """
    place, length = 0, 0  # end of the match, and its length
    while length < MAX_MATCH:
        wanted = max(length + 1, MIN_MATCH)
        found = text.rfind(text[-wanted:], 0, len(text) - 1) if len(text) > wanted else -1
        if found < 0:
            break
        place, length = found + wanted, wanted
        while length < min(MAX_MATCH, place) and text[place - length - 1] == text[-length - 1]:
            length += 1
    period = len(text) - place
    return [ord(text[place + n % period]) for n in range(min(max_tokens, length))]
