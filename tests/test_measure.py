"""A profile is measured for any model that we run, in bounded memory, and nothing is left of it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_artifact, make_plan, random_checkpoint
from toys import ACCEPTANCE, make_spec
from transformers import Qwen2Config

from subspec.artifacts.model import ModelSpec, Source
from subspec.artifacts.plan import Rate, Tree
from subspec.artifacts.profile import Profile
from subspec.artifacts.store import Artifact
from subspec.planner import machine
from subspec.planner import measure as module
from subspec.planner.checkpoint import read_spec
from subspec.planner.costs import model_bytes
from subspec.planner.hub import DEMO
from subspec.planner.measure import PADDED_WIDTHS, measure, measure_acceptance, measure_link
from subspec.planner.profiles import first_fault
from subspec.planner.search import Wishes, search
from subspec.planner.storage import usual_storages

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two that wait for each other take minutes on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample of everything: for what does not depend on the numbers."""
    monkeypatch.setattr(machine, "FEWEST_SAMPLES", 1)
    monkeypatch.setattr(machine, "SECONDS_PER_ACTION", 0.0)
    monkeypatch.setattr(machine, "STREAM_SECONDS", 0.0)
    monkeypatch.setattr(module, "LINK_TEST_BYTES", (4 << 20, 4 << 20))
    monkeypatch.setattr(module, "PLACE_SECONDS", 0.0)


def measured(spec: ModelSpec, folder: Path, context: int = 256) -> Profile:
    return measure(spec, "cpu", folder, context, lambda stage, share: None)


def test_the_profile_of_the_demo_makes_sense(tmp_path: Path) -> None:
    spec = read_spec(DEMO, Source("demo"))
    stages = []
    profile = measure(spec, "cpu", tmp_path, 256, lambda stage, share: stages.append(stage))
    assert first_fault(profile) == ""
    assert profile.device == "cpu" and "torch" in profile.machine
    assert profile.num_threads == 1 and profile.free_bytes > 1 << 28
    for timings in (profile.exact_layer, profile.draft_layer, profile.exact_head):
        seconds = [timing.seconds for timing in timings]
        assert seconds == sorted(seconds)
        assert seconds[-1] < 1, "a layer of 0.6 million weights"
    assert profile.plain_layer_seconds <= profile.exact_layer[0].seconds
    assert profile.prefill_token_seconds < profile.plain_layer_seconds
    assert {8, 16, 32, 64} <= set(profile.position_free_widths) <= set(PADDED_WIDTHS)
    # The blocks of a plan for this model: from its largest part to a whole layer, as residuals and
    # raw.
    blocks = {rate.block_bytes for rate in profile.link}
    assert blocks >= {360448, 720896, 737280, 1474560}
    assert min(blocks) == usual_storages(spec)[0].largest_part < 360448 / 2
    assert 1e6 < profile.decode_rate < 1e11
    assert stages[0] == "measuring the link" and stages[-1] == "measured"
    assert list(tmp_path.iterdir()) == []


KINDS: dict[str, dict[str, Any]] = {
    "untied, f32": {"dtype": "float32"},
    "tied, f16": {"dtype": "float16", "tied_head": True},
    "one layer, norms in the attention": {"num_layers": 1, "qk_norm": True, "qkv_bias": False},
    "biases everywhere": {"output_bias": True, "mlp_bias": True},
    "windows": {"sliding_window": 24, "windowed_layers": (1, 3, 5)},
    "a window on the first layer alone, seven heads to one": {
        "sliding_window": 24, "windowed_layers": (0,), "num_heads": 7, "num_kv_heads": 1,
    },
    "no shape that 4 bits take": {
        "hidden_size": 72, "intermediate_size": 100, "head_size": 18, "vocab_size": 2001,
    },
    "a head alone without a substitute, f32": {"vocab_size": 2001, "dtype": "float32"},
    "a tiny vocabulary": {"vocab_size": 16},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("hasty")
def test_every_kind_of_model_can_be_measured_and_planned(kind: str, tmp_path: Path) -> None:
    spec = make_spec(**{"hidden_size": 64, "intermediate_size": 128, "head_size": 32} | KINDS[kind])
    profile = measured(spec, tmp_path)
    assert first_fault(profile) == ""
    plan = search(spec, profile, 20 * model_bytes(spec), Wishes(), ACCEPTANCE)
    assert plan.predicted[plan.method].tokens_per_second > 0


@pytest.mark.usefixtures("hasty")
def test_a_long_context_takes_a_cache_half_full_and_more_time(tmp_path: Path) -> None:
    spec = make_spec(num_layers=1)
    short, long = (measured(spec, tmp_path, context) for context in (16, 4096))
    assert long.exact_layer[-1].seconds > 2 * short.exact_layer[-1].seconds


LARGE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from toys import make_spec
from subspec.planner import machine, measure
machine.FEWEST_SAMPLES, machine.SECONDS_PER_ACTION, machine.STREAM_SECONDS = 1, 0.0, 0.0
spec = make_spec(hidden_size=5120, intermediate_size=27648, num_layers=64, num_heads=40,
                 num_kv_heads=8, head_size=128, vocab_size=152064)
measure.measure(spec, "cpu", Path(sys.argv[2]), 4096, lambda *_: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_a_model_of_32_billion_weights_is_measured_in_little_memory(tmp_path: Path) -> None:
    words = [sys.executable, "-c", LARGE, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2.5e9


@pytest.mark.usefixtures("hasty")
def test_the_link_is_timed_on_the_disk_of_the_artifact_by_a_file_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(path: Path, num_bytes: int, block_bytes: int) -> float:
        assert os.stat(path).st_size == num_bytes == 4 << 20
        assert os.stat(path).st_dev == os.stat(tmp_path).st_dev
        assert list(tmp_path.iterdir()) == []
        seen.append(block_bytes)
        return 1e9

    monkeypatch.setattr(module, "disk_rate", look)
    rates = measure_link(make_spec(), CPU, tmp_path)
    assert [rate.block_bytes for rate in rates] == seen == sorted(seen)


# Acceptance


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.set_num_threads(1)
    return build_artifact(DEMO, tmp_path_factory.mktemp("demo") / "artifact", resident_share=1.0)


def rate(artifact: Artifact, width: int, depth: int, stop_below: float = 0.0) -> Rate:
    plan = make_plan(artifact.spec, width=width, depth=depth, resident_share=1.0)
    plan = replace(plan, num_threads=1, tree=replace(plan.tree, stop_below=stop_below))
    return measure_acceptance(artifact, plan, lambda stage, share: None)


def test_the_draft_of_the_demo_is_mostly_accepted_and_more_so_if_it_is_wider(
    demo: Artifact,
) -> None:
    chain, tree = rate(demo, 1, 5), rate(demo, 3, 5)
    assert (chain.width, tree.width) == (1, 3)
    assert 0.75 < chain.probability < tree.probability < 1
    assert min(chain.num_samples, tree.num_samples) > 80


def test_a_draft_that_would_stop_early_is_measured_to_its_full_depth(demo: Artifact) -> None:
    assert rate(demo, 1, 5, stop_below=0.9) == rate(demo, 1, 5)


def test_a_slow_machine_is_asked_for_one_round_only(
    demo: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CALIBRATION_SECONDS", 0.0)
    assert 1 <= rate(demo, 1, 5).num_samples <= 5


def test_the_draft_of_random_weights_is_seldom_accepted(tmp_path: Path) -> None:
    config = Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=2048, tie_word_embeddings=False, eos_token_id=2,
    )  # fmt: skip
    source = random_checkpoint(tmp_path / "checkpoint", config)
    artifact = build_artifact(source, tmp_path / "artifact", resident_share=1.0)
    assert artifact.plan.tree == Tree(1, 7)
    assert 0 < rate(artifact, 1, 5).probability < 0.9
