"""The exact weights, layer after layer: `for product in weights`. Parts that are not resident are
streamed: while one part computes, the next ones are copied into staging slots.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.model import Linear, ModelSpec, Part, StoredPart, layer_name
from subspec.runtime.clock import Record, unrecorded
from subspec.runtime.kernels.linear import GemmRanges, exact_product, exact_product_into
from subspec.runtime.model.transformer import Product
from subspec.runtime.stream.residual_decoder import ResidualDecoder
from subspec.runtime.stream.ring import StreamedParts


class ExactWeights:
    """Iterating yields the products of each layer and then of the head, once, in execution
    order."""

    def __init__(
        self,
        spec: ModelSpec,
        stored: Sequence[StoredPart],
        unplaced: Mapping[str, Tensor],
        resident: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        streamed: StreamedParts | None,
        residual_decoder: ResidualDecoder | None = None,
        record: Record = unrecorded,
    ) -> None:
        """unplaced: matrix name -> [N, K], of matrices without a substitute; resident: part name ->
        as `view_of` returns it; biases: matrix name -> [N]; streamed: all other parts;
        residual_decoder: needed if any part is a residual or FP8 codes when it is used."""
        self.streamed = streamed
        self._num_layers = spec.num_layers
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._linears = {linear.name: linear for linear in spec.linears}
        self._parts: dict[str, list[Part]] = {}
        for one in stored:
            self._parts.setdefault(one.part.linear.name, []).append(one.part)
        self._unplaced = unplaced
        self._resident = resident
        self._biases = biases
        self._residual_decoder = residual_decoder
        self._record = record

    def __iter__(self) -> Iterator[Product]:
        if self.streamed is not None:
            self.streamed.begin_pass()
        for layer in range(self._num_layers):
            started = time.perf_counter()
            yield partial(self._product, f"{layer_name(layer)}.")
            self._record("layer", f"layer {layer}", started, {})
        started = time.perf_counter()
        yield partial(self._product, "")
        self._record("layer", "head", started, {})
        if self.streamed is not None:
            self.streamed.end_pass()
        if self._residual_decoder is not None:
            self._residual_decoder.check()

    @property
    def streamed_bytes(self) -> int:
        return 0 if self.streamed is None else self.streamed.streamed_bytes

    @property
    def wait_seconds(self) -> float:
        return 0.0 if self.streamed is None else self.streamed.wait_seconds

    def _product(
        self, prefix: str, name: str, x: Tensor, calls: GemmRanges, gate: Tensor | None = None
    ) -> Tensor:
        linear = self._linears[prefix + name]
        bias = self._biases.get(linear.name)
        if gate is not None and bias is None:
            self._each_part(linear, x, gate, calls, exact_product_into)
            return gate
        out = x.new_empty(x.shape[0], linear.out_features)
        self._each_part(linear, x, out, calls, exact_product)
        if bias is not None:
            out += bias
        return out if gate is None else gate.mul_(out)

    def _each_part(
        self,
        linear: Linear,
        x: Tensor,
        out: Tensor,
        calls: GemmRanges,
        product: Callable[[Tensor, Tensor, Tensor, GemmRanges], None],
    ) -> None:
        whole = self._unplaced.get(linear.name)
        if whole is not None:
            started = time.perf_counter()
            product(x, whole, out, calls)
            self._record("product", linear.name, started, {})
            return
        for part in self._parts[linear.name]:
            columns = slice(part.first_row, part.first_row + part.num_rows)
            weight = self._weight(part)
            started = time.perf_counter()
            product(x, weight, out[:, columns], calls)
            self._record("product", part.name, started, {})

    def _weight(self, part: Part) -> Tensor:
        """Exact weights [rows, K] of a part, valid until the next call."""
        found = self._resident.get(part.name)
        if found is None:
            assert self.streamed is not None, f"{part.name} is neither resident nor streamed"
            found = self.streamed.take(part.name)
        if found.dtype == self._dtype:
            return found
        assert self._residual_decoder is not None, f"{part.name} is a residual, or in FP8"
        try:
            return self._residual_decoder.decode(part, found)
        except SubspecError:
            if self.streamed is not None:
                self.streamed.settle()  # a wrong digest is the better error message
            raise
