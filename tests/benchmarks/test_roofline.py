"""benchmarks/roofline.py: terms beside their floors, by hand."""

from types import ModuleType
from typing import Any

import pytest
from builders import build_artifact
from scripts import benchmark

from subspec.artifacts.format.store import Artifact
from subspec.planner.model.hub import DEMO
from subspec.runtime.clock import Span


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return benchmark("roofline")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("roofline") / "artifact"
    return build_artifact(DEMO, folder, encoding="residual", width=2, depth=3)


def by_hand(script: ModuleType, artifact: Artifact, **changes: Any) -> Any:
    """Two rounds of 1 s draft and 4 s verification, 3 levels each."""
    lanes = {
        "draft": [(0.0, 1.0), (5.0, 6.0)],
        "verify": [(1.0, 5.0), (6.0, 10.0)],
        "decode": [(2.0, 3.0), (7.0, 8.0)],
        "product": [(3.0, 4.5), (8.0, 9.5)],
        "copy": [(-1.0, 3.0), (5.5, 9.0), (9.5, 11.0)],
    }
    spans = [
        Span(lane, "", start, end - start, {})
        for lane, ranges in lanes.items()
        for start, end in ranges
    ]
    traced = script.Traced(spans, 2, 6, changes.pop("wait_seconds", 1.0), 300)
    ceilings = script.Ceilings(
        memory_bytes=1e6, matmul_flops=1e8, draft_levels=4.0, link_bytes=50.0, decoded_weights=2e6
    )
    assert not changes
    return script.roofline(artifact, traced, ceilings)


def test_every_term_stands_beside_its_floors(script: ModuleType, artifact: Artifact) -> None:
    found = by_hand(script, artifact)
    every = artifact.spec.linears
    weights = sum(linear.num_weights for linear in every)
    coded = [p.part.num_weights for p in artifact.stored_parts() if p.encoding == "residual"]
    assert (found.draft_seconds, found.verify_seconds, found.wait_seconds) == (1.0, 4.0, 0.5)
    assert found.link_busy_in_verify == pytest.approx((2.0 + 3.0 + 0.5) / 8)
    assert {name: term.seconds for name, term in found.terms.items()} == {
        "draft level": pytest.approx(1 / 3),
        "copy": pytest.approx((3.0 + 3.5 + 0.5) / 2),  # as much as fell into the two rounds
        "decode": 1.0,
        "products": 1.5,
        "rest of verify": 1.0,
    }
    assert {name: term.floors for name, term in found.terms.items()} == {
        "draft level": {
            "memory": pytest.approx(weights * 4.5 / 8 / 1e6),
            "kernel": 0.25,
        },
        "copy": {"link": 3.0},
        "decode": {"decoder": pytest.approx(sum(coded) / 2e6)},
        "products": {
            "matmul": pytest.approx(2 * artifact.plan.verify_width * weights / 1e8),
            "memory": pytest.approx(2 * weights / 1e6),
        },
        "rest of verify": {},
    }


def test_only_what_runs_at_the_same_time_overlaps(script: ModuleType) -> None:
    def spans(*ranges: tuple[float, float]) -> list[Span]:
        return [Span("copy", "", start, end - start, {}) for start, end in ranges]

    copies = spans((0.0, 2.0), (3.0, 5.0), (9.0, 10.0))
    assert script.overlap_seconds(copies, spans((1.0, 4.0), (4.5, 5.5))) == 1.0 + 1.0 + 0.5
    assert script.overlap_seconds(copies, []) == 0.0


def test_the_busier_of_link_and_compute_is_the_bound(
    script: ModuleType, artifact: Artifact
) -> None:
    assert script.verdict(by_hand(script, artifact)) == (
        "verify: bound by compute (decode 1.000 s + products 1.500 s of 4.000 s), link 69% busy"
    )
    assert script.verdict(by_hand(script, artifact, wait_seconds=4.0)) == (
        "verify: bound by the link (69% busy), compute waits 2.000 s of 4.000 s"
    )
