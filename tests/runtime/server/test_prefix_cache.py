"""Which states of delta nets a prefix in host memory keeps."""

import pytest
import torch

from subspec.runtime.model.cache import Checkpoint
from subspec.runtime.model.delta_net import DeltaState
from subspec.runtime.server.prefix_cache import bytes_of_states, few_states

STATES = (DeltaState(torch.zeros(3, 8), torch.zeros(2, 4, 4)),)
EACH = bytes_of_states(STATES)


def kept(lengths: list[int], ends: list[int], room: int, free: int) -> list[int]:
    """`room` and `free` in states."""
    found = {one: Checkpoint(one, STATES) for one in lengths}
    return [one.length for one in few_states(found, ends, room * EACH, free * EACH)]


@pytest.mark.parametrize("ends", [[], [24], [64], [24, 32], [32, 64], [100]])
def test_without_free_memory_only_the_last_state_and_those_at_ends_evict_others(
    ends: list[int],
) -> None:
    """An end has no state if it was not read, and may be the last state's place."""
    lengths = [16, 32, 48, 64]
    wanted = sorted({64, *ends} & {*lengths})
    assert kept(lengths, ends, room=5, free=0) == wanted
    assert kept(lengths, ends, room=5, free=4) == lengths
    assert kept(lengths, ends, room=1, free=0) == [64]


def test_without_states_nothing_is_kept() -> None:
    assert kept([], [16], room=5, free=5) == []
