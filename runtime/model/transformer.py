"""The decoder's arithmetic, once: for substitutes and exact weights, every layer, every pass.

A layer is specified by its LayerSpec. A pass takes rows of one or several sequences: the products
see all rows, attention sees each sequence's own cache.
T = rows, H = hidden size, A = query heads, B = KV heads, D = head size, S = live slots
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec.artifacts.footprint import ATTENTION_ROWS, NORM_ROWS
from subspec.artifacts.model import (
    FINAL_NORM,
    HEAD,
    Attention,
    Block,
    DeltaNet,
    Dense,
    ModelSpec,
    NormStyle,
    Rope,
    layer_name,
)
from subspec.runtime.kernels.linear import GemmRanges
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.delta_net import DeltaInputs
from subspec.runtime.model.embedding import EmbeddingRows
from subspec.runtime.model.net_state import (
    Cut,
    NetState,
    Stop,
    TreeNodes,
    cuts_of,
    run_chunk,
    run_tree,
)
from subspec.runtime.model.positions import grown, rotate

# q [A, T, D], keys and values [B, S, D], visible bool [T, S], scale -> [A, T, D]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
# A delta net's state, its inputs, z [T, J F] that the outputs replace, the rows' places in a tree
RunNodes = Callable[[NetState, DeltaInputs, Tensor, TreeNodes], None]


class Product(Protocol):
    """The matrix products of one layer (or of the head), called in execution order."""

    def __call__(
        self, name: str, x: Tensor, calls: GemmRanges, gate: Tensor | None = None
    ) -> Tensor:
        """x [T, K] -> x W^T + b [T, N]; with `gate` [T, N]: gate * (x W^T + b), in its place.

        name: under the layer. calls: the rows that an exact product computes together, so that a
        row's bits do not depend on which sequences share the pass.
        """
        ...


@dataclass(frozen=True)
class SharedWeights:
    """Small tensors that every pass shares, in the dtype of its activations."""

    spec: ModelSpec
    embedding: EmbeddingRows
    norms: dict[str, Tensor]
    scalars: tuple[Tensor | None, ...]  # [1], of each layer that has one
    tables: dict[Rope, tuple[Tensor, Tensor]]  # cos and sin [positions, rope size]
    dtype: torch.dtype


@dataclass(frozen=True)
class KVLocations:
    """Places of a sequence's rows in the stores of some layers, and what they see there. All on the
    device."""

    slots: Tensor  # int64 [T], where their keys and values go
    slot_positions: Tensor  # int64 [S], of the live slots
    visible: Tensor | None  # bool [T, S]; None: the slots of earlier positions (a prompt)
    # For a chunk that the stores have no room for: number of tokens before it that are joined with
    # its own, as live slots; `slots` are those of its last rows only.
    num_before: int | None = None


@dataclass(frozen=True)
class Rows:
    """One sequence's rows of a pass, their places in its cache and what they see of it. All on the
    device."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T], where their keys and values go
    slot_positions: Tensor  # int64 [S], of the live slots
    visible: Tensor | None  # bool [T, S]; None: the slots of earlier positions (a prompt)
    cache: Cache
    attend: Attend
    # For delta nets; None: a chunk of a text, each row behind the one before
    tree: TreeNodes | None = None
    run_nodes: RunNodes = run_tree
    num_padding: int = 0  # of a chunk's rows, the last ones
    stops: Sequence[Stop] = ()  # of a chunk
    windowed: KVLocations | None = None  # in layers with windows; None: as in all others

    def places(self, window: int | None) -> KVLocations:
        """Locations in layers with this window."""
        if window is None or self.windowed is None:
            return KVLocations(self.slots, self.slot_positions, self.visible)
        return self.windowed


@dataclass(frozen=True)
class Pass:
    """Arguments that all layers of one pass share."""

    weights: SharedWeights
    batch: Sequence[Rows]  # of several sequences, in the order of the rows
    calls: GemmRanges
    positions: Tensor  # int64 [T], of all rows

    @cached_property
    def cuts(self) -> list[list[Cut]]:
        """Calls in which delta nets take the rows of each chunk of a text; [] for a tree."""
        return [
            cuts_of(
                len(rows.tokens) - rows.num_padding,
                rows.stops,
                rows.cache.conv_kernel_size,
                rows.cache.device,
            )
            if rows.tree is None
            else []
            for rows in self.batch
        ]

    def spans(self) -> Iterator[tuple[Rows, slice]]:
        """Yield each sequence and its range of rows."""
        first = 0
        for rows in self.batch:
            yield rows, slice(first, first + len(rows.tokens))
            first += len(rows.tokens)


@dataclass(frozen=True)
class HeadRows:
    """Rows of a pass, ascending, that need logits, and the head's calls for them."""

    rows: Sequence[slice]
    calls: GemmRanges

    def of(self, x: Tensor) -> tuple[Tensor, GemmRanges]:
        return join([x[some] for some in self.rows]), self.calls


def forward(
    weights: SharedWeights,
    products: Iterable[Product],
    batch: Sequence[Rows],
    calls: GemmRanges,
    head: HeadRows | None = None,
) -> Tensor:
    """Run rows through all layers -> logits [T, V], or those of the head's rows."""
    return forward_hidden(weights, products, batch, calls, head)[0]


def forward_hidden(
    weights: SharedWeights,
    products: Iterable[Product],
    batch: Sequence[Rows],
    calls: GemmRanges,
    head: HeadRows | None = None,
    reads: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Return the logits as `forward`, and what a draft head reads: the residual stream [T, H]
    before the final norm, or those before the layers `reads` side by side, [T, H reads]."""
    tokens, positions = (join([getattr(r, n) for r in batch]) for n in ("tokens", "positions"))
    now = Pass(weights, batch, calls, positions)
    x = embed(weights, tokens)
    logits, hidden = x, x.shape[1]
    streams = x.new_empty(len(x), len(reads) * hidden) if reads else x
    for index, product in enumerate(products):
        for place in (place for place, layer in enumerate(reads) if layer == index):
            streams[:, place * hidden : (place + 1) * hidden] = x
        if index == weights.spec.num_layers:
            logits = to_logits(weights, product, *((x, calls) if head is None else head.of(x)))
            continue
        add_layer(now, index, product, x)
    return logits, streams


def to_logits(weights: SharedWeights, head: Product, x: Tensor, calls: GemmRanges) -> Tensor:
    """x [T, H] -> [T, V]."""
    return logits_of(weights.spec, head, normalize(weights, FINAL_NORM, x), calls)


def logits_of(spec: ModelSpec, head: Product, normed: Tensor, calls: GemmRanges) -> Tensor:
    """normed [T, H], behind the final norm -> [T, V]."""
    logits = head(HEAD, normed, calls)[:, : spec.vocab_size]
    if spec.logits_divisor != 1:
        logits.div_(spec.logits_divisor)
    if spec.logits_soft_cap is not None:
        logits.div_(spec.logits_soft_cap).tanh_().mul_(spec.logits_soft_cap)
    return logits


def embed(weights: SharedWeights, tokens: Tensor) -> Tensor:
    x = weights.embedding(tokens).to(weights.dtype)
    scale = embedding_scale(weights.spec)
    return x if scale == 1 else x * scale


def embedding_scale(spec: ModelSpec) -> float:
    if not spec.rounds_embedding_scale:
        return spec.embedding_scale
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return float(torch.tensor(spec.embedding_scale, dtype=torch.float32).to(dtype))


def add_layer(now: Pass, layer: int, product: Product, x: Tensor) -> None:
    """Run x [T, H] through all blocks of a layer, in place."""
    attention, net = now.weights.spec.mixers_before[layer]
    for block in now.weights.spec.layers[layer].blocks:
        if isinstance(block.body, DeltaNet):
            add_block(now, layer, net, block, product, x)
            net += 1
        else:
            add_block(now, layer, attention, block, product, x)
            attention += isinstance(block.body, Attention)
    scalar = now.weights.scalars[layer]
    if scalar is not None:
        x.mul_(scalar)


def add_block(now: Pass, layer: int, index: int, block: Block, product: Product, x: Tensor) -> None:
    """x [T, H] += multiplier * after(body(before(x))), in place. index: of an attention or a delta
    net in the caches."""
    weights, name, body = now.weights, layer_name(layer), block.body
    normed = normalize(weights, f"{name}.{block.before}", x) if block.before else x
    if isinstance(body, Attention):
        out = attend_rows(now, name, index, body, product, normed)
    elif isinstance(body, DeltaNet):
        out = recur_rows(now, index, body, product, normed)
    else:
        out = feed_forward(now, body, product, normed)
    del normed
    add_result(weights, name, block, out, x)


def add_result(weights: SharedWeights, layer: str, block: Block, out: Tensor, x: Tensor) -> None:
    """x [T, H] += multiplier * after(out), in place."""
    if block.after:
        out = normalize(weights, f"{layer}.{block.after}", out)
    x.add_(out if block.multiplier == 1 else out.mul_(block.multiplier))


def attend_rows(
    now: Pass, layer: str, index: int, body: Attention, product: Product, x: Tensor
) -> Tensor:
    """Attention block: x [T, H] -> [T, H]. Writes the rows' keys and values to their caches. index:
    the attention's."""
    q, k, v, gate = project(now, layer, body, product, x)
    tables = None
    if body.rope is not None:
        cos, sin = now.weights.tables[body.rope]
        tables = cos[now.positions], sin[now.positions]
    lines = list[tuple[Tensor, Tensor]]()
    for rows, span in now.spans():
        keys = rotate(k[span].transpose(0, 1), body.rope, tables, span)
        lines.append(into_cache(rows, index, body.window, keys, v[span].transpose(0, 1)))
    del k, v
    for (rows, span), (keys, values) in zip(now.spans(), lines, strict=True):
        for first in range(span.start, span.stop, ATTENTION_ROWS):
            some = slice(first, min(first + ATTENTION_ROWS, span.stop))
            of_rows = shifted(some, -span.start)
            live = live_slots(rows, of_rows, body.window)
            visible = visible_slots(rows, of_rows, body.window, live)
            query = rotate(q[some].transpose(0, 1), body.rope, tables, some)
            query = grown(query, body, now.positions[some])
            out = rows.attend(query, keys[:, live], values[:, live], visible, body.scale)
            q[some] = out.transpose(0, 1)
    del lines
    mixed = q.flatten(1)
    if gate is not None:
        for piece in pieces_of_one_place(gate, torch.bfloat16):
            piece.sigmoid_()
        mixed.mul_(gate)
    return product(f"{body.name}.o_proj", mixed, now.calls)


def into_cache(
    rows: Rows, index: int, window: int | None, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Write keys, values [B, T, D] of the rows to their cache, as far as it has room -> those that
    the rows may attend to, [B, S, D] each. index: the attention's."""
    cache, places = rows.cache, rows.places(window)
    if places.num_before is None:
        cache.write(index, places.slots, keys, values)
        return cache.read(index, len(places.slot_positions))
    num_rows = keys.shape[1] - rows.num_padding
    last = slice(num_rows - len(places.slots), num_rows)
    before = cache.places(index, cache.length - places.num_before, cache.length)
    joined_keys, joined_values = (
        torch.cat((kept[:, before], fresh[:, :num_rows].to(kept.dtype)), dim=1)
        for kept, fresh in ((cache.keys[index], keys), (cache.values[index], values))
    )
    cache.write(index, places.slots, keys[:, last], values[:, last])
    return joined_keys, joined_values


def project(
    now: Pass, layer: str, body: Attention, product: Product, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x [T, H] -> q [T, A, D], k and v [T, B, D], normed but not rotated; the gate [T, A D]."""
    q, k = (product(f"{body.name}.{letter}_proj", x, now.calls) for letter in "qk")
    gate = None
    if body.output_gate:  # head by head, the rows of a gate follow those of q
        q, gate = (one.flatten(1) for one in q.unflatten(1, (body.num_heads, 2, -1)).unbind(2))
    v = k if body.values_are_keys else product(f"{body.name}.v_proj", x, now.calls)
    norms = f"{layer}.{body.name}.q_norm", f"{layer}.{body.name}.k_norm"
    if body.qk_norm == "all_heads":  # one after the other, for memory
        q = normalize(now.weights, norms[0], q)
        k = normalize(now.weights, norms[1], k)
    q, k, v = (one.unflatten(1, (-1, body.head_size)) for one in (q, k, v))
    if body.qk_norm == "head":
        q = normalize(now.weights, norms[0], q)
        k = normalize(now.weights, norms[1], k)
    if body.value_norm:
        v = rms_norm(now.weights.spec.norm, None, v)
    return q, k, v, gate


def recur_rows(now: Pass, index: int, body: DeltaNet, product: Product, x: Tensor) -> Tensor:
    """Delta-net block: x [T, H] -> [T, H]. Writes the rows' states to their caches. index: the
    delta net's."""
    qkv, z, b, a = (
        product(f"{body.name}.in_proj_{name}", x, now.calls) for name in ("qkv", "z", "b", "a")
    )
    for (rows, span), cuts in zip(now.spans(), now.cuts, strict=True):
        state = rows.cache.nets[index]
        if rows.tree is not None:
            inputs = DeltaInputs(qkv[span], b[span], a[span])
            rows.run_nodes(state, inputs, z[span], rows.tree)
        else:
            some = slice(span.start, span.stop - rows.num_padding)
            inputs = DeltaInputs(qkv[some], b[some], a[some])
            run_chunk(state, index, inputs, z[some], cuts)
    del qkv
    return product(f"{body.name}.out_proj", z, now.calls)


def feed_forward(now: Pass, body: Dense, product: Product, x: Tensor) -> Tensor:
    gate = product(f"{body.name}.gate_proj", x, now.calls)
    activate(body, gate)
    inner = product(f"{body.name}.up_proj", x, now.calls, gate)
    return product(f"{body.name}.down_proj", inner, now.calls)


def activate(body: Dense, gate: Tensor) -> None:
    """Apply the activation to gate [T, inner size], in place."""
    if body.activation == "silu":
        for some in pieces_of_one_place(gate, torch.bfloat16):
            F.silu(some, inplace=True)
    else:
        for some in pieces_of_one_place(gate, None):
            torch.ops.aten.gelu_(some, approximate="tanh")


def pieces_of_one_place(x: Tensor, even: torch.dtype | None) -> Iterable[Tensor]:
    """Split x [T, N] so that a function gives a row the same bits wherever it is. On CPUs torch's
    f32 sigmoid and silu round the last numbers of a tensor, and of each thread's share of one,
    differently: a row at a time. even: the dtype in which they do not."""
    return x if x.device.type == "cpu" and x.dtype != even else (x,)


def live_slots(rows: Rows, some: slice, window: int | None) -> slice:
    """Live slots that the sequence's rows `some` may have to attend to: for a chunk that is joined
    with the tokens before it, those within its window."""
    num_before = rows.places(window).num_before
    if num_before is None or window is None:
        return slice(None)
    last = len(rows.tokens) - rows.num_padding - 1
    first, end = min(some.start, last), min(some.stop - 1, last) + 1
    return slice(max(0, num_before + first + 1 - window), num_before + end)


def visible_slots(rows: Rows, some: slice, window: int | None, live: slice = slice(None)) -> Tensor:
    """Mask bool [T, S] of the live slots that the sequence's rows `some` may attend to."""
    positions, places = rows.positions[some, None], rows.places(window)
    slot_positions = places.slot_positions[live]
    if places.visible is not None:
        visible = places.visible[some, live]
    else:
        visible = slot_positions <= positions
    if window is not None:
        visible = visible & (positions - slot_positions < window)
    return visible


def normalize(weights: SharedWeights, name: str, x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, with the weight of that name."""
    return rms_norm(weights.spec.norm, weights.norms[name], x)


def rms_norm(style: NormStyle, weight: Tensor | None, x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, in pieces: torch makes f32 copies of its input, which are
    large for a long prompt."""
    normed = torch.empty_like(x)
    if weight is not None and style.rounds_late:
        weight = weight.float() + 1 if style.zero_centered else weight.float()
    for first in range(0, len(x), NORM_ROWS):
        some = slice(first, first + NORM_ROWS)
        if style.rounds_late:
            normed[some] = F.rms_norm(x[some].float(), x.shape[-1:], weight, style.epsilon)
        else:
            piece = F.rms_norm(x[some], x.shape[-1:], None, style.epsilon)
            torch.mul(piece, 1 if weight is None else weight, out=normed[some])
    return normed


def shifted(some: slice, by: int) -> slice:
    return slice(some.start + by, some.stop + by)


def join(some: Sequence[Tensor]) -> Tensor:
    return some[0] if len(some) == 1 else torch.cat(list(some))


# Made when a model is opened


def make_shared(
    spec: ModelSpec,
    embedding: EmbeddingRows,
    tensors: dict[str, Tensor],
    tables: dict[Rope, tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    keep: Callable[[Tensor], Tensor],
) -> SharedWeights:
    """Return the small weights. `tensors`: the artifact's resident tensors by name, on the device.
    `keep` copies norms and scalars of another dtype into fast memory."""

    def kept(name: str) -> Tensor:
        tensor = tensors[name]
        return tensor if tensor.dtype == dtype else keep(tensor.to(dtype))

    norms = {name: kept(f"{name}.weight") for name in spec.norm_sizes}
    scalars = tuple(kept(name) if name else None for name in spec.scalar_names)
    return SharedWeights(spec, embedding, norms, scalars, tables, dtype)


def make_tables(
    spec: ModelSpec, num_positions: int, dtype: torch.dtype, keep: Callable[[Tensor], Tensor]
) -> dict[Rope, tuple[Tensor, Tensor]]:
    """cos and sin [num_positions, rope size] of each rope, in fast memory; f32 for models that
    rotate in f32."""
    wanted = torch.float32 if spec.rope_in_f32 else dtype
    found = {}
    for rope in spec.ropes:
        cos, sin = rope_tables(rope, num_positions)
        found[rope] = keep(cos.to(wanted)), keep(sin.to(wanted))
    return found


def rope_tables(rope: Rope, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, f32 [num_positions, rope size], as transformers computes them."""
    angles = torch.arange(num_positions).float()[:, None] * rope_frequencies(rope)
    if rope.interleaved:
        both = angles.repeat_interleave(2, dim=-1)
    else:
        both = torch.cat((angles, angles), dim=-1)
    return both.cos() * rope.attention_factor, both.sin() * rope.attention_factor


def rope_frequencies(rope: Rope) -> Tensor:
    """Inverse frequencies, f32 [rope size / 2]. llama3: Llama 3.1 model card; yarn: arXiv
    2309.00071; longrope: arXiv 2402.13753."""
    size = rope.size
    plain = 1.0 / rope.theta ** (torch.arange(0, size, 2).float() / size)
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "longrope":
        return plain / torch.tensor(rope.divisors)
    if rope.kind == "proportional":
        return plain / rope.factor * (torch.arange(size // 2) < rope.turning_pairs)
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

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(size // 2).float() - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return plain / rope.factor * (1 - keep) + plain * keep
