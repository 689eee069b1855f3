"""Speed of decoding exact weights from residuals, with the runtime's decoder."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle

import torch

from subspec.artifacts.footprint import packed_bytes
from subspec.artifacts.model import PART_BYTES, PART_ROWS, Linear, ModelSpec, Part
from subspec.artifacts.native import residual_cpu
from subspec.artifacts.plan import Int4Kernel
from subspec.planner.build.quantize import quantize
from subspec.planner.machine.excerpt import fill_with_noise
from subspec.planner.machine.timing import USUAL_EFFORT, Effort, time_each
from subspec.runtime.kernels.linear import cpu_tile_rows, pack
from subspec.runtime.stream.residual_decoder import ResidualDecoder

DECODE_WEIGHTS = 1 << 21  # of one matrix, decoded at a time: enough for all threads
DECODED_BYTES = 64 << 20  # that calls cycle through: more than the caches of most processors
CALLS_ON_CUDA = 16  # in one timing


def residual_weights_per_second(
    spec: ModelSpec, device: torch.device, kernel: Int4Kernel, effort: Effort = USUAL_EFFORT
) -> float:
    """Weights per second that are decoded from residuals, over the matrices of a layer; 0: no fast
    decoder (no compiler, no Triton), or none for the layout of the 4-bit kernel."""
    on_cpu = device.type == "cpu"
    if residual_cpu.unavailable() is not None or (
        not on_cpu and importlib.util.find_spec("triton") is None
    ):
        return 0.0
    seconds = num_weights = 0.0
    layer = [linear for linear in spec.linears if linear.layer == 0]
    one_of_a_shape = {(n.out_features, n.in_features): n for n in layer if n.has_substitute}
    for linear in one_of_a_shape.values():
        most = DECODE_WEIGHTS if on_cpu else PART_BYTES // spec.item_bytes
        rows = max(PART_ROWS, min(linear.out_features, most // linear.in_features))
        rows = rows // PART_ROWS * PART_ROWS
        if linear.out_features % PART_ROWS or (on_cpu and cpu_tile_rows(rows, kernel) is None):
            continue
        times = sum(
            (n.out_features, n.in_features) == (linear.out_features, linear.in_features)
            for n in layer
        )
        seconds += times * decode_seconds(spec, device, linear, rows, kernel, effort)
        num_weights += times * rows * linear.in_features
    return num_weights / seconds if seconds else 0.0


def decode_seconds(
    spec: ModelSpec,
    device: torch.device,
    linear: Linear,
    rows: int,
    kernel: Int4Kernel,
    effort: Effort,
) -> float:
    """Seconds to decode the first rows of a matrix. Calls cycle through copies that exceed a cache,
    because streamed bytes are not in a cache either."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    cut = replace(linear, out_features=rows)
    part = Part(cut, 0, rows, cut.num_weights * spec.item_bytes)
    weight = torch.empty(rows, linear.in_features, dtype=dtype)
    fill_with_noise(weight, linear.in_features**-0.5)
    made = quantize(weight, device)
    stored = residual_cpu.encode(weight, made.codes, made.qparams, torch.get_num_threads())
    scratch = torch.empty(part.num_bytes, dtype=torch.uint8, device=device)

    def copy() -> Callable[[], object]:
        room = [torch.empty(n, dtype=torch.uint8, device=device)
                for n in packed_bytes(rows, linear.in_features, kernel)]  # fmt: skip
        residual_decoder = ResidualDecoder(
            {linear.name: pack(made.codes, made.qparams, kernel, *room)},
            scratch,
            dtype,
            torch.get_num_threads(),
            torch.zeros(1, dtype=torch.int32, device=device),
        )
        own = stored.to(device, copy=True)
        return lambda: residual_decoder.decode(part, own)

    read_bytes = len(stored) + sum(packed_bytes(rows, linear.in_features, kernel))
    copies = cycle([copy() for _ in range(-(-DECODED_BYTES // read_bytes))])
    # On a GPU a single call would time the launch: decoding overlaps with later launches.
    calls = 1 if device.type == "cpu" else CALLS_ON_CUDA

    def decode() -> None:
        for _ in range(calls):
            next(copies)()

    [(seconds, _)] = time_each([decode], device, effort)
    return seconds / calls
