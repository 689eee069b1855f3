"""The text of an answer: whole characters as they become certain, up to a stop text."""

import pytest
import torch
from builders import build_artifact, replan
from running import answer

from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.format.store import Artifact
from subspec.planner.model.hub import DEMO
from subspec.runtime.engine import Engine
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.text.streaming import TextStream
from subspec.runtime.text.tokenizer import ChatTokenizer, load_tokenizer

PARAMS = GenerationParams(max_tokens=40)
PROMPT = "Write the Python function add: adds two numbers"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("streaming") / "artifact"
    return build_artifact(DEMO, out, width=2, depth=5, resident_share=1.0)


@pytest.fixture(scope="module")
def tokenizer(artifact: Artifact) -> ChatTokenizer:
    return load_tokenizer(artifact.path / "tokenizer")


@pytest.fixture(scope="module")
def ids(tokenizer: ChatTokenizer) -> list[int]:
    return tokenizer.chat_ids([{"role": "user", "content": PROMPT}])


@pytest.fixture(scope="module")
def tokens(artifact: Artifact, ids: list[int]) -> list[int]:
    with Engine.open(artifact) as engine:
        return answer(engine, ids, 40)


def test_the_pieces_are_the_text_of_the_tokens(
    artifact: Artifact, tokenizer: ChatTokenizer, ids: list[int], tokens: list[int]
) -> None:
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        stream = TextStream(sequence, tokenizer, ids, PARAMS)
        pieces = [*stream]
    assert stream.token_ids == tokens
    assert "".join(pieces) == stream.text == tokenizer.tokenizer.decode(tokens)


def test_a_stop_text_ends_the_answer_wherever_tokens_split_it(
    artifact: Artifact, tokenizer: ChatTokenizer, ids: list[int], tokens: list[int]
) -> None:
    """The tokens up to the one that completes it are kept, and of the text what comes before."""
    whole = tokenizer.tokenizer.decode(tokens)
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        for first in range(3, 30, 4):
            stop = whole[first : first + 5]
            stream = TextStream(sequence, tokenizer, ids, PARAMS, ("no such text", stop))
            assert "".join(stream) == stream.text == whole[: whole.index(stop)]
            assert sequence.finish_reason == "stop"
            count = len(stream.token_ids)
            assert stream.token_ids == tokens[:count]
            assert stop in tokenizer.tokenizer.decode(tokens[:count])
            assert stop not in tokenizer.tokenizer.decode(tokens[: count - 1])
            assert sequence.cache.tokens == [*ids, *tokens[: count - 1]]


def test_text_that_is_held_back_comes_when_the_answer_ends_or_is_left(
    artifact: Artifact, tokenizer: ChatTokenizer, ids: list[int], tokens: list[int]
) -> None:
    whole = tokenizer.tokenizer.decode(tokens)
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        stream = TextStream(sequence, tokenizer, ids, PARAMS, (whole + "and more",))
        assert [piece for piece in stream if piece] == [whole] and stream.text == whole
        left = TextStream(sequence, tokenizer, ids, PARAMS, (whole + "and more",))
        pieces = iter(left)
        assert next(pieces) == "" == left.text
        pieces.close()  # type: ignore[attr-defined]
        assert left.text == tokenizer.tokenizer.decode(left.token_ids) != ""
        assert not engine.step()


def test_streams_of_several_sequences_do_not_mix(
    artifact: Artifact, tokenizer: ChatTokenizer, ids: list[int]
) -> None:
    other = tokenizer.plain_ids("class Queue:\n")
    shared = replan(artifact, width=2, depth=5, resident_share=1.0, num_sequences=2)
    with Engine.open(shared) as engine:
        alone = []
        for prompt in (ids, other):
            with engine.new_sequence() as sequence:
                alone.append("".join(TextStream(sequence, tokenizer, prompt, PARAMS)))
        first, second = engine.new_sequence(), engine.new_sequence()
        one = iter(TextStream(first, tokenizer, ids, PARAMS))
        two = iter(TextStream(second, tokenizer, other, PARAMS))
        said = ["", ""]
        for _ in range(45):
            said[0] += next(one, "")
            said[1] += next(two, "")
    assert said == alone


def test_a_prompt_without_room_raises_and_gives_no_text(
    artifact: Artifact, tokenizer: ChatTokenizer
) -> None:
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        stream = TextStream(sequence, tokenizer, [5] * 256, PARAMS)
        with pytest.raises(SubspecError, match="the prompt has 256 tokens"):
            next(iter(stream))
        assert stream.text == "" and stream.token_ids == []
