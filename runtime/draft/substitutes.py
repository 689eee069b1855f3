"""The substitutes: 4-bit products for every layer and the head, always in fast memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from subspec.artifacts.model import Kind
from subspec.runtime.kernels.linear import Int4Weight, int4_product
from subspec.runtime.model.transformer import Product


@dataclass(frozen=True)
class Substitutes:
    """Iterating yields the products of each layer and then of the head, like ExactWeights."""

    num_layers: int
    weights: dict[tuple[int, Kind], Int4Weight | Tensor]  # Tensor: exact, where 4 bits do not fit
    biases: dict[tuple[int, Kind], Tensor]

    def __iter__(self) -> Iterator[Product]:
        for layer in range(self.num_layers + 1):
            yield partial(self._product, layer)

    def _product(self, layer: int, kind: Kind, x: Tensor, gate: Tensor | None = None) -> Tensor:
        weight = self.weights[layer, kind]
        if isinstance(weight, Int4Weight):
            out = int4_product(x, weight)
        else:
            out = F.linear(x.to(weight.dtype), weight).to(x.dtype)
        bias = self.biases.get((layer, kind))
        if bias is not None:
            out += bias
        return out if gate is None else gate.mul_(out)
