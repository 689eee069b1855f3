"""KV cache prefixes of idle conversations in host memory, so that a returning conversation is not
prefilled again. Restored bits are identical."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from subspec.artifacts.footprint import CHECKPOINTS
from subspec.runtime.model.cache import Cache, Checkpoint, thinned
from subspec.runtime.model.delta_net import DeltaState
from subspec.runtime.model.net_state import States
from subspec.runtime.model.windows import windows_reach
from subspec.runtime.sequence import Sequence

WORTH_KEEPING = 32  # tokens; fewer are quick to prefill


@dataclass(frozen=True)
class Prefix:
    tokens: tuple[int, ...]
    # Keys and values [B, T, D] of each attention, on the host; with sliding windows of the last
    # tokens only, if the cache has no more
    kept: tuple[Tensor, ...]
    # States of delta nets; the last one is after all tokens
    checkpoints: tuple[Checkpoint, ...] = ()
    window_start: int = 0  # first token in layers with sliding windows
    window: int = 0  # the widest

    @property
    def num_bytes(self) -> int:
        states = (bytes_of_states(one.states) for one in self.checkpoints)
        return sum(one.nbytes for one in self.kept) + sum(states) + 8 * len(self.tokens)

    def reachable(self, count: int) -> int:
        """Number of tokens, at most `count`, that can be restored."""
        if self.checkpoints:
            before = (one.length for one in self.checkpoints if one.length <= count)
            count = max(before, default=0)
        return count if windows_reach(count, self.window_start, self.window) else 0


class PrefixCache:
    """Prefixes in at most `most_bytes` of host memory, with LRU eviction."""

    def __init__(self, most_bytes: int) -> None:
        self.num_bytes = 0
        self._most_bytes = most_bytes
        self._prefixes = OrderedDict[tuple[int, ...], Prefix]()  # the least recently used first

    def keep(self, sequence: Sequence, num_shared: int) -> None:
        """Copy the sequence's cache, unless that would save no more than its first `num_shared`
        tokens or its size is out of bounds. Replaces prefixes that it extends and takes over their
        delta net states."""
        count = sequence.num_cacheable
        tokens = tuple(sequence.cache.tokens[:count])
        if count - num_shared < WORTH_KEEPING or self.longest(tokens)[1] == count:
            return
        cache = sequence.cache
        begun = [one for one in self._prefixes if one == tokens[: len(one)]]
        known = {one.length: one for some in begun for one in self._prefixes[some].checkpoints}
        found = {one.length: one for one in states_until(cache, count)} | known
        kept = held_until(cache, count)
        wanted = 8 * count + sum(one.nbytes for one in kept)
        room = self._most_bytes - wanted
        free = room - self.num_bytes + sum(self._prefixes[one].num_bytes for one in begun)
        sources = few_states(found, cache.ends, room, free)
        wanted += sum(bytes_of_states(one.states) for one in sources)
        if wanted > self._most_bytes:
            return
        for one in begun:
            self._drop(one)
        while self.num_bytes + wanted > self._most_bytes:
            self._drop(next(iter(self._prefixes)))
        copies = tuple(one.to("cpu", copy=True) for one in kept)
        states = tuple(
            known.get(one.length) or Checkpoint(one.length, on_host(one.states)) for one in sources
        )
        windows = cache.windows
        start, widest = (0, 0) if windows is None else (windows.start, windows.widest)
        self._prefixes[tokens] = Prefix(tokens, copies, states, start, widest)
        self.num_bytes += self._prefixes[tokens].num_bytes

    def longest(self, prompt: tuple[int, ...]) -> tuple[Prefix | None, int]:
        """Return the prefix with the most tokens in common with the prompt, and their number."""
        best, most = None, 0
        for tokens, prefix in self._prefixes.items():
            if (count := prefix.reachable(num_shared(tokens, prompt))) > most:
                best, most = prefix, count
        return best, most

    def restore(self, prefix: Prefix, count: int, sequence: Sequence) -> None:
        """Restore the first `count` tokens of the prefix into the sequence's cache; after an error
        it is empty."""
        if prefix.tokens in self._prefixes:  # else it was just evicted
            self._prefixes.move_to_end(prefix.tokens)
        sequence.restore([])
        states = [one for one in prefix.checkpoints if one.length <= count]
        cache = sequence.cache
        firsts = first_tokens(cache, prefix.window_start)
        tensors = (*cache.keys, *cache.values)
        for target, kept, first in zip(tensors, prefix.kept, firsts, strict=True):
            target[:, : count - first] = kept[:, : count - first]
        sequence.restore(list(prefix.tokens[:count]), states, prefix.window_start)

    def _drop(self, tokens: tuple[int, ...]) -> None:
        self.num_bytes -= self._prefixes.pop(tokens).num_bytes


def held_until(cache: Cache, count: int) -> list[Tensor]:
    """Views of the cached keys and values of the first `count` tokens, keys before values."""
    start = 0 if cache.windows is None else cache.windows.start
    indices = 2 * [*range(len(cache.keys))]
    tensors, firsts = (*cache.keys, *cache.values), first_tokens(cache, start)
    return [
        one[:, cache.places(index, first, count)]
        for index, one, first in zip(indices, tensors, firsts, strict=True)
    ]


def first_tokens(cache: Cache, window_start: int) -> list[int]:
    """Index of the first cached token of each attention's keys, then values, where sliding windows
    keep the tokens from `window_start` on."""
    windowed = frozenset[int]() if cache.windows is None else cache.windows.attentions
    return 2 * [window_start if index in windowed else 0 for index in range(len(cache.keys))]


def states_until(cache: Cache, count: int) -> list[Checkpoint]:
    """States of delta nets within the first `count` tokens; the last one is after all of them."""
    found = [one for one in cache.checkpoints if one.length <= count]
    if cache.nets and count == cache.length:
        live = Checkpoint(count, cache.committed_states)
        return [*(one for one in found if one.length < count), live]
    return found


def few_states(
    found: Mapping[int, Checkpoint], ends: list[int], room: int, free: int
) -> list[Checkpoint]:
    """Choose states to keep: first the last one and those at `ends`, where the next turn may
    diverge, within `room` bytes; then others within `free` bytes, which evict no other prefix. At
    most as many as a cache can hold."""
    if not found:
        return []
    of_each = bytes_of_states(found[max(found)].states)
    wanted = len({max(found), *ends} & found.keys())
    most = min(CHECKPOINTS, room // of_each, max(free // of_each, wanted))
    return [found[one] for one in thinned(sorted(found), ends, max(1, most))]


def on_host(states: States) -> States:
    """Copy the states to host memory."""
    return tuple(
        DeltaState(one.conv.to("cpu", copy=True), one.memory.to("cpu", copy=True)) for one in states
    )


def bytes_of_states(states: States) -> int:
    return sum(one.conv.nbytes + one.memory.nbytes for one in states)


def num_shared(some: tuple[int, ...], others: tuple[int, ...]) -> int:
    """Length of the common prefix."""
    if some[: len(others)] == others or others[: len(some)] == some:
        return min(len(some), len(others))
    return next(n for n, pair in enumerate(zip(some, others, strict=False)) if pair[0] != pair[1])
