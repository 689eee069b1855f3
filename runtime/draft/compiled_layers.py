"""All layers of a draft pass in one call, on CPUs: draft_layers.cpp computes them. Its plain twin
is forward() of transformer.py over the same substitutes, which also runs where a layer is of a form
that the compiled one does not know.

T = rows, H = hidden size, D = head size
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.model import Attention, Dense, LayerSpec, ModelSpec, layer_name
from subspec.artifacts.native import cpp
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.kernels.linear import Int4Weight, calls_of
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.transformer import (
    Rows,
    SharedWeights,
    embed,
    join,
    to_logits,
    visible_slots,
)

SOURCE = Path(__file__).parents[1] / "kernels" / "draft_layers.cpp"
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")  # of a layer, in execution order
_size, _address = ctypes.c_int64, ctypes.c_void_p


class _Sizes(ctypes.Structure):
    _fields_ = [
        ("num_layers", _size),
        ("hidden_size", _size),
        ("inner_size", _size),
        ("num_heads", _size),
        ("num_kv_heads", _size),
        ("head_size", _size),
        ("cache_slots", _size),
        ("norm_epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


class _Linear(ctypes.Structure):
    _fields_ = [("codes", _address), ("qparams", _address), ("bias", _address)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Linear) for name in LINEARS),
        *((norm, _address) for norm in ("input_norm", "q_norm", "k_norm", "post_norm")),
        ("windowed", _size),
    ]


class _CacheLayer(ctypes.Structure):
    _fields_ = [("keys", _address), ("values", _address)]


class _Segment(ctypes.Structure):
    _fields_ = [
        *((what, _size) for what in ("first_row", "num_rows", "num_slots")),
        *((what, _address) for what in ("visible", "in_window", "layers")),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        *((what, _size) for what in ("num_rows", "num_segments")),
        *((what, _address) for what in ("x", "cos", "sin", "slots", "segments")),
    ]


@dataclass(frozen=True)
class CompiledLayers:
    """What a call needs; the addresses are those of the weights' tensors."""

    weights: SharedWeights
    substitutes: Substitutes
    sizes: _Sizes
    layers: "ctypes.Array[_Layer]"
    window: int | None  # of the layers that are windowed
    caches: dict[Cache, "ctypes.Array[_CacheLayer]"] = field(default_factory=dict)


def unavailable() -> str | None:
    """None if `forward` works, which builds draft_layers.cpp where that has not been done; else why
    not."""
    return cpp.unavailable(SOURCE, _declare)


def known_form(spec: ModelSpec) -> tuple[Attention, Dense] | None:
    """The attention and the feed-forward that all layers share, windows aside; None if a layer is
    of a form that draft_layers.cpp does not compute."""
    forms = {_form(layer) for layer in spec.layers}
    windows = {attention.window for layer in spec.layers for attention in layer.attentions}
    if len(forms) != 1 or None in forms or len(windows - {None}) > 1:
        return None
    if spec.norm.rounds_late or spec.rope_in_f32:
        return None
    [form] = forms
    return form


def _form(layer: LayerSpec) -> tuple[Attention, Dense] | None:
    if len(layer.blocks) != 2 or layer.scalar:
        return None
    first, second = layer.blocks
    attention, dense = first.body, second.body
    plain = all(b.before and not b.after and b.multiplier == 1 for b in layer.blocks)
    if not (plain and isinstance(attention, Attention) and isinstance(dense, Dense)):
        return None
    rope = attention.rope
    rotates = rope is not None and rope.size == attention.head_size and not rope.interleaved
    if not rotates or attention.qk_norm == "all_heads" or attention.query_growth is not None:
        return None
    if attention.value_norm or attention.values_are_keys or attention.output_gate:
        return None
    if dense.activation != "silu":
        return None
    values = {**vars(attention), "window": None}
    return Attention(**values), dense


def compile_layers(
    weights: SharedWeights, substitutes: Substitutes, num_slots: int
) -> CompiledLayers | None:
    """num_slots: of every cache. None where the plain twin has to run: not on a CPU, not all in
    bf16, a layer of another form, a matrix without a substitute for int4.cpp, no compiler."""
    spec, form = weights.spec, known_form(weights.spec)
    in_layers = (linear.name for linear in spec.linears[:-1])
    matrices = {name: substitutes.weights[name] for name in in_layers}
    fits = all(isinstance(w, Int4Weight) and w.kernel == "w4a8" for w in matrices.values())
    bf16 = weights.dtype == torch.bfloat16 == getattr(torch, spec.dtype)
    if form is None or not fits or not bf16 or unavailable() is not None:
        return None
    attention, dense = form

    def layer(index: int) -> _Layer:
        made, prefix = _Layer(), layer_name(index)
        mixing, feeding = spec.layers[index].blocks
        own = [f"{attention.name}.{letter}_proj" for letter in "qkvo"]
        own += [f"{dense.name}.{part}_proj" for part in ("gate", "up", "down")]
        for place, name in zip(LINEARS, own, strict=True):
            weight = matrices[f"{prefix}.{name}"]
            bias = substitutes.biases.get(f"{prefix}.{name}")
            assert isinstance(weight, Int4Weight)
            assert weight.packed.is_contiguous() and weight.qparams.is_contiguous()
            setattr(made, place, _Linear(*map(_at, (weight.packed, weight.qparams, bias))))
        made.input_norm = _at(weights.norms[f"{prefix}.{mixing.before}"])
        made.post_norm = _at(weights.norms[f"{prefix}.{feeding.before}"])
        if attention.qk_norm == "head":
            made.q_norm = _at(weights.norms[f"{prefix}.{attention.name}.q_norm"])
            made.k_norm = _at(weights.norms[f"{prefix}.{attention.name}.k_norm"])
        made.windowed = spec.layers[index].attentions[0].window is not None
        return made

    sizes = _Sizes(
        spec.num_layers,
        spec.hidden_size,
        dense.inner_size,
        attention.num_heads,
        attention.num_kv_heads,
        attention.head_size,
        num_slots,
        spec.norm.epsilon,
        attention.scale,
    )
    layers = (_Layer * spec.num_layers)(*map(layer, range(spec.num_layers)))
    windows = (one.window for some in spec.layers for one in some.attentions)
    window = next((window for window in windows if window is not None), None)
    return CompiledLayers(weights, substitutes, sizes, layers, window)


def forward(layers: CompiledLayers, batch: Sequence[Rows]) -> Tensor:
    """Rows through all layers -> logits [T, V]."""
    x = embed(layers.weights, join([rows.tokens for rows in batch]))
    run_layers(layers, x, batch)
    return to_logits(layers.weights, layers.substitutes.head, x, calls_of([len(x)]))


def run_layers(layers: CompiledLayers, x: Tensor, batch: Sequence[Rows]) -> None:
    """x bf16 [T, H], updated in place; keys and values of the rows into their slots.

    The bits of a row depend neither on the other rows that it does not see nor on the number of
    threads. It differs from the plain twin by the order of sums, and rounds less often in between.
    """
    num_threads = torch.get_num_threads()
    positions, slots = (join([getattr(r, n) for r in batch]) for n in ("positions", "slots"))
    [(all_cos, all_sin)] = layers.weights.tables.values()
    cos, sin = all_cos[positions], all_sin[positions]
    assert x.dtype == torch.bfloat16 and x.shape == (len(slots), layers.sizes.hidden_size)
    assert x.is_contiguous() and slots.is_contiguous()
    kept: list[object] = []  # what the segments point to
    segments = (_Segment * len(batch))()
    first = 0
    for segment, rows in zip(segments, batch, strict=True):
        assert rows.cache.num_slots == layers.sizes.cache_slots >= len(rows.slot_positions)
        masks = [visible_slots(rows, slice(None), None).contiguous()]
        if layers.window is not None:
            masks.append(visible_slots(rows, slice(None), layers.window).contiguous())
        assert all(mask.shape == (len(rows.tokens), len(rows.slot_positions)) for mask in masks)
        segment.first_row, segment.num_rows = first, len(rows.tokens)
        segment.num_slots = len(rows.slot_positions)
        segment.visible, segment.in_window = _at(masks[0]), _at(masks[-1])
        if rows.cache not in layers.caches:
            layers.caches[rows.cache] = _cache_layers(rows.cache)
        segment.layers = ctypes.addressof(layers.caches[rows.cache])
        kept += masks
        first += len(rows.tokens)
    scratch = torch.empty(scratch_bytes(layers.sizes, len(x), num_threads), dtype=torch.uint8)
    assert scratch.data_ptr() % 64 == 0, "it is used as vectors"
    given = _Rows(len(x), len(batch), *map(_at, (x, cos, sin, slots)), ctypes.addressof(segments))
    cpp.loaded(SOURCE, _declare).subspec_draft_layers(
        ctypes.byref(layers.sizes),
        layers.layers,
        ctypes.byref(given),
        scratch.data_ptr(),
        num_threads,
    )


def _cache_layers(cache: Cache) -> "ctypes.Array[_CacheLayer]":
    pairs = zip(cache.keys, cache.values, strict=True)
    made = (_CacheLayer(keys.data_ptr(), values.data_ptr()) for keys, values in pairs)
    return (_CacheLayer * len(cache.keys))(*made)


def scratch_bytes(sizes: _Sizes, num_rows: int, num_threads: int) -> int:
    """What `run_layers` allocates beside masks and rope."""
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
