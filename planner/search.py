"""ModelSpec, Profile, budget -> the cheapest Plan that fits, or what is missing.

The space is small: equal layers are counted, not named. Every tree x staging ring is tried; the
fast memory that a candidate leaves holds exact weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.model import ModelSpec, Part, parts
from subspec.artifacts.plan import (
    Acceptance,
    Method,
    Option,
    Placement,
    Plan,
    Prediction,
    Rate,
    Tree,
)
from subspec.artifacts.profile import Profile
from subspec.artifacts.sizes import format_size, short_size
from subspec.planner.costs import Candidate, Shape, exact_bytes, ledger, predict, workspace_bytes

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
DEPTHS = (*range(1, 33), *range(34, 65, 2))
NUM_SLOTS = (2, 3, 4)
DEFAULT_CONTEXT = 4096  # halved until its keys and values fit their share of the budget
CONTEXT_SHARE = 0.125
SMALLEST_CONTEXT = 256
PREFILL_SHARE = 0.15  # of the budget, for the activations of a prompt that streams once
SMALLEST_PREFILL = 64
SHARPENING = 0.2  # draft temperature of trees wider than 1 (arXiv 2509.18344, §4.2)
# Until it is measured: hazards of 3.2 % (chain) and 1.5 % (6 wide), published for 8B-class models.
PRIOR = Acceptance((Rate(1, 0.968, 0), Rate(3, 0.978, 0), Rate(6, 0.985, 0)))


@dataclass(frozen=True)
class Wishes:
    """What the user fixed; None is ours to choose. Never overruled."""

    context: int | None = None
    width: int | None = None
    depth: int | None = None
    method: Method | None = None
    ram_bytes: int | None = None  # host memory for the slow tier of a GPU


@dataclass(frozen=True)
class Problem:
    """What is given, once the context and the prompt's share are settled."""

    spec: ModelSpec
    profile: Profile
    budget_bytes: int
    wishes: Wishes
    acceptance: Acceptance
    context: int
    prefill_tokens: int


@dataclass(frozen=True)
class Scored:
    candidate: Candidate
    prediction: Prediction

    @property
    def speed(self) -> float:
        return self.prediction.tokens_per_second


def search(
    spec: ModelSpec, profile: Profile, budget_bytes: int, wishes: Wishes, acceptance: Acceptance
) -> Plan:
    """Raises SubspecError(INFEASIBLE) with the smallest budget that works."""
    problem = pose(spec, profile, budget_bytes, wishes, acceptance)
    drafted = best_by_width(problem)
    width = drafted[0].candidate.verify_width if drafted else min(profile.position_free_widths)
    plain = best_plain(problem, width)
    if plain is None or (wishes.method == "substitute" and not drafted):
        needed = smallest_budget(spec, profile, wishes, acceptance)
        fits = f"needs {format_size(needed)}" if needed else "does not exist on this machine"
        raise SubspecError(
            Exit.INFEASIBLE,
            f"the budget is {format_size(budget_bytes)}, the smallest plan {fits}",
            f"--vram {needed}B" if needed else "",
        )
    check_ram(problem, drafted[0] if drafted else plain)
    return assemble(problem, plain, drafted)


def pose(
    spec: ModelSpec, profile: Profile, budget_bytes: int, wishes: Wishes, acceptance: Acceptance
) -> Problem:
    context = wishes.context or default_context(spec, budget_bytes)
    if context > spec.max_positions:
        raise SubspecError(
            Exit.USAGE,
            f"--context {context} is more than the model's {spec.max_positions} positions",
            f"--context {spec.max_positions} or less",
        )
    prefill = context
    while prefill > SMALLEST_PREFILL:
        shape = Shape(context, 1, 1, prefill, 0, 0)
        if workspace_bytes(spec, profile.device, shape) <= PREFILL_SHARE * budget_bytes:
            break
        prefill = -(-prefill // 2)
    return Problem(spec, profile, budget_bytes, wishes, acceptance, context, prefill)


def default_context(spec: ModelSpec, budget_bytes: int) -> int:
    context = min(DEFAULT_CONTEXT, spec.max_positions)
    while context * spec.kv_bytes_per_token > CONTEXT_SHARE * budget_bytes:
        if context // 2 < SMALLEST_CONTEXT:
            break
        context //= 2
    return context


def best_plain(problem: Problem, verify_width: int) -> Scored | None:
    """`verify_width` is the padded twin's, which must fit too."""
    found = [
        score(problem, Candidate(0, 0, verify_width, block, slots))
        for block, slots in staging(problem.spec)
    ]
    return max(filter(None, found), key=lambda scored: scored.speed, default=None)


def best_by_width(problem: Problem) -> list[Scored]:
    """The best candidate of every tree width, best first; empty if no draft fits."""
    if problem.wishes.method == "plain":
        return []
    found: dict[int, Scored] = {}
    for candidate in candidates(problem):
        scored = score(problem, candidate)
        best = found.get(candidate.width)
        if scored is not None and (best is None or scored.speed > best.speed):
            found[candidate.width] = scored
    return sorted(found.values(), key=lambda scored: -scored.speed)


def candidates(problem: Problem) -> Iterator[Candidate]:
    wishes = problem.wishes
    for width in (wishes.width,) if wishes.width else WIDTHS:
        for depth in (wishes.depth,) if wishes.depth else DEPTHS:
            padded = padded_width(problem.profile, 1 + width * depth)
            if padded is not None:
                for block, slots in staging(problem.spec):
                    yield Candidate(width, depth, padded, block, slots)


def padded_width(profile: Profile, num_nodes: int) -> int | None:
    """The smallest width at which a row's bits do not depend on its place."""
    return min((w for w in profile.position_free_widths if w >= num_nodes), default=None)


def staging(spec: ModelSpec) -> list[tuple[int, int]]:
    """(block bytes, slots) worth trying: from the largest part up to a layer."""
    sizes = [part.padded_bytes for part in parts(spec)]
    if not sizes:
        return [(0, 0)]
    layer = sum(part.padded_bytes for part in parts(spec) if part.linear.layer == 0)
    largest = max(sizes)
    blocks = {largest, 2 * largest, max(largest, layer // 2), max(largest, layer)}
    return [(block, slots) for block in sorted(blocks) for slots in NUM_SLOTS]


def score(problem: Problem, candidate: Candidate) -> Scored | None:
    """The prediction with the leftover full of exact weights; None if the candidate does not fit.

    A candidate that keeps everything resident needs no staging ring.
    """
    everything = exact_bytes(problem.spec)
    left = problem.budget_bytes - sum(base_ledger(problem, candidate).values())
    if left + candidate.block_bytes * candidate.num_slots >= everything:
        streamed = 0
    elif left >= 0:
        streamed = everything - left
    else:
        return None
    return Scored(candidate, estimate(problem, candidate, streamed, problem.budget_bytes))


def estimate(problem: Problem, candidate: Candidate, streamed: int, peak: int) -> Prediction:
    rate = problem.acceptance.probability(candidate.width)
    return predict(problem.spec, problem.profile, candidate, streamed, rate, peak)


def base_ledger(problem: Problem, candidate: Candidate) -> dict[str, int]:
    """Everything but resident exact weights."""
    shape = Shape(
        problem.context,
        candidate.verify_width,
        candidate.width,
        problem.prefill_tokens,
        candidate.block_bytes,
        candidate.num_slots,
    )
    profile = problem.profile
    return ledger(problem.spec, profile.device, shape, profile.overhead_bytes, problem.budget_bytes)


def assemble(problem: Problem, plain: Scored, drafted: list[Scored]) -> Plan:
    """Scores -> a Plan with named placements, and predictions for what those really stream."""
    placements: dict[Method, Placement] = {"plain": place(problem, plain.candidate)}
    predicted = {"plain": settle(problem, plain.candidate, placements["plain"])}
    tree = Tree(1, 0)
    if drafted:
        best = drafted[0].candidate
        placements["substitute"] = place(problem, best)
        predicted["substitute"] = settle(problem, best, placements["substitute"])
        tree = make_tree(problem.profile, best, predicted["substitute"])
    method, reasons = decide(problem, predicted)
    profile = problem.profile
    return Plan(
        device=profile.device,
        machine=profile.machine,
        budget_bytes=problem.budget_bytes,
        context=problem.context,
        method=method,
        tree=tree,
        verify_width=plain.candidate.verify_width,
        num_threads=profile.num_threads,
        int4_kernel=profile.int4_kernel,
        prefill_tokens=problem.prefill_tokens,
        substitute=placements.get("substitute"),
        plain=placements["plain"],
        predicted=predicted,
        acceptance=problem.acceptance,
        options=list_options(predicted["plain"], drafted),
        reasons=reasons,
    )


def place(problem: Problem, candidate: Candidate) -> Placement:
    """Names the parts that stay, and drops the ring if all of them do."""
    everything = exact_bytes(problem.spec)
    without_ring = replace(candidate, block_bytes=0, num_slots=0)
    base = base_ledger(problem, without_ring)
    left = problem.budget_bytes - sum(base.values())
    if left < everything:
        without_ring = candidate
        base = base_ledger(problem, candidate)
        left = problem.budget_bytes - sum(base.values())
    stay = choose_resident(parts(problem.spec), left)
    base["resident"] = sum(part.padded_bytes for part in stay)
    return Placement(
        tuple(part.name for part in stay), without_ring.block_bytes, without_ring.num_slots, base
    )


def choose_resident(every: list[Part], num_bytes: int) -> list[Part]:
    """Parts that fill `num_bytes`: whole layers, evenly spread so that the link is never left
    without work, then single parts, largest first. In execution order."""
    layers: dict[int, list[Part]] = {}
    for part in every:
        layers.setdefault(part.linear.layer, []).append(part)
    left, stay, rest = num_bytes, set[str](), list[Part]()
    num_whole = min(len(layers), num_bytes // max(1, layer_bytes(layers[0]))) if layers else 0
    spread = {int((i + 0.5) * len(layers) / num_whole) for i in range(num_whole)}
    for layer, members in layers.items():
        if layer in spread and layer_bytes(members) <= left:
            left -= layer_bytes(members)
            stay |= {part.name for part in members}
        else:
            rest += members
    for part in sorted(rest, key=lambda part: -part.padded_bytes):
        if part.padded_bytes <= left:
            left -= part.padded_bytes
            stay.add(part.name)
    return [part for part in every if part.name in stay]


def layer_bytes(members: list[Part]) -> int:
    return sum(part.padded_bytes for part in members)


def settle(problem: Problem, candidate: Candidate, placement: Placement) -> Prediction:
    streamed = exact_bytes(problem.spec) - placement.ledger["resident"]
    peak = placement.total_bytes - placement.ledger["guard"]
    return estimate(problem, candidate, streamed, peak)


def make_tree(profile: Profile, candidate: Candidate, prediction: Prediction) -> Tree:
    """A level is worth its time if its chance of being reached times the speed exceeds one.

    On cuda the early stop stays off: it would read a number back at every level.
    """
    step = prediction.draft_seconds / candidate.depth
    stop = min(0.5, step * prediction.tokens_per_second) if profile.device == "cpu" else 0.0
    temperature = 1.0 if candidate.width == 1 else SHARPENING
    return Tree(candidate.width, candidate.depth, temperature, round(stop, 4))


def decide(problem: Problem, predicted: dict[str, Prediction]) -> tuple[Method, tuple[str, ...]]:
    """The method and the reasons, one sentence each."""
    plain = predicted["plain"].tokens_per_second
    reasons = []
    if problem.prefill_tokens < problem.context:
        reasons.append(
            f"a prompt streams the weights once per {problem.prefill_tokens} tokens: the "
            "activations of more would take too much of the budget"
        )
    if problem.wishes.method == "plain":
        return "plain", (*reasons, "plain decoding was asked for")
    if "substitute" not in predicted:
        return "plain", (*reasons, "the substitutes do not fit the budget: plain decoding")
    drafted = predicted["substitute"].tokens_per_second
    ratio = f"{drafted:.2f} against {plain:.2f} tokens/s"
    if drafted <= plain and problem.wishes.method is None:
        return "plain", (*reasons, f"speculation would not pay: {ratio}")
    return "substitute", (*reasons, f"speculation beats plain decoding: {ratio}")


def list_options(plain: Prediction, drafted: list[Scored]) -> tuple[Option, ...]:
    found = [Option("plain decoding, one token per pass", plain.tokens_per_second)]
    found += [
        Option(f"tree {s.candidate.width} wide, {s.candidate.depth} deep", s.speed) for s in drafted
    ]
    return tuple(sorted(found, key=lambda option: -option.tokens_per_second))


def check_ram(problem: Problem, scored: Scored) -> None:
    """On cuda what streams lies in pinned host memory."""
    ram = problem.wishes.ram_bytes
    streamed = scored.prediction.streamed_bytes
    if problem.profile.device == "cuda" and ram is not None and streamed > ram:
        raise SubspecError(
            Exit.INFEASIBLE,
            f"{short_size(streamed)} of exact weights stream from host memory, --ram is "
            f"{short_size(ram)}",
            f"--ram {-(-streamed // 10**9)}GB, or a larger --vram",
        )


def smallest_budget(
    spec: ModelSpec, profile: Profile, wishes: Wishes, acceptance: Acceptance
) -> int:
    """Bytes of the smallest budget that has a plan, to 0.1 %; 0 if none up to 8 TiB has."""

    def feasible(budget: int) -> bool:
        problem = pose(spec, profile, budget, wishes, acceptance)
        if wishes.method == "substitute" or wishes.width or wishes.depth:
            return any(score(problem, c) is not None for c in candidates(problem))
        return best_plain(problem, min(profile.position_free_widths)) is not None

    low, high = 0, 1 << 43
    if not feasible(high):
        return 0
    while high - low > high // 1000 + 1:
        middle = (low + high) // 2
        low, high = (low, middle) if feasible(middle) else (middle, high)
    return high
