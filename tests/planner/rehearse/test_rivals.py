"""What drafts by default is what is clearly the fastest on the same prompts."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PROFILE, build_artifact
from heads import eagle_checkpoints

from subspec.artifacts.format.checks import check_plan
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import Source
from subspec.artifacts.plan import Constraints, DrafterName
from subspec.planner.model.hub import DEMO, Resolved
from subspec.planner.planning import DraftModelRef, PlanRequest, plan_again
from subspec.planner.rehearse import learning, rivals
from subspec.planner.rehearse.calibration import Sample
from subspec.planner.rehearse.rehearsal import Setting
from subspec.planner.rehearse.rivals import (
    Speeds,
    fastest,
    memories,
    why_drafter,
    with_fastest_drafter,
)
from subspec.runtime.draft.beam import TokenTree
from subspec.runtime.draft.drafter import DecodeState, SubstituteDrafter
from subspec.runtime.engine import Engine, OpenOptions

SAMPLES = [Sample("code", f"def read_{name}(path):\n    ") for name in ("all", "one", "two", "few")]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


# Figures


def speeds(**by_name: list[float]) -> Speeds:
    names: dict[str, DrafterName] = {
        "substitute": "substitute",
        "head": "eagle",
        "both": "substitute+eagle",
    }
    return {names[name]: dict(enumerate(some)) for name, some in by_name.items()}


def test_the_fastest_of_several_that_are_clearly_faster_is_taken() -> None:
    found = fastest(
        "substitute",
        speeds(substitute=[10, 20, 5, 8], head=[12, 23, 6, 10], both=[15, 28, 8, 11]),
    )
    assert found is not None and found.drafter == "substitute+eagle"
    assert 1.3 < found.times_as_fast < 1.6


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ([10.4, 20.8, 5.2, 8.3], "4 % is too little"),
        ([9.0, 19.0, 4.9, 8.0], "it is slower"),
        ([20.0, 14.0, 9.0, 6.0], "now faster, now slower"),
        ([20.0, 40.0], "two prompts say nothing of an error"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_drafter_is_not_taken_where_it_is_not_clearly_faster(
    others: list[float], why: str
) -> None:
    assert fastest("substitute", speeds(substitute=[10, 20, 5, 8], head=others)) is None, why


def test_only_prompts_that_both_have_answered_are_compared() -> None:
    found = speeds(substitute=[10, 10, 10, 10], head=[12, 12, 12])
    found["eagle"] |= {7: 900.0}
    best = fastest("substitute", found)
    assert best is not None and best.times_as_fast == pytest.approx(1.2)


def test_the_reason_names_every_speed_and_who_drafts() -> None:
    found = speeds(substitute=[10, 10, 10], head=[12, 12, 12])
    told = why_drafter("substitute", found, fastest("substitute", found))
    assert told == (
        "measured tokens/s by drafter on the same 3 prompts: eagle 12.00, substitute 10.00; the "
        "default is eagle, 1.20 times as fast as substitute"
    )
    assert why_drafter("substitute", found, None).endswith(
        "the default is substitute, no other one is clearly faster"
    )


# Engines


@pytest.fixture(scope="module")
def with_head(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Its head is nearly always right."""
    folder = tmp_path_factory.mktemp("rivals")
    source, head = eagle_checkpoints(folder, torch.bfloat16, foreseen=True)
    return build_artifact(
        source, folder / "artifact", draft_head=head, width=2, depth=4, drafts_with_head=True
    )


@pytest.fixture(scope="module")
def with_draft_model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("drafted") / "artifact"
    other = DraftModelRef(Resolved(DEMO, Source("test/small")))
    return build_artifact(DEMO, out, draft_model=other, width=1, depth=3)


def chosen(artifact: Artifact) -> Artifact:
    plan = with_fastest_drafter(
        artifact, artifact.plan, SAMPLES, Setting(), lambda *_: None, seconds=1.6
    )
    check_plan(artifact.spec, artifact.stored_parts(), plan, artifact.draft_model is not None)
    return replace(artifact, plan=plan)


def faked(monkeypatch: pytest.MonkeyPatch, **by_name: float) -> list[str]:
    """Engines whose drafters give so many tokens a second, 10 unless it is said; who was asked."""
    asked, figures = list[str](), {name.replace("__", "+"): one for name, one in by_name.items()}

    def speed(engine: Engine, prompts: object, seconds: float) -> tuple[float, float]:
        assert engine.drafter is not None
        asked.append(engine.drafter)
        return figures.get(engine.drafter.replace("-", "_"), 10.0), 2.0

    monkeypatch.setattr(rivals, "speed_of_answers", speed)
    return asked


@pytest.mark.parametrize("drafter", ["eagle", "substitute+eagle", "substitute+lookup"])
def test_what_is_fastest_in_the_substitutes_memory_drafts_by_default(
    with_head: Artifact, monkeypatch: pytest.MonkeyPatch, drafter: DrafterName
) -> None:
    asked = faked(monkeypatch, **{drafter.replace("+", "__"): 12.0})
    found = chosen(with_head)
    assert set(asked) == {"substitute", "substitute+lookup", "eagle", "substitute+eagle"}
    assert (found.plan.method, found.plan.drafter) == ("substitute", drafter)
    assert found.plan.reasons[-1].endswith(
        f"the default is {drafter}, 1.20 times as fast as substitute"
    )
    for options, name in ((OpenOptions(), drafter), (OpenOptions("substitute"), "substitute")):
        with Engine.open(found, options) as engine:
            assert engine.drafter == name


def test_the_substitutes_draft_on_where_nothing_else_is_clearly_faster(
    with_head: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked(monkeypatch, eagle=10.4, substitute__lookup=8.0)
    found = chosen(with_head)
    assert found.plan.drafter is None
    assert found.plan.reasons[-1].endswith(
        "the default is substitute, no other one is clearly faster"
    )


def test_rivals_are_compared_with_what_drafts_in_the_plan(
    with_head: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up = replace(with_head, plan=replace(with_head.plan, drafter="substitute+lookup"))
    for figure, drafter in ((12.0, "substitute+lookup"), (9.0, "substitute")):
        faked(monkeypatch, substitute__lookup=figure, substitute=10.1)
        assert chosen(looked_up).plan.drafter == drafter


@pytest.mark.parametrize("drafter", ["draft-model", "substitute+draft-model"])
def test_a_draft_model_becomes_the_method_where_it_is_faster(
    with_draft_model: Artifact, monkeypatch: pytest.MonkeyPatch, drafter: DrafterName
) -> None:
    plan = with_draft_model.plan
    every = {"substitute", "draft-model", "substitute+draft-model"}
    assert set(memories(with_draft_model, plan)) == every
    asked = faked(monkeypatch, **{drafter.replace("+", "__").replace("-", "_"): 12.0})
    found = chosen(with_draft_model)
    assert (found.plan.method, found.plan.drafter) == (drafter, drafter)
    assert set(asked) == {*every, "substitute+lookup"}
    faked(monkeypatch, substitute=12.0)
    assert chosen(found).plan.method == "substitute"


def test_a_head_drafts_by_default_where_rounds_show_that_it_is_faster(
    with_head: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The substitutes' rounds take many times as long."""
    real = SubstituteDrafter.draft

    def slow(self: SubstituteDrafter, states: Sequence[DecodeState]) -> list[TokenTree]:
        time.sleep(0.2)
        return real(self, states)

    monkeypatch.setattr(SubstituteDrafter, "draft", slow)
    assert chosen(with_head).plan.drafter == "eagle"


def test_nothing_is_compared_where_there_is_nothing_else(
    with_head: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "open", lambda *_: pytest.fail("an engine was opened"))
    demo = build_artifact(DEMO, tmp_path / "artifact")
    assert chosen(demo).plan == demo.plan
    plain = replace(with_head, plan=replace(with_head.plan, method="plain"))
    assert chosen(plain).plan == plain.plan


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"width": 1},
        pytest.param({"method": "substitute"}, marks=pytest.mark.slow),
        pytest.param({"depth": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_rehearsal_compares_unless_it_was_asked_for_something(
    with_head: Artifact, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    monkeypatch.setattr(
        learning, "with_fastest_drafter", lambda artifact, plan, *_: replace(plan, drafter="eagle")
    )
    request = PlanRequest(
        2 * with_head.plan.budget_bytes, Constraints(draft_head=True, **asked), "cpu",
        known_profile=PROFILE, samples=tuple(SAMPLES), rehearse=2.0,
    )  # fmt: skip
    plan = plan_again(request, with_head, with_head.path, sweeps=False).plan
    assert (plan.drafter == "eagle") == (not asked)
