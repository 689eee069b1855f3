"""Checkpoint -> the three weight files of an artifact: quantised, repacked, proven.

One matrix at a time: peak memory stays near two of them, whatever the model's size.
"""

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.checks import STORED_DTYPES
from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.model import (
    EMBEDDING,
    GROUP_SIZE,
    PAGE_BYTES,
    Linear,
    ModelSpec,
    Part,
    linears,
    parts,
    resident_tensors,
)
from subspec.artifacts.store import CHUNK_BYTES, FileEntry, PartEntry
from subspec.artifacts.tensors import TensorFile, write_header
from subspec.planner.checkpoint import Checkpoint
from subspec.planner.quantize import Substitute

Quantizer = Callable[[Tensor, torch.device | str], Substitute]
Progress = Callable[[str, float], None]


def write_weights(
    folder: Path, checkpoint: Checkpoint, quantizer: Quantizer, progress: Progress
) -> tuple[dict[str, FileEntry], tuple[PartEntry, ...]]:
    """The three weight files. Returns their digests and the places of the parts."""
    names = ("exact.safetensors", "substitutes.safetensors", "resident.safetensors")
    with ExitStack() as stack:
        files = [stack.enter_context(HashedFile(folder / name)) for name in names]
        exact, substitutes, resident = files
        entries = write_matrices(exact, substitutes, checkpoint, quantizer, progress)
        write_resident(resident, checkpoint)
        return {file.path.name: file.finish() for file in files}, entries


def write_matrices(
    exact: "HashedFile",
    substitutes: "HashedFile",
    checkpoint: Checkpoint,
    quantizer: Quantizer,
    progress: Progress,
) -> tuple[PartEntry, ...]:
    """Every matrix that has a substitute: its parts, proven, and the substitute."""
    spec = checkpoint.spec
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own_parts = {name: list(own) for name, own in groupby(parts(spec), lambda p: p.linear.name)}
    write_header(exact, exact_header(spec))
    write_header(substitutes, substitutes_header(spec))
    entries: list[PartEntry] = []
    every = linears(spec)
    for index, linear in enumerate(every):
        progress("quantising and packing", index / len(every))
        if not linear.has_substitute:
            continue
        weight = read_weight(checkpoint, source_name(spec, linear))
        own = own_parts.get(linear.name, [])  # none: a tied head, which is the embedding
        written = [write_part(exact, part, weight) for part in own]
        prove_parts(exact, own, written, weight)
        entries += written
        write_substitute(substitutes, linear, weight, quantizer, device)
    return tuple(entries)


def write_resident(file: "HashedFile", checkpoint: Checkpoint) -> None:
    """Embedding, norms, biases and matrices of odd shape, each checked: no quantiser sees them."""
    dtype = STORED_DTYPES[checkpoint.spec.dtype]
    shapes = resident_tensors(checkpoint.spec)
    write_header(file, ((name, dtype, shape) for name, shape in shapes.items()))
    for name in shapes:
        weight = read_weight(checkpoint, name)
        num_bad = sum(int((~rows.isfinite()).sum()) for rows in weight.split(1024))
        if num_bad:
            raise SubspecError(
                Exit.CORRUPT,
                f"{name}: {num_bad} of {weight.numel()} weights are NaN or infinite, expected "
                "finite numbers",
                "download the checkpoint again",
            )
        file.write(raw_bytes(weight))


def exact_header(spec: ModelSpec) -> list[tuple[str, str, tuple[int, ...]]]:
    """One U8 slab per layer, in execution order; the head's parts are the last slab."""
    sizes: dict[int, int] = {}
    for part in parts(spec):
        sizes[part.linear.layer] = sizes.get(part.linear.layer, 0) + part.padded_bytes
    return [(f"layers.{layer}", "U8", (size,)) for layer, size in sizes.items()]


def substitutes_header(spec: ModelSpec) -> list[tuple[str, str, tuple[int, ...]]]:
    found: list[tuple[str, str, tuple[int, ...]]] = []
    for linear in linears(spec):
        if linear.has_substitute:
            n, k = linear.out_features, linear.in_features
            found.append((f"{linear.name}.codes", "U8", (n, k // 2)))
            found.append((f"{linear.name}.scale", "F16", (n, k // GROUP_SIZE)))
            found.append((f"{linear.name}.zero", "F16", (n, k // GROUP_SIZE)))
    return found


def source_name(spec: ModelSpec, linear: Linear) -> str:
    """The checkpoint tensor of a matrix; a tied head is the embedding."""
    if linear.kind == "head" and spec.tied_head:
        return f"{EMBEDDING}.weight"
    return f"{linear.name}.weight"


def write_part(file: "HashedFile", part: Part, weight: Tensor) -> PartEntry:
    offset = file.num_bytes
    file.write(raw_bytes(weight[part.first_row : part.first_row + part.num_rows]))
    file.write(bytes(part.padded_bytes - part.num_bytes))
    assert offset % PAGE_BYTES == 0
    return PartEntry(part.name, offset, part.num_bytes)


def prove_parts(
    file: "HashedFile", own: list[Part], entries: list[PartEntry], weight: Tensor
) -> None:
    """What a reader of the artifact will find at each entry is compared with the checkpoint's
    bytes. (That the disk keeps them is what the digests are for.)"""
    if not own:
        return
    file.flush()
    with TensorFile(file.path) as written:
        for part, entry in zip(own, entries, strict=True):
            got = bytearray(part.num_bytes)
            written.read_into(memoryview(got), entry.offset)
            expected = raw_bytes(weight[part.first_row : part.first_row + part.num_rows])
            if got != expected:
                raise SubspecError(
                    Exit.RESOURCES,
                    f"{part.name} was read back from {file.path} with other bytes than written",
                    "check the disk",
                )


def write_substitute(
    file: "HashedFile", linear: Linear, weight: Tensor, quantizer: Quantizer, device: str
) -> None:
    try:
        substitute = quantizer(weight, device)
    except SubspecError as error:
        raise SubspecError(
            error.exit_code, f"{linear.name}.weight: {error.message}", error.hint
        ) from None
    for tensor in (substitute.codes, substitute.scale, substitute.zero):
        file.write(raw_bytes(tensor))


def read_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """A checkpoint tensor on the host, in its own dtype."""
    stored = checkpoint.tensors[name]
    raw = torch.empty(stored.num_bytes, dtype=torch.uint8)
    with TensorFile(stored.file) as file:
        file.read_into(memoryview(raw.numpy().data), stored.offset)
    dtype: torch.dtype = getattr(torch, checkpoint.spec.dtype)
    return raw.view(dtype).view(stored.shape)


def raw_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


class HashedFile:
    """A file written front to back, its chunk digests taken on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self._file = open(path, "wb")
        self._hash = hashlib.sha256()
        self._chunks: list[str] = []

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        while view:
            room = CHUNK_BYTES - self.num_bytes % CHUNK_BYTES
            piece, view = view[:room], view[room:]
            self._hash.update(piece)
            self._file.write(piece)
            self.num_bytes += len(piece)
            if self.num_bytes % CHUNK_BYTES == 0:
                self._end_chunk()
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> FileEntry:
        if self.num_bytes % CHUNK_BYTES:
            self._end_chunk()
        self._file.close()
        role = self.path.name.partition(".")[0]
        return FileEntry(self.path.name, role, self.num_bytes, tuple(self._chunks))

    def _end_chunk(self) -> None:
        self._chunks.append(self._hash.hexdigest())
        self._hash = hashlib.sha256()
