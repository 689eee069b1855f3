"""An excerpt of a model for timings: some layers and part of the head, with random weights."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from subspec.artifacts.model import GROUP_SIZE, Linear, ModelSpec, StoredPart
from subspec.runtime.kernels.linear import Int4Weight, pack_qparams, pack_rows

NOISE_PERIOD = (1 << 16) + 1  # numbers; a prime
CANCELLED_AT_ONCE = 1 << 22  # numbers
CYCLED_BYTES = 96 << 20  # of weights in a pass: more than a cache, as in a whole model
MAX_LAYERS = 24


def excerpt(spec: ModelSpec) -> ModelSpec:
    """The first layers with CYCLED_BYTES of 4-bit weights, with every kind of layer at least once;
    of a larger head only the rows of CYCLED_BYTES. FP8 weights are as if dequantized: that is
    timed on its own."""
    of_first = sum(linear.num_weights for linear in spec.linears if linear.layer == 0)
    num_layers = min(spec.num_layers, MAX_LAYERS, CYCLED_BYTES * 2 // max(1, of_first))
    every_kind = num_layers_of_every_kind(spec)
    # Whole periods: kinds have their shares of the layers.
    if spec.delta_nets:
        num_layers -= num_layers % every_kind
    rows = max(64, CYCLED_BYTES // (spec.hidden_size * spec.item_bytes) // 64 * 64)
    return replace(
        spec,
        layers=spec.layers[: max(num_layers, every_kind)],
        vocab_size=min(spec.vocab_size, rows),
        fp8={},
    )


def num_layers_of_every_kind(spec: ModelSpec) -> int:
    """Smallest number of first layers that include every kind of layer."""
    return 1 + max(spec.layers.index(layer) for layer in dict.fromkeys(spec.layers))


class RandomWeights:
    """Random weights, with which layers take as long as with real ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def read_tensor(self, name: str, target: Tensor) -> None:
        if name.endswith(".bias"):  # would hide differences of sums
            target.zero_()
        else:
            fill_with_noise(target, target.shape[-1] ** -0.5)
        if target.dim() == 2:
            cancel_columns(target)

    def read_substitute(self, linear: Linear, weight: Int4Weight) -> None:
        codes, qparams = random_substitute(linear.out_features, linear.in_features)
        pack_rows(weight, 0, codes)
        pack_qparams(weight, qparams)

    def read_exact(self, stored: StoredPart, target: Tensor) -> None:
        num_columns = stored.part.linear.in_features
        fill_with_noise(target, num_columns**-0.5)
        cancel_columns(target.view(-1, num_columns))

    def read_stored(self, stored: StoredPart, target: Tensor) -> None:
        self.read_exact(stored, target[: stored.num_bytes].view(self._dtype))

    def finish(self) -> None:
        """Do nothing: there is nothing to wait for."""


def random_rows(spec: ModelSpec, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Embedding rows: tokens int64 [T] -> [T, hidden]; all tokens share 64 rows."""
    table = torch.empty(64, spec.hidden_size, dtype=getattr(torch, spec.dtype), device=device)
    fill_with_noise(table, spec.hidden_size**-0.5)
    return lambda tokens: table[tokens % len(table)]


def fill_with_noise(target: Tensor, scale: float) -> None:
    """Fill a tensor with a repeated block of normal random numbers: fast, and without denormals.
    The block's length is a prime: no two rows of a matrix are the same."""
    flat = target.view(-1)
    generator = torch.Generator().manual_seed(0)
    filled = min(len(flat), NOISE_PERIOD)
    flat[:filled] = (torch.randn(filled, generator=generator) * scale).to(target.dtype)
    while filled < len(flat):
        more = min(filled, len(flat) - filled)
        flat[filled : filled + more] = flat[:more]
        filled += more


def cancel_columns(matrix: Tensor) -> None:
    """Replace half of the columns of [N, K], at random, by the negatives of the other half."""
    ours, theirs = (some.to(matrix.device) for some in paired(matrix.shape[1]))
    for rows in matrix.split(max(1, CANCELLED_AT_ONCE // matrix.shape[1])):
        rows[:, theirs] = -rows[:, ours]


def cancelling(x: Tensor) -> Tensor:
    """The rows x [T, K] with half of each replaced by the other half, so that their products with a
    matrix of cancelling columns are sums of terms that add up to 0. The results are rounding
    errors, which reveal the order of summation; rounding any other sum to 16 bits hides it in all
    but one of ten thousand cases."""
    ours, theirs = (some.to(x.device) for some in paired(x.shape[1]))
    x = x.clone()
    x[:, theirs] = x[:, ours]
    return x


@lru_cache(maxsize=64)
def paired(num_columns: int) -> tuple[Tensor, Tensor]:
    """Random pairs of columns, on the host because they are cached and a GPU's memory is the
    engines' afterwards."""
    order = torch.randperm(num_columns, generator=torch.Generator().manual_seed(num_columns))
    half = num_columns // 2
    return order[:half], order[half : 2 * half]


def random_substitute(num_rows: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Random codes uint8 [N, K / 2] and qparams bf16 [K / 64, N, 2] on the host, as stored."""
    generator = torch.Generator().manual_seed(0)
    count = num_rows * num_columns // 2
    some = torch.randint(256, (min(count, 1 << 16),), dtype=torch.uint8, generator=generator)
    codes = some.repeat(-(-count // len(some)))[:count].view(num_rows, -1)
    scale = num_columns**-0.5 / 4
    qparams = torch.tensor((scale, scale / 2), dtype=torch.bfloat16)  # codes 0 to 15 around 0
    return codes, qparams.repeat(num_columns // GROUP_SIZE, num_rows, 1)
