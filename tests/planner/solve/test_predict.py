"""Seconds and tokens of a candidate, against values worked out by hand and counts of all rounds."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from toys import make_profile, make_spec

from subspec.artifacts.acceptance import ONE_TOKEN, Acceptance, Curve, ExpectedRound
from subspec.artifacts.footprint import Ring
from subspec.artifacts.plan import USUAL, Prediction, Tree, Usage
from subspec.artifacts.profile import LIVE_TOKENS, MORE_TOKENS, Corrections, Profile, Timing
from subspec.planner.machine.profiles import with_link
from subspec.planner.solve.predict import (
    Candidate,
    batched_call_counts,
    overlapped_seconds,
    passes_of,
    predict,
    rounds_needed,
    shares_by_width,
    usual_usage,
)
from subspec.planner.solve.storage import raw_storage, usual_storages

CODED, *_, RAW = usual_storages(make_spec())
RING = Ring(1 << 20, 2)
CHAIN = Candidate(RAW, Tree(1, 4), (8,), RING, "substitute")
PLAIN = Candidate(RAW, None, (8,), RING, "plain")
LINK = 100e6  # bytes per second of the toy's link at 1 MiB
HALF = Acceptance((Curve(1, 0.0, "", 9, 1600, (1600,) * 4, (800, 400, 200, 100)),), measured=True)
AS_TIMED = Usage(64, 2 * (LIVE_TOKENS - 64))  # halfway through it the cache is as it was timed
ALONE: dict[str, float] = {"contended_link": 1.0, "contended_compute": 1.0}
SHARES = (0.01, 0.2, 0.5, 0.9, 1.0)


def never_accepted(*shares: float) -> ExpectedRound:
    """shares: of the rounds that draft 0, 1, ... levels."""
    return ExpectedRound(1.0, 1.0, sum(n * share for n, share in enumerate(shares)), shares)


def whole_tree(tree: Tree | None) -> ExpectedRound:
    return never_accepted(*(0.0,) * tree.depth, 1.0) if tree else ONE_TOKEN


def predicted(
    candidate: Candidate,
    streamed: int = 0,
    expectation: ExpectedRound | None = None,
    prefill_chunk_tokens: int = 128,
    usage: Usage = AS_TIMED,
    **changes: Any,
) -> Prediction:
    """gives: of a whole tree that is never accepted, unless it is given."""
    profile, expectation = make_profile(**changes), expectation or whole_tree(candidate.tree)
    passes = passes_of(
        make_spec(),
        profile,
        candidate.tree,
        candidate.verify_widths,
        expectation,
        prefill_chunk_tokens,
        usage,
    )
    return predict(profile, candidate, passes, streamed, expectation, 0, usage)


def never_rises(seconds: list[float]) -> None:
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(seconds))


# Tokens of a round, rounds of an answer


def counted_rounds(num_tokens: int, reached: list[float]) -> float:
    """The expectation, from all ways in which the rounds of an answer can go."""
    levels = [1.0, *reached, 0.0]
    shares = [here - deeper for here, deeper in pairwise(levels)]
    needed = [0.0]
    for left in range(1, num_tokens + 1):
        rest = (share * needed[max(0, left - n)] for n, share in enumerate(shares, 1))
        needed.append(1 + sum(rest))
    return needed[num_tokens]


def expected_round_with(reached: list[float]) -> ExpectedRound:
    squares = sum((2 * n + 1) * p for n, p in enumerate(reached, 1))
    return replace(ONE_TOKEN, tokens=1 + sum(reached), tokens_squared=1 + squares)


@pytest.mark.parametrize("rate", [0.3, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("depth", [1, 4, 10, 32])
@pytest.mark.parametrize("num_tokens", [127, 255])
def test_the_rounds_of_an_answer_are_those_of_a_count_of_all_ways(
    rate: float, depth: int, num_tokens: int
) -> None:
    """The last round's overshoot included, which is 11 % of what the deepest tree needs."""
    reached = [rate**level for level in range(1, depth + 1)]
    found = rounds_needed(num_tokens, expected_round_with(reached))
    assert found == pytest.approx(counted_rounds(num_tokens, reached), rel=0.02)


def test_an_answer_as_short_as_a_tree_is_deep_is_near_enough() -> None:
    for num_tokens in (1, 2, 5, 11, 23):
        reached = [0.9**level for level in range(1, 17)]
        found = rounds_needed(num_tokens, expected_round_with(reached))
        assert found == pytest.approx(counted_rounds(num_tokens, reached), rel=0.13)
        assert found >= 1


def test_plain_decoding_needs_a_round_for_each_token() -> None:
    assert [rounds_needed(n, ONE_TOKEN) for n in (1, 2, 255)] == [1, 2, 255]


# A round


def test_a_round_on_a_slow_link_lasts_as_long_as_the_link() -> None:
    """10 MiB stream, less than 2 MiB of them arrive while the draft runs; one block of compute is
    left at the end."""
    found = predicted(CHAIN, 10 << 20, HALF.expected_round(Tree(1, 4)), **ALONE)
    assert found.draft_seconds == pytest.approx(4 * (8 * 5e-5 + 5e-5))
    assert found.compute_seconds == pytest.approx(8 * 2e-4 + 1e-4 + 7 / 63 * 3e-4)
    ahead = found.draft_seconds * LINK
    assert ahead < 2 << 20
    link = ((10 << 20) - ahead) / LINK
    assert found.verify_seconds == pytest.approx(link + found.compute_seconds / 10 + 1e-4)
    assert found.stream_seconds == (10 << 20) / LINK
    assert found.tokens_per_round == 1.9375
    rounds = rounds_needed(127, HALF.expected_round(Tree(1, 4)))
    total = found.draft_seconds + found.verify_seconds
    assert found.tokens_per_second == pytest.approx(127 / (rounds * total))


def test_no_more_than_the_ring_crosses_the_link_ahead() -> None:
    slow = tuple(make_profile().draft_layer[-1:])
    found = predicted(
        replace(CHAIN, tree=Tree(8, 100), verify_widths=(801,)), 10 << 20, draft_layer=slow, **ALONE
    )
    assert found.draft_seconds * LINK > 2 << 20
    link = (8 << 20) / LINK
    assert found.verify_seconds == pytest.approx(link + found.compute_seconds / 10 + 1e-4)


def test_the_first_level_of_a_draft_has_one_row() -> None:
    found = predicted(replace(CHAIN, tree=Tree(8, 3), verify_widths=(25,)))
    assert found.draft_seconds == pytest.approx((8 * 5e-5 + 5e-5) + 2 * (8 * 2e-4 + 1e-4))


def test_a_draft_takes_as_long_as_the_levels_that_it_usually_has() -> None:
    wide = replace(CHAIN, tree=Tree(8, 3), verify_widths=(25,))
    first, level = 8 * 5e-5 + 5e-5, 8 * 2e-4 + 1e-4
    for shares, seconds in (
        ((0.0, 0.25, 0.5, 0.25), first + level),
        ((0.0, 1.0), first),
        ((0.5, 0.5), first),  # some level is drafted, so there is a first one
        ((1.0,), 0.0),
    ):
        found = predicted(wide, expectation=never_accepted(*shares))
        assert found.draft_seconds == pytest.approx(seconds)
        assert found.levels_per_round == sum(n * share for n, share in enumerate(shares))


def test_several_answers_share_calls_and_their_drafts_vary_together() -> None:
    """Of 4 answers that draft 2 or 6 levels, two wide: 16 levels, give or take a deviation of 4."""
    expectation = never_accepted(0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.5)
    found = batched_call_counts(Tree(2, 6), (8, 16, 32), expectation, 4)
    assert found == {32: 1.0, 16: 0.5}, "28 rows in one call, 44 in two"
    assert batched_call_counts(Tree(1, 4), (8, 16), whole_tree(Tree(1, 4)), 2) == {16: 1.0}


def test_a_verification_is_as_wide_as_its_draft_needs() -> None:
    """Drafts of 0, 1, 2, 3 levels have 1, 3, 5, 7 nodes."""
    tree, expectation = Tree(2, 3), never_accepted(0.125, 0.25, 0.0, 0.625)
    for widths, expected in (
        ((7,), {7: 1.0}),
        ((3, 8), {3: 0.375, 8: 0.625}),
        ((1, 2, 4, 6, 8), {1: 0.125, 4: 0.25, 8: 0.625}),
        ((5, 64), {5: 0.375, 64: 0.625}),
    ):
        assert shares_by_width(tree, widths, expectation) == expected
    found = predicted(replace(CHAIN, tree=tree, verify_widths=(1, 8, 64)), expectation=expectation)
    one, eight = 8 * 1e-4 + 1e-4, 8 * 2e-4 + 1e-4 + 7 / 63 * 3e-4
    assert found.compute_seconds == pytest.approx(0.125 * one + 0.875 * eight)


def test_more_widths_and_drafts_that_end_sooner_are_never_slower() -> None:
    tree = Tree(2, 15)
    ending = [never_accepted(*(0.0,) * n, 0.75, *(0.0,) * (14 - n), 0.25) for n in range(15)]
    every = (whole_tree(tree), *reversed(ending))
    ladder = ((64,), (32,), (16, 32), (8, 16, 32), (1, 2, 4, 8, 16, 24, 32))
    rounds = [
        [predicted(replace(CHAIN, tree=tree, verify_widths=widths), 1 << 20, expectation)
         for widths in ladder]
        for expectation in every
    ]  # fmt: skip
    for row in rounds:
        never_rises([found.verify_seconds for found in row])
    for column in zip(*rounds, strict=True):
        never_rises([found.draft_seconds + found.compute_seconds for found in column])


def test_a_candidate_without_a_ring_streams_nothing_and_takes_as_long_as_it_computes() -> None:
    for candidate in (CHAIN, PLAIN):
        assert predicted(replace(candidate, ring=None)) == predicted(candidate)
    found = predicted(replace(PLAIN, ring=None))
    assert found.verify_seconds == pytest.approx(found.compute_seconds + 1e-4)


def test_plain_decoding_is_one_unpadded_pass() -> None:
    found = predicted(PLAIN)
    assert found.draft_seconds == found.stream_seconds == 0
    assert found.compute_seconds == pytest.approx(8 * 8e-5 + 1e-4)
    assert found.verify_seconds == pytest.approx(found.compute_seconds + 1e-4)
    assert found.tokens_per_second == pytest.approx(1 / found.verify_seconds)


def test_decoding_is_paid_by_every_weight_that_is_a_residual() -> None:
    found = predicted(replace(CHAIN, storage=CODED), residual_weights_per_second=1e8)
    raw = predicted(CHAIN, residual_weights_per_second=1e8)
    assert found.decode_seconds == pytest.approx(raw_storage(make_spec()).num_bytes / 2 / 1e8)
    assert found.compute_seconds == pytest.approx(raw.compute_seconds + found.decode_seconds)
    assert raw.decode_seconds == 0


@pytest.mark.parametrize(
    ("candidate", "layers", "attention"),
    [(PLAIN, 8, 1e-5), (CHAIN, 8, 1e-5 + 7 / 63 * 1.9e-4)],
)
def test_attention_is_paid_by_the_token_in_the_cache(
    candidate: Candidate, layers: int, attention: float
) -> None:
    """In the middle of an answer. No pass takes less than no time."""
    near, far = (
        predicted(candidate, usage=Usage(prompt, 256)) for prompt in (100, 100 + MORE_TOKENS)
    )
    assert far.compute_seconds - near.compute_seconds == pytest.approx(layers * attention)
    steep = {"fast_attention": (Timing(1, 1.0),), "exact_attention": (Timing(1, 1.0),)}
    assert 0 < predicted(candidate, usage=Usage(1, 2), **steep).compute_seconds < 1e-3


def test_what_real_rounds_took_longer_is_expected_of_all_rounds() -> None:
    factors = Corrections(draft=1.5, verify=2.0, plain=3.0, prompt=4.0)
    for candidate, verify in ((CHAIN, factors.verify), (PLAIN, factors.plain)):
        bare, more = (predicted(candidate, corrections=some) for some in (Corrections(), factors))
        assert more.draft_seconds == pytest.approx(1.5 * bare.draft_seconds)
        assert more.verify_seconds == pytest.approx(verify * bare.verify_seconds)
        first = bare.time_to_first_token_seconds
        assert more.time_to_first_token_seconds == pytest.approx(4 * first)


# Link and compute at once


def sharing(contended_link: float, contended_compute: float) -> Profile:
    return make_profile(contended_link=contended_link, contended_compute=contended_compute)


def test_the_longer_lane_has_its_full_speed_once_the_shorter_has_ended() -> None:
    shares = (0.8, 0.5)
    assert overlapped_seconds(shares, 10.0, 1.0) == pytest.approx(2 + (10 - 2 * 0.8))
    assert overlapped_seconds(shares, 2.0, 10.0) == pytest.approx(2.5 + (10 - 2.5 * 0.5))
    assert overlapped_seconds(shares, 8.0, 5.0) == pytest.approx(10)  # both end at once
    assert overlapped_seconds(shares, 0.0, 3.0) == overlapped_seconds(shares, 3.0, 0.0) == 3


def test_lanes_that_do_not_disturb_each_other_take_as_long_as_the_longer() -> None:
    assert overlapped_seconds((1.0, 1.0), 2.0, 7.0) == 7
    assert overlapped_seconds((1.0, 1.0), 8.0, 7.0) == 8


@pytest.mark.parametrize("contended_link", SHARES)
@pytest.mark.parametrize("contended_compute", SHARES)
def test_more_work_takes_no_less_time_and_a_little_more_takes_little(
    contended_link: float, contended_compute: float
) -> None:
    shares, step = (contended_link, contended_compute), 1 / 64
    most = step / min(contended_link, contended_compute)
    for other in (0.0, 0.1, 1.0, 3.0, 40.0):
        some = [step * n for n in range(400)]
        for seconds in (
            [overlapped_seconds(shares, link, other) for link in some],
            [overlapped_seconds(shares, other, compute) for compute in some],
        ):
            assert all(-1e-9 <= b - a <= most + 1e-9 for a, b in pairwise(seconds))
            assert all(s >= max(n, other) for s, n in zip(seconds, some, strict=True))


@pytest.mark.parametrize("candidate", [CHAIN, PLAIN])
@pytest.mark.parametrize("layer_seconds", [1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("share", SHARES)
def test_a_byte_less_to_stream_is_never_slower(
    candidate: Candidate, layer_seconds: float, share: float
) -> None:
    """Also where a whole number of blocks begins, and on either side of link = compute."""
    layer = (Timing(1, layer_seconds),)
    seconds = [
        predicted(candidate, streamed, fast_layer=layer, exact_layer=layer, contended_link=share,
                  contended_compute=1.01 - share).verify_seconds
        for streamed in range(20 << 20, 0, -99_991)
    ]  # fmt: skip
    never_rises(seconds)


@pytest.mark.parametrize("contended_link", SHARES)
@pytest.mark.parametrize("contended_compute", SHARES)
@pytest.mark.parametrize("layer_seconds", [1e-4, 1e-2, 4e-2])
def test_a_link_that_is_throttled_less_is_never_slower(
    contended_link: float, contended_compute: float, layer_seconds: float
) -> None:
    """Even where link and compute hinder each other so much that one after the other is better."""
    layer, whole = (Timing(1, layer_seconds),), sharing(contended_link, contended_compute)
    throttled = [with_link(whole, int(1e6 * 1.1**n)) for n in range(70)]
    assert throttled[0].link[-1].bytes_per_second == 1e6
    assert throttled[-1] == replace(whole, contended_compute=pytest.approx(contended_compute))
    for candidate in (CHAIN, PLAIN):
        never_rises([
            predicted(candidate, 10 << 20, fast_layer=layer, exact_layer=layer, link=slow.link,
                      contended_link=slow.contended_link,
                      contended_compute=slow.contended_compute).verify_seconds
            for slow in throttled
        ])  # fmt: skip


def test_a_link_throttled_below_what_it_keeps_beside_compute_is_slowed_by_nothing() -> None:
    """At 0.4 of its speed, of which it keeps 0.8: it does half of its harm."""
    profile = sharing(0.8, 0.5)
    slow, shares = with_link(profile, 40_000_000), profile.contended_shares(40e6)
    assert (slow.contended_link, slow.contended_compute) == shares == (1.0, 0.75)
    assert slow.contended_shares(40e6) == shares, "throttled again it is the same"
    assert overlapped_seconds(shares, 10.0, 1.5) == pytest.approx(10)
    assert overlapped_seconds(shares, 4.0, 10.0) == pytest.approx(10 + 4 * 0.25)


# The first token


def test_the_first_token_comes_after_the_prompt_and_one_head() -> None:
    """128 tokens, 64 of them in the cache on average: half a LIVE_TOKENS less than was timed."""
    found = predicted(PLAIN, usage=Usage(128, 0))
    attention = (64 - LIVE_TOKENS) / MORE_TOKENS * (2e-4 + 64 / 63 * 1.9e-4)
    assert found.time_to_first_token_seconds == pytest.approx(8 * (1.28e-3 + attention) + 1e-4)


def test_weights_that_stream_for_the_first_time_are_checked() -> None:
    given: dict[str, Any] = {"streamed": 10 << 20, "usage": USUAL, **ALONE}
    checked, bare = (
        predicted(CHAIN, digest_bytes_per_second=rate, **given) for rate in (10e6, 0.0)
    )
    later = bare.time_to_first_token_seconds
    assert later == pytest.approx((10 << 20) / LINK, rel=0.05)  # the link is the longer
    assert checked.time_to_first_token_seconds == later, "that was for the first prompt alone"
    first = later + checked.digest_seconds
    assert first == pytest.approx((10 << 20) / 10e6, rel=0.05)  # the check is
    assert bare.digest_seconds == 0.0
    assert predicted(CHAIN, usage=USUAL).time_to_first_token_seconds < 0.02


def test_a_prompt_in_two_pieces_streams_the_weights_twice_and_checks_them_once() -> None:
    given: dict[str, Any] = {
        "streamed": 10**8,
        "usage": Usage(128, 128),
        "digest_bytes_per_second": 5e7,
    }
    whole = predicted(PLAIN, prefill_chunk_tokens=128, **given, **ALONE)
    halves = predicted(PLAIN, prefill_chunk_tokens=64, **given, **ALONE)
    extra = halves.time_to_first_token_seconds - whole.time_to_first_token_seconds
    assert extra == pytest.approx(10**8 / LINK, rel=0.01)
    assert halves.digest_seconds == pytest.approx(whole.digest_seconds, rel=0.01)
    assert predicted(PLAIN, prefill_chunk_tokens=100, **given).time_to_first_token_seconds > extra


# Usage


@pytest.mark.parametrize(
    ("context", "prompt", "answer"),
    [(4096, 128, 256), (384, 128, 256), (256, 128, 128), (100, 50, 50), (17, 8, 9)],
)
def test_the_usual_prompt_and_answer_keep_within_the_context(
    context: int, prompt: int, answer: int
) -> None:
    assert usual_usage(context) == Usage(prompt, answer)
