"""An excerpt of a model that tells the speed of the whole: some layers, some of the head, random
weights."""

from dataclasses import replace

import torch
from torch import Tensor

from subspec.artifacts.model import GROUP_SIZE, ModelSpec, linears

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


def random_substitute(num_rows: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero on the host, as an artifact stores them."""
    generator = torch.Generator().manual_seed(0)
    count = num_rows * num_columns // 2
    some = torch.randint(256, (min(count, 1 << 16),), dtype=torch.uint8, generator=generator)
    codes = some.repeat(-(-count // len(some)))[:count].view(num_rows, -1)
    groups = (num_rows, num_columns // GROUP_SIZE)
    scale = torch.full(groups, num_columns**-0.5 / 4, dtype=torch.float16)
    return codes, scale, torch.full(groups, 7.5, dtype=torch.float16)
