"""The safetensors files of a checkpoint folder: what they hold, and rows of it.

Headers and weights are read by the safetensors library; what it would trust is bounded first.
"""

import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.tensors import ITEM_BYTES, MAX_HEADER, MAX_TENSORS, open_regular
from subspec.planner.model.fields import read_fields, refuse_stand_in

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf")  # pickles, and weights already quantised
MAPPED_BYTES = 16 << 20  # of a file at a time: its pages count as the process's memory
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
class StoredTensors:
    """The tensors of all files by their own names; and why the index is wrong about some others,
    which matters only if the spec calls for one of them."""

    tensors: dict[str, StoredTensor]
    misplaced: Mapping[str, str]


def stored_tensors(folder: Path) -> StoredTensors:
    """Tensors of a checkpoint. As in transformers, the index names the files, and the files their
    tensors."""
    shards = shard_names(folder)
    if shards == [WEIGHTS]:
        return StoredTensors(_read_header(folder / WEIGHTS), {})
    headers = {name: _read_header(folder / name) for name in shards if (folder / name).exists()}
    tensors = {name: tensor for held in headers.values() for name, tensor in held.items()}
    misplaced = {}
    for name, shard in _weight_map(folder).items():
        if shard not in headers:
            misplaced[name] = f"{shard} is missing, in which {INDEX} places {name}"
        elif name not in headers[shard]:
            misplaced[name] = f"{INDEX} places {name} in {shard}, which does not hold it"
        else:
            tensors[name] = headers[shard][name]
    return StoredTensors(tensors, misplaced)


def shard_names(folder: Path) -> list[str]:
    """Names of the files that hold the weights. Raises SubspecError if there are none that we
    read."""
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
    row_bytes = ITEM_BYTES[tensor.dtype] * math.prod(tensor.shape[1:])
    step = max(1, MAPPED_BYTES // row_bytes)
    end = rows.first + rows.count
    for first in range(rows.first, end, step):
        with _opened(tensor.file) as file:
            piece = file.get_slice(tensor.name)[first : min(first + step, end)].clone()
        yield piece


def read_small(tensor: StoredTensor) -> "Tensor":
    """A whole tensor, a copy; of scales, which may have no dimension."""
    with _opened(tensor.file) as file:
        found: Tensor = file.get_tensor(tensor.name).clone()
    return found


def _read_header(path: Path) -> dict[str, StoredTensor]:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(64)
        refuse_stand_in(path, prefix)
        if len(prefix) < 8:
            raise SubspecError(Exit.CORRUPT, f"{path.name} is {size} bytes, too short for a header")
        (length,) = struct.unpack("<Q", prefix[:8])
        largest = min(MAX_HEADER, size - 8)
        if length > largest:
            raise SubspecError(
                Exit.CORRUPT,
                f"{path.name} claims a header of {length} bytes, expected at most {largest}",
                AGAIN,
            )
        file.seek(8)
        if file.read(length).count(b"{") > MAX_TENSORS + 2:  # before it is parsed, into far more
            raise SubspecError(Exit.CORRUPT, f"{path.name} lists more than {MAX_TENSORS} tensors")
    found = {}
    with _opened(path) as opened:
        for name in opened.keys():  # noqa: SIM118  (it is not iterable)
            tensor = opened.get_slice(name)
            found[name] = StoredTensor(name, path, tensor.get_dtype(), tuple(tensor.get_shape()))
    return found


@contextmanager
def _opened(path: Path) -> "Iterator[Any]":
    """Open a file with safetensors' reader. Raises SubspecError(CORRUPT) for any of its errors."""
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
