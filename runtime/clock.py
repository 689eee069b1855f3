"""Time of a generation: seconds per phase on either device, and optionally a trace of spans.

A trace has spans in lanes, written as Chrome trace events: Perfetto and chrome://tracing open it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

# Ends a span now: lane, name, its start (time.perf_counter), details.
Record = Callable[[str, str, float, dict[str, int]], None]

# From top to bottom in a viewer. Spans of one lane do not overlap.
LANES = ("prefill", "draft", "verify", "layer", "product", "decode", "wait", "copy")


def unrecorded(lane: str, name: str, started: float, detail: dict[str, int]) -> None:
    """A Record that does nothing."""


@dataclass(frozen=True)
class Span:
    lane: str  # one of LANES
    name: str
    start_seconds: float  # of time.perf_counter
    seconds: float
    detail: dict[str, int]  # unit -> amount: bytes, weights

    @property
    def end_seconds(self) -> float:
        return self.start_seconds + self.seconds


@dataclass
class Clock:
    """Seconds per phase. Phases do not overlap. On cuda a phase synchronizes: it ends with its
    kernels."""

    device: torch.device
    spans: list[Span] | None = None  # None: not recorded
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        # A range for NVIDIA's profilers, if one is attached.
        marked = self.spans is not None and self.device.type == "cuda" and has_ranges()
        with torch.cuda.nvtx.range(name) if marked else nullcontext():
            yield
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        elapsed = time.perf_counter() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
        self.record(name, name, started, {})

    def record(self, lane: str, name: str, started: float, detail: dict[str, int]) -> None:
        """End a span now. This is a `Record`; any thread may call it."""
        if self.spans is not None:
            self.spans.append(Span(lane, name, started, time.perf_counter() - started, detail))


def has_ranges() -> bool:
    """Return True if this build of torch can mark ranges for NVIDIA's profilers."""
    return torch.version.cuda is not None


def chrome_trace(spans: Sequence[Span], about: dict[str, str]) -> dict[str, Any]:
    """Spans -> the JSON object of the Trace Event Format; microseconds since the first span."""
    zero = min((span.start_seconds for span in spans), default=0.0)
    used = {span.lane for span in spans}
    lanes = {lane: number for number, lane in enumerate(LANES, 1) if lane in used}
    events: list[dict[str, Any]] = []
    for lane, number in lanes.items():
        common = {"ph": "M", "pid": 1, "tid": number}
        events.append({"name": "thread_name", **common, "args": {"name": lane}})
        events.append({"name": "thread_sort_index", **common, "args": {"sort_index": number}})
    for span in sorted(spans, key=lambda span: span.start_seconds):
        # Whole nanoseconds, so that rounding does not make consecutive spans overlap.
        start, end = (round(1e9 * (t - zero)) for t in (span.start_seconds, span.end_seconds))
        detail = dict(span.detail)
        if "bytes" in detail and end > start:
            detail["bytes_per_second"] = round(detail["bytes"] * 1e9 / (end - start))
        events.append(
            {
                "name": span.name,
                "ph": "X",
                "pid": 1,
                "tid": lanes[span.lane],
                "ts": start / 1e3,
                "dur": (end - start) / 1e3,
                "args": detail,
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}
