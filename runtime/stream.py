"""The exact weights, layer after layer: `for product in weights`. What is not resident arrives
through a ring of staging slots, the next blocks copying while this one computes.

The order is cyclic: at the end of a pass the next pass's first blocks are already on their way, so
they arrive while the draft runs.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from subspec.artifacts.errors import SubspecError
from subspec.artifacts.model import Kind, Linear, ModelSpec, Part, linears, parts
from subspec.artifacts.plan import Block
from subspec.runtime.linear import exact_product, exact_product_into
from subspec.runtime.link import Link
from subspec.runtime.transformer import Product


class Ring:
    """Blocks in cyclic order through a few slots. `take` is called in exactly that order."""

    def __init__(self, blocks: list[Block], offsets: list[int], link: Link, num_slots: int) -> None:
        self.streamed_bytes = 0
        self._blocks = blocks
        self._offsets = offsets
        self._link = link
        self._num_slots = num_slots
        self._num_begun = 0
        self._num_taken = 0
        self._failed = False
        for _ in range(num_slots):
            self._begin()

    def take(self) -> tuple[Block, Tensor]:
        """The next block and its bytes, valid until `give_back`."""
        block = self._blocks[self._num_taken % len(self._blocks)]
        try:
            memory = self._link.wait(self._num_taken % self._num_slots)
        except SubspecError:
            self._failed = True
            raise
        self._num_taken += 1
        self.streamed_bytes += block.num_bytes
        return block, memory

    def give_back(self) -> None:
        """The compute that reads the block taken last is issued: its slot may be filled anew."""
        self._link.release((self._num_taken - 1) % self._num_slots)
        self._begin()

    def _begin(self) -> None:
        index = self._num_begun % len(self._blocks)
        slot = self._num_begun % self._num_slots
        self._link.begin(slot, self._offsets[index], self._blocks[index].num_bytes)
        self._num_begun += 1

    def skip_to_first(self) -> None:
        """After a pass that was cut short: take what is under way until block 0 is next."""
        while self._num_taken % len(self._blocks) and not self._failed:
            self.take()
            self.give_back()

    @property
    def wait_seconds(self) -> float:
        return self._link.wait_seconds

    def close(self) -> None:
        self._link.close()


class ExactWeights:
    """Iterating yields the products of each layer and then of the head, once, in order."""

    def __init__(
        self,
        spec: ModelSpec,
        fixed: dict[str, Tensor],
        resident: dict[str, Tensor],
        biases: dict[str, Tensor],
        ring: Ring | None,
    ) -> None:
        """fixed: linear name -> [N, K] that is never placed (tied head, odd shapes); resident:
        part name -> [rows, K]; biases: linear name -> [N]; ring: everything else."""
        self.ring = ring
        self._num_layers = spec.num_layers
        self._linears = {(linear.layer, linear.kind): linear for linear in linears(spec)}
        self._parts: dict[str, list[Part]] = {}
        for part in parts(spec):
            self._parts.setdefault(part.linear.name, []).append(part)
        self._fixed = fixed
        self._resident = resident
        self._biases = biases
        self._dtype = getattr(torch, spec.dtype)
        self._arrived: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[Product]:
        finished = False
        try:
            for layer in range(self._num_layers + 1):
                yield partial(self._product, layer)
            finished = True
        finally:
            self._give_back()
            if not finished and self.ring is not None:
                self.ring.skip_to_first()

    @property
    def streamed_bytes(self) -> int:
        return 0 if self.ring is None else self.ring.streamed_bytes

    @property
    def wait_seconds(self) -> float:
        return 0.0 if self.ring is None else self.ring.wait_seconds

    def close(self) -> None:
        if self.ring is not None:
            self.ring.close()

    def _product(self, layer: int, kind: Kind, x: Tensor, gate: Tensor | None = None) -> Tensor:
        linear = self._linears[layer, kind]
        bias = self._biases.get(linear.name)
        if gate is not None and bias is None:
            self._each_part(linear, x, gate, exact_product_into)
            return gate
        out = x.new_empty(x.shape[0], linear.out_features)
        self._each_part(linear, x, out, exact_product)
        if bias is not None:
            out += bias
        return out if gate is None else gate.mul_(out)

    def _each_part(
        self,
        linear: Linear,
        x: Tensor,
        out: Tensor,
        product: Callable[[Tensor, Tensor, Tensor], None],
    ) -> None:
        fixed = self._fixed.get(linear.name)
        if fixed is not None:
            product(x, fixed, out)
            return
        for part in self._parts[linear.name]:
            columns = slice(part.first_row, part.first_row + part.num_rows)
            product(x, self._weight(part), out[:, columns])

    def _weight(self, part: Part) -> Tensor:
        """[rows, K]; a streamed part is valid until a part of another block is asked for."""
        if (found := self._resident.get(part.name)) is not None:
            return found
        if part.name not in self._arrived:
            self._give_back()
            assert self.ring is not None
            block, memory = self.ring.take()
            self._arrived = self._views(block, memory)
            assert part.name in self._arrived, f"{part.name} was asked for out of order"
        return self._arrived[part.name]

    def _views(self, block: Block, memory: Tensor) -> dict[str, Tensor]:
        views, offset = {}, 0
        for part in block.parts:
            raw = memory[offset : offset + part.num_bytes]
            views[part.name] = raw.view(self._dtype).view(part.num_rows, -1)
            offset += part.padded_bytes
        return views

    def _give_back(self) -> None:
        if self._arrived:
            assert self.ring is not None
            self._arrived = {}
            self.ring.give_back()
