"""What ran when: spans are recorded only if asked for, and are what Chrome's trace viewers read."""

import json
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from builders import build_artifact
from running import answer

from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import make_blocks
from subspec.planner.model.hub import DEMO
from subspec.runtime.clock import LANES, Clock, Span, chrome_trace
from subspec.runtime.engine import Engine, OpenOptions

CPU = torch.device("cpu")
PROMPT = list(range(10, 50))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Residuals, half of which stream."""
    folder = tmp_path_factory.mktemp("clock") / "artifact"
    return build_artifact(DEMO, folder, encoding="residual", width=2, depth=3)


def test_nothing_is_recorded_unless_it_is_asked_for() -> None:
    clock = Clock(CPU)
    with clock.phase("verify"):
        clock.record("decode", "a part", 0.0, {})
    assert clock.spans is None
    assert clock.seconds["verify"] > 0.0


def test_a_phase_is_a_span_too() -> None:
    clock = Clock(CPU, spans=[])
    for _ in range(2):
        with clock.phase("draft"):
            sum(range(10_000))
    assert clock.spans is not None
    assert [(span.lane, span.name) for span in clock.spans] == [("draft", "draft")] * 2
    total = sum(span.seconds for span in clock.spans)
    assert total >= clock.seconds["draft"] > 0.0


def test_phases_on_a_gpu_are_ranges_of_a_profiler_where_torch_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marked = list[str]()

    def mark(name: str) -> AbstractContextManager[None]:
        marked.append(name)
        return nullcontext()

    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range", mark)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    gpu = torch.device("cuda", 0)
    for version, spans, expected in (("13.0", [], ["draft"]), ("13.0", None, []), (None, [], [])):
        monkeypatch.setattr(torch.version, "cuda", version)
        marked.clear()
        with Clock(gpu, spans).phase("draft"):
            pass
        assert marked == expected


def test_a_trace_is_what_perfetto_reads() -> None:
    spans = [
        Span("copy", "slot 1", 12.000001, 0.002, {"offset": 4096, "bytes": 1000}),
        Span("verify", "verify", 12.0, 0.0025, {}),
    ]
    assert json.dumps(chrome_trace(spans, {"artifact": "a"}), indent=1) == TRACE


TRACE = """{
 "traceEvents": [
  {
   "name": "thread_name",
   "ph": "M",
   "pid": 1,
   "tid": 3,
   "args": {
    "name": "verify"
   }
  },
  {
   "name": "thread_sort_index",
   "ph": "M",
   "pid": 1,
   "tid": 3,
   "args": {
    "sort_index": 3
   }
  },
  {
   "name": "thread_name",
   "ph": "M",
   "pid": 1,
   "tid": 8,
   "args": {
    "name": "copy"
   }
  },
  {
   "name": "thread_sort_index",
   "ph": "M",
   "pid": 1,
   "tid": 8,
   "args": {
    "sort_index": 8
   }
  },
  {
   "name": "verify",
   "ph": "X",
   "pid": 1,
   "tid": 3,
   "ts": 0.0,
   "dur": 2500.0,
   "args": {}
  },
  {
   "name": "slot 1",
   "ph": "X",
   "pid": 1,
   "tid": 8,
   "ts": 1.0,
   "dur": 2000.0,
   "args": {
    "offset": 4096,
    "bytes": 1000,
    "bytes_per_second": 500000
   }
  }
 ],
 "displayTimeUnit": "ms",
 "otherData": {
  "artifact": "a"
 }
}"""


def test_a_trace_of_nothing_is_a_trace() -> None:
    assert chrome_trace([], {})["traceEvents"] == []


def inside(span: Span, whole: Span) -> bool:
    starts = whole.start_seconds <= span.start_seconds + 1e-9
    return starts and span.end_seconds <= whole.end_seconds + 1e-9


def lanes_of(spans: list[Span]) -> dict[str, list[Span]]:
    found: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: span.start_seconds):
        found.setdefault(span.lane, []).append(span)
    return found


@pytest.fixture(scope="module")
def traced(artifact: Artifact) -> dict[str, list[Span]]:
    """All lanes of one prompt and its answer."""
    with Engine.open(artifact, OpenOptions(trace=True)) as engine:
        answer(engine, PROMPT, 12)
        spans = engine.model.clock.spans
        assert spans is not None
    return lanes_of(spans)  # closed: the reader has ended


def test_an_engine_records_nothing_by_default(artifact: Artifact) -> None:
    with Engine.open(artifact) as engine:
        tokens = answer(engine, PROMPT, 4)
        assert engine.model.clock.spans is None
    with Engine.open(artifact, OpenOptions(trace=True)) as engine:
        assert answer(engine, PROMPT, 4) == tokens


def test_every_lane_has_spans_that_follow_each_other(traced: dict[str, list[Span]]) -> None:
    assert set(traced) == set(LANES)
    for lane, spans in traced.items():
        for before, after in pairwise(spans):
            assert before.end_seconds <= after.start_seconds + 1e-9, f"{lane}: {before}, {after}"


def test_every_block_that_streams_is_a_copy(
    artifact: Artifact, traced: dict[str, list[Span]]
) -> None:
    placement = artifact.plan.placement("substitute")
    blocks = make_blocks(artifact.stored_parts(), placement)
    where = artifact.part_entries()
    expected = [
        {"offset": where[block.parts[0].name].offset, "bytes": block.num_bytes} for block in blocks
    ]
    num_passes = len(traced["prefill"]) + len(traced["verify"])
    waited = num_passes * len(blocks)
    assert len(traced["wait"]) == waited
    # What the next pass takes first is on its way already; closing need not wait for it.
    copies = [span.detail for span in traced["copy"]]
    assert waited <= len(copies) <= waited + placement.num_slots
    assert copies == (expected * (num_passes + 1))[: len(copies)]
    assert len({span.name for span in traced["copy"]}) == placement.num_slots


def test_every_residual_is_decoded_once_a_pass_inside_its_layer(
    artifact: Artifact, traced: dict[str, list[Span]]
) -> None:
    coded = [p for p in artifact.stored_parts() if p.encoding == "residual"]
    num_passes = len(traced["prefill"]) + len(traced["verify"])
    names = [span.name for span in traced["decode"]]
    assert names == [part.name for part in coded] * num_passes
    assert [s.detail["weights"] for s in traced["decode"][: len(coded)]] == [
        part.part.num_weights for part in coded
    ]
    layers = [f"layer {n}" for n in range(artifact.spec.num_layers)] + ["head"]
    assert [span.name for span in traced["layer"]] == layers * num_passes
    for lane in ("decode", "product", "wait"):
        for span in traced[lane]:
            assert any(inside(span, layer) for layer in traced["layer"]), f"{lane}: {span}"
    together = sum(span.seconds for lane in ("decode", "product", "wait") for span in traced[lane])
    assert together <= sum(span.seconds for span in traced["layer"])


def test_plain_decoding_is_traced_too(artifact: Artifact) -> None:
    with Engine.open(artifact, OpenOptions("plain", padded=False, trace=True)) as engine:
        answer(engine, PROMPT, 3)
        spans = engine.model.clock.spans
        assert spans is not None
    lanes = lanes_of(spans)
    assert "draft" not in lanes
    assert [len(lanes[lane]) for lane in ("prefill", "verify")] == [1, 2]
