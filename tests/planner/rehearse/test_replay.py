"""Trees over known answers are judged as real ones are."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from builders import replan
from rehearsing import PROMPT, Stage, on_stage

from subspec.artifacts.acceptance import Acceptance, Curve
from subspec.artifacts.format.checks import check_plan
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Tree
from subspec.planner.rehearse.replay import (
    WIDEST_EVERY,
    WIDTHS,
    Counts,
    Trees,
    acceptance_of,
)
from subspec.planner.solve.problem import make_tree
from subspec.runtime.decode import exact_logits
from subspec.runtime.draft.beam import Level, grow, probability, stops
from subspec.runtime.text.tokenizer import load_tokenizer
from subspec.runtime.verify import accept


def places(stage: Stage, most_known: int) -> Iterator[tuple[int, ...]]:
    """From where a tree may grow, with the cache as it was there: its root and what follows, of two
    answers. The draft is less sure of the second."""
    text = load_tokenizer(stage.engine.artifact.path / "tokenizer")
    for prompt in (PROMPT, text.plain_ids("def read(path):\n    ")):
        known = stage.decode(prompt).tokens
        for start in range(len(known) - 2, len(prompt) - 1, -1):
            stage.cache.roll_back(start)
            yield known[start : start + 1 + most_known]


# Trees over a known answer


@pytest.mark.parametrize("width", WIDTHS)
def test_a_tree_is_judged_as_the_exact_weights_accept_it(width: int, demo: Artifact) -> None:
    """The same tree, grown, verified and accepted by what decoding does, from every place."""
    depth, found = 5, list[tuple[int, int]]()
    with on_stage(demo) as stage:
        for known in places(stage, depth):
            if len(known) <= depth:
                continue
            root, num_rows = torch.tensor([known[0]]), demo.plan.verify_width
            draft_pass = stage.drafter.draft_pass([stage.cache], num_rows)
            [tree] = grow([root], [depth], make_tree(width, depth), num_rows, draft_pass)
            [logits] = exact_logits(stage.engine.model, [tree], [stage.cache])
            emitted = accept(tree, logits.argmax(-1), depth).emitted()
            assert [*known[1:]][: len(emitted)] == emitted[:depth]
            judged = stage.judge(known, width)
            assert judged == (len(emitted) - 1, min(len(emitted), depth))
            found.append(judged)
    assert len(set(found)) > 1, "trees of one kind prove little"


def test_the_probability_of_a_level_is_that_of_all_its_paths() -> None:
    """0.5 and 0.25 are 0.75, and it is not less than that."""
    level = Level(torch.tensor([1, 2]), torch.tensor([0.5, 0.25]).log())
    assert probability(level) == pytest.approx(0.75)
    assert stops(Tree(2, 9, min_path_probability=0.76), level)
    assert not stops(Tree(2, 9, min_path_probability=0.74), level)
    assert not stops(Tree(2, 9), Level(torch.tensor([1]), torch.tensor([-1e9])))


def test_rounds_of_the_plan_are_judged_as_they_went(demo: Artifact) -> None:
    depth = demo.plan.tree.depth
    with on_stage(demo) as stage:
        answer = stage.decode(PROMPT, 80)
        lengths = stage.sequence.stats.accepted
        assert len(answer.starts) == len(lengths) > 12
        for start, number in reversed(list(zip(answer.starts, lengths, strict=True))):
            stage.cache.roll_back(start)
            accepted, _ = stage.judge(answer.tokens[start : start + depth + 1], 3)
            assert accepted == number


def test_what_follows_the_end_of_the_answer_is_not_tried(demo: Artifact) -> None:
    with on_stage(demo) as stage:
        known = stage.decode(PROMPT).tokens
        for start in range(len(known) - 1, len(PROMPT), -1):
            stage.cache.roll_back(start)
            accepted, tried = stage.judge(known[start:], 3)
            assert accepted <= tried <= min(accepted + 1, len(known) - 1 - start)
            if start == len(known) - 1:
                assert tried == 0


def test_a_tree_is_no_deeper_than_the_cache_has_room_for(demo: Artifact) -> None:
    """The last slot belongs to padding; a level of trees 3 wide needs three more."""
    with on_stage(replan(demo, width=1, depth=7, context=55)) as stage:
        cache = stage.cache
        assert cache.padding_slot == 63
        cache.commit([5] * 60)
        known = [5] * 10
        assert stage.judge(known, 3) == (0, 0)
        assert 1 <= stage.judge(known, 1)[1] <= 2
        cache.roll_back(59)
        assert stage.judge(known, 3)[1] == 1
        assert stage.judge(known, 8) == (0, 0)


def test_a_session_goes_on_after_its_trees_were_replayed(demo: Artifact) -> None:
    with on_stage(demo) as stage:
        expected = stage.answer(PROMPT, 40)
    trees: Trees = {}
    with on_stage(demo) as stage:
        for _ in range(2):
            answer = stage.decode(PROMPT)
            assert list(answer.tokens[len(PROMPT) :])[:40] == expected
            stage.replay(answer, "code", trees)
        once = {key: counts.tried[0] // 2 for key, counts in trees.items()}
        every, third = len(answer.starts), -(-len(answer.starts) // WIDEST_EVERY)
        assert once == {(1, "code"): every, (3, "code"): every, (8, "code"): third}
    with on_stage(demo) as stage:
        answer = stage.decode(PROMPT)
        stage.replay(answer, "code", trees)
        assert stage.answer(PROMPT, 40) == expected


# Counts


def test_counts_of_a_tree_end_with_the_first_level_that_failed() -> None:
    counts = Counts()
    for judged in ((3, 4), (0, 1), (2, 2), (0, 0)):
        counts.add(*judged)
    curve = counts.curve(3, "code")
    assert (curve.tried, curve.accepted) == ((3, 2, 1, 1), (2, 2, 1, 0))
    assert Counts().curve(1, "").tried == ()


def counted(*judged: tuple[int, int]) -> Counts:
    counts = Counts()
    for one in judged:
        counts.add(*one)
    return counts


def test_counts_pass_the_readers_check(demo: Artifact) -> None:
    trees: Trees = {
        (width, kind): counted((3, 4), (0, 1), (2, 2))
        for kind in ("prose", "code")
        for width in WIDTHS
    }
    found = acceptance_of(trees)
    assert found is not None and found.measured and len(found.curves) == 2 * len(WIDTHS)
    check_plan(demo.spec, demo.stored_parts(), replace(demo.plan, acceptance=found))


def test_without_a_tree_that_was_tried_there_is_no_acceptance() -> None:
    nothing: Trees = {(1, "code"): counted((0, 0)), (3, "code"): Counts()}
    assert acceptance_of({}) is None and acceptance_of(nothing) is None
    found = acceptance_of({**nothing, (8, "code"): counted((1, 2))})
    assert found == Acceptance((Curve(8, "code", (1, 1), (1, 0)),), measured=True)
