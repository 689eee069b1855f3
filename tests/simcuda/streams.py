"""Streams, events and graphs of the simulated device, in place of torch.cuda's."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from simcuda.clocks import Actor
from simcuda.private import tree_leaves
from simcuda.simulation import CaptureError, Simulation, active, where


class SimStream:
    def __init__(
        self, device: Any = None, priority: int = 0, *, owner: Simulation | None = None
    ) -> None:
        """owner: for a GPU's default stream."""
        simulation = owner or active()
        self.device = simulation.device_of(device)
        self.actor = Actor("")
        kind = "default stream" if owner else f"stream {self.actor.number}"
        self.name = self.actor.name = f"{kind} of {self.device}"
        simulation.streams.append(self)

    def wait_event(self, event: "SimEvent") -> None:
        if event.clock is not None:
            self.actor.join(event.clock)

    def wait_stream(self, other: "SimStream") -> None:
        self.actor.join(active().thread.host.clock)
        self.actor.join(other.actor.clock)

    def record_event(self, event: "SimEvent | None" = None) -> "SimEvent":
        event = event or SimEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        active().wait("stream.synchronize", self)


class SimEvent:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.timing = enable_timing
        self.clock: dict[int, int] | None = None
        self.stream: SimStream | None = None

    def record(self, stream: SimStream | None = None) -> None:
        simulation = active()
        stream = stream or simulation.current(simulation.thread.device)
        if simulation.capturing is not None and stream is simulation.capturing.stream:
            raise CaptureError(f"an event is recorded in a capture at {where()}")
        stream.actor.join(simulation.thread.host.clock)
        self.clock, self.stream = dict(stream.actor.clock), stream

    def wait(self, stream: SimStream | None = None) -> None:
        (stream or active().current(active().thread.device)).wait_event(self)

    def synchronize(self) -> None:
        if self.clock is None:
            return
        simulation = active()
        simulation.check_not_capturing("event.synchronize")
        simulation.waits["event.synchronize", where()] += 1
        simulation.thread.host.join(self.clock)

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "SimEvent") -> float:
        """Milliseconds: nothing takes time here."""
        for event in (self, other):
            assert event.timing and event.clock is not None and event.stream is not None
            mine = event.stream.actor.number
            if not active().thread.host.saw(mine, event.clock[mine]):
                raise RuntimeError(f"elapsed_time before the event has passed at {where()}")
        return 0.001


class SimGraph:
    """What a capture recorded, to run again on the same memory."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.steps = list[tuple[Callable[..., Any], Any, Any, Any]]()
        self.names = list[str]()
        self.reads, self.writes = set[Any](), set[Any]()
        self.pool: object = None
        self.stream: Any = None
        self.ended = False
        active().graphs.add(self)

    def record(
        self, call: Callable[..., Any], args: Any, kwargs: Any, result: Any, ranges: Any, what: str
    ) -> None:
        self.names.append(what)
        if active().keeps:
            self.steps.append((call, args, kwargs, result))
            self.reads.update(ranges[0])
            self.writes.update(ranges[1])

    def replay(self) -> None:
        assert self.ended, "replay of a graph that was not captured"
        simulation = active()
        simulation.check_not_capturing("a replay")
        if simulation.thread.device != self.stream.device.index:
            raise RuntimeError(f"a graph is replayed on another device at {where()}")
        with simulation.lock:
            stream = simulation.current(self.stream.device.index)
            live = [
                [one for one in some if one[0] in simulation.storages]
                for some in (self.reads, self.writes)
            ]
            simulation.launch(stream)
            simulation.touch(stream, "graph replay", *live)
            for call, args, kwargs, result in self.steps:
                given = call(*args, **kwargs)
                if result is not None:
                    pairs = zip(tree_leaves(result), tree_leaves(given), strict=True)
                    for into, new in pairs:
                        if isinstance(into, torch.Tensor):
                            into.copy_(new)

    def reset(self) -> None:
        self.steps.clear()


class Capture:
    """torch.cuda.graph. Without a stream it takes one that torch makes once for the process, on the
    GPU that is current then: a capture on another GPU records nothing."""

    default_capture_stream: SimStream | None = None

    def __init__(
        self,
        cuda_graph: SimGraph,
        pool: object = None,
        stream: SimStream | None = None,
        capture_error_mode: str = "global",
    ) -> None:
        if stream is None and Capture.default_capture_stream is None:
            Capture.default_capture_stream = SimStream()
        self._graph, self._pool = cuda_graph, pool
        self._stream = stream or Capture.default_capture_stream
        self._on_stream: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        simulation = active()
        simulation.wait("a capture begins")
        for allocator in simulation.allocators:
            allocator.empty()
        self._on_stream = simulation.on_stream(self._stream)
        self._on_stream.__enter__()
        self._graph.pool, self._graph.stream = self._pool, self._stream
        simulation.capturing = self._graph

    def __exit__(self, *error: Any) -> None:
        active().capturing = None
        self._graph.ended = error[0] is None
        assert self._on_stream is not None
        self._on_stream.__exit__(*error)
