"""Rows and lines of a plan, as a person reads them; the pages are in test_explain.py."""

from dataclasses import replace

from builders import make_plan
from run_records import make_run
from toys import ACCEPTANCE, make_hybrid_spec, make_profile, make_spec

from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.footprint import model_bytes
from subspec.artifacts.plan import Constraints, HostLedger
from subspec.artifacts.profile import Corrections, LinkRate
from subspec.planner.report.wording import (
    PURPOSES,
    cost_rows,
    decision_rows,
    in_markdown,
    ledger_rows,
    method_name,
    placement_of,
    run_rows,
    speed_line,
    streamed_line,
)
from subspec.planner.solve.search import search
from subspec.planner.solve.storage import usual_storages


def test_every_purpose_of_the_ledger_has_a_label_and_all_add_up_to_the_budget() -> None:
    spec = make_spec()
    plan = search(spec, make_profile(), 12_000_000, Constraints(context=256), ACCEPTANCE)
    assert set(vars(placement_of(plan).ledger)) == set(PURPOSES)
    rows = ledger_rows(spec, plan)
    assert sum(row.num_bytes for row in rows) == plan.budget_bytes
    assert all(row.num_bytes > 0 for row in rows)
    assert rows[-1].label == "unused"
    assert "KV cache" in [row.label for row in rows]


def test_the_states_of_delta_nets_are_not_called_a_kv_cache() -> None:
    rows = ledger_rows(make_hybrid_spec(), make_plan(make_spec()))
    assert "KV cache, delta-net states" in [row.label for row in rows]


def test_what_a_gpus_plan_takes_of_host_memory_is_told_part_by_part() -> None:
    plan = make_plan(make_spec())
    assert "host memory" not in dict(decision_rows(plan))
    plan = replace(plan, host_ledger=HostLedger(21_000_000, 3_000_000, 500_000))
    assert dict(decision_rows(plan))["host memory"] == (
        "24.50 MB (23.37 MiB): 21.00 MB of streamed weights, 3.00 MB of embedding, 500.00 KB of "
        "delta-net checkpoints"
    )
    plan = replace(plan, host_ledger=HostLedger(0, 3_000_000, 0))
    assert dict(decision_rows(plan))["host memory"].endswith(": 3.00 MB of embedding")


def test_what_streams_is_told_beside_what_is_resident() -> None:
    spec = make_spec(num_layers=32)
    profile = make_profile(link=(LinkRate(64 << 10, 100e6),), residual_weights_per_second=2e7)
    stored = usual_storages(spec)[0]
    budget = int(0.8 * model_bytes(spec))
    plan = search(spec, profile, budget, Constraints(), ACCEPTANCE, stored)
    placement, total = placement_of(plan), len(spec.parts)
    resident, residuals = len(placement.resident), len(placement.residuals)
    streamed = plan.predicted[plan.method].streamed_bytes
    assert resident and residuals and streamed
    assert streamed_line(spec, plan) == (
        f"{short_size(streamed)} per round, {total - resident - residuals} of {total} parts; "
        f"{resident} are resident, {residuals} as residuals"
    )


def test_the_predicted_speed_is_said_to_be_that_of_the_methods_own_drafter() -> None:
    plan = search(make_spec(), make_profile(), 12_000_000, Constraints(context=256), ACCEPTANCE)
    assert plan.method == "substitute" and " if " not in speed_line(plan)
    other = replace(plan, drafter="eagle")
    assert speed_line(other) == f"{speed_line(plan)} with the drafter substitute"
    assert method_name(other).endswith("the drafter eagle")


def test_what_the_text_repeats_is_said_to_be_drafted_too() -> None:
    alone = search(make_spec(), make_profile(), 12_000_000, Constraints(context=256), ACCEPTANCE)
    plan = replace(alone, drafter="substitute+lookup")
    assert method_name(plan) == f"{method_name(alone)}, with prompt lookup"
    assert speed_line(plan) == speed_line(alone)


def test_runs_are_compared_with_what_was_predicted_for_them() -> None:
    runs = [make_run(verify_seconds=seconds) for seconds in (0.2, 0.375, 0.55)]
    waited = make_run(method="plain", includes_digest_check=True, predicted_peak_bytes=None)
    assert run_rows([*runs, waited]) == [
        ("speculative decoding, tokens/s", "3", "20.0", "16.0", "-20%"),
        ("speculative decoding, first token", "3", "500 ms", "500 ms", "+0%"),
        ("speculative decoding, peak memory", "3", "8.00 MB", "7.50 MB", "-6%"),
        ("plain decoding, tokens/s", "1", "20.0", "16.0", "-20%"),
    ]


def test_correction_factors_are_told_with_the_rounds_they_rest_on() -> None:
    found = dict(cost_rows(make_profile(corrections=Corrections(1.08, 0.96, 1.02, 1.21, 145))))
    assert found["correction factors"] == (
        "draft 1.08, verify 0.96, plain decoding 1.02, first token 1.21; from 145 rounds"
    )
    assert found["link while layers compute"] == "80% of its speed"


def test_a_foreign_name_breaks_neither_a_line_nor_a_code_span() -> None:
    assert in_markdown("a`b|c\nd\x1b[2J") == "a'b'c\N{REPLACEMENT CHARACTER}d" + (
        "\N{REPLACEMENT CHARACTER}[2J"
    )
