"""A rehearsal: acceptance along several answers at once, and real rounds timed as they are."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path

import pytest
import torch
from builders import PROFILE, build_artifact, random_checkpoint, replan
from rehearsing import LONG, PROMPT, SAID, on_stage, said
from running import drafts_of_depths, generated
from transformers import Qwen2Config

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.format.checks import check_plan
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Method, Placement, Prediction, Tree, Usage
from subspec.planner.rehearse import rehearsal
from subspec.planner.rehearse.calibration import Sample, sample_ids, shipped_samples
from subspec.planner.rehearse.corrections import PredictFor, Rounds
from subspec.planner.rehearse.rehearsal import (
    ANSWER_TOKENS,
    LOOP_TOKENS,
    MAX_PERIOD,
    USUAL_EFFORT,
    Effort,
    Setting,
    acceptance_of,
    before_loop,
    measure_acceptance,
    time_rounds,
    timed_rounds,
)
from subspec.planner.rehearse.replay import MAX_DEPTH, THRESHOLDS, WIDTHS
from subspec.planner.solve.outlook import predict_for
from subspec.planner.solve.storage import Storage
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.text.tokenizer import load_tokenizer

CODE = [Sample("code", "def read(path):\n    "), Sample("code", "class Reader:\n    def __init__(")]
PROSE = [Sample("prose", "The first house on the left was built in")]
BRIEF = Effort(acceptance_seconds=60.0, time_seconds=0.2, plain_seconds=0.1)


def never(acceptance: Acceptance) -> bool:
    return False


def acceptance_of_run(
    artifact: Artifact,
    samples: Sequence[Sample],
    settled: rehearsal.Settled = never,
    effort: Effort = BRIEF,
) -> Acceptance:
    found = measure_acceptance(
        artifact, artifact.plan, samples, Setting(), settled, lambda *_: None, effort
    )
    assert found is not None and found.measured
    return found


def timed(
    artifact: Artifact,
    predict: PredictFor = said,
    setting: Setting = Setting(),  # noqa: B008  frozen
    effort: Effort = BRIEF,
) -> Rounds:
    samples = [*CODE, *PROSE]
    return time_rounds(artifact, artifact.plan, predict, samples, setting, lambda *_: None, effort)


# Acceptance


@pytest.fixture(scope="module")
def both(demo: Artifact) -> Acceptance:
    torch.set_num_threads(1)
    return acceptance_of_run(demo, [*CODE, *PROSE])


def test_there_is_a_curve_for_each_width_threshold_and_kind_and_a_reader_takes_them(
    demo: Artifact, both: Acceptance
) -> None:
    assert [(c.width, c.min_path_probability, c.kind) for c in both.curves] == [
        (width, threshold, kind)
        for width in WIDTHS["cpu"] for threshold in THRESHOLDS for kind in ("code", "prose")
    ]  # fmt: skip
    assert both.num_answers("code") == 2 and both.num_answers("prose") == 1
    for curve in both.curves:
        assert len(curve.drafted) == len(curve.accepted) == MAX_DEPTH
        assert curve.num_trees > 1 and curve.margin > 0
    check_plan(demo.spec, demo.stored_parts(), replace(demo.plan, acceptance=both))


def test_kinds_are_kept_apart_and_company_changes_no_count(
    demo: Artifact, both: Acceptance
) -> None:
    wide = replan(
        demo, width=4, depth=MAX_DEPTH, verify_widths=demo.plan.verify_widths, int4_kernel="w4a8"
    )
    alone = acceptance_of_run(wide, CODE).curves
    assert alone == tuple(curve for curve in both.curves if curve.kind == "code")


def test_the_draft_of_the_demo_is_mostly_accepted_and_more_so_if_it_is_wider(
    both: Acceptance,
) -> None:
    tokens = [both.acceptance_length(Tree(width, 8)) for width in WIDTHS["cpu"]]
    assert 2.5 < tokens[0] < tokens[1] < tokens[2] < 9


def test_drafts_that_end_early_draft_fewer_levels_and_give_fewer_tokens(both: Acceptance) -> None:
    for width in WIDTHS["cpu"]:
        trees = [Tree(width, MAX_DEPTH, min_path_probability=stop) for stop in THRESHOLDS]
        expectation = [both.expected_round(tree) for tree in trees]
        assert all(a.levels > b.levels and a.tokens >= b.tokens for a, b in pairwise(expectation))


def test_the_draft_of_random_weights_is_seldom_accepted(tmp_path: Path) -> None:
    config = Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=2048, tie_word_embeddings=False, eos_token_id=2,
    )  # fmt: skip
    source = random_checkpoint(tmp_path / "checkpoint", config)
    artifact = build_artifact(
        source, tmp_path / "artifact", resident_share=1.0, width=1, depth=MAX_DEPTH
    )
    assert acceptance_of_run(artifact, CODE).acceptance_rates(Tree(1, 1))[0] < 0.9


def test_answers_that_are_decoded_together_are_those_of_plain_decoding(demo: Artifact) -> None:
    """Up to where they end or begin to repeat themselves."""
    text = load_tokenizer(demo.path / "tokenizer")
    prompts = [sample_ids(text, sample) for sample in (*CODE[:1], *PROSE)]
    params = GenerationParams(ANSWER_TOKENS, stop_token_ids=frozenset(demo.spec.eos_token_ids))
    with on_stage(demo) as stage:
        answers = stage.decode(*prompts)
        for one, cache in zip(answers, stage.caches, strict=True):
            assert cache.tokens == one.tokens[:-1], "the last one is a root"
    with Engine.open(demo, OpenOptions("plain")) as engine:
        for one, prompt in zip(answers, prompts, strict=True):
            with engine.new_sequence() as sequence:
                expected = generated(sequence, prompt, params)
            own = one.tokens[one.prompt_length :]
            assert one.tokens[: one.prompt_length] == prompt
            assert own == expected[: before_loop(expected)] and len(own) > 3


def test_an_answer_ends_with_the_models_own_end(demo: Artifact) -> None:
    with on_stage(demo) as stage:
        [whole] = stage.decode([*PROMPT[:12]])
    own = whole.tokens[whole.prompt_length :]
    for place in {own.index(own[0]), own.index(own[-1])}:
        spec = replace(demo.spec, eos_token_ids=(own[place],))
        with on_stage(replace(demo, spec=spec)) as stage:
            [cut] = stage.decode([*PROMPT[:12]])
        assert cut.ended and cut.tokens == whole.tokens[: whole.prompt_length + place + 1]


def test_an_answer_that_ends_at_once_teaches_nothing(demo: Artifact) -> None:
    text = load_tokenizer(demo.path / "tokenizer")
    with on_stage(demo) as stage:
        [one] = stage.decode(sample_ids(text, PROSE[0]))
    spec = replace(demo.spec, eos_token_ids=(one.tokens[one.prompt_length],))
    brief = replace(demo, spec=spec)
    assert (
        measure_acceptance(brief, brief.plan, PROSE, Setting(), never, lambda *_: None, BRIEF)
        is None
    )
    assert acceptance_of({}) is None


def test_learning_stops_as_soon_as_the_choice_is_settled(demo: Artifact) -> None:
    """It is asked after each batch of as many answers as the plan has sequences."""
    asked = list[int]()

    def settled(acceptance: Acceptance) -> bool:
        asked.append(acceptance.num_answers())
        return len(asked) == 2

    samples = [*CODE, *PROSE] * 3
    found = acceptance_of_run(demo, samples, settled)
    assert asked == [2, 4] and found.num_answers() == 4


def test_a_slow_machine_is_asked_for_one_batch_only(demo: Artifact) -> None:
    found = acceptance_of_run(
        demo, [*CODE, *PROSE] * 3, effort=replace(BRIEF, acceptance_seconds=0.0)
    )
    assert found.num_answers() == demo.plan.num_sequences == 2
    assert set(found.kinds) == {"code", "prose"}, "kinds take turns"


def test_several_sequences_decode_and_are_walked_at_once(
    demo: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, real = list[int](), rehearsal.walk

    def watched(drafter, caches, answers, width):  # type: ignore[no-untyped-def]
        together.append(len({id(cache) for cache in caches}))
        return real(drafter, caches, answers, width)

    monkeypatch.setattr(rehearsal, "walk", watched)
    acceptance_of_run(demo, [*CODE, *PROSE])
    assert together == [2] * len(WIDTHS["cpu"]) + [1] * len(WIDTHS["cpu"])


def test_prompts_that_fill_a_prefill_are_read_in_several_streams_with_the_same_answers(
    demo: Artifact,
) -> None:
    small = replace(demo, plan=replace(demo.plan, prefill_chunk_tokens=30))
    prompts = [PROMPT, PROMPT[:20]]
    with on_stage(demo) as stage:
        expected = stage.decode(*prompts)
    with on_stage(small) as stage:
        assert stage.decode(*prompts) == expected


def test_a_plan_has_no_curves_of_trees_that_it_has_no_room_for(demo: Artifact) -> None:
    narrow = replan(demo, width=2, depth=MAX_DEPTH, int4_kernel="w4a8")
    assert {curve.width for curve in acceptance_of_run(narrow, PROSE).curves} == {1, 2}


@pytest.mark.parametrize("context", [24, 40])
def test_a_context_that_ends_the_answers_early_is_enough(context: int, demo: Artifact) -> None:
    small = replan(demo, width=1, depth=MAX_DEPTH, context=context)
    found = acceptance_of_run(small, CODE)
    assert all(sum(curve.accepted) < context // 2 * 2 for curve in found.curves)


def test_the_shipped_prompts_take_turns_until_time_is_up(demo: Artifact) -> None:
    stages = list[tuple[str, float]]()
    found = measure_acceptance(
        demo, demo.plan, shipped_samples(), Setting(), never, lambda *s: stages.append(s),
        replace(BRIEF, acceptance_seconds=0.3),
    )  # fmt: skip
    assert found is not None
    assert all(name.startswith("rehearsing") for name, _ in stages)
    shares = [share for _, share in stages]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0.0, 1.0)
    assert set(found.kinds) <= {sample.kind for sample in shipped_samples()}
    assert "tokens a round" in stages[-1][0]


# Loops


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        ([*range(60)], 60),
        ([], 0),
        ([5] * 13, 1),  # one token and LOOP_TOKENS more of it
        ([5] * 12, 12),
        ([1, 2, 3, *[7, 8] * 7], 5),  # 7, 8 once, then six times more
        ([1, 2, 3, *[7, 8] * 6, 7], 16),  # a token less
        ([*range(10)] * 3, 10),
        ([*range(10)] * 2, 20),  # text that is quoted once
        ([*range(24)] * 3, 24),
        ([*range(25)] * 3, 75),  # a longer period than is looked for
    ],
)
def test_a_text_counts_up_to_its_second_repetition(tokens: list[int], kept: int) -> None:
    assert (LOOP_TOKENS, MAX_PERIOD) == (12, 24)
    assert before_loop(tokens) == kept


# Times


def test_every_round_but_an_answers_first_is_timed(demo: Artifact) -> None:
    asked = list[tuple[Method, Usage]]()

    def ask(method: Method, usage: Usage) -> Prediction:
        asked.append((method, usage))
        return replace(SAID, verify_seconds=0.001 * usage.prompt_tokens)

    with Engine.open(demo) as engine:
        first, second = (timed_rounds(engine, PROMPT[:n], ask, LONG) for n in (30, 10))
    assert [(method, usage.prompt_tokens) for method, usage in asked] == [
        ("substitute", 30), ("substitute", 10),
    ]  # fmt: skip
    assert all(2 <= usage.answer_tokens <= ANSWER_TOKENS for _, usage in asked)
    [draft], [verify] = second.draft, second.verify
    assert (draft.predicted, verify.predicted) == (SAID.draft_seconds, 0.01)
    assert len(draft.actual) == len(verify.actual) > 3
    assert min(*draft.actual, *verify.actual) > 0
    assert not second.plain
    # The first answer of an engine waits for digests, which no run of a user does twice.
    assert first.prompt == () and len(second.prompt) == 1


def test_the_drafts_of_rounds_count_as_if_each_had_drafted_the_levels_of_a_usual_one(
    demo: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds draft more levels and fewer, as those of a plan that ends early do."""
    drafts_of_depths(monkeypatch, cycle([2, 5, 1]))
    early = replan(demo, width=3, depth=5, int4_kernel="w4a8")
    prompt = sample_ids(load_tokenizer(demo.path / "tokenizer"), CODE[0])
    seen = list[tuple[float, ...]]()
    with Engine.open(early) as engine:
        new, step = engine.new_sequence, engine.step
        sequences = []

        def watched_new():  # type: ignore[no-untyped-def]
            sequences.append(new())
            return sequences[-1]

        def watched_step() -> bool:
            going = step()
            stats = sequences[0].stats
            seen.append((stats.draft_seconds, stats.drafted_levels))
            return going

        monkeypatch.setattr(engine, "new_sequence", watched_new)
        monkeypatch.setattr(engine, "step", watched_step)
        [draft] = timed_rounds(engine, prompt, said, LONG).draft
    rounds = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(seen[1:])]
    assert len({levels for _, levels in rounds}) > 1, "all rounds drafted alike"
    assert draft.predicted == SAID.draft_seconds
    usual = SAID.levels_per_round
    assert draft.actual == pytest.approx(
        [seconds * usual / max(1, levels) for seconds, levels in rounds]
    )


def test_rounds_of_both_methods_are_timed_until_their_time_is_up(demo: Artifact) -> None:
    found = timed(demo)
    assert found.draft and found.verify and found.plain
    brief = timed(demo, effort=Effort(0.0, 0.0, 0.0))
    for some in (brief.draft, brief.verify, brief.plain):
        [one] = some
        assert len(one.actual) == 1, "one round is timed however slow the machine is"


def test_a_plan_without_a_draft_has_only_plain_rounds(demo: Artifact) -> None:
    without_draft: dict[Method, Placement] = {"plain": demo.plan.placement("plain")}
    plain = replace(demo, plan=replace(demo.plan, method="plain", placements=without_draft))
    found = timed(plain)
    assert found.draft == found.verify == () and found.plain


def test_a_slower_link_is_rehearsed_at_its_speed(demo: Artifact) -> None:
    streams = replan(demo, width=3, depth=5, resident_share=0.0)
    storage = Storage(tuple(demo.stored_parts()))

    def predicted_for(method: Method, usage: Usage) -> Prediction:
        return predict_for(demo.spec, PROFILE, streams.plan, storage, method, usage)

    found = timed(streams, predicted_for, Setting(link_bandwidth=100e6))
    assert all(one.predicted > 0 for one in found.plain)
    assert min(found.plain[0].actual) > 0.8 * storage.num_bytes / 100e6


# Effort


def test_seconds_are_divided_as_in_the_usual_effort() -> None:
    usual = sum(vars(USUAL_EFFORT).values())
    for seconds in (0.5, 10.0, 3600.0):
        found = Effort.within(seconds)
        assert sum(vars(found).values()) == pytest.approx(seconds)
        assert found.acceptance_seconds / seconds == pytest.approx(
            USUAL_EFFORT.acceptance_seconds / usual
        )
        assert found.plain_seconds / seconds == pytest.approx(USUAL_EFFORT.plain_seconds / usual)
