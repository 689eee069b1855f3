"""Plan: where every exact weight lives, what is drafted and how deep, what it should cost.

The planner writes it, the runtime obeys it. A pure function of spec, profile, budget and the
user's own settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.common.bounds import (
    MOST_LEVELS,
    Below,
    Between,
    Count,
    Threads,
    TreeWidth,
    VerifyWidth,
)
from subspec.artifacts.common.sizes import LARGEST
from subspec.artifacts.model import StoredPart

DeviceKind = Literal["cpu", "cuda"]
Method = Literal["substitute", "plain"]
Int4Kernel = Literal["aten", "gemlite", "w4a8"]  # the last: runtime/kernels/int4.cpp, on cpu


Budget = Annotated[int, Between(1, LARGEST)]
Positive = Annotated[int, Between(1, 1 << 62)]
Probability = Annotated[float, Between(0, 1), Below(1)]


@dataclass(frozen=True)
class Tree:
    """The draft: a beam of `width` tokens per level, `depth` levels below the root."""

    width: TreeWidth
    depth: Annotated[int, Between(0, MOST_LEVELS)]
    # Draft probabilities are sharpened by it (arXiv 2509.18344).
    temperature: Annotated[float, Between(1e-6, 1e6)] = 1.0
    # No level follows one whose paths are less probable than this, all together and sharpened.
    min_path_probability: Probability = 0.0

    @property
    def num_nodes(self) -> int:
        return 1 + self.width * self.depth


ALIGNMENT = 256  # bytes; of every tensor in fast memory


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


SLOT_ALIGNMENT = 64  # live lengths of the KV cache are multiples of it: few distinct shapes


def cache_slots(context: int, verify_width: int) -> int:
    """KV slots for `context` tokens, one tree behind them, and the padding slot, aligned."""
    return -(-(context + verify_width + 1) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


@dataclass(frozen=True)
class Placement:
    """The fast tier while one method runs."""

    resident: tuple[str, ...]  # names of the parts that stay in fast memory, ready for a product
    split: tuple[str, ...]  # of those that stay there as residuals; all others stream
    block_bytes: Count  # size of one slot of the staging ring; a block is consecutive parts
    num_slots: Count
    ledger: dict[str, Count]  # purpose -> bytes of fast memory; sums to at most the budget

    @property
    def total_bytes(self) -> int:
        return sum(self.ledger.values())


@dataclass(frozen=True)
class Usage:
    """What a prediction is for: speed depends on how long the prompt and the answer are."""

    prompt_tokens: int
    answer_tokens: int
    kind: str = ""  # of text, as the calibration names it; "": all kinds


USUAL = Usage(128, 256)  # what a plan's own predictions are for, as far as its context allows


@dataclass(frozen=True)
class Prediction:
    """Seconds and bytes of one round (for plain decoding: of one token)."""

    tokens_per_second: float  # of an answer, after its first token; its last round overshoots
    time_to_first_token_seconds: float
    fast_peak_bytes: int
    tokens_per_round: float
    draft_seconds: float
    verify_seconds: float
    stream_seconds: float  # link time of the streamed bytes; hidden in part by verify and draft
    compute_seconds: float  # decoding included
    decode_seconds: float  # residuals -> exact weights
    streamed_bytes: int


@dataclass(frozen=True)
class Option:
    """One candidate that the search weighed, for the report."""

    label: str
    tokens_per_second: float


@dataclass(frozen=True)
class Point:
    """What the best plan for another budget or another context would reach."""

    budget_bytes: int
    context: int
    method: Method
    tokens_per_second: float


@dataclass(frozen=True)
class Constraints:
    """What the user fixed; None is ours to choose. Never overruled."""

    context: Positive | None = None
    width: TreeWidth | None = None
    depth: Annotated[int, Between(1, MOST_LEVELS)] | None = None
    method: Method | None = None
    ram_bytes: Budget | None = None  # host memory for the slow tier of a GPU
    encoding: Literal["auto", "residual", "raw", "kept"] = "auto"  # kept: an artifact's, as it is
    min_path_probability: Probability | None = None  # Tree.min_path_probability

    @property
    def needs_draft(self) -> bool:
        """A plan without a draft could not keep the wish: a tree was asked for, or the method."""
        fixed_tree = self.width is not None or self.depth is not None
        return self.method == "substitute" or (self.method is None and fixed_tree)


@dataclass(frozen=True)
class Plan:
    device: DeviceKind
    machine: str  # Profile.machine that the costs were measured on
    budget_bytes: Budget
    context: Positive  # tokens of prompt and answer together
    method: Method
    tree: Tree
    verify_width: VerifyWidth  # rows of every exact pass, plain twin included: padded to this
    num_threads: Threads  # of the CPU; a result's bits depend on it
    int4_kernel: Int4Kernel
    prefill_tokens: Positive  # of a prompt that go through the layers in one stream of the weights
    substitute: Placement | None  # None: the substitutes do not fit the budget
    plain: Placement
    residuals: tuple[str, ...]  # names of the parts that are stored as residuals
    predicted: dict[str, Prediction]  # by method
    acceptance: Acceptance
    options: tuple[Option, ...] = ()  # best first; what was not taken, and its predicted speed
    reasons: tuple[str, ...] = ()  # one sentence per decision
    constraints: Constraints = Constraints()
    by_budget: tuple[Point, ...] = ()  # budgets ascending, for the report
    by_context: tuple[Point, ...] = ()  # contexts ascending

    def placement(self, method: Method) -> Placement | None:
        return self.substitute if method == "substitute" else self.plain


@dataclass(frozen=True)
class Block:
    """Consecutive parts that cross the link in one transfer."""

    parts: tuple[StoredPart, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.padded_bytes for part in self.parts)


def make_blocks(stored: Sequence[StoredPart], placement: Placement) -> list[Block]:
    """What streams, in execution order, in blocks of at most `placement.block_bytes`.

    A block is one range of exact.safetensors: a part that stays in fast memory ends it.
    """
    inside = {*placement.resident, *placement.split}
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
