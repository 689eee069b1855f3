"""The planner's measuring of a GPU, on the simulated one: nothing races, nothing stays behind, and
torch may choose the kernels that the engine runs with."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from builders import replan
from simcuda.answering import USUAL
from simcuda.device import simulated

from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import Encoding, Source
from subspec.planner.machine import measure, microbench, residual_rate
from subspec.planner.machine.profiles import shapes_of
from subspec.planner.machine.timing import Effort
from subspec.planner.model.checkpoint import read_spec
from subspec.planner.model.hub import DEMO
from subspec.runtime.engine import Engine

SHORT = Effort(
    passes=1,
    fewest_samples=1,
    most_samples=1,
    action_seconds=0.0,
    stream_seconds=0.02,
    place_seconds=0.0,
    least_link_bytes=4 << 20,
    most_link_bytes=4 << 20,
)


@pytest.mark.slow
def test_a_gpu_is_measured_without_a_race_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(microbench, "EXACT_WIDTHS", (8, 24))
    monkeypatch.setattr(microbench, "CUDA_WIDTHS", ())
    monkeypatch.setattr(microbench, "DRAFT_WIDTHS", (1,))
    monkeypatch.setattr(microbench, "CUDA_DRAFT_WIDTHS", (4,))  # measured on a GPU alone
    monkeypatch.setattr(microbench, "FAST_WIDTHS", (1, 8))
    monkeypatch.setattr(microbench, "CUDA_FAST_WIDTHS", (24,))
    monkeypatch.setattr(microbench, "PADDED_WIDTHS", (8, 24))
    monkeypatch.setattr(residual_rate, "DECODED_BYTES", 1 << 20)
    monkeypatch.setattr(residual_rate, "CALLS_ON_CUDA", 2)
    monkeypatch.setattr(measure, "pinnable_bytes", lambda device, wanted: wanted)  # by a child
    with simulated() as gpus:
        spec = read_spec(DEMO, Source("demo"))
        profile = measure.measure(spec, "cuda", tmp_path, lambda stage, share: None, SHORT)
        assert not gpus.races and not gpus.registered
        left = torch.cuda.memory_allocated()
        assert left == sum(block.size for block in gpus.workspaces.values())
    assert profile.device == "cuda" and "Simulated GPU" in profile.machine
    assert profile.overhead_bytes == gpus.context_bytes
    assert profile.batch_invariant_widths == ((8, 24),)
    assert [timing.width for timing in profile.draft_layer] == [1, 4]
    assert [timing.width for timing in profile.fast_layer] == [1, 8, 24]
    assert profile.shapes == shapes_of(spec) and profile.other_kernels == ()
    assert profile.int4_kernel == "aten" and profile.residual_weights_per_second > 0
    assert profile.pinnable_bytes > 0


REDUCED = "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"


def allowed() -> list[bool]:
    """Sums in 16 bits, and cuDNN's attention."""
    found: list[bool] = [getattr(torch.backends.cuda.matmul, name) for name in REDUCED]
    return [*found, torch.backends.cuda.cudnn_sdp_enabled()]


@pytest.fixture
def torchs_own_choice() -> Iterator[Callable[[], None]]:
    def restore() -> None:
        for name in REDUCED:
            setattr(torch.backends.cuda.matmul, name, True)
        torch.backends.cuda.enable_cudnn_sdp(True)

    restore()
    yield restore
    restore()


def test_plans_are_measured_and_run_with_sums_in_f32_and_without_cudnns_attention(
    torchs_own_choice: Callable[[], None],
    tmp_path: Path,
    demo: Callable[[Encoding], Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nothing_is_timed(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "open_slow_memory", nothing_is_timed)
    with simulated():
        assert allowed() == [True] * 3
        with pytest.raises(KeyboardInterrupt):
            measure.measure(read_spec(DEMO, Source("demo")), "cuda", tmp_path, print, SHORT)
        assert allowed() == [False] * 3
        torchs_own_choice()
        with Engine.open(replan(demo("raw"), **USUAL)):  # type: ignore[arg-type]
            assert allowed() == [False] * 3
