"""What --stats says: which answers count, their figures against the plan's, and the hint."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from run_records import MACHINE, PLAN, make_run
from toys import make_profile, make_spec

from subspec.artifacts.format.store import Artifact, Manifest
from subspec.artifacts.plan import Tree
from subspec.artifacts.runs import Run, append_run, plan_digest
from subspec.runtime.app.history import (
    Figure,
    answers_of,
    hint_of,
    history_json,
    history_lines,
    level_rows,
    report,
    summary,
)

COMMANDS = (Path(__file__).parents[3] / "docs" / "commands.md").read_text("utf-8")
PLAIN = make_run(
    method="plain",
    drafted=(),
    accepted=(10,),
    draft_seconds=0.0,
    verify_seconds=1.25,
    fast_peak_bytes=7_000_000,
    predicted_tokens_per_second=8.0,
    padded=False,
)
TWIN = replace(PLAIN, padded=True, predicted_tokens_per_second=None)


def speeds(*tokens_per_second: float) -> list[Run]:
    """Answers of 10 tokens after the first."""
    return [make_run(draft_seconds=0.0, verify_seconds=10 / speed) for speed in tokens_per_second]


# Which answers count


def test_other_plans_other_machines_and_slower_links_are_only_counted() -> None:
    others = [
        make_run(plan="0" * 64),
        make_run(plan="0" * 64, machine="another"),
        make_run(machine="another"),
        make_run(link_bandwidth=50_000_000),
    ]
    found = summary(PLAN, [make_run(), *others])
    assert [way.answers for way in found.ways] == [1]
    assert found.left_out == {"other_plan": 2, "other_machine": 1, "slower_link": 1}
    lines = history_lines(found, PLAN, "a")
    assert lines[-1] == (
        "not counted: 2 answers under another plan, 1 answer on another machine, "
        "1 answer over a slower link"
    )


def test_a_link_as_slow_as_the_plan_counts_on_is_no_slower_one() -> None:
    slowed = make_run(link_bandwidth=100_000_000)
    assert summary(PLAN, [slowed]).ways[0].answers == 1
    unpredicted = replace(PLAN, predicted={})
    run = make_run(plan=plan_digest(unpredicted), link_bandwidth=1)
    assert summary(unpredicted, [run]).ways[0].answers == 1


def test_each_way_of_decoding_is_its_own_and_the_plans_comes_first() -> None:
    ways = summary(PLAN, [TWIN, PLAIN, make_run(), TWIN]).ways
    assert [(way.method, way.padded, way.answers) for way in ways] == [
        ("substitute", True, 1),
        ("plain", False, 1),
        ("plain", True, 2),
    ]
    assert ways[2].tokens_per_second.predicted is None and ways[2].levels == ()


# Figures


def test_the_median_is_held_against_the_prediction() -> None:
    way = answers_of(PLAN, speeds(10, 18, 40))
    assert way.tokens_per_second == Figure(pytest.approx(18), 10, 40, 20.0)
    assert way.tokens_per_second.drift == pytest.approx(-0.1)
    assert Figure(1, 1, 1, None).drift is None


def test_a_sessions_first_token_counts_only_where_there_is_no_other() -> None:
    first = make_run(includes_digest_check=True, first_token_seconds=9.0)
    both = answers_of(PLAN, [first, make_run(first_token_seconds=0.25)])
    assert both.first_token_seconds.highest == 0.25 and not both.digests_checked
    alone = answers_of(PLAN, [first])
    assert alone.first_token_seconds.median == 9.0 and alone.digests_checked


def test_a_level_is_accepted_by_a_share_of_all_rounds_whether_they_drafted_it_or_not() -> None:
    """10 rounds each: 8 accept the first level, 3 of the 6 that draft it the second; the other run
    accepts nothing."""
    run = make_run(drafted=(10, 6, 0), accepted=(2, 5, 3))
    levels = answers_of(PLAN, [run]).levels
    assert [(one.drafted, one.accepted) for one in levels] == [(10, 8), (6, 3), (0, 0)]
    assert [one.reached for one in levels] == [0.8, 0.3, 0.0]
    assert [one.expected for one in levels] == list(PLAN.acceptance.acceptance_rates(Tree(2, 3)))
    more = answers_of(PLAN, [run, make_run(drafted=(10, 0, 0), accepted=(10,))]).levels
    assert [(one.drafted, one.reached) for one in more] == [(20, 0.4), (6, 0.15), (0, 0.0)]


def test_predictions_are_those_of_drafts_that_end_as_the_plans_do() -> None:
    [whole] = PLAN.acceptance.curves
    early = replace(
        whole, min_path_probability=0.3, drafted=(980, 700, 350), accepted=(784, 490, 98)
    )
    plan = replace(
        PLAN,
        tree=replace(PLAN.tree, min_path_probability=0.4),
        acceptance=replace(PLAN.acceptance, curves=(whole, early)),
    )
    way = answers_of(plan, [make_run()])
    assert [one.expected for one in way.levels] == pytest.approx([0.8, 0.5, 0.1])
    assert way.tokens_per_round.predicted == pytest.approx(2.4)


def test_of_a_deep_draft_few_levels_are_shown_the_deepest_among_them() -> None:
    for depth, shown in ((1, [1]), (3, [1, 2, 3]), (21, [1, 2, 4, 8, 16, 21]), (8, [1, 2, 4, 8])):
        plan = replace(PLAN, tree=Tree(1, depth))
        rows = level_rows(answers_of(plan, [make_run()]).levels)
        assert [int(row[0]) for row in rows[1:]] == shown


# The hint


@pytest.mark.parametrize(
    ("tokens_per_second", "hinted"),
    [
        ([17.9] * 5, True),
        ([22.1] * 5, True),
        ([18.1] * 5, False),
        ([10.0] * 4, False),
        ([10.0, 10.0, 19.0, 30.0, 30.0], False),  # the median is what counts
    ],
)
def test_a_hint_needs_five_answers_that_are_off(
    tokens_per_second: list[float], hinted: bool
) -> None:
    said = hint_of(summary(PLAN, speeds(*tokens_per_second)), "folder")
    assert said == (
        "subspec-plan --calibrate folder updates the plan with these runs" if hinted else None
    )


def test_what_no_speed_is_predicted_for_is_not_off() -> None:
    assert hint_of(summary(PLAN, [TWIN] * 9), "folder") is None


# What is printed

SHOWN = """\
a: budget 9.00 MB, planned on cpu: a toy, 2 cpus

speculative decoding, width 2, depth 3: 2 answers, 22 tokens
                     median   lowest  highest  predicted  difference
  tokens/s             16.0     16.0     16.0       20.0        -20%
  tokens per round     2.50     2.50     2.50       2.70         -7%
  first token        500 ms   500 ms   500 ms     500 ms         +0%
  peak memory       7.50 MB  7.50 MB  7.50 MB    8.00 MB         -6%
  predicted for 128 tokens of prompt and 256 of answer; the medians here are 24 and 11

acceptance by draft level, predicted from measurements
  level  drafted  accepted to here  predicted
  1            8               75%        80%
  2            8               50%        60%
  3            8               50%        30%

plain decoding, padded: 1 answer, 11 tokens
                median   lowest  highest  predicted  difference
  tokens/s        8.00     8.00     8.00          -           -
  first token   500 ms   500 ms   500 ms     500 ms         +0%
  peak memory  7.00 MB  7.00 MB  7.00 MB    8.00 MB        -12%
"""


def test_the_table_has_literal_text() -> None:
    lines = history_lines(summary(PLAN, [make_run(), TWIN, make_run()]), PLAN, "a")
    assert "\n".join(lines) + "\n" == SHOWN


def test_published_figures_are_called_so() -> None:
    plan = replace(PLAN, acceptance=replace(PLAN.acceptance, measured=False))
    lines = history_lines(summary(plan, [make_run(plan=plan_digest(plan))]), plan, "a")
    assert "acceptance by draft level, predicted from published figures" in lines


def test_no_answers_are_one_sentence() -> None:
    found = "no answers are recorded under the current plan of a"
    first = f'{found}: run it first: subspec-run a "your prompt"'
    assert history_lines(summary(PLAN, []), PLAN, "a") == [first]
    assert history_lines(summary(PLAN, [make_run(plan="0" * 64)]), PLAN, "a") == [
        f"{found}; not counted: 1 answer under another plan"
    ]


def test_a_plan_whose_head_drafts_names_the_drafter_whose_answers_are_recorded() -> None:
    plan = replace(PLAN, method="substitute", drafter="eagle3")
    [line] = history_lines(summary(plan, []), plan, "my artifact")
    assert line.endswith("subspec-run 'my artifact' --drafter substitute \"your prompt\"")


def keys(value: object, path: str = "") -> set[str]:
    """Every key of nested objects, with its path; of a list, those of its first item."""
    if isinstance(value, list):
        return keys(value[0], path) if value else set()
    if not isinstance(value, dict):
        return set()
    return {f"{path}.{k}" for k in value}.union(*(keys(v, f"{path}.{k}") for k, v in value.items()))


def test_the_json_object_has_the_documented_keys() -> None:
    [text] = [t.split("```")[0] for t in COMMANDS.split("```json\n") if "subspec.stats/1" in t]
    documented = json.loads(text)
    [method] = documented["methods"]
    for name in re.findall(r'"(\w+)": {}', text):
        method[name] = method["tokens_per_second"]
    printed = json.dumps(history_json(summary(PLAN, [make_run()]), None))
    assert keys(json.loads(printed)) == keys(documented)


def test_the_report_is_on_stdout_and_steers_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = replace(PLAN, machine=f"{MACHINE}\x1b]0;")
    manifest = Manifest("2.0", "", (), (), ())
    artifact = Artifact(tmp_path, manifest, make_spec(), plan, make_profile())
    for run in speeds(10, 10, 10, 10, 10):
        append_run(tmp_path, replace(run, plan=plan_digest(plan), machine=plan.machine))
    report(artifact, as_json=False)
    shown = capsys.readouterr()
    assert shown.err == "" and "\x1b" not in shown.out
    last = f"hint: subspec-plan --calibrate {tmp_path} updates the plan with these runs"
    assert shown.out.splitlines()[-1] == last
    report(artifact, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["methods"][0]["answers"] == 5 and found["hint"].startswith("subspec-plan")
