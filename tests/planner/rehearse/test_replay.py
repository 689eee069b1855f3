"""Trees over known answers: judged as real ones are, and ended where real ones would."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise

import pytest
import torch
from builders import build_artifact, replan

from subspec.artifacts.acceptance import Acceptance, Curve
from subspec.artifacts.format.checks import check_plan
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Method, Prediction, Tree, Usage
from subspec.planner.model.hub import DEMO
from subspec.planner.rehearse import replay as module
from subspec.planner.rehearse.rehearsal import DecodedSample, play
from subspec.planner.rehearse.replay import (
    DEEPEST,
    STOPS,
    WIDEST_EVERY,
    WIDTHS,
    Counts,
    TreeOutcome,
    Trees,
    acceptance_of,
    accepted_under,
    curves_of,
    followed_under,
    judge,
    last_level,
    replay,
)
from subspec.planner.solve.search import make_tree
from subspec.runtime.decode import draft_pass, exact_logits
from subspec.runtime.draft.beam import Level, grow, levels, probability, stops
from subspec.runtime.model.sampling import Sampling
from subspec.runtime.session import Session
from subspec.runtime.text.tokenizer import load_tokenizer
from subspec.runtime.verify import accept

LONG = float("inf")  # until when there is time
PROMPT = list(range(10, 50))
SAID = Prediction(50.0, 0.1, 9_000_000, 2.0, 0.01, 0.02, 0.01, 0.01, 0.0, 4_000_000, 5.0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two that wait for each other take minutes on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Under a plan whose verification has room for any tree of 5 levels."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("demo") / "artifact"
    return build_artifact(DEMO, folder, width=3, depth=5, verify_width=48, resident_share=0.8)


def said(method: Method, usage: Usage) -> Prediction:
    return SAID


def played(session: Session, prompt: list[int], num_tokens: int = 40) -> DecodedSample:
    return play(session, prompt, num_tokens, said, LONG)


def run(session: Session, prompt: list[int], num_tokens: int) -> list[int]:
    return [t for some in session.generate(prompt, num_tokens, Sampling()) for t in some]


def places(session: Session, most_known: int) -> Iterator[tuple[int, ...]]:
    """From where a tree may grow, with the session's cache as it was there: its root and what
    follows, of two answers. The draft is less sure of the second."""
    text = load_tokenizer(session.artifact.path / "tokenizer")
    for prompt in (PROMPT, text.plain_ids("def read(path):\n    ")):
        known = played(session, prompt).tokens
        for start in range(len(known) - 2, len(prompt) - 1, -1):
            session.model.cache.roll_back(start)
            yield known[start : start + 1 + most_known]


# Trees over a known answer


@pytest.mark.parametrize("first_stop", [STOPS[0], 0.95])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_tree_is_judged_as_the_exact_weights_accept_it(
    width: int, first_stop: float, demo: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tree, grown, verified and accepted by what decoding does, from every place; however
    improbable it finds its levels."""
    monkeypatch.setattr(module, "STOPS", (first_stop, 0.97))
    depth, found, improbable = 5, list[tuple[int, int]](), 0
    with Session(demo) as session, torch.inference_mode():
        model = session.model
        for known in places(session, depth):
            if len(known) <= depth:
                continue
            root = torch.tensor([known[0]])
            tree = grow(root, make_tree(width, depth), demo.plan.verify_width, draft_pass(model))
            emitted = accept(tree, exact_logits(model, tree).argmax(-1), depth).emitted()
            assert [*known[1:]][: len(emitted)] == emitted[:depth]
            judged = judge(session, known, width)
            counts = judged.accepted, judged.tried
            assert counts == (len(emitted) - 1, min(len(emitted), depth))
            found.append(counts)
            accepted = judged.probabilities[: judged.accepted]
            improbable += any(p < first_stop for p in accepted[:-1])
    assert len(set(found)) > 1, "trees of one kind prove little"
    assert improbable or first_stop == STOPS[0], "none was accepted behind an improbable level"


@pytest.mark.parametrize("first_stop", [STOPS[0], 0.95])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_tree_is_grown_on_behind_a_rejection_until_no_plan_would(
    width: int, first_stop: float, demo: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is not rejected as far as its text is known."""
    monkeypatch.setattr(module, "STOPS", (first_stop, 0.97))
    grown_on = 0
    with Session(demo) as session, torch.inference_mode():
        cache = session.model.cache
        for known in places(session, 1000):
            judged = judge(session, known, width)
            deepest = min(DEEPEST, (cache.padding_slot - cache.length - 1) // width)
            assert all(a >= b - 1e-5 for a, b in pairwise(judged.probabilities))
            if judged.tried == judged.accepted:
                assert len(judged.probabilities) == min(len(known) - 1, deepest)
                continue
            *behind, last = judged.probabilities[judged.accepted :]
            assert all(p >= first_stop for p in behind)
            assert last < first_stop or len(judged.probabilities) == deepest
            grown_on += len(behind) > 0
    assert grown_on > 1 or first_stop > STOPS[0]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_probabilities_are_those_that_a_draft_compares(width: int, demo: Artifact) -> None:
    num_levels = 0
    with Session(demo) as session, torch.inference_mode():
        model = session.model
        for known in islice(places(session, 1000), 12, None, 7):
            judged = judge(session, known, width)
            room = model.cache.padding_slot - model.cache.length
            tree = make_tree(width, min(DEEPEST, (room - 1) // width))
            root = torch.tensor([known[0]])
            drafted = levels(root, tree, tree.num_nodes, draft_pass(model))
            for expected, (_, level) in zip(judged.probabilities, drafted, strict=False):
                assert probability(level) == expected
                assert not stops(replace(tree, min_path_probability=expected), level)
                assert stops(replace(tree, min_path_probability=expected * (1 + 1e-6)), level)
                assert not stops(tree, level)
                num_levels += 1
    assert num_levels > 20


def test_the_probability_of_a_level_is_that_of_all_its_paths() -> None:
    """0.5 and 0.25 are 0.75, and it is not less than that."""
    level = Level(torch.tensor([1, 2]), torch.tensor([0.5, 0.25]).log())
    assert probability(level) == pytest.approx(0.75)
    assert stops(Tree(2, 9, min_path_probability=0.76), level)
    assert not stops(Tree(2, 9, min_path_probability=0.74), level)
    assert not stops(Tree(2, 9), Level(torch.tensor([1]), torch.tensor([-1e9])))


def test_rounds_of_the_plan_are_judged_as_they_went(demo: Artifact) -> None:
    depth = demo.plan.tree.depth
    with Session(demo) as session, torch.inference_mode():
        answer = played(session, PROMPT, 80)
        accepted = session.stats.accepted
        assert len(answer.starts) == len(accepted) > 12
        for start, number in reversed(list(zip(answer.starts, accepted, strict=True))):
            session.model.cache.roll_back(start)
            judged = judge(session, answer.tokens[start : start + depth + 1], 3)
            assert judged.accepted == number


def test_what_follows_the_end_of_the_answer_is_not_tried(demo: Artifact) -> None:
    with Session(demo) as session, torch.inference_mode():
        known = played(session, PROMPT).tokens
        for start in range(len(known) - 1, len(PROMPT), -1):
            session.model.cache.roll_back(start)
            judged = judge(session, known[start:], 3)
            assert judged.accepted <= judged.tried
            assert judged.tried <= min(judged.accepted + 1, len(known) - 1 - start)
            if start == len(known) - 1:
                assert judged == TreeOutcome(0, 0, ())


def test_a_tree_is_no_deeper_than_the_cache_has_room_for(demo: Artifact) -> None:
    """The last slot belongs to padding; a level of trees 3 wide needs three more."""
    with Session(replan(demo, width=1, depth=7, context=55)) as session, torch.inference_mode():
        cache = session.model.cache
        assert cache.padding_slot == 63
        cache.commit([5] * 60)
        known = [5] * 10
        assert judge(session, known, 3) == TreeOutcome(0, 0, ())
        judged = judge(session, known, 1)
        assert 1 <= judged.tried <= 2 and len(judged.probabilities) <= 2
        cache.roll_back(59)
        judged = judge(session, known, 3)
        assert judged.tried == len(judged.probabilities) == 1
        assert judge(session, known, 8) == TreeOutcome(0, 0, ())


def test_a_session_goes_on_after_its_trees_were_replayed(demo: Artifact) -> None:
    with Session(demo) as session:
        expected = run(session, PROMPT, 40)
    trees: Trees = {}
    with Session(demo) as session, torch.inference_mode():
        for _ in range(2):
            answer = played(session, PROMPT)
            assert list(answer.tokens[len(PROMPT) :])[:40] == expected
            replay(session, answer.tokens, answer.starts, "code", trees, LONG)
        once = {key: sum(judged.tried > 0 for judged in trees[key]) // 2 for key in trees}
        every, third = len(answer.starts), -(-len(answer.starts) // WIDEST_EVERY)
        assert once == {(1, "code"): every, (3, "code"): every, (8, "code"): third}
    with Session(demo) as session, torch.inference_mode():
        answer = played(session, PROMPT)
        replay(session, answer.tokens, answer.starts, "code", trees, LONG)
        assert run(session, PROMPT, 40) == expected


# Counts


def test_counts_of_a_tree_end_with_the_first_level_that_failed() -> None:
    counts = Counts()
    for judged in ((3, 4), (0, 1), (2, 2), (0, 0)):
        counts.add(*judged)
    curve = counts.curve(3, "code")
    assert (curve.tried, curve.accepted) == ((3, 2, 1, 1), (2, 2, 1, 0))
    assert Counts().curve(1, "").tried == ()


# Ended early


@dataclass(frozen=True)
class Draft:
    """All that could be known of a tree: level by level, as deep as any is."""

    accepted: tuple[bool, ...]  # had the levels above been
    probabilities: tuple[float, ...]
    known: int  # levels before the text ends
    room: int  # levels that the cache has room for

    def judged(self) -> TreeOutcome:
        """As `judge` sees it."""
        deepest = min(self.room, DEEPEST)
        seen, accepted, rejected = list[float](), 0, False
        for level in range(deepest):
            seen.append(self.probabilities[level])
            if not rejected and self.accepted[level]:
                accepted += 1
                if accepted == self.known:
                    break
            else:
                rejected = True
            if rejected and seen[-1] < STOPS[0]:
                break
        return TreeOutcome(accepted, accepted + rejected, tuple(seen))

    def replayed(self, min_path_probability: float) -> tuple[tuple[int, int], tuple[int, int]]:
        """Drafted by the rule, then judged: levels accepted and tried, followed and drafted."""
        deepest = min(self.room, DEEPEST)
        drafted = 0
        while drafted < deepest:
            drafted += 1
            if self.probabilities[drafted - 1] < min_path_probability:
                break
        accepted = tried = 0
        for level in range(min(deepest, self.known)):
            tried += 1
            if level >= drafted or not self.accepted[level]:
                break
            accepted += 1
        # How a draft goes on behind the end of its text is not known.
        seen = min(drafted, self.known) if all(self.accepted[: self.known]) else drafted
        followed = sum(p >= min_path_probability for p in self.probabilities[:seen])
        return (accepted, tried), (followed, seen)


def random_drafts(seed: int, number: int) -> Iterator[Draft]:
    pick = random.Random(seed)
    for _ in range(number):
        fall, hard = pick.choice((0.995, 0.95, 0.8, 0.5)), pick.choice((0.02, 0.1, 0.5))
        probabilities, now = list[float](), 1.0
        for _ in range(DEEPEST):
            now *= pick.uniform(fall, 1.0)
            probabilities.append(now)
        yield Draft(
            tuple(pick.random() > hard for _ in range(DEEPEST)),
            tuple(probabilities),
            known=pick.choice((pick.randint(1, 8), 1000)),
            room=pick.choice((pick.randint(1, DEEPEST), 1000)),
        )


def test_ended_early_a_tree_counts_as_one_that_was_grown_by_the_rule() -> None:
    cases = dict.fromkeys(("alive", "dead before", "at the last accepted", "text", "deepest"), 0)
    for draft in random_drafts(1, 4000):
        judged = draft.judged()
        for min_path_probability in (*STOPS, 0.9):
            accepted, followed = draft.replayed(min_path_probability)
            assert accepted_under(min_path_probability, judged) == accepted, (
                draft,
                min_path_probability,
            )
            assert followed_under(min_path_probability, judged) == followed, (
                draft,
                min_path_probability,
            )
            last = last_level(min_path_probability, judged)
            if last is None:
                cases["text"] += judged.accepted == draft.known
                cases["deepest"] += judged.accepted == DEEPEST
            else:
                cases["alive"] += judged.accepted > last
                cases["dead before"] += judged.accepted < last
                cases["at the last accepted"] += judged.accepted == last
                cases["text"] += judged.accepted == draft.known == last
                cases["deepest"] += last == DEEPEST
    assert min(cases.values()) > 20, cases


def test_trees_that_ended_early_worked_out_by_hand() -> None:
    fell = TreeOutcome(3, 4, (0.9, 0.6, 0.4, 0.2, 0.1))
    assert [last_level(stop, fell) for stop in (0.05, 0.15, 0.3, 0.5, 0.95)] == [None, 5, 4, 3, 1]
    # The fourth level is drafted, and rejected; or it is not drafted, which is known to cost it.
    assert [accepted_under(stop, fell) for stop in (0.05, 0.3, 0.5, 0.65, 0.95)] == [
        (3, 4), (3, 4), (3, 4), (2, 3), (1, 2),
    ]  # fmt: skip
    assert [followed_under(stop, fell) for stop in (0.05, 0.3, 0.5, 0.95)] == [
        (5, 5), (3, 4), (2, 3), (0, 1),
    ]  # fmt: skip
    nothing = TreeOutcome(0, 0, ())
    assert accepted_under(0.5, nothing) == followed_under(0.5, nothing) == (0, 0)


def test_where_the_text_ends_no_level_behind_it_was_tried_by_any_tree() -> None:
    """Whether it ended early there or not: else only the trees that did would count."""
    ended = TreeOutcome(2, 2, (0.9, 0.2))
    assert accepted_under(0.15, ended) == accepted_under(0.5, ended) == (2, 2)
    assert followed_under(0.15, ended) == (2, 2) and followed_under(0.5, ended) == (1, 2)
    whole = TreeOutcome(DEEPEST, DEEPEST, (*(0.9,) * (DEEPEST - 1), 0.2))
    assert accepted_under(0.5, whole) == (DEEPEST, DEEPEST)


def random_trees(seed: int) -> Trees:
    drafts = iter(list(random_drafts(seed, 1200)))
    return {
        (width, kind): [next(drafts).judged() for _ in range(200)]
        for kind in ("code", "prose")
        for width in WIDTHS
    }


def total(counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(counts) + (0,) * (DEEPEST - len(counts))


def test_no_tree_is_accepted_more_often_for_ending_early() -> None:
    """Level by level; and the higher the stop, the less."""
    found = acceptance_of(random_trees(2))
    assert found is not None and found.measured and found.stops == (0.0, *STOPS)
    by_stop = [found.curves, *(stopping.curves for stopping in found.stopping)]
    for lower, higher in pairwise(by_stop):
        for more, less in zip(lower, higher, strict=True):
            assert (more.width, more.kind) == (less.width, less.kind)
            for name in ("tried", "accepted"):
                pairs = zip(total(getattr(more, name)), total(getattr(less, name)), strict=True)
                assert all(a >= b for a, b in pairs), name
            assert sum(less.accepted) < sum(more.accepted)
            assert less.tried[0] == more.tried[0] == 200
    for width in WIDTHS:
        drafted = [found.levels(width, DEEPEST, "", stop)[-1] for stop in found.stops]
        assert drafted == sorted(drafted, reverse=True) and drafted[-1] < drafted[0] == DEEPEST


def test_what_is_counted_of_trees_that_end_early_is_what_they_draft_and_emit() -> None:
    """The mean over 40 000 of one kind, none of which its text cut short."""
    drafts = [replace(draft, known=1000, room=1000) for draft in random_drafts(3, 40_000)]
    trees: Trees = {(1, "code"): [draft.judged() for draft in drafts]}
    found = acceptance_of(trees)
    assert found is not None
    for min_path_probability in STOPS:
        replayed = [draft.replayed(min_path_probability) for draft in drafts]
        tokens = 1 + sum(accepted for (accepted, _), _ in replayed) / len(drafts)
        drafted = sum(seen for _, (_, seen) in replayed) / len(drafts)
        assert found.under(min_path_probability).tokens(1, DEEPEST) == pytest.approx(
            tokens, rel=0.01
        )
        levels_of = found.levels(1, DEEPEST, "", min_path_probability)
        assert levels_of[-1] == pytest.approx(drafted, rel=0.01)


def test_counts_pass_the_readers_check(demo: Artifact) -> None:
    found = acceptance_of(random_trees(4))
    assert found is not None
    check_plan(demo.spec, demo.stored_parts(), replace(demo.plan, acceptance=found))


def test_without_a_tree_that_was_tried_there_is_no_acceptance() -> None:
    nothing: Trees = {(1, "code"): [TreeOutcome(0, 0, ())], (3, "code"): []}
    assert acceptance_of({}) is None and acceptance_of(nothing) is None
    some = {**nothing, (8, "code"): [TreeOutcome(1, 2, (0.9, 0.8, 0.05))]}
    found = acceptance_of(some)
    assert isinstance(found, Acceptance)
    assert found.curves == (Curve(8, "code", (1, 1), (1, 0)),)
    assert found.stopping[0].followed == (Curve(8, "code", (1, 1, 1), (1, 1, 0)),)
    assert list(curves_of(nothing, partial(followed_under, 0.3))) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_real_tree_ends_and_is_accepted_as_its_judged_twin(
    width: int, demo: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth, ended, cut = 5, 0, 0
    monkeypatch.setattr(module, "DEEPEST", depth)
    with Session(demo) as session, torch.inference_mode():
        model = session.model
        for known in places(session, depth):
            if len(known) <= depth:
                continue
            judged = judge(session, known, width)
            for min_path_probability in (STOPS[-1], 0.9, 0.98):
                tree = make_tree(width, depth, min_path_probability)
                root = torch.tensor([known[0]])
                grown = grow(root, tree, tree.num_nodes, draft_pass(model))
                num_levels = (grown.num_nodes - 1) // width
                last = last_level(min_path_probability, judged)
                assert num_levels == (last or depth)
                emitted = accept(grown, exact_logits(model, grown).argmax(-1), depth).emitted()
                accepted = len(emitted) - 1
                assert accepted_under(min_path_probability, judged) == (
                    accepted,
                    min(len(emitted), depth),
                )
                assert followed_under(min_path_probability, judged) == (
                    num_levels - (last is not None), num_levels,
                )  # fmt: skip
                ended += num_levels < depth
                cut += accepted < judged.accepted
    assert ended >= cut > 0
