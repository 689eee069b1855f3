"""A profile is measured for any model that we run, in bounded memory, and nothing is left of it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from brief import HASTY
from families import FAMILIES
from toys import ACCEPTANCE, make_spec

from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.common.sizes import parse_size
from subspec.artifacts.footprint import model_bytes
from subspec.artifacts.format.checks import check_plan
from subspec.artifacts.format.codec import dump_json
from subspec.artifacts.model import ModelSpec, Source
from subspec.artifacts.plan import Constraints
from subspec.artifacts.profile import MIN_SECONDS, Corrections, Profile
from subspec.planner.machine import measure as measuring
from subspec.planner.machine import residual_rate
from subspec.planner.machine.measure import (
    MAX_BLOCK,
    MIN_SHARE,
    block_sizes,
    digest_bytes_per_second,
    measure,
    measure_link,
    most_pinned,
    open_slow_memory,
    share_kept,
)
from subspec.planner.machine.microbench import PADDED_WIDTHS
from subspec.planner.machine.profiles import read_profile
from subspec.planner.machine.timing import Effort
from subspec.planner.model.checkpoint import read_spec
from subspec.planner.model.config import read_config
from subspec.planner.model.families import FAMILIES as SUPPORTED
from subspec.planner.model.hub import DEMO
from subspec.planner.solve.search import search
from subspec.planner.solve.storage import raw_storage, usual_storages

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two that wait for each other take minutes on a busy machine."""
    torch.set_num_threads(1)


def measured(spec: ModelSpec, folder: Path) -> Profile:
    return measure(spec, "cpu", folder, lambda stage, share: None, HASTY)


def test_a_quota_of_cpu_time_bounds_the_threads_that_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "usable_cpus", lambda: 1)
    torch.set_num_threads(2)
    try:
        profile = measured(make_spec(), tmp_path)
        assert profile.num_threads == 1
    finally:
        torch.set_num_threads(1)


def written(profile: Profile, folder: Path) -> Path:
    path = folder / "profile.json"
    path.write_text(dump_json(profile))
    return path


def test_the_profile_of_the_demo_makes_sense(tmp_path: Path) -> None:
    spec = read_spec(DEMO, Source("demo"))
    stages = []
    profile = measure(
        spec, "cpu", tmp_path, lambda stage, share: stages.append(stage), Effort(passes=1)
    )
    assert read_profile(written(profile, tmp_path)) == profile
    assert profile.device == "cpu" and "torch" in profile.machine
    assert profile.num_threads == 1 and profile.free_bytes > 1 << 28
    for timings in (profile.exact_layer, profile.draft_layer, profile.exact_head):
        seconds = [timing.seconds for timing in timings]
        assert seconds[0] < seconds[-1] < 1, "a layer of 0.6 million weights"
    fast = profile.fast_layer
    assert fast[0].seconds < profile.exact_layer[-1].seconds
    assert fast[-1].seconds / fast[-1].width < fast[0].seconds, "a token of a prompt is cheaper"
    for timings in (profile.exact_attention, profile.fast_attention, profile.draft_attention):
        assert 100 * MIN_SECONDS < timings[-1].seconds < 0.1, "1024 tokens more take some time"
    assert all(
        MIN_SHARE <= kept <= 1 for kept in (profile.contended_link, profile.contended_compute)
    )
    assert 1e7 < profile.digest_bytes_per_second < 1e12
    assert (profile.pinnable_bytes, profile.corrections) == (0, Corrections())
    every = [width for alike in profile.batch_invariant_widths for width in alike]
    assert {8, 16, 32, 64} <= set(every) <= set(PADDED_WIDTHS)
    # The blocks of a plan for this model, as residuals and raw: from its largest part, the head, to
    # two of them, a whole layer between.
    blocks = {rate.block_bytes for rate in profile.link}
    assert blocks >= {1048576, 1474560, 2097152}
    assert min(blocks) == usual_storages(spec)[0].largest_part < 1048576 / 2
    assert 1e6 < profile.residual_weights_per_second < 1e11
    assert 0 <= profile.background_cpu_share < 1, "this process was busy too"
    assert stages[0] == "measuring" and stages[-1] == "measured"
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


KINDS: dict[str, dict[str, Any]] = {
    "untied, f32": {"dtype": "float32"},
    "tied, f16": {"dtype": "float16", "tie_word_embeddings": True},
    "one layer, norms in the attention": {"num_layers": 1, "qk_norm": True, "qkv_bias": False},
    "biases everywhere": {"output_bias": True, "mlp_bias": True},
    "windows": {"window": 24, "windowed_layers": (1, 3, 5)},
    "a window on the first layer alone, seven heads to one": {
        "window": 24, "windowed_layers": (0,), "num_heads": 7, "num_kv_heads": 1,
    },
    "no shape that 4 bits take": {
        "hidden_size": 72, "intermediate_size": 100, "head_size": 18, "vocab_size": 2001,
    },
    "a head alone without a substitute, f32": {"vocab_size": 2001, "dtype": "float32"},
    "a tiny vocabulary": {"vocab_size": 16},
}  # fmt: skip


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As small as the models: hundreds of copies of their matrices would be made."""
    monkeypatch.setattr(residual_rate, "DECODED_BYTES", 1 << 20)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_can_be_measured_and_planned(
    kind: str, tmp_path: Path, small_caches: None
) -> None:
    spec = make_spec(**{"hidden_size": 64, "intermediate_size": 128, "head_size": 32} | KINDS[kind])
    profile = measured(spec, tmp_path)
    assert read_profile(written(profile, tmp_path)) == profile
    plan = search(spec, profile, 20 * model_bytes(spec), Constraints(), ACCEPTANCE)
    assert plan.predicted[plan.method].tokens_per_second > 0


@pytest.mark.parametrize("name", ["smollm3", "olmo3, yarn on full layers", "qwen3_5_text"])
def test_a_model_whose_layers_differ_can_be_measured_and_planned(
    name: str, tmp_path: Path, small_caches: None
) -> None:
    """Layers with and without positions; with windows and ropes of their own; with states."""
    raw = FAMILIES[name]
    architecture = SUPPORTED[raw["model_type"]].architecture
    (tmp_path / "config.json").write_text(json.dumps({**raw, "architectures": [architecture]}))
    spec = read_config(tmp_path, Source("test/model"))
    assert len(set(spec.layers)) > 1
    profile = measured(spec, tmp_path)
    drafts = Constraints(context=64, method="substitute", encoding="raw")
    with pytest.raises(SubspecError) as caught:
        search(spec, profile, 1, drafts, ACCEPTANCE)
    smallest = parse_size(caught.value.hint.removeprefix("--vram "))
    for budget in (smallest, 20 * model_bytes(spec)):
        plan = search(spec, profile, budget, drafts, ACCEPTANCE)
        check_plan(spec, list(raw_storage(spec).parts), plan)
        assert plan.predicted["substitute"].tokens_per_second > 0
        assert (plan.predicted["substitute"].streamed_bytes > 0) == (budget == smallest)


LARGE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from toys import make_spec
from subspec.planner.machine import measure
from subspec.planner.machine.timing import Effort
spec = make_spec(hidden_size=5120, intermediate_size=27648, num_layers=64, num_heads=40,
                 num_kv_heads=8, head_size=128, vocab_size=152064)
hasty = Effort(fewest_samples=1, action_seconds=0.0, stream_seconds=0.0)
measure.measure(spec, "cpu", Path(sys.argv[2]), lambda *_: None, hasty)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_a_model_of_32_billion_weights_is_measured_in_little_memory(tmp_path: Path) -> None:
    words = [sys.executable, "-c", LARGE, str(Path(__file__).parents[2]), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2.5e9


def test_the_link_is_timed_on_the_disk_of_the_artifact_by_a_file_without_a_name(
    tmp_path: Path,
) -> None:
    with open_slow_memory(make_spec(), CPU, tmp_path, HASTY) as slow_memory:
        names = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        files = [path for path in names if path.exists() and is_inside(path, tmp_path)]
        assert [path.stat().st_size for path in files] == [4 << 20]
        assert list(tmp_path.iterdir()) == []
        link = slow_memory.open_link(1 << 20)
        link.begin(1, 3 << 20, 1 << 20)
        assert len(set(link.wait(1).tolist())) == 256  # type: ignore[attr-defined]
        link.close()
        rate = measure_link(slow_memory, 1 << 20, HASTY)
        assert rate.block_bytes == 1 << 20 and rate.bytes_per_second > 1e6
    assert list(tmp_path.iterdir()) == []


def test_the_link_is_timed_over_as_much_as_the_model_within_limits(tmp_path: Path) -> None:
    effort = replace(HASTY, least_link_bytes=1 << 20, most_link_bytes=30 << 20)
    sizes = []
    for num_layers in (1, 8, 64):
        spec = make_spec(num_layers=num_layers, vocab_size=16)
        with open_slow_memory(spec, CPU, tmp_path, effort) as slow_memory:
            sizes.append(slow_memory.cursor.num_bytes)
            for _ in range(3):
                assert measure_link(slow_memory, 1 << 20, effort).block_bytes == 1 << 20
        assert sizes[-1] == min(max(raw_storage(spec).num_bytes, 1 << 20), 30 << 20) >> 20 << 20
    assert sizes == sorted(set(sizes)) and sizes[-1] == 30 << 20


def is_inside(link: Path, folder: Path) -> bool:
    return os.readlink(link).startswith(f"{folder}/")


def test_the_link_is_timed_with_blocks_that_a_plan_may_stream() -> None:
    large = make_spec(hidden_size=8192, intermediate_size=32768, num_heads=128, vocab_size=32768)
    for spec in (make_spec(), make_spec(num_layers=1, vocab_size=64), large):
        sizes = block_sizes(spec)
        assert sizes == sorted(set(sizes))
        assert sizes[0] <= usual_storages(spec)[0].largest_part and sizes[-1] <= MAX_BLOCK
    assert block_sizes(large)[-1] == MAX_BLOCK


def test_the_check_of_weights_takes_time() -> None:
    assert 1e7 < digest_bytes_per_second() < 1e12


def test_a_share_that_is_kept_is_no_gain_and_no_standstill() -> None:
    assert [share_kept(loaded, 10.0) for loaded in (5.0, 11.0, 0.0)] == [0.5, 1.0, MIN_SHARE]


def test_as_much_is_tried_to_be_pinned_as_a_plan_takes_at_most() -> None:
    """With the rows of embeddings, a draft model's too: else a tiny budget would be refused."""
    spec, small = make_spec(), make_spec(num_layers=1)
    own = raw_storage(spec).num_bytes + spec.embedding_bytes
    assert most_pinned(spec, None) == own
    assert most_pinned(spec, small) == own + small.embedding_bytes
