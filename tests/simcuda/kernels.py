"""Kernels that torch has only for CUDA, and Triton's, on the tensors behind the simulated ones."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from simcuda.private import storage_key
from simcuda.simulation import MixedDevices, Simulation, accesses, active
from simcuda.tensors import SimTensor, is_sim, raw
from torch import Tensor

from subspec.artifacts.format.packing import dequantize, pack_nibbles
from subspec.artifacts.native import residual_cpu

# 8 nibbles of a word, and where ATen's int4 layout has them: odd columns behind the even ones.
NIBBLE_SHIFTS = 4 * torch.arange(8)


def attention(simulation: Simulation, func: Any, args: Any, kwargs: Any) -> SimTensor:
    """As the memory-efficient kernel has it: rows outermost in what it returns."""
    names = [one.name for one in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    tensors = [given[name] for name in ("query", "key", "value")] + [given.get("attn_mask")]
    query, key, value, mask = tensors
    for one in (key, value, mask):
        if one is not None and not (is_sim(one) and one.device == query.device):
            raise MixedDevices("attention")
    assert query.dtype == key.dtype == value.dtype
    assert mask is None or mask.dtype in (torch.bool, query.dtype)
    device, graph = query.device, simulation.capturing
    stream = simulation.current(device.index)
    others = {k: v for k, v in given.items() if k in ("scale", "is_causal", "enable_gqa")}

    def call(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        has_bytes = q.device.type == "cpu"
        out = func(q, k, v, m, **others) if has_bytes else torch.empty_like(q)
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    inner = [raw(one) for one in tensors]
    reads = [one for one in tensors if one is not None]
    if graph is None:
        out = call(*inner)
    else:
        b, h, t, d = query.shape
        out = torch.empty(b, t, h, d, dtype=query.dtype, device=simulation.back).transpose(1, 2)
    simulation.add_storage(out, device, stream)
    wrapped = SimTensor(out, device)
    if graph is None:
        simulation.step(stream, "attention", reads, [wrapped])
    else:
        graph.record(call, inner, {}, out, accesses(reads, [wrapped]), "attention")
    return wrapped


# ATen's 4-bit kernels, plainly


def int4pack(pairs: Tensor, inner_tiles: int) -> Tensor:
    """uint8 [N, K / 2], even columns in high nibbles -> int32 [N / 8, K / (16 I), 32, I / 2]"""
    assert pairs.dtype == torch.uint8 and pairs.is_contiguous() and inner_tiles in (2, 4, 8)
    n, k = pairs.shape[0], pairs.shape[1] * 2
    assert n % 8 == 0 and k % (inner_tiles * 16) == 0, (n, k, inner_tiles)
    codes = torch.stack((pairs >> 4, pairs & 15), -1).view(n, k)
    split = codes.view(n // 8, 8, -1, inner_tiles // 2, 4, 4, 2)
    nibbles = split.permute(0, 2, 1, 5, 3, 6, 4).flatten(5)
    words = (nibbles.long() << NIBBLE_SHIFTS).sum(-1)
    return words.int().view(n // 8, -1, 32, inner_tiles // 2)


def unpack_aten(packed: Tensor) -> Tensor:
    """-> codes uint8 [N, K]"""
    n8, outer, _, half = packed.shape
    nibbles = (packed.view(n8, outer, 8, 4, half)[..., None] >> NIBBLE_SHIFTS) & 15
    nibbles = nibbles.view(n8, outer, 8, 4, half, 2, 4)
    return nibbles.permute(0, 2, 1, 4, 6, 3, 5).reshape(n8 * 8, outer * half * 32).to(torch.uint8)


def unpack_gemlite(codes: Tensor) -> Tensor:
    """int32 [K / 8, N] -> codes uint8 [N, K]"""
    nibbles = (codes.long()[..., None] >> NIBBLE_SHIFTS) & 15
    return nibbles.permute(1, 0, 2).flatten(1).to(torch.uint8)


def int4_mm(x: Tensor, packed: Tensor, group: int, qparams: Tensor) -> Tensor:
    simulation = active()
    assert simulation.capability >= (8, 0), "no kernel image is available"
    assert x.dtype == qparams.dtype == torch.bfloat16
    assert x.is_contiguous() and packed.is_contiguous() and qparams.is_contiguous()
    n, k = packed.shape[0] * 8, packed.shape[1] * packed.shape[3] * 32
    assert group in (32, 64, 128, 256) and x.shape[1] == k and k % 32 == 0
    assert qparams.shape == (k // group, n, 2)
    key = packed.data_ptr(), qparams.data_ptr(), n, k
    if key not in simulation.dequantized:
        exact = dequantize(unpack_aten(packed), qparams).bfloat16()
        simulation.dequantized[key] = exact.t().contiguous()
    return x @ simulation.dequantized[key]


def int4pack_form(pairs: Tensor, inner_tiles: int) -> Tensor:
    n, k = pairs.shape[0], pairs.shape[1] * 2
    shape = n // 8, k // (16 * inner_tiles), 32, inner_tiles // 2
    return pairs.new_empty(shape, dtype=torch.int32)


def int4_mm_form(x: Tensor, packed: Tensor, group: int, qparams: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0] * 8)


KERNELS: dict[str, Callable[..., Any]] = {
    "aten::_convert_weight_to_int4pack": int4pack,
    "aten::_weight_int4pack_mm": int4_mm,
}
FORMS: dict[str, Callable[..., Any]] = {
    "aten::_convert_weight_to_int4pack": int4pack_form,
    "aten::_weight_int4pack_mm": int4_mm_form,
}


# Triton's


class DecodeTile:
    """residual_triton's kernel, by its compiled twin."""

    def __init__(self) -> None:
        self._pairs = dict[object, Tensor]()

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(
        self, out: Tensor, words: Tensor, halves: Tensor, codes: Tensor, scales: Tensor,
        mismatches: Tensor, first_row: int, whole_rows: int, num_groups: int, num_words: int,
        *, FRACTION_BITS: int, IS_F32: bool, LANE_WORDS: int, num_warps: int,
    ) -> None:  # fmt: skip
        given = [out, words, halves, codes, scales, mismatches]
        assert all(is_sim(one) for one in given), "Triton takes device pointers"
        simulation = active()
        simulation.check_triton(out.device)
        simulation.check_not_capturing("a kernel is compiled")
        if simulation.back.type == "cpu":
            dtype = torch.bfloat16 if FRACTION_BITS == 7 else torch.float16
            dtype = torch.float32 if IS_F32 else dtype
            decoded = raw(out).view(dtype).view(-1, num_groups * 64)
            rows = slice(first_row, first_row + len(decoded))
            qparams = raw(scales).view(torch.bfloat16).view(num_groups, whole_rows, 2)
            residual_cpu.decode_any(
                raw(halves).view(torch.uint8).view(-1),
                self._unpacked(raw(codes), LANE_WORDS)[rows].contiguous(),
                qparams[:, rows].contiguous(),
                decoded,
                1,
            )
        stream = simulation.current(out.device.index)
        simulation.step(stream, "residuals decoded", [words, codes, scales], [out])

    def _unpacked(self, codes: Tensor, lane_words: int) -> Tensor:
        """Nibble pairs uint8 [N, K / 2], as stored."""
        key = storage_key(codes), codes.data_ptr(), int(codes.flatten()[:4096].long().sum())
        if key not in self._pairs:
            whole = unpack_aten(codes) if lane_words else unpack_gemlite(codes)
            self._pairs[key] = pack_nibbles(whole)
        return self._pairs[key]


@contextmanager
def triton_restored() -> Iterator[None]:
    """Undo what Triton's interpreter leaves behind: it restores the modules that a kernel names,
    but not triton.language.core, which functions of its library name. After a kernel that calls
    tl.sum nothing could be compiled in this process."""
    from triton.language import core

    places: list[Any] = [core, core.tensor, core.tensor_descriptor_base]
    before = [dict(vars(place)) for place in places]
    try:
        yield
    finally:
        for place, names in zip(places, before, strict=True):
            for name, value in list(vars(place).items()):
                if name not in names:
                    delattr(place, name)
                elif value is not names[name]:
                    setattr(place, name, names[name])


def launched(kernel: Any, args: Any, grid: Any, settings: Any) -> None:
    """Any other kernel, by Triton's interpreter. What it writes is not known: all is counted as
    written."""
    from triton.runtime.interpreter import InterpretedFunction

    simulation, sims = active(), [one for one in args if is_sim(one)]
    assert len(sims) == sum(isinstance(one, Tensor) for one in args), "Triton takes device pointers"
    simulation.check_triton(sims[0].device)
    stream = simulation.current(sims[0].device.index)
    function = getattr(kernel, "fn", kernel)

    def call(*inner: Any) -> None:
        if simulation.back.type == "cpu":
            with triton_restored():
                InterpretedFunction(function).run(*inner, grid=grid, warmup=False, **settings)

    if simulation.capturing is None:
        call(*map(raw, args))
        simulation.step(stream, "a Triton kernel", [], sims)
    else:
        inner, ranges = [raw(one) for one in args], accesses([], sims)
        simulation.capturing.record(call, inner, {}, None, ranges, "a Triton kernel")
