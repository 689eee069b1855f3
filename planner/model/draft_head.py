"""A published draft head -> what a checkpoint of its model has beside the model's own tensors.

EAGLE and EAGLE-2 (arXiv 2401.15077, 2406.16858): config.json is that of a model of the one layer,
and the layer has no norm before its attention. The embedding that comes with it is the model's.
"""

from dataclasses import replace
from pathlib import Path

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import FUSION, HEAD_LAYER, DraftHead, LayerSpec, Source
from subspec.planner.model.checkpoint import DRAFT_HEAD, DTYPES, Checkpoint
from subspec.planner.model.config import CONFIG, read_config
from subspec.planner.model.fp8 import refused_dtype
from subspec.planner.model.stored import AGAIN, WEIGHTS, Rows, StoredTensor, stored_tensors

PREFIXES = ("", "model.")
PICKLE = "pytorch_model.bin"
CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    f"s.save_file(torch.load('{PICKLE}', weights_only=True), '{WEIGHTS}')\""
)
EAGLE3 = ("midlayer", "d2t", "t2d")  # what its tensors' names begin with


def with_draft_head(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with the head in `folder` instead of one that it may have. Raises
    SubspecError: USAGE for a head of another model, UNSUPPORTED for what we do not compute, CORRUPT
    for what makes no sense."""
    reference = folder.name
    if (folder / PICKLE).exists() and not (folder / WEIGHTS).exists():
        message = f"the draft head {reference} is in {PICKLE}, we read only {WEIGHTS}"
        raise SubspecError(Exit.UNSUPPORTED, message, f"in its folder: {CONVERT}")
    tensors = {
        next(name.removeprefix(p) for p in reversed(PREFIXES) if name.startswith(p)): tensor
        for name, tensor in stored_tensors(folder).tensors.items()
    }
    if any(name.split(".")[0] in EAGLE3 for name in tensors):
        message = f"the draft head {reference} is of EAGLE-3, which reads three hidden states"
        raise SubspecError(Exit.UNSUPPORTED, message, "use one of EAGLE or EAGLE-2")
    own, spec = read_config(folder, Source("")), checkpoint.spec
    for what, theirs, ours in (
        ("a hidden size", own.hidden_size, spec.hidden_size),
        ("a vocabulary", own.vocab_size, spec.vocab_size),
    ):
        if theirs != ours:
            raise SubspecError(
                Exit.USAGE,
                f"the draft head {reference} has {what} of {theirs}, its model must have the same "
                f"and has {ours}",
                "give the head that was trained for this model",
            )
    if own.num_layers != 1:
        message = f"the draft head {reference} has {own.num_layers} layers, we compute only 1"
        raise SubspecError(Exit.UNSUPPORTED, message)
    head = DraftHead(
        "eagle", as_stored(own.layers[0], tensors), own.norm, f"{FUSION}.bias" in tensors
    )
    spec = replace(spec, draft_head=head)
    rows = {
        f"{DRAFT_HEAD}.{name}": rows_of(tensors, name, shape)
        for name, shape in spec.draft_head_shapes.items()
    }
    kept = {n: own for n, own in checkpoint.rows.items() if not n.startswith(f"{DRAFT_HEAD}.")}
    return replace(checkpoint, spec=spec, rows=kept | rows)


def as_stored(layer: LayerSpec, tensors: dict[str, StoredTensor]) -> LayerSpec:
    """The layer without a norm before its attention, and with the biases that are there."""
    first, *others = layer.blocks
    [attention] = layer.attentions
    qkv, output = (f"{HEAD_LAYER}.{attention.name}.{one}_proj.bias" in tensors for one in "qo")
    body = replace(attention, qkv_bias=qkv, output_bias=output)
    return replace(layer, blocks=(replace(first, body=body, before=None), *others))


def rows_of(tensors: dict[str, StoredTensor], name: str, shape: tuple[int, ...]) -> Rows:
    if name not in tensors:
        message = f"the draft head has no {name}, expected one of shape {list(shape)} by {CONFIG}"
        raise SubspecError(Exit.CORRUPT, message, AGAIN)
    tensor = tensors[name]
    if tensor.shape != shape:
        message = (
            f"{tensor.file.name}: {tensor.name} has the shape {list(tensor.shape)}, expected "
            f"{list(shape)} by {CONFIG}"
        )
        raise SubspecError(Exit.CORRUPT, message)
    if tensor.dtype not in DTYPES:
        raise refused_dtype(tensor, ", ".join(DTYPES))
    return Rows(tensor, 0, shape[0])
