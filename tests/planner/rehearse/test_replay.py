"""Trees along known answers are those that rounds grow there."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import build_artifact, converted, random_checkpoint, replan
from families import config_of
from rehearsing import PROMPT, Stage, on_stage

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.format.checks import check_plan
from subspec.artifacts.format.store import Artifact
from subspec.planner.rehearse.replay import (
    MAX_DEPTH,
    THRESHOLDS,
    WIDTHS,
    Answer,
    Grown,
    curves_of,
    rounds_within,
)
from subspec.planner.solve.problem import make_tree
from subspec.runtime.draft.beam import Level, PartialTree, root_only
from subspec.runtime.engine import Engine
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.text.tokenizer import load_tokenizer

# An answer that the draft is less sure of than that to PROMPT.
TEXT = "def read(path):\n    "


def prompts_of(stage: Stage) -> list[list[int]]:
    text = load_tokenizer(stage.engine.artifact.path / "tokenizer")
    return [PROMPT, text.plain_ids(TEXT)]


# Trees along an answer


@pytest.mark.parametrize("width", WIDTHS["cpu"])
def test_trees_along_an_answer_are_accepted_as_those_of_the_rounds_that_decode_it(
    width: int, demo: Artifact
) -> None:
    """Whole trees as deep as those of a walk, round after round."""
    with on_stage(demo) as stage:
        answers = stage.answer(*prompts_of(stage))
        walked = stage.walk(answers, width)
    real = replan(
        demo, width=width, depth=MAX_DEPTH, verify_widths=demo.plan.verify_widths,
        int4_kernel="w4a8", resident_share=0.8,
    )  # fmt: skip
    lengths = set[int]()
    with Engine.open(real) as engine, engine.new_sequence() as sequence:
        for answer, trees in zip(answers, walked, strict=True):
            prompt, tokens = answer.tokens[: answer.prompt_length], list[int]()
            for some in sequence.generate(prompt, GenerationParams(150)):
                tokens += some
            assert [*prompt, *tokens][: len(answer.tokens)] == answer.tokens
            found = [one.accepted for one in trees]
            assert len(found) > 2
            # The text that is known ends within a walk's last tree.
            assert list(sequence.stats.accepted[: len(found) - 1]) == found[:-1]
            assert [one.start for one in trees[1:]] == [
                one.start + one.accepted + 1 for one in trees[:-1]
            ]
            lengths |= set(found)
    assert len(lengths) > 2, "trees of one kind prove little"


def test_answers_that_are_walked_together_have_the_trees_that_each_has_alone(
    demo: Artifact,
) -> None:
    with on_stage(demo) as stage:
        answers = stage.answer(*prompts_of(stage))
        together = stage.walk(answers, 2)
        first = stage.walk(answers[:1], 2)
    assert together[0] == first[0] and len(together[1]) > 0
    assert [one.start for one in together[1]] != [one.start for one in together[0]]


def test_a_tree_within_an_answer_has_the_logits_of_one_at_the_end_of_a_cache(
    demo: Artifact,
) -> None:
    """Its slots are others, and tokens lie between that it must not see."""
    with on_stage(demo) as stage:
        [answer] = stage.answer(PROMPT)
        [cache, _] = stage.caches
        for after in (len(PROMPT), len(PROMPT) + 9, len(answer.tokens) - 1):
            root = torch.tensor([answer.tokens[after]])
            found = []
            for cut in (False, True):
                if cut:
                    kept = [*cache.tokens]
                    cache.roll_back(after)
                slots = cache.tree_slots(8, None if cut else after)
                assert int(slots.length) == after
                draft_pass = stage.drafter.pass_over([cache], [slots])
                growing = PartialTree(0, root_only(root, 8), Level.of_root(root.device))
                found.append(draft_pass([growing]).clone())
            assert torch.equal(found[0].argmax(-1), found[1].argmax(-1))
            assert torch.allclose(found[0], found[1], atol=1e-2)
            cache.roll_back(0)
            stage.caches[0].commit(kept)


def test_a_tree_goes_on_until_no_threshold_would_and_counts_what_the_answer_has(
    demo: Artifact,
) -> None:
    with on_stage(demo) as stage:
        answers = stage.answer(*prompts_of(stage))
        for answer, trees in zip(answers, stage.walk(answers, 2), strict=True):
            for one in trees:
                assert 0 <= one.accepted <= len(one.levels) <= MAX_DEPTH
                assert one.start + one.accepted < len(answer.tokens)
                assert one.levels == sorted(one.levels, reverse=True), "a level is of those above"
                if one.node is None and len(one.levels) < MAX_DEPTH:
                    assert one.levels[-1] < math.log(THRESHOLDS[1])


def test_the_last_tree_counts_only_where_the_model_itself_ended(demo: Artifact) -> None:
    with on_stage(demo) as stage:
        [answer] = stage.answer(PROMPT)
        for ended in (False, True):
            for length in range(len(PROMPT) + 4, len(answer.tokens) + 1):
                cut = Answer(answer.tokens[:length], len(PROMPT), ended)
                [trees] = stage.walk([cut], 1)
                end = trees[-1].start + trees[-1].accepted + 1
                if ended:
                    assert end in (length - 1, length)
                else:
                    assert end < length or len(trees) == 1


def test_an_answer_of_one_token_has_no_tree(demo: Artifact) -> None:
    with on_stage(demo) as stage:
        [answer] = stage.answer(PROMPT)
        one = Answer(answer.tokens[: len(PROMPT) + 1], len(PROMPT), ended=True)
        assert stage.walk([one], 2) == [[]]


# Rounds of trees with a threshold


def grown(*probabilities: float, accepted: int) -> Grown:
    logs = [math.log(one) for one in probabilities]
    return Grown(0, logs, accepted, None)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        # Steps of 0.9, 0.5, 0.5, 0.5, then 0.5 for ever; three levels are accepted.
        (0.0, [(24, 3)]),
        (0.1, [(5, 3)]),  # 0.9, 0.45, 0.225, 0.1125, 0.056: the first below is the last
        (0.3, [(3, 3)]),
        (0.4, [(3, 3)]),
        # The tree ends after two levels, the third token is the exact model's, and the tree that
        # grows there finds nothing more.
        (0.46, [(2, 2), (2, 0)]),
        (0.95, [(1, 1), (1, 1)]),
    ],
)
def test_rounds_with_a_threshold_by_hand(threshold: float, expected: list[tuple[int, int]]) -> None:
    tree = grown(0.9, 0.45, 0.225, 0.1125, accepted=3)
    assert rounds_within(tree, threshold) == expected


def test_rounds_with_a_threshold_give_the_tokens_that_one_whole_tree_gives() -> None:
    """The first of them never has more levels for a higher threshold."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        steps = torch.rand(int(torch.randint(1, MAX_DEPTH + 1, (), generator=generator)),
                           generator=generator)  # fmt: skip
        levels = steps.clamp_min(0.05).log().cumsum(0).tolist()
        accepted = int(torch.randint(0, len(levels) + 1, (), generator=generator))
        one, before = Grown(0, levels, accepted, None), MAX_DEPTH
        for threshold in THRESHOLDS:
            rounds = rounds_within(one, threshold)
            assert sum(accepts + 1 for _, accepts in rounds) == accepted + 1
            assert all(1 <= drafted and accepts <= drafted for drafted, accepts in rounds)
            assert rounds[0][0] <= before
            before = rounds[0][0]
        assert rounds_within(one, 0.0) == [(MAX_DEPTH, accepted)]


# Counts


def test_curves_count_levels_by_hand() -> None:
    """Two answers: trees that accept 3 and 0 levels, and one that accepts 1."""
    first = [grown(0.9, 0.8, 0.7, 0.6, accepted=3), grown(0.05, accepted=0)]
    second = [grown(0.5, 0.25, 0.05, accepted=1)]
    curves = curves_of([first, second], 2, "code")
    assert tuple(curve.min_path_probability for curve in curves) == THRESHOLDS
    whole = curves[0]
    assert (whole.width, whole.kind, whole.num_answers, whole.num_trees) == (2, "code", 2, 3)
    assert whole.drafted == (3,) * MAX_DEPTH
    assert whole.accepted == (2, 1, 1, *(0,) * (MAX_DEPTH - 3))
    [tenth] = [curve for curve in curves if curve.min_path_probability == 0.1]
    assert tenth.drafted[:4] == (3, 2, 2, 1) and tenth.accepted == whole.accepted
    assert all(curve.margin > 0 for curve in curves)


def test_curves_pass_the_readers_check(demo: Artifact) -> None:
    trees = [[grown(0.9, 0.8, 0.7, 0.02, accepted=3), grown(0.4, 0.2, accepted=0)]]
    curves = [
        curve
        for width in WIDTHS["cpu"]
        for kinds in [[curves_of(trees, width, kind) for kind in ("code", "prose")]]
        for pair in zip(*kinds, strict=True)
        for curve in pair
    ]
    found = Acceptance(tuple(curves), measured=True)
    check_plan(demo.spec, demo.stored_parts(), replace(demo.plan, acceptance=found))
    assert found.thresholds == THRESHOLDS and found.num_answers() == 2


def test_trees_are_as_deep_as_a_plan_may_rehearse() -> None:
    assert make_tree(max(WIDTHS["cpu"]), MAX_DEPTH).num_nodes == 97


@pytest.mark.slow
def test_trees_within_an_answer_of_a_hybrid_are_those_of_the_rounds_that_decode_it(
    tmp_path: Path,
) -> None:
    """Its states follow the trees, forwards and back again."""
    config = config_of("qwen3_5_text")
    source = converted(
        random_checkpoint(tmp_path / "f32", config), tmp_path / "bf16", torch.bfloat16
    )
    hybrid = build_artifact(
        source, tmp_path / "artifact", context=128, width=4, depth=MAX_DEPTH, num_sequences=2
    )
    prompts = [[3 + 7 * n % 2000 for n in range(40)], [5 + 11 * n % 1900 for n in range(30)]]
    with on_stage(hybrid) as stage:
        answers = stage.decode(*prompts)
        walked = {width: stage.walk(answers, width) for width in (1, 2, 1)}
    for width, along in walked.items():
        real = replan(hybrid, context=128, width=width, depth=MAX_DEPTH, verify_widths=(104,))
        with Engine.open(real) as engine, engine.new_sequence() as sequence:
            for answer, trees in zip(answers, along, strict=True):
                length = answer.prompt_length
                count = len(answer.tokens) - length
                for _ in sequence.generate(answer.tokens[:length], GenerationParams(count)):
                    pass
                found = [one.accepted for one in trees]
                assert len(found) > 3
                assert list(sequence.stats.accepted[: len(found) - 1]) == found[:-1]
