"""A model of random weights in memory, and what a pass over it takes: no files, no plan."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.artifacts.model import HEAD, ModelSpec, StoredPart
from subspec.runtime.load import biases_of, unplaced_weights
from subspec.runtime.model.cache import Cache, make_cache
from subspec.runtime.model.net_state import make_net_states
from subspec.runtime.model.transformer import SharedWeights, make_shared, make_tables
from subspec.runtime.stream.exact_weights import ExactWeights
from subspec.runtime.stream.ring import StreamedParts


@dataclass(frozen=True)
class ToyWeights:
    spec: ModelSpec
    embedding: Tensor  # [V, H]
    tensors: dict[str, Tensor]  # what is always resident, by name
    matrices: dict[str, Tensor]  # every matrix [N, K], by name

    @property
    def stored(self) -> list[StoredPart]:
        return [StoredPart(part, "raw", part.num_bytes) for part in self.spec.parts]

    @property
    def resident(self) -> dict[str, Tensor]:
        """Every part, by name."""
        return {
            part.name: self.matrices[part.linear.name][
                part.first_row : part.first_row + part.num_rows
            ]
            for part in self.spec.parts
        }


def random_weights(spec: ModelSpec, seed: int = 0) -> ToyWeights:
    """Norms and biases are random too: ones and zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    dtype: torch.dtype = getattr(torch, spec.dtype)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    matrices = {}
    for linear in spec.linears:
        made = noise(linear.out_features, linear.in_features) * 1.5 * linear.in_features**-0.5
        if linear.name == HEAD:
            made[spec.vocab_size :] = 0
        matrices[linear.name] = made.to(dtype)
    tensors = {}
    for name, shape in spec.resident_shapes.items():
        if len(shape) == 2:
            tensors[name] = matrices[name.removesuffix(".weight")]
        else:
            around_zero = name.endswith(".bias") or spec.norm.zero_centered and "norm" in name
            middle = 0.0 if around_zero else 1.0
            own: torch.dtype = getattr(torch, spec.resident_dtype(name))
            tensors[name] = (middle + 0.2 * noise(*shape)).to(own)
    embedding = noise(spec.vocab_size, spec.hidden_size).to(dtype)
    return ToyWeights(spec, embedding, tensors, matrices)


def shared_weights(
    toy: ToyWeights, num_positions: int, dtype: torch.dtype | None = None
) -> SharedWeights:
    """dtype: the model's own unless it is given."""
    own: torch.dtype = dtype or getattr(torch, toy.spec.dtype)
    rows = toy.embedding.__getitem__
    tables = make_tables(toy.spec, num_positions, own, torch.clone)
    return make_shared(toy.spec, rows, toy.tensors, tables, own, torch.clone)


def exact_weights(
    toy: ToyWeights,
    streamed: StreamedParts | None = None,
    resident: Mapping[str, Tensor] | None = None,
) -> ExactWeights:
    """All resident, unless `resident` names fewer; `streamed` has the others."""
    return ExactWeights(
        toy.spec,
        toy.stored,
        unplaced_weights(toy.spec, toy.tensors),
        toy.resident if resident is None else resident,
        biases_of(toy.spec, toy.tensors),
        streamed,
    )


def empty_cache(
    spec: ModelSpec,
    num_slots: int,
    tensors: Mapping[str, Tensor] | None = None,
    verify_width: int = 24,
    windowed: int | None = None,
) -> Cache:
    """tensors: a toy's, for the states of delta nets. windowed: slots of layers with windows, if
    they have fewer."""

    def take(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    nets = make_net_states(spec, verify_width, tensors or {}, take)
    return make_cache(spec, num_slots, take, nets, (windowed, take) if windowed else None)
