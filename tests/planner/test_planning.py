"""Planning as a library: it takes a request, says nothing, and returns what it found."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import PROFILE, build_artifact
from heads import eagle_checkpoints
from toys import make_curve, make_profile, make_spec

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.common import host_memory
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.progress import unseen
from subspec.artifacts.format.store import open_artifact, verify
from subspec.artifacts.plan import Constraints, DraftHeadResult, Plan, Tree
from subspec.artifacts.profile import Profile
from subspec.planner import planning
from subspec.planner.machine import measure
from subspec.planner.machine.measure import machine_name
from subspec.planner.machine.timing import fast_memory_bytes
from subspec.planner.model.hub import DEMO, resolve
from subspec.planner.planning import (
    PlanRequest,
    plan_again,
    plan_dry,
    plan_from_runs,
    plan_model,
    with_known_drafter,
    within_memory,
)
from subspec.planner.rehearse import learning
from subspec.planner.rehearse.learning import calibration_plan, settles
from subspec.planner.rehearse.rehearsal import AT_ONCE, CONTEXT
from subspec.planner.rehearse.replay import MAX_DEPTH
from subspec.planner.solve.search import PRIOR
from subspec.planner.solve.storage import raw_storage
from subspec.planner.solving import (
    PlanInputs,
    inputs_from_artifact,
    notify_if_under_load,
    with_load,
)

REQUEST = PlanRequest(9_000_000, Constraints(context=200, width=2), known_profile=PROFILE)


def test_a_plan_for_another_machine_needs_neither_files_nor_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = list[str]()
    found = plan_dry(
        REQUEST, resolve("demo"), tmp_path / "out", lambda stage, _: stages.append(stage)
    )
    assert (found.plan.budget_bytes, found.plan.context) == (9_000_000, 200)
    assert found.profile == PROFILE and found.spec.num_layers > 0
    assert {point.budget_bytes for point in found.plan.by_budget} > {9_000_000}
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_what_a_config_asks_for_and_is_not_done_is_told_by_a_dry_run_too(tmp_path: Path) -> None:
    told = list[str]()
    config = json.loads((DEMO / "config.json").read_text())
    config["rope_parameters"] = {**config["rope_parameters"], "attn_factor": 0.88}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan_dry(REQUEST, resolve(str(tmp_path)), tmp_path / "out", notify=told.append)
    assert "attn_factor 0.88" in told[0] and told[0].startswith("note: config.json")


def test_a_model_becomes_an_artifact_whose_plan_is_returned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for encoding in ("raw", "residual"):
        out, fixed = tmp_path / encoding, replace(REQUEST.constraints, encoding=encoding)
        found = plan_model(replace(REQUEST, constraints=fixed), resolve("demo"), out)
        verify(out)
        assert open_artifact(out).plan == found.plan
        assert open_artifact(out).profile == found.profile == PROFILE
    assert capsys.readouterr() == ("", "")


def test_the_end_of_a_turn_ends_an_answer_that_the_configs_would_let_run_on(
    tmp_path: Path,
) -> None:
    """As in Qwen3.5-9B, whose config ends only documents."""
    told = list[str]()
    folder = shutil.copytree(DEMO, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    found = plan_model(REQUEST, resolve(str(folder)), tmp_path / "chat", notify=told.append)
    assert found.spec.eos_token_ids == (0, 2) == open_artifact(tmp_path / "chat").spec.eos_token_ids
    assert [one for one in told if "'<|im_end|>'" in one and "id 2" in one]
    (folder / "chat_template.jinja").unlink()  # nobody speaks in turns
    told.clear()
    base = plan_model(REQUEST, resolve(str(folder)), tmp_path / "base", notify=told.append)
    assert base.spec.eos_token_ids == (0,) and not [one for one in told if "im_end" in one]


def test_an_artifact_is_planned_again_and_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = build_artifact(DEMO, tmp_path / "artifact", width=2, depth=3, resident_share=0.5)
    before = (artifact.path / "plan.json").read_bytes()
    found = plan_again(REQUEST, artifact, artifact.path)
    assert found.plan.constraints == replace(REQUEST.constraints, encoding="kept")
    assert found.plan.acceptance == artifact.plan.acceptance and found.plan.by_budget
    bare = plan_again(REQUEST, artifact, artifact.path, sweeps=False).plan
    assert bare == replace(found.plan, by_budget=(), by_context=())
    assert (artifact.path / "plan.json").read_bytes() == before
    assert capsys.readouterr() == ("", "")


def test_every_constraint_survives_that_an_artifact_is_planned_again(tmp_path: Path) -> None:
    """What was asked for once is what a re-planning asks for; the weights stay as they are."""
    asked = Constraints(
        context=160, width=1, depth=3, method="substitute", ram_bytes=10**9, encoding="raw",
        min_path_probability=0.2, num_sequences=2, draft_head=True,
    )  # fmt: skip
    defaults = {name: getattr(Constraints(), name) for name in vars(asked)}
    assert all(value != defaults[name] for name, value in vars(asked).items()), "one is not tried"
    model, head = (
        resolve(str(one)) for one in eagle_checkpoints(tmp_path / "models", torch.bfloat16)
    )
    first = plan_model(
        replace(REQUEST, constraints=asked), model, tmp_path / "artifact", draft_head=head
    )
    assert first.plan.constraints == asked
    artifact = open_artifact(tmp_path / "artifact")
    assert artifact.plan == first.plan
    request = replace(REQUEST, budget_bytes=8_500_000, constraints=artifact.plan.constraints)
    again = plan_again(request, artifact, artifact.path, sweeps=False).plan
    assert again.constraints == replace(asked, encoding="kept")
    assert (again.context, again.num_sequences, again.method) == (160, 2, "substitute")
    assert (again.tree.width, again.tree.depth, again.tree.min_path_probability) == (1, 3, 0.2)
    assert again.budget_bytes == 8_500_000 and again.residuals == first.plan.residuals


def test_figures_that_other_programs_disturbed_are_told_and_kept(tmp_path: Path) -> None:
    quiet, busy = (replace(PROFILE, background_cpu_share=share) for share in (0.14, 0.43))
    told = list[str]()
    assert with_load(quiet, 0.1, told.append) == quiet and told == []
    notify_if_under_load(busy, told.append)
    assert with_load(busy, 0.6, told.append).background_cpu_share == 0.6
    assert len(told) == 1, "once"
    assert with_load(quiet, 0.43, told.append) == busy
    notify_if_under_load(replace(busy, device="cuda"), told.append)
    assert len(told) == 2 and told[0] == told[1]
    assert "used 43% of the CPUs" in told[0] and "--from ARTIFACT --reprofile" in told[0]
    artifact = build_artifact(DEMO, tmp_path / "artifact", width=2, depth=3, resident_share=0.5)
    here, request = machine_name("cpu"), replace(REQUEST, known_profile=None, device="cpu")
    for profile in (quiet, busy):
        stored = replace(artifact, profile=replace(profile, machine=here))
        found = plan_again(request, stored, artifact.path, sweeps=False, notify=told.append)
        assert found.profile == stored.profile
    assert told[2:] == told[:1]


def test_no_plan_is_for_more_memory_than_this_machine_has() -> None:
    said = list[str]()
    here = replace(REQUEST, budget_bytes=1 << 50, known_profile=None, device="cpu")
    most = fast_memory_bytes("cpu")
    assert within_memory(here, said.append) == replace(here, budget_bytes=most)
    assert len(said) == 1 and "is more than this machine's" in said[0]
    elsewhere = replace(here, known_profile=PROFILE)
    assert within_memory(elsewhere, said.append) == elsewhere and len(said) == 1


def test_a_budget_is_at_most_what_a_control_group_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "memories", lambda: [(1 << 36, 1 << 35), (1 << 32, 1 << 31)])
    here = replace(REQUEST, budget_bytes=1 << 33, known_profile=None, device="cpu")
    assert within_memory(here, lambda said: None).budget_bytes == 1 << 32


def test_a_plan_whose_threads_omp_num_threads_bounds_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "usable_cpus", lambda: 8)
    monkeypatch.setattr(measure, "measure", lambda *_, **__: PROFILE)
    said = list[str]()
    for value in (None, "2"):
        if value:
            monkeypatch.setenv("OMP_NUM_THREADS", value)
        else:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        here = replace(REQUEST, budget_bytes=1 << 20, known_profile=None, device="cpu")
        planning.measure_here(here, make_spec(), tmp_path, unseen, said.append)
        assert len(said) == (1 if value else 0)
    assert "OMP_NUM_THREADS bounds the plan's CPU threads: 2 on 8 CPUs" in said[0]


def test_what_a_rehearsal_found_of_who_drafts_stays_where_nothing_else_is_asked_for(
    tmp_path: Path,
) -> None:
    source, head = eagle_checkpoints(tmp_path, torch.bfloat16)
    built = build_artifact(
        source, tmp_path / "artifact", draft_head=head, width=2, depth=4, drafts_with_head=True
    )
    solved = replace(built.plan, constraints=Constraints(), drafter="substitute+lookup")
    before = replace(
        solved, drafter="eagle", draft_head_result=DraftHeadResult(Tree(1, 4), 10.0, 2.0)
    )
    assert with_known_drafter(solved, before) == before
    elsewhere = replace(solved, machine="another one")
    assert with_known_drafter(elsewhere, before) == elsewhere
    larger = with_known_drafter(replace(solved, budget_bytes=2 * solved.budget_bytes), before)
    assert larger.drafter == "eagle" and larger.draft_head_result == DraftHeadResult(
        Tree(1, 4), None, 2.0
    )
    for constraints in ({"method": "substitute"}, {"width": 2}, {"depth": 4}):
        asked = replace(solved, constraints=Constraints(**constraints), drafter=None)
        assert with_known_drafter(asked, before) == replace(
            asked, draft_head_result=before.draft_head_result
        )
    alone = replace(solved, drafter="substitute")
    assert with_known_drafter(solved, alone) == alone, "it was faster than with lookup"
    own = solved.placements["substitute"]
    headless = replace(own, ledger=replace(own.ledger, drafter=0, drafter_cache=0))
    without = replace(solved, placements={**solved.placements, "substitute": headless})
    assert with_known_drafter(without, before) == without
    small = replace(solved, verify_widths=(4,))
    assert with_known_drafter(small, before) == replace(small, drafter="eagle")
    plain = replace(solved, method="plain", drafter=None)
    assert with_known_drafter(plain, before).drafter is None


def test_runs_of_another_plan_teach_nothing(tmp_path: Path) -> None:
    artifact = build_artifact(DEMO, tmp_path / "artifact", width=2, depth=3, resident_share=0.5)
    here = replace(artifact.profile, machine=machine_name("cpu"))
    request = replace(REQUEST, known_profile=None, device="cpu")
    with pytest.raises(SubspecError, match="no record of a run of its plan") as caught:
        plan_from_runs(request, replace(artifact, profile=here), artifact.path)
    assert caught.value.exit_code == Exit.USAGE


# Rehearsals


def test_acceptance_is_learnt_on_as_many_answers_at_once_as_the_budget_has_room_for(
    tmp_path: Path,
) -> None:
    """Whatever the user's own plan is to be like; a verification fits the deepest tree."""
    artifact = build_artifact(DEMO, tmp_path / "artifact", width=2, depth=3)
    found = list[tuple[int, int]]()
    for budget_bytes in (6_900_000, 8_200_000, 9_500_000, 40_000_000):
        fixed = Constraints(context=4000, depth=2, method="plain", min_path_probability=0.4)
        request = PlanRequest(budget_bytes, fixed)
        plan = calibration_plan(inputs_from_artifact(request, artifact, PROFILE))
        assert plan is not None
        assert (plan.context, plan.method, plan.tree.depth) == (CONTEXT, "substitute", MAX_DEPTH)
        assert plan.tree.num_nodes <= plan.verify_width
        assert plan.placement("substitute").ledger.total_bytes <= budget_bytes
        found.append((plan.num_sequences, plan.tree.width))
    assert found == [(1, 1), (2, 1), (2, 2), (AT_ONCE[0], 2)]
    tiny = PlanRequest(2_000_000, Constraints())
    assert calibration_plan(inputs_from_artifact(tiny, artifact, PROFILE)) is None


def test_a_plan_is_settled_when_it_stays_the_best_and_its_tokens_are_known_well() -> None:
    spec, profile = make_spec(), make_profile()
    request = PlanRequest(12_000_000, Constraints(context=256))

    def known(rate: float, share: float) -> Acceptance:
        """A chain's acceptance; its margin as a share of a whole tree's tokens."""
        curve = make_curve(1, rate)
        tokens = Acceptance((curve,), measured=True).acceptance_length(Tree(1, 64))
        return Acceptance((replace(curve, margin=share * tokens),), measured=True)

    settled = settles(PlanInputs(request, spec, profile, PRIOR, raw_storage(spec)))
    assert not settled(known(0.9, 0.01)), "there is none before the first"
    assert settled(known(0.9, 0.01))
    assert not settled(known(0.9, 0.13)), "another answer may say something else"
    assert settled(known(0.9, 0.11))
    assert not settled(known(0.3, 0.01)), "the tree before is far too deep now"
    assert settled(known(0.3, 0.01))


def test_where_plain_decoding_stays_the_best_no_more_is_to_be_learnt() -> None:
    spec, profile = make_spec(), make_profile()
    request = PlanRequest(30_000_000, Constraints(context=256))
    settled = settles(PlanInputs(request, spec, profile, PRIOR, raw_storage(spec)))
    hopeless = Acceptance((make_curve(1, 0.01, margin=9.0),), measured=True)
    assert not settled(hopeless) and settled(hopeless)


def test_a_rehearsal_of_no_seconds_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = build_artifact(DEMO, tmp_path / "artifact", width=2, depth=3)
    asked = list[str]()

    def watched(*_: object) -> tuple[Plan, Profile]:
        asked.append("run")
        return artifact.plan, artifact.profile

    monkeypatch.setattr(learning, "rehearse", watched)
    request = replace(REQUEST, known_profile=None, device="cpu")
    for seconds, again in ((0.0, False), (None, False), (5.0, False), (0.0, True), (None, True)):
        measured = replace(artifact, profile=replace(PROFILE, machine=machine_name("cpu")))
        monkeypatch.setattr(planning, "measure_here", lambda *_: PROFILE)
        plan_again(replace(request, rehearse=seconds), measured, artifact.path, again)
        assert len(asked) == ((seconds or 0) > 0 or (seconds is None and again)), (seconds, again)
        asked.clear()
