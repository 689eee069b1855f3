"""An excerpt of a model that tells the speed of the whole: some layers, some of the head, random
weights."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from subspec.artifacts.model import (
    EMBEDDING,
    GROUP_SIZE,
    PAGE_BYTES,
    ModelSpec,
    linears,
    parts,
    resident_tensors,
)

CYCLED_BYTES = 96 << 20  # a pass goes through this many bytes of weights: caches must not flatter
MOST_LAYERS = 24


def excerpt(spec: ModelSpec) -> ModelSpec:
    """As many layers as make CYCLED_BYTES of 4-bit weights, at least one; of a larger head only as
    many rows as make CYCLED_BYTES."""
    layer_bytes = sum(linear.num_weights for linear in linears(spec) if linear.layer == 0) // 2
    num_layers = max(1, min(spec.num_layers, MOST_LAYERS, CYCLED_BYTES // max(1, layer_bytes)))
    rows = max(64, CYCLED_BYTES // (spec.hidden_size * spec.item_bytes) // 64 * 64)
    # The remainder decides whether the head has a substitute.
    vocab_size = spec.vocab_size if spec.vocab_size <= rows else rows + spec.vocab_size % 16
    return replace(
        spec,
        num_layers=num_layers,
        vocab_size=vocab_size,
        windowed_layers=tuple(layer for layer in spec.windowed_layers if layer < num_layers),
    )


class Room(Protocol):
    """The runtime's fast memory."""

    def take(self, purpose: str, num_bytes: int, alignment: int = 1, /) -> Tensor: ...
    def take_tensor(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...


def random_resident_tensors(spec: ModelSpec, room: Room) -> dict[str, Tensor]:
    """Embedding, norms, biases and odd-shaped matrices, by checkpoint name."""
    found = {}
    for name, shape in resident_tensors(spec).items():
        purpose = "embedding" if name.startswith(EMBEDDING) else "norms"
        found[name] = room.take_tensor(purpose, shape, getattr(torch, spec.dtype))
        fill_with_noise(found[name], shape[-1] ** -0.5)
    return found


def random_parts(spec: ModelSpec, room: Room) -> dict[str, Tensor]:
    """Part name -> exact weights [rows, K]."""
    found = {}
    for part in parts(spec):
        raw = room.take("resident", part.padded_bytes, PAGE_BYTES)[: part.num_bytes]
        found[part.name] = raw.view(getattr(torch, spec.dtype)).view(part.num_rows, -1)
        fill_with_noise(found[part.name], part.linear.in_features**-0.5)
    return found


def fill_with_noise(target: Tensor, scale: float) -> None:
    """Normal numbers, one block of them repeated: fast to make, no denormals among them."""
    flat = target.view(-1)
    generator = torch.Generator().manual_seed(0)
    filled = min(len(flat), 1 << 16)
    flat[:filled] = (torch.randn(filled, generator=generator) * scale).to(target.dtype)
    while filled < len(flat):
        more = min(filled, len(flat) - filled)
        flat[filled : filled + more] = flat[:more]
        filled += more


def random_substitute(num_rows: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Codes and qparams on the host, as an artifact stores them."""
    generator = torch.Generator().manual_seed(0)
    count = num_rows * num_columns // 2
    some = torch.randint(256, (min(count, 1 << 16),), dtype=torch.uint8, generator=generator)
    codes = some.repeat(-(-count // len(some)))[:count].view(num_rows, -1)
    scale = num_columns**-0.5 / 4
    qparams = torch.tensor((scale, scale / 2), dtype=torch.bfloat16)  # codes 0 to 15 around 0
    return codes, qparams.repeat(num_columns // GROUP_SIZE, num_rows, 1)


def ignores_place(
    product: Callable[[Tensor, Tensor, Tensor], None], weight: Tensor, width: int
) -> bool:
    """Whether product(x, weight, out) gives a row the same bits wherever it stands among `width`.

    One shuffle tells: every row stands elsewhere, and kernels differ by place in blocks and tails.
    """
    x = weight.new_empty(width, weight.shape[1])
    fill_with_noise(x, 1.0)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(width)).to(x.device)
    here, there = (x.new_ones(width, len(weight)) for _ in range(2))
    product(x, weight, here)
    product(x[order], weight, there)
    return torch.equal(here[order], there)
