"""The search: nothing feasible is better, more is never slower, the user is never overruled."""

import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from operator import mul
from typing import Any

import pytest
from samples import sampled
from toys import ACCEPTANCE, make_curve, make_hybrid_spec, make_profile, make_spec

from subspec.artifacts.acceptance import ONE_TOKEN, Acceptance, Curve
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.formatting import number
from subspec.artifacts.common.sizes import parse_size, size_argument
from subspec.artifacts.footprint import (
    ALLOCATOR_BYTES,
    Ring,
    Shape,
    checkpoints_bytes,
    graph_bytes,
    model_bytes,
    workspace_bytes,
)
from subspec.artifacts.format.checks import check_plan
from subspec.artifacts.model import HEAD, LayerSpec, ModelSpec
from subspec.artifacts.plan import Constraints, Method, Plan, Tree, tree_for
from subspec.artifacts.profile import Corrections, LinkRate, Profile, Timing
from subspec.planner.machine.profiles import with_link
from subspec.planner.report.wording import plain_speed
from subspec.planner.solve import problem as problem_module
from subspec.planner.solve.predict import (
    Candidate,
    pass_seconds,
    passes_of,
    predict,
    usual_usage,
)
from subspec.planner.solve.problem import (
    base_ledger,
    candidates,
    left_over,
    make_problem,
    padded_widths,
)
from subspec.planner.solve.search import PRIOR, PRIOR_LEVELS, PRIOR_RATES, place, search
from subspec.planner.solve.storage import (
    Storage,
    choose_resident,
    group_bytes,
    raw_storage,
    usual_storages,
)

BUDGETS = (6_000_000, 9_000_000, 10_000_000, 12_000_000, 14_500_000, 16_000_000, 30_000_000)
LONG = Constraints(context=1024)
NUM_PARTS = len(make_spec().parts)
TALL = make_spec(num_layers=32)  # so that its weights are most of what a plan takes
DECODE_RATES = (0.0, 2e7, 2e8)  # weights/s; the toy's link brings 5e7 raw ones
SHARES = ((1.0, 1.0), (0.2, 0.2), (0.05, 0.9), (0.9, 0.05))  # kept while link and compute are busy
# Trees that end early do so mostly where they would be rejected.
EARLY = Acceptance(
    (
        make_curve(1, 0.8), make_curve(1, 0.79, "code", 0.3, lasts=0.86),
        make_curve(3, 0.9), make_curve(3, 0.89, "code", 0.3, lasts=0.93),
    ),
    measured=True,
)  # fmt: skip
SLOW_DRAFT = make_profile(draft_layer=(Timing(1, 3e-4), Timing(8, 1e-3)))
CHECKED = random.Random(1).sample(range(5_800_000, 17_000_000), 40)


def plan_for(budget_bytes: int, constraints: Constraints | None = None, **changes: Any) -> Plan:
    usual = {"spec": make_spec(), "profile": make_profile(), "acceptance": ACCEPTANCE}
    given = {**usual, "constraints": constraints or Constraints(context=256), **changes}
    return search(budget_bytes=budget_bytes, **given)


def speed(plan: Plan) -> float:
    return plan.predicted[plan.method].tokens_per_second


def sharing(shares: tuple[float, float], **changes: Any) -> Profile:
    return make_profile(contended_link=shares[0], contended_compute=shares[1], **changes)


def faster_link(profile: Profile, factor: float) -> Profile:
    link = tuple(LinkRate(r.block_bytes, r.bytes_per_second * factor) for r in profile.link)
    return replace(profile, link=link)


@pytest.fixture
def small_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module, "WIDTHS", (1, 2, 6))
    monkeypatch.setattr(problem_module, "DEPTHS", (1, 3, 9, 10, 30))


# Optimal


@pytest.mark.parametrize(
    ("residual_weights_per_second", "budget_bytes", "shares"),
    sampled(DECODE_RATES, BUDGETS, [(0.8, 0.9), (0.2, 0.2)]),
)
def test_nothing_feasible_is_better(
    budget_bytes: int,
    residual_weights_per_second: float,
    shares: tuple[float, float],
    small_space: None,
) -> None:
    profile = sharing(shares, residual_weights_per_second=residual_weights_per_second)
    assert speed(plan_for(budget_bytes, profile=profile)) == best_of_all(budget_bytes, profile)


@pytest.mark.parametrize(
    ("residual_weights_per_second", "budget_bytes", "stored"),
    sampled(DECODE_RATES, [*BUDGETS, 18_000_000, 20_000_000], [0, 5]),
)
def test_nothing_feasible_is_better_for_the_residuals_of_an_artifact(
    budget_bytes: int, residual_weights_per_second: float, stored: int, small_space: None
) -> None:
    profile, storage = (
        make_profile(residual_weights_per_second=residual_weights_per_second),
        usual_storages(make_spec())[stored],
    )
    best = best_of_all(budget_bytes, profile, storage)
    if best:
        assert speed(plan_for(budget_bytes, profile=profile, stored=storage)) == best
    else:  # without a decoder
        with pytest.raises(SubspecError):
            plan_for(budget_bytes, profile=profile, stored=storage)


@pytest.mark.parametrize("budget_bytes", [9_000_000, 12_000_000])
@pytest.mark.parametrize("alike", [((8, 16, 32, 64),), ((8, 24), (16, 32, 64))])
def test_nothing_feasible_is_better_where_drafts_may_end_early(
    budget_bytes: int, alike: tuple[tuple[int, ...], ...], small_space: None
) -> None:
    profile = replace(SLOW_DRAFT, batch_invariant_widths=alike)
    plan = plan_for(budget_bytes, profile=profile, acceptance=EARLY)
    assert speed(plan) == best_of_all(budget_bytes, profile, acceptance=EARLY)
    assert plan.verify_widths == padded_widths(profile, plan.tree.num_nodes)


def best_of_all(
    budget_bytes: int,
    profile: Profile,
    stored: Storage | None = None,
    acceptance: Acceptance = ACCEPTANCE,
) -> float:
    """Every candidate, its ledger added up, its parts named, its prediction asked of predict.py."""
    spec = make_spec()
    problem = make_problem(
        spec, profile, budget_bytes, Constraints(context=256), acceptance, stored
    )
    usage = usual_usage(256)
    every = list(candidates(problem))
    every += [replace(c, tree=None, method="plain") for c in every]
    speeds = [0.0]
    for candidate in every:
        ringless = replace(candidate, ring=None)
        decoded = [p for p in candidate.storage.parts if p.name in candidate.storage.decoded]
        decoded_bytes = sum(p.part.num_bytes for p in decoded)  # whole pages
        everything = candidate.storage.num_bytes
        left, most = (budget_bytes - base_ledger(problem, c).total_bytes - decoded_bytes
                      for c in (candidate, ringless))  # fmt: skip
        assert (left, most) == (left_over(problem, candidate), left_over(problem, ringless))
        if left < 0 and most < everything:
            continue
        placement = place(problem, candidate)
        inside = {*placement.resident, *placement.residuals}
        streamed = group_bytes(p for p in candidate.storage.parts if p.name not in inside)
        tree = candidate.tree
        expectation = acceptance.expected_round(tree) if tree else ONE_TOKEN
        passes = passes_of(
            spec,
            profile,
            tree,
            candidate.verify_widths,
            expectation,
            problem.prefill_chunk_tokens,
            usage,
        )
        found = predict(profile, candidate, passes, streamed, expectation, 0, usage)
        speeds.append(found.tokens_per_second)
    return max(speeds)


def test_it_abstains_where_speculation_does_not_pay() -> None:
    """Everything fits: a draft could only lose time."""
    plan = plan_for(30_000_000)
    assert plan.method == "plain"
    assert plan.predicted["plain"].streamed_bytes == 0
    assert "substitute" in plan.placements  # kept for who asks for it
    assert any("not faster" in reason for reason in plan.reasons)


def test_it_abstains_where_no_draft_fits() -> None:
    plan = plan_for(6_500_000)
    assert (plan.method, plan.tree.depth) == ("plain", 0) and list(plan.placements) == ["plain"]
    assert any("do not fit" in reason for reason in plan.reasons)


def test_it_abstains_where_real_rounds_were_too_slow() -> None:
    """The same machine and cap, once runs have taught what rounds take."""
    taught = make_profile(corrections=Corrections(draft=5.0, verify=5.0, num_rounds=40))
    assert plan_for(12_000_000).method == "substitute"
    plan = plan_for(12_000_000, profile=taught)
    assert plan.method == "plain"
    said = " ".join(plan.reasons)
    ratio = re.search(r"not faster than plain decoding: ([0-9.]+) against ([0-9.]+) tokens/s", said)
    assert ratio is not None and float(ratio[1]) < float(ratio[2])


def test_it_abstains_where_drafts_are_rejected() -> None:
    never = Acceptance((make_curve(1, 0.0), make_curve(3, 0.0)), measured=True)
    plan = plan_for(12_000_000, acceptance=never)
    assert plan.method == "plain"
    assert any("speculation is not faster" in reason for reason in plan.reasons)
    asked = plan_for(12_000_000, Constraints(context=256, method="substitute"), acceptance=never)
    assert asked.method == "substitute"
    assert any("speculation: set by --method" in reason for reason in asked.reasons)


@pytest.mark.parametrize("budget_bytes", [9_000_000, 14_500_000, 30_000_000])
@pytest.mark.parametrize("decode_rate", DECODE_RATES)
def test_a_plan_is_compared_with_the_best_of_the_others(
    budget_bytes: int, decode_rate: float
) -> None:
    """Not with what they would do in its weights and widths. A plan for plain decoding alone has
    more memory for prompts."""
    given = {"profile": make_profile(residual_weights_per_second=decode_rate)}
    plan = plan_for(budget_bytes, **given)
    plain, drafted = (
        speed(plan_for(budget_bytes, Constraints(context=256, method=method), **given))
        for method in ("plain", "substitute")
    )
    listed = [option.tokens_per_second for option in plan.options]
    assert speed(plan) == listed[0] == max(plain_speed(plan), drafted) and drafted in listed
    assert plain_speed(plan) >= plain
    ratio = f": {number(drafted)} against {number(plain_speed(plan))} tokens/s"
    assert any(reason.endswith(ratio) for reason in plan.reasons)


def test_it_speculates_on_a_slow_link() -> None:
    plan = plan_for(12_000_000)
    assert plan.method == "substitute"
    assert speed(plan) > 3 * plan.predicted["plain"].tokens_per_second


# Ended early


def said_of_ends(plan: Plan) -> list[str]:
    return [reason for reason in plan.reasons if "path probability is below" in reason]


def test_drafts_end_early_where_acceptance_says_that_it_pays() -> None:
    """Levels that would be rejected are not drafted."""
    plan = plan_for(12_000_000, profile=SLOW_DRAFT, acceptance=EARLY)
    assert (plan.method, plan.tree.min_path_probability) == ("substitute", 0.3)
    assert ["0.3" in reason for reason in said_of_ends(plan)] == [True]
    predicted = plan.predicted["substitute"]
    expected = EARLY.expected_round(plan.tree)
    assert predicted.tokens_per_round == expected.tokens
    assert predicted.levels_per_round == expected.levels < plan.tree.depth - 1
    whole = Constraints(context=256, min_path_probability=0.0)
    assert speed(plan) > speed(plan_for(12_000_000, whole, profile=SLOW_DRAFT, acceptance=EARLY))


@pytest.mark.parametrize("lost", [0.05, 0.3])
def test_drafts_are_whole_where_their_ends_cost_more_tokens_than_they_save_time(
    lost: float,
) -> None:
    mistaken = Acceptance(
        (make_curve(1, 0.9), make_curve(1, 0.9 - lost, "code", 0.3, lasts=0.99)), measured=True
    )
    plan = plan_for(12_000_000, profile=SLOW_DRAFT, acceptance=mistaken)
    assert (plan.method, plan.tree.min_path_probability) == ("substitute", 0.0)
    assert said_of_ends(plan) == []
    assert plan.predicted["substitute"].levels_per_round == plan.tree.depth


@pytest.mark.parametrize("stop", [0.0, 0.1, 0.3, 0.9])
def test_a_threshold_that_the_user_fixed_is_kept(stop: float) -> None:
    """One that was not counted is planned as the next smaller that was."""
    constraints = Constraints(context=256, min_path_probability=stop)
    plan = plan_for(12_000_000, constraints, acceptance=EARLY)
    assert (plan.tree.min_path_probability, plan.constraints) == (stop, constraints)
    assert len(said_of_ends(plan)) == (stop > 0)
    counted = replace(constraints, min_path_probability=0.3 if stop >= 0.3 else 0.0)
    assert plan.predicted == plan_for(12_000_000, counted, acceptance=EARLY).predicted


def test_a_plan_that_decodes_plainly_says_nothing_of_drafts_that_end_early() -> None:
    for constraints in (
        Constraints(context=256, min_path_probability=0.3),
        Constraints(context=256, min_path_probability=0.3, method="plain"),
    ):
        plan = plan_for(30_000_000, constraints)
        assert plan.method == "plain" and said_of_ends(plan) == []


# Verify widths


def test_a_draft_is_padded_to_widths_of_one_group() -> None:
    """The group whose widest pass is the narrowest; of equal ones, that with more widths."""
    profile = make_profile(batch_invariant_widths=((8, 24), (16, 32, 64)))
    for num_nodes, expected in (
        (1, (8,)), (8, (8,)), (9, (16,)), (16, (16,)), (17, (8, 24)), (24, (8, 24)),
        (25, (16, 32)), (33, (16, 32, 64)), (64, (16, 32, 64)), (65, None),
    ):  # fmt: skip
        assert padded_widths(profile, num_nodes) == expected
    tied = make_profile(batch_invariant_widths=((8, 32), (16, 24, 32)))
    assert padded_widths(tied, 25) == (16, 24, 32)
    assert padded_widths(make_profile(batch_invariant_widths=()), 1) is None


def test_a_plan_verifies_with_the_widths_that_its_drafts_need() -> None:
    plan = plan_for(12_000_000, Constraints(context=256, width=3, depth=12), acceptance=EARLY)
    assert plan.verify_widths == (8, 16, 32, 64) and plan.verify_width == 64
    assert plan_for(12_000_000, Constraints(method="plain")).verify_widths == (8,)
    abstains = plan_for(30_000_000)
    assert (abstains.method, abstains.verify_widths) == ("plain", (8,))


def test_each_of_several_answers_drafts_what_pays_for_all_of_them() -> None:
    """Where a row of a verification is dear, fewer of them; their tree's own memory has room."""
    dear = tuple(Timing(width, 1e-3 * width) for width in (8, 16, 32, 64, 104))
    plan = plan_for(
        20 << 20,
        Constraints(context=256, method="substitute", num_sequences=9),
        profile=make_profile(exact_layer=dear),
    )
    assert len(plan.by_batch_size) == 3, "of 2, 4 and 8 answers"
    sizes = [tree.num_nodes for tree in plan.draft.trees]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]
    speeds = [speed(plan), *(one.tokens_per_second for one in plan.by_batch_size)]
    assert speeds == sorted(speeds)
    assert [tree_for(plan.draft.trees, count) for count in (1, 3, 9)] == [
        plan.tree, plan.by_batch_size[0].tree, plan.by_batch_size[2].tree
    ]  # fmt: skip
    assert not plan_for(20 << 20).by_batch_size


def test_what_is_drafted_in_company_keeps_what_the_user_fixed() -> None:
    fixed = Constraints(context=256, width=2, depth=5, num_sequences=4)
    assert {(tree.width, tree.depth) for tree in plan_for(20 << 20, fixed).draft.trees} == {(2, 5)}


def test_more_widths_in_a_group_never_predict_slower(small_space: None) -> None:
    """Drafts that end early need them."""
    speeds = []
    for alike in ((64,), (32, 64), (16, 32, 64), (8, 16, 32, 64), (2, 4, 8, 16, 24, 32, 48, 64)):
        profile = replace(SLOW_DRAFT, batch_invariant_widths=(alike,))
        speeds.append(speed(plan_for(12_000_000, profile=profile, acceptance=EARLY)))
    assert speeds == sorted(speeds) and len(set(speeds)) > 1


# Monotone


def never_falls(speeds: list[float]) -> None:
    assert len(speeds) > 10
    assert speeds == sorted(speeds)


@pytest.mark.parametrize("residual_weights_per_second", DECODE_RATES)
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_more_memory_never_predicts_slower(every: int, residual_weights_per_second: float) -> None:
    profile, budgets = (
        make_profile(residual_weights_per_second=residual_weights_per_second),
        sorted(CHECKED)[::every],
    )
    never_falls([speed(plan_for(budget, profile=profile)) for budget in budgets])


@pytest.mark.parametrize(
    ("residual_weights_per_second", "stored", "constraints"),
    sampled(DECODE_RATES, [0, 5], [Constraints(context=256), LONG]),
)
def test_more_memory_never_predicts_slower_for_the_residuals_of_an_artifact(
    residual_weights_per_second: float, stored: int, constraints: Constraints, small_space: None
) -> None:
    """Up to where all of them are held decoded."""
    given = {
        "profile": make_profile(residual_weights_per_second=residual_weights_per_second),
        "stored": usual_storages(make_spec())[stored],
    }
    from_bytes = (
        (13_600_000 if constraints == LONG else 9_100_000)
        if residual_weights_per_second
        else 19_100_000
    )
    budgets = range(from_bytes, 26_000_000, 290_007)
    plans = [plan_for(budget, constraints, **given) for budget in budgets]
    never_falls([speed(plan) for plan in plans])
    assert plans[-1].predicted[plans[-1].method].decode_seconds == 0


@pytest.mark.parametrize("shares", SHARES)
def test_more_memory_never_predicts_slower_however_link_and_compute_hinder_each_other(
    shares: tuple[float, float], small_space: None
) -> None:
    profile = sharing(shares, residual_weights_per_second=1e8)
    never_falls([speed(plan_for(budget, profile=profile)) for budget in sorted(CHECKED)])


def test_more_memory_never_predicts_slower_where_drafts_may_end_early(small_space: None) -> None:
    profile = replace(SLOW_DRAFT, batch_invariant_widths=((8, 24), (16, 32, 64)))
    plans = [plan_for(b, profile=profile, acceptance=EARLY) for b in sorted(CHECKED)]
    never_falls([speed(plan) for plan in plans])
    assert {plan.tree.min_path_probability for plan in plans if plan.tree.depth} >= {0.3}


def test_prompts_take_no_weights_place_when_memory_grows(small_space: None) -> None:
    """Wide layers: the activations of a prompt take as much as the weights."""
    given = {
        "spec": make_spec(intermediate_size=4096, num_heads=2),
        "profile": make_profile(batch_invariant_widths=((8,),)),
    }
    plans = [plan_for(b, LONG, **given) for b in range(20_000_000, 120_000_000, 500_007)]
    never_falls([speed(plan) for plan in plans])
    tokens = [plan.prefill_chunk_tokens for plan in plans]
    assert (min(tokens), max(tokens)) == (64, 1024)
    streamed = [plan.predicted["plain"].streamed_bytes for plan in plans]
    assert tokens[streamed.index(0)] < 100  # the weights come first


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("share", [1.001, 1.03, 1.2])
def test_a_prompt_has_all_memory_that_verification_and_drafts_need_anyway(
    device: str, share: float
) -> None:
    """What is left of it would not do for another token in the same stream."""
    constraints = Constraints(context=1024, width=3, depth=40)
    wide = ((8, 16, 32, 64, 128),)
    spec, profile = make_spec(), make_profile(device=device, batch_invariant_widths=wide)
    with pytest.raises(SubspecError) as caught:
        plan_for(1_000_000, constraints, profile=profile)
    least = parse_size(caught.value.hint.removeprefix("--vram "))
    plan = plan_for(int(share * least), constraints, profile=profile)
    assert 64 < plan.prefill_chunk_tokens <= 1024

    def needed(method: Method, tokens: int) -> int:
        shape = Shape(
            1024, 1, plan.verify_width, plan.tree.width if method != "plain" else None, tokens,
            profile.num_threads, plan.prompt_widths[0],
        )  # fmt: skip
        return workspace_bytes(spec, plan.device, shape)

    sizes = {method: one.ledger.workspace for method, one in plan.placements.items()}
    assert all(needed(method, plan.prefill_chunk_tokens) <= size for method, size in sizes.items())
    more = plan.prefill_chunk_tokens + 1
    assert more > 1024 or any(needed(method, more) > size for method, size in sizes.items())


@pytest.mark.parametrize("budget_bytes", [8_000_000, 11_000_000, 14_500_000])
def test_faster_decoding_never_predicts_slower(budget_bytes: int, small_space: None) -> None:
    rates = [0.0, *(1e6 * 1.5**n for n in range(20))]
    profiles = [make_profile(residual_weights_per_second=rate) for rate in rates]
    never_falls([speed(plan_for(budget_bytes, profile=profile)) for profile in profiles])


@pytest.mark.parametrize(
    ("budget_bytes", "shares"),
    sampled([8_000_000, 11_000_000, 14_500_000], [(0.8, 0.9), *SHARES]),
)
def test_a_faster_link_never_predicts_slower(
    budget_bytes: int, shares: tuple[float, float], small_space: None
) -> None:
    """One that is faster by itself, and one that is throttled less."""
    profile = sharing(shares, residual_weights_per_second=5e7)
    quicker = [faster_link(profile, 1.35**n) for n in range(-10, 20)]
    never_falls([speed(plan_for(budget_bytes, profile=some)) for some in quicker])
    freer = [with_link(profile, int(5e6 * 1.2**n)) for n in range(20)]
    never_falls([speed(plan_for(budget_bytes, profile=some)) for some in freer])


@pytest.mark.parametrize("budget_bytes", [9_000_000, 12_000_000])
@pytest.mark.parametrize("context", [16, 64, 256])
def test_higher_acceptance_never_predicts_slower(
    budget_bytes: int, context: int, small_space: None
) -> None:
    """Also of answers that are shorter than the deepest tree."""
    curves = [(make_curve(1, n / 40), make_curve(3, n / 30)) for n in range(31)]
    rates = [Acceptance(some, measured=True) for some in curves]
    constraints = Constraints(context=context)
    never_falls([speed(plan_for(budget_bytes, constraints, acceptance=rate)) for rate in rates])


def test_one_level_that_is_accepted_more_often_never_predicts_slower(small_space: None) -> None:
    """Whatever the other levels do."""
    pick = random.Random(5)
    for level in (0, 1, 5, 12):
        below = [pick.uniform(0.1, 1) for _ in range(13)]
        more = [[*below[:level], n / 1000, *below[level + 1 :]] for n in range(100, 1001, 60)]
        trees = 10**9
        counts = [[int(trees * share) for share in accumulate(rates, mul)] for rates in more]
        curves = [Curve(1, 0.0, "", 9, trees, (trees,) * 13, tuple(some)) for some in counts]
        rates = [Acceptance((curve,), measured=True) for curve in curves]
        never_falls([speed(plan_for(9_000_000, acceptance=rate)) for rate in rates])


@pytest.mark.parametrize(
    "given",
    [
        {"profile": make_profile(), "residual_weights_per_second": 0.0},
        {
            "profile": make_profile(device="cuda", overhead_bytes=1_000_000),
            "residual_weights_per_second": 5e7,
        },
    ],
    ids=["cpu", "cuda"],
)
def test_more_memory_with_the_default_context_costs_a_tenth_of_the_speed_at_most(
    given: dict[str, Any], small_space: None
) -> None:
    """What it may cost buys a longer context."""
    decodes = given["residual_weights_per_second"]
    profile = replace(given["profile"], residual_weights_per_second=decodes)
    least = 7_500_000 + (ALLOCATOR_BYTES if profile.device == "cuda" else 0)
    plans = [
        plan_for(budget, Constraints(), profile=profile)
        for budget in range(least, least + 40_000_000, 1_500_007)
    ]
    fastest = plans[0]
    for plan in plans:
        assert speed(plan) >= 0.9 * speed(fastest)
        assert speed(plan) >= speed(fastest) or plan.context > fastest.context
        fastest = max(fastest, plan, key=speed)
    contexts = {plan.context for plan in plans}
    assert len(contexts) > 2 and max(contexts) == 4096


# Within the budget


@pytest.mark.parametrize(
    ("constraints", "device", "dtype", "residual_weights_per_second", "stored"),
    sampled(
        [Constraints(), Constraints(context=256), Constraints(context=1024)],
        ["cpu", "cuda"],
        ["bfloat16", "float32"],
        [0.0, 5e7],
        [None, 0, 5],
    ),
)
def test_every_plan_passes_the_readers_check(
    constraints: Constraints,
    device: str,
    dtype: str,
    residual_weights_per_second: float,
    stored: int | None,
    small_space: None,
) -> None:
    spec = make_spec(dtype=dtype, tie_word_embeddings=dtype == "float32")
    overhead = 1_000_000 if device == "cuda" else 0
    profile = make_profile(
        device=device,
        overhead_bytes=overhead,
        residual_weights_per_second=residual_weights_per_second,
    )
    given = {"spec": spec, "profile": profile}
    if stored is not None:
        given["stored"] = usual_storages(spec)[stored]
    num_plans = 0
    room = ALLOCATOR_BYTES if device == "cuda" else 0
    for small in (*CHECKED[:12], *BUDGETS, 20_000_000, 40_000_000, 60_000_000, 80_000_000):
        budget_bytes = small + room
        try:
            plan = plan_for(budget_bytes, constraints, **given)
        except SubspecError as error:
            assert error.exit_code == Exit.INFEASIBLE
            continue
        num_plans += 1
        parts_of_plan = stored_by(plan, spec).parts
        check_plan(spec, list(parts_of_plan), plan)
        sizes = {part.name: part.padded_bytes for part in parts_of_plan}
        raw_sizes = {part.name: part.part.padded_bytes for part in parts_of_plan}
        for placement in plan.placements.values():
            assert placement.ledger.total_bytes <= budget_bytes
            assert placement.ledger.resident == sum(raw_sizes[n] for n in placement.resident)
            assert not set(placement.resident) & set(placement.residuals)
            assert placement.ledger.residuals == sum(sizes[n] for n in placement.residuals)
        for prediction in plan.predicted.values():
            assert prediction.fast_peak_bytes <= budget_bytes
    assert num_plans > 3 or (stored is not None and num_plans > 0)


@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(),
        Constraints(context=1024),
        Constraints(method="substitute"),
        Constraints(method="plain"),
        Constraints(width=3, depth=10),
        Constraints(depth=20, context=512),
    ],
)
def test_an_infeasible_request_names_the_smallest_cap_that_works(constraints: Constraints) -> None:
    with pytest.raises(SubspecError) as caught:
        plan_for(2_000_000, constraints)
    assert caught.value.exit_code == Exit.INFEASIBLE
    match = re.fullmatch(r"--vram ([\d.]+MB)", caught.value.hint)
    assert match is not None
    smallest = parse_size(match[1])
    check_plan(make_spec(), list(raw_storage(make_spec()).parts), plan_for(smallest, constraints))
    with pytest.raises(SubspecError):
        plan_for(smallest * 99 // 100, constraints)


@pytest.mark.parametrize(
    ("constraints", "hint"),
    [
        (Constraints(width=8, depth=100), "--depth 7 or less"),
        (Constraints(depth=100), "--depth 63 or less"),
        (Constraints(width=64), "--width 63 or less"),
    ],
)
def test_a_tree_that_no_kernel_takes_is_infeasible_at_any_size(
    constraints: Constraints, hint: str
) -> None:
    num_nodes = 1 + (constraints.width or 1) * (constraints.depth or 1)
    said = f"{num_nodes} nodes, the widest batch-invariant pass on this machine has 64 rows"
    with pytest.raises(SubspecError, match=said) as caught:
        plan_for(10**9, constraints)
    assert (caught.value.exit_code, caught.value.hint) == (Exit.INFEASIBLE, hint)


def test_a_machine_without_position_free_kernels_is_refused() -> None:
    with pytest.raises(SubspecError) as caught:
        plan_for(10**9, profile=make_profile(batch_invariant_widths=()))
    assert caught.value.exit_code == Exit.UNSUPPORTED


# What a plan takes on GPUs alone.
ONLY_GPUS = ALLOCATOR_BYTES
EMBEDDING = make_spec().embedding_bytes


def test_what_streams_must_fit_the_host_memory_of_a_gpu() -> None:
    constraints = Constraints(context=256, ram_bytes=2_000_000)
    gpu = make_profile(device="cuda")
    with pytest.raises(SubspecError, match="--ram is 2.00 MB") as caught:
        plan_for(8_000_000 + ONLY_GPUS, constraints, profile=gpu)
    assert caught.value.exit_code == Exit.INFEASIBLE
    resident = plan_for(30_000_000 + ONLY_GPUS, constraints, profile=gpu)
    assert resident.placement("plain").num_slots == 0
    assert plan_for(12_000_000, constraints)  # on cpu the slow tier is the disk
    # What the hint names is enough.
    match = re.fullmatch(r"--ram ([\d.]+MB), or --vram ([\d.]+MB)", caught.value.hint)
    assert match is not None
    ram, vram = map(parse_size, match.groups())
    assert caught.value.smallest_budget_bytes is not None
    assert match[2] == size_argument(caught.value.smallest_budget_bytes)
    assert plan_for(8_000_000 + ONLY_GPUS, replace(constraints, ram_bytes=ram), profile=gpu)
    assert plan_for(vram, constraints, profile=gpu)
    with pytest.raises(SubspecError):
        plan_for(vram * 98 // 100, constraints, profile=gpu)


@pytest.mark.parametrize("ram_bytes", [14_000_000, 18_000_000, 24_000_000])
def test_a_plan_keeps_to_the_host_memory_that_it_is_given(ram_bytes: int) -> None:
    """Where the fastest one would stream more: residuals stream less."""
    # Decoding is slow, so that raw weights are what is fastest.
    gpu = make_profile(device="cuda", residual_weights_per_second=2e7)
    given = {"spec": TALL, "profile": gpu}
    budget = 32_000_000 + ONLY_GPUS + graph_bytes(TALL)
    drafting = Constraints(context=256, method="substitute")
    free = plan_for(budget, drafting, **given)
    assert free.predicted["substitute"].streamed_bytes + EMBEDDING > ram_bytes
    for plan in (
        plan_for(budget, replace(drafting, ram_bytes=ram_bytes), **given),
        plan_for(budget, drafting, spec=TALL, profile=replace(gpu, pinnable_bytes=ram_bytes)),
    ):
        assert all(one.streamed_bytes + EMBEDDING <= ram_bytes for one in plan.predicted.values())
        assert len(plan.residuals) > len(free.residuals) and speed(plan) <= speed(free)


def test_what_streams_must_be_what_the_process_can_pin() -> None:
    gpu = make_profile(device="cuda", pinnable_bytes=1_000_000)
    with pytest.raises(SubspecError, match="this process can pin 1.00 MB") as caught:
        plan_for(8_000_000 + ONLY_GPUS, profile=gpu)
    assert caught.value.exit_code == Exit.INFEASIBLE and "ulimit -l" in caught.value.hint
    for fine, budget in (
        (replace(gpu, pinnable_bytes=0), 8_000_000 + ONLY_GPUS),  # not tried
        (replace(gpu, pinnable_bytes=1 << 30), 8_000_000 + ONLY_GPUS),
        (replace(gpu, device="cpu"), 12_000_000),
    ):
        plan = plan_for(budget, profile=fine)
        assert plan.predicted["plain"].streamed_bytes > 1_000_000


def test_the_states_that_conversations_go_back_to_are_within_the_host_memory_of_a_gpu() -> None:
    """They are not pinned; of fewer conversations there are fewer."""
    spec, gpu = make_hybrid_spec(), make_profile(device="cuda")
    budget = 16_000_000 + ALLOCATOR_BYTES
    four = Constraints(context=256, num_sequences=4)
    ledger = plan_for(budget, four, spec=spec, profile=gpu).host_ledger
    assert ledger is not None and ledger.streamed and ledger.embedding == 2 * 2048 * 256
    assert ledger.checkpoints == checkpoints_bytes(spec, 4) > 0
    plan_for(budget, replace(four, ram_bytes=ledger.total_bytes), spec=spec, profile=gpu)
    with pytest.raises(SubspecError, match="of delta-net checkpoints") as caught:
        less = replace(four, ram_bytes=ledger.total_bytes - ledger.streamed)
        plan_for(budget, less, spec=spec, profile=gpu)
    assert caught.value.exit_code == Exit.INFEASIBLE and "fewer --sequences" in caught.value.hint
    enough = make_profile(device="cuda", pinnable_bytes=ledger.pinned_bytes)
    assert plan_for(budget, four, spec=spec, profile=enough).host_ledger == ledger
    assert plan_for(16_000_000, four, spec=spec).host_ledger is None  # on cpu it is fast memory


# The user's constraints


@pytest.mark.parametrize("budget_bytes", [11_000_000, 14_500_000, 30_000_000])
@pytest.mark.parametrize(
    ("constraints", "kept"),
    [
        (Constraints(context=300), lambda plan: plan.context == 300),
        (Constraints(width=2), lambda plan: plan.tree.width == 2),
        (Constraints(depth=11), lambda plan: plan.tree.depth == 11),
        (
            Constraints(width=1, depth=40),
            lambda plan: (plan.tree.width, plan.tree.depth) == (1, 40),
        ),
        (
            Constraints(method="plain"),
            lambda plan: plan.method == "plain" and "substitute" not in plan.placements,
        ),
        (Constraints(method="substitute"), lambda plan: plan.method == "substitute"),
    ],
)
def test_what_the_user_fixed_is_kept(
    budget_bytes: int, constraints: Constraints, kept: Callable[[Plan], bool]
) -> None:
    plan = plan_for(budget_bytes, constraints)
    assert kept(plan) and plan.constraints == constraints
    assert plan.verify_width >= plan.tree.num_nodes


def test_a_fixed_tree_that_does_not_fit_is_an_error_and_not_plain_decoding() -> None:
    assert plan_for(6_500_000).method == "plain"
    with pytest.raises(SubspecError) as caught:
        plan_for(6_500_000, Constraints(context=256, width=3))
    assert caught.value.exit_code == Exit.INFEASIBLE


@pytest.mark.parametrize("asked", [{"width": 4}, {"depth": 9}])
def test_a_tree_for_plain_decoding_is_a_usage_error(asked: dict[str, int]) -> None:
    with pytest.raises(SubspecError, match="--method plain drafts no tree") as caught:
        plan_for(12_000_000, Constraints(method="plain", **asked))
    assert caught.value.exit_code == Exit.USAGE


def test_a_context_beyond_the_models_positions_is_a_usage_error() -> None:
    with pytest.raises(SubspecError, match="4096 positions") as caught:
        plan_for(10**9, Constraints(context=4097))
    assert caught.value.exit_code == Exit.USAGE


def test_a_default_context_costs_a_tenth_of_the_speed_at_most() -> None:
    """The longest such one: a reason says what the next would give."""
    assert plan_for(10**9, Constraints()).context == 4096
    for budget in (9_000_000, 12_000_000, 14_000_000, 16_000_000, 24_000_000):
        contexts = (256, 512, 1024, 2048, 4096)
        speeds = {one: speed_in_context(budget, one) for one in contexts}
        enough = 0.9 * speeds[256]
        plan = plan_for(budget, Constraints())
        assert plan.context == max(one for one in contexts if speeds[one] >= enough)
        assert speed(plan) == speeds[plan.context]
        said = f"the context is {plan.context} tokens: one of {2 * plan.context}"
        assert (said in plan.reasons[0]) == (plan.context < 4096)


def speed_in_context(budget_bytes: int, context: int) -> float:
    """0: no plan fits."""
    try:
        return speed(plan_for(budget_bytes, Constraints(context=context)))
    except SubspecError:
        return 0.0


def test_a_default_context_grows_where_that_costs_no_speed() -> None:
    """As far as the model has positions and memory is left."""
    spec = make_spec(max_positions=20_000)
    contexts = [
        plan_for(budget, Constraints(), spec=spec).context
        for budget in (30_000_000, 40_000_000, 60_000_000, 10**9)
    ]
    assert contexts == [2048, 4096, 8192, 16384]
    plan = plan_for(10**9, Constraints(), spec=spec)
    assert "the context is 16384 tokens: that costs no speed" in plan.reasons


def test_layers_with_windows_leave_room_for_a_longer_context() -> None:
    """They keep 768 tokens of a text at most, and attending to more takes no longer."""
    spec, profile = make_spec(), make_profile()
    layers = (
        LayerSpec(
            (replace(one.blocks[0], body=replace(one.attentions[0], window=100)), one.blocks[1])
        )
        for one in spec.layers
    )
    windowed = replace(spec, layers=tuple(layers))
    contexts = [plan_for(26_000_000, Constraints(), spec=one).context for one in (spec, windowed)]
    assert contexts == [2048, 4096]
    plans = [plan_for(10**9, Constraints(context=4096), spec=one) for one in (spec, windowed)]
    ledgers = [plan.placement("substitute").ledger for plan in plans]
    assert ledgers[0].windows == ledgers[1].cache == 0
    assert ledgers[1].windows < ledgers[0].cache / 4
    timings = profile.exact_layer, profile.exact_attention, 8
    near, far = (pass_seconds(windowed, *timings, live) for live in (800, 4000))
    assert near == far < pass_seconds(spec, *timings, 4000)


def test_a_default_context_leaves_room_for_a_draft_that_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # More than this whole model:
    monkeypatch.setattr("subspec.artifacts.footprint.ALLOCATOR_BYTES", 0)
    profile = make_profile(device="cuda", overhead_bytes=1_700_000)
    plan = plan_for(17_000_000, Constraints(), profile=profile)
    assert plan.context == 256 and "substitute" in plan.placements
    asked = plan_for(17_000_000, Constraints(context=512), profile=profile)
    assert "substitute" not in asked.placements


# Residency


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_resident_parts_fill_the_bytes_in_execution_order(tie_word_embeddings: bool) -> None:
    for storage in usual_storages(make_spec(tie_word_embeddings=tie_word_embeddings)):
        order = [part.name for part in storage.parts]
        before = 0
        for num_bytes in range(0, storage.num_bytes + 200_000, 50_021):
            stay = choose_resident(storage, num_bytes)
            names = [part.name for part in stay]
            assert names == sorted(set(names), key=order.index)
            taken = sum(part.padded_bytes for part in stay)
            assert before <= taken <= num_bytes  # more bytes never hold less
            others = [part.padded_bytes for part in storage.parts if part.name not in set(names)]
            assert not others or taken + min(others) > num_bytes
            before = taken
        assert len(stay) == len(storage.parts)


def test_all_layers_hold_the_same_first_matrices_but_one() -> None:
    """A layer streams its end, in one piece; layers that hold one more are spread evenly."""
    storage = raw_storage(make_spec())
    layers = {part.part.linear.layer for part in storage.parts if part.part.linear.name != HEAD}
    for num_bytes in accumulate((p.padded_bytes for p in storage.resident_first), initial=0):
        stay = choose_resident(storage, num_bytes)
        held = {n: [p.name for p in stay if p.part.linear.layer == n] for n in layers}
        for layer, own in held.items():
            every = [p.name for p in storage.parts if p.part.linear.layer == layer]
            assert own == every[: len(own)]
        counts = {len(own) for own in held.values()}
        assert max(counts) - min(counts) <= 1
        more = sorted(n for n, own in held.items() if len(own) == max(counts))
        gaps = [b - a for a, b in zip(more, [*more[1:], more[0] + len(layers)], strict=True)]
        assert max(gaps) <= 2 * min(gaps)


# Encoding


def stored_by(plan: Plan, spec: ModelSpec) -> Storage:
    ways = usual_storages(spec)
    return next(way for way in ways if way.residuals == plan.residuals)


def decoding_at(weights_per_second: float) -> Profile:
    """And a link that is the same for blocks of any size."""
    return make_profile(
        link=(LinkRate(64 << 10, 100e6),), residual_weights_per_second=weights_per_second
    )


def test_all_weights_are_residuals_where_the_link_is_slow() -> None:
    plan = plan_for(9_000_000, profile=decoding_at(1e9))
    assert len(plan.residuals) == NUM_PARTS
    assert speed(plan) > 1.5 * speed(plan_for(9_000_000))
    assert "residuals of 7.5 bits: residuals are decoded at 1 billion weights/s" in plan.reasons[-1]


def test_all_weights_are_raw_where_decoding_is_slower_than_the_link() -> None:
    plan = plan_for(9_000_000, profile=decoding_at(1e6))
    assert plan.residuals == ()
    assert "stored raw: residuals are decoded at 1 million weights/s" in plan.reasons[-1]


def test_some_weights_are_raw_where_that_keeps_link_and_decoder_busy() -> None:
    plan = plan_for(8_800_000, profile=decoding_at(6e7))
    assert 5 < len(plan.residuals) < NUM_PARTS - 5
    predicted = plan.predicted["substitute"]
    assert predicted.stream_seconds == pytest.approx(predicted.compute_seconds, rel=0.3)
    for encoding in ("raw", "residual"):
        constraints = Constraints(context=256, encoding=encoding)
        assert speed(plan_for(8_800_000, constraints, profile=decoding_at(6e7))) < speed(plan)


def test_a_split_layer_stays_in_half_the_bytes() -> None:
    """More layers stay in the same memory."""
    raw, split = (
        plan_for(8_500_000, profile=profile).placement("substitute")
        for profile in (make_profile(), decoding_at(1e9))
    )
    assert raw.residuals == () and split.resident == ()
    assert len(split.residuals) > 1.5 * len(raw.resident)


def test_the_encoding_that_was_asked_for_is_kept() -> None:
    fast = make_profile(residual_weights_per_second=1e9)
    raw = plan_for(12_000_000, Constraints(context=256, encoding="raw"), profile=fast)
    assert raw.residuals == () and "set by --encoding" in raw.reasons[-1]
    slow = make_profile(residual_weights_per_second=1e6)
    residual = plan_for(12_000_000, Constraints(context=256, encoding="residual"), profile=slow)
    assert len(residual.residuals) == NUM_PARTS


def test_residuals_that_were_asked_for_need_a_decoder() -> None:
    with pytest.raises(SubspecError, match="no fast decoder") as caught:
        plan_for(12_000_000, Constraints(context=256, encoding="residual"))
    assert caught.value.exit_code == Exit.UNSUPPORTED
    assert "C++ compiler" in caught.value.hint


def test_an_artifacts_weights_are_planned_as_they_are_stored() -> None:
    stored = usual_storages(make_spec())[3]
    plan = search(
        make_spec(),
        make_profile(residual_weights_per_second=1e9),
        12_000_000,
        Constraints(),
        ACCEPTANCE,
        stored,
    )
    assert plan.residuals == stored.residuals


# Held decoded


CODED = usual_storages(TALL)[0]
NUM_CODED = len(CODED.residuals)
DECODING_BOUND = make_profile(link=(LinkRate(64 << 10, 10e9),), residual_weights_per_second=2e7)
LINK_BOUND = make_profile(link=(LinkRate(64 << 10, 50e6),), residual_weights_per_second=1e10)


def num_decoded(plan: Plan) -> int:
    """By the method that the plan chose."""
    placement = plan.placement(plan.method)
    return len(set(placement.resident) & set(plan.residuals))


def only_as_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module, "held_decoded", lambda stored: (stored,))


def plan_tall(share: float, profile: Profile, **changes: Any) -> Plan:
    """For so much of what the model takes as it is."""
    budget_bytes = int(share * model_bytes(TALL))
    return plan_for(budget_bytes, **{"spec": TALL, "profile": profile, "stored": CODED, **changes})


@pytest.mark.parametrize("share", [0.75, 0.85, 0.95, 1.0])
def test_where_decoding_is_the_slower_memory_that_is_left_holds_residuals_decoded(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_tall(share, DECODING_BOUND)
    count = num_decoded(plan)
    assert 0 < count < NUM_CODED and plan.residuals == CODED.residuals
    assert plan.reasons[-1].endswith(f"; {count} of {NUM_CODED} parts are decoded while loading")
    only_as_stored(monkeypatch)
    without = plan_tall(share, DECODING_BOUND)
    assert num_decoded(without) == 0 and "decoded while loading" not in without.reasons[-1]
    assert speed(without) < 1.001 * speed(plan_tall(0.6, DECODING_BOUND))  # memory bought nothing
    assert speed(plan) > 1.1 * speed(without)


@pytest.mark.parametrize("share", [0.6, 0.75, 0.9])
def test_where_the_link_is_the_slower_no_residual_is_held_decoded(share: float) -> None:
    plan = plan_tall(share, LINK_BOUND)
    assert plan.predicted[plan.method].streamed_bytes > 0
    assert "substitute" in plan.placements
    assert plan.placement("substitute").resident == plan.placement("plain").resident == ()


def test_a_new_artifact_has_raw_matrices_instead() -> None:
    """Held or streamed: a mixture of its own is never slower than residuals that are decoded."""
    for share in (0.75, 1.0):
        plan = plan_tall(share, DECODING_BOUND, stored=None)
        assert num_decoded(plan) == 0
        assert speed(plan) >= speed(plan_tall(share, DECODING_BOUND))


def test_residuals_that_were_asked_for_may_be_held_decoded_too() -> None:
    constraints = Constraints(context=256, encoding="residual")
    plan = plan_tall(0.9, DECODING_BOUND, stored=None, constraints=constraints)
    assert len(plan.residuals) == NUM_CODED > num_decoded(plan) > 0
    assert "set by --encoding; " in plan.reasons[-1]


def test_each_method_holds_decoded_what_serves_it() -> None:
    """Once plain decoding holds all decoded it needs no substitutes: their memory helps with it."""
    plan = plan_tall(1.2, DECODING_BOUND)
    assert "substitute" in plan.placements
    assert (
        len(plan.placement("plain").resident)
        == NUM_CODED
        > len(plan.placement("substitute").resident)
        > 0
    )
    assert plan.placement("plain").ledger.substitutes == plan.placement("plain").ledger.scratch == 0
    assert plan.placement("substitute").ledger.substitutes > 0
    assert plan.residuals == CODED.residuals


def test_without_a_decoder_residuals_are_decoded_while_loading_or_not_at_all() -> None:
    without = make_profile()
    assert num_decoded(plan_tall(1.5, without)) == NUM_CODED
    with pytest.raises(SubspecError) as caught:
        plan_tall(0.9, without)
    assert caught.value.exit_code == Exit.INFEASIBLE
    match = re.fullmatch(r"--vram ([\d.]+MB), or install a C\+\+ compiler.*", caught.value.hint)
    assert match is not None
    smallest = plan_for(parse_size(match[1]), spec=TALL, stored=CODED)
    assert num_decoded(smallest) == NUM_CODED


def test_the_priors_are_marked_as_such() -> None:
    assert not PRIOR.measured and PRIOR.margin(Tree(2, 8)) == math.inf
    assert PRIOR.thresholds == (0.0,)  # what ends early is not known
    plan = plan_for(12_000_000, acceptance=PRIOR)
    assert plan.acceptance == PRIOR and plan.tree.min_path_probability == 0
    check_plan(make_spec(), list(raw_storage(make_spec()).parts), plan)


@pytest.mark.parametrize(
    ("width", "rate"), [(1, 0.968), (2, 0.975), (3, 0.975), (4, 0.981), (8, 0.985), (16, 0.985)]
)
def test_the_prior_accepts_each_level_alike(width: int, rate: float) -> None:
    reached = PRIOR.acceptance_rates(Tree(width, PRIOR_LEVELS))
    assert reached == pytest.approx([rate**n for n in range(1, 65)], abs=1e-4)
    assert PRIOR.expected_round(Tree(width, PRIOR_LEVELS)).levels == PRIOR_LEVELS


def test_the_prior_of_a_width_lies_on_the_line_between_the_published_ones() -> None:
    """Over the logarithm of the width: 0.968 at 1, 0.985 at 6 and beyond."""
    assert tuple(PRIOR_RATES) == problem_module.WIDTHS
    for width, rate in PRIOR_RATES.items():
        share = min(1.0, math.log(width, 6))
        assert rate == pytest.approx(0.968 + share * 0.017, abs=5e-4)


def test_the_ring_is_dropped_when_nothing_streams() -> None:
    spec, constraints = make_spec(), Constraints(context=256, method="plain")
    problem = make_problem(spec, make_profile(), 30_000_000, constraints, ACCEPTANCE)
    placement = place(problem, Candidate(raw_storage(spec), None, (8,), Ring(1 << 20, 3), "plain"))
    assert (placement.block_bytes, placement.num_slots, placement.ledger.staging) == (0, 0, 0)
    assert len(placement.resident) == len(spec.parts)
