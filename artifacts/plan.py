"""Plan: which exact weights are resident, what is drafted and how deep, and the predicted cost.

The planner writes it, the runtime executes it. It is a pure function of spec, profile, budget and
the user's constraints.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from subspec.artifacts.acceptance import Acceptance, HierarchicalCost
from subspec.artifacts.acceptance import Tree as Tree  # others import it from here
from subspec.artifacts.common.bounds import (
    MAX_LEVELS,
    Between,
    Count,
    Length,
    Probability,
    Threads,
    TreeWidth,
    VerifyWidths,
)
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import MAX_BYTES, format_size, short_size
from subspec.artifacts.model import StoredPart

DeviceKind = Literal["cpu", "cuda"]
# Decoding method, which decides what is in fast memory: the substitutes draft, plain decoding, a
# draft model drafts, or a draft model proposes what the substitutes check.
Method = Literal["substitute", "plain", "draft-model", "substitute+draft-model"]
# Drafter. lookup: prompt lookup, with the placement of plain decoding. mtp, eagle, eagle3: the
# artifact's draft head, beside the substitutes. substitute+...: the substitutes check what another
# drafter proposes, and continue after it.
DrafterName = Literal[
    "substitute", "lookup", "substitute+lookup", "mtp", "substitute+mtp", "eagle",
    "substitute+eagle", "eagle3", "substitute+eagle3", "draft-model", "substitute+draft-model",
]  # fmt: skip
OF_HEADS: tuple[DrafterName, ...] = ("mtp", "eagle", "eagle3")
# Proposer whose tokens the substitutes check.
PROPOSER_OF: dict[DrafterName, DrafterName] = {
    "substitute+lookup": "lookup", "substitute+mtp": "mtp", "substitute+eagle": "eagle",
    "substitute+eagle3": "eagle3", "substitute+draft-model": "draft-model",
}  # fmt: skip
WITH_SUBSTITUTES: tuple[Method, ...] = ("substitute", "substitute+draft-model")  # that draft
WITH_DRAFT_MODEL: tuple[Method, ...] = ("draft-model", "substitute+draft-model")
Int4Kernel = Literal["aten", "gemlite", "w4a8"]  # w4a8: runtime/kernels/int4.cpp, on cpu


Budget = Annotated[int, Between(1, MAX_BYTES)]
Positive = Annotated[int, Between(1, 1 << 62)]
Sequences = Annotated[int, Between(1, 256)]


@dataclass(frozen=True)
class Ledger:
    """Bytes of fast memory by purpose. All but the last three are arenas of exactly this size.

    `drafter` and `drafter_cache` are of a drafter with weights of its own."""

    substitutes: Count = 0
    residuals: Count = 0  # exact weights that are resident as residuals
    resident: Count = 0  # exact weights that are resident as they are
    norms: Count = 0  # norms, biases and matrices without a substitute
    tables: Count = 0  # rope tables, and the draft's copies in its dtype
    cache: Count = 0  # keys and values of all sequences, and states
    windows: Count = 0  # of layers that keep only what their windows show; 0: they are in `cache`
    staging: Count = 0  # slots that streamed weights arrive in
    scratch: Count = 0  # one part of a matrix, decoded from its residual
    drafter: Count = 0  # its weights and tables
    drafter_cache: Count = 0  # its keys and values of all sequences
    workspace: Count = 0  # temporaries of torch and of our kernels
    overhead: Count = 0  # taken by the process before any weight (CUDA context)
    guard: Count = 0  # margin for what operations allocate internally

    @property
    def total_bytes(self) -> int:
        return sum(vars(self).values())

    @property
    def arenas(self) -> dict[str, int]:
        """Purpose -> bytes of what is allocated once, when an engine is opened."""
        unallocated = ("workspace", "overhead", "guard")
        return {name: size for name, size in vars(self).items() if name not in unallocated}


@dataclass(frozen=True)
class HostLedger:
    """Bytes of host memory that a GPU's plan takes, besides the process itself."""

    streamed: Count  # exact weights that stream; pinned
    embedding: Count  # a draft model's too; pinned
    checkpoints: Count  # of the states of delta nets, of all sequences

    @property
    def pinned_bytes(self) -> int:
        return self.streamed + self.embedding

    @property
    def total_bytes(self) -> int:
        return self.pinned_bytes + self.checkpoints

    @property
    def parts(self) -> str:
        parts = [f"{short_size(self.streamed)} of streamed weights"] if self.streamed else []
        parts.append(f"{short_size(self.embedding)} of embedding")
        if self.checkpoints:
            parts.append(f"{short_size(self.checkpoints)} of delta-net checkpoints")
        return ", ".join(parts)

    def how_to_take_less(self, num_sequences: int) -> str:
        fewer = self.checkpoints and num_sequences > 1
        return "a larger --vram" + (", or fewer --sequences" if fewer else "")


@dataclass(frozen=True)
class Placement:
    """Contents of fast memory while one method runs."""

    resident: tuple[str, ...]  # names of the parts that are resident as exact weights
    residuals: tuple[str, ...]  # of those that are resident as residuals; all others stream
    block_bytes: Count  # size of one slot of the staging ring; a block is consecutive parts
    num_slots: Count
    ledger: Ledger  # its sum is at most the budget
    # Of `resident`: the parts of FP8 matrices that are there in the model's dtype, not as codes.
    dequantized: tuple[str, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Workload of a prediction: speed depends on the lengths of prompt and answer."""

    prompt_tokens: int
    answer_tokens: int


USUAL = Usage(128, 256)  # of a plan's own predictions, as far as its context allows


@dataclass(frozen=True)
class Prediction:
    """Seconds and bytes of one round (plain decoding: of one token)."""

    tokens_per_second: float  # of an answer, after its first token
    time_to_first_token_seconds: float  # of any prompt but the first
    fast_peak_bytes: int
    tokens_per_round: float
    levels_per_round: float  # drafted
    draft_seconds: float
    verify_seconds: float
    stream_seconds: float  # link time of the streamed bytes; overlaps with verify and draft
    compute_seconds: float  # decoding included
    decode_seconds: float  # residuals -> exact weights
    streamed_bytes: int
    digest_seconds: float = 0.0  # that the first prompt takes longer: what streams is checked once


@dataclass(frozen=True)
class BatchDraft:
    """Draft tree per sequence at one batch size; one stream of the weights verifies all of them."""

    tree: Tree
    tokens_per_second: float  # predicted, in total


@dataclass(frozen=True)
class Draft:
    """Draft of a method: its tree, its acceptance, and trees by batch size."""

    tree: Tree
    acceptance: Acceptance
    by_batch_size: Annotated[tuple[BatchDraft, ...], Length(0, 8)] = ()
    hierarchical_cost: HierarchicalCost | None = None  # of hierarchical drafting

    @property
    def trees(self) -> tuple[Tree, ...]:
        """Draft trees for batch sizes 1, 2, 4, 8, ...; see `tree_for`."""
        return (self.tree, *(one.tree for one in self.by_batch_size))


@dataclass(frozen=True)
class DraftHeadResult:
    """Tree of the draft head, and its speed in measured rounds."""

    tree: Tree
    tokens_per_second: Annotated[float, Between(0, 1e9)] | None  # None: under another plan
    tokens_per_round: Annotated[float, Between(0, MAX_LEVELS + 1)]


@dataclass(frozen=True)
class Option:
    """One candidate of the search, for the report."""

    label: str
    tokens_per_second: float


@dataclass(frozen=True)
class Point:
    """Speed of the best plan for another budget or another context."""

    budget_bytes: int
    context: int
    method: Method
    tokens_per_second: float
    full_tokens_per_second: float | None = None  # at the end of a text that fills the context


@dataclass(frozen=True)
class Constraints:
    """Constraints set by the user, which are never overruled; None: the planner chooses."""

    context: Positive | None = None
    width: TreeWidth | None = None
    depth: Annotated[int, Between(1, MAX_LEVELS)] | None = None
    method: Method | None = None
    ram_bytes: Budget | None = None  # budget of host memory, the slow memory of a GPU
    encoding: Literal["auto", "residual", "raw", "kept"] = "auto"  # kept: a re-planned artifact's
    min_path_probability: Probability | None = None  # Tree.min_path_probability
    num_sequences: Sequences = 1
    draft_head: bool = False  # the artifact's draft head has memory beside the substitutes

    @property
    def needs_draft(self) -> bool:
        """True if only a plan with a draft satisfies the constraints."""
        fixed_tree = self.width is not None or self.depth is not None
        return self.method not in (None, "plain") or (self.method is None and fixed_tree)


@dataclass(frozen=True)
class Plan:
    device: DeviceKind
    machine: str  # Profile.machine, where the costs were measured
    budget_bytes: Budget
    context: Positive  # tokens of prompt and answer together, of each sequence
    num_sequences: Sequences  # that can be in memory at once
    method: Method
    tree: Tree
    # An exact pass of decoding is padded to one of these numbers of rows per sequence, ascending. A
    # row has the same bits in all of them.
    verify_widths: VerifyWidths
    # Rows of a call for a prompt's tokens, ascending: a row has the same bits in these as well.
    prompt_widths: VerifyWidths
    num_threads: Threads  # of the CPU; a result's bits depend on it
    int4_kernel: Int4Kernel
    prefill_chunk_tokens: Positive  # of a prompt that are processed in one stream of the weights
    placements: dict[Method, Placement]  # a method that does not fit the budget has none
    residuals: tuple[str, ...]  # names of the parts that are stored as residuals
    predicted: dict[Method, Prediction]
    acceptance: Acceptance
    options: tuple[Option, ...] = ()  # candidates and their predicted speeds, best first
    reasons: tuple[str, ...] = ()  # one sentence per decision
    constraints: Constraints = Constraints()
    draft_graphs: bool = False  # the draft's small operations are compiled by torch (graphs/)
    disk_bytes: Count = 0  # of the artifact's weights, about
    full_context: Prediction | None = None  # of the method, for a text that fills the context
    by_budget: tuple[Point, ...] = ()  # budgets ascending, for the report
    by_context: tuple[Point, ...] = ()  # contexts ascending
    # For batch sizes 2, 4, 8, ...; sizes in between take the next smaller one's
    by_batch_size: Annotated[tuple[BatchDraft, ...], Length(0, 8)] = ()
    # Of methods whose drafters have weights of their own. `tree`, `acceptance` and
    # `by_batch_size` are the substitutes'.
    drafts: dict[Method, Draft] = field(default_factory=dict)
    draft_head_result: DraftHeadResult | None = None  # None: the draft head was not run
    # Default drafter in the method's memory; None: the method's own.
    drafter: DrafterName | None = None
    host_ledger: HostLedger | None = None  # of the method, on a GPU; None: not known

    @property
    def verify_width(self) -> int:
        """Rows per sequence of the widest exact pass."""
        return self.verify_widths[-1]

    def draft_of(self, method: Method) -> Draft:
        """Draft of a method; for plain decoding the substitutes' draft."""
        return self.drafts.get(method) or Draft(self.tree, self.acceptance, self.by_batch_size)

    @property
    def draft(self) -> Draft:
        """Draft of the plan's own method."""
        return self.draft_of(self.method)

    def placement(self, method: Method) -> Placement:
        """Placement of a method. Raises SubspecError(INFEASIBLE) if it does not fit the budget."""
        if method not in self.placements:
            raise SubspecError(
                Exit.INFEASIBLE,
                f"this plan has no room for the method {method!r} in its budget of "
                f"{format_size(self.budget_bytes)}",
                "run it with --no-speculation, or re-plan with a larger --vram",
            )
        return self.placements[method]


def method_of(drafter: DrafterName) -> Method:
    """The method whose memory layout a drafter runs in."""
    if drafter == "draft-model" or drafter == "substitute+draft-model":
        return drafter
    return "plain" if drafter == "lookup" else "substitute"


def head_of(drafter: DrafterName | None) -> DrafterName | None:
    """The layout of the draft head that proposes tokens for a drafter; None: none does."""
    proposes = PROPOSER_OF.get(drafter, drafter) if drafter is not None else None
    return proposes if proposes in OF_HEADS else None


def tree_for(trees: Sequence[Tree], num_answers: int) -> Tree:
    """Draft tree per sequence for a batch of `num_answers`, 1 or more. trees: for batch sizes 1, 2,
    4, 8, ...; sizes in between take the next smaller one's."""
    return trees[min(num_answers.bit_length(), len(trees)) - 1]


def split_rows(widths: Sequence[int], num_rows: int) -> list[int]:
    """Rows of the exact products' calls for so many rows, 1 or more: the widest of `widths`, which
    ascend, as often as it is filled, and then the narrowest that has room for the rest."""
    whole, rest = divmod(num_rows, widths[-1])
    calls = [widths[-1]] * whole
    return [*calls, next(width for width in widths if width >= rest)] if rest else calls


@dataclass(frozen=True)
class Block:
    """Consecutive parts that cross the link in one transfer."""

    parts: tuple[StoredPart, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.padded_bytes for part in self.parts)


def make_blocks(stored: Sequence[StoredPart], placement: Placement) -> list[Block]:
    """Streamed parts in execution order, grouped in blocks of at most `placement.block_bytes`.

    A block is one range of exact.safetensors, so it ends at a part that is not streamed.
    """
    inside = {*placement.resident, *placement.residuals}
    blocks, current, size = list[Block](), list[StoredPart](), 0
    for part in stored:
        stays = part.name in inside
        if current and (stays or size + part.padded_bytes > placement.block_bytes):
            blocks.append(Block(tuple(current)))
            current, size = [], 0
        if not stays:
            current.append(part)
            size += part.padded_bytes
    return [*blocks, Block(tuple(current))] if current else blocks
