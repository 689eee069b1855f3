"""A rehearsal: of what it decodes trees are judged, and its rounds are timed as they are."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from builders import PROFILE, build_artifact, random_checkpoint, replan
from rehearsing import LONG, PROMPT, SAID, on_stage, said
from transformers import Qwen2Config

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.format.checks import check_plan
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Method, Placement, Prediction, Usage
from subspec.planner.rehearse.calibration import Sample, shipped_samples
from subspec.planner.rehearse.rehearsal import (
    USUAL_EFFORT,
    Effort,
    Rehearsal,
    Setting,
    decode,
    rehearse,
)
from subspec.planner.rehearse.replay import DEEPEST, WIDTHS, Trees
from subspec.planner.solve.outlook import predict_for
from subspec.planner.solve.storage import Storage
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.text.tokenizer import load_tokenizer

CODE_TEXT = "def read(path):\n    "
CODE = [
    Sample("code", CODE_TEXT),
    Sample("code", "import json\n\n\nclass Config:\n"),
]
PROSE = [Sample("prose", "The first house on the left was built in")]


BRIEF = Effort(num_tokens=40)


def rehearsed(artifact: Artifact, samples: Sequence[Sample], effort: Effort = BRIEF) -> Rehearsal:
    return rehearse(artifact, artifact.plan, said, samples, Setting(), lambda *_: None, effort)


# Acceptance


@pytest.fixture(scope="module")
def both(demo: Artifact) -> Rehearsal:
    torch.set_num_threads(1)
    return rehearsed(demo, [*CODE, *PROSE])


def measured(rehearsal: Rehearsal) -> Acceptance:
    assert rehearsal.acceptance is not None and rehearsal.acceptance.measured
    return rehearsal.acceptance


def test_no_level_is_tried_more_often_than_the_one_above_it_was_accepted(
    demo: Artifact, both: Rehearsal
) -> None:
    curves = measured(both).curves
    assert [(c.width, c.kind) for c in curves] == [
        (width, kind) for width in WIDTHS for kind in ("code", "prose")
    ]
    for curve in curves:
        assert 1 <= len(curve.tried) == len(curve.accepted) <= DEEPEST
        assert all(a <= t for a, t in zip(curve.accepted, curve.tried, strict=True))
        assert all(t <= a for t, a in zip(curve.tried[1:], curve.accepted, strict=False))
    check_plan(demo.spec, demo.stored_parts(), replace(demo.plan, acceptance=measured(both)))


def test_kinds_are_kept_apart(demo: Artifact, both: Rehearsal) -> None:
    for kind, samples in (("code", CODE), ("prose", PROSE)):
        alone = measured(rehearsed(demo, samples)).curves
        assert alone == tuple(c for c in measured(both).curves if c.kind == kind)


def test_the_draft_of_the_demo_is_mostly_accepted_and_more_so_if_it_is_wider(
    both: Rehearsal,
) -> None:
    found = measured(both)
    tokens = [found.tokens(width, 8) for width in WIDTHS]
    assert 2.5 < tokens[0] < tokens[1] < tokens[2] < 9


def test_the_draft_of_random_weights_is_seldom_accepted(tmp_path: Path) -> None:
    config = Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=2048, tie_word_embeddings=False, eos_token_id=2,
    )  # fmt: skip
    source = random_checkpoint(tmp_path / "checkpoint", config)
    artifact = build_artifact(source, tmp_path / "artifact", resident_share=1.0)
    assert measured(rehearsed(artifact, CODE)).reached(1, 1)[0] < 0.9


# What can come in the way


def test_an_answer_that_ends_at_once_teaches_nothing(demo: Artifact) -> None:
    with on_stage(demo) as stage:
        [first] = stage.answer([*range(5, 25)], 1)
    brief = replace(demo, spec=replace(demo.spec, eos_token_ids=(first,)))
    with on_stage(brief) as stage:
        answer = stage.decode([*range(5, 25)])
        assert answer.tokens == (*range(5, 25), first) and answer.starts == ()
        trees: Trees = {}
        stage.replay(answer, "code", trees)
        assert trees == {}
    assert all(timed.actual == () for timed in (*answer.rounds.draft, *answer.rounds.verify))


@pytest.mark.parametrize("context", [16, 40])
def test_a_context_that_ends_the_answers_early_is_enough(context: int, demo: Artifact) -> None:
    small = replan(demo, width=3, depth=5, context=context)
    for curve in measured(rehearsed(small, CODE)).curves:
        assert len(curve.tried) < context - context // 2


def test_a_slow_machine_is_asked_for_one_round_only(demo: Artifact) -> None:
    found = rehearsed(demo, [*CODE, *PROSE], Effort(draft_seconds=0.0, plain_seconds=0.0))
    assert measured(found).kinds == ("code",)
    assert all(curve.tried[0] == 1 for curve in measured(found).curves)
    assert [len(timed.actual) for timed in found.rounds.verify] == [0]


def test_a_plan_without_a_draft_is_timed_and_nothing_is_judged(demo: Artifact) -> None:
    without_draft: dict[Method, Placement] = {"plain": demo.plan.placement("plain")}
    plain = replace(demo, plan=replace(demo.plan, method="plain", placements=without_draft))
    found = rehearsed(plain, CODE)
    assert found.acceptance is None
    assert found.rounds.draft == found.rounds.verify == ()
    [timed] = found.rounds.plain
    # Less the prompt's, and a round that warms.
    assert len(timed.actual) == USUAL_EFFORT.plain_tokens - 2


# Times


def test_every_round_but_an_answers_first_is_timed(demo: Artifact) -> None:
    asked = list[tuple[Method, Usage]]()

    def ask(method: Method, usage: Usage) -> Prediction:
        asked.append((method, usage))
        return replace(SAID, verify_seconds=0.001 * usage.prompt_tokens)

    with on_stage(demo) as stage:
        own = stage.engine, stage.sequence
        first, second = (decode(*own, PROMPT[:n], 20, ask, LONG) for n in (30, 10))
        stats = stage.sequence.stats
    assert [(method, usage.prompt_tokens) for method, usage in asked] == [
        ("substitute", 30), ("substitute", 10),
    ]  # fmt: skip
    assert all(20 <= usage.answer_tokens <= 25 for _, usage in asked)
    [draft], [verify] = second.rounds.draft, second.rounds.verify
    assert (draft.predicted, verify.predicted) == (SAID.draft_seconds, 0.01)
    assert len(draft.actual) == len(verify.actual) == len(second.starts) - 1
    assert min(*draft.actual, *verify.actual) > 0
    assert sum(verify.actual) < stats.verify_seconds
    # The first answer of an engine waits for digests, which no run of a user does twice.
    assert first.rounds.prompt == ()
    assert [timed.actual for timed in second.rounds.prompt] == [
        (stats.time_to_first_token_seconds,)
    ]


def test_the_drafts_of_rounds_count_as_if_each_had_drafted_a_whole_tree(
    demo: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds of a plan that ends early draft more levels and fewer."""
    passed = list[tuple[float, int]]()
    early = replan(demo, width=3, depth=5, verify_width=48, min_path_probability=0.97)
    prompt = load_tokenizer(demo.path / "tokenizer").plain_ids(CODE_TEXT)

    with on_stage(early) as stage:
        generate = stage.sequence.generate

        def watched(tokens: list[int], params: GenerationParams) -> Iterator[list[int]]:
            for emitted in generate(tokens, params):
                stats = stage.sequence.stats
                passed.append((stats.draft_seconds, stats.drafted_levels))
                yield emitted

        monkeypatch.setattr(stage.sequence, "generate", watched)
        answer = stage.decode(prompt, 40)
    rounds = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(passed)][1:]
    assert len({levels for _, levels in rounds}) > 1, "all rounds drafted alike"
    [draft] = answer.rounds.draft
    assert draft.predicted == SAID.draft_seconds
    assert draft.actual == pytest.approx([seconds * 5 / levels for seconds, levels in rounds])


def test_a_slower_link_is_rehearsed_at_its_speed(demo: Artifact) -> None:
    streams = replan(demo, width=3, depth=5, resident_share=0.0)
    storage = Storage(tuple(demo.stored_parts()))

    def promised(method: Method, usage: Usage) -> Prediction:
        return predict_for(demo.spec, PROFILE, streams.plan, storage, method, usage)

    found = rehearse(
        streams,
        streams.plan,
        promised,
        CODE[:1],
        Setting(link_bandwidth=100e6),
        lambda *_: None,
        BRIEF,
    )
    [timed] = found.rounds.plain
    assert timed.predicted > 0
    assert min(timed.actual) > 0.8 * storage.num_bytes / 100e6


def test_the_shipped_prompts_take_turns_until_time_is_up(demo: Artifact) -> None:
    effort = Effort(draft_seconds=1.0, num_tokens=4, tree_widths=(1,))
    stages = list[tuple[str, float]]()
    found = rehearse(
        demo, demo.plan, said, shipped_samples(), Setting(), lambda *s: stages.append(s), effort
    )
    assert {name for name, _ in stages} == {"rehearsing the plan"}
    shares = [share for _, share in stages]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0.0, 1.0)
    assert set(measured(found).kinds) <= {sample.kind for sample in shipped_samples()}
