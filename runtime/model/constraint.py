"""What an answer may say next, beyond what the model would: a grammar, asked token by token.

The engine knows this protocol only; runtime/server/grammar.py implements it.
V = vocabulary
"""

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError

# What an answer's constraint may take of the engine's thread, where all answers wait for it, in
# that thread's seconds, so that a busy machine does not count: ambiguous grammars get slower and
# slower long before they reach a limit of their own. Each question adds STEP_SECONDS.
ANSWER_SECONDS = 2.0
STEP_SECONDS = 0.005


class Constraint(Protocol):
    """The state of one answer. Verification and drafts walk ahead with `push` and come back with
    `rollback`, so both must be quick, and `rollback` exact, also after an error. `allowed` and
    `push` may raise SubspecError."""

    def allowed(self) -> Tensor | None:
        """bool [V] on the host: tokens that may come next, one at least; None: every token."""
        ...

    def push(self, token: int) -> None:
        """`token`, which was allowed and does not end the answer, comes next. An error leaves the
        state as it was."""
        ...

    def rollback(self, num_tokens: int) -> None:
        """Takes the last `num_tokens` back."""
        ...


class ConstraintFollower:
    """Follows one answer with its constraint, up to the first end token: what comes after that
    belongs to no answer.

    Verification and drafts have ANSWER_SECONDS each. Only verification raises: a draft also goes
    where the answer never does, so what fails there leaves drafts unpruned for a while.
    """

    def __init__(self, constraint: Constraint, end_tokens: frozenset[int]) -> None:
        self._constraint = constraint
        self._end_tokens = end_tokens
        self._said: list[int] = []  # the answer's tokens
        self._num_told = 0  # of them, to the constraint: each when the next one is asked for
        self._most_told = 0  # so far: verification tells some, takes them back, and they are kept
        self._num_ends = 0
        self._seconds_left = ANSWER_SECONDS
        self._draft_seconds_left = ANSWER_SECONDS
        self._unpruned_until = 0  # how many tokens the answer must have
        self._failure: Exception | None = None  # of a `rollback`, after which nothing is known

    def push(self, token: int) -> None:
        """`token` comes next. What the constraint has against it, `allowed` says."""
        self._said.append(token)
        self._num_ends += token in self._end_tokens

    def rollback(self, num_tokens: int) -> None:
        """Takes the last `num_tokens` back."""
        for _ in range(num_tokens):
            self._num_ends -= self._said.pop() in self._end_tokens
        if (beyond := self._num_told - len(self._said)) > 0:
            self._take_back(beyond)
            self._num_told -= beyond

    def allowed(self, size: int) -> Tensor | None:
        """bool [size] on the host: what may come next; None: anything. Raises SubspecError if the
        answer cannot go on."""
        if self._num_ends:
            return None
        if self._seconds_left < 0:
            message = "the grammar of the answer takes too long to follow"
            raise SubspecError(Exit.USAGE, message, "make the grammar simpler")
        begin = time.thread_time()
        try:
            begin += self._tell()
            return checked(self._constraint.allowed(), size)
        except SubspecError:
            raise
        except Exception as error:  # whatever it is, it is of this answer alone
            message = f"the grammar of the answer failed: {error!r:.200}"
            raise SubspecError(Exit.UNEXPECTED, message) from error
        finally:
            self._seconds_left += STEP_SECONDS - (time.thread_time() - begin)

    def allowed_after(self, path: Sequence[int], size: int) -> Tensor | None:
        """bool [size] on the host: what a draft may propose after the tokens `path`, which follow
        what was pushed; None: anything, also where `path` itself is not allowed."""
        self._draft_seconds_left += STEP_SECONDS
        too_early = len(self._said) < self._unpruned_until
        if self._num_ends or too_early or self._draft_seconds_left < 0:
            return None
        begin, num_pushed = time.thread_time(), 0
        try:
            begin += self._tell()
            for token in path:
                allowed = self._constraint.allowed()
                if token in self._end_tokens or (allowed is not None and not allowed[token]):
                    return None
                self._constraint.push(token)
                num_pushed += 1
            return checked(self._constraint.allowed(), size)
        except Exception:  # if the answer gets there, verification says so
            self._unpruned_until = len(self._said) + num_pushed + 1
            return None
        finally:
            self._take_back(num_pushed)
            self._draft_seconds_left -= time.thread_time() - begin

    def _tell(self) -> float:
        """Seconds of what was told before, and taken back: it is not paid for again."""
        if self._failure is not None:
            raise self._failure
        again = 0.0
        while self._num_told < len(self._said):
            begin = time.thread_time()
            self._constraint.push(self._said[self._num_told])
            self._num_told += 1
            if self._num_told <= self._most_told:
                again += time.thread_time() - begin
            self._most_told = max(self._most_told, self._num_told)
        return again

    def _take_back(self, num_tokens: int) -> None:
        try:
            self._constraint.rollback(num_tokens)
        except Exception as error:  # its answer ends where it goes on: others have part in a round
            self._failure = error


def checked(allowed: object, size: int) -> Tensor | None:
    """What a constraint gave. Raises ValueError unless it is as `Constraint.allowed` says."""
    if allowed is None:
        return None
    if not isinstance(allowed, Tensor):
        raise ValueError(f"`allowed` gave a {type(allowed).__name__}, expected a tensor or None")
    if allowed.dtype != torch.bool or allowed.shape != (size,):
        kind = f"{allowed.dtype} {list(allowed.shape)}"
        raise ValueError(f"`allowed` gave {kind}, expected torch.bool [{size}]")
    if not allowed.any():
        raise ValueError("it allows no token")
    return allowed
