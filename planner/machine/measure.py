"""Times the link, the kernels and one layer of this machine -> Profile, with the runtime's code: a
profile times what will run.

What a pass is made of is timed by `microbench.py`, the decoding of residuals by
`residual_rate.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from subspec.artifacts.format.store import part_digest
from subspec.artifacts.model import PAGE_BYTES, ModelSpec
from subspec.artifacts.plan import Int4Kernel
from subspec.artifacts.profile import LinkRate, Profile, Timing, seconds_at
from subspec.planner.machine.microbench import Bench
from subspec.planner.machine.pinnable import pinnable_bytes
from subspec.planner.machine.profiles import typical_of
from subspec.planner.machine.residual_rate import residual_weights_per_second
from subspec.planner.machine.timing import (
    Stream,
    gpu_overhead_bytes,
    repetitions,
    stream_rate,
    streaming,
    time_each,
    unnamed_file,
)
from subspec.planner.machine.timing import pick_device as pick_device  # the caller's door is here
from subspec.planner.solve.problem import staging
from subspec.planner.solve.storage import raw_storage, usual_storages
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.engine import machine_name as name_of_device
from subspec.runtime.kernels import gemlite_kernel
from subspec.runtime.memory import bytes_of, free_bytes, host_buffer
from subspec.runtime.model.attention import attend, attend_batch_invariant, without_cudnn
from subspec.runtime.stream.digests import Digests
from subspec.runtime.stream.link import DiskLink

PASSES = 3  # over everything: a shared machine has fast and slow moments
DIGEST_BYTES = 4 << 20  # of one part
LARGEST_BLOCK = 64 << 20  # larger ones are not faster
LEAST_SHARE = 0.2  # of its speed: less is a disturbance, not contention
LINK_TEST_BYTES = (64 << 20, 256 << 20)  # at least and at most, in between the model's size

Progress = Callable[[str, float], None]


def measure(spec: ModelSpec, device: str, folder: Path, progress: Progress) -> Profile:
    """Profile of this machine at the model's shapes. `folder`: where the artifact will lie, on the
    disk whose speed counts. Takes seconds."""
    target = torch.device(device)
    cuda = target.type == "cuda"
    if cuda:
        target = torch.device("cuda", target.index or 0)
        torch.cuda.set_device(target)
        without_cudnn()  # as sessions do
    free = torch.cuda.mem_get_info(target)[0] if cuda else free_bytes()
    with slow_tier(spec, target, folder) as open_link, torch.inference_mode():
        progress("measuring", 0.0)
        bench = Bench(spec, target)
        kernel, substitutes = bench.faster_kernel()
        passes = []
        for index in range(PASSES):
            progress(f"measuring, {index + 1} of {PASSES}", (index + 1) / (PASSES + 2))
            passes.append(measured_once(bench, kernel, substitutes, open_link))
        progress("measuring where rows may stand", (PASSES + 1) / (PASSES + 2))
        profile = replace(
            typical_of(passes),
            free_bytes=free,
            pinnable_bytes=pinnable_bytes(device, raw_storage(spec).num_bytes) if cuda else 0,
            overhead_bytes=gpu_overhead_bytes(target) if cuda else 0,
            batch_invariant_widths=bench.batch_invariant_widths(),
        )
    if kernel == "gemlite":
        gemlite_kernel.keep_tuning(target)
    del bench, substitutes
    if cuda:
        torch.cuda.empty_cache()  # the session that rehearses needs the room
    progress("measured", 1.0)
    return profile


def machine_name(device: str) -> str:
    """The `machine` that a profile of this device would have now."""
    return name_of_device(torch.device(device))


OpenLink = Callable[[int], Stream]  # with two slots of so many bytes


@contextmanager
def slow_tier(spec: ModelSpec, device: torch.device, folder: Path) -> Iterator[OpenLink]:
    """Links to something as large as the model, within limits: a file on the disk of `folder`, or
    host memory."""
    least, most = LINK_TEST_BYTES
    num_bytes = min(max(raw_storage(spec).num_bytes, least), most) >> 20 << 20
    if device.type == "cuda":
        yield lambda block_bytes: HostCopies(device, block_bytes)
        return
    with unnamed_file(folder, num_bytes) as path:
        yield lambda block_bytes: DiskLink(path, [host_buffer(block_bytes) for _ in range(2)], None)


def block_sizes(spec: ModelSpec) -> list[int]:
    """Bytes of the blocks that a plan may stream, ascending."""
    ways = usual_storages(spec)[0], raw_storage(spec)
    blocks = {ring.block_bytes if ring else 0 for way in ways for ring in staging(way)}
    return sorted({min(max(block, PAGE_BYTES), LARGEST_BLOCK) for block in blocks})


def measure_link(open_link: OpenLink, block_bytes: int) -> LinkRate:
    """Over a file of the least size at least; blocks are read in a circle."""
    link = open_link(block_bytes)
    try:
        return LinkRate(block_bytes, stream_rate(link, LINK_TEST_BYTES[0], block_bytes))
    finally:
        link.close()


def contention(bench: Bench, open_link: OpenLink, idle: LinkRate) -> tuple[float, float]:
    """Shares of their idle speeds that the link and the layers keep while both are busy."""
    action = bench.loaded_layers()
    alone = repetitions(action, bench.device)
    link = open_link(idle.block_bytes)
    try:
        with streaming(link, LINK_TEST_BYTES[0], idle.block_bytes) as bytes_per_second:
            loaded = repetitions(action, bench.device)
            busy = bytes_per_second()
    finally:
        link.close()
    return share_kept(busy, idle.bytes_per_second), share_kept(loaded, alone)


def share_kept(loaded: float, idle: float) -> float:
    return min(1.0, max(LEAST_SHARE, loaded / idle))


def measured_once(
    bench: Bench, kernel: Int4Kernel, substitutes: Substitutes, open_link: OpenLink
) -> Profile:
    """One pass over everything that is timed; what is not is left for the caller to say."""
    exact_layer, exact_head = bench.exact_timings()
    fast_layer, plain_head = bench.fast_timings()
    draft = bench.draft_timings(substitutes)
    link = tuple(measure_link(open_link, size) for size in block_sizes(bench.full_spec))
    contended_link, contended_compute = contention(bench, open_link, link[-1])
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
        digest_rate=digest_rate(),
        exact_layer=exact_layer,
        # What took longer than more rows of the same would was disturbed.
        fast_layer=never_longer(fast_layer, exact_layer),
        draft_layer=draft.layer,
        exact_attention=bench.attention_timings(attend_batch_invariant, bench.weights.dtype),
        fast_attention=bench.attention_timings(attend, bench.weights.dtype),
        draft_attention=draft.attention,
        exact_head=(Timing(1, min(plain_head, exact_head[0].seconds)), *exact_head),
        draft_head=draft.head,
        round_seconds=bench.round_seconds(),
        residual_weights_per_second=residual_weights_per_second(bench.spec, bench.device, kernel),
        int4_kernel=kernel,
        batch_invariant_widths=(),
    )


class HostCopies:
    """cuda: copies of one pinned block on a stream of their own, as HostLink makes them."""

    def __init__(self, device: torch.device, block_bytes: int) -> None:
        self._host = host_buffer(block_bytes)
        torch.cuda.cudart().cudaHostRegister(self._host.data_ptr(), block_bytes, 1)
        self._slots = [torch.empty(block_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._copies = torch.cuda.Stream(device)
        self._filled = [torch.cuda.Event() for _ in range(2)]

    def begin(self, slot: int, offset: int, num_bytes: int) -> None:
        # Called from a thread of its own, and inference mode is each thread's own.
        with torch.inference_mode(), torch.cuda.stream(self._copies):
            self._slots[slot].copy_(self._host, non_blocking=True)
            self._filled[slot].record(self._copies)

    def wait(self, slot: int) -> None:
        self._filled[slot].synchronize()

    def close(self) -> None:
        self._copies.synchronize()
        torch.cuda.cudart().cudaHostUnregister(self._host.data_ptr())


def digest_rate() -> float:
    """Bytes per second of the check that weights pass when they are first read."""
    num_threads = torch.get_num_threads()
    data = torch.zeros(DIGEST_BYTES, dtype=torch.uint8)
    expected = part_digest([bytes_of(data)], None)
    digests = Digests(num_threads)

    def check() -> None:
        for _ in range(num_threads):
            digests.check_part("a part", data, expected, None)
        digests.finish()

    [(seconds, _)] = time_each([check], torch.device("cpu"))
    digests.close()
    return num_threads * DIGEST_BYTES / seconds


def never_longer(some: tuple[Timing, ...], than: tuple[Timing, ...]) -> tuple[Timing, ...]:
    return tuple(replace(t, seconds=min(t.seconds, seconds_at(than, t.width))) for t in some)
