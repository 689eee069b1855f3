"""The KV cache: slots, compaction, prefixes."""

import torch

from subspec.artifacts.plan import cache_slots
from subspec.runtime.model.cache import Cache


def make_cache() -> Cache:
    """2 layers, 1 KV head, 64 slots of 1 number: slot i holds i in keys, 100 + i in values."""
    keys = torch.arange(64.0).view(1, 1, 64, 1).expand(2, 1, 64, 1)
    return Cache(torch.stack((keys, keys + 100), dim=1).contiguous(), tokens=[7, 8, 9])


def test_compaction_moves_the_path_behind_the_committed_tokens() -> None:
    cache = make_cache()
    cache.compact(torch.tensor([0, 2, 5]))
    for layer in range(2):
        keys, values = cache.read(layer, 8)
        assert keys.flatten().tolist() == [0, 1, 2, 3, 5, 8, 6, 7]
        assert values.flatten().tolist() == [100, 101, 102, 103, 105, 108, 106, 107]


def test_writing_goes_to_the_slots_it_is_told() -> None:
    cache = make_cache()
    rows = torch.tensor([[[-1.0], [-2.0]]])  # [1 head, 2 rows, 1]
    cache.write(1, torch.tensor([4, cache.padding_slot]), rows, rows * 10)
    assert cache.read(1, 64)[0].flatten()[[4, 63]].tolist() == [-1, -2]
    assert cache.read(1, 64)[1].flatten()[[4, 63]].tolist() == [-10, -20]
    assert cache.read(0, 64)[0].flatten()[4] == 4


def test_the_common_prefix_is_checked_by_token_ids() -> None:
    cache = make_cache()
    assert cache.common_prefix([7, 8, 9, 10]) == 3
    assert cache.common_prefix([7, 8]) == 2
    assert cache.common_prefix([7, 1, 9]) == 1
    assert cache.common_prefix([]) == 0


def test_rolling_back_forgets_tokens_and_committing_adds_them() -> None:
    cache = make_cache()
    cache.roll_back(1)
    cache.commit([4, 5])
    assert (cache.tokens, cache.length) == ([7, 4, 5], 3)


def test_there_are_slots_for_the_context_a_tree_and_the_padding() -> None:
    assert cache_slots(context=100, verify_width=27) == 128
    assert cache_slots(context=100, verify_width=28) == 192


def test_live_lengths_are_aligned_and_never_longer_than_the_cache() -> None:
    cache = make_cache()
    assert cache.live_slots(1) == cache.live_slots(64) == 64
