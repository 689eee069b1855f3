"""Lookup: the tokens that followed the last few where they stood before, in the prompt or in the
answer. It has no weights and no state (prompt lookup decoding).
"""

from collections.abc import Sequence

MIN_MATCH = 3  # tokens that must have stood before
MAX_MATCH = 24  # of them that are compared, to choose among several places


def as_text(tokens: Sequence[int]) -> str:
    """One character per token: texts are searched in fast code, and characters do not overlap."""
    return "".join(map(chr, tokens))


def continuation(text: str, most: int) -> list[int]:
    """At most `most` tokens that may follow `text`, and no more than are known to have stood
    before them; [] if its last MIN_MATCH tokens stood nowhere before.

    Of several places it is the one with the longest common past, then the last. A text that repeats
    itself is expected to go on doing so.
    """
    place, length = 0, 0  # behind the found tokens, and how many they are
    while length < MAX_MATCH:
        wanted = max(length + 1, MIN_MATCH)
        found = text.rfind(text[-wanted:], 0, len(text) - 1) if len(text) > wanted else -1
        if found < 0:
            break
        place, length = found + wanted, wanted
        while length < min(MAX_MATCH, place) and text[place - length - 1] == text[-length - 1]:
            length += 1
    period = len(text) - place
    return [ord(text[place + n % period]) for n in range(min(most, length))]
