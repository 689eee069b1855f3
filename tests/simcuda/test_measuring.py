"""The planner's measuring of a GPU, on the simulated one: nothing races, nothing stays behind."""

from pathlib import Path

import pytest
import torch
from simcuda.device import simulated

from subspec.artifacts.model import Source
from subspec.planner.machine import measure, microbench, residual_rate
from subspec.planner.machine.timing import Effort
from subspec.planner.model.checkpoint import read_spec
from subspec.planner.model.hub import DEMO

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
    monkeypatch.setattr(microbench, "DRAFT_WIDTHS", (1, 4))
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
    assert profile.int4_kernel == "aten" and profile.residual_weights_per_second > 0
    assert profile.pinnable_bytes > 0
