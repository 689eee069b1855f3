"""Checkpoint folder -> ModelSpec, and where every tensor of the spec lies.

Everything in the folder was written by somebody else and is checked before it is used. Canonical
names are found whatever the checkpoint calls its tensors and however it stacks them: a canonical
matrix is always consecutive rows of one stored tensor.
"""

import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.tensors import LARGEST_HEADER, MOST_TENSORS, open_regular
from subspec.artifacts.model import (
    DTYPE_BYTES,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Attention,
    Dense,
    DType,
    LayerSpec,
    ModelSpec,
    Source,
    layer_name,
)
from subspec.planner.model.config import CONFIG, read_config
from subspec.planner.model.fields import read_fields, refuse_git_lfs

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES: dict[str, DType] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf")  # pickles, and weights already quantised
MAPPED_BYTES = 16 << 20  # of a file at a time: its pages count as the process's memory

# What a decoder's names begin with, canonical and elsewhere: the bare decoder, and inside a
# multimodal model, as transformers writes it today and as transformers 4 did.
PREFIXES = ("model.", "", "model.language_model.", "language_model.model.")
HEADS = (f"{HEAD}.weight", f"language_model.{HEAD}.weight", f"model.{HEAD}.weight")
EMBEDDING_WEIGHT, HEAD_WEIGHT = f"{EMBEDDING}.weight", f"{HEAD}.weight"
AGAIN = "download the checkpoint again"


@dataclass(frozen=True)
class StoredTensor:
    name: str
    file: Path
    dtype: str  # safetensors' name: "BF16"
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a stored tensor; those of a vector are its elements."""

    tensor: StoredTensor
    first: int
    count: int


@dataclass(frozen=True)
class Checkpoint:
    """`rows` holds what the spec calls for by canonical name, `.weight` and `.bias` included. A
    tied head's are the embedding's; the head may also be stored: see check_tied_head()."""

    folder: Path
    spec: ModelSpec
    rows: dict[str, Rows]
    stored_head: Rows | None = None  # of a tied head


def read_checkpoint(folder: Path, source: Source) -> Checkpoint:
    """The whole checkpoint but its weights; the dtype is the tensors', whatever config.json says.

    Raises SubspecError: UNSUPPORTED for what we do not run, CORRUPT for what makes no sense."""
    spec = read_config(folder, source)
    names = _Names(spec, _stored_tensors(folder))
    shapes = _shapes(spec)
    stored_head = None
    if spec.tied_head and names.find(HEAD_WEIGHT):
        stored_head = names.rows(HEAD_WEIGHT, shapes[EMBEDDING_WEIGHT])
    rows = {}
    for name, shape in shapes.items():
        # Of a tied pair either may be the one that is stored.
        missing = name == EMBEDDING_WEIGHT and not names.find(name)
        rows[name] = stored_head if stored_head and missing else names.rows(name, shape)
    needed = [*rows.values(), *([stored_head] if stored_head else [])]
    if spec.tied_head:
        rows[HEAD_WEIGHT] = rows[EMBEDDING_WEIGHT]
    return Checkpoint(folder, replace(spec, dtype=_dtype(needed)), rows, stored_head)


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
        Exit.CORRUPT, f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}", AGAIN
    )


def read_pieces(rows: Rows) -> "Iterator[Tensor]":
    """The rows, in consecutive pieces of at most MAPPED_BYTES, each a copy: the file's own pages
    leave memory with the piece that they held."""
    tensor = rows.tensor
    row_bytes = DTYPE_BYTES[DTYPES[tensor.dtype]] * math.prod(tensor.shape[1:])
    step = max(1, MAPPED_BYTES // row_bytes)
    end = rows.first + rows.count
    for first in range(rows.first, end, step):
        with _opened(tensor.file) as file:
            piece = file.get_slice(tensor.name)[first : min(first + step, end)].clone()
        yield piece


def check_tied_head(checkpoint: Checkpoint) -> None:
    """Reads the head's own copy, if a tied head has one, and raises SubspecError(CORRUPT) if it is
    not the embedding: transformers would then not tie them, and the tokens would differ."""
    import torch  # who only reads headers does without

    head, embedding = checkpoint.stored_head, checkpoint.rows[EMBEDDING_WEIGHT]
    if head is None or head == embedding:
        return
    for ours, theirs in zip(read_pieces(head), read_pieces(embedding), strict=True):
        if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
            raise SubspecError(
                Exit.CORRUPT,
                f"{CONFIG}: tie_word_embeddings is true, expected false: {head.tensor.name} in "
                f"{head.tensor.file.name} is not {embedding.tensor.name}",
                f"set tie_word_embeddings to false in {CONFIG}",
            )


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor that the spec calls for, but a tied head."""
    found: dict[str, tuple[int, ...]] = {EMBEDDING_WEIGHT: (spec.vocab_size, spec.hidden_size)}
    for linear in spec.linears:
        rows = linear.out_features - linear.padding_rows
        if not (linear.name == HEAD and spec.tied_head):
            found[f"{linear.name}.weight"] = (rows, linear.in_features)
        if linear.has_bias:
            found[f"{linear.name}.bias"] = (rows,)
    return found | {f"{name}.weight": (size,) for name, size in spec.norm_sizes.items()}


@dataclass(frozen=True)
class _Stored:
    """The tensors of all files by their own names, and those that the index places in a file that
    does not hold them."""

    tensors: dict[str, StoredTensor]
    misplaced: Mapping[str, str]


class _Names:
    """Canonical names -> rows of what a checkpoint stores."""

    def __init__(self, spec: ModelSpec, stored: _Stored) -> None:
        self._stored = stored
        norm = f"{FINAL_NORM}.weight".removeprefix(PREFIXES[0])
        held = [prefix for prefix in PREFIXES if f"{prefix}{norm}" in stored.tensors]
        self._prefix = held[0] if held else PREFIXES[0]
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
        """The stored tensor of a canonical name."""
        stems = [self._prefix + name.removeprefix(PREFIXES[0])]
        for stored in HEADS if name == HEAD_WEIGHT else stems:
            if stored in self._stored.tensors:
                return self._stored.tensors[stored]
        return None

    def rows(self, name: str, shape: tuple[int, ...]) -> Rows:
        """Raises SubspecError(CORRUPT) for what is not stored, or not in this shape."""
        tensor, first, stored_shape = self.find(name), 0, shape
        if tensor is None and name in self._fused:
            fused, first, total = self._fused[name]
            tensor, stored_shape = self.find(fused), (total, *shape[1:])
        if tensor is None:
            raise self._missing(name, shape)
        if tensor.shape != stored_shape:
            raise SubspecError(
                Exit.CORRUPT,
                f"{tensor.file.name}: {tensor.name} has the shape {list(tensor.shape)}, expected "
                f"{list(stored_shape)} by {CONFIG}",
            )
        return Rows(tensor, first, shape[0])

    def _missing(self, name: str, shape: tuple[int, ...]) -> SubspecError:
        if name in self._stored.misplaced:
            shard = self._stored.misplaced[name]
            message = f"{INDEX} places {name} in {shard}, which does not hold it"
            return SubspecError(Exit.CORRUPT, message, AGAIN)
        hint = AGAIN
        if name == HEAD_WEIGHT:
            hint = f"if the head is the embedding, set tie_word_embeddings to true in {CONFIG}"
        message = f"the checkpoint has no {name}, expected one of shape {list(shape)} by {CONFIG}"
        return SubspecError(Exit.CORRUPT, message, hint)


def _fusions(layer: LayerSpec) -> dict[str, tuple[str, int, int]]:
    """Name under the layer -> name of the matrix that it may be stored in, its first row there, and
    how many rows that has: q|k|v and gate|up, as phi3 and glm4 have them."""
    found = {}
    for body in (block.body for block in layer.blocks):
        if isinstance(body, Attention):
            fused = f"{body.name}.qkv_proj"
            sizes = {"q_proj": body.query_size, "k_proj": body.kv_size, "v_proj": body.kv_size}
        elif isinstance(body, Dense):
            fused = f"{body.name}.gate_up_proj"
            sizes = {"gate_proj": body.inner_size, "up_proj": body.inner_size}
        first, total = 0, sum(sizes.values())
        for name, size in sizes.items():
            found[f"{body.name}.{name}"] = (fused, first, total)
            first += size
    return found


def _stored_tensors(folder: Path) -> _Stored:
    headers = {name: _read_header(folder / name) for name in shard_names(folder)}
    if list(headers) == [WEIGHTS]:
        return _Stored(headers[WEIGHTS], {})
    tensors, misplaced = {}, {}
    for name, shard in _weight_map(folder).items():
        if name in headers[shard]:
            tensors[name] = headers[shard][name]
        else:  # matters only if the spec calls for it
            misplaced[name] = shard
    return _Stored(tensors, misplaced)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(64)
        refuse_git_lfs(path, prefix)
        if len(prefix) < 8:
            raise SubspecError(Exit.CORRUPT, f"{path.name} is {size} bytes, too short for a header")
        (length,) = struct.unpack("<Q", prefix[:8])
        largest = min(LARGEST_HEADER, size - 8)
        if length > largest:
            raise SubspecError(
                Exit.CORRUPT,
                f"{path.name} claims a header of {length} bytes, expected at most {largest}",
                AGAIN,
            )
        file.seek(8)
        if file.read(length).count(b"{") > MOST_TENSORS + 2:  # before it is parsed, into far more
            raise SubspecError(Exit.CORRUPT, f"{path.name} lists more than {MOST_TENSORS} tensors")
    found = {}
    with _opened(path) as opened:
        for name in opened.keys():  # noqa: SIM118  (it is not iterable)
            tensor = opened.get_slice(name)
            found[name] = StoredTensor(name, path, tensor.get_dtype(), tuple(tensor.get_shape()))
    return found


@contextmanager
def _opened(path: Path) -> "Iterator[Any]":
    """safetensors' reader of a file; whatever is wrong with it is SubspecError(CORRUPT)."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:160]
        raise SubspecError(
            Exit.CORRUPT, f"{path.name} cannot be read as safetensors: {reason}", AGAIN
        ) from error


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


def _dtype(needed: list[Rows]) -> DType:
    """The one dtype of all tensors; the runtime computes in it and never converts a weight."""
    first = needed[0].tensor
    for tensor in (rows.tensor for rows in needed):
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
