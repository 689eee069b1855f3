"""What goes wrong on a GPU: an open that fails leaves nothing behind, an answer that is given up or
interrupted changes no later one, and a second GPU is like the first."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from threading import Thread
from typing import Any

import pytest
import torch
from builders import replan
from running import answer
from simcuda.answering import PROMPT, USUAL, captured_levels
from simcuda.device import simulated
from simcuda.simulation import CaptureError, Simulation
from simcuda.streams import Capture

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import Encoding
from subspec.planner.machine.measure import pinned
from subspec.planner.machine.timing import pick_device
from subspec.runtime import load, memory
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.stream import link
from subspec.runtime.stream.exact_weights import ExactWeights

Demo = Callable[[Encoding], Artifact]
NUM_TOKENS = 8


@pytest.fixture
def gpus() -> Iterator[Simulation]:
    with simulated() as simulation:
        yield simulation
    assert not simulation.races


def planned(demo: Demo, **plan: Any) -> Artifact:
    return replan(demo("raw"), **{**USUAL, **plan})


def assert_nothing_is_left(gpus: Simulation) -> None:
    assert not gpus.registered
    assert torch.cuda.memory_allocated() == 0
    assert gpus.allocators[0].fraction in (None, 1.0)


# Opening


@pytest.mark.parametrize("refused", [1, 3])
def test_an_open_whose_memory_cannot_be_pinned_leaves_nothing(
    gpus: Simulation, demo: Demo, refused: int
) -> None:
    """The first one is the embedding's, the others are the blocks'."""
    gpus.register_status = [0] * (refused - 1) + [2]
    with pytest.raises(SubspecError, match=r"pinning .* failed \(CUDA error 2\)") as caught:
        Engine.open(planned(demo))
    assert caught.value.exit_code == Exit.RESOURCES
    assert_nothing_is_left(gpus)


def test_an_open_that_finds_a_wrong_digest_leaves_nothing(
    gpus: Simulation, demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is pinned by then."""

    def wrong(*_: object) -> None:
        assert len(gpus.registered) > 2
        raise SubspecError(Exit.CORRUPT, "a part does not match its digest")

    monkeypatch.setattr(load.ArtifactWeights, "_check_block", wrong)
    with pytest.raises(SubspecError, match="does not match its digest"):
        Engine.open(planned(demo))
    assert_nothing_is_left(gpus)


def test_an_open_that_is_interrupted_while_the_link_is_timed_leaves_nothing(
    gpus: Simulation, demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(link, "cycles_per_second", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Engine.open(planned(demo), OpenOptions(link_bandwidth=1e9))
    assert_nothing_is_left(gpus)


def test_host_memory_that_is_not_free_is_not_touched(
    gpus: Simulation, demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the first block that does not fit, nor by those before it."""
    chosen = planned(demo, resident_share=0.0)
    streamed = sum(part.padded_bytes for part in chosen.stored_parts())
    monkeypatch.setattr(memory, "free_host_bytes", lambda: streamed - 1)

    def touched(num_bytes: int) -> Any:
        assert num_bytes < streamed // 2, "a block is allocated"
        return host_buffer(num_bytes)

    host_buffer = memory.host_buffer
    monkeypatch.setattr(memory, "host_buffer", touched)
    with pytest.raises(SubspecError, match="of host memory, but only .* are free") as caught:
        Engine.open(chosen)
    assert caught.value.exit_code == Exit.RESOURCES
    assert_nothing_is_left(gpus)


def test_the_link_is_not_timed_from_memory_that_is_not_pinned(gpus: Simulation) -> None:
    gpus.register_status = [2]
    with pytest.raises(SubspecError, match="pinning .* failed"), pinned(1 << 20):
        pass
    with pinned(1 << 20) as host:
        assert gpus.is_pinned(host)
    assert not gpus.registered


def test_memory_is_unpinned_also_after_an_error_of_the_gpu(
    gpus: Simulation, demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.open(planned(demo))

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.close()
    assert not gpus.registered
    gpus.races.clear()  # nothing has waited for the copies


def test_a_gpu_that_is_too_old_is_refused_with_a_sentence(demo: Demo) -> None:
    with simulated(capability=(7, 5), gpu_name="An old GPU"):
        for opened in (lambda: Engine.open(planned(demo)), lambda: pick_device(None)):
            with pytest.raises(SubspecError, match="capability 7.5, expected 8.0") as caught:
                opened()
            assert caught.value.exit_code == Exit.WRONG_MACHINE
        assert pick_device("cpu") == "cpu"


# Answering


def test_an_answer_that_is_given_up_or_interrupted_changes_no_later_one(
    gpus: Simulation, demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    products, real = list[str](), ExactWeights._product

    def fails_once(self: ExactWeights, *args: Any) -> Any:
        products.append(args[1])
        if len(products) == 9:
            raise KeyboardInterrupt
        return real(self, *args)

    with Engine.open(planned(demo, resident_share=0.2), OpenOptions("substitute")) as engine:
        expected = answer(engine, PROMPT, NUM_TOKENS)
        with engine.new_sequence() as sequence:
            begun = sequence.generate(PROMPT, GenerationParams(NUM_TOKENS))
            next(begun)
            begun.close()
        assert answer(engine, PROMPT, NUM_TOKENS) == expected
        monkeypatch.setattr(ExactWeights, "_product", fails_once)
        with pytest.raises(KeyboardInterrupt):
            answer(engine, PROMPT, NUM_TOKENS)
        assert answer(engine, PROMPT, NUM_TOKENS) == expected


# A second GPU


def test_levels_are_captured_on_each_of_two_gpus(gpus: Simulation, demo: Demo) -> None:
    said = []
    for device in ("cuda:1", "cuda:0"):
        chosen = planned(demo)
        with Engine.open(chosen, OpenOptions("substitute", device=device)) as engine:
            said.append(answer(engine, PROMPT, 12))
            assert engine.missing_graphs_reason is None
            [graphs] = captured_levels(engine).values()
            assert {graph.graph.stream.device for graph in graphs} == {torch.device(device)}
        torch.cuda.set_device(0)
    assert said[0] == said[1]


@pytest.mark.parametrize("encoding", ["raw", "residual"])
def test_engines_on_two_gpus_decode_in_turns_in_one_thread(
    gpus: Simulation, demo: Demo, encoding: Encoding
) -> None:
    """Triton launches on the thread's GPU, which the other engine's step has set."""
    said = []
    with ExitStack() as stack:
        sequences = []
        for device in ("cuda:0", "cuda:1"):
            options = OpenOptions("substitute", device=device)
            chosen = replan(demo(encoding), **{**USUAL, "depth": 2})  # type: ignore[arg-type]
            engine = stack.enter_context(Engine.open(chosen, options))
            sequences.append((engine, stack.enter_context(engine.new_sequence())))
        for _, sequence in sequences:
            sequence.begin(PROMPT, GenerationParams(NUM_TOKENS))
        while [engine for engine, _ in sequences if engine.step()]:
            pass
        said = [sequence.take_new_tokens() for _, sequence in sequences]
    assert said[0] == said[1] and len(said[0]) == NUM_TOKENS


def test_an_engine_on_the_second_gpu_may_be_stepped_by_another_thread(
    gpus: Simulation, demo: Demo
) -> None:
    """As the server does, whose thread begins on the first GPU."""
    said = []
    chosen = replan(demo("residual"), **{**USUAL, "depth": 2})  # type: ignore[arg-type]
    with Engine.open(chosen, OpenOptions("substitute", device="cuda:1")) as engine:
        thread = Thread(target=lambda: said.append(answer(engine, PROMPT, NUM_TOKENS)))
        thread.start()
        thread.join()
    assert len(said[0]) == NUM_TOKENS


def test_torchs_own_capture_stream_captures_nothing_on_another_gpu(gpus: Simulation) -> None:
    """Which is why the draft's graphs have streams of their own."""
    Capture.default_capture_stream = None
    for index in (0, 1):
        torch.cuda.set_device(index)
        x, graph = torch.ones(4, device="cuda"), torch.cuda.CUDAGraph()
        if index == 0:
            with torch.cuda.graph(graph):
                x.add_(1)
            continue
        with pytest.raises(CaptureError, match="the graph stays empty"), torch.cuda.graph(graph):
            x.add_(1)
