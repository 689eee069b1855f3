"""The substitutes: 4-bit products for every layer and the head, always in fast memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from subspec.artifacts.model import layer_name
from subspec.runtime.kernels.linear import GemmRanges, Int4Weight, int4_product, product
from subspec.runtime.model.transformer import Product


@dataclass(frozen=True)
class Substitutes:
    """The 4-bit products. Iterating yields those of each layer, then of the head, like
    ExactWeights."""

    num_layers: int
    weights: Mapping[str, Int4Weight | Tensor]  # by matrix; Tensor: exact, no 4-bit form
    biases: Mapping[str, Tensor]

    def __iter__(self) -> Iterator[Product]:
        for layer in range(self.num_layers):
            yield partial(self._product, f"{layer_name(layer)}.")
        yield self.head

    @property
    def head(self) -> Product:
        return partial(self._product, "")

    def _product(
        self, prefix: str, name: str, x: Tensor, calls: GemmRanges, gate: Tensor | None = None
    ) -> Tensor:
        """Multiply all rows at once: a draft need not be batch-invariant."""
        weight, bias = self.weights[prefix + name], self.biases.get(prefix + name)
        if isinstance(weight, Int4Weight):
            out = int4_product(x, weight)
        else:
            out = product(x.to(weight.dtype), weight).to(x.dtype)
        if bias is not None:
            out += bias
        return out if gate is None else gate.mul_(out)
