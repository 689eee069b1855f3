"""What a draft's layers compute between their products, in pieces that torch compiles when a plan
is made (planner/machine/compile_graphs.py) and that a run loads (compiled_graphs.py).

A piece is known by its sizes, so all layers of one form share it. Its module takes two lists: rows,
[T, ...] each, and weights, of fixed shapes. Norms and residual sums stay in f32 within a piece: its
bits are not those of transformer.py, the plain twin. Only drafts use pieces, because nothing is
promised about their bits.
T = rows, H = hidden size, A = query heads, B = KV heads, D = head size
"""

import hashlib
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec.artifacts.format.codec import dump_json
from subspec.artifacts.model import (
    Attention,
    Block,
    DeltaNet,
    Dense,
    ModelSpec,
    NormStyle,
    Rope,
    layer_name,
)
from subspec.artifacts.native import cpp
from subspec.runtime.model import positions
from subspec.runtime.model.positions import grown, rotate

FOLDER = "graphs"  # of an artifact, and of the user's cache
EXAMPLE_ROWS = 7  # that a piece is traced with; it serves any number
SOURCES = (Path(__file__), Path(positions.__file__))  # all that is traced


@dataclass(frozen=True)
class Join:
    """Between two blocks: rows (x, out), weights (after, scalar, before) as far as there are any.
    x = (x + multiplier * after(out)) * scalar, in place -> before(x), if there is such a norm."""

    hidden_size: int
    norm: NormStyle
    after: bool
    multiplier: float
    scalar: bool
    before: bool
    kind: str = "join"


@dataclass(frozen=True)
class Heads:
    """Before attention: rows (q, k, v as the products give them; cos, sin; positions), weights
    (q_norm, k_norm), as far as they are used -> q [A, T, D], k [B, T, D], and v [B, T, D] if it is
    normed."""

    attention: Attention
    norm: NormStyle
    rope_in_f32: bool
    kind: str = "heads"


@dataclass(frozen=True)
class Gated:
    """Between the products of a feed-forward: rows (gate, up) -> activation(gate) * up."""

    intermediate_size: int
    activation: str
    kind: str = "gated"


Piece = Join | Heads | Gated


@dataclass(frozen=True)
class Place:
    """A block among all blocks, with the full names of the norms and of the scalar behind it."""

    layer: int
    block: Block
    after: str | None
    scalar: str | None
    before: str | None  # of the next block; behind the last one, of the first: that is not used


def places_of(spec: ModelSpec) -> list[Place]:
    """Every block in execution order."""
    found = list[Place]()
    blocks = [(index, block) for index, layer in enumerate(spec.layers) for block in layer.blocks]
    for (layer, block), (following, other) in zip(blocks, blocks[1:] + blocks[:1], strict=True):
        after = f"{layer_name(layer)}.{block.after}" if block.after else None
        before = f"{layer_name(following)}.{other.before}" if other.before else None
        scalar = spec.scalar_names[layer] if following != layer or len(blocks) == 1 else None
        found.append(Place(layer, block, after, scalar, before))
    return found


def own_piece(spec: ModelSpec, body: Attention | Dense) -> Piece | None:
    """The piece inside a block; None: it computes nothing between its products and attention."""
    if isinstance(body, Dense):
        return Gated(body.intermediate_size, body.activation)
    computes = body.qk_norm != "none" or body.rope or body.value_norm or body.query_growth
    if not computes:
        return None
    # What does not change the piece.
    plain = replace(body, scale=1.0, window=None, qkv_bias=False, output_bias=False, name="a")
    if body.rope is not None:
        turns = Rope(1.0, body.rope.size, interleaved=body.rope.interleaved)
        plain = replace(plain, rope=turns)
    return Heads(plain, spec.norm, spec.rope_in_f32)


def join_piece(spec: ModelSpec, place: Place) -> Join:
    """The piece behind a block."""
    block, scalar, before = place.block, place.scalar is not None, place.before is not None
    after = block.after is not None
    return Join(spec.hidden_size, spec.norm, after, block.multiplier, scalar, before)


def pieces_of(spec: ModelSpec) -> tuple[Piece, ...]:
    """Every piece that the model's layers need."""
    found = dict[Piece, None]()
    for place in places_of(spec):
        body = place.block.body
        assert not isinstance(body, DeltaNet), "no pieces are made where a block has none"
        for piece in own_piece(spec, body), join_piece(spec, place):
            if piece is not None:
                found[piece] = None
    return tuple(found)


def program(piece: Piece) -> str:
    """Where the compiled piece lies in an artifact and in the user's cache. Its name depends on
    sources, torch and the processor's instruction sets: no other process finds it."""
    words = (dump_json(piece), torch.__version__, platform.machine(), cpp.processor())
    key = b"\0".join((*map(str.encode, words), *(path.read_bytes() for path in SOURCES)))
    return f"{FOLDER}/{piece.kind}-{hashlib.sha256(key).hexdigest()[:32]}.pt2"


# The modules


class JoinModule(torch.nn.Module):
    def __init__(self, piece: Join) -> None:
        super().__init__()
        self.piece = piece

    def forward(self, rows: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        piece, (x, out), rest = self.piece, rows, list(weights)
        if piece.after:
            out = normed(piece.norm, rest.pop(0), out)
        total = x + out * piece.multiplier
        if piece.scalar:
            total = total * rest.pop(0)
        x.copy_(total)
        return [normed(piece.norm, rest.pop(0), total)] if piece.before else []


class HeadsModule(torch.nn.Module):
    def __init__(self, piece: Heads) -> None:
        super().__init__()
        self.piece = piece

    def forward(self, rows: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        piece, body, (q, k, *rest) = self.piece, self.piece.attention, rows
        v = k
        if body.value_norm and not body.values_are_keys:
            v = rest.pop(0)
        if body.qk_norm == "all_heads":
            q, k = (normed(piece.norm, w, one) for w, one in zip(weights, (q, k), strict=True))
        q, k, v = (one.unflatten(1, (-1, body.head_size)) for one in (q, k, v))
        if body.qk_norm == "head":
            q, k = (normed(piece.norm, w, one) for w, one in zip(weights, (q, k), strict=True))
        q, k, v = (one.transpose(0, 1) for one in (q, k, v))
        if body.rope is not None:
            cos, sin = rest.pop(0), rest.pop(0)
            q, k = (rotate(one, body.rope, (cos, sin), slice(None)) for one in (q, k))
        if body.query_growth is not None:
            q = grown(q, body, rest.pop(0))
        found = [q.contiguous(), k.contiguous()]
        if body.value_norm:
            found.append(normed(piece.norm, None, v).contiguous())
        return found


class GatedModule(torch.nn.Module):
    def __init__(self, piece: Gated) -> None:
        super().__init__()
        self.piece = piece

    def forward(self, rows: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        gate, up = rows
        silu = self.piece.activation == "silu"
        return [(F.silu(gate) if silu else F.gelu(gate, approximate="tanh")) * up]


def normed(style: NormStyle, weight: Tensor | None, x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, as rms_norm of transformer.py."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + style.epsilon)
    if weight is None:
        return wide.to(x.dtype)
    if style.rounds_late:
        factor = weight.float()
        return (wide * (factor + 1 if style.zero_centered else factor)).to(x.dtype)
    return wide.to(x.dtype) * weight


def module_of(piece: Piece) -> torch.nn.Module:
    if isinstance(piece, Join):
        return JoinModule(piece)
    return HeadsModule(piece) if isinstance(piece, Heads) else GatedModule(piece)


def example_of(piece: Piece) -> tuple[list[Tensor], list[Tensor]]:
    """Rows and weights that the piece is traced with."""

    def rows(size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.ones(EXAMPLE_ROWS, size, dtype=dtype)

    def weight(size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    if isinstance(piece, Gated):
        return [rows(piece.intermediate_size), rows(piece.intermediate_size)], []
    if isinstance(piece, Join):
        sizes = piece.hidden_size * piece.after, int(piece.scalar), piece.hidden_size * piece.before
        both = [rows(piece.hidden_size), rows(piece.hidden_size)]
        return both, [weight(size) for size in sizes if size]
    body, table = piece.attention, torch.float32 if piece.rope_in_f32 else torch.bfloat16
    given = [rows(body.query_size), rows(body.kv_size)]
    if body.value_norm and not body.values_are_keys:
        given.append(rows(body.kv_size))
    if body.rope is not None:
        given += [rows(body.rope.size, table), rows(body.rope.size, table)]
    if body.query_growth is not None:
        given.append(torch.ones(EXAMPLE_ROWS, dtype=torch.int64))
    norms = {
        "none": (),
        "head": (body.head_size,) * 2,
        "all_heads": (body.query_size, body.kv_size),
    }
    return given, [weight(size) for size in norms[body.qk_norm]]
