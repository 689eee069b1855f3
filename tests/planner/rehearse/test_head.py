"""The draft head's rounds, timed as they are."""

from pathlib import Path

import torch
from builders import build_artifact
from heads import mtp_checkpoint

from subspec.planner.rehearse.calibration import Sample
from subspec.planner.rehearse.rehearsal import HEAD_TREES, Setting, time_head

SAMPLES = [Sample("code", "def read(path):\n    ")]


def test_the_fastest_tree_of_a_head_is_known_with_what_it_gave(tmp_path: Path) -> None:
    source = mtp_checkpoint(tmp_path, torch.bfloat16, foreseen=True)
    artifact = build_artifact(
        source, tmp_path / "artifact", width=2, depth=4, drafts_with_head=True
    )
    found = time_head(artifact, artifact.plan, SAMPLES, Setting(), lambda *_: None, 0.5)
    assert found is not None and found.tree in HEAD_TREES and found.tree.width <= 2
    assert found.tokens_per_second > 0 and 1 <= found.tokens_per_round <= 5


def test_a_plan_without_memory_for_a_head_has_none(tmp_path: Path) -> None:
    source = mtp_checkpoint(tmp_path, torch.bfloat16)
    artifact = build_artifact(source, tmp_path / "artifact", width=2, depth=4)
    assert time_head(artifact, artifact.plan, SAMPLES, Setting(), lambda *_: None, 0.5) is None
