"""The KV cache: slots, tensors of each attention's own sizes, paths of trees, prefixes."""

from dataclasses import replace

import pytest
import torch
from toys import make_spec

from subspec.artifacts.footprint import Shape, cache_bytes, cache_slots
from subspec.artifacts.model import Block, LayerSpec, ModelSpec
from subspec.runtime.model import cache as cache_module
from subspec.runtime.model.cache import Cache, thinned


def make_cache() -> Cache:
    """2 attentions of 64 slots, 1 head of 1 number and 2 heads of 3: slot i holds i in keys, 100 +
    i in values."""
    slots = torch.arange(64.0)[:, None]
    keys = (slots.expand(1, 64, 1).clone(), slots.expand(2, 64, 3).clone())
    return Cache(keys, tuple(some + 100 for some in keys), tokens=[7, 8, 9])


def uneven_spec() -> ModelSpec:
    """Layers of 2 heads of 64, of 1 head of 32, and one with two attentions."""
    wide = make_spec(num_layers=1).layers[0]
    [attention] = wide.attentions
    small = replace(attention, num_kv_heads=1, head_size=32, name="other")
    narrow = LayerSpec((Block(small, "norm"), wide.blocks[1]))
    both = LayerSpec((wide.blocks[0], Block(small, "norm"), wide.blocks[1]))
    return make_spec(layers=(wide, narrow, both))


def test_a_path_moves_to_the_first_slots_of_the_tree_and_its_tokens_are_committed() -> None:
    cache = make_cache()
    cache.commit_path(torch.tensor([0, 2, 5]), [4, 5, 6])
    for attention in range(2):
        keys, values = cache.read(attention, 8)
        for head in range(keys.shape[0]):
            assert keys[head, :, -1].tolist() == [0, 1, 2, 3, 5, 8, 6, 7]
            assert values[head, :, -1].tolist() == [100, 101, 102, 103, 105, 108, 106, 107]
    assert (cache.tokens, cache.length) == ([7, 8, 9, 4, 5, 6], 6)


def test_a_path_may_end_in_anything_behind_the_tokens_that_are_kept() -> None:
    """Its length is fixed on the device; the slots behind the kept ones are written again."""
    cache = make_cache()
    cache.commit_path(torch.tensor([0, 3, 0, 0]), [4, 5])
    keys, _ = cache.read(0, 5)
    assert keys.flatten().tolist() == [0, 1, 2, 3, 6]
    assert cache.length == 5
    alone = make_cache()
    alone.commit_path(torch.tensor([0]), [4])
    assert alone.tokens == [7, 8, 9, 4]
    assert torch.equal(alone.read(1, 64)[0], make_cache().read(1, 64)[0])


def test_writing_goes_to_the_slots_it_is_told_of_one_attention() -> None:
    cache = make_cache()
    rows = torch.tensor([[[-1.0], [-2.0]]])  # [1 head, 2 rows, 1]
    cache.write(0, torch.tensor([4, cache.padding_slot]), rows, rows * 10)
    assert cache.read(0, 64)[0].flatten()[[4, 63]].tolist() == [-1, -2]
    assert cache.read(0, 64)[1].flatten()[[4, 63]].tolist() == [-10, -20]
    assert cache.read(1, 64)[0][:, 4].flatten().tolist() == [4] * 6


def test_what_is_written_takes_the_caches_dtype() -> None:
    cache = make_cache()
    rows = torch.full((1, 1, 1), 1.5).bfloat16()
    cache.write(0, torch.tensor([0]), rows, rows)
    assert cache.keys[0].dtype == torch.float32 and cache.keys[0][0, 0, 0] == 1.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_each_attention_has_tensors_of_its_own_sizes_and_the_ledger_grants_them(
    dtype: str,
) -> None:
    spec, taken = replace(uneven_spec(), dtype=dtype), list[int]()

    def take(shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
        made = torch.zeros(shape, dtype=kind)
        taken.append(-(-made.nbytes // 256) * 256)
        return made

    made = cache_module.make_cache(spec, 192, take)
    shapes = [(2, 192, 64), (1, 192, 32), (2, 192, 64), (1, 192, 32)]
    assert [tuple(keys.shape) for keys in made.keys] == shapes
    assert [tuple(values.shape) for values in made.values] == shapes
    assert {keys.dtype for keys in made.keys} == {getattr(torch, dtype)}
    assert (made.num_slots, made.padding_slot, made.length) == (192, 191, 0)
    assert 2 * sum(one.kv_size for one in spec.attentions) * spec.item_bytes * 192 == sum(taken)
    assert cache_bytes(spec, Shape(150, 3, 16, None, 64, 1, 8)) == 3 * sum(taken)


def test_attentions_are_counted_in_execution_order() -> None:
    names = [one.name for layer in uneven_spec().layers for one in layer.attentions]
    assert names == ["self_attn", "other", "self_attn", "other"]


def test_two_caches_are_never_the_same() -> None:
    """What is kept for a cache is found by the cache itself, not by what is in it."""
    one, other = make_cache(), make_cache()
    assert one != other and len({one, other}) == 2


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
    assert cache.live_slots(65) == 64


def test_a_tree_lies_behind_the_committed_tokens_and_all_of_it_is_live() -> None:
    wide = Cache((torch.zeros(1, 256, 1),), (torch.zeros(1, 256, 1),), tokens=[1] * 60)
    slots = wide.tree_slots(4)
    assert (int(slots.length), slots.live_slots, slots.padding_slot) == (60, 64, 255)
    assert wide.tree_slots(5).live_slots == 128


def test_a_tree_may_follow_fewer_tokens_than_are_committed_and_still_lies_behind_all() -> None:
    wide = Cache((torch.zeros(1, 256, 1),), (torch.zeros(1, 256, 1),), tokens=[1] * 60)
    slots = wide.tree_slots(5, after=20)
    assert (int(slots.length), int(slots.first), slots.live_slots) == (20, 60, 128)
    behind = wide.tree_slots(5)
    assert (int(behind.length), int(behind.first), behind.live_slots) == (60, 60, 128)


@pytest.mark.parametrize(
    ("lengths", "kept", "most", "left"),
    [
        ([16, 32, 48], [], 3, [16, 32, 48]),  # enough room
        ([16, 20, 48], [], 2, [20, 48]),  # 20 is near too, but only to 16
        ([16, 40, 48], [], 2, [16, 48]),  # the last one stays, however near
        ([16, 40, 48], [40], 2, [40, 48]),  # the nearest is kept
        ([16, 32, 48], [16], 1, [48]),  # a kept one goes when only kept ones are left
        ([16, 32, 48], [16, 32, 48], 2, [32, 48]),  # of kept ones the first goes
    ],
)
def test_thinned_lengths_lose_the_nearest_first_kept_ones_last_and_the_last_never(
    lengths: list[int], kept: list[int], most: int, left: list[int]
) -> None:
    assert thinned(lengths, kept, most) == left
