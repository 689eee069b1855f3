"""Structural checks of a ModelSpec, a Plan and the headers of weight files against each other.

Types and bounds of single JSON values are checked before, by codec.py. Everything that memory or
time grows with is bounded before it is used.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from subspec.artifacts.acceptance import Curve
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.format.tensors import StoredTensor, read_header
from subspec.artifacts.model import (
    EMBEDDING,
    GROUP_SIZE,
    PAGE_BYTES,
    TOKEN_IDS,
    Attention,
    DraftHead,
    DType,
    ModelSpec,
    StoredPart,
)
from subspec.artifacts.plan import Placement, Plan, method_of

MAX_MODEL_BYTES = 1 << 44  # 16 TiB, about 262,144 parts
MAX_THRESHOLDS = 64  # at which drafts end: a search takes its time for each
HEAD_FILE = "draft_head.safetensors"  # of models with one (ModelSpec.draft_head)
TOKEN_IDS_DTYPE = "I64"
STORED_DTYPES: dict[DType, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def check_spec(spec: ModelSpec) -> None:
    """Raise SubspecError(CORRUPT) for an inconsistent or too large model."""
    for index, layer in enumerate(spec.layers):
        where = f"layers[{index}]"
        bodies = [block.body.name for block in layer.blocks]
        norms = [n for block in layer.blocks for n in (block.before, block.after) if n is not None]
        names = [*bodies, *norms, *([layer.scalar] if layer.scalar else [])]
        if len(set(names)) < len(names) or not (layer.attentions or layer.delta_nets):
            raise _wrong(
                "model.json",
                f"{where} names a block, norm or scalar twice, or has neither attention nor "
                "delta net",
            )
        for attention in layer.attentions:
            _check_attention(where, attention)
        for net in layer.delta_nets:
            if net.num_value_heads % net.num_key_heads:
                raise _wrong(
                    "model.json",
                    f"{where}: {net.num_value_heads} value heads over {net.num_key_heads} key "
                    "heads: expected a multiple",
                )
    if not any(layer.attentions for layer in spec.layers):
        raise _wrong("model.json", "has no attention in any layer")
    if len(taps := {net.conv_kernel_size for net in spec.delta_nets}) > 1:
        raise _wrong("model.json", f"has delta nets of {sorted(taps)} taps, expected one number")
    if spec.draft_head is not None:
        _check_draft_head(spec.draft_head)
    _check_eagle3(spec)
    if spec.norm.zero_centered and not spec.norm.rounds_late:
        raise _wrong("model.json", "norm is zero_centered, which it can be only with rounds_late")
    _check_fp8(spec)
    num_bytes = sum(linear.num_weights for linear in spec.linears) * spec.item_bytes
    if num_bytes > MAX_MODEL_BYTES:
        raise _wrong("model.json", f"describes {short_size(num_bytes)} of weights")


def _check_fp8(spec: ModelSpec) -> None:
    """FP8 matrices have substitutes, whole tiles of rows, and scales of whole groups."""
    fitting = {one.name for one in spec.linears if one.can_be_fp8} if spec.fp8 else set()
    for name, block in spec.fp8.items():
        if name not in fitting or block.columns % GROUP_SIZE or spec.dtype != "bfloat16":
            raise _wrong(
                "model.json",
                f"fp8 has {name[:200]!r} in blocks of {block.rows} x {block.columns}, expected a "
                f"matrix of a bfloat16 model with whole tiles, and a multiple of {GROUP_SIZE} "
                "columns",
            )


def _check_draft_head(head: DraftHead) -> None:
    layer = head.layer
    kinds = [block.body.kind for block in layer.blocks]
    if kinds != ["attention", "dense"] or layer.scalar:
        raise _wrong("model.json", f"draft_head has {kinds}, expected attention and feed-forward")
    _check_attention("draft_head", layer.attentions[0])


def _check_eagle3(spec: ModelSpec) -> None:
    eagle3, head = spec.eagle3, spec.draft_head
    if (eagle3 is not None) != (head is not None and head.layout == "eagle3"):
        raise _wrong("model.json", "has eagle3 without a draft_head of this layout, or no eagle3")
    if eagle3 is None or head is None:
        return
    if head.layer.blocks[0].before is None:
        raise _wrong("model.json", "draft_head has no norm before the attention of eagle3")
    if max(eagle3.reads) > spec.num_layers or len(set(eagle3.reads)) < len(eagle3.reads):
        raise _wrong(
            "model.json",
            f"eagle3 reads before the layers {list(eagle3.reads)}, expected different ones of "
            f"0 to {spec.num_layers}",
        )
    if eagle3.vocab_size > spec.vocab_size:
        raise _wrong(
            "model.json",
            f"eagle3 has logits of {eagle3.vocab_size} tokens, the model has {spec.vocab_size}",
        )


def _check_attention(where: str, one: Attention) -> None:
    if one.num_heads % one.num_kv_heads or one.head_size % 2:
        raise _wrong(
            "model.json",
            f"{where}: {one.num_heads} heads of {one.head_size} over {one.num_kv_heads} "
            "key-value heads: expected a multiple, and an even head size",
        )
    rope = one.rope
    if rope is None:
        return
    sane = (
        rope.size <= one.head_size
        and rope.size % 2 == 0
        and (rope.kind not in ("llama3", "yarn") or rope.original_max_positions >= 1)
        and (rope.kind != "llama3" or rope.low_frequency_factor != rope.high_frequency_factor)
        and (rope.kind != "longrope" or len(rope.divisors) == rope.size // 2)
        and rope.turning_pairs <= rope.size // 2
    )
    if not sane:
        raise _wrong(
            "model.json", f"{where}: {str(rope)[:400]} is not a rotary embedding of a head"
        )


def check_headers(path: Path, spec: ModelSpec) -> None:
    """Raise SubspecError(CORRUPT) unless the weight files in `path`, but the exact weights', have
    the tensors of the spec."""
    dtype = STORED_DTYPES[spec.dtype]
    embedding = read_header(path / "embedding.safetensors")
    rows = (spec.vocab_size, spec.hidden_size)
    _check_tensor("embedding.safetensors", embedding, f"{EMBEDDING}.weight", dtype, rows)
    resident = read_header(path / "resident.safetensors")
    for name, shape in spec.resident_shapes.items():
        own = STORED_DTYPES[spec.resident_dtype(name)]
        _check_tensor("resident.safetensors", resident, name, own, shape)
    for name, of_scales in spec.scale_shapes.items():
        _check_tensor("resident.safetensors", resident, name, "F32", of_scales)
    if spec.draft_head is not None:
        head = read_header(path / HEAD_FILE)
        for name, shape in spec.draft_head_shapes.items():
            own = TOKEN_IDS_DTYPE if name == TOKEN_IDS else dtype
            _check_tensor(HEAD_FILE, head, name, own, shape)
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


def check_plan(
    spec: ModelSpec, stored: list[StoredPart], plan: Plan, has_draft_model: bool = False
) -> None:
    """Raise SubspecError(CORRUPT) unless the plan names parts of this model and is consistent."""
    for method, placement in plan.placements.items():
        _check_placement(method, placement, stored, plan.budget_bytes)
    tree, fits = plan.tree, plan.context <= spec.max_positions
    for draft in (plan.draft_of("plain"), *plan.drafts.values()):
        for some in draft.trees:
            fits = fits and some.num_nodes <= plan.verify_width
            fits = fits and some.width <= draft.tree.width
    if plan.draft_head_result is not None:
        some = plan.draft_head_result.tree
        fits = fits and some.num_nodes <= plan.verify_width and some.width <= tree.width
    if plan.drafter is not None:
        fits = fits and method_of(plan.drafter) == plan.method
    for method in plan.placements:
        known = method in ("substitute", "plain") or (has_draft_model and method in plan.drafts)
        fits = fits and known
    for widths in (plan.verify_widths, plan.prompt_widths):
        fits = fits and list(widths) == sorted(set(widths))
    fits = fits and plan.prompt_widths[0] <= min(plan.prefill_chunk_tokens, plan.verify_width)
    if not fits or plan.method not in plan.placements:
        raise _wrong(
            "plan.json",
            f"method {plan.method}, tree {tree.width}x{tree.depth}, verify widths "
            f"{list(plan.verify_widths)}, prompt widths {list(plan.prompt_widths)}, "
            f"{plan.prefill_chunk_tokens} prefill tokens and "
            f"context {plan.context} are inconsistent",
        )
    for acceptance in (plan.acceptance, *(draft.acceptance for draft in plan.drafts.values())):
        _check_curves(acceptance.curves)
        thresholds = acceptance.thresholds
        if len(thresholds) > MAX_THRESHOLDS:
            raise _wrong(
                "plan.json",
                f"acceptance has {len(thresholds)} thresholds, expected at most {MAX_THRESHOLDS}",
            )


def _check_curves(curves: Sequence[Curve]) -> None:
    """Widths and thresholds ascend, and counts rise neither from trees to drafted to accepted nor
    from level to level."""
    order = [(curve.width, curve.min_path_probability) for curve in curves]
    if not curves or order != sorted(order):
        raise _wrong("plan.json", "acceptance has no curves of ascending widths and thresholds")
    for curve in curves:
        counts = [(curve.num_trees,) * 2, *zip(curve.drafted, curve.accepted, strict=False)]
        if (
            len(curve.drafted) != len(curve.accepted)
            or any(accepted > drafted for drafted, accepted in counts)
            or any(a < c or b < d for (a, b), (c, d) in pairwise(counts))
        ):
            raise _wrong(
                "plan.json",
                f"acceptance of width {curve.width} on {curve.kind[:60]!r} has impossible counts",
            )


def _check_placement(
    label: str, placement: Placement, stored: list[StoredPart], budget_bytes: int
) -> None:
    every = {part.name: part for part in stored}
    held = {*placement.resident, *placement.residuals}
    for name in (*placement.resident, *placement.residuals):
        if name not in every:
            raise _wrong("plan.json", f"{label} places an unknown part {name[:200]!r}")
    for name in placement.residuals:
        if not every[name].is_residual:
            raise _wrong("plan.json", f"{label} has {name} as a residual, but it is stored raw")
    for name in placement.dequantized:
        if name not in placement.resident or not every[name].part.linear.fp8:
            raise _wrong("plan.json", f"{label} has {name[:200]!r} dequantized, not resident FP8")
    # A residual is decoded with its substitute, unless that is done while loading.
    decodes = any(part.is_residual and part.name not in placement.resident for part in stored)
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
    needed = max(placement.ledger.total_bytes, num_slots * block_bytes)
    if needed > budget_bytes:
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
