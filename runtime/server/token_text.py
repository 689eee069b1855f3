"""Text of a single token, for log probabilities. Answers are decoded by runtime/text, since a
token's text depends on its neighbours."""

from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from subspec.runtime.model.sampling import TokenLogprobs
from subspec.runtime.text.detokenizer import BYTE_TOKEN, INCOMPLETE


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text, U+FFFD for part of a character, as in vLLM. It is decoded after
    another token: SentencePiece decoders drop a leading space."""
    before, text = anchor(tokenizer)
    whole: str = tokenizer.decode([*before, token], skip_special_tokens=False)
    return whole.removeprefix(text)


@lru_cache(maxsize=1)
def anchor(tokenizer: Tokenizer) -> tuple[list[int], str]:
    """Return a token to put before others, and its text."""
    before = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
    return before, tokenizer.decode(before, skip_special_tokens=False)


def first_text(tokenizer: Tokenizer, token: int) -> str:
    """Text of a token at the beginning of a text."""
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    return text


def token_bytes(tokenizer: Tokenizer, token: int) -> list[int]:
    """UTF-8 bytes of a token; for part of a character its own bytes, where known."""
    text = token_text(tokenizer, token)
    if INCOMPLETE not in text:
        return list(text.encode())
    name = tokenizer.id_to_token(token) or ""
    if BYTE_TOKEN.fullmatch(name):
        return [int(name[3:5], 16)]
    if all(one in BYTE_OF for one in name):
        return [BYTE_OF[one] for one in name]
    return list(text.encode())


def byte_characters() -> dict[str, int]:
    """Characters that byte-level tokenizers (GPT-2's) represent bytes as: printable ones map to
    themselves, the others to 256 and up, in order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [one for one in range(256) if one not in plain]
    found = {chr(one): one for one in plain}
    return found | {chr(256 + index): one for index, one in enumerate(others)}


BYTE_OF = byte_characters()


def chat_logprobs(tokenizer: Tokenizer, found: TokenLogprobs) -> dict[str, Any]:
    """One token's log probabilities in the form of /v1/chat/completions."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token),
            "logprob": max(logprob, MIN_LOGPROB),
            "bytes": token_bytes(tokenizer, token),
        }

    top = [one(token, logprob) for token, logprob in found.top]
    return {**one(found.token, found.logprob), "top_logprobs": top}


MIN_LOGPROB = -9999.0  # JSON has no infinity; vLLM's value


def completion_logprobs(
    tokenizer: Tokenizer, found: list[TokenLogprobs | int], begin: int
) -> dict[str, Any]:
    """Log probabilities in the form of /v1/completions. An int is a token without log
    probabilities, such as a prompt's first. begin: text offset of the first token."""
    tokens, logprobs, tops, offsets = list[str](), list[float | None](), list[Any](), list[int]()
    for one in found:
        if isinstance(one, int):
            text = first_text(tokenizer, one)
        else:
            text = token_text(tokenizer, one.token)
        tokens.append(text)
        offsets.append(begin)
        begin += len(text)
        if isinstance(one, int):
            logprobs.append(None)
            tops.append(None)
            continue
        logprobs.append(max(one.logprob, MIN_LOGPROB))
        top: dict[str, float] = {}
        for other, logprob in (*one.top, (one.token, one.logprob)):
            top.setdefault(token_text(tokenizer, other), max(logprob, MIN_LOGPROB))
        tops.append(top)
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }
