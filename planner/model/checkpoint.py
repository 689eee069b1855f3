"""Checkpoint folder -> ModelSpec and the place of every tensor; reads headers, opens no weights.

Everything in the folder was written by somebody else and is checked before it is used.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.tensors import StoredTensor, open_regular, read_header
from subspec.artifacts.model import (
    EMBEDDING,
    HEAD,
    DType,
    ModelSpec,
    Source,
)
from subspec.planner.model.config import CONFIG, read_config
from subspec.planner.model.fields import read_fields

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES: dict[str, DType] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf")  # pickles, and weights already quantised
COMPARED_BYTES = 16 << 20


@dataclass(frozen=True)
class CheckpointTensor:
    name: str
    file: Path
    dtype: str  # safetensors' name: "BF16"
    shape: tuple[int, ...]
    offset: int  # from the beginning of the file
    num_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` holds what the spec calls for, biases and norms included, by checkpoint name. It
    also holds a tied head's own copy where there is one: see check_tied_head()."""

    folder: Path
    spec: ModelSpec
    tensors: dict[str, CheckpointTensor]


def read_checkpoint(folder: Path, source: Source) -> Checkpoint:
    """The whole checkpoint but its weights; the dtype is the tensors', whatever config.json says.

    Raises SubspecError: UNSUPPORTED for what we do not run, CORRUPT for what makes no sense."""
    spec = read_config(folder, source)
    stored = _stored_tensors(folder)
    shapes = _shapes(spec)
    if spec.tied_head and f"{HEAD}.weight" in stored:
        shapes[f"{HEAD}.weight"] = (spec.vocab_size, spec.hidden_size)
    tensors = {name: _checked(name, shape, stored) for name, shape in shapes.items()}
    return Checkpoint(folder, replace(spec, dtype=_dtype(tensors)), tensors)


def read_spec(folder: Path, source: Source) -> ModelSpec:
    """For a dry run: from config.json alone where the weights have not been downloaded."""
    indexed = (folder / INDEX).exists() or (folder / WEIGHTS).exists()
    if indexed and all((folder / name).exists() for name in shard_names(folder)):
        return read_checkpoint(folder, source).spec
    return read_config(folder, source)


def shard_names(folder: Path) -> list[str]:
    """The files that hold the weights. Raises SubspecError where there are none that we read."""
    if (folder / WEIGHTS).exists():  # it wins over an index, as in transformers
        return [WEIGHTS]
    if (folder / INDEX).exists():
        return sorted(set(_weight_map(folder).values()))
    others = [path.name for pattern in OTHER_FORMATS for path in sorted(folder.glob(pattern))]
    if others:
        raise SubspecError(
            Exit.UNSUPPORTED,
            f"{folder} has its weights in {others[0][:100]}, we read only {WEIGHTS} or {INDEX}",
            "convert it with transformers: AutoModelForCausalLM.from_pretrained(OLD)"
            ".save_pretrained(NEW), which writes safetensors; of a GGUF use the original model",
        )
    raise SubspecError(
        Exit.CORRUPT,
        f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}",
        "download the checkpoint again",
    )


def check_tied_head(checkpoint: Checkpoint) -> None:
    """Reads the head's own copy, if a tied head has one, and raises SubspecError(CORRUPT) if it is
    not the embedding: transformers would then not tie them, and the tokens would differ."""
    head = checkpoint.tensors.get(f"{HEAD}.weight")
    if head is None or not checkpoint.spec.tied_head:
        return
    embedding = checkpoint.tensors[f"{EMBEDDING}.weight"]
    with open_regular(head.file) as ours, open_regular(embedding.file) as theirs:
        ours.seek(head.offset)
        theirs.seek(embedding.offset)
        for first in range(0, head.num_bytes, COMPARED_BYTES):
            length = min(COMPARED_BYTES, head.num_bytes - first)
            if ours.read(length) != theirs.read(length):
                raise SubspecError(
                    Exit.CORRUPT,
                    f"{CONFIG}: tie_word_embeddings is true, expected false: {head.name} in "
                    f"{head.file.name} is not {embedding.name}",
                    f"set tie_word_embeddings to false in {CONFIG}",
                )


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of every tensor that the spec calls for."""
    found: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": (spec.vocab_size, spec.hidden_size)}
    for linear in spec.linears:
        if not (linear.name == HEAD and spec.tied_head):
            found[f"{linear.name}.weight"] = (
                linear.out_features - linear.padding_rows,
                linear.in_features,
            )
    small = {k: v for k, v in spec.resident_shapes.items() if len(v) == 1}
    return {**found, **small}


def _stored_tensors(folder: Path) -> dict[str, tuple[Path, StoredTensor]]:
    headers = {name: read_header(folder / name) for name in shard_names(folder)}
    if list(headers) == [WEIGHTS]:
        return {name: (folder / WEIGHTS, tensor) for name, tensor in headers[WEIGHTS].items()}
    found = {}
    for name, shard in _weight_map(folder).items():
        if name not in headers[shard]:
            raise SubspecError(
                Exit.CORRUPT, f"{INDEX} places {name[:200]} in {shard}, which does not hold it"
            )
        found[name] = (folder / shard, headers[shard][name])
    return found


def _weight_map(folder: Path) -> dict[str, str]:
    index = read_fields(folder / INDEX)
    found = index.values.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise index.wrong("weight_map", found, "an object from tensors to files")
    for name, shard in found.items():
        # A plain file name of this folder: transformers follows "../outside" and absolute paths.
        fine = (
            isinstance(shard, str)
            and shard.endswith(".safetensors")
            and not any(character in shard for character in "/\\:\0")
            and len(shard) <= 255
        )
        if not fine:
            raise index.wrong(f"weight_map.{name[:100]}", shard, "the name of a .safetensors file")
    return found


def _checked(
    name: str, shape: tuple[int, ...], stored: dict[str, tuple[Path, StoredTensor]]
) -> CheckpointTensor:
    if name not in stored:
        hint = "download the checkpoint again"
        if name == f"{HEAD}.weight":
            hint = f"if the head is the embedding, set tie_word_embeddings to true in {CONFIG}"
        message = f"the checkpoint has no {name}, expected one of shape {list(shape)} by {CONFIG}"
        raise SubspecError(Exit.CORRUPT, message, hint)
    file, tensor = stored[name]
    if tensor.shape != shape:
        raise SubspecError(
            Exit.CORRUPT,
            f"{file.name}: {name} has the shape {list(tensor.shape)}, expected {list(shape)} by "
            f"{CONFIG}",
        )
    return CheckpointTensor(name, file, tensor.dtype, tensor.shape, tensor.offset, tensor.num_bytes)


def _dtype(tensors: dict[str, CheckpointTensor]) -> DType:
    """The one dtype of all tensors; the runtime computes in it and never converts a weight."""
    first = next(iter(tensors.values()))
    for tensor in tensors.values():
        if tensor.dtype not in DTYPES:
            raise SubspecError(
                Exit.UNSUPPORTED,
                f"{tensor.file.name}: {tensor.name} is {tensor.dtype}, expected "
                f"{', '.join(DTYPES)}",
                "use the original checkpoint, before quantisation: we make the 4-bit copy",
            )
        if tensor.dtype != first.dtype:
            raise SubspecError(
                Exit.UNSUPPORTED,
                f"{tensor.file.name}: {tensor.name} is {tensor.dtype}, expected {first.dtype} as "
                f"{first.name}",
                "save the checkpoint in one dtype with transformers: "
                'AutoModelForCausalLM.from_pretrained(OLD, dtype="bfloat16").save_pretrained(NEW)',
            )
    return DTYPES[first.dtype]
