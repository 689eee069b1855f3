"""Load weights into the arenas of fast memory, in kernel layouts, piece by piece: loading a model
takes no more memory than running it.

The weights are an artifact's (`ArtifactWeights`), or random ones of the same shapes (the planner's
microbenchmarks).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.progress import Progress, unseen
from subspec.artifacts.footprint import packed_bytes
from subspec.artifacts.format.checks import HEAD_FILE
from subspec.artifacts.format.fp8 import Scales, scales_of
from subspec.artifacts.format.prebuilt import find_prebuilt
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.format.tensors import StoredTensor, TensorFile, read_header
from subspec.artifacts.model import (
    EMBEDDING,
    PAGE_BYTES,
    TOKEN_IDS,
    Linear,
    ModelSpec,
    Part,
    StoredPart,
)
from subspec.artifacts.native import cpp, fp8_cpu, residual_cpu
from subspec.artifacts.plan import Block, Int4Kernel, Placement, Plan, make_blocks
from subspec.runtime.clock import Record, unrecorded
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.kernels import gemlite_kernel, int4, triton_driver
from subspec.runtime.kernels.linear import (
    Int4Weight,
    empty_weight,
    pack_qparams,
    pack_rows,
    piece_rows,
)
from subspec.runtime.memory import FastMemory, bytes_of, host_buffer
from subspec.runtime.model.embedding import FileRows, MappedRows
from subspec.runtime.stream.digests import Digests, compare_digest
from subspec.runtime.stream.link import DirectFile, DiskLink, HostLink
from subspec.runtime.stream.residual_decoder import ResidualDecoder
from subspec.runtime.stream.ring import Ring, view_of

DRAFT_DTYPE = torch.bfloat16  # that the 4-bit kernels take
TORCH_DTYPES = {
    "U8": torch.uint8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
    "I64": torch.int64,
}  # fmt: skip
PIECE_BYTES = 1 << 20  # of a tensor, read at a time


class WeightFiles(Protocol):
    """Source of weights."""

    def read_tensor(self, name: str, target: Tensor) -> None:
        """Fill a resident tensor, in fast memory."""

    def read_substitute(self, linear: Linear, weight: Int4Weight) -> None:
        """Fill a substitute's layout. May return before that is done; `finish` waits."""

    def read_exact(self, stored: StoredPart, target: Tensor) -> None:
        """Fill target [rows, K], in fast memory, with the exact weights of a part that is stored in
        another form: in the model's dtype, or as FP8 codes."""

    def read_stored(self, stored: StoredPart, target: Tensor) -> None:
        """Fill target uint8 [padded bytes], page-aligned in fast memory, with the part as
        stored."""

    def finish(self) -> None:
        """Wait for pending reads. Raises SubspecError(CORRUPT) for damaged files."""


# Placing: which tensor lies in which arena


def place_tensors(
    spec: ModelSpec, memory: FastMemory, files: WeightFiles, purpose: str = "norms"
) -> dict[str, Tensor]:
    """Norms, biases, matrices without a substitute and scales of FP8 matrices, by name."""
    found = {}
    for name, shape in spec.resident_shapes.items():
        dtype: torch.dtype = getattr(torch, spec.resident_dtype(name))
        found[name] = memory.take_tensor(purpose, shape, dtype)
        files.read_tensor(name, found[name])
    for name, of_scales in spec.scale_shapes.items():
        found[name] = memory.take_tensor(purpose, of_scales, torch.float32)
        files.read_tensor(name, found[name])
    return found


def place_substitutes(
    spec: ModelSpec,
    kernel: Int4Kernel,
    memory: FastMemory,
    files: WeightFiles,
    progress: Progress = unseen,
    purpose: str = "substitutes",
) -> dict[str, Int4Weight]:
    """Every substitute, in the layout of the 4-bit kernel, by the matrix's name."""
    found = {}
    every = [linear for linear in spec.linears if linear.has_substitute]
    for index, linear in enumerate(every):
        shape = linear.out_features, linear.in_features
        room = [memory.take(purpose, size) for size in packed_bytes(*shape, kernel)]
        found[linear.name] = empty_weight(*shape, kernel, room)
        files.read_substitute(linear, found[linear.name])
        progress("loading substitutes", (index + 1) / len(every))
    return found


def place_resident(
    spec: ModelSpec,
    stored: Sequence[StoredPart],
    placement: Placement,
    memory: FastMemory,
    files: WeightFiles,
    progress: Progress = unseen,
) -> dict[str, Tensor]:
    """Resident exact weights, by part, as `view_of` returns them. A residual that is decoded while
    loading is returned as if stored plainly, FP8 that is dequantized as if stored raw."""
    resident_names, residuals = set(placement.resident), set(placement.residuals)
    dequantized = set(placement.dequantized)
    chosen = [part for part in stored if part.name in resident_names | residuals]
    dtype: torch.dtype = getattr(torch, spec.dtype)
    found = {}
    for index, one in enumerate(chosen):
        if one.name in residuals:
            room = memory.take("residuals", one.padded_bytes, PAGE_BYTES)
            files.read_stored(one, room)
            found[one.name] = room[: one.num_bytes]
        else:
            if one.name in dequantized:
                plain = StoredPart(one.part, "raw", one.part.num_bytes)
            else:
                plain = StoredPart(one.part, one.part.plain_encoding, one.part.plain_bytes)
            room = memory.take("resident", plain.padded_bytes, PAGE_BYTES)
            found[one.name] = view_of(plain, room, dtype)
            if one.encoding == plain.encoding:
                files.read_stored(one, room)
            else:
                files.read_exact(one, found[one.name])
        progress("loading exact weights", (index + 1) / len(chosen))
    return found


def biases_of(spec: ModelSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {one.name: tensors[f"{one.name}.bias"] for one in spec.linears if one.has_bias}


def scales_by_name(spec: ModelSpec, tensors: dict[str, Tensor]) -> dict[str, Scales]:
    """Scales of every FP8 matrix, by its name."""
    return {
        one.name: scales_of(one, tensors[f"{one.name}.fp8_scale"])
        for one in spec.linears
        if one.fp8
    }


def unplaced_weights(spec: ModelSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The exact matrices that have no substitute: always resident, draft and verification share
    them."""
    return {
        one.name: tensors[f"{one.name}.weight"] for one in spec.linears if not one.has_substitute
    }


def make_substitutes(
    spec: ModelSpec,
    tensors: dict[str, Tensor],
    packed: dict[str, Int4Weight],
    keep: Callable[[Tensor], Tensor],
) -> Substitutes:
    biases = {
        name: bias if bias.dtype == DRAFT_DTYPE else keep(bias.to(DRAFT_DTYPE))
        for name, bias in biases_of(spec, tensors).items()
    }
    return Substitutes(spec.num_layers, {**packed, **unplaced_weights(spec, tensors)}, biases)


def make_residual_decoder(
    spec: ModelSpec,
    stored: Sequence[StoredPart],
    placement: Placement,
    packed: dict[str, Int4Weight],
    tensors: dict[str, Tensor],
    memory: FastMemory,
    num_threads: int,
    record: Record = unrecorded,
) -> ResidualDecoder | None:
    """Return the decoder of residuals and FP8 codes, or None if no weight is decoded when it is
    used."""
    resident_names, dequantized = set(placement.resident), set(placement.dequantized)
    coded = [
        p
        for p in stored
        if (p.is_residual and p.name not in resident_names)
        or (p.part.linear.fp8 and p.name not in dequantized)
    ]
    if not coded:
        return None
    largest = max(p.part.padded_bytes for p in coded)
    return ResidualDecoder(
        packed,
        scales_by_name(spec, tensors),
        memory.take("scratch", largest, PAGE_BYTES),
        getattr(torch, spec.dtype),
        num_threads,
        torch.zeros(1, dtype=torch.int32, device=memory.device),
        record,
    )


def check_kernel(artifact: Artifact, plan: Plan, device: torch.device) -> None:
    """Raise SubspecError(WRONG_MACHINE) if the plan's 4-bit kernel cannot run here."""
    if plan.int4_kernel == "gemlite":
        specs = [spec for spec in (artifact.spec, artifact.draft_model) if spec is not None]
        every = (one for spec in specs for one in spec.linears)
        columns = (one.in_features for one in every if one.has_substitute)
        if (problem := gemlite_kernel.unavailable(device, columns)) is not None:
            raise SubspecError(
                Exit.WRONG_MACHINE,
                f"the plan's 4-bit kernel, gemlite, cannot run here: {problem}",
                "pip install 'subspec[gpu]', or plan again on this machine",
            )
    if plan.int4_kernel == "w4a8" and (problem := int4.unavailable()) is not None:
        raise SubspecError(
            Exit.WRONG_MACHINE,
            f"the plan's 4-bit kernel, w4a8, cannot be built here: {problem}",
            "add --trust-kernels to load the one in the artifact"
            if find_prebuilt(artifact, cpp.program(int4.SOURCE))
            else "install a C++ compiler, or plan again on this machine",
        )


def check_decoder(artifact: Artifact, placement: Placement, device: torch.device) -> None:
    """Raise SubspecError(WRONG_MACHINE) if residuals are decoded when they are used, and this
    machine cannot. CPUs have a plain twin, and FP8 codes have one on GPUs as well."""
    if device.type == "cpu":
        return
    resident_names, problem = set(placement.resident), triton_driver.unavailable(device)
    if problem is not None and any(
        one.is_residual and one.name not in resident_names for one in artifact.stored_parts()
    ):
        raise SubspecError(
            Exit.WRONG_MACHINE,
            f"the plan decodes residuals on the GPU with Triton, which cannot run here: {problem}",
            "install what is missing, or plan again on this machine",
        )


def check_token_ids(token_ids: Tensor, vocab_size: int) -> None:
    """Raise SubspecError(CORRUPT) unless they are different tokens of the vocabulary."""
    ids = token_ids.cpu()
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size or len(ids.unique()) < len(ids):
        message = f"{HEAD_FILE}: {TOKEN_IDS} are not different tokens of {vocab_size}"
        raise SubspecError(Exit.CORRUPT, message, "copy or build the artifact again")


# Reading an artifact


class ArtifactWeights:
    """Reads the weights of an artifact, or of its draft model, and checks all digests."""

    def __init__(self, artifact: Artifact, folder: str = "") -> None:
        spec, substitutes = artifact.spec, artifact.manifest.substitutes
        if folder:
            assert artifact.draft_model is not None
            spec, substitutes = artifact.draft_model, artifact.manifest.draft_model_substitutes
        self._path = artifact.path / folder
        self._num_threads = artifact.plan.num_threads
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._entries = {} if folder else artifact.part_entries()
        self._substitute_digests = {entry.name: entry.digest for entry in substitutes}
        files = {artifact.path / entry.path: entry for entry in artifact.manifest.files}
        self._files = {path.name: one for path, one in files.items() if path.parent == self._path}
        # Threads that pack weights run torch, and so keep OpenMP threads of their own. With more of
        # those than CPUs libgomp hardly spins at a barrier, and drafts take 1.3x as long
        # (docs/LOG.md): they end with the loading. Threads that check what streams only hash.
        self._loading = Digests(artifact.plan.num_threads)
        self._streaming = Digests(artifact.plan.num_threads)
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        self._checked = set[str]()

    def read_tensor(
        self, name: str, target: Tensor, file_name: str = "resident.safetensors"
    ) -> None:
        stored = self._header(file_name)[name]
        flat = target.view(-1)
        step = PIECE_BYTES // target.itemsize
        with TensorFile(self._path / file_name) as file:
            for first in range(0, len(flat), step):
                piece = torch.empty(min(step, len(flat) - first), dtype=TORCH_DTYPES[stored.dtype])
                offset = stored.offset + first * target.itemsize
                file.read_into(bytes_of(piece.view(torch.uint8)), offset)
                flat[first : first + len(piece)] = piece

    def read_substitute(self, linear: Linear, weight: Int4Weight) -> None:
        """Read in a background thread; the digest is over codes, then qparams."""
        header = self._header("substitutes.safetensors")
        codes, qparams = (header[f"{linear.name}.{kind}"] for kind in ("codes", "qparams"))
        expected = self._substitute_digests[linear.name]

        def read() -> None:
            digest = hashlib.sha256()
            with TensorFile(self._path / "substitutes.safetensors") as file:
                for first, piece in row_pieces(file, codes, piece_rows(weight)):
                    digest.update(bytes_of(piece.view(-1)))
                    pack_rows(weight, first, piece)
                whole = read_whole(file, qparams)
            digest.update(bytes_of(whole.view(-1).view(torch.uint8)))
            digest.update(self._scale_bytes(linear))
            pack_qparams(weight, whole)
            compare_digest(linear.name, digest.hexdigest(), expected)

        self._loading.submit(read)

    def read_stored(self, stored: StoredPart, target: Tensor) -> None:
        on_cpu = target.device.type == "cpu"
        host = target if on_cpu else host_buffer(stored.padded_bytes)
        with self._exact_file() as file:
            self._read_part(file, stored, host)
        if not on_cpu:
            target.copy_(host)

    def read_exact(self, stored: StoredPart, target: Tensor) -> None:
        """Decode a residual once, over the substitute as the artifact stores it."""
        part = stored.part
        host = host_buffer(stored.padded_bytes)
        with self._exact_file() as file:
            self._read_part(file, stored, host)
        on_cpu = target.device.type == "cpu"
        out = target if on_cpu else torch.empty(target.shape, dtype=target.dtype)
        own, scales = host[: stored.num_bytes], None
        if part.linear.fp8:
            scales = scales_of(part.linear, self._scales(part.linear), part.first_row)
        if stored.is_residual:
            substitute = self._substitute_rows(part)
            self._loading.finish()  # a residual is decoded only over what it was made for
            self._decode(out, own, *substitute, scales)
        else:
            assert scales is not None
            fp8_cpu.dequantize_into(out, own.view(out.shape), scales, self._num_threads)
            self._loading.finish()  # so that no more than one part is on the host
        if not on_cpu:
            target.copy_(out)

    def _decode(
        self, out: Tensor, stored: Tensor, codes: Tensor, qparams: Tensor, scales: Scales | None
    ) -> None:
        """Fill out [R, K] with exact weights or FP8 codes, from a residual uint8 [bytes]."""
        if scales is None:
            residual_cpu.decode_any(stored, codes, qparams, out, self._num_threads)
            return
        bare = out.view(torch.uint8) if out.dtype == torch.float8_e4m3fn else out
        fp8_cpu.decode_any(stored, codes, qparams, scales, bare, self._num_threads)

    def open_embedding(self, device: torch.device) -> FileRows | MappedRows:
        path = self._path / "embedding.safetensors"
        self._loading.check_file(path, self._files[path.name])
        stored = self._header(path.name)[f"{EMBEDDING}.weight"]
        if device.type == "cpu":
            return FileRows(path, stored, self._dtype)
        return MappedRows(path, stored, self._dtype, device)

    def place_draft_head(self, spec: ModelSpec, memory: FastMemory) -> dict[str, Tensor]:
        """The tensors of the draft head, by name, as stored."""
        self._loading.check_file(self._path / HEAD_FILE, self._files[HEAD_FILE])
        found = {}
        for name, shape in spec.draft_head_shapes.items():
            dtype = torch.int64 if name == TOKEN_IDS else self._dtype
            found[name] = memory.take_tensor("drafter", shape, dtype)
            self.read_tensor(name, found[name], HEAD_FILE)
        if TOKEN_IDS in found:
            check_token_ids(found[TOKEN_IDS], spec.vocab_size)
        return found

    def check_resident(self) -> None:
        """Start to compare what `read_tensor` reads with its digest."""
        name = "resident.safetensors"
        self._loading.check_file(self._path / name, self._files[name])

    def open_ring(
        self,
        stored: Sequence[StoredPart],
        placement: Placement,
        memory: FastMemory,
        link_bandwidth: float | None,
        record: Record,
    ) -> Ring | None:
        """Return the ring of streamed parts in the plan's staging slots, or None if nothing
        streams."""
        blocks = make_blocks(stored, placement)
        if not blocks:
            return None
        slots = [
            memory.take("staging", placement.block_bytes, PAGE_BYTES)
            for _ in range(placement.num_slots)
        ]
        offsets = [self._entries[block.parts[0].name].offset for block in blocks]
        path = self._path / "exact.safetensors"
        if memory.device.type == "cpu":
            disk = DiskLink(path, slots, link_bandwidth, record)
            return Ring(blocks, offsets, disk, len(slots), self._dtype, self._check_block)
        ranges = [(o, block.num_bytes) for o, block in zip(offsets, blocks, strict=True)]
        host = HostLink(path, ranges, slots, link_bandwidth)
        try:
            for block, offset in zip(blocks, offsets, strict=True):
                self._check_block(block, host.host_bytes(offset))
            self._streaming.finish()
            return Ring(blocks, offsets, host, len(slots), self._dtype)
        except BaseException:
            host.close()
            raise

    def finish(self) -> None:
        self._loading.finish()
        self._loading.close()

    def close(self) -> None:
        self._loading.close()
        self._streaming.close()

    def _header(self, name: str) -> dict[str, StoredTensor]:
        if name not in self._headers:
            self._headers[name] = read_header(self._path / name)
        return self._headers[name]

    @contextmanager
    def _exact_file(self) -> Iterator[DirectFile]:
        file = DirectFile(self._path / "exact.safetensors")
        try:
            yield file
        finally:
            file.close()

    def _substitute_rows(self, part: Part) -> tuple[Tensor, Tensor]:
        """Codes uint8 [R, K / 2] and qparams bf16 [G, R, 2] of a part, as stored. The whole
        substitute is checked the first time."""
        header = self._header("substitutes.safetensors")
        codes, qparams = (header[f"{part.linear.name}.{kind}"] for kind in ("codes", "qparams"))
        rows = slice(part.first_row, part.first_row + part.num_rows)
        half = codes.shape[1]
        with TensorFile(self._path / "substitutes.safetensors") as file:
            whole = read_whole(file, qparams)
            own = torch.empty(part.num_rows, half, dtype=torch.uint8)
            file.read_into(bytes_of(own.view(-1)), codes.offset + part.first_row * half)
            if part.linear.name not in self._checked:
                digest = hashlib.sha256()
                for _, piece in row_pieces(file, codes, max(1, PIECE_BYTES // half)):
                    digest.update(bytes_of(piece.view(-1)))
                digest.update(bytes_of(whole.view(-1).view(torch.uint8)))
                digest.update(self._scale_bytes(part.linear))
                expected = self._substitute_digests[part.linear.name]
                compare_digest(part.linear.name, digest.hexdigest(), expected)
                self._checked.add(part.linear.name)
        return own, whole[:, rows]

    def _scales(self, linear: Linear) -> Tensor:
        """The scales of an FP8 matrix on the host, as stored."""
        name = "resident.safetensors"
        with TensorFile(self._path / name) as file:
            return read_whole(file, self._header(name)[f"{linear.name}.fp8_scale"])

    def _scale_bytes(self, linear: Linear) -> memoryview | bytes:
        """Bytes of the FP8 scales, for the digest of the substitute."""
        return bytes_of(self._scales(linear).view(-1).view(torch.uint8)) if linear.fp8 else b""

    def _read_part(self, file: DirectFile, part: StoredPart, host: Tensor) -> None:
        file.read_into(host, self._entries[part.name].offset)
        self._check_part(self._loading, part, host)

    def _check_part(self, digests: Digests, part: StoredPart, host: Tensor) -> None:
        """host: uint8, begins with the part's bytes, unchanged until `digests.finish`."""
        substitute = self._substitute_digests[part.part.linear.name]
        digests.check_part(
            part.name,
            host[: part.num_bytes],
            self._entries[part.name].digest,
            substitute if part.is_residual else None,
        )

    def _check_block(self, block: Block, memory: Tensor) -> Callable[[], None]:
        """Start to compare a block with its digests; return a function that waits for the result
        and raises SubspecError(CORRUPT). memory: the block's bytes, uint8 on the host, unchanged
        until then. After an error nothing is pending."""
        offset = 0
        try:
            for part in block.parts:
                self._check_part(self._streaming, part, memory[offset:])
                offset += part.padded_bytes
        except BaseException:
            self._streaming.finish()
            raise
        return self._streaming.finish


def row_pieces(
    file: TensorFile, stored: StoredTensor, num_rows: int
) -> Iterator[tuple[int, Tensor]]:
    """(first row, uint8 [rows, bytes of a row]) of a stored matrix of bytes, in order."""
    total, size = stored.shape
    for first in range(0, total, num_rows):
        piece = torch.empty(min(num_rows, total - first), size, dtype=torch.uint8)
        file.read_into(bytes_of(piece.view(-1)), stored.offset + first * size)
        yield first, piece


def read_whole(file: TensorFile, stored: StoredTensor) -> Tensor:
    """A whole tensor on the host, in its own dtype and shape."""
    raw = torch.empty(stored.num_bytes, dtype=torch.uint8)
    file.read_into(bytes_of(raw), stored.offset)
    return raw.view(TORCH_DTYPES[stored.dtype]).view(stored.shape)
