"""What a draft is tried on, and what its rounds say about acceptance."""

from collections.abc import Sequence
from typing import Protocol

from subspec.artifacts.errors import SubspecError
from subspec.artifacts.plan import Rate, Tree

CHATS = (
    "Write a Python function that reads a file and returns its lines.",
    "Explain in a few sentences how a bicycle stays upright.",
)
TEXTS = ("import os\n\n\nclass Cache:\n", "def parse_date(text):\n")
NUM_TOKENS = 40  # of each answer


class Text(Protocol):
    """The runtime's tokenizer."""

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]: ...
    def plain_ids(self, text: str) -> list[int]: ...


def calibration_prompts(text: Text) -> list[list[int]]:
    """Turns of a chat, and text that is continued."""
    try:
        prompts = [text.chat_ids([{"role": "user", "content": chat}]) for chat in CHATS]
    except SubspecError:  # a template that fails: such a model is run on plain text
        prompts = [text.plain_ids(chat) for chat in CHATS]
    return prompts + [text.plain_ids(beginning) for beginning in TEXTS]


def rate_of(accepted: Sequence[int], tree: Tree) -> Rate:
    """Probability that a level is accepted if those above it were; `accepted`: levels per round.

    Laplace's rule: a short run without a rejection does not promise that there is never one.
    """
    num_accepted = sum(accepted)
    num_rejected = sum(count < tree.depth for count in accepted)
    num_samples = num_accepted + num_rejected
    return Rate(tree.width, (num_accepted + 1) / (num_samples + 2), num_samples)
