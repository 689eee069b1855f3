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
from run_records import make_run
from toys import ACCEPTANCE, make_profile, make_spec

from subspec.artifacts.acceptance import Acceptance, Curve
from subspec.artifacts.common.sizes import format_size
from subspec.artifacts.model import ModelSpec, Source
from subspec.artifacts.plan import Constraints, Option, Plan, Point
from subspec.artifacts.profile import Corrections
from subspec.planner.report.explain import plan_json, print_plan, render_readme, render_report
from subspec.planner.report.wording import ledger_rows, number
from subspec.planner.solve.outlook import with_outlook
from subspec.planner.solve.search import PRIOR, search

HOSTILE = "</title><script>alert(1)</script>\n---\n| `x` [/nope] \x1b[2J\x00 & \"'\u202e"
SPEC = make_spec()
BUDGETS = {"speculation": 12_000_000, "abstains": 30_000_000, "no draft": 6_500_000}


# Three kinds of text, on 45 trees of each width.
MEASURED = Acceptance(
    tuple(
        Curve(width, kind, (15, 12, 9), accepted)
        for width in (1, 3)
        for kind, accepted in (("chat", (12, 9, 5)), ("code", (12, 9, 8)), ("json", (12, 9, 9)))
    ),
    measured=True,
)


def make_plan(
    budget_bytes: int = BUDGETS["speculation"], acceptance: Acceptance = ACCEPTANCE
) -> Plan:
    return search(SPEC, make_profile(), budget_bytes, Constraints(context=256), acceptance)


def explored(plan: Plan) -> Plan:
    """With what other budgets and contexts would give."""

    def solve(budget: int, context: int | None) -> Plan:
        return search(SPEC, make_profile(), budget, Constraints(context=context), plan.acceptance)

    return with_outlook(plan, solve, False, SPEC.max_positions)


def hostile() -> tuple[ModelSpec, Plan]:
    curves = (*MEASURED.curves, Curve(3, HOSTILE, (20,), (10,)))
    plan = make_plan(acceptance=Acceptance(curves, measured=True))
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


def test_the_report_says_what_was_measured() -> None:
    said = words(render_report(SPEC, make_plan(), make_profile()))
    assert "1.05 MB (1.00 MiB)100.00 MB" in said  # the link
    assert "exact layer1100 µs150 µs" in said
    assert "exact layer, unpadded180.0 µs" in said
    assert "digests, checked at first read1.00 GB/s" in said


def test_the_report_says_in_words_what_slows_and_what_was_learned() -> None:
    said = words(render_report(SPEC, make_plan(), make_profile()))
    assert "the link keeps 80 % of its speed while layers are computed, a layer 90 %" in said
    assert "corrections from real roundsnothing yet" in said
    corrections = Corrections(1.08, 0.96, 1.02, 1.21, 145)
    said = words(render_report(SPEC, make_plan(), make_profile(corrections=corrections)))
    assert "corrections from 145 real rounds" in said
    assert "draft 1.08, verification 0.96, a token of plain decoding 1.02, first token 1.21" in said


def test_the_report_tells_acceptance_by_width_and_by_kind() -> None:
    plan = make_plan(acceptance=MEASURED)
    tree, predicted = plan.tree, plan.predicted["substitute"]
    said = words(render_report(SPEC, plan, make_profile()))
    for width in (1, 3):
        tokens = MEASURED.tokens(width, tree.depth)
        margin = MEASURED.margin(width, tree.depth)
        assert re.search(rf"{width}45\d\d\.\d %{number(tokens)} ± {number(margin)}", said)
    for kind in MEASURED.kinds:
        tokens = MEASURED.tokens(tree.width, tree.depth, kind)
        margin = MEASURED.margin(tree.width, tree.depth, kind)
        assert f"{kind}15{number(tokens)} ± {number(margin)}" in said
    pooled = number(predicted.tokens_per_round), number(MEASURED.margin(tree.width, tree.depth))
    assert f"all kinds45{' ± '.join(pooled)}{number(predicted.tokens_per_second)}" in said


def test_published_figures_are_said_to_be_published() -> None:
    said = words(render_report(SPEC, make_plan(acceptance=PRIOR), make_profile()))
    assert "published figures of other models: nothing was measured here" in said
    assert "±" not in said and "95 % confidence" not in said


def test_the_report_draws_what_other_budgets_and_contexts_would_give() -> None:
    plan = explored(make_plan())
    page = render_report(SPEC, plan, make_profile())
    charts = [e for e in parse(page).iter("svg") if "outlook" in e.get("class", "")]
    marks = [list(chart.iter("circle")) for chart in charts]
    assert [len(some) for some in marks] == [len(plan.by_budget), len(plan.by_context)]
    for some in marks:
        assert [circle.get("class") for circle in some].count("substitute own") == 1
        for circle in some:
            places = [float(circle.get(name, "").rstrip("%")) for name in ("cx", "cy")]
            assert all(0 <= place <= 100 for place in places)
    assert "1.20 MB more would buy" in words(page)


def test_points_of_plain_decoding_look_different() -> None:
    points = (
        Point(6_000_000, 256, "plain", 9.0),
        Point(12_000_000, 256, "substitute", 90.0),
    )
    page = render_report(SPEC, replace(make_plan(), by_budget=points), make_profile())
    assert [e.get("class") for e in parse(page).iter("circle")] == ["plain", "substitute own"]


def test_what_cannot_be_drawn_is_said() -> None:
    plan = make_plan(BUDGETS["no draft"])
    said = words(render_report(SPEC, plan, make_profile()))
    assert "No other cap was looked into, or none has a plan." in said
    assert "No other context was looked into, or none has a plan." in said
    assert "The plan has no draft." in said
    assert "No run has been recorded yet. subspec-plan --calibrate draws this again." in said
    said = words(render_report(SPEC, plan, make_profile(), [make_run()]))
    assert "One answer is recorded." in said and "Too few answers for a picture." in said


def test_the_report_compares_runs_with_what_was_predicted_for_them() -> None:
    runs = [make_run(verify_seconds=seconds) for seconds in (0.2, 0.375, 0.55)]
    runs.append(make_run(method="plain", first_of_session=True, predicted_peak_bytes=None))
    page = render_report(SPEC, make_plan(), make_profile(), runs)
    chart = next(e for e in parse(page).iter("svg") if "square" in e.get("class", ""))
    assert [e.get("d", "").count("M") for e in chart.iter("path")] == [3, 1]
    said = words(page)
    assert "4 answers are recorded." in said
    assert "speculation, tokens/s320.016.0-20 %" in said
    assert "speculation, first token3500 ms500 ms+0 %" in said
    assert "speculation, peak memory38.00 MB7.50 MB-6 %" in said
    assert "plain, tokens/s120.016.0-20 %" in said
    assert "plain, first token" not in said  # it waited for digests
    assert "plain, peak memory" not in said  # nothing was predicted


def test_the_report_stays_small() -> None:
    curves = tuple(Curve(3, f"kind-{n}", (30,) * 64, (29,) * 64) for n in range(30))
    constraints = Constraints(context=256, width=3, depth=20)
    measured = Acceptance(curves, measured=True)
    plan = explored(search(SPEC, make_profile(), 12_000_000, constraints, measured))
    runs = [make_run(verify_seconds=0.3 + n / 1000) for n in range(1000)]
    page = render_report(SPEC, plan, make_profile(), runs)
    assert len(page.encode()) < 60_000


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


# README


def test_the_readme_is_a_model_card() -> None:
    front = render_readme(SPEC, make_plan()).split("---\n")[1].splitlines()
    values = dict(line.split(": ", 1) for line in front)
    assert values == {
        "library_name": "subspec",
        "base_model": '"org/toy"',
        "license": '"apache-2.0"',
    }


def test_the_readme_says_what_acceptance_rests_on() -> None:
    plan = make_plan(acceptance=MEASURED)
    tokens = f"{number(plan.predicted['substitute'].tokens_per_round)} tokens a round"
    assert f"| acceptance | measured on 45 trees: {tokens} ± " in render_readme(SPEC, plan)
    prior = render_readme(SPEC, make_plan(acceptance=PRIOR))
    assert "| acceptance | by published figures, not measured: " in prior
    assert "| acceptance |" not in render_readme(SPEC, make_plan(BUDGETS["no draft"]))


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


def test_the_table_says_what_acceptance_rests_on() -> None:
    plan = make_plan(acceptance=MEASURED)
    tree = plan.tree
    text = " ".join(printed(SPEC, plan).split())
    tokens = number(MEASURED.tokens(tree.width, tree.depth))
    margin = number(MEASURED.margin(tree.width, tree.depth))
    assert f"acceptance measured on 45 trees: {tokens} tokens a round ± {margin}; chat " in text
    for kind in MEASURED.kinds:
        assert f"{kind} {number(MEASURED.tokens(tree.width, tree.depth, kind))}" in text
    prior = " ".join(printed(SPEC, make_plan(acceptance=PRIOR)).split())
    assert "acceptance by published figures, not measured: " in prior
    assert "acceptance" not in printed(SPEC, make_plan(BUDGETS["no draft"]))


def test_the_table_says_what_more_memory_would_buy() -> None:
    assert "more memory  1.20 MB more would buy" in printed(SPEC, explored(make_plan()))
    assert "more memory" not in printed(SPEC, make_plan())


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
        "predicted", "acceptance", "by_budget", "by_context",
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
    assert set(found["decisions"]["tree"]) == {
        "width",
        "depth",
        "temperature",
        "min_path_probability",
    }
    assert set(found["predicted"]) == {
        "tokens_per_second", "time_to_first_token_seconds", "fast_peak_bytes", "tokens_per_round",
        "draft_seconds", "verify_seconds", "stream_seconds", "compute_seconds", "decode_seconds",
        "streamed_bytes", "plain_tokens_per_second",
    }  # fmt: skip


def test_the_json_object_tells_acceptance_and_the_outlook() -> None:
    plan = explored(make_plan(acceptance=MEASURED))
    found = json.loads(json.dumps(plan_json(SPEC, plan, None), allow_nan=False))
    assert found["acceptance"] == {
        "measured": True,
        "trees": 45,
        "tokens_per_round": MEASURED.tokens(plan.tree.width, plan.tree.depth),
        "margin": MEASURED.margin(plan.tree.width, plan.tree.depth),
    }
    own = {
        "budget_bytes": 12_000_000,
        "context": 256,
        "method": "substitute",
        "tokens_per_second": plan.predicted["substitute"].tokens_per_second,
    }
    assert own in found["by_budget"] and own in found["by_context"]
    assert len(found["by_budget"]) == len(plan.by_budget)


def test_a_margin_that_wider_trees_do_not_tell_is_left_out() -> None:
    wide = Acceptance((Curve(8, "code", (500,), (450,)),), measured=True)
    plan = search(SPEC, make_profile(), 12_000_000, Constraints(context=256, width=1), wide)
    assert plan_json(SPEC, plan, None)["acceptance"]["margin"] is None
    text = printed(SPEC, plan)
    assert "measured on 500 trees: " in text and "±" not in text
    parse(render_report(SPEC, plan, make_profile()))


def test_nothing_is_claimed_of_acceptance_that_was_not_measured() -> None:
    found = json.loads(json.dumps(plan_json(SPEC, make_plan(acceptance=PRIOR), None)))
    assert (found["acceptance"]["measured"], found["acceptance"]["margin"]) == (False, None)
    assert found["acceptance"]["trees"] == 0
    assert found["by_budget"] == found["by_context"] == []


def test_a_dry_run_has_no_artifact() -> None:
    found = plan_json(SPEC, make_plan(BUDGETS["abstains"]), None)
    assert found["artifact"] is None
    assert found["decisions"]["method"] == "plain"
    assert found["decisions"]["streamed_bytes"] == 0
