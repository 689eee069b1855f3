"""benchmarks/rounds_on_paper.py: rounds whose luck is known, by hand."""

from dataclasses import replace
from types import ModuleType

import pytest
from scripts import benchmark

DEPTH = 10


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return benchmark("rounds_on_paper")


def always() -> float:
    return 0.0


def never() -> float:
    return 1.0


def test_a_round_of_today_is_a_draft_and_a_stream(script: ModuleType) -> None:
    machine = script.Machine(0.1, 2.0, 0.5, rest_seconds=0.0)
    played = script.play_alone(machine, DEPTH, 5, always, False)
    assert played.tokens_per_second == pytest.approx(11 / 3)
    assert played.link_busy == pytest.approx(2 / 3) and played.gpu_busy == pytest.approx(1.5 / 3)
    assert script.play_alone(machine, DEPTH, 5, never, False).tokens_per_second == pytest.approx(
        1 / 3
    )


def test_a_draft_ahead_helps_only_if_its_guess_holds(script: ModuleType) -> None:
    machine = script.Machine(0.1, 2.0, 0.5, rest_seconds=0.0)
    played = script.play_alone(machine, DEPTH, 5, always, True)
    assert played.tokens_per_second == pytest.approx(5 * 11 / (1.0 + 5 * 2.0))
    assert script.play_alone(machine, DEPTH, 5, never, True).tokens_per_second == pytest.approx(
        1 / 3
    )


def test_a_draft_ahead_has_only_the_time_in_which_nothing_is_verified(script: ModuleType) -> None:
    machine = script.Machine(0.1, 2.0, 1.65, rest_seconds=0.0)  # 3 levels
    played = script.play_alone(machine, DEPTH, 2, always, True)
    assert played.tokens_per_second == pytest.approx(2 * 11 / (1.0 + 0.7 + 2 * 2.0))


def test_two_sequences_share_a_stream_or_take_turns(script: ModuleType) -> None:
    machine = script.Machine(0.1, 2.0, 0.5, rest_seconds=0.0)
    turns = script.play_interleaved(machine, DEPTH, 5, always)
    assert turns.tokens_per_second == pytest.approx(11 / 2)
    together = script.play_batched(machine, DEPTH, 5, always)
    assert together.tokens_per_second == pytest.approx(22 / (1.1 + 2.0))
    slow = replace(machine, verify_seconds=1.5)
    assert script.play_batched(slow, DEPTH, 5, always).tokens_per_second == pytest.approx(22 / 4.1)
