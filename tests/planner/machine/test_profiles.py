import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from toys import make_fp8_spec, make_profile, make_spec

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import Source
from subspec.artifacts.profile import Corrections, LinkRate, Timing
from subspec.planner.machine.profiles import (
    check_shapes,
    read_profile,
    shapes_of,
    typical_of,
    under_link,
    with_link,
)


def write(folder: Path, values: Any) -> Path:
    path = folder / "profile.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    corrections = Corrections(draft=1.1, verify=1.2, plain=0.9, prompt=1.3, num_rounds=40)
    for profile in (make_profile(), make_profile(corrections=corrections, pinnable_bytes=1 << 34)):
        assert read_profile(write(tmp_path, asdict(profile))) == profile


def test_what_no_run_taught_yet_may_be_left_out(tmp_path: Path) -> None:
    values = asdict(make_profile())
    del values["corrections"], values["background_cpu_share"]
    found = read_profile(write(tmp_path, values))
    assert (found.corrections, found.background_cpu_share) == (Corrections(), 0.0)


TIMING = {"width": 1, "seconds": 1e-4, "slowest": 1e-4}
OTHER_KERNEL = {
    "int4_kernel": "aten", "draft_layer": [TIMING], "draft_head": [TIMING],
    "residual_weights_per_second": 0.0,
}  # fmt: skip
FAULTS: dict[str, tuple[str, Any]] = {
    "no link": ("link", []),
    "blocks that do not ascend": (
        "link", [{"block_bytes": 2, "bytes_per_second": 1e9}] * 2,
    ),
    "a link that stands still": ("link", [{"block_bytes": 4096, "bytes_per_second": 0.0}]),
    "a link beyond physics": ("link", [{"block_bytes": 4096, "bytes_per_second": 1e300}]),
    "no timings": ("exact_layer", []),
    "widths that do not ascend": ("draft_layer", [TIMING, TIMING]),
    "a width of 0": ("exact_head", [{**TIMING, "width": 0}]),
    "time that runs backwards": ("draft_head", [{**TIMING, "seconds": -1.0}]),
    "a time too short": ("fast_layer", [{**TIMING, "seconds": 1e-300}]),
    "a time too long": ("exact_attention", [{**TIMING, "seconds": 1e300}]),
    "no attention": ("fast_attention", []),
    "attention whose widths do not ascend": ("draft_attention", [TIMING, TIMING]),
    "a link that stops while layers are computed": ("contended_link", 0.0),
    "layers that stop while the link is busy": ("contended_compute", 0.0),
    "layers that are helped by a busy link": ("contended_compute", 1.1),
    "a check beyond physics": ("digest_bytes_per_second", 1e300),
    "decoding that runs backwards": ("residual_weights_per_second", -1.0),
    "a draft that takes no time in reality": ("corrections", {"draft": 0.0}),
    "a prompt a thousand times slower than promised": ("corrections", {"prompt": 1000.0}),
    "fewer than no rounds": ("corrections", {"num_rounds": -1}),
    "rounds over a link that stood still": ("corrections", {"link_bandwidth": 0}),
    "memory less than none": ("free_bytes", -1),
    "pinnable memory less than none": ("pinnable_bytes", -1),
    "a negative overhead": ("overhead_bytes", -1),
    "a negative round": ("round_overhead_seconds", -1.0),
    "no threads": ("num_threads", 0),
    "passes of no rows": ("batch_invariant_widths", [[0, 8]]),
    "widths outside of a group": ("batch_invariant_widths", [8, 16]),
    "a group of no widths": ("batch_invariant_widths", [[8], []]),
    "a group of more widths than a plan has": ("batch_invariant_widths", [list(range(1, 66))]),
    "a group whose widths do not ascend": ("batch_invariant_widths", [[8, 16], [32, 24]]),
    "a group with a width twice": ("batch_invariant_widths", [[8, 8]]),
    "widths of another kernel that do not ascend": (
        "other_kernels", [{**OTHER_KERNEL, "draft_layer": [TIMING, TIMING]}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_measurement_gives_is_refused(fault: str, tmp_path: Path) -> None:
    name, value = FAULTS[fault]
    path = write(tmp_path, {**asdict(make_profile()), name: value})
    with pytest.raises(SubspecError, match=r"profile\.json\.") as caught:
        read_profile(path)
    assert caught.value.exit_code == Exit.CORRUPT


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"link": 1}', '{"device": "tpu"}'])
def test_what_is_not_a_profile_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(SubspecError, match="profile.json") as caught:
        read_profile(write(tmp_path, text))
    assert caught.value.exit_code == Exit.CORRUPT and caught.value.hint


def test_a_profile_is_of_the_shapes_that_were_measured_and_no_others() -> None:
    """Models of one architecture and size differ in nothing that is timed."""
    spec, plain = make_spec(), make_profile()
    tuned = replace(spec, source=Source("org/tuned"), max_positions=8192, eos_token_ids=(7,))
    assert shapes_of(spec) == shapes_of(tuned) != ""
    timed = {"draft_model_layer": plain.draft_layer, "draft_model_shapes": shapes_of(spec)}
    profile = make_profile(shapes=shapes_of(spec), **timed)
    check_shapes(profile, tuned, tuned)
    check_shapes(profile, tuned, None)
    check_shapes(make_profile(), spec, spec)  # it does not say whose it is
    with pytest.raises(SubspecError, match="draft model"):
        check_shapes(profile, tuned, replace(tuned, quantized=False))
    others = (
        make_spec(num_layers=9), make_spec(intermediate_size=1024),
        make_spec(num_heads=2, head_size=128), make_spec(dtype="float16"),
        make_spec(vocab_size=4096), make_fp8_spec(),
    )  # fmt: skip
    for other in others:
        with pytest.raises(SubspecError, match="the profile is of another model: of 8 layers"):
            check_shapes(profile, other, spec)
        with pytest.raises(SubspecError, match="the profile is of another draft model"):
            check_shapes(profile, spec, other)


def test_a_missing_file_and_a_folder_are_a_wrong_argument(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(SubspecError, match="is not a file") as caught:
            read_profile(path)
        assert caught.value.exit_code == Exit.USAGE


def test_what_a_slowed_link_taught_counts_for_plans_at_that_speed() -> None:
    taught = Corrections(1.1, 1.2, 1.3, 1.4, num_rounds=40, link_bandwidth=50_000_000)
    profile = make_profile(corrections=taught)
    assert under_link(profile, 50_000_000) == with_link(profile, 50_000_000)
    for other in (None, 60_000_000):
        corrections = under_link(profile, other).corrections
        assert corrections == Corrections(draft=1.1, num_rounds=40, link_bandwidth=other)
    usual = make_profile(corrections=replace(taught, link_bandwidth=None))
    assert under_link(usual, None) == usual


def test_a_slower_link_changes_only_what_is_faster_than_it() -> None:
    profile = make_profile()
    slow, fast = profile.link
    capped = with_link(profile, 90_000_000)
    assert capped.link == (slow, replace(fast, bytes_per_second=90e6))
    contention = {
        "contended_link": profile.contended_link,
        "contended_compute": profile.contended_compute,
    }
    assert replace(capped, link=profile.link, **contention) == profile
    assert with_link(profile, 10**9) == replace(profile, contended_compute=pytest.approx(0.9))


@pytest.mark.parametrize(
    ("rate", "contended_link", "contended_compute"),
    [
        (100_000_000, 0.8, 0.9),
        (90_000_000, 0.8 / 0.9, 0.9),  # it still gives 80 MB/s beside compute
        (80_000_000, 1.0, 0.9),
        (40_000_000, 1.0, 0.95),  # half of that, and it does half of the harm
        (1, 1.0, 1.0),
    ],
)
def test_a_slower_link_and_layers_hinder_each_other_less(
    rate: int, contended_link: float, contended_compute: float
) -> None:
    """The toy's link has 100 MB/s, 0.8 of it while layers are computed, at 0.9 of their speed."""
    capped = with_link(make_profile(), rate)
    assert (capped.contended_link, capped.contended_compute) == pytest.approx(
        (contended_link, contended_compute)
    )


def test_of_several_profiles_the_middle_of_each_figure_counts_and_the_slowest_time() -> None:
    """A shared machine has fast and slow moments; they do not hit all figures of one pass."""
    one, two, three = (
        make_profile(
            contended_link=share,
            draft_layer=(Timing(1, seconds, 2 * seconds),),
            link=(LinkRate(4096, rate),),
        )
        for share, seconds, rate in ((0.9, 3.0, 1e9), (0.7, 1.0, 3e9), (0.8, 2.0, 2e9))
    )
    found = typical_of([one, two, three])
    passes = [make_profile(background_cpu_share=share) for share in (0.0, 0.9, 0.05)]
    assert typical_of(passes).background_cpu_share == 0.05, "nor do its figures count"
    assert found.contended_link == 0.8
    assert found.draft_layer == (Timing(1, 2.0, 6.0),)
    assert found.link == (LinkRate(4096, 2e9),)
    assert found.exact_layer == one.exact_layer and found.machine == one.machine
