"""Input of a search, and the candidates that it chooses from.

A prompt's share of memory is decided here, before candidates are compared.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby

from subspec.artifacts.acceptance import ONE_TOKEN, Acceptance, ExpectedRound
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import MAX_BYTES
from subspec.artifacts.footprint import (
    Ring,
    Shape,
    make_host_ledger,
    make_ledger,
    workspace_bytes,
)
from subspec.artifacts.model import PAGE_BYTES, ModelSpec
from subspec.artifacts.plan import (
    WITH_DRAFT_MODEL,
    WITH_SUBSTITUTES,
    Constraints,
    HostLedger,
    Ledger,
    Method,
    Tree,
    Usage,
)
from subspec.artifacts.profile import Profile
from subspec.planner.solve.predict import (
    Candidate,
    Passes,
    Proposer,
    passes_of,
    prompt_widths,
    usual_usage,
)
from subspec.planner.solve.storage import NUM_SHARES, Storage, held_decoded, storages

WIDTHS = (1, 2, 4, 8)
DEPTHS = (*range(1, 13), *range(14, 33, 2), 40, 48, 64)
NUM_SLOTS = (2, 4, 8)  # of a ring: one is read while the others are filled
# Temperature of the draft's probabilities. Of a greedy target a token is accepted more often than
# its probability says: at 0.5 a path's is about how often it is accepted on a real model. Trees
# grow as well as at 0.2, the paper's (arXiv 2509.18344, section 4.2; docs/LOG.md).
SHARPENING = 0.5
DEFAULT_CONTEXT = 4096  # shorter where it costs too much speed, longer where that costs none
MIN_CONTEXT = 256  # chosen: a question and a short answer
# Limits of the activations of a prompt that is processed in one stream of the weights: of the
# budget, and of what the smallest plan leaves of it. Chosen, not measured.
PREFILL_SHARE = 0.15
PREFILL_SLACK_SHARE = 0.5
MIN_PREFILL = 64  # tokens; fewer are too little work for a stream of the weights


@dataclass(frozen=True, eq=False)  # compared by identity: it is the key of what is worked out once
class Problem:
    spec: ModelSpec
    profile: Profile
    budget_bytes: int
    constraints: Constraints
    acceptance: Acceptance  # of the substitutes
    proposer: Proposer | None
    context: int
    storages: tuple[Storage, ...]  # to choose from; the last one decodes least at every use
    prefill_chunk_tokens: int = MIN_PREFILL
    prefill_bytes: int = 0  # lower bound of the workspace

    @cached_property
    def usage(self) -> Usage:
        """The usage that predictions are for."""
        return usual_usage(self.context)


def make_problem(
    spec: ModelSpec,
    profile: Profile,
    budget_bytes: int,
    constraints: Constraints,
    acceptance: Acceptance,
    stored: Storage | None = None,
    proposer: Proposer | None = None,
) -> Problem:
    """The problem with the user's context, or the shortest default; see `at_context`. stored:
    storage of an existing artifact. Raises SubspecError: USAGE for a context beyond the model's
    positions or a draft model that is not there, UNSUPPORTED without batch-invariant widths,
    INFEASIBLE for a tree that is wider than all of them."""
    check_context(constraints.context, spec)
    if not profile.batch_invariant_widths:
        raise SubspecError(
            Exit.UNSUPPORTED,
            "no batch-invariant width was found on this machine",
            "plan for --device cpu",
        )
    if spec.fp8 and not profile.fp8_weights_per_second:
        raise SubspecError(
            Exit.USAGE,
            "the profile has no speed of weights in FP8, which the model has",
            "measure this machine with this model: leave out --profile",
        )
    check_drafters(constraints, spec, proposer is not None)
    check_draft_model(profile, proposer)
    check_tree(constraints, profile)
    decodes = profile.residual_weights_per_second > 0
    decodes = decodes and (not spec.fp8 or profile.fp8_residual_weights_per_second > 0)
    choices = held_decoded(stored) if stored else storages(spec, constraints.encoding, decodes)
    if not decodes:  # a slow decoder is good enough while loading
        choices = tuple(storage for storage in choices if not storage.coded_weights)
    context = constraints.context or default_contexts(spec)[0]
    problem = Problem(
        spec, profile, budget_bytes, constraints, acceptance, proposer, context, choices
    )
    return at_context(problem, context)


def at_context(problem: Problem, context: int) -> Problem:
    """The problem with another context, and the memory that this leaves for prompts."""
    return with_prompt_share(without_prompt_share(replace(problem, context=context)))


def without_prompt_share(problem: Problem) -> Problem:
    return replace(problem, prefill_chunk_tokens=MIN_PREFILL, prefill_bytes=0)


def check_context(context: int | None, spec: ModelSpec) -> None:
    """Raise SubspecError(USAGE) for a context beyond the model's positions."""
    if context is not None and context > spec.max_positions:
        raise SubspecError(
            Exit.USAGE,
            f"--context {context} is more than the model's {spec.max_positions} positions",
            f"--context {spec.max_positions} or less",
        )


def check_drafters(constraints: Constraints, spec: ModelSpec, has_draft_model: bool) -> None:
    """Raise SubspecError(USAGE) if the constraints need a draft model or head that is missing."""
    check_method(constraints.method, has_draft_model)
    if constraints.method == "plain" and (constraints.width or constraints.depth):
        raise SubspecError(
            Exit.USAGE,
            "--method plain drafts no tree, and --width or --depth was given",
            "leave out --width and --depth, or use --method substitute",
        )
    if constraints.draft_head and spec.draft_head is None:
        message = "--draft-head own was given, and the checkpoint has no head that drafts"
        raise SubspecError(Exit.USAGE, message, "leave it out, or give the head's own checkpoint")


def check_method(method: str | None, has_draft_model: bool) -> None:
    """Raise SubspecError(USAGE) for a method whose draft model is missing."""
    if method in WITH_DRAFT_MODEL and not has_draft_model:
        raise SubspecError(
            Exit.USAGE,
            f"--method {method} needs a draft model, and there is none",
            "add --draft-model REF, a smaller model of the same vocabulary",
        )


def check_draft_model(profile: Profile, proposer: Proposer | None) -> None:
    """Raise SubspecError(USAGE) for a draft model without timings in the profile."""
    if proposer is not None and not profile.has_draft_model:
        raise SubspecError(
            Exit.USAGE,
            "the profile has no timings of the draft model",
            "measure this machine with it: leave out --profile, or add --reprofile to --from",
        )


def check_tree(constraints: Constraints, profile: Profile) -> None:
    """Raise SubspecError(INFEASIBLE) for a tree that no exact pass has room for."""
    width, depth = constraints.width or 1, constraints.depth or 1
    num_nodes, widest = 1 + width * depth, max(every_width(profile))
    if num_nodes <= widest:
        return
    deepest = (widest - 1) // width
    raise SubspecError(
        Exit.INFEASIBLE,
        f"a draft tree {width} wide and {depth} deep has {num_nodes} nodes, the widest "
        f"batch-invariant pass on this machine has {widest} rows",
        f"--depth {deepest} or less" if deepest else f"--width {widest - 1} or less",
    )


def methods_that_draft(problem: Problem) -> tuple[Method, ...]:
    """Methods to choose from that draft. A draft model with delta nets cannot propose for the
    substitutes: its states cannot be rolled back."""
    asked, proposer = problem.constraints.method, problem.proposer
    if asked is not None:
        return () if asked == "plain" else (asked,)
    if proposer is None:
        return ("substitute",)
    both: tuple[Method, ...] = () if proposer.spec.delta_nets else ("substitute+draft-model",)
    return ("substitute", "draft-model", *both)


def acceptance_of(problem: Problem, method: Method) -> Acceptance:
    """Acceptance of a method's trees. Trees of hierarchical drafting are nearly the substitutes'
    own."""
    if method == "draft-model":
        assert problem.proposer is not None
        return problem.proposer.acceptance
    return problem.acceptance


def default_contexts(spec: ModelSpec) -> list[int]:
    """Default contexts to choose from, ascending: halves of DEFAULT_CONTEXT, and its doubles up to
    the model's positions."""
    usual = min(DEFAULT_CONTEXT, spec.max_positions)
    shorter = range(1, max(1, (usual // MIN_CONTEXT).bit_length()))
    longer = range(1, (spec.max_positions // usual).bit_length())
    return [usual >> n for n in reversed(shorter)] + [usual] + [usual << n for n in longer]


def with_prompt_share(problem: Problem) -> Problem:
    """Decide the bytes of a prompt's activations, and the number of tokens that fit them.

    The bytes grow continuously with the budget. If chunks were halved until they fit, a little more
    memory could double them, displace weights and make the plan slower; tests of monotony check
    that. If all weights can be resident, as stored or decoded, none of them is displaced: prompts
    in chunks then cost no streaming.
    """
    budget, slack = problem.budget_bytes, slack_bytes(problem)
    most = max(problem.context, MIN_PREFILL)

    def needed(tokens: int) -> int:
        shape = Shape(problem.context, 1, 1, 1, tokens, problem.profile.num_threads, 1)
        return workspace_bytes(problem.spec, problem.profile.device, shape)

    share = int(min(PREFILL_SHARE * budget, PREFILL_SLACK_SHARE * slack, needed(most)))
    alike = stored_like(problem, problem.storages[-1])
    for storage in (alike[0], alike[-1]):
        resident = Candidate(storage, None, narrowest(problem), None, "plain")
        spare = left_over(problem, resident) - storage.num_bytes
        if spare >= 0:
            share = min(share, needed(MIN_PREFILL) + int(PREFILL_SLACK_SHARE * spare))
    above = bisect_right(range(most + 1), share, lo=MIN_PREFILL, key=needed)
    return replace(problem, prefill_chunk_tokens=max(MIN_PREFILL, above - 1), prefill_bytes=share)


def slack_bytes(problem: Problem) -> int:
    """Bytes of the budget that the smallest plan leaves: the minimum over the methods that draft
    and fit, since prompts should displace none of them."""
    by_method = groupby(smallest_drafts(problem), key=lambda one: one.method)
    found = [roomiest(problem, some) for _, some in by_method]
    fitting = [one for one in found if one] or [one for one in [smallest_plain(problem)] if one]
    return min((spare_bytes(problem, one) for one in fitting), default=0)


def prompt_tokens_within(problem: Problem, candidates: Iterable[Candidate]) -> int:
    """Most tokens of a prompt that fit the memory that every candidate has for activations anyway:
    verification and drafts may need more than a short prompt."""
    most = max(problem.context, MIN_PREFILL)
    for candidate in candidates:
        ledger, shape = base_ledger(problem, candidate), shape_of_candidate(problem, candidate)

        def needed(tokens: int, shape: Shape = shape) -> int:
            own = replace(shape, prefill_chunk_tokens=tokens)
            return workspace_bytes(problem.spec, problem.profile.device, own)

        span = range(most + 1)
        most = bisect_right(span, ledger.workspace, lo=MIN_PREFILL, key=needed) - 1
    return most


def stored_like(problem: Problem, wanted: Storage) -> tuple[Storage, ...]:
    """The problem's storages that are possible in an artifact made for `wanted`. They differ in
    which residuals are decoded while loading, fewest first."""
    return tuple(some for some in problem.storages if some.parts == wanted.parts)


def candidates(
    problem: Problem, method: Method = "substitute", room: tuple[int, ...] | None = None
) -> Iterator[Candidate]:
    """Every candidate with a draft of that method, the smallest tree first. room: the verify widths
    of all; None: each tree is padded to the narrowest that fit it."""
    for tree, padded in trees(problem, method):
        if room is not None and padded[-1] > room[-1]:
            continue
        for storage in problem.storages:
            for ring in staging(storage):
                yield Candidate(storage, tree, room or padded, ring, method)


def trees(problem: Problem, method: Method) -> Iterator[tuple[Tree, tuple[int, ...]]]:
    """Trees with their verify widths; widths, depths and thresholds ascending."""
    constraints = problem.constraints
    stops = thresholds(constraints, acceptance_of(problem, method))
    for width in tree_widths(constraints):
        for depth in (constraints.depth,) if constraints.depth else DEPTHS:
            padded = padded_widths(problem.profile, 1 + width * depth)
            if padded is not None:
                for stop in stops:
                    yield make_tree(width, depth, stop), padded


def tree_widths(constraints: Constraints) -> tuple[int, ...]:
    return (constraints.width,) if constraints.width else WIDTHS


def thresholds(constraints: Constraints, acceptance: Acceptance) -> tuple[float, ...]:
    """Values of `Tree.min_path_probability` to choose from."""
    if constraints.min_path_probability is not None:
        return (constraints.min_path_probability,)
    return acceptance.thresholds


def make_tree(width: int, depth: int, min_path_probability: float = 0.0) -> Tree:
    return Tree(width, depth, SHARPENING, min_path_probability)


def plain_candidates(problem: Problem, verify_widths: tuple[int, ...]) -> Iterator[Candidate]:
    """Candidates of plain decoding. `verify_widths` are those of the draft, whose cache has to fit
    too."""
    for storage in problem.storages:
        for ring in staging(storage):
            yield Candidate(storage, None, verify_widths, ring, "plain")


def smallest_draft(problem: Problem) -> Candidate | None:
    """The draft that needs the least memory; None if it does not fit."""
    return roomiest(problem, smallest_drafts(problem))


def smallest_plain(problem: Problem) -> Candidate | None:
    return roomiest(problem, smallest_plains(problem))


def roomiest(problem: Problem, some: Iterable[Candidate]) -> Candidate | None:
    """The candidate that leaves most memory; None if none fits."""
    best = max(some, key=lambda candidate: spare_bytes(problem, candidate), default=None)
    return best if best and spare_bytes(problem, best) >= 0 else None


def smallest_drafts(problem: Problem) -> Iterator[Candidate]:
    """The smallest tree of each method in every storage."""
    for method in methods_that_draft(problem):
        if first := next(trees(problem, method), None):
            yield from smallest_ones(problem, *first, method)


def smallest_plains(problem: Problem) -> list[Candidate]:
    return smallest_ones(problem, None, narrowest(problem), "plain")


def smallest_ones(
    problem: Problem, tree: Tree | None, verify_widths: tuple[int, ...], method: Method
) -> list[Candidate]:
    """One of every storage, with the smallest ring."""
    ways = problem.storages
    return [Candidate(way, tree, verify_widths, staging(way)[0], method) for way in ways]


def narrowest(problem: Problem) -> tuple[int, ...]:
    """The verify widths of the smallest tree that the user's constraints allow."""
    method = next(iter(methods_that_draft(problem)), None)
    first = next(trees(problem, method), None) if method else None
    return first[1] if first else (min(every_width(problem.profile)),)


def padded_widths(profile: Profile, num_nodes: int) -> tuple[int, ...] | None:
    """Rows that drafts of up to `num_nodes` nodes are padded to, ascending: widths in which a row
    has the same bits, up to the narrowest that fits them all. None: none does."""
    fitting = [
        tuple(width for width in alike if width < num_nodes) + wide[:1]
        for alike in profile.batch_invariant_widths
        if (wide := tuple(width for width in alike if width >= num_nodes))
    ]
    return min(fitting, key=lambda widths: (widths[-1], -len(widths)), default=None)


def every_width(profile: Profile) -> list[int]:
    return [width for alike in profile.batch_invariant_widths for width in alike]


@lru_cache(maxsize=4 * (NUM_SHARES + 1))
def staging(storage: Storage) -> list[Ring | None]:
    """Rings to try, with blocks from the largest part up to a layer; the smallest first."""
    if not storage.as_stored:
        return [None]
    layer, largest = storage.layer_bytes, storage.largest_part
    half = layer // 2 // PAGE_BYTES * PAGE_BYTES
    blocks = {largest, 2 * largest, max(largest, half), max(largest, layer)}
    return [Ring(block, slots) for block in sorted(blocks) for slots in NUM_SLOTS]


def left_over(problem: Problem, candidate: Candidate) -> int:
    """Bytes of the budget that are left for exact weights as stored; negative: the candidate does
    not fit."""
    storage = candidate.storage
    left = left_without_ring(
        problem,
        candidate.draft_width,
        candidate.verify_width,
        storage.scratch_bytes,
        storage.coded_weights > 0,
        candidate.method,
    )
    return left - storage.decoded_bytes - candidate.ring_bytes


def spare_bytes(problem: Problem, candidate: Candidate) -> int:
    """Bytes of the budget that a candidate does not need; negative: it does not fit."""
    held = must_hold(problem, candidate)
    parts = candidate.storage.largest_part if held else 0  # they are not cut
    return left_over(problem, candidate) - held - parts


def must_hold(problem: Problem, candidate: Candidate) -> int:
    """Bytes of exact weights that have to be in fast memory because the host of a GPU has no room
    for them. MAX_BYTES: it has none even for what else a plan takes there."""
    num_bytes = candidate.storage.num_bytes
    excess = host_excess(problem, candidate.method, num_bytes)
    return MAX_BYTES if excess > num_bytes else max(0, excess)


def host_excess(problem: Problem, method: Method, streamed: int) -> int:
    """Bytes that a method takes of a GPU's host memory beyond what it may; 0 or less: none."""
    needed = host_ledger(problem, method, streamed)
    if needed is None:
        return 0
    ram, pinnable = problem.constraints.ram_bytes, problem.profile.pinnable_bytes
    of_all = needed.total_bytes - ram if ram is not None else 0
    return max(of_all, needed.pinned_bytes - pinnable if pinnable else 0)


def host_ledger(problem: Problem, method: Method, streamed: int) -> HostLedger | None:
    """Host memory of a plan; None: the fast memory is the host's."""
    if problem.profile.device != "cuda":
        return None
    specs = [problem.spec]
    if problem.proposer is not None and method in WITH_DRAFT_MODEL:
        specs.append(problem.proposer.spec)
    return make_host_ledger(specs, streamed, problem.constraints.num_sequences)


# A search computes these for one tree once for each storage and ring.
for_one_tree = lru_cache(maxsize=1024)


@for_one_tree
def left_without_ring(
    problem: Problem,
    draft_width: int | None,
    verify_width: int,
    scratch_bytes: int,
    decodes_residuals: bool,
    method: Method,
) -> int:
    shape = shape_of(
        problem, draft_width, verify_width, None, scratch_bytes, decodes_residuals, method
    )
    ledger = ledger_of(problem, shape)
    return problem.budget_bytes - ledger.total_bytes


@for_one_tree
def passes_for(
    problem: Problem,
    tree: Tree | None,
    verify_widths: tuple[int, ...],
    num_answers: int = 1,
    method: Method = "substitute",
) -> Passes:
    return passes_of(
        problem.spec,
        problem.profile,
        tree,
        verify_widths,
        expected_round_for(problem, tree, method),
        problem.prefill_chunk_tokens,
        problem.usage,
        num_answers,
        method,
        problem.proposer,
    )


@for_one_tree
def expected_round_for(problem: Problem, tree: Tree | None, method: Method) -> ExpectedRound:
    return acceptance_of(problem, method).expected_round(tree) if tree else ONE_TOKEN


def base_ledger(problem: Problem, candidate: Candidate) -> Ledger:
    """Ledger of everything except resident exact weights."""
    return ledger_of(problem, shape_of_candidate(problem, candidate))


def ledger_of(problem: Problem, shape: Shape) -> Ledger:
    profile = problem.profile
    base = make_ledger(
        problem.spec,
        profile.device,
        profile.int4_kernel,
        shape,
        profile.overhead_bytes,
        problem.budget_bytes,
    )
    return replace(base, workspace=max(base.workspace, problem.prefill_bytes))


def shape_of_candidate(problem: Problem, candidate: Candidate) -> Shape:
    return shape_of(
        problem,
        candidate.draft_width,
        candidate.verify_width,
        candidate.ring,
        candidate.storage.scratch_bytes,
        candidate.storage.coded_weights > 0,
        candidate.method,
    )


def shape_of(
    problem: Problem,
    draft_width: int | None,
    verify_width: int,
    ring: Ring | None,
    scratch_bytes: int,
    decodes_residuals: bool,
    method: Method,
) -> Shape:
    profile, proposer = problem.profile, problem.proposer
    return Shape(
        problem.context,
        problem.constraints.num_sequences,
        verify_width,
        draft_width,
        problem.prefill_chunk_tokens,
        profile.num_threads,
        prompt_widths(profile, verify_width)[0],
        ring,
        scratch_bytes or None,
        decodes_residuals,
        draft_model=proposer.spec if proposer and method in WITH_DRAFT_MODEL else None,
        substitutes_draft=method in WITH_SUBSTITUTES,
        drafts_with_head=problem.constraints.draft_head and method == "substitute",
    )
