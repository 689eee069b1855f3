"""The decoder's arithmetic, once: for substitutes and exact weights, every family, every pass.

T = rows, H = hidden size, A = query heads, B = KV heads, D = head size, I = intermediate size
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec.artifacts.model import EMBEDDING, FINAL_NORM, Kind, ModelSpec
from subspec.runtime.model.cache import Cache

NORM_ROWS = 256
ATTENTION_ROWS = 128  # query rows per attention call: bounds the score matrix of a long prompt

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Product(Protocol):
    """The matrix products of one layer (or of the head), called in execution order."""

    def __call__(self, kind: Kind, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x [T, K] -> x W^T + b [T, N]; with `gate` [T, N]: gate * (x W^T + b), in its place."""
        ...


@dataclass(frozen=True)
class Decoder:
    """The small tensors that every pass shares, in the dtype that its activations have."""

    spec: ModelSpec
    embedding: Tensor  # [V, H], in the checkpoint's dtype
    norms: dict[str, Tensor]
    cos: Tensor  # [positions, D]
    sin: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Rows:
    """What one pass processes. All on the device."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T], where their keys and values go
    slot_positions: Tensor  # int64 [S], of the live slots
    visible: Tensor | None  # bool [T, S]; None: the slots of earlier positions (a prompt)


def forward(
    decoder: Decoder,
    products: Iterable[Product],
    rows: Rows,
    cache: Cache,
    attend: Attend,
    last_only: bool = False,
) -> Tensor:
    """Rows through all layers -> logits [T, V], or [1, V] of the last row."""
    x = embed(decoder, rows.tokens)
    cos, sin = decoder.cos[rows.positions], decoder.sin[rows.positions]
    logits = x
    for layer, product in enumerate(products):
        if layer < decoder.spec.num_layers:
            attention_block(decoder, layer, product, x, cos, sin, rows, cache, attend)
            mlp_block(decoder, layer, product, x)
        else:
            logits = to_logits(decoder, product, x[-1:] if last_only else x)
    return logits


def embed(decoder: Decoder, tokens: Tensor) -> Tensor:
    return F.embedding(tokens, decoder.embedding).to(decoder.dtype)


def to_logits(decoder: Decoder, head: Product, x: Tensor) -> Tensor:
    return head("head", normalize(decoder, FINAL_NORM, x))


def attention_block(
    decoder: Decoder,
    layer: int,
    product: Product,
    x: Tensor,  # [T, H], updated in place
    cos: Tensor,
    sin: Tensor,
    rows: Rows,
    cache: Cache,
    attend: Attend,
) -> None:
    spec, name = decoder.spec, f"model.layers.{layer}"
    normed = normalize(decoder, f"{name}.input_layernorm", x)
    q, k, v = (product(kind, normed).unflatten(1, (-1, spec.head_size)) for kind in ("q", "k", "v"))
    del normed
    if spec.qk_norm:
        q = normalize(decoder, f"{name}.self_attn.q_norm", q)
        k = normalize(decoder, f"{name}.self_attn.k_norm", k)
    k = rotate(k.transpose(0, 1), cos, sin)
    cache.write(layer, rows.slots, k, v.transpose(0, 1))
    del k, v
    keys, values = cache.read(layer, len(rows.slot_positions))
    window = spec.sliding_window if layer in spec.windowed_layers else None
    for first in range(0, len(x), ATTENTION_ROWS):
        some = slice(first, first + ATTENTION_ROWS)
        visible = visible_slots(rows, some, window)
        query = rotate(q[some].transpose(0, 1), cos[some], sin[some])
        q[some] = attend(query, keys, values, visible).transpose(0, 1)
    x += product("o", q.flatten(1))


def mlp_block(decoder: Decoder, layer: int, product: Product, x: Tensor) -> None:
    normed = normalize(decoder, f"model.layers.{layer}.post_attention_layernorm", x)
    gate = F.silu(product("gate", normed), inplace=True)
    x += product("down", product("up", normed, gate))


def visible_slots(rows: Rows, some: slice, window: int | None) -> Tensor:
    """bool [T, S]: which live slots the rows may attend to."""
    positions = rows.positions[some, None]
    if rows.visible is not None:
        visible = rows.visible[some]
    else:
        visible = rows.slot_positions <= positions
    if window is not None:
        visible = visible & (positions - rows.slot_positions < window)
    return visible


def normalize(decoder: Decoder, name: str, x: Tensor) -> Tensor:
    """RMSNorm over the last dimension; rounded to the dtype before the weight, as transformers.

    In pieces: torch takes f32 copies of its input, which for a long prompt would be large.
    """
    normed, weight = torch.empty_like(x), decoder.norms[name]
    for first in range(0, len(x), NORM_ROWS):
        some = slice(first, first + NORM_ROWS)
        piece = F.rms_norm(x[some], x.shape[-1:], None, decoder.spec.norm_epsilon)
        torch.mul(piece, weight, out=normed[some])
    return normed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [heads, T, D] with cos, sin [T, D]; the two halves form the pairs."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def make_decoder(
    spec: ModelSpec,
    tensors: dict[str, Tensor],
    num_positions: int,
    dtype: torch.dtype,
    keep: Callable[[Tensor], Tensor],
) -> Decoder:
    """`tensors`: the artifact's resident tensors by checkpoint name, on the device. `keep` copies
    what has to be made (rope tables, norms in another dtype) into fast memory."""
    norms = {
        name.removesuffix(".weight"): tensor if tensor.dtype == dtype else keep(tensor.to(dtype))
        for name, tensor in tensors.items()
        if name.endswith("norm.weight")
    }
    cos, sin = (keep(table.to(dtype)) for table in rope_tables(spec, num_positions))
    return Decoder(spec, tensors[f"{EMBEDDING}.weight"], norms, cos, sin, dtype)


def rope_tables(spec: ModelSpec, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, f32 [num_positions, D], as transformers computes them."""
    angles = torch.arange(num_positions).float()[:, None] * rope_frequencies(spec)
    both = torch.cat((angles, angles), dim=-1)
    return both.cos() * spec.rope.attention_factor, both.sin() * spec.rope.attention_factor


def rope_frequencies(spec: ModelSpec) -> Tensor:
    """Inverse frequencies, f32 [D / 2]. llama3: Llama 3.1 model card; yarn: arXiv 2309.00071."""
    rope, size = spec.rope, spec.head_size
    exponents = torch.arange(0, size, 2).float() / size
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    original = rope.original_max_positions
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / plain
        low, high = rope.low_frequency_factor, rope.high_frequency_factor
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * plain / rope.factor + smooth * plain
        scaled = torch.where(wavelength > original / low, plain / rope.factor, blended)
        return torch.where(wavelength < original / high, plain, scaled)

    def dimension_of(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension_of(rope.beta_fast)), 0)
    high = min(math.ceil(dimension_of(rope.beta_slow)), size - 1)
    ramp = (torch.arange(size // 2).float() - low) / (max(high - low, 0.001))
    keep = 1 - ramp.clamp(0, 1)
    return plain / rope.factor * (1 - keep) + plain * keep
