"""What an answer may say next, beyond what the model would: a grammar, asked token by token.

The engine knows this protocol only; runtime/server/grammar.py implements it.
V = vocabulary
"""

from typing import Protocol

from torch import Tensor


class Constraint(Protocol):
    """The state of one answer. Verification and drafts walk ahead with `push` and come back with
    `pop`, so both must be quick, and `pop` exact. Any of them may raise SubspecError, which ends
    the answer."""

    def allowed(self) -> Tensor | None:
        """bool [V] on the host: tokens that may come next, one at least; None: every token."""
        ...

    def push(self, token: int) -> None:
        """`token`, which was allowed, comes next."""
        ...

    def pop(self, num_tokens: int) -> None:
        """Takes the last `num_tokens` back."""
        ...
