"""Rows, lines and numbers of a plan, as a person reads them; the pages are in test_explain.py."""

from dataclasses import replace

import pytest
from toys import ACCEPTANCE, make_profile, make_spec

from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.model import parts
from subspec.artifacts.plan import Constraints
from subspec.artifacts.profile import LinkRate
from subspec.planner.report.wording import (
    Row,
    big_number,
    duration,
    in_markdown,
    ledger_rows,
    number,
    placement_of,
    streamed_line,
)
from subspec.planner.solve.costs import model_bytes
from subspec.planner.solve.search import search
from subspec.planner.solve.storage import usual_storages


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0.00"), (3.14159, "3.14"), (31.4159, "31.4"), (31415.9, "31416")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (12e-6, "12.0 µs"), (0.25, "250 ms"), (1.5, "1.50 s"), (2e-7, "0.20 µs")],
)
def test_times_have_a_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_purposes_that_we_do_not_know_are_shown_by_their_name() -> None:
    plan = search(make_spec(), make_profile(), 12_000_000, Constraints(context=256), ACCEPTANCE)
    placement = replace(plan.plain, ledger={"resident": 10, "graphs": 5, "norms": 0})
    assert ledger_rows(replace(plan, budget_bytes=15), placement) == [
        Row("resident", "exact weights that stay", 10),
        Row("other", "graphs", 5),
    ]


def test_what_streams_is_the_stored_weights_less_what_memory_holds_of_them() -> None:
    """Those held decoded aside: their bits would be a mixture of both."""
    spec = make_spec(num_layers=32)
    profile = make_profile(link=(LinkRate(64 << 10, 100e6),), residual_weights_per_second=2e7)
    stored = usual_storages(spec)[0]
    budget = int(0.8 * model_bytes(spec))
    plan = search(spec, profile, budget, Constraints(), ACCEPTANCE, stored)
    decoded = set(plan.residuals) & set(placement_of(plan).resident)
    streamed = plan.predicted[plan.method].streamed_bytes
    assert decoded and streamed
    line = streamed_line(spec, plan)
    count = sum(part.num_weights for part in parts(spec) if part.name not in decoded)
    assert line.startswith(f"{big_number(count)} weights x (4.5 + {stored.bits_per_residual:.2f})")
    assert line.endswith(
        f"{short_size(streamed)} a round; {len(decoded)} more matrices are held decoded"
    )


def test_large_counts_are_said_in_words() -> None:
    counts = (999_999, 1_500_000, 32_800_000_000)
    assert [big_number(count) for count in counts] == ["999999", "1.50 million", "32.8 billion"]


def test_a_foreign_name_breaks_neither_a_line_nor_a_code_span() -> None:
    assert in_markdown("a`b|c\nd\x1b[2J") == "a'b'c\N{REPLACEMENT CHARACTER}d" + (
        "\N{REPLACEMENT CHARACTER}[2J"
    )
