"""ModelSpec, Profile, budget -> the fastest Plan that fits, or the smallest budget that has one.

The space is small: every tree x storage x staging ring is tried. The memory that a candidate leaves
is filled with exact weights as they are stored; a storage may have some residuals decoded while
loading. More memory, link or acceptance never predicts fewer tokens/s in the same context.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from subspec.artifacts.acceptance import Acceptance, Curve, HierarchicalCost
from subspec.artifacts.common.formatting import number
from subspec.artifacts.common.sizes import weights_rate
from subspec.artifacts.model import Encoding, ModelSpec
from subspec.artifacts.plan import (
    WITH_DRAFT_MODEL,
    BatchDraft,
    Constraints,
    Draft,
    Method,
    Option,
    Placement,
    Plan,
    Prediction,
    Tree,
)
from subspec.artifacts.profile import Profile
from subspec.planner.solve.feasible import nothing_fits
from subspec.planner.solve.predict import Candidate, Proposer, predict, prompt_widths
from subspec.planner.solve.problem import (
    DEFAULT_CONTEXT,
    Problem,
    acceptance_of,
    at_context,
    base_ledger,
    candidates,
    default_contexts,
    expected_round_for,
    host_excess,
    host_ledger,
    left_over,
    make_problem,
    methods_that_draft,
    must_hold,
    narrowest,
    passes_for,
    plain_candidates,
    prompt_tokens_within,
    stored_like,
    trees,
)
from subspec.planner.solve.storage import Storage, choose_resident, group_bytes

# Until acceptance is measured: rates of SubSpec's published logs for 8B models (arXiv 2509.18344),
# of a chain and 6 wide; between them by the logarithm of the width, and 8 wide as 6 wide.
PRIOR_RATES = {1: 0.968, 2: 0.975, 4: 0.981, 8: 0.985}
PRIOR_LEVELS = 64
# Of a draft model, and how often the substitutes agree with it. Chosen, not measured.
PRIOR_MODEL_RATES = {1: 0.75, 2: 0.82, 4: 0.87, 8: 0.9}
PRIOR_HIERARCHICAL_COST = HierarchicalCost(substitute_passes=0.4, proposer_passes=1.0)

# Of the speed, that a default context may take from what a shorter one gives. Chosen, not measured.
CONTEXT_COST = 0.1
SAME_SPEED = 0.999  # at least this share: a longer context than the usual one costs nothing


def constant_rate(width: int, rate: float) -> Curve:
    """A curve with the same acceptance rate at every level."""
    num_trees, levels = 10_000, range(1, PRIOR_LEVELS + 1)
    accepted = tuple(round(num_trees * rate**level) for level in levels)
    return Curve(width, 0.0, "", 1, num_trees, (num_trees,) * PRIOR_LEVELS, accepted)


def prior(rates: dict[int, float]) -> Acceptance:
    return Acceptance(tuple(constant_rate(*one) for one in rates.items()), measured=False)


PRIOR = prior(PRIOR_RATES)


def unknown_proposer(spec: ModelSpec | None) -> Proposer | None:
    """A draft model before anything was measured of it."""
    return Proposer(spec, prior(PRIOR_MODEL_RATES), PRIOR_HIERARCHICAL_COST) if spec else None


@dataclass(frozen=True)
class Scored:
    candidate: Candidate
    placement: Placement
    prediction: Prediction

    @property
    def speed(self) -> float:
        return self.prediction.tokens_per_second


def search(
    spec: ModelSpec,
    profile: Profile,
    budget_bytes: int,
    constraints: Constraints,
    acceptance: Acceptance,
    stored: Storage | None = None,
    proposer: Proposer | None = None,
) -> Plan:
    """The fastest plan. stored: storage of an existing artifact; None: the plan
    decides. proposer: a draft model that it may use. Raises SubspecError(INFEASIBLE) with the
    smallest budget that has a plan."""
    problem = make_problem(spec, profile, budget_bytes, constraints, acceptance, stored, proposer)
    solved, reasons = solve_context(problem)
    if solved.chosen is None:
        raise nothing_fits(problem)
    return assemble(solved, placed_beside(solved, solved.chosen), reasons)


@dataclass(frozen=True)
class Solved:
    """The fastest candidates of a problem, each of them as if the others were not there."""

    problem: Problem
    plain: Scored | None
    drafted: dict[Method, list[Scored]]  # of every tree width, best first

    @property
    def chosen(self) -> Scored | None:
        """The fastest that the user's constraints allow; None: nothing fits."""
        constraints = self.problem.constraints
        drafts = [some[0] for some in self.drafted.values() if some]
        fastest = max(drafts, key=lambda one: one.speed, default=None)
        if self.plain is None or (constraints.needs_draft and fastest is None):
            return None
        asked = constraints.method not in (None, "plain")
        return fastest if fastest and (asked or fastest.speed > self.plain.speed) else self.plain

    @property
    def speed(self) -> float:
        return self.chosen.speed if self.chosen else 0.0

    @property
    def drafting(self) -> set[Method]:
        """The methods whose drafts fit, each by itself."""
        return {method for method, some in self.drafted.items() if some}


def solve(problem: Problem) -> Solved:
    drafted = {method: best_by_width(problem, method) for method in methods_that_draft(problem)}
    return Solved(problem, best(problem, plain_candidates(problem, narrowest(problem))), drafted)


def solve_context(problem: Problem) -> tuple[Solved, tuple[str, ...]]:
    """The problem with the user's context, or the longest default one that costs little speed, and
    the reasons for it. A shorter context leaves more memory: the shortest is the fastest. One that
    is longer than usual leaves every method that drafts its memory."""
    if problem.constraints.context is not None:
        return solve(problem), ()
    _, *contexts = default_contexts(problem.spec)
    fastest = solve(problem)  # of the shortest
    if fastest.chosen is None:
        return fastest, ()
    chosen, longer = fastest, None
    for context in (one for one in reversed(contexts) if one <= DEFAULT_CONTEXT):
        one = solve(at_context(problem, context))
        if one.speed >= (1 - CONTEXT_COST) * fastest.speed:
            chosen = one
            break
        longer = one
    if longer is not None:
        return chosen, (why_shorter(chosen, longer),)
    usual = chosen
    for context in (one for one in contexts if one > usual.problem.context):
        one = solve(at_context(problem, context))
        if one.speed < SAME_SPEED * usual.speed or one.drafting != usual.drafting:
            break
        chosen = one
    if chosen is usual:
        return chosen, ()
    return chosen, (f"the context is {chosen.problem.context} tokens: that costs no speed",)


def why_shorter(chosen: Solved, longer: Solved) -> str:
    """Reason for a context below the default one."""
    said = f"the context is {chosen.problem.context} tokens: one of {longer.problem.context} "
    if not longer.speed:
        return said + "does not fit the budget"
    ratio = f"{number(longer.speed)} tokens/s instead of {number(chosen.speed)}"
    return said + f"would run at {ratio}"


def placed_beside(solved: Solved, chosen: Scored) -> dict[Method, Scored]:
    """The chosen candidate, and the best of every other method that fits beside it: all methods
    share the stored weights and the verify widths. Which residuals are decoded while loading may
    differ."""
    candidate = chosen.candidate
    same = replace(solved.problem, storages=stored_like(solved.problem, candidate.storage))
    room, found = candidate.verify_widths, dict[Method, Scored]()
    methods: tuple[Method, ...] = ("plain", *solved.drafted)
    for method in methods:
        drafts = method != "plain"
        others = candidates(same, method, room) if drafts else plain_candidates(same, room)
        one = chosen if method == candidate.method else best(same, others)
        if one is not None:
            found[method] = one
    return found


def best_by_width(problem: Problem, method: Method) -> list[Scored]:
    """The best candidate of every tree width, best first; empty if no draft fits."""
    by_width = groupby(candidates(problem, method), key=lambda c: c.draft_width)
    found = [scored for _, group in by_width if (scored := best(problem, group)) is not None]
    return sorted(found, key=lambda scored: -scored.speed)


def best(problem: Problem, group: Iterable[Candidate]) -> Scored | None:
    """The fastest candidate, scored with whole parts; None if none fits.

    The estimate allows a part to be cut anywhere, so it is an upper bound: the first candidate with
    an estimate below the best score ends the search.
    """
    estimates = [
        (upper_bound, c) for c in group if (upper_bound := estimate(problem, c)) is not None
    ]
    found: Scored | None = None
    for speed, candidate in sorted(estimates, key=lambda pair: -pair[0]):
        if found is not None and speed <= found.speed:
            break
        scored = score(problem, candidate)
        if host_excess(problem, candidate.method, scored.prediction.streamed_bytes) > 0:
            continue
        if found is None or scored.speed > found.speed:
            found = scored
    return found


def estimate(problem: Problem, candidate: Candidate) -> float | None:
    """tokens/s if all memory that is left holds exact weights; None if the candidate does not fit.

    If everything is resident no staging ring is needed.
    """
    everything, left = candidate.storage.num_bytes, left_over(problem, candidate)
    if left + candidate.ring_bytes >= everything:
        left = everything
    if left < must_hold(problem, candidate):
        return None
    return prediction_of(problem, candidate, everything - left).tokens_per_second


def score(problem: Problem, candidate: Candidate) -> Scored:
    """Placement of a candidate that fits, and the prediction for the parts that stream."""
    placement, storage = place(problem, candidate), candidate.storage
    ledger = placement.ledger
    held = ledger.resident + ledger.residuals
    peak = ledger.total_bytes - ledger.guard
    streamed = storage.num_bytes + storage.decoded_bytes - held
    return Scored(candidate, placement, prediction_of(problem, candidate, streamed, peak))


def prediction_of(
    problem: Problem, candidate: Candidate, streamed: int, peak: int = 0, num_answers: int = 1
) -> Prediction:
    """Prediction of a candidate. num_answers: the batch size; tokens/s are those of one answer."""
    expected = expected_round_for(problem, candidate.tree, candidate.method)
    passes = passes_for(
        problem, candidate.tree, candidate.verify_widths, num_answers, candidate.method
    )
    return predict(problem.profile, candidate, passes, streamed, expected, peak, problem.usage)


def drafts_by_batch_size(problem: Problem, chosen: Scored) -> Iterator[BatchDraft]:
    """The best tree for each of the batch sizes 2, 4, 8, ... within the chosen candidate's memory.
    All rows share the calls of a verification, whose time grows with them, so larger batches have
    smaller trees."""
    candidate, streamed = chosen.candidate, chosen.prediction.streamed_bytes
    room = [
        tree
        for tree, widths in trees(problem, candidate.method)
        if widths[-1] <= candidate.verify_width and tree.width <= (candidate.draft_width or 0)
    ]
    num_answers = 2
    while room and num_answers <= problem.constraints.num_sequences:

        def together(tree: Tree, num_answers: int = num_answers) -> float:
            one = replace(candidate, tree=tree)
            predicted = prediction_of(problem, one, streamed, num_answers=num_answers)
            return num_answers * predicted.tokens_per_second

        best = max(room, key=together)
        yield BatchDraft(best, together(best))
        num_answers *= 2


def assemble(solved: Solved, placed: dict[Method, Scored], reasons: tuple[str, ...]) -> Plan:
    """The plan of the methods that were placed beside each other. reasons: for the context. Speeds
    in the reasons are those that each method reaches without the others."""
    room = prompt_tokens_within(solved.problem, (one.candidate for one in placed.values()))
    problem = replace(solved.problem, prefill_chunk_tokens=room)
    found = {method: with_prompts_of(problem, one) for method, one in placed.items()}
    plain, predicted = found["plain"], {name: one.prediction for name, one in found.items()}
    assert solved.plain is not None and solved.chosen is not None, "something fits"
    method = solved.chosen.candidate.method
    if problem.prefill_chunk_tokens < problem.context and predicted["plain"].streamed_bytes:
        reasons += (
            f"prefill streams the weights once per {problem.prefill_chunk_tokens} tokens: the "
            "activations of larger chunks would take too much of the budget",
        )
    speeds = {name: some[0].speed for name, some in solved.drafted.items() if some}
    reasons += why_method(problem, method, solved.plain.speed, speeds)
    profile = problem.profile
    drafts: dict[Method, Draft] = {
        name: draft_of(problem, scored) for name, scored in found.items() if name != "plain"
    }
    if method in drafts and drafts[method].tree.min_path_probability:
        reasons = (*reasons, why_early(drafts[method].tree))
    own = drafts.pop("substitute", None)
    reasons = (*reasons, why_stored(problem, found[method]))
    return Plan(
        device=profile.device,
        machine=profile.machine,
        budget_bytes=problem.budget_bytes,
        context=problem.context,
        num_sequences=problem.constraints.num_sequences,
        method=method,
        tree=own.tree if own else Tree(1, 0),
        verify_widths=plain.candidate.verify_widths,
        prompt_widths=prompt_widths(profile, plain.candidate.verify_width),
        num_threads=profile.num_threads,
        int4_kernel=profile.int4_kernel,
        draft_graphs=profile.draft_graphs,
        prefill_chunk_tokens=problem.prefill_chunk_tokens,
        placements={name: scored.placement for name, scored in found.items()},
        residuals=plain.candidate.storage.residuals,
        predicted=predicted,
        acceptance=problem.acceptance,
        options=list_options(solved.plain, solved.drafted),
        reasons=reasons,
        by_batch_size=own.by_batch_size if own else (),
        constraints=problem.constraints,
        drafts=drafts,
        host_ledger=host_ledger(problem, method, predicted[method].streamed_bytes),
    )


def with_prompts_of(problem: Problem, scored: Scored) -> Scored:
    """The candidate, with its prediction for the problem's prompts."""
    before = scored.prediction
    after = prediction_of(problem, scored.candidate, before.streamed_bytes, before.fast_peak_bytes)
    return replace(scored, prediction=after)


def draft_of(problem: Problem, scored: Scored) -> Draft:
    """The plan's Draft of a candidate."""
    candidate = scored.candidate
    assert candidate.tree is not None
    cost = None
    if candidate.method == "substitute+draft-model" and problem.proposer is not None:
        cost = problem.proposer.hierarchical_cost
    acceptance = acceptance_of(problem, candidate.method)
    return Draft(candidate.tree, acceptance, tuple(drafts_by_batch_size(problem, scored)), cost)


def place(problem: Problem, candidate: Candidate) -> Placement:
    """Choose the resident parts, and drop the ring if all parts are resident."""
    storage, ringless = candidate.storage, replace(candidate, ring=None)
    if left_over(problem, ringless) >= storage.num_bytes:
        candidate = ringless
    resident_parts = choose_resident(storage, left_over(problem, candidate))
    raw = [part for part in resident_parts if not part.is_residual]
    residuals = [part for part in resident_parts if part.is_residual]
    resident_names = {*storage.decoded, *(part.name for part in raw)}
    ledger = replace(
        base_ledger(problem, candidate),
        resident=group_bytes(raw) + storage.decoded_bytes,
        residuals=group_bytes(residuals),
    )
    ring = candidate.ring
    return Placement(
        tuple(part.name for part in storage.parts if part.name in resident_names),
        tuple(part.name for part in residuals),
        ring.block_bytes if ring else 0,
        ring.num_slots if ring else 0,
        ledger,
        storage.dequantized,
    )


def why_method(
    problem: Problem, method: Method, plain: float, drafted: dict[Method, float]
) -> tuple[str, ...]:
    """Return the reasons for the method, one sentence each. plain, drafted: tokens/s of the
    methods, each as if the others were not there."""
    reasons: tuple[str, ...] = ()
    with_model = set(methods_that_draft(problem)) & set(WITH_DRAFT_MODEL)
    if with_model and not with_model & set(drafted):
        reasons = ("the draft model does not fit the budget",)
    if problem.constraints.method == "plain":
        return (*reasons, "plain decoding: set by --method")
    if not drafted:
        return (*reasons, "the substitutes do not fit the budget: plain decoding")
    ratio = f"{number(max(drafted.values()))} against {number(plain)} tokens/s"
    if problem.constraints.method is not None:
        return (*reasons, f"speculation: set by --method, {ratio}")
    if method == "plain":
        return (*reasons, f"speculation is not faster than plain decoding: {ratio}")
    return (*reasons, f"speculation beats plain decoding: {ratio}", *why_drafted(drafted))


def why_drafted(drafted: dict[Method, float]) -> list[str]:
    """Reason for the choice among several methods that draft."""
    if not set(drafted) & set(WITH_DRAFT_MODEL):
        return []
    speeds = sorted(drafted.items(), key=lambda one: -one[1])
    listed = ", ".join(f"{name} {number(speed)}" for name, speed in speeds)
    return [f"predicted tokens/s by drafter: {listed}"]


def why_early(tree: Tree) -> str:
    return (
        "drafting stops at the first level whose total path probability is below "
        f"{tree.min_path_probability:.3g}"
    )


def why_stored(problem: Problem, chosen: Scored) -> str:
    """Reason for the storage of exact weights, and how many are decoded while loading."""
    storage = chosen.candidate.storage
    decoded, num_dequantized = len(storage.decoded), len(storage.dequantized)
    reason = why_encoded(problem, chosen)
    if not decoded:
        return reason
    done = "dequantized" if num_dequantized == decoded else "decoded"
    reason += f"; {decoded} of {len(storage.parts)} parts are {done} while loading"
    return reason + (
        f", {num_dequantized} of them dequantized" if 0 < num_dequantized < decoded else ""
    )


def why_encoded(problem: Problem, chosen: Scored) -> str:
    profile, storage = problem.profile, chosen.candidate.storage
    num_coded, num_parts = len(storage.residuals), len(storage.parts)
    ring = chosen.candidate.ring
    num_weights = sum(part.num_weights for part in problem.spec.parts)
    num_bytes = sum(part.plain_bytes for part in problem.spec.parts)
    link = profile.link_rate(ring.block_bytes if ring else 0) * num_weights / max(1, num_bytes)
    encoding: Encoding = "fp8-residual" if problem.spec.fp8 else "residual"
    decode = weights_rate(profile.weights_per_second(encoding))
    rates = f"residuals are decoded at {decode}, raw weights stream at {weights_rate(link)}"
    what = "the exact weights are stored "
    if not num_coded:
        what += "raw"
    else:
        what += f"as residuals of {storage.bits_per_residual:.1f} bits"
        what += "" if num_coded == num_parts else f", {num_coded} of {num_parts} parts"
    if problem.constraints.encoding == "kept":
        return f"{what}: as in the existing artifact"
    if problem.constraints.encoding != "auto":
        return f"{what}: set by --encoding"
    if not profile.weights_per_second(encoding):
        return f"{what}: there is no fast decoder for residuals here (a C++ compiler builds one)"
    if not chosen.prediction.streamed_bytes and not num_coded:
        return f"{what}: all of them fit"
    return f"{what}: {rates}"


def list_options(plain: Scored, drafted: dict[Method, list[Scored]]) -> tuple[Option, ...]:
    found = [Option("plain decoding, one token per pass", plain.speed)]
    found += [
        Option(option_label(method, tree), scored.speed)
        for method, some in drafted.items()
        for scored in some
        if (tree := scored.candidate.tree)
    ]
    return tuple(sorted(found, key=lambda option: -option.tokens_per_second))


def option_label(method: Method, tree: Tree) -> str:
    whose = "" if method == "substitute" else f", {method}"
    return f"tree {tree.width} wide, {tree.depth} deep{whose}"
