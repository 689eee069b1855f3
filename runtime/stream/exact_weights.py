"""The exact weights, layer after layer: `for product in weights`. What is not resident arrives
through a ring of staging slots, the next blocks copying while this one computes.

The order is cyclic: at the end of a pass the next pass's first blocks are already on their way, so
they arrive while the draft runs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial

import torch
from torch import Tensor

from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.model import Kind, Linear, ModelSpec, Part, StoredPart, linears
from subspec.artifacts.plan import Block
from subspec.runtime.clock import Record, unrecorded
from subspec.runtime.kernels.linear import exact_product, exact_product_into
from subspec.runtime.model.transformer import Product
from subspec.runtime.stream.link import Link
from subspec.runtime.stream.residual_decoder import ResidualDecoder

Check = Callable[[Block, Tensor], Callable[[], None]]  # begins; what it returns waits, and raises


def unchecked(block: Block, memory: Tensor) -> Callable[[], None]:
    return lambda: None


class Ring:
    """Blocks in cyclic order through a few slots. `take` is called in exactly that order."""

    def __init__(
        self,
        blocks: list[Block],
        offsets: list[int],
        link: Link,
        num_slots: int,
        check: Check = unchecked,
    ) -> None:
        """`check` finds bytes that are not the artifact's; asked when a block comes first. It runs
        beside the compute that reads the block, and is waited for before another one comes."""
        self.streamed_bytes = 0
        self._check = check
        self._checked: Callable[[], None] = lambda: None
        self._blocks = blocks
        self._offsets = offsets
        self._link = link
        self._num_slots = num_slots
        self._num_begun = 0
        self._num_taken = 0
        self._failure: SubspecError | None = None  # kept: nothing is taken after it
        for _ in range(num_slots):
            self._begin()

    def take(self) -> tuple[Block, Tensor]:
        """The next block and its bytes, valid until `give_back`."""
        if self._failure is not None:
            raise self._failure
        block = self._blocks[self._num_taken % len(self._blocks)]
        with self._failures_kept():
            memory = self._link.wait(self._num_taken % self._num_slots)
        if self._num_taken < len(self._blocks):
            self._checked = self._check(block, memory)
        self._num_taken += 1
        self.streamed_bytes += block.num_bytes
        return block, memory

    def give_back(self) -> None:
        """The compute that reads the block taken last is issued: its slot may be filled anew.
        Raises what the block's check found."""
        self.settle()
        self._link.release((self._num_taken - 1) % self._num_slots)
        self._begin()

    def settle(self) -> None:
        """Waits for the check of the block taken last, and raises what it found."""
        with self._failures_kept():
            self._checked()
        self._checked = lambda: None

    @contextmanager
    def _failures_kept(self) -> Iterator[None]:
        try:
            yield
        except SubspecError as error:
            self._failure = error
            raise

    def _begin(self) -> None:
        index = self._num_begun % len(self._blocks)
        slot = self._num_begun % self._num_slots
        self._link.begin(slot, self._offsets[index], self._blocks[index].num_bytes)
        self._num_begun += 1

    def skip_to_first(self) -> None:
        """After a pass that was cut short: take what is under way until block 0 is next."""
        while self._num_taken % len(self._blocks):
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
        stored: Sequence[StoredPart],
        fixed: dict[str, Tensor],
        held: dict[str, Tensor],
        biases: dict[str, Tensor],
        ring: Ring | None,
        residual_decoder: ResidualDecoder | None = None,
        record: Record = unrecorded,
    ) -> None:
        """fixed: linear name -> [N, K] that is never placed (tied head, odd shapes); held: part
        name -> [rows, K] or the uint8 [bytes] of its residual; biases: linear name -> [N]; ring:
        everything else; residual_decoder: where anything is a residual."""
        self.ring = ring
        self._num_layers = spec.num_layers
        self._linears = {(linear.layer, linear.kind): linear for linear in linears(spec)}
        self._parts: dict[str, list[StoredPart]] = {}
        for part in stored:
            self._parts.setdefault(part.part.linear.name, []).append(part)
        self._fixed = fixed
        self._held = held
        self._biases = biases
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._residual_decoder = residual_decoder
        self._record = record
        self._arrived: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[Product]:
        finished = False
        try:
            for layer in range(self._num_layers + 1):
                started = time.perf_counter()
                yield partial(self._product, layer)
                name = f"layer {layer}" if layer < self._num_layers else "head"
                self._record("layer", name, started, {})
            finished = True
        finally:
            # Of a pass that was cut short the ring keeps a failure: the next pass raises it.
            with nullcontext() if finished else suppress(SubspecError):
                self._give_back()
                if not finished and self.ring is not None:
                    self.ring.skip_to_first()
        if self._residual_decoder is not None:
            self._residual_decoder.check()

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
            started = time.perf_counter()
            product(x, fixed, out)
            self._record("product", linear.name, started, {})
            return
        for stored in self._parts[linear.name]:
            part = stored.part
            columns = slice(part.first_row, part.first_row + part.num_rows)
            weight = self._weight(part)
            started = time.perf_counter()
            product(x, weight, out[:, columns])
            self._record("product", part.name, started, {})

    def _weight(self, part: Part) -> Tensor:
        """[rows, K], valid until another part is asked for."""
        found = self._held.get(part.name)
        if found is None:
            found = self._streamed(part)
        if found.dtype != torch.uint8:
            return found
        assert self._residual_decoder is not None, f"{part.name} is a residual"
        try:
            return self._residual_decoder.restore(part, found)
        except SubspecError:
            if self.ring is not None:
                self.ring.settle()  # its digest says better what is wrong with it
            raise

    def _streamed(self, part: Part) -> Tensor:
        """As `held`; valid until a part of another block is asked for."""
        if part.name not in self._arrived:
            self._give_back()
            assert self.ring is not None
            block, memory = self.ring.take()
            self._arrived = self._views(block, memory)
            assert part.name in self._arrived, f"{part.name} was asked for out of order"
        return self._arrived[part.name]

    def _views(self, block: Block, memory: Tensor) -> dict[str, Tensor]:
        views, offset = {}, 0
        for stored in block.parts:
            found = memory[offset : offset + stored.num_bytes]
            if stored.encoding == "raw":
                found = found.view(self._dtype).view(stored.part.num_rows, -1)
            views[stored.name] = found
            offset += stored.padded_bytes
        return views

    def _give_back(self) -> None:
        if self._arrived:
            assert self.ring is not None
            self._arrived = {}
            self.ring.give_back()
