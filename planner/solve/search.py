"""ModelSpec, Profile, budget -> the cheapest Plan that fits, or what is missing.

The space is small: every tree x storage x staging ring is tried. The fast memory that a candidate
leaves holds exact weights, as they are stored; a storage may ask that some residuals are held
decoded. More of anything (memory, link, acceptance) never predicts fewer tokens/s.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby

from subspec.artifacts.acceptance import Acceptance, Curve
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import LARGEST, format_size, short_size, weights_rate
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import (
    USUAL,
    Constraints,
    Method,
    Option,
    Placement,
    Plan,
    Prediction,
    Tree,
    Usage,
)
from subspec.artifacts.profile import Profile
from subspec.planner.solve.predict import Candidate, predict
from subspec.planner.solve.problem import (
    Problem,
    base_ledger,
    candidates,
    default_context,
    left_over,
    make_problem,
    narrowest,
    passes_for,
    plain_candidates,
    smallest_draft,
    smallest_plain,
    stored_like,
    yield_for,
)
from subspec.planner.solve.storage import Storage, choose_resident, group_bytes

# Until it is measured: hazards of 3.2 % (chain) and 1.5 % (6 wide), published for 8B-class models.
PRIOR = Acceptance((Curve(1, "", (1000,), (968,)), Curve(6, "", (1000,), (985,))), measured=False)


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
    usage: Usage = USUAL,
) -> Plan:
    """stored: how an existing artifact holds the weights; None: the plan decides it. usage: what it
    is to be fast for. Raises SubspecError(INFEASIBLE) with the smallest budget that works."""
    problem = make_problem(spec, profile, budget_bytes, constraints, acceptance, stored, usage)
    drafted = best_by_width(problem)
    plain = best(problem, plain_candidates(problem, narrowest(problem)))
    if plain is None or (constraints.needs_draft and not drafted):
        needed = smallest_budget(problem, stored)
        fits = f"needs {format_size(needed)}" if needed else "does not exist on this machine"
        raise SubspecError(
            Exit.INFEASIBLE,
            f"the budget is {format_size(budget_bytes)}, the smallest plan {fits}",
            how_to_fit(problem, needed, stored),
        )
    # Both methods share the weights as they are stored and one verify width: the draft's if it
    # pays, else those that serve plain decoding best, and the draft must make do with them. What
    # is held decoded is each one's own choice.
    if drafted and (constraints.method == "substitute" or drafted[0].speed > plain.speed):
        alike = stored_like(problem, drafted[0].candidate.storage)
        same = replace(problem, storages=alike)
        drafted = best_by_width(same)
        plain = best(same, plain_candidates(same, drafted[0].candidate.verify_width))
        assert plain is not None, "it takes less than the draft"
        check_ram(problem, drafted[0])
    else:
        alike = stored_like(problem, plain.candidate.storage)
        same = replace(problem, storages=alike)
        drafted = best_by_width(same, plain.candidate.verify_width)
        check_ram(problem, plain)
    return assemble(problem, plain, drafted)


def best_by_width(problem: Problem, verify_width: int | None = None) -> list[Scored]:
    """The best candidate of every tree width, best first; empty if no draft fits. verify_width: as
    of `candidates`."""
    by_width = groupby(candidates(problem, verify_width), key=lambda c: c.draft_width)
    found = [scored for _, group in by_width if (scored := best(problem, group)) is not None]
    return sorted(found, key=lambda scored: -scored.speed)


def best(problem: Problem, group: Iterable[Candidate]) -> Scored | None:
    """The fastest candidate by what its named parts stream.

    The estimate lets a part be cut anywhere and is never slower: the first that falls behind what
    is found ends the search.
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
    """tokens/s with the leftover full of exact weights; None if the candidate does not fit.

    A candidate that keeps everything resident needs no staging ring.
    """
    everything, left = candidate.storage.num_bytes, left_over(problem, candidate)
    if left + candidate.ring_bytes >= everything:
        left = everything
    if left < 0:
        return None
    return prediction_of(problem, candidate, everything - left).tokens_per_second


def score(problem: Problem, candidate: Candidate) -> Scored:
    """A candidate that fits, with its parts named and the prediction for what really streams."""
    placement, storage = place(problem, candidate), candidate.storage
    ledger = placement.ledger
    held = ledger.resident + ledger.residuals
    peak = ledger.total_bytes - ledger.guard
    streamed = storage.num_bytes + storage.decoded_bytes - held
    return Scored(candidate, placement, prediction_of(problem, candidate, streamed, peak))


def prediction_of(
    problem: Problem, candidate: Candidate, streamed: int, peak: int = 0
) -> Prediction:
    gives = yield_for(problem, candidate.tree)
    passes = passes_for(problem, candidate.tree, candidate.verify_width)
    return predict(problem.profile, candidate, passes, streamed, gives, peak, problem.usage)


def assemble(problem: Problem, plain: Scored, drafted: list[Scored]) -> Plan:
    """`drafted`: best first; empty if no draft fits."""
    found: dict[Method, Scored] = {"plain": plain}
    if drafted:
        found["substitute"] = drafted[0]
    predicted = {method: scored.prediction for method, scored in found.items()}
    method, reasons = decide(problem, predicted)
    profile, tree = problem.profile, drafted[0].candidate.tree if drafted else None
    if method == "substitute" and tree and tree.min_path_probability:
        reasons = (*reasons, why_early(tree))
    reasons = (*reasons, why_stored(problem, found[method]))
    return Plan(
        device=profile.device,
        machine=profile.machine,
        budget_bytes=problem.budget_bytes,
        context=problem.context,
        num_sequences=problem.constraints.num_sequences,
        method=method,
        tree=tree or Tree(1, 0),
        verify_width=plain.candidate.verify_width,
        num_threads=profile.num_threads,
        int4_kernel=profile.int4_kernel,
        prefill_tokens=problem.prefill_tokens,
        placements={method: scored.placement for method, scored in found.items()},
        residuals=plain.candidate.storage.residuals,
        predicted=predicted,
        acceptance=problem.acceptance,
        options=list_options(plain, drafted),
        reasons=reasons,
        constraints=problem.constraints,
    )


def place(problem: Problem, candidate: Candidate) -> Placement:
    """Names the parts that stay, and drops the ring if all of them do."""
    storage, ringless = candidate.storage, replace(candidate, ring=None)
    if left_over(problem, ringless) >= storage.num_bytes:
        candidate = ringless
    stay = choose_resident(storage, left_over(problem, candidate))
    raw = [part for part in stay if part.encoding == "raw"]
    residuals = [part for part in stay if part.encoding == "residual"]
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
    )


def decide(problem: Problem, predicted: dict[Method, Prediction]) -> tuple[Method, tuple[str, ...]]:
    """The method and the reasons, one sentence each."""
    plain = predicted["plain"].tokens_per_second
    reasons = []
    largest = default_context(problem.spec, LARGEST, 1)
    if problem.constraints.context is None and problem.context < largest:
        reasons.append(
            f"the context is {problem.context} tokens: the keys and values of more would take too "
            "much of the budget"
        )
    if problem.prefill_tokens < problem.context and predicted["plain"].streamed_bytes:
        reasons.append(
            f"a prompt streams the weights once per {problem.prefill_tokens} tokens: the "
            "activations of more would take too much of the budget"
        )
    if problem.constraints.method == "plain":
        return "plain", (*reasons, "plain decoding was asked for")
    if "substitute" not in predicted:
        return "plain", (*reasons, "the substitutes do not fit the budget: plain decoding")
    drafted = predicted["substitute"].tokens_per_second
    ratio = f"{drafted:.2f} against {plain:.2f} tokens/s"
    if problem.constraints.method == "substitute":
        return "substitute", (*reasons, f"speculation was asked for: {ratio}")
    if drafted <= plain:
        return "plain", (*reasons, f"speculation would not pay: {ratio}")
    return "substitute", (*reasons, f"speculation beats plain decoding: {ratio}")


def why_early(tree: Tree) -> str:
    return (
        f"a draft ends at the first level whose paths are together less probable than "
        f"{tree.min_path_probability:.3g}, as was asked for; predictions are those of whole trees"
    )


def why_stored(problem: Problem, chosen: Scored) -> str:
    """Why the exact weights are stored as they are, and how many are held otherwise."""
    storage = chosen.candidate.storage
    decoded = len(storage.decoded)
    held = f"; {decoded} of {len(storage.parts)} matrices are held decoded" if decoded else ""
    return why_encoded(problem, chosen) + held


def why_encoded(problem: Problem, chosen: Scored) -> str:
    profile, storage = problem.profile, chosen.candidate.storage
    num_coded, num_parts = len(storage.residuals), len(storage.parts)
    ring = chosen.candidate.ring
    link = profile.link_rate(ring.block_bytes if ring else 0) / problem.spec.item_bytes
    decode = weights_rate(profile.residual_weights_per_second)
    rates = f"{decode} decode here, and the link brings {weights_rate(link)} as they are"
    what = "the exact weights are stored "
    if not num_coded:
        what += "raw"
    else:
        what += f"as residuals of {storage.bits_per_residual:.1f} bits"
        what += "" if num_coded == num_parts else f", {num_coded} of {num_parts} matrices"
    if problem.constraints.encoding == "kept":
        return f"{what}: the artifact keeps them so"
    if problem.constraints.encoding != "auto":
        return f"{what}: that was asked for"
    if not profile.residual_weights_per_second:
        return f"{what}: there is no fast decoder for residuals here (a C++ compiler builds one)"
    if not chosen.prediction.streamed_bytes and not num_coded:
        return f"{what}: all of them fit"
    return f"{what}: {rates}"


def list_options(plain: Scored, drafted: list[Scored]) -> tuple[Option, ...]:
    found = [Option("plain decoding, one token per pass", plain.speed)]
    found += [
        Option(f"tree {tree.width} wide, {tree.depth} deep", scored.speed)
        for scored in drafted
        if (tree := scored.candidate.tree)
    ]
    return tuple(sorted(found, key=lambda option: -option.tokens_per_second))


def check_ram(problem: Problem, scored: Scored) -> None:
    """On cuda what streams lies in pinned host memory, and the embedding does."""
    if problem.profile.device != "cuda":
        return
    needed = scored.prediction.streamed_bytes + problem.spec.embedding_bytes
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
        hint += ", or install a C++ compiler (g++): here residuals are decoded only while loading"
    return hint


def smallest_budget(problem: Problem, stored: Storage | None) -> int:
    """Bytes of the smallest budget that has a plan, to 0.1 %; 0 if none up to 8 TiB has. stored: as
    of `search`."""
    constraints = problem.constraints

    def feasible(budget: int) -> bool:
        smaller = make_problem(
            problem.spec, problem.profile, budget, constraints, problem.acceptance, stored
        )
        smallest = smallest_draft if constraints.needs_draft else smallest_plain
        return smallest(smaller) is not None

    low, high = 0, 1 << 43
    if not feasible(high):
        return 0
    while high - low > high // 1000 + 1:
        middle = (low + high) // 2
        low, high = (low, middle) if feasible(middle) else (middle, high)
    return high
