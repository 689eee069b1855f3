"""All layers of a draft pass in one call, on CPUs: draft_layers.cpp computes it. Its plain twin is
forward() of transformer.py over the same substitutes.

T = rows, H = hidden size, D = head size
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.model import LAYER_LINEARS, Kind
from subspec.artifacts.native import cpp
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.kernels.linear import Int4Weight
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.transformer import (
    Decoder,
    Product,
    Rows,
    embed,
    to_logits,
    visible_slots,
)

SOURCE = Path(__file__).parents[1] / "kernels" / "draft_layers.cpp"
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
    ]


class _Linear(ctypes.Structure):
    _fields_ = [("codes", _address), ("qparams", _address), ("bias", _address)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((kind, _Linear) for kind in LAYER_LINEARS),
        *((norm, _address) for norm in ("input_norm", "q_norm", "k_norm", "post_norm")),
        ("windowed", _size),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        *(("num_rows", _size), ("num_slots", _size)),
        *((what, _address) for what in ("x", "cos", "sin", "slots", "visible", "in_window")),
    ]


@dataclass(frozen=True)
class DraftLayers:
    """What a call needs; the addresses are those of the decoder's and the substitutes' tensors."""

    decoder: Decoder
    substitutes: Substitutes
    head: Product
    sizes: _Sizes
    layers: "ctypes.Array[_Layer]"


def unavailable() -> str | None:
    """None if `forward` works, which builds draft_layers.cpp where that has not been done; else why
    not."""
    return cpp.unavailable(SOURCE, _declare)


def compile_layers(decoder: Decoder, substitutes: Substitutes, cache: Cache) -> DraftLayers | None:
    """None where the plain twin has to run: not on a CPU, not all in bf16, a matrix without a
    substitute for int4.cpp, no compiler."""
    spec = decoder.spec
    weights: dict[tuple[int, Kind], Int4Weight] = {}
    for key, weight in substitutes.weights.items():
        if key[0] < spec.num_layers:
            if not isinstance(weight, Int4Weight) or weight.kernel != "w4a8":
                return None
            weights[key] = weight
    if {decoder.dtype, cache.keys_values.dtype} != {torch.bfloat16} or unavailable() is not None:
        return None
    assert cache.keys_values.device.type == "cpu" and cache.keys_values.is_contiguous()

    def layer(index: int) -> _Layer:
        made, name = _Layer(), f"model.layers.{index}"
        for kind in LAYER_LINEARS:
            weight, bias = weights[index, kind], substitutes.biases.get((index, kind))
            assert weight.packed.is_contiguous() and weight.qparams.is_contiguous()
            setattr(made, kind, _Linear(*map(_at, (weight.packed, weight.qparams, bias))))
        made.input_norm = _at(decoder.norms[f"{name}.input_layernorm"])
        made.post_norm = _at(decoder.norms[f"{name}.post_attention_layernorm"])
        if spec.qk_norm:
            made.q_norm = _at(decoder.norms[f"{name}.self_attn.q_norm"])
            made.k_norm = _at(decoder.norms[f"{name}.self_attn.k_norm"])
        made.windowed = index in spec.windowed_layers
        return made

    sizes = _Sizes(
        spec.num_layers,
        spec.hidden_size,
        spec.intermediate_size,
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_size,
        cache.keys_values.shape[3],
        spec.norm_epsilon,
    )
    layers = (_Layer * spec.num_layers)(*map(layer, range(spec.num_layers)))
    return DraftLayers(decoder, substitutes, list(substitutes)[-1], sizes, layers)


def forward(layers: DraftLayers, rows: Rows, cache: Cache) -> Tensor:
    """Rows through all layers -> logits [T, V]."""
    x = embed(layers.decoder, rows.tokens)
    run_layers(layers, x, rows, cache)
    return to_logits(layers.decoder, layers.head, x)


def run_layers(layers: DraftLayers, x: Tensor, rows: Rows, cache: Cache) -> None:
    """x bf16 [T, H], updated in place; keys and values of the rows into their slots.

    The bits of a row depend neither on the other rows that it does not see nor on the number of
    threads. It differs from the plain twin by the order of sums, and rounds less often in between.
    """
    decoder, spec, num_threads = layers.decoder, layers.decoder.spec, torch.get_num_threads()
    num_rows, num_slots = len(rows.tokens), len(rows.slot_positions)
    cos, sin = decoder.cos[rows.positions], decoder.sin[rows.positions]
    visible = visible_slots(rows, slice(None), None).contiguous()
    in_window = visible_slots(rows, slice(None), spec.sliding_window).contiguous()
    assert x.dtype == torch.bfloat16 and x.shape == (num_rows, spec.hidden_size)
    assert x.is_contiguous() and rows.slots.is_contiguous()
    assert visible.shape == in_window.shape == (num_rows, num_slots)
    assert cache.keys_values.shape[3] == layers.sizes.cache_slots >= num_slots
    scratch = torch.empty(scratch_bytes(layers.sizes, num_rows, num_threads), dtype=torch.uint8)
    assert scratch.data_ptr() % 64 == 0, "it is used as vectors"
    given = _Rows(num_rows, num_slots, *map(_at, (x, cos, sin, rows.slots, visible, in_window)))
    cpp.loaded(SOURCE, _declare).subspec_draft_layers(
        ctypes.byref(layers.sizes),
        layers.layers,
        ctypes.byref(given),
        cache.keys_values.data_ptr(),
        scratch.data_ptr(),
        num_threads,
    )


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
        *(_address, _address, number),  # cache, scratch, threads
    )
