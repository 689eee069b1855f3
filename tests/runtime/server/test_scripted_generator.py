"""What plays the engine in the server's tests ends, stops and fails as an engine does."""

import asyncio

import pytest
from scripted_generator import Script, ScriptedGenerator

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.planner.model.hub import DEMO
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.server.generation import GenerationRequest, Outcome, Piece, QueueFull
from subspec.runtime.text.tokenizer import ChatTokenizer, load_tokenizer

TEXT = "def add(a, b):\n    return a + b  # naïve 🙂\n"


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer(DEMO)


def played(
    tokenizer: ChatTokenizer,
    script: str | Script,
    stop: tuple[str, ...] = (),
    context: int = 4096,
    seed: int = 0,
    **params: object,
) -> tuple[list[Piece], Outcome]:
    generator = ScriptedGenerator(tokenizer, [script], context, seed)
    wanted = GenerationParams(**{"max_tokens": 4000, **params})  # type: ignore[arg-type]
    generation = generator.submit(GenerationRequest((5, 6), wanted, stop))

    async def all_of_it() -> list[Piece]:
        return [piece async for piece in generation]

    return asyncio.run(all_of_it()), generation.outcome


def test_the_pieces_are_the_text_whatever_the_rounds(tokenizer: ChatTokenizer) -> None:
    end = tokenizer.tokenizer.token_to_id("<|im_end|>")
    cuts = set()
    for seed in range(5):
        pieces, outcome = played(tokenizer, TEXT, seed=seed, stop_token_ids=frozenset({end}))
        assert "".join(piece.text for piece in pieces) == TEXT and outcome.reason == "eos"
        ids = [token for piece in pieces for token in piece.token_ids]
        assert ids[-1] == end and tokenizer.tokenizer.decode(ids) == TEXT
        assert outcome.stats.generated_tokens == len(ids)
        cuts.add(tuple(piece.text for piece in pieces))
    assert len(cuts) > 1


def test_it_ends_as_an_engine_does(tokenizer: ChatTokenizer) -> None:
    pieces, outcome = played(tokenizer, TEXT, stop=("no such", "return"))
    assert "".join(piece.text for piece in pieces) == TEXT[: TEXT.index("return")]
    assert (outcome.reason, outcome.stop_text) == ("stop", "return")
    for settings, reason in (({"max_tokens": 3}, "length"), ({"context": 5}, "context")):
        pieces, outcome = played(tokenizer, TEXT, **settings)  # type: ignore[arg-type]
        assert outcome.reason == reason and sum(len(piece.token_ids) for piece in pieces) == 3
    assert played(tokenizer, "")[1].reason == "length"
    assert len(played(tokenizer, "abc", logprobs=2)[0][0].logprobs[0].top) == 2


def test_it_fails_and_refuses_as_told(tokenizer: ChatTokenizer) -> None:
    broken = Script(TEXT, error=SubspecError(Exit.RESOURCES, "the disk is gone"))
    with pytest.raises(SubspecError, match="the disk is gone"):
        played(tokenizer, broken)
    generator = ScriptedGenerator(tokenizer, [TEXT], context=2)
    with pytest.raises(SubspecError, match="2 tokens, expected 1 to 1"):
        generator.submit(GenerationRequest((5, 6), GenerationParams()))
    generator.full = QueueFull(8, 17)
    with pytest.raises(QueueFull):
        generator.submit(GenerationRequest((5,), GenerationParams()))


def test_a_cancelled_answer_gives_no_more_pieces(tokenizer: ChatTokenizer) -> None:
    generator = ScriptedGenerator(tokenizer, [TEXT])
    generation = generator.submit(GenerationRequest((5,), GenerationParams()))

    async def two_pieces() -> int:
        count = 0
        async for _ in generation:
            count += 1
            if count == 2:
                generation.cancel()
        return count

    assert asyncio.run(two_pieces()) == 2 and generator.generations[0].cancelled
