"""A constraint that applies a grammar after the model's thinking.

V = vocabulary
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy
import torch
from torch import Tensor

from subspec.runtime.model.constraint import Constraint
from subspec.runtime.server.grammar_tokens import GrammarTokens

MAX_NEWLINES = 2  # between the end of the thinking and the answer


@dataclass(frozen=True)
class Thinking:
    """The marks of a model's thinking and token masks for them, computed by `read_thinking`.

    begin: token that opens the thinking; None if it is not a single token.
    end: text that closes it, one token or several.
    allowed: bool [V] by the number of bytes of `end` generated so far; never an end-of-answer
        token, since a constrained answer must not end within its thinking.
    newlines: bool [V] by the number of newlines still allowed: tokens of at most that many.
    """

    begin: int | None
    end: bytes
    contents: tuple[bytes, ...]
    allowed: tuple[Tensor, ...]
    newlines: tuple[Tensor, ...]


def read_thinking(tokens: GrammarTokens, begin: str, end: str) -> Thinking:
    """Return the `Thinking` of the tags `begin` and `end`, such as <think> and </think>. Takes
    about 0.2 s for 152k tokens."""
    tag = end.encode()
    return Thinking(
        tokens.special.get(begin),
        tag,
        tokens.contents,
        tuple(_allowed(tokens, tag[:said], tag) for said in range(len(tag))),
        tuple(_newlines(tokens, most) for most in range(MAX_NEWLINES + 1)),
    )


class State(NamedTuple):
    """Progress of the thinking. said: matched bytes of `end`; in a gap, newlines so far."""

    phase: Literal["begin", "thinking", "gap", "answer"]
    said: int = 0


class AfterThinking:
    """Apply the constraint `answer` once the thinking ends. is_open: the prompt ends within the
    thinking; otherwise the model may open it with its first token, or answer at once."""

    def __init__(self, thinking: Thinking, is_open: bool, answer: Constraint) -> None:
        self._thinking = thinking
        self._answer = answer
        self._state = State("thinking" if is_open else "begin")
        self._before: list[State] = []  # the state before each token

    def allowed(self) -> Tensor | None:
        phase, said = self._state
        if phase == "thinking":
            return self._thinking.allowed[said]
        allowed = self._answer.allowed()
        if allowed is None or phase == "answer":
            return allowed
        if phase == "gap":
            return allowed | self._thinking.newlines[MAX_NEWLINES - said]
        if self._thinking.begin is None:
            return allowed
        allowed = allowed.clone()
        allowed[self._thinking.begin] = True
        return allowed

    def push(self, token: int) -> None:
        after = self._after(token)
        if after.phase == "answer":
            self._answer.push(token)
        self._before.append(self._state)
        self._state = after

    def rollback(self, num_tokens: int) -> None:
        if num_tokens > len(self._before):
            raise ValueError(f"pop of {num_tokens} tokens, {len(self._before)} were pushed")
        states = [*self._before[len(self._before) - num_tokens :], self._state]
        del self._before[len(self._before) - num_tokens :]
        self._state = states[0]
        self._answer.rollback(sum(state.phase == "answer" for state in states[1:]))

    def _after(self, token: int) -> State:
        phase, said = self._state
        content = self._thinking.contents[token]
        if phase == "begin":
            return State("thinking" if token == self._thinking.begin else "answer")
        if phase == "thinking":
            seen = self._thinking.end[:said] + content
            at = seen.find(self._thinking.end)
            if at < 0:
                return State("thinking", _overlap(seen, self._thinking.end))
            return State("gap", len(seen) - at - len(self._thinking.end))
        if phase == "gap" and _num_newlines(content) in range(1, MAX_NEWLINES - said + 1):
            return State("gap", said + len(content))
        return State("answer")


def _allowed(tokens: GrammarTokens, said: bytes, end: bytes) -> Tensor:
    """Mask of all tokens but end tokens and those that hold both the end of the thinking and text
    of the answer, which the grammar could not check."""
    allowed = numpy.ones(len(tokens.contents), bool)
    allowed[list(tokens.ends)] = False
    for token, content in enumerate(tokens.contents):
        if end[-1:] not in content:
            continue
        at = (said + content).find(end)
        if at >= 0:
            rest = (said + content)[at + len(end) :]
            allowed[token] &= 0 <= _num_newlines(rest) <= MAX_NEWLINES
    return torch.from_numpy(allowed)


def _newlines(tokens: GrammarTokens, most: int) -> Tensor:
    fit = [1 <= _num_newlines(content) <= most for content in tokens.contents]
    for token in tokens.ends:
        fit[token] = False
    return torch.tensor(fit, dtype=torch.bool)


def _num_newlines(content: bytes) -> int:
    """Number of newlines in `content`; -1 if it has other bytes."""
    return len(content) if content.strip(b"\n") == b"" else -1


def _overlap(said: bytes, end: bytes) -> int:
    """Length of the longest suffix of `said` that is a proper prefix of `end`."""
    longest = min(len(said), len(end) - 1)
    return next(n for n in range(longest, -1, -1) if said.endswith(end[:n]))
