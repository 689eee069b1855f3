"""Planning as a library: it takes a request, says nothing, and returns what it found."""

from dataclasses import replace
from pathlib import Path

import pytest
from builders import PROFILE, build_artifact

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import open_artifact, verify
from subspec.artifacts.plan import Constraints
from subspec.planner.machine.measure import machine_name
from subspec.planner.model.hub import DEMO, resolve
from subspec.planner.planning import PlanRequest, plan_again, plan_dry, plan_from_runs, plan_model

REQUEST = PlanRequest(9_000_000, Constraints(context=200), known_profile=PROFILE)


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


def test_runs_of_another_plan_teach_nothing(tmp_path: Path) -> None:
    artifact = build_artifact(DEMO, tmp_path / "artifact", width=2, depth=3, resident_share=0.5)
    here = replace(artifact.profile, machine=machine_name("cpu"))
    request = replace(REQUEST, known_profile=None, device="cpu")
    with pytest.raises(SubspecError, match="no record of a run of its plan") as caught:
        plan_from_runs(request, replace(artifact, profile=here), artifact.path)
    assert caught.value.exit_code == Exit.USAGE
