"""The tokens that a grammar knows are those of the model, byte for byte."""

import pytest
from grammars import (
    END,
    allowed_ids,
    demo_tokenizer,
    demo_tokens,
    qwen_like,
    qwen_tokens,
    random_answer,
    sentencepiece_like,
    sentencepiece_tokens,
    text_of,
)
from tokenizers import Tokenizer, decoders, models

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.server.answer_grammar import constraint_for
from subspec.runtime.server.chat_events import OutputFormat
from subspec.runtime.server.grammar_tokens import GrammarTokens, read_grammar_tokens
from subspec.runtime.text.detokenizer import Decoder


def regex_walk(tokens: GrammarTokens, regex: str, seed: int = 0) -> list[int]:
    constraint = constraint_for(tokens, OutputFormat("regex", regex))
    assert constraint is not None
    ids = random_answer(constraint, tokens, seed)
    assert ids is not None
    return ids


@pytest.mark.parametrize(
    ("tokenizer", "tokens"),
    [
        (demo_tokenizer, demo_tokens),
        (qwen_like, qwen_tokens),
        (sentencepiece_like, sentencepiece_tokens),
    ],
)
def test_every_token_says_what_the_decoder_says(tokenizer, tokens):
    known, model = tokenizer(), tokens()
    for token in range(known.get_vocab_size()):
        decoded = known.decode([token], skip_special_tokens=False)
        if "\ufffd" not in decoded:
            assert model.contents[token].decode() == decoded


@pytest.mark.parametrize("tokens", [demo_tokens, qwen_tokens, sentencepiece_tokens])
@pytest.mark.parametrize("text", ["plain text", 'say "näive" 🙂', "  two  spaces\n\n", "你好"])
def test_a_grammar_of_one_text_gives_that_text(tokens, text):
    model = tokens()
    lark = 'start: "' + text.replace('"', '\\"').replace("\n", "\\n") + '"'
    constraint = constraint_for(model, OutputFormat("lark", lark))
    assert constraint is not None
    ids = random_answer(constraint, model, 0)
    assert ids is not None
    assert text_of(model, ids) == text


@pytest.mark.parametrize("tokenizer", [demo_tokenizer, qwen_like, sentencepiece_like])
def test_a_forced_text_is_what_the_streaming_decoder_shows(tokenizer):
    known = tokenizer()
    model = read_grammar_tokens(known, known.get_vocab_size(), (END,))
    prompt = known.encode("a", add_special_tokens=False).ids
    ids = regex_walk(model, 'answer: \\{"ab": [0-9]{4}\\}')
    decoder = Decoder(known, prompt)
    shown = "".join(decoder.feed(token) for token in ids) + decoder.finish()
    assert shown == text_of(model, ids)
    assert shown.startswith('answer: {"ab": ')


def test_forced_text_has_the_tokens_that_the_model_was_trained_on():
    model = demo_tokens()
    ids = regex_walk(model, "The capital of the country is Paris")
    assert ids == demo_tokenizer().encode("The capital of the country is Paris").ids


def test_the_name_of_a_special_token_is_text_in_a_string():
    model = qwen_tokens()
    ids = regex_walk(model, "x<tool_call>y<[|]im_end[|]>z")
    assert text_of(model, ids) == "x<tool_call>y<|im_end|>z"
    assert not set(ids) & set(model.special.values())


def test_rows_beyond_the_tokenizer_are_never_allowed():
    model = qwen_tokens()
    constraint = constraint_for(model, OutputFormat("regex", "(?s:.*)"))
    assert constraint is not None
    allowed = constraint.allowed()
    assert allowed is not None
    assert allowed.shape == (2176,)
    assert not allowed[2052:].any()
    assert allowed[[0, END]].all()  # both end tokens


@pytest.mark.parametrize("vocab_size", [300, 1000])
def test_tokens_beyond_the_models_vocabulary_are_never_asked_for(vocab_size):
    model = read_grammar_tokens(demo_tokenizer(), vocab_size, (END,))
    ids = regex_walk(model, "The capital of the country is Paris, naïve 🙂")
    assert text_of(model, ids) == "The capital of the country is Paris, naïve 🙂"
    assert max(ids) < vocab_size


def test_special_tokens_beyond_the_models_vocabulary_are_left_out():
    model = read_grammar_tokens(qwen_like(), 2049, (END,))
    assert "<think>" in model.special
    assert "<tool_call>" not in model.special
    ids = regex_walk(model, "<tool_call>")
    assert text_of(model, ids) == "<tool_call>"


def test_a_model_without_an_end_token_is_refused_in_a_sentence():
    with pytest.raises(SubspecError, match="needs a model with an end token") as caught:
        read_grammar_tokens(demo_tokenizer(), 2048, (5000,))
    assert caught.value.exit_code == Exit.UNSUPPORTED


def test_a_tokenizer_without_bytes_is_refused_in_a_sentence():
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(SubspecError, match="this model's decoder is WordPiece"):
        read_grammar_tokens(tokenizer, 2, (1,))


def test_no_space_is_forced_before_a_text():
    model = sentencepiece_tokens()
    constraint = constraint_for(model, OutputFormat("regex", '\\{"ab":1'))
    assert constraint is not None
    assert allowed_ids(constraint) == [sentencepiece_like().token_to_id('{"')]
