import pytest

from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.plan import Rate, Tree
from subspec.planner.calibration import CHATS, TEXTS, calibration_prompts, rate_of


class Letters:
    """A tokenizer of characters."""

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        return [0, *self.plain_ids(messages[0]["content"])]

    def plain_ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


class Untemplated(Letters):
    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        raise SubspecError(Exit.CORRUPT, "the model's chat template failed")


def test_the_prompts_are_turns_of_a_chat_and_text_to_continue() -> None:
    prompts = calibration_prompts(Letters())
    assert [prompt[0] == 0 for prompt in prompts] == [True] * len(CHATS) + [False] * len(TEXTS)


def test_a_model_whose_template_fails_is_tried_on_plain_text() -> None:
    prompts = calibration_prompts(Untemplated())
    assert len(prompts) == len(CHATS) + len(TEXTS)
    assert 0 not in [prompt[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        ([], Rate(2, 0.5, 0)),
        ([0, 0, 0], Rate(2, 1 / 5, 3)),
        ([4, 4], Rate(2, 9 / 10, 8)),  # nothing rejected: the tree was at its end
        ([4, 1, 0], Rate(2, 6 / 9, 7)),
    ],
)
def test_a_level_counts_if_those_above_it_were_accepted(
    accepted: list[int], expected: Rate
) -> None:
    assert rate_of(accepted, Tree(2, 4)) == expected
