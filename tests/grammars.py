"""Tokenizers and random answers for the tests of grammars."""

import random
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from subspec.planner.model.hub import DEMO
from subspec.runtime.model.constraint import Constraint
from subspec.runtime.server.grammar_tokens import GrammarTokens, read_grammar_tokens

END = 2  # of the demo model, and of the SentencePiece-like one
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def qwen_like() -> Tokenizer:
    """The demo model's, with tags that are tokens, but shown, as Qwen's are."""
    tokenizer = demo_tokenizer()
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in TAGS])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Pieces with ▁ for a space, and bytes for what has no piece; a space is put before a text."""
    texts = [*(chr(code) for code in range(33, 127)), "▁", "▁a", "▁b", "ab", '{"', '":', "▁{"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *texts]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("{", '"'), ('"', ":"), ("▁", "{")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


@cache
def demo_tokens() -> GrammarTokens:
    return read_grammar_tokens(demo_tokenizer(), 2048, (END,))


@cache
def qwen_tokens() -> GrammarTokens:
    """With rows for tokens that the tokenizer does not have, as Qwen's embedding has."""
    return read_grammar_tokens(qwen_like(), 2176, (END, 0))


@cache
def sentencepiece_tokens() -> GrammarTokens:
    tokenizer = sentencepiece_like()
    return read_grammar_tokens(tokenizer, tokenizer.get_vocab_size(), (END,))


def allowed_ids(constraint: Constraint) -> list[int] | None:
    allowed = constraint.allowed()
    return None if allowed is None else allowed.nonzero().flatten().tolist()


def random_answer(
    constraint: Constraint, tokens: GrammarTokens, seed: int, most: int = 400
) -> list[int] | None:
    """Allowed tokens up to an end token, ended where that is allowed every second time; shorter
    tokens are likelier the longer it takes. None: no end within `most` tokens."""
    chance = random.Random(seed)
    ids = list[int]()
    while len(ids) < most:
        allowed = allowed_ids(constraint)
        assert allowed, "an answer that cannot go on"
        ends = [token for token in allowed if token in tokens.ends]
        others = [token for token in allowed if token not in tokens.ends]
        if ends and (not others or chance.random() < 0.5):
            return ids
        if chance.random() < len(ids) / 50:  # ends strings and arrays
            closing = [t for t in others if tokens.contents[t].rstrip()[-1:] in (b'"', b"]", b"}")]
            others = closing or others
        token = chance.choice(others)
        constraint.push(token)
        ids.append(token)
    return None


def text_of(tokens: GrammarTokens, ids: list[int]) -> str:
    return b"".join(tokens.contents[token] for token in ids).decode("utf-8")


def spell(tokens: GrammarTokens, text: str) -> list[int]:
    """Ids of a text, a special token in it as one."""
    for name, index in tokens.special.items():
        before, found, after = text.partition(name)
        if found:
            return [*spell(tokens, before), index, *spell(tokens, after)]
    return tokens.tokenizer.tokenize_str(text)
