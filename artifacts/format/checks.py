"""What a structural check asks of a ModelSpec, a Plan and the headers beside them.

JSON has right types by now (codec.py); here are the values. Everything that memory or time grows
with is bounded before it is used.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from subspec.artifacts.acceptance import Curve
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import LARGEST, short_size
from subspec.artifacts.format.tensors import StoredTensor, read_header
from subspec.artifacts.model import (
    EMBEDDING,
    GROUP_SIZE,
    PAGE_BYTES,
    Block,
    Dense,
    DType,
    ModelSpec,
    Rope,
    StoredPart,
)
from subspec.artifacts.plan import Placement, Plan

LARGEST_SIZE = 1 << 20  # features, heads
MOST_LAYERS = 10_000
MOST_BLOCKS = 16  # of a layer
MOST_SEQUENCES = 256
LARGEST_VOCABULARY = 1 << 24
MOST_POSITIONS = 1 << 30
LARGEST_MODEL_BYTES = 1 << 44  # 16 TiB, about 262,144 parts
STORED_DTYPES: dict[DType, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}(\.[a-z][a-z0-9_]{0,63}){0,3}", re.ASCII)


def check_spec(spec: ModelSpec) -> None:
    """Raises SubspecError(CORRUPT) for a model that no checkpoint describes."""
    for name, count, largest in (
        ("hidden_size", spec.hidden_size, LARGEST_SIZE),
        ("vocab_size", spec.vocab_size, LARGEST_VOCABULARY),
        ("max_positions", spec.max_positions, MOST_POSITIONS),
        ("layers", len(spec.layers), MOST_LAYERS),
    ):
        _check_count(name, count, largest)
    for index, layer in enumerate(spec.layers):
        where = f"layers[{index}]"
        _check_count(f"{where}.blocks", len(layer.blocks), MOST_BLOCKS)
        for block in layer.blocks:
            _check_block(where, block)
        bodies = [block.body.name for block in layer.blocks]
        norms = [n for block in layer.blocks for n in (block.before, block.after) if n is not None]
        if len({*bodies, *norms}) < len(bodies) + len(norms) or not layer.attentions:
            raise _wrong("model.json", f"{where} names a norm twice, or has no attention")
    if not 0 < spec.norm.epsilon < 1:
        raise _wrong("model.json", f"norm.epsilon is {spec.norm.epsilon}, expected 0 to 1")
    if spec.embedding_scale == 0 or spec.logits_divisor == 0:
        raise _wrong("model.json", "embedding_scale or logits_divisor is 0")
    num_bytes = sum(linear.num_weights for linear in spec.linears) * spec.item_bytes
    if num_bytes > LARGEST_MODEL_BYTES:
        raise _wrong("model.json", f"describes {short_size(num_bytes)} of weights")


def _check_block(where: str, block: Block) -> None:
    body = block.body
    for name in (body.name, block.before, block.after):
        if name is not None and NAME.fullmatch(name) is None:
            raise _wrong("model.json", f"{where} has a name {name[:100]!r}")
    if isinstance(body, Dense):
        _check_count(f"{where}.inner_size", body.inner_size, LARGEST_SIZE)
        return
    for name, count in (
        ("num_heads", body.num_heads),
        ("num_kv_heads", body.num_kv_heads),
        ("head_size", body.head_size),
    ):
        _check_count(f"{where}.{name}", count, LARGEST_SIZE)
    if body.num_heads % body.num_kv_heads or body.head_size % 2:
        raise _wrong(
            "model.json",
            f"{where}: {body.num_heads} heads of {body.head_size} over {body.num_kv_heads} "
            "key-value heads do not divide",
        )
    if body.scale <= 0 or (body.window is not None and body.window < 1):
        raise _wrong("model.json", f"{where} has scale {body.scale}, window {body.window}")
    if body.query_growth is not None and body.query_growth.positions < 1:
        raise _wrong("model.json", f"{where}.query_growth has no positions")
    if body.rope is not None:
        _check_rope(f"{where}.rope", body.rope, body.head_size)


def _check_rope(where: str, rope: Rope, head_size: int) -> None:
    scaled = rope.kind in ("llama3", "yarn")
    sane = (
        rope.theta > 0
        and rope.factor > 0
        and 2 <= rope.size <= head_size
        and rope.size % 2 == 0
        and (not scaled or rope.original_max_positions >= 1)
        and (rope.kind != "llama3" or rope.low_frequency_factor != rope.high_frequency_factor)
        and (rope.kind != "yarn" or (rope.beta_fast > 0 and rope.beta_slow > 0))
        and (rope.kind != "longrope" or len(rope.divisors) == rope.size // 2)
        and all(divisor > 0 for divisor in rope.divisors)
    )
    if not sane:
        raise _wrong("model.json", f"{where} is {str(rope)[:400]}, which rotates nothing")


def _check_count(name: str, count: int, largest: int) -> None:
    if not 1 <= count <= largest:
        raise _wrong("model.json", f"{name} is {count}, expected 1 to {largest}")


def check_headers(path: Path, spec: ModelSpec) -> None:
    """The files beside exact.safetensors hold what the spec calls for."""
    dtype = STORED_DTYPES[spec.dtype]
    embedding = read_header(path / "embedding.safetensors")
    rows = (spec.vocab_size, spec.hidden_size)
    _check_tensor("embedding.safetensors", embedding, f"{EMBEDDING}.weight", dtype, rows)
    resident = read_header(path / "resident.safetensors")
    for name, shape in spec.resident_shapes.items():
        _check_tensor("resident.safetensors", resident, name, dtype, shape)
    substitutes = read_header(path / "substitutes.safetensors")
    for linear in spec.linears:
        if not linear.has_substitute:
            continue
        num_rows, groups = linear.out_features, linear.in_features // GROUP_SIZE
        expected = {
            "codes": ("U8", (num_rows, linear.in_features // 2)),
            "qparams": ("BF16", (groups, num_rows, 2)),
        }
        for suffix, (dtype, shape) in expected.items():
            name = f"{linear.name}.{suffix}"
            _check_tensor("substitutes.safetensors", substitutes, name, dtype, shape)


def check_plan(spec: ModelSpec, stored: list[StoredPart], plan: Plan) -> None:
    """The plan names parts of this model, and its numbers go together."""
    if not 1 <= plan.budget_bytes <= LARGEST:
        raise _wrong("plan.json", f"budget_bytes is {plan.budget_bytes}, expected 1 to {LARGEST}")
    for method, placement in plan.placements.items():
        _check_placement(method, placement, stored, plan.budget_bytes)
    tree = plan.tree
    sane = (
        1 <= tree.width <= 256
        and 0 <= tree.depth <= 1024
        and tree.temperature > 0
        and 0 <= tree.min_path_probability < 1
        and tree.num_nodes <= plan.verify_width <= 4096
        and 1 <= plan.context <= spec.max_positions
        and 1 <= plan.num_threads <= 1024
        and 1 <= plan.num_sequences <= MOST_SEQUENCES
        and plan.prefill_tokens >= 1
    )
    if not sane or plan.method not in plan.placements:
        raise _wrong(
            "plan.json",
            f"method {plan.method}, tree {tree.width}x{tree.depth} at temperature "
            f"{tree.temperature} that ends below {tree.min_path_probability}, verify width "
            f"{plan.verify_width}, context {plan.context}, {plan.num_threads} threads, prefill "
            f"{plan.prefill_tokens} do not go together",
        )
    _check_curves(plan.acceptance.curves)


def _check_curves(curves: Sequence[Curve]) -> None:
    """Trees of ascending widths that were tried, and accepted at most as often, less the deeper."""
    widths = [curve.width for curve in curves]
    if not curves or widths != sorted(widths):
        raise _wrong("plan.json", "acceptance has no curves of ascending widths")
    for curve in curves:
        levels = list(zip(curve.tried, curve.accepted, strict=False))
        if (
            not 1 <= curve.width <= 256
            or not 1 <= len(curve.tried) == len(curve.accepted) <= 1024
            or not all(0 <= accepted <= tried for tried, accepted in levels)
            or any(deeper > higher for (_, higher), (deeper, _) in pairwise(levels))
        ):
            raise _wrong(
                "plan.json",
                f"acceptance of width {curve.width} on {curve.kind[:60]!r} has counts that no "
                "trees have",
            )


def _check_placement(
    label: str, placement: Placement, stored: list[StoredPart], budget_bytes: int
) -> None:
    every = {part.name: part for part in stored}
    held = {*placement.resident, *placement.residuals}
    for name in (*placement.resident, *placement.residuals):
        if name not in every:
            raise _wrong("plan.json", f"{label} places an unknown {name[:200]!r}")
    for name in placement.residuals:
        if every[name].encoding != "residual":
            raise _wrong("plan.json", f"{label} keeps {name} as a residual, but it is stored raw")
    # A residual is decoded over its substitute, unless that happened while loading.
    decodes = any(p.encoding == "residual" and p.name not in placement.resident for p in stored)
    if decodes and not placement.ledger.substitutes:
        raise _wrong("plan.json", f"{label} decodes residuals without their substitutes")
    num_slots, block_bytes = placement.num_slots, placement.block_bytes
    largest = max((part.padded_bytes for part in stored if part.name not in held), default=0)
    if largest and (num_slots < 2 or block_bytes < largest or block_bytes % PAGE_BYTES):
        raise _wrong(
            "plan.json",
            f"{label} has {num_slots} slots of {block_bytes} bytes, expected 2 or more of "
            f"{largest} or more, a multiple of {PAGE_BYTES}",
        )
    ring_bytes = max(num_slots, 0) * max(block_bytes, 0)
    needed = max(placement.ledger.total_bytes, ring_bytes)
    if needed > budget_bytes or min(vars(placement.ledger).values()) < 0:
        raise _wrong(
            "plan.json",
            f"{label} adds up to {short_size(needed)}, its budget is {short_size(budget_bytes)}",
        )


def _check_tensor(
    where: str,
    tensors: dict[str, StoredTensor],
    name: str,
    dtype: str,
    shape: tuple[int, ...],
) -> None:
    stored = tensors.get(name)
    if stored is None or stored.shape != shape or stored.dtype != dtype:
        got = "missing" if stored is None else f"{stored.dtype} {list(stored.shape)}"
        raise _wrong(where, f"{name} is {got}, expected {dtype} {list(shape)}")


def _wrong(where: str, what: str) -> SubspecError:
    return SubspecError(Exit.CORRUPT, f"{where}: {what}", "copy or build the artifact again")
