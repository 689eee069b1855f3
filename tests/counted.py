"""A constraint that no tokenizer is needed for."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

END = 7
LONG = 12  # tokens that a counted answer has before it may end


@dataclass
class Counted:
    """Every token is of the class (token mod 5) that follows the last one's; the end token may come
    after LONG tokens, and must after twice as many."""

    vocab_size: int
    said: list[int] = field(default_factory=list)

    def allowed(self) -> Tensor:
        if END in self.said:
            pytest.fail("it was asked after the end")
        ids = torch.arange(self.vocab_size)
        number = len(self.said)
        fits = (ids % 5 == (self.said[-1] + 1) % 5) & (ids != END) if self.said else ids != END
        if number >= LONG:
            fits = fits | (ids == END)
        return ids == END if number >= 2 * LONG else fits

    def push(self, token: int) -> None:
        if not self.allowed()[token]:
            pytest.fail("what was not allowed was said")
        self.said.append(token)

    def rollback(self, num_tokens: int) -> None:
        del self.said[len(self.said) - num_tokens :]
