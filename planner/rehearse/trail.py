"""States of delta nets at any position of an answer. A state cannot be cut back like a KV cache, so
its inputs are kept and replayed up to the wanted position."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspec.runtime.model.cache import Cache
from subspec.runtime.model.delta_net import DeltaInputs, commit
from subspec.runtime.model.net_state import States, copied_states, copy_state, tensors_of
from subspec.runtime.model.paths import chain_paths


@dataclass
class Trail:
    """States and inputs of one answer in a cache; empty without delta nets."""

    cache: Cache
    first: int = 0  # tokens before it
    states: States = ()  # behind them
    inputs: list[list[DeltaInputs]] = field(default_factory=list)  # of each delta net, in pieces
    reached: int = 0  # tokens that the cache's states are behind

    def begin(self) -> None:
        """Start at the end of the prompt, which is all that the cache holds."""
        self.first = self.reached = self.cache.length
        self.states = copied_states(self.cache.nets)
        self.inputs = [[] for _ in self.cache.nets]

    def add(self, path: Tensor) -> None:
        """Add the inputs of `path`, the nodes of the last tree that have been committed."""
        self.reached += len(path)
        for pieces, net in zip(self.inputs, self.cache.nets, strict=True):
            kept = (one[path].to("cpu", copy=True) for one in tensors_of(net.nodes))
            pieces.append(DeltaInputs(*kept))

    def cut(self, length: int) -> None:
        """Drop the tokens beyond `length`, which is within the answer."""
        if not self.cache.nets:
            self.cache.roll_back(length)
            return
        self.go_to(length)
        del self.cache.tokens[length:]

    def go_to(self, length: int) -> None:
        """Set the states to those after `length` tokens; the cache's tokens stay."""
        if self.reached > length:
            for net, state in zip(self.cache.nets, self.states, strict=True):
                copy_state(net.committed, state)
            self.reached = self.first
        if self.reached < length and self.cache.nets:
            paths = chain_paths(
                length - self.reached, self.cache.conv_kernel_size, self.cache.device
            )
            some = slice(self.reached - self.first, length - self.first)
            for pieces, net in zip(self.inputs, self.cache.nets, strict=True):
                kept = part_of(pieces, some, self.cache.device)
                commit(net.weights, net.committed, paths, kept)
        self.reached = length


def part_of(pieces: Sequence[DeltaInputs], some: slice, device: torch.device) -> DeltaInputs:
    whole = zip(*map(tensors_of, pieces), strict=True)
    return DeltaInputs(*(torch.cat(list(one))[some].to(device) for one in whole))
