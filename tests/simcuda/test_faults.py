"""What is put into the CUDA path wrongly is found by the simulated device: each fault at its place,
and nothing without one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from simcuda.answering import answered
from simcuda.device import simulated
from simcuda.simulation import CaptureError, HostAccess, MixedDevices, Race, Unpinned, where

from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import Encoding
from subspec.artifacts.plan import Method
from subspec.runtime.draft import beam, graphs
from subspec.runtime.engine import OpenOptions
from subspec.runtime.memory import host_buffer
from subspec.runtime.stream import link, ring
from subspec.runtime.stream.link import HostLink

Demo = Callable[[Encoding], Artifact]
add_level, take, pinned_copy = beam.add_level, ring.Ring.take, link.pinned_copy


@dataclass(frozen=True)
class Fault:
    owner: Any
    name: str
    wrong: Callable[..., Any]
    found_as: type[BaseException]
    says: str


# Waits and records


def waits_for_nothing(self: Any, slot: int) -> Any:
    return self._slots[slot]


def does_not_wait_for_the_slot(self: Any, slot: int, offset: int, num_bytes: int) -> None:
    with torch.cuda.stream(self._copies):
        self._slots[slot][:num_bytes].copy_(self._host[offset], non_blocking=True)
        self._filled[slot].record(self._copies)


def waits_for_another_slot(self: Any, slot: int, offset: int, num_bytes: int) -> None:
    with torch.cuda.stream(self._copies):
        self._copies.wait_event(self._free[slot - 1])
        self._slots[slot][:num_bytes].copy_(self._host[offset], non_blocking=True)
        self._filled[slot].record(self._copies)


def records_before_the_copy(self: Any, slot: int, offset: int, num_bytes: int) -> None:
    with torch.cuda.stream(self._copies):
        self._copies.wait_event(self._free[slot])
        self._filled[slot].record(self._copies)
        self._slots[slot][:num_bytes].copy_(self._host[offset], non_blocking=True)


def releases_on_the_wrong_stream(self: Any, slot: int) -> None:
    self._free[slot].record(self._copies)


def refills_what_was_just_taken(self: Any, name: str) -> Any:
    is_new = name not in self._arrived
    found = take(self, name)
    if is_new:
        self._link.release((self._num_taken - 1) % self._num_slots)
        self._fill()
    return found


# Pinned memory


def is_not_pinned(path: Any, ranges: list[tuple[int, int]]) -> dict[int, torch.Tensor]:
    file, found = link.DirectFile(path), {}
    for offset, num_bytes in ranges:
        found[offset] = host_buffer(num_bytes)
        file.read_into(found[offset], offset)
    file.close()
    return found


def unpins_nothing(self: Any) -> None:
    torch.cuda.synchronize(self._device)
    self._host.clear()


# A draft's levels


def reads_a_number_back(grown: Any, last: Any, children: Any, *rest: Any) -> Any:
    assert int(children[0]) >= 0
    return add_level(grown, last, children, *rest)


def brings_a_tensor(grown: Any, last: Any, children: Any, *rest: Any) -> Any:
    torch.tensor([1], device=children.device)
    return add_level(grown, last, children, *rest)


def mixes_devices(grown: Any, last: Any, children: Any, tree: Any, logits: Any) -> Any:
    return add_level(grown, last, children + torch.arange(tree.width), tree, logits)


def indexes_with_a_host_tensor(grown: Any, *rest: Any) -> Any:
    grown.tokens[torch.zeros(1, dtype=torch.int64)]
    return add_level(grown, *rest)


FAULTS = {
    "compute does not wait for the copy": Fault(
        HostLink, "wait", waits_for_nothing, Race, "unordered"
    ),
    "a copy does not wait for the slot": Fault(
        HostLink, "begin", does_not_wait_for_the_slot, Race, "unordered"
    ),
    "a copy waits for another slot": Fault(
        HostLink, "begin", waits_for_another_slot, Race, "unordered"
    ),
    "the copy's event is recorded before it": Fault(
        HostLink, "begin", records_before_the_copy, Race, "unordered"
    ),
    "a slot is released on the copies' stream": Fault(
        HostLink, "release", releases_on_the_wrong_stream, Race, "unordered"
    ),
    "a slot is refilled as soon as it was taken": Fault(
        ring.Ring, "take", refills_what_was_just_taken, Race, "unordered"
    ),
    "host memory is not pinned": Fault(
        link, "pinned_copy", is_not_pinned, Unpinned, "not pinned at link.py"
    ),
    "host memory stays pinned": Fault(
        HostLink, "close", unpins_nothing, AssertionError, "stays registered"
    ),
    "a captured level reads a number back": Fault(
        graphs, "add_level", reads_a_number_back, AssertionError, "cannot be captured"
    ),
    "a captured level brings a tensor from the host": Fault(
        graphs, "add_level", brings_a_tensor, AssertionError, "cannot be captured"
    ),
    "a level mixes devices": Fault(beam, "add_level", mixes_devices, MixedDevices, "host tensor"),
    "a level indexes with a host tensor": Fault(
        beam, "add_level", indexes_with_a_host_tensor, MixedDevices, "host tensor"
    ),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it goes on
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_cuda_path_is_found(
    name: str, demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = FAULTS[name]
    on_draft = fault.owner in (beam, graphs)
    method: Method = "substitute" if on_draft else "plain"
    monkeypatch.setattr(fault.owner, fault.name, fault.wrong)
    with pytest.raises(fault.found_as, match=fault.says):
        answered(demo("raw"), 9 if on_draft else 4, OpenOptions(method))


def test_a_line_of_the_project_is_named_whatever_path_it_was_imported_through() -> None:
    names: dict[str, Any] = {"__name__": "subspec.runtime.stream.link", "where": where}
    exec(compile("def begin(): return where()", "/another/checkout/link.py", "exec"), names)
    assert names["begin"]() == "link.py:1 begin"


@pytest.mark.parametrize(
    "options",
    [OpenOptions("plain"), OpenOptions("substitute"), OpenOptions("plain", link_bandwidth=2e9)],
    ids=["plain", "substitute", "slowed link"],
)
def test_nothing_is_found_where_nothing_is_wrong(demo: Demo, options: OpenOptions) -> None:
    said, _ = answered(demo("raw"), 9, options)
    assert len(said) == 9


def test_the_host_reaches_gpu_memory_by_copies_alone(demo: Demo) -> None:
    with simulated():
        there = torch.ones(3, device="cuda")
        for reach in (there.data_ptr, there.numpy, lambda: torch.ones(3) + there):
            with pytest.raises((HostAccess, MixedDevices)):
                reach()
        assert there.tolist() == [1.0] * 3


def test_a_triton_kernel_runs_on_what_lies_behind() -> None:
    pytest.importorskip("triton")
    from simcuda.toy_kernel import twice_plus_one

    with simulated():
        x, out = torch.arange(70, device="cuda").float(), torch.zeros(70, device="cuda")
        twice_plus_one(x, out)
        assert torch.equal(out.cpu(), torch.arange(70) * 2.0 + 1)
        with pytest.raises(AssertionError, match="device pointers"):
            twice_plus_one(x, torch.zeros(70))


def test_a_capture_runs_nothing_and_its_replay_runs_on_the_same_memory() -> None:
    with simulated(), torch.inference_mode():
        x, out = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle(), stream=stream):
            out.copy_(x * 2 + 1)
            with pytest.raises(CaptureError):
                out.tolist()
        assert out.tolist() == [0.0] * 4
        x.fill_(3.0)
        graph.replay()
        assert out.tolist() == [7.0] * 4
