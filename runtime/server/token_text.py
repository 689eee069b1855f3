"""A token as a text of its own, for log probabilities. What it adds to an answer depends on its
neighbours: runtime/text decodes answers."""

from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from subspec.runtime.model.sampling import TokenLogprobs
from subspec.runtime.text.detokenizer import BYTE_TOKEN, INCOMPLETE


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Part of a character is U+FFFD, as in vLLM. Behind another token: decoders of SentencePiece's
    tokens drop a space where a text begins."""
    before, text = anchor(tokenizer)
    whole: str = tokenizer.decode([*before, token], skip_special_tokens=False)
    return whole.removeprefix(text)


@lru_cache(maxsize=1)
def anchor(tokenizer: Tokenizer) -> tuple[list[int], str]:
    """A token that others can stand behind, and its text."""
    before = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
    return before, tokenizer.decode(before, skip_special_tokens=False)


def first_text(tokenizer: Tokenizer, token: int) -> str:
    """Of a token that a text begins with."""
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    return text


def token_bytes(tokenizer: Tokenizer, token: int) -> list[int]:
    """Of a part of a character its own bytes, where the tokenizer tells them."""
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
    """The characters that byte-level tokenizers write bytes as (GPT-2's): printable ones stand for
    themselves, the others for 256 and up, in order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [one for one in range(256) if one not in plain]
    found = {chr(one): one for one in plain}
    return found | {chr(256 + index): one for index, one in enumerate(others)}


BYTE_OF = byte_characters()


def chat_logprobs(tokenizer: Tokenizer, found: TokenLogprobs) -> dict[str, Any]:
    """In the form of /v1/chat/completions."""

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
    """In the form of /v1/completions. An int is a token of which nothing is known, as the first of
    a prompt. begin: characters before the first token."""
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
