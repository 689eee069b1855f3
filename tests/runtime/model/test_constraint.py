"""A constraint that is slow or fails: what that means for an answer, and what for its drafts."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.model import constraint
from subspec.runtime.model.constraint import ConstraintFollower

END = 0


@dataclass
class Fragile:
    """Allows every token; fails after texts that begin with `dead_end`."""

    dead_end: Sequence[int] = ()
    said: list[int] = field(default_factory=list)
    num_failures: int = 0
    seconds: float = 0.0  # of work in each question

    def allowed(self) -> Tensor | None:
        begin = time.thread_time()
        while time.thread_time() - begin < self.seconds:
            pass
        if self.dead_end and self.said[: len(self.dead_end)] == list(self.dead_end):
            self.num_failures += 1
            raise SubspecError(Exit.USAGE, "the grammar is too complex")
        return torch.ones(9, dtype=torch.bool)

    def push(self, token: int) -> None:
        self.said.append(token)

    def rollback(self, num_tokens: int) -> None:
        del self.said[len(self.said) - num_tokens :]


def follower(fragile: Fragile) -> ConstraintFollower:
    return ConstraintFollower(fragile, frozenset({END}))


def test_a_failed_draft_is_not_tried_again_until_the_answer_is_beyond_that_place() -> None:
    fragile = Fragile(dead_end=(1, 2, 3))
    one = follower(fragile)
    one.push(1)
    assert one.allowed_after([2], 9) is not None
    assert [one.allowed_after([2, 3], 9) for _ in range(5)] == [None] * 5
    assert one.allowed_after([2], 9) is None and fragile.num_failures == 1
    for token in (2, 4):
        one.push(token)
        assert one.allowed(9) is not None, "the answer goes on"
    assert one.allowed_after([3], 9) is None
    one.push(5)
    assert one.allowed_after([3], 9) is not None and fragile.num_failures == 1
    assert fragile.said == [1, 2, 4, 5]


def test_what_has_failed_for_a_draft_is_asked_again_for_the_answer() -> None:
    fragile = Fragile(dead_end=(1, 2))
    one = follower(fragile)
    one.push(1)
    assert one.allowed_after([2], 9) is None
    fragile.dead_end = ()  # a grammar gets easier to follow as more of it has been seen
    one.push(2)
    assert one.allowed(9) is not None
    fragile.dead_end = (1, 2)
    with pytest.raises(SubspecError, match="too complex"):
        one.allowed(9)


def test_an_error_that_nobody_foresaw_is_one_of_the_answer_and_of_no_draft() -> None:
    class Broken(Fragile):
        def allowed(self) -> Tensor | None:
            raise KeyError("a bug")

    one = follower(Broken())
    assert one.allowed_after([], 9) is None
    with pytest.raises(SubspecError, match="the grammar of the answer failed: KeyError") as caught:
        one.allowed(9)
    assert caught.value.exit_code == Exit.UNEXPECTED


def test_a_place_that_the_answer_left_again_is_no_problem_of_it() -> None:
    one = follower(Fragile(dead_end=(1, 2)))
    for token in (1, 2):
        one.push(token)
    one.rollback(1)
    assert one.allowed(9) is not None
    one.push(2)
    with pytest.raises(SubspecError, match="too complex"):
        one.allowed(9)
    one.rollback(1)
    one.push(3)
    assert one.allowed(9) is not None


def test_after_the_first_end_token_nothing_is_asked() -> None:
    fragile = Fragile()
    one = follower(fragile)
    for token in (4, END, 5):
        one.push(token)
    assert one.allowed(9) is None and one.allowed_after([6], 9) is None
    assert fragile.said == []
    one.rollback(2)
    assert one.allowed(9) is not None and fragile.said == [4]


def test_an_answer_whose_grammar_gets_too_slow_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint, "ANSWER_SECONDS", 0.05)
    one, count = follower(Fragile(seconds=0.02)), 0
    with pytest.raises(SubspecError, match="takes too long to follow") as caught:
        for count in range(20):  # noqa: B007
            one.allowed(9)
    assert 2 < count < 10 and caught.value.exit_code == Exit.USAGE


def test_the_time_that_drafts_take_is_not_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint, "ANSWER_SECONDS", 0.05)
    fragile = Fragile(seconds=0.02)
    one = follower(fragile)
    pruned = [one.allowed_after([], 9) is not None for _ in range(20)]
    assert pruned[0] and not all(pruned), "drafts are left unpruned when their time is spent"
    fragile.seconds = 0
    assert one.allowed(9) is not None
    assert any(one.allowed_after([], 9) is not None for _ in range(100)), "but not for ever"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (torch.ones(8, dtype=torch.bool), "gave torch.bool [8], expected torch.bool [9]"),
        (torch.ones(9), "gave torch.float32 [9], expected torch.bool [9]"),
        ([True] * 9, "gave a list, expected a tensor or None"),
        (torch.zeros(9, dtype=torch.bool), "allows no token"),
    ],
    ids=["short", "float", "list", "nothing"],
)
def test_what_is_no_mask_ends_the_answer_and_prunes_no_draft(given: object, told: str) -> None:
    class Odd(Fragile):
        def allowed(self) -> Tensor | None:
            return given  # type: ignore[return-value]

    one = follower(Odd())
    assert one.allowed_after([], 9) is None
    with pytest.raises(SubspecError, match=re.escape(told)):
        one.allowed(9)


def test_a_pop_that_fails_ends_its_answer_where_it_goes_on_and_no_earlier() -> None:
    class Forgetful(Fragile):
        def rollback(self, num_tokens: int) -> None:
            if num_tokens:
                raise KeyError("lost")

    one = follower(Forgetful())
    one.push(3)
    assert one.allowed(9) is not None
    one.rollback(1)
    assert one.allowed_after([], 9) is None
    with pytest.raises(SubspecError, match="the grammar of the answer failed"):
        one.allowed(9)


def test_what_is_told_again_is_not_paid_for_again() -> None:
    """Verification tells the constraint of tokens, takes them back, and they are kept."""

    class Slow(Fragile):
        def push(self, token: int) -> None:
            begin = time.thread_time()
            while time.thread_time() - begin < 0.02:
                pass
            super().push(token)

    left = []
    for times in (1, 4):
        one = follower(Slow())
        for _ in range(times):
            for token in (1, 2, 3):
                one.push(token)
            one.allowed(9)
            one.rollback(3)
        left.append(one._seconds_left)
    assert left[1] > left[0] - 0.02
