"""A sequence: its cache is reused, its ends are clean, odd uses give right tokens or errors."""

import time
from collections.abc import Sequence as Many
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from builders import build_artifact, replan
from invariance import widths_here
from running import answer, drafts_of_depths, generated
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Method, split_rows
from subspec.planner.model.hub import DEMO
from subspec.runtime import decode
from subspec.runtime import sequence as sequences
from subspec.runtime.decode import Round
from subspec.runtime.draft.beam import DraftPass, PartialTree, TokenTree
from subspec.runtime.draft.drafter import DecodeState, SubstituteDrafter
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.exact_pass import Model, PrefillChunk
from subspec.runtime.lossy import Lossy
from subspec.runtime.model.cache import Cache, TreeSlots
from subspec.runtime.model.sampling import Sampler, SamplingParams
from subspec.runtime.sequence import GenerationParams

PROMPT = list(range(10, 50))
METHODS: tuple[Method, ...] = ("substitute", "plain")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("sequence") / "artifact"
    return build_artifact(DEMO, out, resident_share=1.0)


def resident(artifact: Artifact, **settings: object) -> Artifact:
    return replan(artifact, **{"resident_share": 1.0, **settings})


# Reuse


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_that_continues_the_last_one_reuses_its_prefix(
    artifact: Artifact, method: Method
) -> None:
    with Engine.open(artifact, OpenOptions(method)) as engine, engine.new_sequence() as sequence:
        first = generated(sequence, PROMPT, GenerationParams(20))
        generated(sequence, [*PROMPT, *first, 11, 12, 13], GenerationParams(5))
        assert sequence.stats.cached_tokens == len(PROMPT) + len(first) - 1
        generated(sequence, [*PROMPT[:10], 99], GenerationParams(5))
        assert sequence.stats.cached_tokens == 10
        generated(sequence, [*PROMPT[:10], 99], GenerationParams(5))
        assert sequence.stats.cached_tokens == 10, "the last token is read again"


def test_another_sequence_reuses_nothing_of_the_cache_that_it_gets(artifact: Artifact) -> None:
    with Engine.open(artifact) as engine:
        expected = answer(engine, PROMPT, 5)
        with engine.new_sequence() as sequence:
            assert generated(sequence, PROMPT, GenerationParams(5)) == expected
            assert sequence.stats.cached_tokens == 0


def test_reuse_gives_the_same_tokens_with_and_without_speculation(artifact: Artifact) -> None:
    turns = [PROMPT, [20, 21, 22], [30, 31, 32, 33]]
    said = []
    for method in METHODS:
        chosen = resident(artifact, width=2, depth=7, verify_widths=(16,))
        with Engine.open(chosen, OpenOptions(method)) as engine, engine.new_sequence() as sequence:
            history: list[int] = []
            for turn in turns:
                history += turn
                history += generated(sequence, history, GenerationParams(24))
        said.append(history)
    assert said[0] == said[1]


# Ends


def test_generation_ends_at_an_end_of_text_inside_an_accepted_block(artifact: Artifact) -> None:
    with Engine.open(artifact) as engine:
        tokens = answer(engine, PROMPT, 30)
        end = tokens[9]
        with engine.new_sequence() as sequence:
            params = GenerationParams(30, stop_token_ids=frozenset([end]))
            ended = generated(sequence, PROMPT, params)
            assert ended == tokens[: tokens.index(end) + 1]
            assert sequence.finish_reason == "eos"
            assert sequence.cache.tokens == [*PROMPT, *ended[:-1]]


def test_an_answer_may_be_its_end_token_alone(artifact: Artifact) -> None:
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        [first] = generated(sequence, PROMPT, GenerationParams(1))
        params = GenerationParams(30, stop_token_ids=frozenset([first]))
        assert generated(sequence, PROMPT, params) == [first]
        assert sequence.finish_reason == "eos" and not engine.step()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_kept", [1, 2, 5, 8])
def test_a_cut_ends_the_answer_and_only_what_is_kept_is_committed(
    num_kept: int, method: Method, artifact: Artifact
) -> None:
    """`stopping_criteria` sees every token once, in order, and answers for those that it
    was asked about."""
    seen = list[int]()

    def cut(tokens: Many[int]) -> int | None:
        before = len(seen)
        seen.extend(tokens)
        return num_kept - before if len(seen) >= num_kept else None

    with Engine.open(artifact, OpenOptions(method)) as engine:
        tokens = answer(engine, PROMPT, 30)
        with engine.new_sequence() as sequence:
            kept = generated(sequence, PROMPT, GenerationParams(30, stopping_criteria=cut))
            assert kept == tokens[:num_kept] and seen == tokens[: len(seen)]
            assert sequence.finish_reason == "stop"
            assert sequence.stats.generated_tokens == num_kept
            assert sequence.cache.tokens == [*PROMPT, *kept[:-1]]
            longer = [*PROMPT, *tokens[:12]]
            assert generated(sequence, longer, GenerationParams(5)) == tokens[12:17]


def test_a_cut_beyond_what_it_was_asked_about_keeps_that(artifact: Artifact) -> None:
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        params = GenerationParams(30, stopping_criteria=lambda tokens: 1000)
        assert len(generated(sequence, PROMPT, params)) == 1
        assert sequence.finish_reason == "stop"


@pytest.mark.parametrize("count", [0, -1])
def test_a_cut_that_keeps_nothing_is_refused(count: int, artifact: Artifact) -> None:
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        params = GenerationParams(
            30, stopping_criteria=lambda tokens: count if len(tokens) > 1 else None
        )
        with pytest.raises(
            SubspecError, match=f"stopping_criteria returned {count}, expected 1 or more"
        ):
            generated(sequence, PROMPT, params)
        assert not engine.step() and sequence.finish_reason is None


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("method", METHODS)
def test_exactly_as_many_tokens_as_asked_for(
    tokens: int, method: Method, artifact: Artifact
) -> None:
    with Engine.open(artifact, OpenOptions(method)) as engine, engine.new_sequence() as sequence:
        assert len(generated(sequence, PROMPT, GenerationParams(tokens))) == tokens
        assert sequence.stats.generated_tokens == tokens
        assert sequence.finish_reason == "length"


def test_the_time_to_commit_a_round_is_part_of_it(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delta nets replay what is kept: speeds and predictions would leave that out."""
    real = sequences.commit_round

    def slow(state: DecodeState, done: Round, num_tokens: int) -> None:
        time.sleep(0.02)
        real(state, done, num_tokens)

    monkeypatch.setattr(sequences, "commit_round", slow)
    with Engine.open(artifact, OpenOptions("plain")) as engine, engine.new_sequence() as sequence:
        generated(sequence, [3, 4, 5], GenerationParams(4))
        assert sequence.stats.decode_seconds > 3 * 0.02


def test_fewer_than_one_token_cannot_be_asked_for() -> None:
    with pytest.raises(SubspecError, match="max_tokens is 0, expected 1 or more"):
        GenerationParams(0)


def test_the_context_is_filled_to_its_last_token(artifact: Artifact) -> None:
    chosen = resident(artifact, context=64, width=4, depth=7)
    with Engine.open(chosen) as engine, engine.new_sequence() as sequence:
        room = 64 - len(PROMPT)
        for prompt, asked, given, reason in (
            (PROMPT, 1000, room, "context"),
            (PROMPT + [7] * 23, 1000, 1, "context"),
            (PROMPT, room, room, "length"),
        ):
            assert len(generated(sequence, prompt, GenerationParams(asked))) == given
            assert sequence.finish_reason == reason


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5] * 64, "the prompt has 64 tokens, expected 1 to 63"),
        ([], "the prompt has 0 tokens, expected 1 to 63"),
        ([5, 2048], "the prompt has the token id 2048, expected 0 to 2047"),
        ([5, -1], "the prompt has the token id -1, expected 0 to 2047"),
    ],
    ids=["long", "empty", "beyond the vocabulary", "negative"],
)
def test_a_prompt_that_cannot_be_read_is_refused_and_changes_nothing(
    prompt: list[int], message: str, artifact: Artifact
) -> None:
    with Engine.open(resident(artifact, context=64)) as engine:
        expected = answer(engine, PROMPT, 12)
        with engine.new_sequence() as sequence:
            sequence.begin(PROMPT, GenerationParams(12))
            with pytest.raises(SubspecError, match=message) as caught:
                sequence.begin(prompt, GenerationParams(3))
            assert caught.value.exit_code == Exit.USAGE
            while engine.step():
                pass
            assert sequence.take_new_tokens() == expected


# Drafts


def test_drafted_tokens_behind_the_end_of_the_answer_are_not_counted_as_accepted(
    artifact: Artifact,
) -> None:
    depth = artifact.plan.tree.depth
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        tokens, left = generated(sequence, PROMPT, GenerationParams(30)), 29
        stats = sequence.stats
        for drafted, accepted in zip(stats.drafted, stats.accepted, strict=True):
            assert drafted == min(depth, left - 1) and accepted <= drafted
            left -= accepted + 1
        assert stats.includes_digest_check and left == 0
        assert stats.drafted_levels == sum(stats.drafted)
        ends = frozenset([tokens[9]])
        *_, last = sequence.generate(PROMPT, GenerationParams(30, stop_token_ids=ends))
        assert sequence.stats.accepted[-1] == len(last) < sequence.stats.drafted[-1]
        assert not sequence.stats.includes_digest_check


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, seed=3)], ids=str
)
def test_drafts_that_end_early_change_no_token(
    width: int, sampling: SamplingParams, artifact: Artifact
) -> None:
    said, levels = [], []
    widths = widths_here(artifact.spec, "cpu", 1 + width * 7)
    for threshold in (0.0, 0.5, 0.9):
        chosen = resident(
            artifact,
            width=width,
            depth=7,
            verify_widths=widths,
            min_path_probability=threshold,
        )
        with Engine.open(chosen) as engine, engine.new_sequence() as sequence:
            said.append(generated(sequence, PROMPT, GenerationParams(60, sampling)))
            levels.append(sequence.stats.drafted_levels)
    assert said[0] == said[1] == said[2]
    assert levels[2] < levels[0], "none ended early"


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The depths of all levels that are drafted."""
    depths = list[int]()
    real = SubstituteDrafter.pass_over

    def counted(self: SubstituteDrafter, caches: Many[Cache], slots: Many[TreeSlots]) -> DraftPass:
        draft_pass = real(self, caches, slots)

        def run(growing: Many[PartialTree]) -> torch.Tensor:
            [one] = growing
            depths.append(int(one.tree.depths[one.last.nodes[0]]))
            return draft_pass(growing)

        return run

    monkeypatch.setattr(SubstituteDrafter, "pass_over", counted)
    return depths


def test_the_levels_that_each_round_drafted_are_counted(
    artifact: Artifact, drafted: list[int]
) -> None:
    chosen = resident(artifact, width=2, depth=7, verify_widths=(16,), min_path_probability=0.98)
    with Engine.open(chosen) as engine, engine.new_sequence() as sequence:
        left, early, before = 59, 0, 0
        for emitted in sequence.generate(PROMPT, GenerationParams(60)):
            stats = sequence.stats
            assert stats.drafted_levels == len(drafted)
            if not stats.accepted:  # the prompt's token
                continue
            room = min(7, left - 1)
            count = len(drafted) - before
            assert drafted[before:] == [*range(count)] and count <= room
            assert stats.drafted[-1] == count >= stats.accepted[-1]
            early += count < room
            left, before = left - len(emitted), len(drafted)
        assert left == 0 and early > 3


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The rows of each call of every verification."""
    rows = list[tuple[int, ...]]()
    real = decode.exact_outputs

    def counted(
        model: Model,
        trees: Many[TokenTree],
        calls: Many[int],
        states: Many[DecodeState],
        chunks: Many[PrefillChunk],
    ) -> Any:
        if trees:
            assert sum(len(tree.tokens) for tree in trees) == sum(calls)
            rows.append(tuple(calls))
        return real(model, trees, calls, states, chunks)

    monkeypatch.setattr(decode, "exact_outputs", counted)
    return rows


def test_a_verification_is_as_wide_as_its_drafts_need_together(
    artifact: Artifact, verified: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts_of_depths(monkeypatch, cycle([1, 3, 7]))
    chosen = resident(artifact, width=2, depth=7, verify_widths=(4, 8, 16), num_sequences=2)
    with Engine.open(chosen) as engine, engine.new_sequence() as alone:
        generated(alone, PROMPT, GenerationParams(60))
        widths = [next(w for w in (4, 8, 16) if w >= 1 + 2 * n) for n in alone.stats.drafted]
        assert verified == [(width,) for width in widths] and set(widths) == {4, 8, 16}
        verified.clear()
        other = engine.new_sequence()
        for sequence, prompt in ((alone, PROMPT), (other, PROMPT[:9])):
            sequence.begin(prompt, GenerationParams(40))
        while engine.step():
            pairs = zip(alone.stats.drafted, other.stats.drafted, strict=False)
        # The first rows of the second prompt have no draft beside them.
        together = [2 + 2 * sum(pair) for pair in pairs]
        expected = [tuple(split_rows(chosen.plan.prompt_widths, rows)) for rows in together]
        assert verified[: len(expected)] == expected and max(together) > 16
    verified.clear()
    with Engine.open(chosen, OpenOptions("plain")) as engine:
        answer(engine, PROMPT, 5)
        assert verified == [(4,)] * 4


@pytest.mark.parametrize("tokens", [1, 2, 3, 9, 30])
def test_no_level_is_drafted_that_the_answer_has_no_room_for(
    tokens: int, artifact: Artifact, drafted: list[int]
) -> None:
    """Each level takes a pass of the draft, and the exact model's own token has the last place."""
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        assert len(generated(sequence, PROMPT, GenerationParams(tokens))) == tokens
        left, expected = tokens - 1, list[int]()
        for accepted in sequence.stats.accepted:
            expected += range(min(artifact.plan.tree.depth, left - 1))
            left -= accepted + 1
        assert (drafted, left) == (expected, 0)


# Prompts


def test_a_long_prompt_streams_the_weights_once(artifact: Artifact) -> None:
    with Engine.open(replan(artifact, context=1024, resident_share=0.0)) as engine:
        exact = engine.model.exact
        before = exact.streamed_bytes
        answer(engine, [5 + i % 900 for i in range(1000)], 1)
        everything = artifact.path / "exact.safetensors"
        assert 0 < exact.streamed_bytes - before <= everything.stat().st_size


def test_prompts_in_several_streams_give_the_same_tokens(artifact: Artifact) -> None:
    prompt = [5 + i % 900 for i in range(200)]
    answers = []
    for prefill_chunk_tokens in (256, 64):
        plan = replace(artifact.plan, prefill_chunk_tokens=prefill_chunk_tokens)
        with Engine.open(replace(artifact, plan=plan)) as engine:
            answers.append(answer(engine, prompt, 10))
    assert answers[0] == answers[1]


def test_the_unpadded_baseline_gives_plain_tokens(artifact: Artifact) -> None:
    """It rounds otherwise, so later tokens may differ; the first ones must not."""
    with Engine.open(artifact, OpenOptions("plain", padded=False)) as engine:
        fast = answer(engine, PROMPT, 8)
    with Engine.open(artifact, OpenOptions("plain")) as engine:
        assert answer(engine, PROMPT, 8)[:4] == fast[:4]


# Odd uses


def test_leaving_the_loop_ends_the_answer_and_the_next_one_is_right(artifact: Artifact) -> None:
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        expected = generated(sequence, PROMPT, GenerationParams(30))
        for count, _ in enumerate(sequence.generate(PROMPT, GenerationParams(30))):
            if count == 2:
                break
        assert not engine.step() and sequence.finish_reason is None
        assert generated(sequence, PROMPT, GenerationParams(30)) == expected


@pytest.mark.parametrize("method", METHODS)
def test_generators_of_two_sequences_may_be_interleaved(method: Method, artifact: Artifact) -> None:
    other = [99, *PROMPT]
    with Engine.open(resident(artifact, num_sequences=2), OpenOptions(method)) as engine:
        expected = [answer(engine, prompt, 24) for prompt in (PROMPT, other)]
        first, second = engine.new_sequence(), engine.new_sequence()
        one = first.generate(PROMPT, GenerationParams(24))
        tokens = [*next(one), *next(one)]
        two = second.generate(other, GenerationParams(24))
        others = list[int]()
        for some in one:
            tokens += some
            others += next(two, [])
        assert [tokens, others + [token for some in two for token in some]] == expected


def test_another_answer_ends_the_one_before_and_is_not_ended_by_it(artifact: Artifact) -> None:
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        expected = generated(sequence, PROMPT, GenerationParams(20))
        abandoned = sequence.generate([7, 8, 9], GenerationParams(20))
        next(abandoned)
        rounds = sequence.generate(PROMPT, GenerationParams(20))
        tokens = next(rounds)
        assert [*abandoned] == []
        assert tokens + [token for some in rounds for token in some] == expected

        sequence.begin([7, 8, 9], GenerationParams(20))
        engine.step()
        sequence.begin(PROMPT, GenerationParams(20))
        while engine.step():
            pass
        assert sequence.take_new_tokens() == expected


def test_a_closed_sequence_answers_no_more(artifact: Artifact) -> None:
    """Its cache may be another one's by then."""
    with Engine.open(artifact) as engine:
        expected = answer(engine, PROMPT, 20)
        closed = engine.new_sequence()
        rounds = closed.generate([7, 8, 9], GenerationParams(20))
        next(rounds)
        closed.close()
        with engine.new_sequence() as sequence:
            sequence.begin(PROMPT, GenerationParams(20))
            assert [*rounds] == []
            for use in (closed.begin, lambda *given: next(closed.generate(*given))):
                with pytest.raises(SubspecError, match="the sequence is closed") as caught:
                    use([7, 8, 9], GenerationParams(20))
                assert caught.value.exit_code == Exit.USAGE
            while engine.step():
                pass
            assert sequence.take_new_tokens() == expected


@pytest.mark.parametrize("lossy", [None, Lossy("prob", 0.3, 2)], ids=["exact", "lossy"])
def test_a_verification_that_failed_is_done_again_with_the_same_penalties(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, lossy: Lossy | None
) -> None:
    """What it had walked ahead of is taken back."""
    how = GenerationParams(
        24, SamplingParams(presence_penalty=1.5, frequency_penalty=0.7), lossy=lossy
    )
    prompt, real, left = [*range(40, 60)], Sampler.sample, 0

    def choose(sampler: Sampler, logits: Tensor, position: int) -> int:
        nonlocal left
        left -= 1
        if left in (10, 5, 0):
            raise MemoryError
        return real(sampler, logits, position)

    with Engine.open(artifact) as engine:
        with engine.new_sequence() as sequence:
            expected = generated(sequence, prompt, how)
        with engine.new_sequence() as sequence:
            sequence.begin(prompt, how)
            engine.step()
            left, num_failed = 16, 0
            monkeypatch.setattr(Sampler, "sample", choose)
            while sequence.finish_reason is None:
                try:
                    engine.step()
                except MemoryError:
                    num_failed += 1
            assert sequence.take_new_tokens() == expected and num_failed == 3


def test_a_prompt_that_is_interrupted_is_read_again(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a layer, after a part of the prompt was committed."""
    prompt = [5 + i % 900 for i in range(200)]
    plan = replace(replan(artifact, resident_share=0.3).plan, prefill_chunk_tokens=64)
    with Engine.open(replace(artifact, plan=plan)) as engine, engine.new_sequence() as sequence:
        expected = generated(sequence, prompt, GenerationParams(10))
        sequence.cache.roll_back(0)
        real, left = Cache.write, 9

        def write(cache: Cache, *given: object) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            real(cache, *given)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(Cache, "write", write)
            with pytest.raises(KeyboardInterrupt):
                generated(sequence, prompt, GenerationParams(10))
        assert not engine.step() and sequence.take_new_tokens() == []
        assert generated(sequence, prompt, GenerationParams(10)) == expected
        assert 0 < sequence.stats.cached_tokens < 200
