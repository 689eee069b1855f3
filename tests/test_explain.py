"""What a person and a program read of a plan: true, complete, and safe with foreign names."""

import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from toys import ACCEPTANCE, make_profile, make_spec

from subspec.artifacts.model import ModelSpec, Source
from subspec.artifacts.plan import Option, Plan
from subspec.artifacts.sizes import format_size
from subspec.planner.explain import (
    Row,
    duration,
    ledger_rows,
    number,
    plan_json,
    print_plan,
    render_readme,
    render_report,
    ticks,
    timeline,
)
from subspec.planner.search import Wishes, search

HOSTILE = "</title><script>alert(1)</script>\n---\n| `x` [/nope] \x1b[2J\x00 & \"'\u202e"
SPEC = make_spec()
BUDGETS = {"speculation": 12_000_000, "abstains": 30_000_000, "no draft": 6_500_000}


def make_plan(budget_bytes: int = BUDGETS["speculation"]) -> Plan:
    return search(SPEC, make_profile(), budget_bytes, Wishes(context=256), ACCEPTANCE)


def hostile() -> tuple[ModelSpec, Plan]:
    plan = make_plan()
    assert plan.substitute is not None
    ledger = {**plan.substitute.ledger, HOSTILE: 1000}
    return replace(SPEC, source=Source(HOSTILE, HOSTILE, HOSTILE)), replace(
        plan,
        machine=HOSTILE,
        substitute=replace(plan.substitute, ledger=ledger),
        options=(Option(HOSTILE, 5.0), *plan.options),
        reasons=(HOSTILE,),
    )


def parse(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page)


def words(page: str) -> str:
    return " ".join("".join(parse(page).itertext()).split())


def printed(spec: ModelSpec, plan: Plan) -> str:
    out = io.StringIO()
    print_plan(spec, plan, Console(file=out, width=100))
    return out.getvalue()


# The report


@pytest.mark.parametrize("budget_bytes", BUDGETS.values(), ids=BUDGETS)
def test_the_report_is_one_page_that_needs_nothing_else(budget_bytes: int) -> None:
    page = render_report(SPEC, make_plan(budget_bytes), make_profile())
    root = parse(page)
    tags = {element.tag for element in root.iter()}
    assert {"svg", "table"} <= tags
    assert tags.isdisjoint({"script", "link", "img", "iframe", "object", "a", "base", "form"})
    assert "://" not in page and "url(" not in page and "@import" not in page
    attributes = {name for element in root.iter() for name in element.attrib}
    assert not any(name.startswith("on") or name in ("src", "href") for name in attributes)
    policy = next(e for e in root.iter("meta") if e.get("http-equiv"))
    assert policy.get("content", "").startswith("default-src 'none'")


def test_the_report_escapes_foreign_names() -> None:
    spec, plan = hostile()
    page = render_report(spec, plan, make_profile(machine=HOSTILE))
    parse(page)  # control characters would break it
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not any(letter in page for letter in "\x1b\x00\u202e")


def test_the_memory_bar_and_its_table_add_up_to_the_budget() -> None:
    plan = make_plan()
    page = render_report(SPEC, plan, make_profile())
    bar = next(e for e in parse(page).iter("svg") if e.get("class") == "budget")
    widths = [float(rect.get("width", "").rstrip("%")) for rect in bar.iter("rect")]
    assert sum(widths) == pytest.approx(100, abs=0.01)
    rows = ledger_rows(plan, plan.placement(plan.method) or plan.plain)
    assert sum(row.num_bytes for row in rows) == plan.budget_bytes
    for row in rows:
        decimal, binary = format_size(row.num_bytes)[:-1].split(" (")
        assert f"{row.label}{decimal}{binary}" in words(page).replace("\n", "")


def test_the_report_says_what_is_measured_and_what_is_not() -> None:
    said = words(render_report(SPEC, make_plan(), make_profile()))
    assert re.search(r"80\.0 %\S+ ?120", said)  # of width 1, 120 samples
    assert re.search(r"90\.0 %\S+ ?prior", said)
    assert "1.05 MB (1.00 MiB)100.00 MB" in said  # the link
    assert "exact layer81" not in said


def test_the_report_names_the_reasons_and_marks_the_choice() -> None:
    plan = make_plan()
    said = words(render_report(SPEC, plan, make_profile()))
    assert plan.reasons[-1] in said
    assert f"tree {plan.tree.width} wide, {plan.tree.depth} deep (chosen)" in said
    assert said.count("(chosen)") == 1
    plain = words(render_report(SPEC, make_plan(BUDGETS["abstains"]), make_profile()))
    assert "plain decoding, one token per pass (chosen)" in plain


def test_a_plan_without_predictions_can_be_read_too() -> None:
    plan = replace(make_plan(), predicted={}, options=(), reasons=())
    parse(render_report(SPEC, plan, make_profile()))
    assert "predicted speed" not in render_readme(SPEC, plan)


def test_a_timeline_shows_every_second_of_both_lanes() -> None:
    plan = make_plan()
    assert plan.substitute is not None
    predicted = plan.predicted["substitute"]
    line = timeline("substitute", predicted, plan.substitute)
    link = sum(bar.seconds for bar in line.link)
    compute = sum(bar.seconds for bar in line.compute)
    assert link == pytest.approx(predicted.stream_seconds)
    assert compute == pytest.approx(predicted.draft_seconds + predicted.compute_seconds)
    for bar in (*line.link, *line.compute):
        assert 0 <= bar.start <= bar.start + bar.seconds <= line.seconds * 1.0001


# README


def test_the_readme_is_a_model_card() -> None:
    front = render_readme(SPEC, make_plan()).split("---\n")[1].splitlines()
    values = dict(line.split(": ", 1) for line in front)
    assert values == {
        "library_name": "subspec",
        "base_model": '"org/toy"',
        "license": '"apache-2.0"',
    }


def test_the_readme_claims_no_licence_and_no_hub_name_that_it_does_not_know() -> None:
    text = render_readme(replace(SPEC, source=Source("folder")), make_plan())
    assert text.startswith("---\nlibrary_name: subspec\n---\n")
    assert "not stated by the checkpoint" in text
    assert "subspec-plan" not in text


def test_the_readmes_front_matter_cannot_be_forged() -> None:
    text = render_readme(*hostile())
    front = text.split("---\n")[1].splitlines()
    assert [line.partition(":")[0] for line in front] == ["library_name", "license"]
    json.loads(front[1].partition(": ")[2])
    assert text.count("\n---\n") == 1
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {3}


def test_the_commands_in_the_readme_are_ours() -> None:
    from subspec.planner import cli as plan_cli
    from subspec.runtime import cli as run_cli

    commands = {"subspec-run": run_cli.main, "subspec-plan": plan_cli.main}
    text = render_readme(SPEC, make_plan())
    lines = re.findall(r"^subspec-\S+ .*$|(?<=`)subspec-[^`]+(?=`)", text, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        name, *arguments = shlex.split(line)
        commands[name].make_context(name, arguments)  # raises for an unknown option


# The terminal


@pytest.mark.parametrize("budget_bytes", BUDGETS.values(), ids=BUDGETS)
def test_the_table_fits_a_screen_and_hides_what_takes_nothing(budget_bytes: int) -> None:
    plan = make_plan(budget_bytes)
    text = printed(SPEC, plan)
    assert len(text.splitlines()) < 40
    assert "org/toy" in text and format_size(budget_bytes) in text
    assert "GPU context" not in text
    assert number(plan.predicted[plan.method].tokens_per_second) in text
    for reason in plan.reasons:
        assert " ".join(reason.split()[:4]) in text


def test_the_table_survives_foreign_names() -> None:
    text = printed(*hostile())
    assert "[/nope]" in text
    assert "\x1b" not in text and "\u202e" not in text


# JSON


def test_the_json_object_has_the_documented_keys() -> None:
    plan = make_plan()
    found = json.loads(json.dumps(plan_json(SPEC, plan, Path("toy-12mb")), allow_nan=False))
    assert list(found) == [
        "schema", "model", "budget_bytes", "artifact", "feasible", "ledger", "decisions",
        "predicted",
    ]  # fmt: skip
    assert found["schema"] == "subspec.plan/1"
    assert found["artifact"] == "toy-12mb"
    assert found["model"] == {
        "id": "org/toy",
        "revision": "0" * 40,
        "parameters": found["model"]["bytes"] // 2,
        "bytes": 2 * (8 * 589_824 + 2 * 2048 * 256 + 8 * 512 + 17 * 256),  # biases, norms last
        "dtype": "bfloat16",
    }
    assert sum(found["ledger"].values()) <= found["budget_bytes"] == 12_000_000
    assert set(found["decisions"]) == {
        "device", "method", "context", "tree", "verify_width", "int4_kernel", "threads",
        "prefill_tokens", "block_bytes", "num_slots", "residual_parts", "resident_bytes",
        "split_bytes", "streamed_bytes", "reasons",
    }  # fmt: skip
    assert set(found["decisions"]["tree"]) == {"width", "depth", "temperature", "stop_below"}
    assert set(found["predicted"]) == {
        "tokens_per_second", "time_to_first_token_seconds", "fast_peak_bytes", "tokens_per_round",
        "draft_seconds", "verify_seconds", "stream_seconds", "compute_seconds", "decode_seconds",
        "streamed_bytes", "plain_tokens_per_second",
    }  # fmt: skip


def test_a_dry_run_has_no_artifact() -> None:
    found = plan_json(SPEC, make_plan(BUDGETS["abstains"]), None)
    assert found["artifact"] is None
    assert found["decisions"]["method"] == "plain"
    assert found["decisions"]["streamed_bytes"] == 0


# Words and numbers


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


@pytest.mark.parametrize("seconds", [3.1e-5, 0.0092, 0.812, 1.0, 4.999, 77.0])
def test_an_axis_has_a_few_round_ticks(seconds: float) -> None:
    found = ticks(seconds)
    assert 3 <= len(found) <= 6
    assert found[0] == (0.0, "0")
    assert found[-1][0] <= seconds
    assert all(len(label) <= 7 for _, label in found)


def test_purposes_that_we_do_not_know_are_shown_by_their_name() -> None:
    plan = make_plan()
    placement = replace(plan.plain, ledger={"resident": 10, "graphs": 5, "norms": 0})
    assert ledger_rows(replace(plan, budget_bytes=15), placement) == [
        Row("resident", "exact weights that stay", 10),
        Row("other", "graphs", 5),
    ]
