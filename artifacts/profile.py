"""Profile: measurements of a machine with the runtime's own kernels, at a model's shapes."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated

from subspec.artifacts.common.bounds import Between, Count, Length, Threads, VerifyWidths
from subspec.artifacts.model import Encoding
from subspec.artifacts.plan import DeviceKind, Int4Kernel

FASTEST = 1e15  # bytes or weights a second
MIN_SECONDS, MAX_SECONDS = 1e-9, 1e6  # bounds of a timing, in seconds


@dataclass(frozen=True)
class Timing:
    """Seconds of one operation at `width` rows: the typical and the slowest time."""

    width: Annotated[int, Between(1, 1 << 20)]
    seconds: Annotated[float, Between(MIN_SECONDS, MAX_SECONDS)]
    slowest: Annotated[float, Between(0, MAX_SECONDS)] = 0.0


@dataclass(frozen=True)
class LinkRate:
    block_bytes: Annotated[int, Between(1, 1 << 62)]
    bytes_per_second: Annotated[float, Between(1, FASTEST)]


Timings = Annotated[tuple[Timing, ...], Length(1, 1000)]  # of one operation, widths ascending
SomeTimings = Annotated[tuple[Timing, ...], Length(0, 1000)]
Factor = Annotated[float, Between(0.01, 100)]
Share = Annotated[float, Between(0.01, 1)]
Rate = Annotated[float, Between(0, FASTEST)]


@dataclass(frozen=True)
class Corrections:
    """Correction factors: measured time of real rounds over the sum of the profile's terms."""

    draft: Factor = 1.0
    verify: Factor = 1.0
    plain: Factor = 1.0  # a token of plain decoding
    prompt: Factor = 1.0  # the first token
    num_rounds: Count = 0  # that were timed
    # Bytes per second that the link was limited to in them; None: not limited.
    link_bandwidth: Annotated[int, Between(1, 1 << 62)] | None = None
    draft_model: Factor = 1.0  # a draft of the draft model alone
    hierarchical_draft: Factor = 1.0  # one that it proposes and the substitutes check


UNDER_LOAD = 0.15  # of the CPUs' time; chosen: a quiet system's own services use a few percent

LIVE_TOKENS = 128  # in the cache while layers are timed
MORE_TOKENS = 1024  # additional tokens in the cache, which the attention timings are for


@dataclass(frozen=True)
class KernelCosts:
    """The fields of a Profile that depend on its 4-bit kernel."""

    int4_kernel: Int4Kernel
    draft_layer: Timings
    draft_head: Timings
    residual_weights_per_second: Rate
    fp8_residual_weights_per_second: Rate = 0.0
    draft_model_layer: SomeTimings = ()
    draft_model_head: SomeTimings = ()


@dataclass(frozen=True)
class Profile:
    device: DeviceKind
    machine: str  # device name, instruction set, torch version, processors
    num_threads: Threads
    free_bytes: Count  # fast memory that was free when measured
    pinnable_bytes: Count  # host memory that the process could pin; 0: not probed
    overhead_bytes: Count  # fast memory that the process takes before any weight (CUDA context)
    # From slow to fast memory, block sizes ascending.
    link: Annotated[tuple[LinkRate, ...], Length(1, 1000)]
    # Contention, with the largest blocks: the share of its speed that the link keeps while layers
    # are computed, and that a layer keeps while the link is busy.
    contended_link: Share
    contended_compute: Share
    digest_bytes_per_second: Rate  # of the check when weights are first read
    exact_layer: Timings  # one decoder layer, LIVE_TOKENS in the cache
    fast_layer: Timings  # the same without padding, by the fastest kernels: one token, a prompt
    draft_layer: Timings
    exact_attention: Timings  # what MORE_TOKENS in the cache add to one layer
    fast_attention: Timings
    draft_attention: Timings
    exact_head: Timings
    draft_head: Timings
    # Fixed cost of a round outside layers and heads
    round_overhead_seconds: Annotated[float, Between(0, MAX_SECONDS)]
    residual_weights_per_second: Rate  # decoded from residuals; 0: not on this machine
    int4_kernel: Int4Kernel
    # Groups of widths, ascending: a row has the same bits at any place in all widths of a group.
    batch_invariant_widths: tuple[VerifyWidths, ...]
    corrections: Corrections = Corrections()
    # The draft's small operations were timed compiled by torch (graphs/), which is faster.
    draft_graphs: bool = False
    # Of a model that has weights in FP8; else 0.
    fp8_residual_weights_per_second: Rate = 0.0  # decoded from residuals
    fp8_weights_per_second: Rate = 0.0  # FP8 codes, multiplied by their scales
    # Of a draft model, as draft_layer, draft_attention and draft_head; empty without one.
    draft_model_layer: SomeTimings = ()
    draft_model_attention: SomeTimings = ()
    draft_model_head: SomeTimings = ()
    # Share of CPU time that other programs, or the host's other guests, used meanwhile.
    background_cpu_share: Annotated[float, Between(0, 1)] = 0.0
    # Of slower 4-bit kernels that take less memory.
    other_kernels: Annotated[tuple[KernelCosts, ...], Length(0, 2)] = ()
    # `shapes_of` the model, and of the draft model, that were measured; "": not known.
    shapes: str = ""
    draft_model_shapes: str = ""

    @property
    def by_kernel(self) -> "tuple[Profile, ...]":
        """A profile for every 4-bit kernel that was timed, the fastest kernel's first."""
        alone = replace(self, other_kernels=())
        return (alone, *(replace(alone, **vars(one)) for one in self.other_kernels))

    def with_kernel(self, kernel: Int4Kernel) -> "Profile":
        """The profile for a plan with this 4-bit kernel; itself if that was not timed."""
        return next((one for one in self.by_kernel if one.int4_kernel == kernel), self)

    @property
    def under_load(self) -> bool:
        """True if other programs made the timings too slow; a GPU's hardly depend on the CPUs."""
        return self.device == "cpu" and self.background_cpu_share > UNDER_LOAD

    @property
    def has_draft_model(self) -> bool:
        return bool(self.draft_model_layer)

    def weights_per_second(self, encoding: Encoding) -> float:
        """Weights per second decoded from an encoding for the matrix products."""
        if encoding == "raw":
            return math.inf
        return {
            "residual": self.residual_weights_per_second,
            "fp8-residual": self.fp8_residual_weights_per_second,
            "fp8": self.fp8_weights_per_second,
        }[encoding]

    def link_rate(self, block_bytes: int) -> float:
        """Bytes per second of the largest measured block size up to `block_bytes`."""
        known = [p for p in self.link if p.block_bytes <= block_bytes]
        return (known[-1] if known else self.link[0]).bytes_per_second

    def contended_shares(self, bytes_per_second: float) -> tuple[float, float]:
        """(link, layer) shares of speed under contention with a link of at most `bytes_per_second`.
        A slower link may keep all of its speed, and slows layers down less."""
        share = min(1.0, bytes_per_second / self.link[-1].bytes_per_second)
        taken = min(1.0, share / self.contended_link)
        return min(1.0, self.contended_link / share), 1 - (1 - self.contended_compute) * taken


def out_of_order(profile: Profile) -> str:
    """Name of the first list whose widths or block sizes are not ascending; "" if all are."""
    others = enumerate(profile.other_kernels)
    places = {"": profile, **{f"other_kernels[{n}].": one for n, one in others}}
    lists = {"link": [rate.block_bytes for rate in profile.link]} | {
        place + name: [timing.width for timing in timings]
        for place, some in places.items()
        for name, timings in vars(some).items()
        if timings and isinstance(timings, tuple) and isinstance(timings[0], Timing)
    }
    groups = enumerate(profile.batch_invariant_widths)
    lists |= {f"batch_invariant_widths[{n}]": list(group) for n, group in groups}
    return next((n for n, x in lists.items() if any(b <= a for a, b in pairwise(x))), "")


def seconds_at(timings: tuple[Timing, ...], width: int) -> float:
    """Seconds at `width`, interpolated linearly. Beyond the last point the last slope continues,
    unless it is negative: measured times need not ascend with the width."""
    below = [t for t in timings if t.width <= width] or [timings[0]]
    above = [t for t in timings if t.width >= width]
    low = below[-1]
    if low.width >= width or len(timings) == 1:
        return low.seconds
    high = above[0] if above else timings[-1]
    if high is low:
        low, high = timings[-2], timings[-1]
    slope = (high.seconds - low.seconds) / (high.width - low.width)
    if not above:
        return high.seconds + max(0.0, slope) * (width - high.width)
    return low.seconds + slope * (width - low.width)
