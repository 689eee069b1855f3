"""ModelSpec, Profile, budget -> the fastest Plan that fits, or the smallest budget that has one.

The space is small: every tree x storage x staging ring is tried. The memory that a candidate leaves
is filled with exact weights as they are stored; a storage may have some residuals decoded while
loading. More memory, link or acceptance never predicts fewer tokens/s.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from subspec.artifacts.acceptance import Acceptance, Checks, Curve
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import LARGEST, format_size, short_size, weights_rate
from subspec.artifacts.model import Encoding, ModelSpec
from subspec.artifacts.plan import (
    WITH_DRAFT_MODEL,
    Company,
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
from subspec.planner.solve.predict import Candidate, Proposer, predict, prompt_widths
from subspec.planner.solve.problem import (
    Problem,
    acceptance_of,
    base_ledger,
    candidates,
    default_context,
    left_over,
    make_problem,
    methods_that_draft,
    narrowest,
    passes_for,
    plain_candidates,
    smallest_draft,
    smallest_plain,
    stored_like,
    trees,
    yield_for,
)
from subspec.planner.solve.storage import Storage, choose_resident, group_bytes

# Until acceptance is measured: rates published for 8B models, of a chain and 6 wide; between them
# by the logarithm of the width, and 8 wide as 6 wide.
PRIOR_RATES = {1: 0.968, 2: 0.975, 4: 0.981, 8: 0.985}
PRIOR_LEVELS = 64
# Of a draft model: what is published of models a tenth as large, and a guess at how often the
# substitutes agree.
PRIOR_MODEL_RATES = {1: 0.75, 2: 0.82, 4: 0.87, 8: 0.9}
PRIOR_CHECKS = Checks(passes=0.4, proposed=1.0)


def constant_rate(width: int, rate: float) -> Curve:
    """Trees of which each level is accepted as often as any other."""
    num_trees, levels = 10_000, range(1, PRIOR_LEVELS + 1)
    accepted = tuple(round(num_trees * rate**level) for level in levels)
    return Curve(width, 0.0, "", 1, num_trees, (num_trees,) * PRIOR_LEVELS, accepted)


def prior(rates: dict[int, float]) -> Acceptance:
    return Acceptance(tuple(constant_rate(*one) for one in rates.items()), measured=False)


PRIOR = prior(PRIOR_RATES)


def unknown_proposer(spec: ModelSpec | None) -> Proposer | None:
    """A draft model before anything was learnt of it."""
    return Proposer(spec, prior(PRIOR_MODEL_RATES), PRIOR_CHECKS) if spec else None


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
    methods = methods_that_draft(problem)
    drafted = {method: best_by_width(problem, method) for method in methods}
    fastest = fastest_of(drafted)
    plain = best(problem, plain_candidates(problem, narrowest(problem)))
    if plain is None or (constraints.needs_draft and fastest is None):
        needed = smallest_budget(problem, stored)
        fits = f"needs {format_size(needed)}" if needed else "does not exist on this machine"
        raise SubspecError(
            Exit.INFEASIBLE,
            f"the budget is {format_size(budget_bytes)}, the smallest plan {fits}",
            how_to_fit(problem, needed, stored),
            smallest_budget_bytes=needed or None,
        )
    # All methods share the stored weights and the verify widths: those of the fastest one. Which
    # residuals are decoded while loading may differ.
    asked = constraints.method not in (None, "plain")
    if fastest and (asked or drafted[fastest][0].speed > plain.speed):
        alike = stored_like(problem, drafted[fastest][0].candidate.storage)
        same = replace(problem, storages=alike)
        best_ones = best_by_width(same, fastest)
        room = best_ones[0].candidate.verify_widths
        drafted = {
            method: best_ones if method == fastest else best_by_width(same, method, room)
            for method in methods
        }
        plain = best(same, plain_candidates(same, room))
        assert plain is not None, "it takes less than the draft"
        check_ram(problem, best_ones[0])
    else:
        alike = stored_like(problem, plain.candidate.storage)
        same = replace(problem, storages=alike)
        room = plain.candidate.verify_widths
        drafted = {method: best_by_width(same, method, room) for method in methods}
        check_ram(problem, plain)
    return assemble(problem, plain, {method: some for method, some in drafted.items() if some})


def fastest_of(drafted: dict[Method, list[Scored]]) -> Method | None:
    """None: no draft fits."""
    fitting = [method for method, some in drafted.items() if some]
    return max(fitting, key=lambda method: drafted[method][0].speed, default=None)


def best_by_width(
    problem: Problem, method: Method, room: tuple[int, ...] | None = None
) -> list[Scored]:
    """The best candidate of every tree width, best first; empty if no draft fits. room: see
    `candidates`."""
    by_width = groupby(candidates(problem, method, room), key=lambda c: c.draft_width)
    found = [scored for _, group in by_width if (scored := best(problem, group)) is not None]
    return sorted(found, key=lambda scored: -scored.speed)


def best(problem: Problem, group: Iterable[Candidate]) -> Scored | None:
    """The fastest candidate, scored with whole parts; None if none fits.

    The estimate allows a part to be cut anywhere, so it is an upper bound: the first candidate with
    an estimate below the best score ends the search.
    """
    estimates = [(hope, c) for c in group if (hope := estimate(problem, c)) is not None]
    found: Scored | None = None
    for speed, candidate in sorted(estimates, key=lambda pair: -pair[0]):
        if found is not None and speed <= found.speed:
            break
        scored = score(problem, candidate)
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
    if left < 0:
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
    """num_answers: that decode at once; the tokens/s are those of one."""
    gives = yield_for(problem, candidate.tree, candidate.method)
    passes = passes_for(
        problem, candidate.tree, candidate.verify_widths, num_answers, candidate.method
    )
    return predict(problem.profile, candidate, passes, streamed, gives, peak, problem.usage)


def in_company(problem: Problem, chosen: Scored) -> Iterator[Company]:
    """The best tree of each of 2, 4, 8, ... answers at once, as far as the chosen candidate's
    memory has room for it. Their rows share every call of a verification, whose time grows with
    them: the more answers, the fewer nodes pay."""
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
        yield Company(best, together(best))
        num_answers *= 2


def assemble(problem: Problem, plain: Scored, drafted: dict[Method, list[Scored]]) -> Plan:
    """The plan from the best candidates. `drafted`: best first; a method that does not fit has
    none."""
    found: dict[Method, Scored] = {"plain": plain}
    found |= {method: some[0] for method, some in drafted.items()}
    predicted = {method: scored.prediction for method, scored in found.items()}
    method, reasons = decide(problem, predicted)
    profile = problem.profile
    drafts: dict[Method, Draft] = {
        method: draft_of(problem, scored) for method, scored in found.items() if method != "plain"
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
        prefill_tokens=problem.prefill_tokens,
        placements={method: scored.placement for method, scored in found.items()},
        residuals=plain.candidate.storage.residuals,
        predicted=predicted,
        acceptance=problem.acceptance,
        options=list_options(plain, drafted),
        reasons=reasons,
        company=own.company if own else (),
        constraints=problem.constraints,
        drafts=drafts,
    )


def draft_of(problem: Problem, scored: Scored) -> Draft:
    """What the plan says of a candidate's draft."""
    candidate = scored.candidate
    assert candidate.tree is not None
    checks = None
    if candidate.method == "substitute+draft-model" and problem.proposer is not None:
        checks = problem.proposer.checks
    acceptance = acceptance_of(problem, candidate.method)
    return Draft(candidate.tree, acceptance, tuple(in_company(problem, scored)), checks)


def place(problem: Problem, candidate: Candidate) -> Placement:
    """Choose the resident parts, and drop the ring if all parts are resident."""
    storage, ringless = candidate.storage, replace(candidate, ring=None)
    if left_over(problem, ringless) >= storage.num_bytes:
        candidate = ringless
    stay = choose_resident(storage, left_over(problem, candidate))
    raw = [part for part in stay if not part.is_residual]
    residuals = [part for part in stay if part.is_residual]
    ready = {*storage.decoded, *(part.name for part in raw)}
    ledger = replace(
        base_ledger(problem, candidate),
        resident=group_bytes(raw) + storage.decoded_bytes,
        residuals=group_bytes(residuals),
    )
    ring = candidate.ring
    return Placement(
        tuple(part.name for part in storage.parts if part.name in ready),
        tuple(part.name for part in residuals),
        ring.block_bytes if ring else 0,
        ring.num_slots if ring else 0,
        ledger,
        storage.multiplied_out,
    )


def decide(problem: Problem, predicted: dict[Method, Prediction]) -> tuple[Method, tuple[str, ...]]:
    """The method and the reasons, one sentence each."""
    plain = predicted["plain"].tokens_per_second
    reasons = []
    largest = default_context(problem.spec, LARGEST, 1)
    if problem.constraints.context is None and problem.context < largest:
        reasons.append(
            f"the context is {problem.context} tokens: keys and values of a larger one would take "
            "too much of the budget"
        )
    if problem.prefill_tokens < problem.context and predicted["plain"].streamed_bytes:
        reasons.append(
            f"a prompt streams the weights once per {problem.prefill_tokens} tokens: the "
            "activations of more would take too much of the budget"
        )
    with_model = set(methods_that_draft(problem)) & set(WITH_DRAFT_MODEL)
    if with_model and not with_model & set(predicted):
        reasons.append("the draft model does not fit the budget")
    if problem.constraints.method == "plain":
        return "plain", (*reasons, "plain decoding was asked for")
    drafting: dict[Method, Prediction] = {**predicted}
    del drafting["plain"]
    if not drafting:
        return "plain", (*reasons, "the substitutes do not fit the budget: plain decoding")
    fastest = max(drafting, key=lambda method: drafting[method].tokens_per_second)
    drafted = drafting[fastest].tokens_per_second
    ratio = f"{drafted:.2f} against {plain:.2f} tokens/s"
    if problem.constraints.method is not None:
        return fastest, (*reasons, f"speculation was asked for: {ratio}")
    if drafted <= plain:
        return "plain", (*reasons, f"speculation would not pay: {ratio}")
    return fastest, (*reasons, f"speculation beats plain decoding: {ratio}", *why_drafted(drafting))


def why_drafted(drafting: dict[Method, Prediction]) -> list[str]:
    """Reason for the choice among several methods that draft."""
    if not set(drafting) & set(WITH_DRAFT_MODEL):
        return []
    speeds = sorted(drafting.items(), key=lambda one: -one[1].tokens_per_second)
    listed = ", ".join(f"{name} {said.tokens_per_second:.2f}" for name, said in speeds)
    return [f"predicted tokens/s by what drafts: {listed}"]


def why_early(tree: Tree) -> str:
    return (
        f"a draft ends at the first level whose paths are together less probable than "
        f"{tree.min_path_probability:.3g}"
    )


def why_stored(problem: Problem, chosen: Scored) -> str:
    """Reason for the storage of exact weights, and how many are decoded while loading."""
    storage = chosen.candidate.storage
    decoded, wide = len(storage.decoded), len(storage.multiplied_out)
    reason = why_encoded(problem, chosen)
    if not decoded:
        return reason
    done = "multiplied out" if wide == decoded else "decoded"
    reason += f"; {decoded} of {len(storage.parts)} matrices are {done} while loading"
    return reason + (f", {wide} of them multiplied out" if 0 < wide < decoded else "")


def why_encoded(problem: Problem, chosen: Scored) -> str:
    profile, storage = problem.profile, chosen.candidate.storage
    num_coded, num_parts = len(storage.residuals), len(storage.parts)
    ring = chosen.candidate.ring
    num_weights = sum(part.num_weights for part in problem.spec.parts)
    num_bytes = sum(part.plain_bytes for part in problem.spec.parts)
    link = profile.link_rate(ring.block_bytes if ring else 0) * num_weights / max(1, num_bytes)
    encoding: Encoding = "fp8-residual" if problem.spec.fp8 else "residual"
    decode = weights_rate(profile.decode_rate(encoding))
    rates = f"decoding gives {decode} here, the link {weights_rate(link)} raw"
    what = "the exact weights are stored "
    if not num_coded:
        what += "raw"
    else:
        what += f"as residuals of {storage.bits_per_residual:.1f} bits"
        what += "" if num_coded == num_parts else f", {num_coded} of {num_parts} matrices"
    if problem.constraints.encoding == "kept":
        return f"{what}: as in the existing artifact"
    if problem.constraints.encoding != "auto":
        return f"{what}: that was asked for"
    if not profile.residual_weights_per_second:
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


def check_ram(problem: Problem, scored: Scored) -> None:
    """Raise SubspecError(INFEASIBLE) if streamed weights and embedding exceed pinned host
    memory."""
    if problem.profile.device != "cuda":
        return
    needed = scored.prediction.streamed_bytes + problem.spec.embedding_bytes
    if problem.proposer is not None and scored.candidate.method in WITH_DRAFT_MODEL:
        needed += problem.proposer.spec.embedding_bytes
    ram, pinnable = problem.constraints.ram_bytes, problem.profile.pinnable_bytes
    what = f"streamed weights and the embedding take {short_size(needed)} of pinned host memory"
    if ram is not None and needed > ram:
        raise SubspecError(
            Exit.INFEASIBLE,
            f"{what}, --ram is {short_size(ram)}",
            f"--ram {-(-needed // 10**9)}GB, or a larger --vram",
        )
    if pinnable and needed > pinnable:
        raise SubspecError(
            Exit.INFEASIBLE,
            f"{what}, this process can pin {short_size(pinnable)}",
            "a larger --vram, a higher `ulimit -l`, or more memory for this container",
        )


def how_to_fit(problem: Problem, needed: int, stored: Storage | None) -> str:
    if not needed:
        return ""
    hint = f"--vram {needed}B"
    if stored and stored.residuals and not problem.profile.residual_weights_per_second:
        hint += ", or install a C++ compiler (g++): else residuals are decoded only while loading"
    return hint


def smallest_budget(problem: Problem, stored: Storage | None) -> int:
    """Bytes of the smallest budget that has a plan, to 0.1 %; 0 if none up to 8 TiB has. stored: as
    of `search`."""
    constraints = problem.constraints

    def feasible(budget: int) -> bool:
        smaller = make_problem(
            problem.spec, problem.profile, budget, constraints, problem.acceptance, stored,
            problem.proposer,
        )  # fmt: skip
        smallest = smallest_draft if constraints.needs_draft else smallest_plain
        return smallest(smaller) is not None

    low, high = 0, 1 << 43
    if not feasible(high):
        return 0
    while high - low > high // 1000 + 1:
        middle = (low + high) // 2
        low, high = (low, middle) if feasible(middle) else (middle, high)
    return high
