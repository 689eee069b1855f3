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
from toys import ACCEPTANCE, make_curve, make_profile, make_spec

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.common.formatting import duration, number
from subspec.artifacts.common.sizes import format_size
from subspec.artifacts.model import ModelSpec, Source
from subspec.artifacts.plan import Constraints, HostLedger, Option, Plan
from subspec.planner.report.explain import plan_json, print_plan, render_readme, render_report
from subspec.planner.report.wording import ledger_rows
from subspec.planner.solve.fastest import fastest_plan
from subspec.planner.solve.outlook import with_outlook
from subspec.planner.solve.search import PRIOR, search

HOSTILE = "</title><script>alert(1)</script>\n---\n| `x` [/nope] \x1b[2J\x00 & \"'\u202e"
SPEC = make_spec()
BUDGETS = {"speculation": 12_000_000, "abstains": 30_000_000, "no draft": 6_500_000}


# Three kinds of text, 5 answers of each; every threshold with rates of its own.
MEASURED = Acceptance(
    tuple(
        make_curve(width, rate - stop / 10, kind, stop, lasts=1 - stop / 4, margin=0.2)
        for width in (1, 4)
        for stop in (0.0, 0.2)
        for kind, rate in (("chat", 0.8), ("code", 0.85), ("json", 0.9))
    ),
    measured=True,
)


def make_plan(
    budget_bytes: int = BUDGETS["speculation"], acceptance: Acceptance = ACCEPTANCE
) -> Plan:
    return fastest_plan(SPEC, make_profile(), budget_bytes, Constraints(context=256), acceptance)


def explored(plan: Plan) -> Plan:
    """With what other budgets and contexts would give."""

    def solve(budget: int, context: int) -> Plan:
        asked = Constraints(context=context)
        return fastest_plan(SPEC, make_profile(), budget, asked, plan.acceptance)

    return with_outlook(plan, solve, SPEC.max_positions)


def hostile() -> tuple[ModelSpec, Plan]:
    curves = (*MEASURED.curves, make_curve(4, 0.5, HOSTILE))
    plan = make_plan(acceptance=Acceptance(curves, measured=True))
    return replace(SPEC, source=Source(HOSTILE, HOSTILE, HOSTILE)), replace(
        plan,
        machine=HOSTILE,
        options=(Option(HOSTILE, 5.0), *plan.options),
        reasons=(HOSTILE,),
    )


def parse(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page)


def words(page: str) -> str:
    return " ".join("".join(parse(page).itertext()).split())


def expected(plan: Plan, kind: str = "") -> tuple[float, float]:
    """A round's tokens and their margin, for drafts that end as the plan's do."""
    return plan.acceptance.acceptance_length(plan.tree, kind), plan.acceptance.margin(
        plan.tree, kind
    )


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
    for row in ledger_rows(SPEC, plan):
        assert f"{row.label}{format_size(row.num_bytes)}" in words(page)


def test_the_report_tells_acceptance_by_kind_of_text() -> None:
    plan = make_plan(acceptance=MEASURED)
    found = words(render_report(SPEC, plan, make_profile()))
    assert "kind of textanswers measuredtokens per round" in found
    for kind, label, count in (("chat", "chat", 5), ("json", "json", 5), ("", "all kinds", 15)):
        tokens, margin = (number(value) for value in expected(plan, kind))
        assert f"{label} {count} {tokens} ± {margin}".replace(" ", "") in found.replace(" ", "")


def test_published_figures_are_said_to_be_published() -> None:
    found = words(render_report(SPEC, make_plan(acceptance=PRIOR), make_profile()))
    assert "from published figures: not measured on this model" in found
    assert "±" not in found and "confidence" not in found


def test_the_report_draws_other_budgets_and_lists_other_contexts() -> None:
    plan = explored(make_plan())
    page = render_report(SPEC, plan, make_profile())
    circles = list(parse(page).iter("circle"))
    assert [circle.get("class") for circle in circles].count("substitute own") == 1
    assert len(circles) == len(plan.by_budget)
    for circle in circles:
        assert all(0 <= float(circle.get(at, "").rstrip("%")) <= 100 for at in ("cx", "cy"))
    found = words(page)
    assert "1.20 MB more memory:" in found
    assert "256 tokens (this plan)speculative decoding" in found
    assert all(f"{point.context} tokens" in found for point in plan.by_context)


def test_what_is_not_known_is_said() -> None:
    found = words(render_report(SPEC, make_plan(BUDGETS["no draft"]), make_profile()))
    assert "No plan was made for other budgets." in found
    assert "No plan was made for other contexts." in found
    assert "The plan has no draft." in found
    assert "No answers with a prediction are recorded yet." in found


def test_the_report_compares_recorded_runs_with_their_predictions() -> None:
    found = words(render_report(SPEC, make_plan(), make_profile(), [make_run(), make_run()]))
    assert "Medians over 2 recorded answers" in found
    assert "speculative decoding, tokens/s220.016.0-20%" in found


def test_the_report_stays_small() -> None:
    curves = tuple(make_curve(2, 0.99, f"kind-{n}") for n in range(30))
    constraints = Constraints(context=256, width=2, depth=30)
    measured = Acceptance(curves, measured=True)
    plan = explored(search(SPEC, make_profile(), 12_000_000, constraints, measured))
    page = render_report(SPEC, plan, make_profile(), [make_run()] * 1000)
    assert len(page.encode()) < 30_000


def test_the_report_names_the_reasons_and_marks_the_choice() -> None:
    plan = make_plan()
    found = words(render_report(SPEC, plan, make_profile()))
    assert plan.reasons[-1] in found
    assert f"tree {plan.tree.width} wide, {plan.tree.depth} deep (chosen)" in found
    assert found.count("(chosen)") == 1
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


def test_table_and_readme_say_what_acceptance_rests_on() -> None:
    plan = make_plan(acceptance=MEASURED)
    tokens = number(plan.predicted["substitute"].tokens_per_round)
    margin = number(expected(plan)[1])
    line = f"{tokens} ± {margin} tokens per round, measured on 15 answers"
    assert f"| acceptance | {line} |" in render_readme(SPEC, plan)
    assert f"acceptance {line}; chat " in " ".join(printed(SPEC, plan).split())
    prior = make_plan(acceptance=PRIOR)
    for text in (render_readme(SPEC, prior), printed(SPEC, prior)):
        assert "from published figures: not measured" in " ".join(text.split())
    without = make_plan(BUDGETS["no draft"])
    assert "acceptance" not in render_readme(SPEC, without) + printed(SPEC, without)


def test_the_table_says_which_lengths_its_figures_are_for_and_what_a_plan_takes_beside() -> None:
    asked = Constraints(context=4096)
    plan = fastest_plan(
        SPEC, make_profile(digest_bytes_per_second=5e7), 27_000_000, asked, ACCEPTANCE
    )
    assert plan.full_context is not None and plan.predicted[plan.method].digest_seconds > 0
    text = " ".join(printed(SPEC, plan).split())
    full, usual = plan.full_context, plan.predicted[plan.method]
    first, digests = usual.time_to_first_token_seconds, usual.digest_seconds
    assert "predicted for a prompt of 128 tokens and an answer of 256 first token" in text
    assert (
        f"first token after {duration(first)} for a prompt of 128 tokens; "
        f"{duration(first + digests)} for the first prompt after a start, which checks digests"
    ) in text
    assert (
        f"full context {number(full.tokens_per_second)} tokens/s for a prompt of 3840 tokens and "
        f"an answer of 256, first token after {duration(full.time_to_first_token_seconds)}"
    ) in text
    assert f"disk {format_size(plan.disk_bytes)} for the artifact" in text
    assert "host memory" not in text
    beside = replace(plan, host_ledger=HostLedger(29 * 10**9, 10**9, 0))
    for page in (printed(SPEC, beside), render_readme(SPEC, beside)):
        assert "host memory" in page and "30.00 GB" in page
    assert "30.00 GB" in words(render_report(SPEC, beside, make_profile()))
    assert "full context" not in printed(SPEC, make_plan()), "the usual lengths fill it"


def test_the_table_says_what_more_memory_would_buy() -> None:
    assert "more memory  1.20 MB more memory:" in printed(SPEC, explored(make_plan()))
    assert "more memory" not in printed(SPEC, make_plan())


def test_the_table_survives_foreign_names() -> None:
    text = printed(*hostile())
    assert "[/nope]" in text
    assert "\x1b" not in text and "\u202e" not in text


def test_the_table_says_what_a_gpus_plan_takes_of_host_memory() -> None:
    plan = replace(make_plan(), host_ledger=HostLedger(21_000_000, 3_000_000, 500_000))
    text = " ".join(printed(SPEC, plan).split())
    assert " host memory 24.50 MB (23.37 MiB): 21.00 MB of streamed" in text
    assert plan_json(SPEC, plan, None)["host_ledger"] == {
        "streamed": 21_000_000, "embedding": 3_000_000, "checkpoints": 500_000
    }  # fmt: skip


# JSON


def test_the_json_object_has_the_documented_keys() -> None:
    plan = make_plan()
    found = json.loads(json.dumps(plan_json(SPEC, plan, Path("toy-12mb")), allow_nan=False))
    assert list(found) == [
        "schema", "model", "budget_bytes", "artifact", "feasible", "ledger", "host_ledger",
        "disk_bytes", "decisions", "predicted", "full_context", "acceptance", "by_budget",
        "by_context",
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
        "device", "method", "drafter", "context", "sequences", "tree", "by_batch_size",
        "verify_widths", "int4_kernel", "threads", "prefill_chunk_tokens", "block_bytes",
        "num_slots", "residual_parts", "resident_bytes", "residual_bytes", "streamed_bytes",
        "reasons",
    }  # fmt: skip
    assert set(found["decisions"]["tree"]) == {
        "width",
        "depth",
        "temperature",
        "min_path_probability",
    }
    assert set(found["predicted"]) == {
        "tokens_per_second", "time_to_first_token_seconds", "fast_peak_bytes", "tokens_per_round",
        "levels_per_round", "draft_seconds", "verify_seconds", "stream_seconds", "compute_seconds",
        "decode_seconds", "streamed_bytes", "digest_seconds", "plain_tokens_per_second",
    }  # fmt: skip
    assert {*found["full_context"], "plain_tokens_per_second"} == set(found["predicted"])
    assert found["disk_bytes"] > 0 and found["host_ledger"] is None


def test_the_json_object_tells_acceptance_and_the_outlook() -> None:
    plan = explored(make_plan(acceptance=MEASURED))
    found = json.loads(json.dumps(plan_json(SPEC, plan, None), allow_nan=False))
    tokens, margin = expected(plan)
    assert found["acceptance"] == {
        "measured": True, "answers": 15, "tokens_per_round": tokens, "margin": margin
    }  # fmt: skip
    assert found["decisions"]["verify_widths"] == list(plan.verify_widths)
    assert found["predicted"]["levels_per_round"] <= plan.tree.depth
    own = {
        "budget_bytes": 12_000_000,
        "context": 256,
        "method": "substitute",
        "tokens_per_second": plan.predicted["substitute"].tokens_per_second,
        "full_tokens_per_second": found["full_context"]["tokens_per_second"],
    }
    assert own in found["by_budget"] and own in found["by_context"]
    assert len(found["by_budget"]) == len(plan.by_budget)


def test_one_answer_is_an_answer() -> None:
    curve = replace(make_curve(1, 0.9), num_answers=1)
    plan = search(
        SPEC, make_profile(), 12_000_000, Constraints(context=256, width=1),
        Acceptance((curve,), measured=True),
    )  # fmt: skip
    assert "measured on 1 answer\n" in render_readme(SPEC, plan).replace(" |\n", "\n")


def test_nothing_is_claimed_of_acceptance_that_was_not_measured() -> None:
    found = json.loads(json.dumps(plan_json(SPEC, make_plan(acceptance=PRIOR), None)))
    assert (found["acceptance"]["measured"], found["acceptance"]["margin"]) == (False, None)
    assert found["acceptance"]["answers"] == 0
    assert found["by_budget"] == found["by_context"] == []


def test_a_dry_run_has_no_artifact() -> None:
    found = plan_json(SPEC, make_plan(BUDGETS["abstains"]), None)
    assert found["artifact"] is None
    assert found["decisions"]["method"] == "plain"
    assert found["decisions"]["streamed_bytes"] == 0
