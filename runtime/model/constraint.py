"""Constraints restrict which tokens an answer may have, token by token: a grammar, for example.

The engine knows this protocol only; runtime/server/grammar.py implements it.
V = vocabulary
"""

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError

# CPU seconds of the engine's thread that an answer's constraint may take, while all answers wait.
# Ambiguous grammars get slower and slower long before they reach a limit of their own. Each call
# adds STEP_SECONDS.
ANSWER_SECONDS = 2.0
STEP_SECONDS = 0.005


class Constraint(Protocol):
    """The state of one answer's constraint. Verification and drafts advance it with `push` and undo
    that with `rollback`, so both must be fast, and `rollback` exact, also after an error. `allowed`
    and `push` may raise SubspecError."""

    def allowed(self) -> Tensor | None:
        """Tokens that may come next, bool [V] on the host, at least one; None: every token."""
        ...

    def push(self, token: int) -> None:
        """Append `token`, which is allowed and does not end the answer. An error leaves the state
        unchanged."""
        ...

    def rollback(self, num_tokens: int) -> None:
        """Remove the last `num_tokens` tokens."""
        ...


class ConstraintFollower:
    """Applies a constraint to one answer, up to the first end token: later tokens belong to no
    answer.

    Verification and drafts have ANSWER_SECONDS each. Only verification raises: a draft also tries
    tokens that the answer never has, so an error there leaves drafts unpruned for a while.
    """

    def __init__(self, constraint: Constraint, end_tokens: frozenset[int]) -> None:
        self._constraint = constraint
        self._end_tokens = end_tokens
        self._tokens: list[int] = []  # the answer's tokens
        self._num_pushed = 0  # of them, to the constraint: lazily, before `allowed` is called
        self._max_pushed = 0  # so far: verification pushes, rolls back, and keeps
        self._num_ends = 0
        self._seconds_left = ANSWER_SECONDS
        self._draft_seconds_left = ANSWER_SECONDS
        self._unpruned_until = 0  # least number of the answer's tokens
        self._failure: Exception | None = None  # of a `rollback`: the state is unknown after it

    def push(self, token: int) -> None:
        """Append `token`. If the constraint forbids it, `allowed` raises."""
        self._tokens.append(token)
        self._num_ends += token in self._end_tokens

    def rollback(self, num_tokens: int) -> None:
        """Remove the last `num_tokens` tokens."""
        for _ in range(num_tokens):
            self._num_ends -= self._tokens.pop() in self._end_tokens
        if (beyond := self._num_pushed - len(self._tokens)) > 0:
            self._undo(beyond)
            self._num_pushed -= beyond

    def allowed(self, size: int) -> Tensor | None:
        """Tokens that may come next, bool [size] on the host; None: every token. Raises
        SubspecError if the answer cannot go on."""
        if self._num_ends:
            return None
        if self._seconds_left < 0:
            message = "the grammar of the answer takes too long to follow"
            raise SubspecError(Exit.USAGE, message, "make the grammar simpler")
        begin = time.thread_time()
        try:
            begin += self._push_new()
            return checked(self._constraint.allowed(), size)
        except SubspecError:
            raise
        except Exception as error:  # of any kind: only this answer fails
            message = f"the grammar of the answer failed: {error!r:.200}"
            raise SubspecError(Exit.UNEXPECTED, message) from error
        finally:
            self._seconds_left += STEP_SECONDS - (time.thread_time() - begin)

    def allowed_after(self, path: Sequence[int], size: int) -> Tensor | None:
        """Tokens that a draft may propose after the tokens `path`, which follow what was pushed:
        bool [size] on the host. None: every token, also if `path` itself is not allowed."""
        self._draft_seconds_left += STEP_SECONDS
        too_early = len(self._tokens) < self._unpruned_until
        if self._num_ends or too_early or self._draft_seconds_left < 0:
            return None
        begin, num_pushed = time.thread_time(), 0
        try:
            begin += self._push_new()
            for token in path:
                allowed = self._constraint.allowed()
                if token in self._end_tokens or (allowed is not None and not allowed[token]):
                    return None
                self._constraint.push(token)
                num_pushed += 1
            return checked(self._constraint.allowed(), size)
        except Exception:  # if the answer gets there, verification says so
            self._unpruned_until = len(self._tokens) + num_pushed + 1
            return None
        finally:
            self._undo(num_pushed)
            self._draft_seconds_left -= time.thread_time() - begin

    def _push_new(self) -> float:
        """Push the answer's new tokens to the constraint. Returns the seconds spent on tokens that
        were pushed before and rolled back, which do not count again."""
        if self._failure is not None:
            raise self._failure
        again = 0.0
        while self._num_pushed < len(self._tokens):
            begin = time.thread_time()
            self._constraint.push(self._tokens[self._num_pushed])
            self._num_pushed += 1
            if self._num_pushed <= self._max_pushed:
                again += time.thread_time() - begin
            self._max_pushed = max(self._max_pushed, self._num_pushed)
        return again

    def _undo(self, num_tokens: int) -> None:
        try:
            self._constraint.rollback(num_tokens)
        except Exception as error:  # raised at the next use: others share this round
            self._failure = error


def checked(allowed: object, size: int) -> Tensor | None:
    """Return `allowed` if it is as `Constraint.allowed` specifies, else raise ValueError."""
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
