"""Bytes of a candidate plan; arithmetic, no torch.

The ledger's formulas mirror what the runtime allocates: session.py takes each purpose from an
arena of exactly this size, and tests compare the temporaries with `workspace_bytes`.
"""

from dataclasses import dataclass

from subspec.artifacts.model import (
    EMBEDDING,
    ModelSpec,
    linears,
    parts,
    resident_tensors,
)
from subspec.artifacts.plan import DeviceKind, Int4Kernel, aligned, cache_slots
from subspec.planner.solve.storage import for_one_model

DRAFT_BYTES = 2  # the draft computes in bf16
GUARD_SHARE = 0.01  # of the budget: what operations allocate inside themselves
GUARD_BYTES = 128 << 10  # and at least this
# cuda: cuBLAS' workspaces, 32 MiB on each of two streams of a Hopper, 8 elsewhere; what segments of
# torch's allocator are rounded up by.
ALLOCATOR_BYTES = (64 << 20) + (48 << 20)
GRAPH_BYTES_PER_LAYER = 512 << 10  # of all graphs of a draft; estimated: 2 x 12 of 20 kernels, 1 kB


@dataclass(frozen=True)
class Shape:
    """What a candidate's ledger depends on, beside the exact weights that stay resident."""

    context: int
    verify_width: int
    draft_width: int  # 0: no draft
    prefill_tokens: int
    block_bytes: int
    num_slots: int
    scratch_bytes: int  # of one decoded part; 0: no weight is stored as a residual
    num_threads: int  # of the CPU


def ledger(
    spec: ModelSpec,
    device: DeviceKind,
    kernel: Int4Kernel,
    shape: Shape,
    overhead_bytes: int,
    budget_bytes: int,
) -> dict[str, int]:
    """Purpose -> bytes, without resident exact weights."""
    drafts = shape.draft_width > 0
    return {
        # A residual is decoded over its substitute, whether that drafts or not.
        "substitutes": substitutes_bytes(spec, kernel) if drafts or shape.scratch_bytes else 0,
        "embedding": aligned(spec.vocab_size * spec.hidden_size * spec.item_bytes),
        "norms": small_bytes(spec),
        "tables": tables_bytes(spec, shape, drafts),
        "cache": cache_bytes(spec, shape.context, shape.verify_width),
        "staging": shape.block_bytes * shape.num_slots,
        "scratch": shape.scratch_bytes,
        "workspace": workspace_bytes(spec, device, shape),
        "overhead": overhead_bytes,
        "guard": max(GUARD_BYTES, int(budget_bytes * GUARD_SHARE)),
    }


@for_one_model
def substitutes_bytes(spec: ModelSpec, kernel: Int4Kernel) -> int:
    """Codes and qparams; gemlite has the qparams twice (runtime/kernels/linear.py)."""
    qparams = 2 if kernel == "gemlite" else 1
    return sum(
        aligned(n.num_weights // 2) + qparams * aligned(n.substitute_bytes - n.num_weights // 2)
        for n in linears(spec)
        if n.has_substitute
    )


@for_one_model
def small_bytes(spec: ModelSpec) -> int:
    """Norms, biases and matrices of odd shape."""
    total = 0
    for name, shape in resident_tensors(spec).items():
        if not name.startswith(EMBEDDING):
            total += aligned(count(shape) * spec.item_bytes)
    return total


def tables_bytes(spec: ModelSpec, shape: Shape, drafts: bool) -> int:
    """Rope tables, and for a model that is not bf16 the draft's copies of tables and norms."""
    positions = cache_slots(shape.context, shape.verify_width)
    total = 2 * aligned(positions * spec.head_size * spec.item_bytes)
    if drafts and spec.dtype != "bfloat16":
        total += 2 * aligned(positions * spec.head_size * DRAFT_BYTES) + draft_copies_bytes(spec)
    return total


@for_one_model
def draft_copies_bytes(spec: ModelSpec) -> int:
    """Norms and biases once more, in the draft's type."""
    return sum(
        aligned(count(shape) * DRAFT_BYTES)
        for name, shape in resident_tensors(spec).items()
        if name.endswith(("norm.weight", ".bias"))
    )


def cache_bytes(spec: ModelSpec, context: int, verify_width: int) -> int:
    return aligned(cache_slots(context, verify_width) * spec.kv_bytes_per_token)


@for_one_model
def model_bytes(spec: ModelSpec) -> int:
    """The checkpoint's own size."""
    small = sum(count(shape) for shape in resident_tensors(spec).values()) * spec.item_bytes
    return small + sum(part.num_bytes for part in parts(spec))


def workspace_bytes(spec: ModelSpec, device: DeviceKind, shape: Shape) -> int:
    """Peak of torch's temporaries over the passes; an upper bound, tested against a measurement."""
    slots = cache_slots(shape.context, shape.verify_width)
    exact = max(
        pass_bytes(spec, device, shape.prefill_tokens, slots) + logits_bytes(spec, 1),
        pass_bytes(spec, device, shape.verify_width, slots, exact_threads=shape.num_threads)
        + logits_bytes(spec, shape.verify_width),
    )
    draft = max(
        pass_bytes(spec, device, shape.draft_width, slots),
        compiled_draft_bytes(spec, shape.draft_width, slots, shape.num_threads),
    )
    draft += 14 * shape.draft_width * spec.vocab_size  # bf16 and f32 logits, sharpened f32
    if device == "cpu":
        return aligned(max(exact, draft))
    # Captured levels keep their temporaries, and the driver something for each kernel.
    graphs = spec.num_layers * GRAPH_BYTES_PER_LAYER if shape.draft_width > 0 else 0
    return aligned(exact + draft) + graphs + ALLOCATOR_BYTES


def pass_bytes(
    spec: ModelSpec, device: DeviceKind, rows: int, slots: int, exact_threads: int = 0
) -> int:
    """Activations of `rows` rows in one layer, the larger of its two halves. exact_threads: those
    of exact attention; 0: the fast one."""
    item, hidden, inner = spec.item_bytes, spec.hidden_size, spec.intermediate_size
    heads, kv_heads = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
    repeats = spec.num_heads // spec.num_kv_heads
    some = min(rows, 128)  # rows of one attention call
    piece = min(rows, 256)  # rows of one product or norm
    if exact_threads:
        # By the plain twin: f64 scores of one KV head, three alive, its keys and values. Compiled:
        # for each thread keys and values of a KV head in f32, and the scores of 16 rows.
        twin = repeats * rows * slots * 25 + slots * spec.head_size * 16
        per_thread = 4 * ((slots + 16) * (2 * (spec.head_size + 16) + 18) + 16 * spec.head_size)
        compiled = exact_threads * per_thread + 4 * (slots + 16)
        scores = max(twin, compiled) + 2 * rows * heads * item
    else:  # mask and its fold over the repeated heads; mask-free kernels are not assumed
        scores = some * slots * (2 + item * (1 + repeats)) + 4 * some * heads * item
        if device == "cuda":
            scores += spec.num_heads * some * slots * 4  # the math kernel's scores
    masks = rows * (rows + slots) + 8 * slots + rows * 64
    norm = piece * hidden * (item + 12)
    attention = rows * (heads + 2 * kv_heads) * item + max(
        rows * hidden * item + norm,
        5 * rows * kv_heads * item,
        scores,
        rows * hidden * item,
    )
    widest = max(inner, hidden)
    mlp = rows * (hidden + inner) * item + max(
        norm, 2 * piece * widest * item, rows * hidden * item
    )
    return rows * hidden * item * 2 + masks + max(attention, mlp)


def compiled_draft_bytes(spec: ModelSpec, rows: int, slots: int, num_threads: int) -> int:
    """Of the draft's compiled layers: rows, rope, masks, and the scratch of draft_layers.cpp, whose
    groups of 64 activations take 76 bytes; on a CPU, in bf16."""
    heads, kv_heads = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
    groups = (max(spec.hidden_size, heads) + spec.intermediate_size) * 76 // 64
    threads = 4 * num_threads * 64 * (spec.head_size + 15)
    scratch = rows * (groups + 2 * (heads + 2 * kv_heads)) + threads + 4 * 64
    masks = rows * (rows + slots * 11) + 8 * slots + rows * 64
    return rows * (2 * spec.hidden_size + 4 * spec.head_size) + masks + scratch


def logits_bytes(spec: ModelSpec, rows: int) -> int:
    """Logits of all rows, and the f64 working copies of the one that is sampled."""
    return rows * spec.vocab_size * spec.item_bytes + spec.vocab_size * 72


def count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
