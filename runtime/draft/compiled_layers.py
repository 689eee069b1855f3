"""All layers of a draft pass in one call, on CPUs, by draft_layers.cpp. Its plain twin is forward()
of transformer.py over the same substitutes, which also runs for layers that draft_layers.cpp does
not support.

T = rows, H = hidden size, D = head size
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.model import (
    Attention,
    DeltaNet,
    Dense,
    LayerSpec,
    ModelSpec,
    layer_name,
)
from subspec.artifacts.native import cpp
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.kernels.linear import Int4Weight, gemm_ranges
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.net_state import NetState
from subspec.runtime.model.transformer import (
    HeadRows,
    Rows,
    SharedWeights,
    embed,
    join,
    to_logits,
    visible_slots,
)

SOURCE = Path(__file__).parents[1] / "kernels" / "draft_layers.cpp"
ATTENTION, NET = ("q", "k", "v", "o"), ("qkv", "z", "out")  # products, as _Layer calls them
FEED_FORWARD = ("gate", "up", "down")
LANES = 16  # sizes of a delta net's heads are multiples of it
_size, _address = ctypes.c_int64, ctypes.c_void_p


class _Sizes(ctypes.Structure):
    _fields_ = [
        ("num_layers", _size),
        ("hidden_size", _size),
        ("intermediate_size", _size),
        ("num_heads", _size),
        ("num_kv_heads", _size),
        *((what, _size) for what in ("head_size", "rope_size", "gated")),
        *((what, _size) for what in ("num_key_heads", "num_value_heads")),
        *((what, _size) for what in ("key_size", "value_size", "conv_kernel_size", "rounds_late")),
        *((what, ctypes.c_float) for what in ("norm_epsilon", "norm_offset", "scale")),
    ]


class _Linear(ctypes.Structure):
    _fields_ = [("codes", _address), ("qparams", _address), ("bias", _address)]


class _Small(ctypes.Structure):
    _fields_ = [("numbers", _address), ("is_f32", _size)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Linear) for name in (*ATTENTION, *NET, *FEED_FORWARD)),
        *((norm, _address) for norm in ("input_norm", "q_norm", "k_norm", "post_norm")),
        *((what, _address) for what in ("b", "a")),
        *((what, _size) for what in ("windowed", "is_delta_net", "index")),
    ]


class _CacheLayer(ctypes.Structure):
    _fields_ = [("keys", _address), ("values", _address), ("num_slots", _size)]


class _CacheNet(ctypes.Structure):
    _fields_ = [
        *((what, _Small) for what in ("taps", "decay_log", "step_bias", "norm")),
        *((what, _address) for what in ("conv", "memory", "inputs")),
        *((what, _address) for what in ("keys", "updates", "path_decays")),
        ("num_nodes", _size),
    ]


class _Places(ctypes.Structure):
    _fields_ = [("slots", _address), ("visible", _address), ("num_slots", _size)]


class _Segment(ctypes.Structure):
    _fields_ = [
        *((what, _size) for what in ("first_row", "num_rows")),
        *((what, _Places) for what in ("places", "in_window")),
        *((what, _address) for what in ("layers", "nets")),
        *((what, _address) for what in ("nodes", "parents", "windows", "above")),
        *((what, _size) for what in ("num_above", "num_together")),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        *((what, _size) for what in ("num_rows", "num_segments")),
        *((what, _address) for what in ("x", "cos", "sin", "segments")),
    ]


@dataclass(frozen=True)
class Form:
    """Properties that all layers share, windows aside."""

    attention: Attention
    net: DeltaNet | None  # of the layers that have no attention
    dense: Dense


@dataclass(frozen=True)
class CacheParts:
    layers: "ctypes.Array[_CacheLayer]"
    nets: "ctypes.Array[_CacheNet]"


@dataclass(frozen=True)
class CompiledLayers:
    """Arguments of a call; the addresses are those of the weights' tensors."""

    weights: SharedWeights
    substitutes: Substitutes
    sizes: _Sizes
    layers: "ctypes.Array[_Layer]"
    window: int | None  # of the layers that are windowed
    caches: dict[Cache, CacheParts] = field(default_factory=dict)


def unavailable() -> str | None:
    """Why `forward` cannot be used, or None if it can. Builds draft_layers.cpp if needed."""
    return cpp.unavailable(SOURCE, _declare)


def known_form(spec: ModelSpec) -> Form | None:
    """Return the layers' form, or None if draft_layers.cpp does not support one of them."""
    mixers, denses = set[Attention | DeltaNet](), set[Dense]()
    for layer in spec.layers:
        bodies = _bodies(layer)
        if bodies is None:
            return None
        mixers.add(bodies[0])
        denses.add(bodies[1])
    attentions = [one for one in mixers if isinstance(one, Attention)]
    nets = [one for one in mixers if isinstance(one, DeltaNet)]
    if len(attentions) != 1 or len(nets) > 1 or len(denses) != 1 or len(spec.windows) > 1:
        return None
    return None if spec.rope_in_f32 else Form(attentions[0], next(iter(nets), None), *denses)


def _bodies(layer: LayerSpec) -> tuple[Attention | DeltaNet, Dense] | None:
    if len(layer.blocks) != 2 or layer.scalar:
        return None
    first, second = layer.blocks
    mixer, dense = first.body, second.body
    plain = all(b.before and not b.after and b.multiplier == 1 for b in layer.blocks)
    if not plain or not isinstance(dense, Dense) or dense.activation != "silu":
        return None
    if isinstance(mixer, DeltaNet):
        fits = mixer.key_size % LANES == 0 and mixer.value_size % LANES == 0
        return (mixer, dense) if fits else None
    if not isinstance(mixer, Attention) or mixer.rope is None or mixer.rope.interleaved:
        return None
    if mixer.qk_norm == "all_heads" or mixer.query_growth is not None:
        return None
    if mixer.value_norm or mixer.values_are_keys:
        return None
    values = {**vars(mixer), "window": None}
    return Attention(**values), dense


def compile_layers(weights: SharedWeights, substitutes: Substitutes) -> CompiledLayers | None:
    """Return the compiled layers, or None if the plain twin has to run: not on a CPU, not all in
    bf16, an unsupported layer, a matrix without a substitute for int4.cpp, no compiler."""
    spec, form = weights.spec, known_form(weights.spec)
    in_layers = [linear for linear in spec.linears[:-1] if not linear.stays_exact]
    matrices = [substitutes.weights[linear.name] for linear in in_layers]
    # A draft model whose weights are kept as they are has none.
    fits = bool(matrices) and all(
        isinstance(w, Int4Weight) and w.kernel == "w4a8" for w in matrices
    )
    bf16 = weights.dtype == torch.bfloat16 == getattr(torch, spec.dtype)
    if form is None or not fits or not bf16 or unavailable() is not None:
        return None
    made = (_layer(weights, substitutes, form, index) for index in range(spec.num_layers))
    window = next(iter(spec.windows), None)
    layers = (_Layer * spec.num_layers)(*made)
    return CompiledLayers(weights, substitutes, _sizes(spec, form), layers, window)


def _layer(weights: SharedWeights, substitutes: Substitutes, form: Form, index: int) -> _Layer:
    made, prefix = _Layer(), layer_name(index)
    mixing, feeding = weights.spec.layers[index].blocks
    mixer = mixing.body

    def put(places: Sequence[str], body: str, names: str) -> None:
        for place in places:
            name = f"{prefix}.{body}.{names.format(place)}"
            weight, bias = substitutes.weights[name], substitutes.biases.get(name)
            assert isinstance(weight, Int4Weight)
            assert weight.packed.is_contiguous() and weight.qparams.is_contiguous()
            setattr(made, place, _Linear(*map(_at, (weight.packed, weight.qparams, bias))))

    put(FEED_FORWARD, form.dense.name, "{}_proj")
    made.input_norm = _at(weights.norms[f"{prefix}.{mixing.before}"])
    made.post_norm = _at(weights.norms[f"{prefix}.{feeding.before}"])
    made.index, made.is_delta_net = (
        weights.spec.mixers_before[index][isinstance(mixer, DeltaNet)],
        isinstance(mixer, DeltaNet),
    )
    if isinstance(mixer, DeltaNet):
        put(NET[:2], mixer.name, "in_proj_{}")
        put(NET[2:], mixer.name, "{}_proj")
        for place in ("b", "a"):
            exact = substitutes.weights[f"{prefix}.{mixer.name}.in_proj_{place}"]
            assert isinstance(exact, Tensor) and exact.is_contiguous()
            assert exact.dtype == torch.bfloat16
            setattr(made, place, _at(exact))
        return made
    assert isinstance(mixer, Attention)
    put(ATTENTION, mixer.name, "{}_proj")
    made.windowed = mixer.window is not None
    if mixer.qk_norm == "head":
        made.q_norm = _at(weights.norms[f"{prefix}.{mixer.name}.q_norm"])
        made.k_norm = _at(weights.norms[f"{prefix}.{mixer.name}.k_norm"])
    return made


def _sizes(spec: ModelSpec, form: Form) -> _Sizes:
    attention, net, norm = form.attention, form.net, spec.norm
    assert attention.rope is not None
    of_net = (0, 0, 0, 0, 0)
    if net is not None:
        of_net = (
            net.num_key_heads,
            net.num_value_heads,
            net.key_size,
            net.value_size,
            net.conv_kernel_size,
        )
    return _Sizes(
        spec.num_layers,
        spec.hidden_size,
        form.dense.intermediate_size,
        attention.num_heads,
        attention.num_kv_heads,
        attention.head_size,
        attention.rope.size,
        attention.output_gate,
        *of_net,
        norm.rounds_late,
        norm.epsilon,
        1.0 if norm.zero_centered else 0.0,
        attention.scale,
    )


def forward(layers: CompiledLayers, batch: Sequence[Rows], head: HeadRows | None = None) -> Tensor:
    """Run rows through all layers -> logits [T, V], or those of the head's rows."""
    x = embed(layers.weights, join([rows.tokens for rows in batch]))
    run_layers(layers, x, batch)
    x, calls = (x, gemm_ranges([len(x)])) if head is None else head.of(x)
    return to_logits(layers.weights, layers.substitutes.head, x, calls)


def run_layers(layers: CompiledLayers, x: Tensor, batch: Sequence[Rows]) -> None:
    """Update x bf16 [T, H] in place; write the rows' keys and values to their slots.

    The bits of a row depend neither on other rows that it does not see nor on the number of
    threads. They differ from the plain twin's: sums have another order, and fewer are rounded in
    between.
    """
    num_threads = torch.get_num_threads()
    positions = join([rows.positions for rows in batch])
    [(all_cos, all_sin)] = layers.weights.tables.values()
    cos, sin = all_cos[positions], all_sin[positions]
    assert x.dtype == torch.bfloat16 and x.shape == (len(positions), layers.sizes.hidden_size)
    assert x.is_contiguous()
    kept: list[object] = []  # what the segments point to
    segments = (_Segment * len(batch))()
    first = 0
    for segment, rows in zip(segments, batch, strict=True):
        segment.first_row, segment.num_rows = first, len(rows.tokens)
        segment.places, tensors = _places(rows, None)
        kept += tensors
        if layers.window is not None:
            segment.in_window, tensors = _places(rows, layers.window)
            kept += tensors
        if rows.cache not in layers.caches:
            layers.caches[rows.cache] = _cache_parts(rows.cache)
        parts = layers.caches[rows.cache]
        segment.layers = ctypes.addressof(parts.layers)
        segment.nets = ctypes.addressof(parts.nets)
        if rows.cache.nets:
            kept += _place_nodes(segment, rows)
        first += len(rows.tokens)
    scratch = torch.empty(scratch_bytes(layers.sizes, len(x), num_threads), dtype=torch.uint8)
    assert scratch.data_ptr() % 64 == 0, "it is used as vectors"
    given = _Rows(len(x), len(batch), *map(_at, (x, cos, sin)), ctypes.addressof(segments))
    cpp.loaded(SOURCE, _declare).subspec_draft_layers(
        ctypes.byref(layers.sizes),
        layers.layers,
        ctypes.byref(given),
        scratch.data_ptr(),
        num_threads,
    )


def _places(rows: Rows, window: int | None) -> tuple[_Places, list[Tensor]]:
    """Places of the rows in layers with this window, and the tensors that they point to."""
    places = rows.places(window)
    slots, num_slots = places.slots.contiguous(), len(places.slot_positions)
    visible = visible_slots(rows, slice(None), window).contiguous()
    windows = rows.cache.windows if window is not None else None
    room = rows.cache.num_slots if windows is None else windows.num_slots
    assert places.num_before is None and num_slots <= room
    assert slots.shape == rows.tokens.shape and visible.shape == (len(slots), num_slots)
    return _Places(_at(slots), _at(visible), num_slots), [slots, visible]


def _place_nodes(segment: _Segment, rows: Rows) -> list[Tensor]:
    """Write the rows' places in their tree; return the tensors that the segment then points to."""
    tree = rows.tree
    assert tree is not None, "only trees are drafted"
    placed = [one.contiguous() for one in (tree.nodes, tree.parents, tree.windows, tree.above)]
    nodes, parents, windows, above = placed
    assert len(nodes) == len(parents) == len(windows) == len(above) == len(rows.tokens)
    assert above.dtype == torch.bool and above.shape[1] <= rows.cache.nets[0].keys.shape[1]
    segment.nodes, segment.parents, segment.windows, segment.above = map(_at, placed)
    segment.num_above = above.shape[1]
    segment.num_together = len(nodes) if tree.num_together is None else tree.num_together
    return placed


def _cache_parts(cache: Cache) -> CacheParts:
    pairs = zip(cache.keys, cache.values, strict=True)
    layers = (_CacheLayer(k.data_ptr(), v.data_ptr(), k.shape[1]) for k, v in pairs)
    return CacheParts(
        (_CacheLayer * len(cache.keys))(*layers),
        (_CacheNet * len(cache.nets))(*map(_cache_net, cache.nets)),
    )


def _cache_net(net: NetState) -> _CacheNet:
    weights = net.weights
    small = (weights.conv, weights.decay_log, weights.step_bias, weights.norm)
    state = (net.committed.conv, net.committed.memory)
    held = (*state, net.nodes.qkv, net.keys, net.updates, net.path_decays)
    assert all(one.is_contiguous() for one in (*small, *held))
    assert all(one.dtype in (torch.bfloat16, torch.float32) for one in small)
    named = (_Small(one.data_ptr(), one.dtype == torch.float32) for one in small)
    return _CacheNet(*named, *(one.data_ptr() for one in held), net.keys.shape[1])


def scratch_bytes(sizes: _Sizes, num_rows: int, num_threads: int) -> int:
    """Bytes that `run_layers` allocates beside masks and rope."""
    library = cpp.loaded(SOURCE, _declare)
    return int(library.subspec_draft_scratch_bytes(ctypes.byref(sizes), num_rows, num_threads))


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _declare(library: ctypes.CDLL) -> None:
    sizes, number = ctypes.POINTER(_Sizes), ctypes.c_int
    library.subspec_draft_scratch_bytes.restype = _size
    library.subspec_draft_scratch_bytes.argtypes = (sizes, _size, number)
    library.subspec_draft_layers.restype = None
    library.subspec_draft_layers.argtypes = (
        *(sizes, ctypes.POINTER(_Layer), ctypes.POINTER(_Rows)),
        *(_address, number),  # scratch, threads
    )
