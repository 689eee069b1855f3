"""A published draft head -> what a checkpoint of its model has beside the model's own tensors.

EAGLE and EAGLE-2 (arXiv 2401.15077, 2406.16858): config.json is that of a model of the one layer,
and the layer has no norm before its attention. EAGLE-3: planner/model/eagle3.py. The embedding that
comes with a head is the model's.
"""

from dataclasses import replace
from pathlib import Path

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import (
    EMBEDDING,
    FUSION,
    HEAD_LAYER,
    TOKEN_IDS,
    DraftHead,
    LayerSpec,
    ModelSpec,
    Source,
)
from subspec.planner.model.checkpoint import DRAFT_HEAD, DTYPES, Checkpoint
from subspec.planner.model.config import CONFIG, described
from subspec.planner.model.eagle3 import (
    check_embedding,
    decoder_fields,
    eagle3_of,
    is_eagle3,
    renamed,
    token_ids,
)
from subspec.planner.model.fields import read_fields
from subspec.planner.model.fp8 import refused_dtype
from subspec.planner.model.stored import AGAIN, WEIGHTS, Rows, StoredTensor, stored_tensors

PREFIXES = ("", "model.")
PICKLE = "pytorch_model.bin"
CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    f"s.save_file(torch.load('{PICKLE}', weights_only=True), '{WEIGHTS}')\""
)
EMBEDDING_WEIGHT = f"{EMBEDDING}.weight"
INTEGERS = ("I64", "I32")


def with_draft_head(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with the head in `folder` instead of one that it may have. Raises
    SubspecError, whose message is about the head: USAGE for one of another model, UNSUPPORTED for
    what we do not compute, CORRUPT for what makes no sense."""
    if (folder / PICKLE).exists() and not (folder / WEIGHTS).exists():
        message = f"its weights are in {PICKLE}, we read only {WEIGHTS}"
        raise SubspecError(Exit.UNSUPPORTED, message, f"in its folder: {CONVERT}")
    tensors = {
        next(name.removeprefix(p) for p in reversed(PREFIXES) if name.startswith(p)): tensor
        for name, tensor in stored_tensors(folder).tensors.items()
    }
    written, eagle3 = read_fields(folder / CONFIG), None
    if is_eagle3(tensors):
        eagle3 = eagle3_of(written, checkpoint.spec)
        written, tensors = decoder_fields(written), renamed(tensors)
    own = described(written, folder, Source(""))
    check_sizes(own, checkpoint.spec)
    layer = as_stored(own.layers[0], tensors)
    bias = f"{FUSION}.bias" in tensors
    if eagle3 is None:
        head = DraftHead("eagle", without_first_norm(layer), own.norm, bias)
    else:
        head = DraftHead("eagle3", layer, own.norm, bias)
    spec = replace(checkpoint.spec, draft_head=head, eagle3=eagle3)
    rows = {
        f"{DRAFT_HEAD}.{name}": rows_of(tensors, name, shape)
        for name, shape in spec.draft_head_shapes.items()
    }
    if (ids := rows.get(f"{DRAFT_HEAD}.{TOKEN_IDS}")) is not None:
        token_ids(ids.tensor, spec.vocab_size)
    copied = tensors.get("embed_tokens.weight") if eagle3 is not None else None
    if copied is not None and EMBEDDING_WEIGHT in checkpoint.rows:
        rows_of(tensors, "embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
        check_embedding(copied, checkpoint.rows[EMBEDDING_WEIGHT])
    kept = {n: own for n, own in checkpoint.rows.items() if not n.startswith(f"{DRAFT_HEAD}.")}
    scales = {n: own for n, own in checkpoint.scales.items() if not n.startswith(f"{DRAFT_HEAD}.")}
    return replace(checkpoint, spec=spec, rows=kept | rows, scales=scales)


def check_sizes(own: ModelSpec, spec: ModelSpec) -> None:
    """Raises SubspecError unless a head of these sizes fits the model."""
    for what, theirs, ours in (
        ("a hidden size", own.hidden_size, spec.hidden_size),
        ("a vocabulary", own.vocab_size, spec.vocab_size),
    ):
        if theirs != ours:
            raise SubspecError(
                Exit.USAGE,
                f"it has {what} of {theirs}, its model must have the same and has {ours}",
                "give the head that was trained for this model",
            )
    if own.num_layers != 1:
        message = f"it has {own.num_layers} layers, we compute only 1"
        raise SubspecError(Exit.UNSUPPORTED, message)


def as_stored(layer: LayerSpec, tensors: dict[str, StoredTensor]) -> LayerSpec:
    """The layer with the biases that are there."""
    first, *others = layer.blocks
    [attention] = layer.attentions
    qkv, output = (f"{HEAD_LAYER}.{attention.name}.{one}_proj.bias" in tensors for one in "qo")
    body = replace(attention, qkv_bias=qkv, output_bias=output)
    return replace(layer, blocks=(replace(first, body=body), *others))


def without_first_norm(layer: LayerSpec) -> LayerSpec:
    first, *others = layer.blocks
    return replace(layer, blocks=(replace(first, before=None), *others))


def rows_of(tensors: dict[str, StoredTensor], name: str, shape: tuple[int, ...]) -> Rows:
    if name not in tensors:
        message = f"it has no {name}, expected one of shape {list(shape)} by {CONFIG}"
        raise SubspecError(Exit.CORRUPT, message, AGAIN)
    tensor = tensors[name]
    if tensor.shape != shape:
        message = (
            f"{tensor.file.name}: {tensor.name} has the shape {list(tensor.shape)}, expected "
            f"{list(shape)} by {CONFIG}"
        )
        raise SubspecError(Exit.CORRUPT, message)
    dtypes = INTEGERS if name == TOKEN_IDS else tuple(DTYPES)
    if tensor.dtype not in dtypes:
        raise refused_dtype(tensor, ", ".join(dtypes))
    return Rows(tensor, 0, shape[0])
