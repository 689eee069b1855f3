"""What idle conversations left in their caches, kept in host memory: a next turn that comes back
need not read it again. What comes back has the same bits.
"""

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from subspec.runtime.model.cache import Cache
from subspec.runtime.sequence import Sequence

WORTH_KEEPING = 32  # tokens; fewer are read again quickly


@dataclass(frozen=True)
class Prefix:
    tokens: tuple[int, ...]
    kept: tuple[Tensor, ...]  # keys and values [B, T, D] of each attention, on the host

    @property
    def num_bytes(self) -> int:
        return sum(one.nbytes for one in self.kept) + 8 * len(self.tokens)


class PrefixCache:
    """Prefixes in at most `most_bytes` of host memory; the least recently used go first."""

    def __init__(self, most_bytes: int) -> None:
        self.num_bytes = 0
        self._most_bytes = most_bytes
        self._prefixes = OrderedDict[tuple[int, ...], Prefix]()  # the least recently used first

    def keep(self, sequence: Sequence, num_shared: int) -> None:
        """Copies what the sequence's cache holds, unless no more than its first `num_shared` tokens
        would be lost without that, or it is too little or too large."""
        count = sequence.num_reusable
        tokens = tuple(sequence.cache.tokens[:count])
        if count - num_shared < WORTH_KEEPING or self.longest(tokens)[1] == count:
            return
        wanted = count * bytes_per_token(sequence.cache)
        if wanted > self._most_bytes:
            return
        for known in [one for one in self._prefixes if one == tokens[: len(one)]]:
            self._drop(known)
        while self.num_bytes + wanted > self._most_bytes:
            self._drop(next(iter(self._prefixes)))
        tensors = (*sequence.cache.keys, *sequence.cache.values)
        kept = tuple(one[:, :count].to("cpu", copy=True) for one in tensors)
        self._prefixes[tokens] = Prefix(tokens, kept)
        self.num_bytes += self._prefixes[tokens].num_bytes

    def longest(self, prompt: tuple[int, ...]) -> tuple[Prefix | None, int]:
        """The prefix that shares most tokens with the prompt, and how many."""
        best, most = None, 0
        for tokens, prefix in self._prefixes.items():
            if (count := num_shared(tokens, prompt)) > most:
                best, most = prefix, count
        return best, most

    def restore(self, prefix: Prefix, count: int, sequence: Sequence) -> None:
        """The first `count` tokens of the prefix into the sequence's cache, which is empty after an
        error."""
        self._prefixes.move_to_end(prefix.tokens)
        sequence.restored([])
        tensors = (*sequence.cache.keys, *sequence.cache.values)
        for target, kept in zip(tensors, prefix.kept, strict=True):
            target[:, :count] = kept[:, :count]
        sequence.restored(list(prefix.tokens[:count]))

    def _drop(self, tokens: tuple[int, ...]) -> None:
        self.num_bytes -= self._prefixes.pop(tokens).num_bytes


def bytes_per_token(cache: Cache) -> int:
    tensors = (*cache.keys, *cache.values)
    return 8 + sum(one.shape[0] * one.shape[2] * one.element_size() for one in tensors)


def num_shared(some: tuple[int, ...], others: tuple[int, ...]) -> int:
    """Length of the common prefix."""
    if some[: len(others)] == others or others[: len(some)] == some:
        return min(len(some), len(others))
    return next(n for n, pair in enumerate(zip(some, others, strict=False)) if pair[0] != pair[1])
