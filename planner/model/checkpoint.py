"""Checkpoint folder -> ModelSpec, and where every tensor of the spec lies.

Everything in the folder was written by somebody else and is checked before it is used. Canonical
names are found whatever the checkpoint calls its tensors and however it stacks them: a canonical
matrix is always consecutive rows of one stored tensor.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Attention,
    Block,
    DeltaNet,
    Dense,
    DType,
    LayerSpec,
    ModelSpec,
    Source,
    layer_name,
)
from subspec.planner.model.config import CONFIG, config_notes, quantization_of, read_config
from subspec.planner.model.fp8 import (
    E4M3,
    ORIGINAL,
    PACKED,
    Quantization,
    StoredScales,
    refused_dtype,
    refused_packed,
    scales_beside,
)
from subspec.planner.model.names import HEAD_WEIGHT, HEADS, PREFIXES, stored_names
from subspec.planner.model.stored import (
    AGAIN,
    INDEX,
    WEIGHTS,
    Rows,
    StoredTensor,
    StoredTensors,
    read_pieces,
    shard_names,
    stored_tensors,
)

DTYPES: dict[str, DType] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

DECODER_PARTS = ("embed_tokens", "layers", "norm")
MTP = "mtp"  # what the tensors of a head for multi-token prediction begin with
DRAFT_HEAD = "draft_head"  # what the rows of a draft head begin with
EMBEDDING_WEIGHT = f"{EMBEDDING}.weight"


@dataclass(frozen=True)
class Checkpoint:
    """`rows` holds what the spec calls for by canonical name, `.weight` and `.bias` included; a
    tied head's are the embedding's."""

    folder: Path
    spec: ModelSpec
    rows: dict[str, Rows]
    notes: tuple[str, ...] = ()  # for the user
    # Of every matrix that is stored in FP8, by its name; those in `spec.fp8` stay so. Those of a
    # draft head have the names of its rows.
    scales: dict[str, StoredScales] = field(default_factory=dict)


def read_checkpoint(folder: Path, source: Source) -> Checkpoint:
    """Read the whole checkpoint but its weights. The dtype is the tensors', whatever config.json
    says. Raises SubspecError: UNSUPPORTED for what we do not run, CORRUPT for invalid content."""
    spec = read_config(folder, source)
    stored = stored_tensors(folder)
    names = _Names(spec, stored)
    shapes = _shapes(spec)
    # Of a tied pair either may be the one that is stored.
    stands_in = (
        spec.tie_word_embeddings and names.find(HEAD_WEIGHT) and not names.find(EMBEDDING_WEIGHT)
    )
    rows = {}
    for name, shape in shapes.items():
        rows[name] = names.rows(
            HEAD_WEIGHT if stands_in and name == EMBEDDING_WEIGHT else name, shape
        )
    notes = config_notes(folder)
    if spec.tie_word_embeddings and names.find(HEAD_WEIGHT):
        head = names.rows(HEAD_WEIGHT, shapes[EMBEDDING_WEIGHT])
        if not _same_weights(head, rows[EMBEDDING_WEIGHT]):  # transformers unties them, too
            spec = replace(spec, tie_word_embeddings=False)
            rows[HEAD_WEIGHT] = head
            notes += (
                f"{CONFIG} says that the head is the embedding, but {head.tensor.name} is not "
                f"{rows[EMBEDDING_WEIGHT].tensor.name}: each is used as stored",
            )
    quantization = quantization_of(folder)
    scales = _scales(spec, rows, stored, quantization)
    apart = {*spec.net_tensors, *(f"{name}.weight" for name in scales)}
    dtype = _dtype([own for name, own in rows.items() if name not in apart])
    if scales and dtype != "bfloat16":
        raise _not_beside_fp8("the checkpoint", dtype)
    if spec.tie_word_embeddings:
        rows[HEAD_WEIGHT] = rows[EMBEDDING_WEIGHT]
    own_head = _own_head(replace(spec, dtype=dtype), names, stored, quantization)
    if not own_head.rows:
        spec = replace(spec, draft_head=None)
    notes = (*_set_aside(stored, spec), *own_head.notes, *notes)
    fitting = {one.name for one in spec.linears if one.can_be_fp8}
    fp8 = {n: one.block for n, one in scales.items() if n in fitting and one.is_aligned}
    layers = _with_net_dtypes(spec, dtype, rows)
    spec = replace(spec, dtype=dtype, layers=layers, fp8=fp8)
    return Checkpoint(folder, spec, rows | own_head.rows, notes, scales | own_head.scales)


def _scales(
    spec: ModelSpec,
    rows: dict[str, Rows],
    stored: StoredTensors,
    quantization: Quantization | None,
) -> dict[str, StoredScales]:
    """Scales of the matrices that are stored in FP8, by name."""
    found = {}
    for linear in spec.linears:
        own = rows.get(f"{linear.name}.weight")
        if own is not None and own.tensor.dtype == E4M3:
            found[linear.name] = scales_beside(own, stored, quantization)
    return found


class _OwnHead(NamedTuple):
    """Rows and scales of a checkpoint's own draft head, by the names of a Checkpoint."""

    rows: dict[str, Rows]  # none: there is no head, or it is set aside
    scales: dict[str, StoredScales]
    notes: tuple[str, ...] = ()


def _own_head(
    spec: ModelSpec, names: "_Names", stored: StoredTensors, quantization: Quantization | None
) -> _OwnHead:
    """The head for multi-token prediction. It only drafts: one that is not whole, or neither in the
    model's dtype nor in FP8, is set aside. Raises SubspecError(CORRUPT) for another shape."""
    rows, scales = dict[str, Rows](), dict[str, StoredScales]()
    if not any(names.find(f"{MTP}.{name}") for name in spec.draft_head_shapes):
        return _OwnHead({}, {})  # copies often leave it out
    for name, shape in spec.draft_head_shapes.items():
        tensor = names.find(f"{MTP}.{name}")
        if tensor is None:
            return _without_head(names.missing(f"{MTP}.{name}", shape).message)
        in_fp8 = tensor.dtype == E4M3 and len(shape) == 2
        if not in_fp8 and DTYPES.get(tensor.dtype) != spec.dtype:
            return _without_head(f"{tensor.name} is {tensor.dtype}, the model is {spec.dtype}")
        own = rows[f"{DRAFT_HEAD}.{name}"] = names.rows(f"{MTP}.{name}", shape)
        if in_fp8:
            matrix = f"{DRAFT_HEAD}.{name}".removesuffix(".weight")
            try:
                scales[matrix] = scales_beside(own, stored, quantization)
            except SubspecError as error:
                return _without_head(error.message)
    return _OwnHead(rows, scales)


def _without_head(reason: str) -> _OwnHead:
    return _OwnHead({}, {}, (f"the checkpoint's own draft head is set aside: {reason}",))


def read_spec(folder: Path, source: Source) -> ModelSpec:
    """Read the ModelSpec for a dry run: from config.json alone if the weights are not
    downloaded."""
    indexed = (folder / INDEX).exists() or (folder / WEIGHTS).exists()
    if indexed and all((folder / name).exists() for name in shard_names(folder)):
        return read_checkpoint(folder, source).spec
    spec = read_config(folder, source)
    if spec.fp8 and spec.dtype != "bfloat16":
        raise _not_beside_fp8(CONFIG, spec.dtype)
    return spec


def _not_beside_fp8(where: str, dtype: DType) -> SubspecError:
    message = f"{where} has weights in FP8 and others in {dtype}, expected bfloat16"
    return SubspecError(Exit.UNSUPPORTED, message, ORIGINAL)


def _same_weights(one: Rows, other: Rows) -> bool:
    import torch  # not needed for headers

    if one == other:
        return True
    pieces = zip(read_pieces(one), read_pieces(other), strict=True)
    return one.tensor.dtype == other.tensor.dtype and all(
        torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) for ours, theirs in pieces
    )


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor that the spec calls for, but a tied head."""
    found: dict[str, tuple[int, ...]] = {EMBEDDING_WEIGHT: (spec.vocab_size, spec.hidden_size)}
    for linear in spec.linears:
        rows = linear.out_features - linear.padding_rows
        if not (linear.name == HEAD and spec.tie_word_embeddings):
            found[f"{linear.name}.weight"] = (rows, linear.in_features)
        if linear.has_bias:
            found[f"{linear.name}.bias"] = (rows,)
    found |= {f"{name}.weight": (size,) for name, size in spec.norm_sizes.items()}
    found |= {name: shape for name, (shape, _) in spec.net_tensors.items()}
    return found | {name: (1,) for name in spec.scalar_names if name}


class _Names:
    """Finds the stored rows of canonical names in a checkpoint."""

    def __init__(self, spec: ModelSpec, stored: StoredTensors) -> None:
        self._stored = stored
        self._fused = dict[str, tuple[str, int, int]]()
        for index, layer in enumerate(spec.layers):
            for name, (fused, first, total) in _fusions(layer).items():
                for kind in ("weight", "bias"):
                    full, place = (
                        f"{layer_name(index)}.{name}.{kind}",
                        f"{layer_name(index)}.{fused}",
                    )
                    self._fused[full] = (f"{place}.{kind}", first, total)

    def find(self, name: str) -> StoredTensor | None:
        """The stored tensor of a canonical name. Raises SubspecError(CORRUPT) if there are two,
        since it is unknown which one the model was trained with."""
        tensors, misplaced = self._stored.tensors, self._stored.misplaced
        names = stored_names(name)
        found = [tensors[one] for one in names if one in tensors and one not in misplaced]
        if len(found) > 1:
            message = (
                f"the checkpoint has {found[0].name} and {found[1].name}, expected one of them"
            )
            raise SubspecError(Exit.CORRUPT, message, AGAIN)
        return found[0] if found else None

    def rows(self, name: str, shape: tuple[int, ...]) -> Rows:
        """Rows of a canonical tensor of this shape. Raises SubspecError: CORRUPT if it is not
        stored, or not in this shape, UNSUPPORTED for packed weights."""
        tensor, first, stored_shape = self.find(name), 0, shape
        if tensor is None and name in self._fused:
            fused, first, total = self._fused[name]
            tensor, stored_shape = self.find(fused), (total, *shape[1:])
        if tensor is None:
            raise self.missing(name, shape)
        if tensor.shape != stored_shape and tensor.dtype in PACKED:
            raise refused_packed(tensor, stored_shape)
        if tensor.shape != stored_shape:
            raise SubspecError(
                Exit.CORRUPT,
                f"{tensor.file.name}: {tensor.name} has the shape {list(tensor.shape)}, expected "
                f"{list(stored_shape)} by {CONFIG}",
            )
        return Rows(tensor, first, shape[0])

    def missing(self, name: str, shape: tuple[int, ...]) -> SubspecError:
        whole = self._fused[name][0] if name in self._fused else name
        for stored in (*stored_names(name), *stored_names(whole)):
            if stored in self._stored.misplaced:
                return SubspecError(Exit.CORRUPT, self._stored.misplaced[stored], AGAIN)
        message = f"the checkpoint has no {name}, expected one of shape {list(shape)} by {CONFIG}"
        stem = name.removeprefix(PREFIXES[0])
        others = [stored for stored in self._stored.tensors if stored.endswith(f".{stem}")]
        if others:
            message += f"; it has {others[0][:100]}"
            hint = "rename its tensors as transformers' save_pretrained() does"
        elif name == HEAD_WEIGHT:
            hint = f"if the head is the embedding, set tie_word_embeddings to true in {CONFIG}"
        else:
            hint = AGAIN
        return SubspecError(Exit.CORRUPT, message, hint)


def _set_aside(stored: StoredTensors, spec: ModelSpec) -> tuple[str, ...]:
    """A note on tensors that are not read: of towers for images and sound, of draft heads."""
    read = DECODER_PARTS if spec.draft_head is None else (*DECODER_PARTS, MTP)
    prefixes = sorted(PREFIXES, key=len, reverse=True)
    counts = dict[str, int]()
    for name in stored.tensors:
        prefix = next(one for one in prefixes if name.startswith(one))
        part = name.removeprefix(prefix).split(".")[0]
        if part not in read and name not in HEADS:
            counts[part] = counts.get(part, 0) + 1
    if not counts:
        return ()
    shown = sorted(counts, key=lambda part: (-counts[part], part))[:4]
    others = ", ..." if len(counts) > len(shown) else ""
    return (
        f"set aside: {sum(counts.values())} tensors of {', '.join(p[:40] for p in shown)}{others}, "
        "which the text decoder does not read",
    )


def _fusions(layer: LayerSpec) -> dict[str, tuple[str, int, int]]:
    """Name under the layer -> name of the matrix that it may be stored in, its first row there, and
    how many rows that has: q|k|v and gate|up, as phi3 and glm4 have them."""
    found = {}
    for body in (block.body for block in layer.blocks):
        if isinstance(body, Attention):
            fused = f"{body.name}.qkv_proj"
            sizes = {"q_proj": body.query_size, "k_proj": body.kv_size, "v_proj": body.kv_size}
            if body.values_are_keys:
                del sizes["v_proj"]
            if body.output_gate:
                sizes["q_proj"] *= 2
        elif isinstance(body, Dense):
            fused = f"{body.name}.gate_up_proj"
            sizes = {"gate_proj": body.intermediate_size, "up_proj": body.intermediate_size}
        else:
            continue
        first, total = 0, sum(sizes.values())
        for name, size in sizes.items():
            found[f"{body.name}.{name}"] = (fused, first, total)
            first += size
    return found


def _with_net_dtypes(spec: ModelSpec, dtype: DType, rows: dict[str, Rows]) -> tuple[LayerSpec, ...]:
    """The layers, whose delta nets say which of their small tensors are f32: some models of a
    family have them so, and others not."""

    def block(index: int, one: Block) -> Block:
        net = one.body
        if not isinstance(net, DeltaNet):
            return one
        own = {name: rows[f"{layer_name(index)}.{net.name}.{name}"] for name in net.tensor_shapes}
        wide = tuple(name for name, some in own.items() if some.tensor.dtype == "F32")
        wide = () if dtype == "float32" else wide
        narrow = [some for name, some in own.items() if name not in wide]
        _dtype([rows[f"{FINAL_NORM}.weight"], *narrow])  # raises for a third one
        return replace(one, body=replace(net, f32_tensors=wide))

    return tuple(
        replace(layer, blocks=tuple(block(index, one) for one in layer.blocks))
        for index, layer in enumerate(spec.layers)
    )


def _dtype(needed: list[Rows]) -> DType:
    """The one dtype of all tensors but FP8 matrices; the runtime computes in it and never converts
    a weight."""
    first = needed[0].tensor
    for tensor in (rows.tensor for rows in needed):
        if tensor.dtype not in DTYPES:
            raise refused_dtype(tensor, ", ".join(DTYPES))
        if tensor.dtype != first.dtype:
            raise SubspecError(
                Exit.UNSUPPORTED,
                f"{tensor.file.name}: {tensor.name} is {tensor.dtype}, expected {first.dtype} as "
                f"{first.name}",
                "save the checkpoint in one dtype with transformers: "
                'AutoModelForCausalLM.from_pretrained(OLD, dtype="bfloat16").save_pretrained(NEW)',
            )
    return DTYPES[first.dtype]
