"""Measures this machine with the runtime's own code -> Profile: link, contention, digests, and by
`microbench.py` the terms of a pass, by `residual_rate.py` the decoding of residuals.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.common.cpu_load import background_cpu_share, cpu_times, usable_cpus
from subspec.artifacts.common.host_memory import free_host_bytes
from subspec.artifacts.common.progress import Progress
from subspec.artifacts.format.store import part_digest
from subspec.artifacts.model import PAGE_BYTES, ModelSpec
from subspec.artifacts.plan import Int4Kernel
from subspec.artifacts.profile import KernelCosts, LinkRate, Profile, Timing
from subspec.planner.machine.microbench import Bench, DraftTimings
from subspec.planner.machine.pinnable import pinnable_bytes
from subspec.planner.machine.profiles import middle_timing, shapes_of, typical_of
from subspec.planner.machine.residual_rate import decoded_weights_per_second
from subspec.planner.machine.timing import (
    USUAL_EFFORT,
    Cursor,
    Effort,
    Stream,
    gpu_overhead_bytes,
    repetitions,
    stream_rate,
    streaming,
    time_each,
    unnamed_file,
)
from subspec.planner.solve.problem import staging
from subspec.planner.solve.storage import raw_storage, usual_storages
from subspec.runtime.device import machine_name as name_of_device
from subspec.runtime.device import restrict_cuda_kernels
from subspec.runtime.draft.compiled_graphs import CompiledGraphs
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.kernels import gemlite_kernel
from subspec.runtime.memory import bytes_of, host_buffer, pinned_buffer, unpin
from subspec.runtime.model.attention import attend, attend_batch_invariant
from subspec.runtime.stream.digests import Digests
from subspec.runtime.stream.link import DiskLink

DIGEST_BYTES = 4 << 20  # of one part; each thread checks one at a time
MAX_BLOCK = 64 << 20  # as large as a part may be; larger blocks are not faster
MIN_SHARE = 0.2  # of its speed; chosen: less is noise, not contention


def measure(
    spec: ModelSpec,
    device: str,
    folder: Path,
    progress: Progress,
    effort: Effort = USUAL_EFFORT,
    draft_model: ModelSpec | None = None,
) -> Profile:
    """Profile of this machine at the model's shapes; takes seconds. `folder`: where the artifact
    will be, on the disk that is timed. draft_model: timed too."""
    target = torch.device(device)
    cuda = target.type == "cuda"
    if cuda:
        target = torch.device("cuda", target.index or 0)
        torch.cuda.set_device(target)
        restrict_cuda_kernels()  # as the engine does
    # torch counts the CPUs that this process may run on, whatever share of them it is granted.
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    free = torch.cuda.mem_get_info(target)[0] if cuda else free_host_bytes()
    with open_slow_memory(spec, target, folder, effort) as slow_memory, torch.inference_mode():
        progress("measuring", 0.0)
        bench = Bench(spec, target, effort)
        kernels = bench.timed_kernels([draft_model] if draft_model else [])
        kernel, (substitutes, _) = next(iter(kernels.items()))
        graphs = bench.faster_graphs(substitutes)
        passes = []
        for index in range(effort.passes):
            progress(
                f"measuring, {index + 1} of {effort.passes}", (index + 1) / (effort.passes + 2)
            )
            passes.append(measured_once(bench, kernel, substitutes, graphs, slow_memory))
        drafting = dict.fromkeys(kernels, DraftTimings((), (), ()))
        if draft_model is not None:
            progress("measuring the draft model", (effort.passes + 1) / (effort.passes + 2))
            drafting = timings_of_draft_model(Bench(draft_model, target, effort), kernels)
        progress("measuring batch invariance", (effort.passes + 1) / (effort.passes + 2))
        profile = replace(
            typical_of(passes),
            free_bytes=free,
            pinnable_bytes=pinnable_bytes(device, most_pinned(spec, draft_model)) if cuda else 0,
            overhead_bytes=gpu_overhead_bytes(target) if cuda else 0,
            batch_invariant_widths=bench.batch_invariant_widths(),
            draft_model_layer=drafting[kernel].layer,
            draft_model_attention=drafting[kernel].attention,
            draft_model_head=drafting[kernel].head,
            other_kernels=tuple(
                kernel_costs(bench, one, draft, drafting[one])
                for one, (_, draft) in kernels.items()
                if one != kernel
            ),
            shapes=shapes_of(spec),
            draft_model_shapes=shapes_of(draft_model),
        )
    if "gemlite" in kernels:
        gemlite_kernel.keep_tuning(target)
    del bench, substitutes, kernels, graphs
    if cuda:
        torch.cuda.empty_cache()  # the rehearsal needs the memory
    progress("measured", 1.0)
    return profile


def most_pinned(spec: ModelSpec, draft_model: ModelSpec | None) -> int:
    """Upper bound of a plan's host memory in bytes: all weights stream, and the embeddings."""
    embeddings = sum(one.embedding_bytes for one in (spec, draft_model) if one is not None)
    return raw_storage(spec).num_bytes + embeddings


def kernel_costs(
    bench: Bench, kernel: Int4Kernel, draft: DraftTimings, of_model: DraftTimings
) -> KernelCosts:
    """Costs of a kernel that is not the fastest; its draft was timed once."""
    spec, device, effort = bench.full_spec, bench.device, bench.effort
    return KernelCosts(
        kernel,
        draft.layer,
        draft.head,
        decoded_weights_per_second(bench.spec, device, kernel, "residual", effort),
        decoded_weights_per_second(spec, device, kernel, "fp8-residual", effort),
        of_model.layer,
        of_model.head,
    )


def timings_of_draft_model(
    bench: Bench, kernels: Iterable[Int4Kernel]
) -> dict[Int4Kernel, DraftTimings]:
    """Timings of the excerpt as a draft model, whose kernels are launched one by one, and which
    also reads texts: medians of several passes."""
    found = dict[Int4Kernel, DraftTimings]()
    for kernel in kernels:
        packed = bench.random_substitutes(kernel)
        passes = [bench.draft_timings(packed, None, True) for _ in range(bench.effort.passes)]
        layer, attention, head = (
            tuple(middle_timing(some) for some in zip(*several, strict=True))
            for several in (
                [one.layer for one in passes],
                [one.attention for one in passes],
                [one.head for one in passes],
            )
        )
        found[kernel] = DraftTimings(layer, attention, head)
    return found


def machine_name(device: str) -> str:
    """The `machine` that a profile of this device would have now."""
    return name_of_device(torch.device(device))


@dataclass(frozen=True)
class SlowMemory:
    """Slow memory to time the link with."""

    open_link: Callable[[int], Stream]  # with two slots of so many bytes
    cursor: Cursor  # shared by all measurements


@contextmanager
def open_slow_memory(
    spec: ModelSpec, device: torch.device, folder: Path, effort: Effort
) -> Iterator[SlowMemory]:
    """A file on the disk of `folder`, or for a GPU host memory, as large as the model within the
    limits of `effort`."""
    least, most = effort.least_link_bytes, effort.most_link_bytes
    num_bytes = min(max(raw_storage(spec).num_bytes, least), most) >> 20 << 20
    if device.type == "cuda":
        with pinned(num_bytes) as host:
            yield SlowMemory(lambda size: HostCopies(device, host, size), Cursor(num_bytes))
        return
    with unnamed_file(folder, num_bytes) as path:
        yield SlowMemory(
            lambda size: DiskLink(path, [host_buffer(size) for _ in range(2)], None),
            Cursor(num_bytes),
        )


@contextmanager
def pinned(num_bytes: int) -> Iterator[Tensor]:
    """Host memory uint8 [num_bytes] that a GPU copies from. Raises SubspecError(RESOURCES): what is
    not pinned would be timed at another speed than plans run at."""
    host = pinned_buffer(num_bytes)
    try:
        yield host
    finally:
        unpin(host)


def block_sizes(spec: ModelSpec) -> list[int]:
    """Bytes of the blocks that a plan may stream, ascending."""
    ways = usual_storages(spec)[0], raw_storage(spec)
    blocks = {ring.block_bytes if ring else 0 for way in ways for ring in staging(way)}
    return sorted({min(max(block, PAGE_BYTES), MAX_BLOCK) for block in blocks})


def measure_link(
    slow_memory: SlowMemory, block_bytes: int, effort: Effort = USUAL_EFFORT
) -> LinkRate:
    link = slow_memory.open_link(block_bytes)
    try:
        return LinkRate(block_bytes, stream_rate(link, slow_memory.cursor, block_bytes, effort))
    finally:
        link.close()


def contention(bench: Bench, slow_memory: SlowMemory, idle: LinkRate) -> tuple[float, float]:
    """Shares of their speeds that the link and the layers keep while both are busy."""
    action = bench.loaded_layers()
    alone = repetitions(action, bench.device, bench.effort)
    link = slow_memory.open_link(idle.block_bytes)
    try:
        with streaming(link, slow_memory.cursor, idle.block_bytes) as bytes_per_second:
            loaded = repetitions(action, bench.device, bench.effort)
            busy = bytes_per_second()
    finally:
        link.close()
    return share_kept(busy, idle.bytes_per_second), share_kept(loaded, alone)


def share_kept(loaded: float, idle: float) -> float:
    return min(1.0, max(MIN_SHARE, loaded / idle))


def measured_once(
    bench: Bench,
    kernel: Int4Kernel,
    substitutes: Substitutes,
    graphs: CompiledGraphs | None,
    slow_memory: SlowMemory,
) -> Profile:
    """Time everything once; the caller sets the fields that are not timed."""
    started = cpu_times()
    exact_layer, exact_head = bench.exact_timings()
    fast_layer, plain_head = bench.fast_timings()
    draft = bench.draft_timings(substitutes, graphs)
    effort = bench.effort
    link = tuple(measure_link(slow_memory, size, effort) for size in block_sizes(bench.full_spec))
    contended_link, contended_compute = contention(bench, slow_memory, link[-1])
    return Profile(
        device="cuda" if bench.device.type == "cuda" else "cpu",
        machine=name_of_device(bench.device),
        num_threads=torch.get_num_threads(),
        free_bytes=0,
        pinnable_bytes=0,
        overhead_bytes=0,
        link=link,
        contended_link=contended_link,
        contended_compute=contended_compute,
        digest_bytes_per_second=digest_bytes_per_second(effort),
        exact_layer=exact_layer,
        fast_layer=fast_layer,
        draft_layer=draft.layer,
        exact_attention=bench.attention_timings(attend_batch_invariant, bench.weights.dtype),
        fast_attention=bench.attention_timings(attend, bench.weights.dtype),
        draft_attention=draft.attention,
        exact_head=(Timing(1, plain_head), *exact_head),
        draft_head=draft.head,
        round_overhead_seconds=bench.round_overhead_seconds(),
        residual_weights_per_second=decoded_weights_per_second(
            bench.spec, bench.device, kernel, "residual", effort
        ),
        fp8_residual_weights_per_second=decoded_weights_per_second(
            bench.full_spec, bench.device, kernel, "fp8-residual", effort
        ),
        fp8_weights_per_second=decoded_weights_per_second(
            bench.full_spec, bench.device, kernel, "fp8", effort
        ),
        int4_kernel=kernel,
        batch_invariant_widths=(),
        draft_graphs=graphs is not None,
        background_cpu_share=background_cpu_share(started, cpu_times()),
    )


class HostCopies:
    """cuda: copies from pinned memory on a stream of their own, like HostLink."""

    def __init__(self, device: torch.device, host: Tensor, block_bytes: int) -> None:
        self._host = host
        self._slots = [torch.empty(block_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._copies = torch.cuda.Stream(device)
        self._filled = [torch.cuda.Event() for _ in range(2)]

    def begin(self, slot: int, offset: int, num_bytes: int) -> None:
        # Called from another thread, and inference mode is per thread.
        with torch.inference_mode(), torch.cuda.stream(self._copies):
            self._slots[slot].copy_(self._host[offset : offset + num_bytes], non_blocking=True)
            self._filled[slot].record(self._copies)

    def wait(self, slot: int) -> None:
        self._filled[slot].synchronize()

    def close(self) -> None:
        self._copies.synchronize()


def digest_bytes_per_second(effort: Effort = USUAL_EFFORT) -> float:
    """Bytes per second of the digest check when weights are first read."""
    num_threads = torch.get_num_threads()
    data = torch.zeros(DIGEST_BYTES, dtype=torch.uint8)
    expected = part_digest([bytes_of(data)], None)
    digests = Digests(num_threads)

    def check() -> None:
        for _ in range(num_threads):
            digests.check_part("a part", data, expected, None)
        digests.finish()

    [(seconds, _)] = time_each([check], torch.device("cpu"), effort)
    digests.close()
    return num_threads * DIGEST_BYTES / seconds
