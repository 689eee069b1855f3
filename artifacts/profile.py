"""Profile: what was measured on a machine with the runtime's own kernels, at a model's shapes."""

from dataclasses import dataclass

from subspec.artifacts.plan import DeviceKind, Int4Kernel


@dataclass(frozen=True)
class Timing:
    """Seconds of one operation at `width` rows: a typical one, and the slowest."""

    width: int
    seconds: float
    slowest: float = 0.0


@dataclass(frozen=True)
class LinkRate:
    block_bytes: int
    bytes_per_second: float


@dataclass(frozen=True)
class Corrections:
    """How much longer real rounds took than the profile's own terms add up to; 1: as long."""

    draft: float = 1.0
    verify: float = 1.0
    plain: float = 1.0  # a token of plain decoding
    prompt: float = 1.0  # the first token
    num_rounds: int = 0  # that this rests on
    link_bandwidth: int | None = None  # bytes per second that they were slowed to, if they were


LIVE_TOKENS = 128  # in the cache while layers are timed
MORE_TOKENS = 1024  # what the timings of attention are for


@dataclass(frozen=True)
class Profile:
    device: DeviceKind
    machine: str  # device name, instruction set, torch version, processors
    num_threads: int
    free_bytes: int  # fast memory not in use when measured
    pinnable_bytes: int  # host memory that the process could pin; 0: not probed
    overhead_bytes: int  # fast memory that the process takes before any weight (CUDA context)
    link: tuple[LinkRate, ...]  # slow tier -> fast tier, block sizes ascending
    contended_link: float  # share of its speed that the link keeps while layers are computed, and
    contended_compute: (
        float  # that a layer keeps while the link is busy; both with the largest blocks
    )
    digest_rate: float  # bytes per second of the check when weights are first read
    exact_layer: tuple[Timing, ...]  # one decoder layer, LIVE_TOKENS in the cache, widths ascending
    fast_layer: tuple[Timing, ...]  # the same unpadded, by the fastest kernels: a token, a prompt
    draft_layer: tuple[Timing, ...]
    exact_attention: tuple[Timing, ...]  # MORE_TOKENS more in the cache, in one layer
    fast_attention: tuple[Timing, ...]
    draft_attention: tuple[Timing, ...]
    exact_head: tuple[Timing, ...]
    draft_head: tuple[Timing, ...]
    round_seconds: float  # fixed cost of a round outside layers and heads
    residual_weights_per_second: (
        float  # exact weights per second from residuals; 0: not on this machine
    )
    int4_kernel: Int4Kernel
    batch_invariant_widths: tuple[int, ...]  # widths at which a row's bits ignore its place
    corrections: Corrections = Corrections()

    def link_rate(self, block_bytes: int) -> float:
        """Bytes per second at `block_bytes`: of the largest measured block that is not larger."""
        known = [p for p in self.link if p.block_bytes <= block_bytes]
        return (known[-1] if known else self.link[0]).bytes_per_second

    def contended_shares(self, bytes_per_second: float) -> tuple[float, float]:
        """(of the link, of a layer): what they keep where the link gives no more than that. What it
        gives beside a layer may be all of it then; and it slows layers less, the less it gives."""
        share = min(1.0, bytes_per_second / self.link[-1].bytes_per_second)
        taken = min(1.0, share / self.contended_link)
        return min(1.0, self.contended_link / share), 1 - (1 - self.contended_compute) * taken


def seconds_at(timings: tuple[Timing, ...], width: int) -> float:
    """Piecewise linear in the width; beyond the last point in proportion to its slope, if that
    rises: measured times need not ascend with the width."""
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
