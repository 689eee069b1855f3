"""What a pass is made of is timed at every width that a profile has, in any model that we run."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toys import make_spec

from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import Int4Kernel
from subspec.artifacts.profile import LIVE_TOKENS, MIN_SECONDS, Timing
from subspec.planner.machine import microbench
from subspec.planner.machine.microbench import (
    ATTENTION_WIDTHS,
    DRAFT_WIDTHS,
    EXACT_WIDTHS,
    FAST_WIDTHS,
    USUAL_WIDTH,
    Bench,
    difference,
)
from subspec.planner.machine.timing import Effort
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.model.attention import attend

CPU = torch.device("cpu")
SMALL = make_spec(hidden_size=64, intermediate_size=128, head_size=32)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two that wait for each other take minutes on a busy machine."""
    torch.set_num_threads(1)


# One sample of everything: nothing here depends on the numbers.
HASTY = Effort(fewest_samples=1, action_seconds=0.0)


def fastest_of(bench: Bench) -> tuple[Int4Kernel, Substitutes]:
    kernel, (substitutes, _) = next(iter(bench.timed_kernels().items()))
    return kernel, substitutes


def widths(timings: tuple[Timing, ...]) -> tuple[int, ...]:
    return tuple(timing.width for timing in timings)


@torch.inference_mode()
def test_every_part_of_a_pass_is_timed_at_its_widths() -> None:
    bench = Bench(SMALL, CPU, HASTY)
    layer, head = bench.exact_timings()
    assert widths(layer) == widths(head) == EXACT_WIDTHS
    fast, plain_head = bench.fast_timings()
    assert widths(fast) == FAST_WIDTHS and plain_head > 0
    assert widths(bench.attention_timings(attend, bench.weights.dtype)) == ATTENTION_WIDTHS
    substitutes = fastest_of(bench)[1]
    draft = bench.draft_timings(substitutes)
    assert widths(draft.layer) == widths(draft.head) == DRAFT_WIDTHS
    assert widths(draft.attention) in (ATTENTION_WIDTHS, DRAFT_WIDTHS)  # layer by layer; fused
    assert bench.round_overhead_seconds() > 0
    assert bench.cache.length == LIVE_TOKENS, "as it was before"


@torch.inference_mode()
def test_a_draft_is_no_wider_than_the_vocabulary() -> None:
    bench = Bench(replace(SMALL, vocab_size=4), CPU, HASTY)
    substitutes = fastest_of(bench)[1]
    assert widths(bench.draft_timings(substitutes).layer) == (1, 2, 4)


@torch.inference_mode()
def test_wide_passes_are_tried_only_while_there_is_time() -> None:
    bench = Bench(SMALL, CPU, HASTY)
    found = bench.batch_invariant_widths()
    bench.effort = replace(HASTY, place_seconds=0.0)
    usual = (tuple(w for w in alike if w <= USUAL_WIDTH) for alike in found)
    assert bench.batch_invariant_widths() == tuple(alike for alike in usual if alike)


@torch.inference_mode()
def test_widths_in_which_a_row_has_the_same_bits_are_a_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another kernel takes over from 32 rows on, and at 16 and 48 rows the last one differs."""

    def rows(weights: object, products: object, cache: object, width: int) -> list[Tensor] | None:
        return None if width in (16, 48) else [torch.full((8, 4), float(width >= 32))]

    monkeypatch.setattr(microbench, "rows_at_any_place", rows)
    bench = Bench(SMALL, CPU, replace(HASTY, place_seconds=0.0))
    assert bench.batch_invariant_widths() == ((8, 24), (32, 40, 56, 64, 80, 96, 104, 128))


def test_no_width_is_in_a_group_if_a_rows_bits_depend_on_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(microbench, "rows_at_any_place", lambda *given: None)
    assert Bench(SMALL, CPU, HASTY).batch_invariant_widths() == ()


def test_more_tokens_never_take_less_time() -> None:
    near, far = (
        (Timing(1, 2.0, 3.0), Timing(8, 5.0, 6.0)),
        (Timing(1, 2.5, 4.0), Timing(8, 4.0, 7.0)),
    )
    assert difference(near, far) == (Timing(1, 0.5, 4.0), Timing(8, MIN_SECONDS, 7.0))


@torch.inference_mode()
def test_torch_compiles_nothing_that_is_served_or_not_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compiled(spec: ModelSpec) -> None:
        raise AssertionError("nothing is compiled")

    monkeypatch.setattr(microbench, "compile_graphs", compiled)
    bench = Bench(SMALL, CPU, HASTY)
    kernel, substitutes = fastest_of(bench)
    if kernel == "w4a8":  # draft_layers.cpp serves
        assert bench.faster_graphs(substitutes) is None
    unwanted = Bench(replace(SMALL, rope_in_f32=True), CPU, replace(HASTY, compiles_graphs=False))
    substitutes = fastest_of(unwanted)[1]
    assert unwanted.faster_graphs(substitutes) is None


@torch.inference_mode()
def test_a_compiler_that_fails_leaves_the_draft_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbench, "compile_graphs", lambda spec: "there is no compiler")
    bench = Bench(replace(SMALL, rope_in_f32=True), CPU, HASTY)
    substitutes = fastest_of(bench)[1]
    assert bench.faster_graphs(substitutes) is None
