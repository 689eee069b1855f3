"""Speed of decoding exact weights from residuals and FP8 codes, with the runtime's decoder."""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle

import torch

from subspec.artifacts.footprint import packed_bytes
from subspec.artifacts.format import fp8
from subspec.artifacts.format.fp8 import Scales, scales_of
from subspec.artifacts.model import (
    PART_BYTES,
    PART_ROWS,
    RESIDUALS,
    Encoding,
    Linear,
    ModelSpec,
    Part,
)
from subspec.artifacts.native import fp8_cpu, residual_cpu
from subspec.artifacts.plan import Int4Kernel
from subspec.planner.build.quantize import quantize
from subspec.planner.machine.excerpt import fill_with_noise
from subspec.planner.machine.timing import USUAL_EFFORT, Effort, time_each
from subspec.runtime.kernels import triton_driver
from subspec.runtime.kernels.linear import cpu_tile_rows, pack
from subspec.runtime.stream.residual_decoder import ResidualDecoder

DECODE_WEIGHTS = 1 << 21  # of one matrix, decoded at a time: enough for all threads
DECODED_BYTES = 64 << 20  # that calls cycle through: more than the caches of most processors
CALLS_ON_CUDA = 16  # in one timing
MAX_FP8 = 448.0  # of e4m3


def decoded_weights_per_second(
    spec: ModelSpec,
    device: torch.device,
    kernel: Int4Kernel,
    encoding: Encoding,
    effort: Effort = USUAL_EFFORT,
) -> float:
    """Weights per second that are decoded from an encoding, over the matrices of the first layer,
    of an FP8 encoding over those in FP8 of the first layer that has any; 0: no fast decoder (no
    compiler, no Triton), none for the layout of the 4-bit kernel, or no such matrix."""
    on_cpu = device.type == "cpu"
    compiled = fp8_cpu if encoding == "fp8-residual" else residual_cpu
    coded = encoding in RESIDUALS
    if coded and (
        compiled.unavailable() is not None
        or (not on_cpu and triton_driver.unavailable(device) is not None)
    ):
        return 0.0
    seconds = num_weights = 0.0
    if encoding == "residual":
        layer = [one for one in spec.linears if one.layer == 0 and one.has_substitute]
    else:
        packed = [one for one in spec.linears if one.fp8]
        layer = [one for one in packed if one.layer == packed[0].layer]
    one_of_a_shape = {(n.out_features, n.in_features): n for n in layer}
    for linear in one_of_a_shape.values():
        most = DECODE_WEIGHTS if on_cpu else PART_BYTES // spec.item_bytes
        rows = max(PART_ROWS, min(linear.out_features, most // linear.in_features))
        rows = rows // PART_ROWS * PART_ROWS
        unknown_layout = coded and on_cpu and cpu_tile_rows(rows, kernel) is None
        if linear.out_features % PART_ROWS or unknown_layout:
            continue
        times = sum(
            (n.out_features, n.in_features) == (linear.out_features, linear.in_features)
            for n in layer
        )
        seconds += times * decode_seconds(spec, device, linear, rows, kernel, encoding, effort)
        num_weights += times * rows * linear.in_features
    return num_weights / seconds if seconds else 0.0


def decode_seconds(
    spec: ModelSpec,
    device: torch.device,
    linear: Linear,
    rows: int,
    kernel: Int4Kernel,
    encoding: Encoding,
    effort: Effort,
) -> float:
    """Seconds to decode the first rows of a matrix. Calls cycle through copies that exceed a cache,
    because streamed bytes are not in a cache either."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    fp8_block = None if encoding == "residual" else linear.fp8
    cut = replace(linear, out_features=rows, fp8=fp8_block)
    part = Part(cut, 0, rows, cut.num_weights * spec.item_bytes)
    weight = torch.empty(rows, linear.in_features, dtype=dtype)
    fill_with_noise(weight, linear.in_features**-0.5)
    scales = dict[str, Scales]()
    threads = torch.get_num_threads()
    if fp8_block is None:
        made = quantize(weight, device)
        stored = residual_cpu.encode(weight, made.codes, made.qparams, threads)
    else:
        scale = float(weight.abs().max()) / MAX_FP8
        of_blocks = scales_of(cut, torch.full(cut.scale_shape, scale))
        codes = (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        made = quantize(fp8.dequantize(codes, of_blocks), device)
        own = fp8_cpu.codes_by_windows(codes, made.qparams, of_blocks, threads)
        stored = codes.view(torch.float8_e4m3fn)
        if encoding == "fp8-residual":
            stored = fp8_cpu.encode(codes, own, made.qparams, of_blocks, threads)
        made = replace(made, codes=own)
        scales = {linear.name: of_blocks._replace(values=of_blocks.values.to(device))}
    scratch = torch.empty(part.num_bytes, dtype=torch.uint8, device=device)

    def copy() -> Callable[[], object]:
        room = [torch.empty(n, dtype=torch.uint8, device=device)
                for n in packed_bytes(rows, linear.in_features, kernel)]  # fmt: skip
        residual_decoder = ResidualDecoder(
            {linear.name: pack(made.codes, made.qparams, kernel, *room)},
            scales,
            scratch,
            dtype,
            threads,
            torch.zeros(1, dtype=torch.int32, device=device),
        )
        own = stored.to(device, copy=True)
        return lambda: residual_decoder.decode(part, own)

    read_bytes = stored.numel() + sum(packed_bytes(rows, linear.in_features, kernel))
    copies = cycle([copy() for _ in range(-(-DECODED_BYTES // read_bytes))])
    # On a GPU a single call would time the launch: decoding overlaps with later launches.
    calls = 1 if device.type == "cpu" else CALLS_ON_CUDA

    def decode() -> None:
        for _ in range(calls):
            next(copies)()

    [(seconds, _)] = time_each([decode], device, effort)
    return seconds / calls
