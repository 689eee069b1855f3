"""A simulated CUDA device on torch's CPU build: the project's own `device.type == "cuda"` code runs
unchanged, with real numbers, and what a GPU would refuse or leave undefined is found.

- The host reaches the memory of a GPU by copies alone; mixed devices and kernels that CUDA lacks
  raise. What waits for a GPU is counted with its place; inside a capture it raises.
- Streams and events are vector clocks (clocks.py): accesses that nothing orders are races.
- A capture records operations; its replay runs them on the same memory.
- The caching allocator (allocator.py), the driver's count of memory and host registration are
  modelled.

It sees operations, not what a CUDA kernel does inside. A strided access counts as all it spans.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from simcuda import private
from simcuda.dispatch import dispatch
from simcuda.kernels import DecodeTile, launched
from simcuda.simulation import HostAccess, Simulation, made_active, where
from simcuda.streams import Capture, SimEvent, SimGraph, SimStream
from simcuda.tensors import SimTensor, is_sim

from subspec.runtime.model import attention

NOT_ALIGNED, REGISTERED_BEFORE, NOT_REGISTERED = 1, 712, 713  # of CUDA's errors
PAGE_BYTES = 4096
ATTENTION = "subspec.runtime.kernels.attention_triton"  # where the tree has it


class Mode(private.TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


@contextmanager
def simulated(**settings: Any) -> Iterator[Simulation]:
    """Inside, torch has GPUs. settings: of `Simulation`."""
    ctypes.CDLL(str(private.built_guard()))
    simulation = Simulation(**settings)
    simulation.dispatch = dispatch
    for index in range(simulation.num_devices):
        simulation.defaults.append(SimStream(index, owner=simulation))
    Capture.default_capture_stream = None
    with made_active(simulation), patched(simulation), private.no_lifting(), Mode():
        yield simulation


@contextmanager
def patched(simulation: Simulation) -> Iterator[None]:
    run_thread, as_tensor, Generator = threading.Thread.run, torch.as_tensor, torch.Generator

    def run_in_mode(self: threading.Thread) -> None:
        with private.no_lifting(), Mode():  # they are one thread's
            run_thread(self)

    class HostGenerator:
        def __new__(cls, device: object = "cpu") -> torch.Generator:  # type: ignore[misc]
            return Generator("cpu")

    def with_mapped(data: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(data, "__cuda_array_interface__"):
            return as_tensor(data, *args, **kwargs)
        return mapped(simulation, data.__cuda_array_interface__, kwargs["device"])

    names = {**memory_functions(simulation), **device_functions(simulation)}
    owner, name = private.END_ALLOCATE_TO_POOL
    with (
        patch.multiple(torch.cuda, **names),
        patch.object(owner, name, lambda *_: None, create=True),
        patch.object(torch, "Generator", HostGenerator),
        patch.object(torch, "as_tensor", with_mapped),
        patch.object(threading.Thread, "run", run_in_mode),
        triton_launches(simulation),
    ):
        yield


def mapped(simulation: Simulation, interface: dict[str, Any], device: Any) -> SimTensor:
    """Registered host memory as a GPU's tensor."""
    (num_bytes,), (address, _) = interface["shape"], interface["data"]
    raw = (ctypes.c_uint8 * num_bytes).from_address(address)
    inner = torch.frombuffer(raw, dtype=torch.uint8)
    if not simulation.is_pinned(inner):
        raise HostAccess(f"a GPU is given host memory that is not registered at {where()}")
    target = simulation.device_of(device)
    simulation.add_mapped(inner, target)
    return SimTensor(inner, target)


def memory_functions(simulation: Simulation) -> dict[str, Callable[..., Any]]:
    def allocator(device: Any) -> Any:
        return simulation.allocators[simulation.device_of(device).index]

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        own = with_context(simulation, device)
        return own.free_bytes, own.total_bytes

    def set_fraction(fraction: float, device: Any = None) -> None:
        assert 0 <= fraction <= 1, fraction
        allocator(device).fraction = fraction

    def reset_peak(device: Any = None) -> None:
        own = allocator(device)
        own.most_reserved, own.most_allocated = own.reserved, own.allocated

    def empty_cache() -> None:
        simulation.check_not_capturing("empty_cache")
        for one in simulation.allocators:
            one.empty()

    def register(address: int, size: int, flags: int) -> int:
        if simulation.register_status and (status := simulation.register_status.pop(0)):
            return status
        if address % PAGE_BYTES:
            return NOT_ALIGNED
        if any(address < a + n and a < address + size for a, n in simulation.registered.items()):
            return REGISTERED_BEFORE
        simulation.registered[address] = size
        return 0

    def unregister(address: int) -> int:
        if simulation.registered.pop(address, None) is None:
            return NOT_REGISTERED
        simulation.end_mapping(address)
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    return {
        "mem_get_info": mem_get_info,
        "memory_reserved": lambda device=None: allocator(device).reserved,
        "max_memory_reserved": lambda device=None: allocator(device).most_reserved,
        "memory_allocated": lambda device=None: allocator(device).allocated,
        "max_memory_allocated": lambda device=None: allocator(device).most_allocated,
        "reset_peak_memory_stats": reset_peak,
        "empty_cache": empty_cache,
        "set_per_process_memory_fraction": set_fraction,
        "cudart": lambda: runtime,
    }


def with_context(simulation: Simulation, device: Any) -> Any:
    """The allocator of a GPU on which this process has begun."""
    own = simulation.allocators[simulation.device_of(device).index]
    own.other_bytes = own.other_bytes or simulation.context_bytes
    return own


def device_functions(simulation: Simulation) -> dict[str, Any]:
    def set_device(device: Any) -> None:
        chosen = simulation.device_of(device)
        if chosen.index >= simulation.num_devices:
            raise RuntimeError("invalid device ordinal")
        simulation.thread.device = chosen.index
        with_context(simulation, chosen)

    @contextmanager
    def on_device(device: Any) -> Iterator[None]:
        before, simulation.thread.device = simulation.thread.device, simulation.device_of(device)
        simulation.thread.device = simulation.thread.device.index
        try:
            yield
        finally:
            simulation.thread.device = before

    def set_stream(stream: SimStream) -> None:
        simulation.thread.streams[stream.device.index] = stream

    def graph_pool_handle() -> tuple[str, int]:
        simulation.num_pools += 1
        return "pool", simulation.num_pools

    def current_stream(device: Any = None) -> SimStream:
        return simulation.current(simulation.device_of(device).index)

    major, minor = simulation.capability
    properties = SimpleNamespace(
        total_memory=simulation.total_bytes,
        major=major,
        minor=minor,
        name=simulation.gpu_name,
        uuid="simulated",
        multi_processor_count=128,
    )
    return {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: simulation.num_devices,
        "current_device": lambda: simulation.thread.device,
        "set_device": set_device,
        "device": on_device,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: simulation.gpu_name,
        "get_device_capability": lambda device=None: simulation.capability,
        "synchronize": lambda device=None: simulation.wait("device synchronize"),
        "stream": simulation.on_stream,
        "current_stream": current_stream,
        "default_stream": lambda device=None: simulation.defaults[
            simulation.device_of(device).index
        ],
        "set_stream": set_stream,
        "Stream": SimStream,
        "Event": SimEvent,
        "CUDAGraph": SimGraph,
        "graph": Capture,
        "graph_pool_handle": graph_pool_handle,
        "is_current_stream_capturing": lambda: simulation.capturing is not None,
        "_sleep": lambda cycles: simulation.launch(current_stream()),
    }


@contextmanager
def triton_launches(simulation: Simulation) -> Iterator[None]:
    """Residuals are decoded by the kernel's compiled twin, unless Triton interprets everything in
    this process, and exact attention is computed by its plain one: the interpreter multiplies bf16
    numbers as if they were integers. Other kernels that get simulated tensors run in it."""
    if find_spec("triton") is None:
        yield
        return
    from triton.runtime.driver import driver
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from subspec.runtime.kernels import residual_triton

    run, run_interpreted = JITFunction.run, InterpretedFunction.run

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        if any(map(is_sim, args)):
            return launched(self, args, grid, settings)
        real = run_interpreted if isinstance(self, InterpretedFunction) else run
        return real(self, *args, grid=grid, warmup=warmup, **settings)

    def call(self: Any, *args: Any, **settings: Any) -> Any:
        return InterpretedFunction(self.fn)(*args, **settings)

    def attend(q: torch.Tensor, *given: Any) -> torch.Tensor:
        simulation.check_triton(q.device)
        return attention.attend_in_fp64(q, *given)

    with (
        patch.object(driver, "_active", SimpleNamespace(utils=None)),  # it has started
        patch.object(JITFunction, "run", launch),
        patch.object(JITFunction, "__call__", call),
        patch.object(InterpretedFunction, "run", launch),
        ExitStack() as stack,
    ):
        if not isinstance(residual_triton._decode_tile, InterpretedFunction):
            stack.enter_context(patch.object(residual_triton, "_decode_tile", DecodeTile()))
        if find_spec(ATTENTION) is not None and simulation.back.type == "cpu":
            stack.enter_context(patch(f"{ATTENTION}.attend_in_blocks", attend))
        yield
