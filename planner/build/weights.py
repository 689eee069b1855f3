"""Checkpoint -> weight files of an artifact: quantized, encoded, read back and verified.

One matrix at a time, so peak memory is about two matrices, whatever the model's size.
"""

import hashlib
import io
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.progress import Progress
from subspec.artifacts.format import fp8
from subspec.artifacts.format.checks import HEAD_FILE, STORED_DTYPES, TOKEN_IDS_DTYPE
from subspec.artifacts.format.fp8 import Scales, scales_of
from subspec.artifacts.format.store import (
    CHUNK_BYTES,
    DRAFT_MODEL,
    FileEntry,
    PartEntry,
    SubstituteEntry,
    part_digest,
)
from subspec.artifacts.format.tensors import TensorFile, keep_uncompressed, write_header
from subspec.artifacts.model import (
    EMBEDDING,
    GROUP_SIZE,
    PAGE_BYTES,
    TOKEN_IDS,
    Linear,
    ModelSpec,
    Part,
    padded,
)
from subspec.artifacts.native import fp8_cpu, residual_cpu
from subspec.planner.build.quantize import Substitute
from subspec.planner.model.checkpoint import DRAFT_HEAD, Checkpoint
from subspec.planner.model.eagle3 import token_ids
from subspec.planner.model.fp8 import dequantize, read_codes, read_scales
from subspec.planner.model.stored import read_pieces

Quantizer = Callable[[Tensor, torch.device | str], Substitute]


@dataclass(frozen=True)
class Exact:
    """An exact matrix on the host, as the checkpoint has it."""

    weight: Tensor  # [out, in] of the model's dtype, or FP8 codes uint8
    scales: Scales | None  # of FP8 codes

    def rows(self, part: Part) -> "Exact":
        own = self.weight[part.first_row : part.first_row + part.num_rows]
        return Exact(own, self.scales.from_row(part.first_row) if self.scales else None)


@dataclass(frozen=True)
class Written:
    """Entries of the weight files in the manifest."""

    files: dict[str, FileEntry]
    parts: tuple[PartEntry, ...]
    substitutes: tuple[SubstituteEntry, ...]


def write_weights(
    folder: Path,
    checkpoint: Checkpoint,
    residuals: tuple[str, ...],
    quantizer: Quantizer,
    progress: Progress,
) -> Written:
    """Write the weight files. residuals: names of the parts to store as residuals, if that is
    smaller."""
    names = ("embedding", "resident", "exact", "substitutes")
    with ExitStack() as stack:
        files = [stack.enter_context(HashedFile(folder / f"{name}.safetensors")) for name in names]
        embedding, resident, exact, substitutes = files
        write_embedding(embedding, checkpoint)
        write_resident(resident, checkpoint)
        if checkpoint.spec.draft_head is not None:
            files.append(stack.enter_context(HashedFile(folder / HEAD_FILE)))
            write_draft_head(files[-1], checkpoint)
        parts_written, made = write_matrices(
            exact, substitutes, checkpoint, residuals, quantizer, progress
        )
        return Written({file.path.name: file.finish() for file in files}, parts_written, made)


def write_matrices(
    exact: "HashedFile",
    substitutes: "HashedFile",
    checkpoint: Checkpoint,
    residuals: tuple[str, ...],
    quantizer: Quantizer,
    progress: Progress,
) -> tuple[tuple[PartEntry, ...], tuple[SubstituteEntry, ...]]:
    """Write substitute and parts of every matrix that has a substitute, and verify each part."""
    spec = checkpoint.spec
    device = quantizing_device()
    own_parts = {name: list(own) for name, own in groupby(spec.parts, lambda p: p.linear.name)}
    # The sizes of residuals are not known yet: reserve the space of the header.
    sizes = {part.name: part.padded_bytes for part in spec.parts}
    room = write_header(exact, exact_header(spec, sizes))
    write_header(substitutes, substitutes_header(spec))
    entries, made = list[PartEntry](), list[SubstituteEntry]()
    every = [linear for linear in spec.linears if linear.has_substitute]
    for index, linear in enumerate(every):
        progress("quantizing and packing", index / len(every))
        exact_matrix = read_weight(checkpoint, linear)
        substitute = write_substitute(substitutes, linear, exact_matrix, quantizer, device)
        digest = substitute_digest(substitute, exact_matrix.scales)
        made.append(SubstituteEntry(linear.name, digest))
        for part in own_parts[linear.name]:
            rows = slice(part.first_row, part.first_row + part.num_rows)
            codes, qparams = substitute.codes[rows], substitute.qparams[:, rows]
            wanted = part.name in residuals and part.can_be_residual
            own = exact_matrix.rows(part)
            stored = encode_residual(own, codes, qparams) if wanted else None
            entry = write_part(exact, part, own.weight, stored, digest)
            prove_part(exact, part, entry, own, codes, qparams)
            entries.append(entry)
            sizes[part.name] = padded(entry.num_bytes)
    header = io.BytesIO()
    write_header(header, exact_header(spec, sizes), room)
    exact.rewrite_beginning(header.getvalue())
    return tuple(entries), tuple(made)


def write_draft_model(
    folder: Path, checkpoint: Checkpoint, quantizer: Quantizer, progress: Progress
) -> Written:
    """Write the weights of a draft model into a folder of its own under `folder`: its substitutes
    and what has none. Its exact weights are not kept."""
    own = folder / DRAFT_MODEL
    own.mkdir()
    names = ("embedding", "resident", "substitutes")
    with ExitStack() as stack:
        files = [stack.enter_context(HashedFile(own / f"{name}.safetensors")) for name in names]
        embedding, resident, substitutes = files
        write_embedding(embedding, checkpoint)
        write_resident(resident, checkpoint)
        write_header(substitutes, substitutes_header(checkpoint.spec))
        made, device = list[SubstituteEntry](), quantizing_device()
        every = [linear for linear in checkpoint.spec.linears if linear.has_substitute]
        for index, linear in enumerate(every):
            progress("quantizing the draft model", index / len(every))
            exact = read_weight(checkpoint, linear)
            substitute = write_substitute(substitutes, linear, exact, quantizer, device)
            made.append(SubstituteEntry(linear.name, substitute_digest(substitute, None)))
        entries = [file.finish() for file in files]
    inside = [replace(one, path=f"{DRAFT_MODEL}/{one.path}", role=DRAFT_MODEL) for one in entries]
    return Written({one.path: one for one in inside}, (), tuple(made))


def quantizing_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def encode_residual(exact: Exact, codes: Tensor, qparams: Tensor) -> Tensor | None:
    """Some rows [R, K], their codes uint8 [R, K / 2] and qparams bf16 [G, R, 2] -> residual, uint8
    [bytes]; None if it is not smaller than the weights (many zeros; weights that were made from 8
    bits)."""
    threads = torch.get_num_threads()
    if exact.scales is None:
        stored = residual_cpu.encode(exact.weight, codes, qparams, threads)
    else:
        stored = fp8_cpu.encode(exact.weight, codes, qparams, exact.scales, threads)
    return stored if stored.numel() < exact.weight.nbytes else None


def write_embedding(file: "HashedFile", checkpoint: Checkpoint) -> None:
    """Write the embedding matrix, whose rows the runtime reads from slow memory."""
    spec, name = checkpoint.spec, f"{EMBEDDING}.weight"
    shape = (spec.vocab_size, spec.hidden_size)
    write_header(file, [(name, STORED_DTYPES[spec.dtype], shape)])
    write_exactly(file, checkpoint, name)


def write_resident(file: "HashedFile", checkpoint: Checkpoint) -> None:
    """Write norms, biases, matrices without a substitute, and the scales of FP8 matrices."""
    spec = checkpoint.spec
    padding_rows = {}
    for linear in spec.linears:
        padding_rows[f"{linear.name}.weight"] = linear.padding_rows
    shapes = spec.resident_shapes
    tensors = [(n, STORED_DTYPES[spec.resident_dtype(n)], shape) for n, shape in shapes.items()]
    scales = [(name, "F32", shape) for name, shape in spec.scale_shapes.items()]
    write_header(file, [*tensors, *scales])
    for name, shape in shapes.items():
        write_exactly(file, checkpoint, name)
        rows = padding_rows.get(name, 0)
        file.write(bytes(rows * spec.item_bytes * math.prod(shape[1:])))
    for linear in spec.linears:
        if linear.fp8:
            own_rows = checkpoint.rows[f"{linear.name}.weight"]
            file.write(raw_bytes(read_scales(checkpoint.scales[linear.name], own_rows)))


def write_draft_head(file: "HashedFile", checkpoint: Checkpoint) -> None:
    """Write the head that predicts the token after the next one."""
    spec = checkpoint.spec
    dtype = STORED_DTYPES[spec.dtype]
    shapes = spec.draft_head_shapes
    dtypes = {name: TOKEN_IDS_DTYPE if name == TOKEN_IDS else dtype for name in shapes}
    write_header(file, ((name, dtypes[name], shape) for name, shape in shapes.items()))
    for name in shapes:
        stored = f"{DRAFT_HEAD}.{name}"
        if name == TOKEN_IDS:
            file.write(raw_bytes(token_ids(checkpoint.rows[stored].tensor, spec.vocab_size)))
        else:  # rounded to another dtype: a draft need not be bit-exact
            write_exactly(file, checkpoint, stored, getattr(torch, spec.dtype))


def write_exactly(
    file: "HashedFile", checkpoint: Checkpoint, name: str, dtype: torch.dtype | None = None
) -> None:
    """Write a tensor as it is in the checkpoint, one in FP8 dequantized, or in another dtype.
    Raises SubspecError(CORRUPT) for NaN or infinity."""
    rows, matrix = checkpoint.rows[name], name.removesuffix(".weight")
    in_fp8 = matrix in checkpoint.scales
    for stored in [read_dequantized(checkpoint, matrix)] if in_fp8 else read_pieces(rows):
        piece = stored if dtype is None else stored.to(dtype)
        num_bad = int((~piece.isfinite()).sum())
        if num_bad:
            raise SubspecError(
                Exit.CORRUPT,
                f"{rows.tensor.name}: {num_bad} weights are NaN or infinite, expected finite "
                "numbers",
                "download the checkpoint again",
            )
        file.write(raw_bytes(piece))


def exact_header(
    spec: ModelSpec, padded_bytes: dict[str, int]
) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of the tensors of exact.safetensors: one U8 tensor per layer, in
    execution order, the head's last. padded_bytes: by name of the part."""
    sizes: dict[int, int] = {}
    for part in spec.parts:
        sizes[part.linear.layer] = sizes.get(part.linear.layer, 0) + padded_bytes[part.name]
    return [(f"layers.{layer}", "U8", (size,)) for layer, size in sizes.items()]


def substitutes_header(spec: ModelSpec) -> list[tuple[str, str, tuple[int, ...]]]:
    found: list[tuple[str, str, tuple[int, ...]]] = []
    for linear in spec.linears:
        if linear.has_substitute:
            n, k = linear.out_features, linear.in_features
            found.append((f"{linear.name}.codes", "U8", (n, k // 2)))
            found.append((f"{linear.name}.qparams", "BF16", (k // GROUP_SIZE, n, 2)))
    return found


def write_part(
    file: "HashedFile", part: Part, weight: Tensor, stored: Tensor | None, digest: str
) -> PartEntry:
    """Write a part. weight [rows, K]: its rows; stored: their residual uint8 [bytes], or None to
    write the rows themselves; digest: of the substitute."""
    offset = file.num_bytes
    assert offset % PAGE_BYTES == 0
    data = raw_bytes(weight if stored is None else stored)
    file.write(data)
    file.write(bytes(-len(data) % PAGE_BYTES))
    if stored is None:
        plain = part.plain_encoding
        return PartEntry(part.name, offset, len(data), plain, part_digest([data], None))
    coded = part.residual_encoding
    return PartEntry(part.name, offset, len(data), coded, part_digest([data], digest))


def prove_part(
    file: "HashedFile", part: Part, entry: PartEntry, exact: Exact, codes: Tensor, qparams: Tensor
) -> None:
    """Read a part back, decode it with its substitute, and compare it with the checkpoint's bytes.

    codes uint8 [rows, K / 2], qparams bf16 [G, rows, 2]. Raises SubspecError(RESOURCES). (Later
    changes on disk are found by the digests.)
    """
    file.flush()
    with TensorFile(file.path) as written:
        got = torch.empty(entry.num_bytes, dtype=torch.uint8)
        written.read_into(raw_bytes(got), entry.offset)
    threads = torch.get_num_threads()
    if entry.encoding == "residual":
        got = residual_cpu.decode(got, codes, qparams, exact.weight.dtype, threads)
    elif entry.encoding == "fp8-residual":
        assert exact.scales is not None
        got = fp8_cpu.decode(got, codes, qparams, exact.scales, threads)
    if raw_bytes(got) != raw_bytes(exact.weight):
        raise SubspecError(
            Exit.RESOURCES,
            f"{part.name} was read back from {file.path} with other bytes than written",
            "check the disk",
        )


def write_substitute(
    file: "HashedFile", linear: Linear, exact: Exact, quantizer: Quantizer, device: str
) -> Substitute:
    """Quantize a matrix and write its substitute. The codes of an FP8 matrix are then chosen by the
    windows that contain its weights, for its residual."""
    weight = fp8.dequantize(exact.weight, exact.scales) if exact.scales else exact.weight
    try:
        substitute = quantizer(weight, device)
    except SubspecError as error:
        raise SubspecError(
            error.exit_code, f"{linear.name}.weight: {error.message}", error.hint
        ) from None
    if exact.scales:
        qparams = substitute.qparams
        threads = torch.get_num_threads()
        codes = fp8_cpu.codes_by_windows(exact.weight, qparams, exact.scales, threads)
        substitute = Substitute(codes, qparams)
    for tensor in (substitute.codes, substitute.qparams):
        file.write(raw_bytes(tensor))
    return substitute


def substitute_digest(substitute: Substitute, scales: Scales | None) -> str:
    values = [scales.values] if scales else []
    return part_digest(map(raw_bytes, (substitute.codes, substitute.qparams, *values)), None)


def read_weight(checkpoint: Checkpoint, linear: Linear) -> Exact:
    """The exact matrix, with the head's rows of zeros; one that is stored in FP8, but not in blocks
    that an artifact has, is dequantized."""
    rows = checkpoint.rows[f"{linear.name}.weight"]
    if linear.fp8:
        values = read_scales(checkpoint.scales[linear.name], rows)
        return Exact(read_codes(rows), scales_of(linear, values))
    dtype: torch.dtype = getattr(torch, checkpoint.spec.dtype)
    weight = torch.empty(linear.out_features, linear.in_features, dtype=dtype)
    if linear.name in checkpoint.scales:
        weight[: rows.count] = read_dequantized(checkpoint, linear.name)
        weight[rows.count :] = 0
        return Exact(weight, None)
    first = 0
    for piece in read_pieces(rows):
        weight[first : first + len(piece)] = piece
        first += len(piece)
    weight[first:] = 0
    return Exact(weight, None)


def read_dequantized(checkpoint: Checkpoint, name: str) -> Tensor:
    """The exact weights of a matrix that is stored in FP8, bf16 without the head's padding."""
    rows, scales = checkpoint.rows[f"{name}.weight"], checkpoint.scales[name]
    return dequantize(read_codes(rows), read_scales(scales, rows), scales, rows)


def raw_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


class HashedFile:
    """A file that is written front to back and hashed chunk by chunk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self._file = open(path, "wb")
        keep_uncompressed(self._file.fileno())
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

    def rewrite_beginning(self, data: bytes) -> None:
        """Overwrite the beginning of the file within its first chunk, which is hashed again."""
        assert len(data) <= min(CHUNK_BYTES, self.num_bytes)
        self._file.flush()
        with open(self.path, "r+b") as file:
            file.write(data)
            file.seek(0)
            first = hashlib.sha256(file.read(CHUNK_BYTES))
        if self._chunks:
            self._chunks[0] = first.hexdigest()
        else:
            self._hash = first

    def finish(self) -> FileEntry:
        if self.num_bytes % CHUNK_BYTES:
            self._end_chunk()
        self._file.close()
        role = self.path.name.partition(".")[0]
        return FileEntry(self.path.name, role, self.num_bytes, tuple(self._chunks))

    def _end_chunk(self) -> None:
        self._chunks.append(self._hash.hexdigest())
        self._hash = hashlib.sha256()
