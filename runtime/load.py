"""An artifact's weights -> the arenas of fast memory, one tensor at a time, in kernel layouts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.prebuilt import find_prebuilt
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.format.tensors import StoredTensor, TensorFile, read_header
from subspec.artifacts.model import (
    EMBEDDING,
    HEAD,
    PAGE_BYTES,
    Kind,
    Linear,
    ModelSpec,
    StoredPart,
    is_streamable,
    linears,
    resident_tensors,
)
from subspec.artifacts.native import residual_cpu
from subspec.artifacts.plan import Block, Placement, make_blocks
from subspec.runtime.clock import Record, unrecorded
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.kernels import int4
from subspec.runtime.kernels.linear import Int4Weight, pack, packed_bytes
from subspec.runtime.memory import FastMemory, bytes_of, host_buffer
from subspec.runtime.stream.digests import Digests
from subspec.runtime.stream.exact_weights import ExactWeights, Ring
from subspec.runtime.stream.link import DirectFile, DiskLink, HostLink
from subspec.runtime.stream.residual_decoder import ResidualDecoder

DRAFT_DTYPE = torch.bfloat16  # what the 4-bit kernels take
TORCH_DTYPES = {
    "U8": torch.uint8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
}  # fmt: skip


class Loader:
    """Reads an artifact's weights into the arenas of fast memory, one tensor at a time, and checks
    the digest of all it reads."""

    def __init__(
        self,
        artifact: Artifact,
        placement: Placement,
        memory: FastMemory,
        progress: Callable[[str, float], None],
        record: Record = unrecorded,
    ) -> None:
        self._artifact = artifact
        self._spec: ModelSpec = artifact.spec
        self._placement = placement
        self._memory = memory
        self._progress = progress
        self._record = record
        self._digests = Digests(artifact.plan.num_threads)
        self._substitute_digests = artifact.substitute_digests()
        self._entries = artifact.part_entries()
        self._dtype: torch.dtype = getattr(torch, artifact.spec.dtype)

    def small_tensors(self) -> dict[str, Tensor]:
        """Embedding, norms, biases and odd-shaped matrices, by checkpoint name."""
        path = self._artifact.path / "resident.safetensors"
        [entry] = [e for e in self._artifact.manifest.files if e.path == path.name]
        self._digests.check_file(path, entry)
        stored = read_header(path)
        found = {}
        with TensorFile(path) as file:
            for name, shape in resident_tensors(self._spec).items():
                purpose = "embedding" if name.startswith(EMBEDDING) else "norms"
                tensor = read_tensor(file, stored[name])
                target = self._memory.take_tensor(purpose, shape, tensor.dtype)
                target.copy_(tensor)
                found[name] = target
        return found

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy in fast memory of something that was computed at load."""
        target = self._memory.take_tensor("tables", tuple(tensor.shape), tensor.dtype)
        return target.copy_(tensor)

    def int4_weights(self) -> dict[tuple[int, Kind], Int4Weight]:
        """Every substitute, in the layout of the plan's 4-bit kernel; empty if the plan has no room
        for them: then nothing needs them."""
        if not self._placement.ledger.get("substitutes"):
            return {}
        kernel = self._artifact.plan.int4_kernel
        if kernel == "w4a8" and (problem := int4.unavailable()) is not None:
            raise SubspecError(
                Exit.WRONG_MACHINE,
                f"the plan's 4-bit kernel, w4a8, cannot be built here: {problem}",
                "add --trust-kernels to load the one that the artifact brings"
                if find_prebuilt(self._artifact, int4.SOURCE)
                else "install a C++ compiler, or plan again on this machine",
            )
        found = {}
        every = [linear for linear in linears(self._spec) if linear.has_substitute]
        with self._substitute_file() as read:
            for index, linear in enumerate(every):
                codes, qparams = read(linear)
                room = packed_bytes(linear.out_features, linear.in_features, kernel)
                found[linear.layer, linear.kind] = pack(
                    codes,
                    qparams,
                    kernel,
                    *(self._memory.take("substitutes", num_bytes) for num_bytes in room),
                )
                self._progress("loading substitutes", (index + 1) / len(every))
        return found

    def substitutes(
        self, small: dict[str, Tensor], int4: dict[tuple[int, Kind], Int4Weight]
    ) -> Substitutes:
        weights: dict[tuple[int, Kind], Int4Weight | Tensor] = {**int4}
        biases: dict[tuple[int, Kind], Tensor] = {}
        for linear in linears(self._spec):
            key = linear.layer, linear.kind
            if linear.has_bias:
                bias = small[f"{linear.name}.bias"]
                same = bias.dtype == DRAFT_DTYPE
                biases[key] = bias if same else self.keep(bias.to(DRAFT_DTYPE))
            if not linear.has_substitute:
                weights[key] = fixed_weight(self._spec, linear.name, small)
        return Substitutes(self._spec.num_layers, weights, biases)

    def exact_weights(
        self,
        small: dict[str, Tensor],
        int4: dict[tuple[int, Kind], Int4Weight],
        link_bandwidth: float | None,
    ) -> ExactWeights:
        spec = self._spec
        fixed = {
            linear.name: fixed_weight(spec, linear.name, small)
            for linear in linears(spec)
            if not is_streamable(spec, linear)
        }
        biases = {
            linear.name: small[f"{linear.name}.bias"] for linear in linears(spec) if linear.has_bias
        }
        stored, held = self._artifact.stored_parts(), self._held_parts()
        ring = self._ring(stored, link_bandwidth)
        self._digests.finish()
        residual_decoder = self._residual_decoder(stored, int4)
        return ExactWeights(spec, stored, fixed, held, biases, ring, residual_decoder, self._record)

    def close(self) -> None:
        self._digests.close()

    def _held_parts(self) -> dict[str, Tensor]:
        """What stays in fast memory: [rows, K], or uint8 [bytes] of a residual."""
        resident, split = set(self._placement.resident), set(self._placement.split)
        chosen = [p for p in self._artifact.stored_parts() if p.name in resident | split]
        found = {}
        file = DirectFile(self._artifact.path / "exact.safetensors")
        try:
            with self._substitute_file() as read:
                read_once = lru_cache(maxsize=1)(read)  # parts of a matrix follow each other
                for index, part in enumerate(chosen):
                    if part.name in split:
                        found[part.name] = self._place_stored(file, part, "residuals")
                    elif part.encoding == "raw":
                        raw = self._place_stored(file, part, "resident")
                        found[part.name] = raw.view(self._dtype).view(part.part.num_rows, -1)
                    else:
                        found[part.name] = self._place_decoded(file, part, read_once)
                    self._progress("loading exact weights", (index + 1) / len(chosen))
        finally:
            file.close()
        return found

    def _place_stored(self, file: DirectFile, part: StoredPart, purpose: str) -> Tensor:
        """The bytes of the part in fast memory: uint8 [num_bytes]."""
        target = self._memory.take(purpose, part.padded_bytes, PAGE_BYTES)
        on_cpu = target.device.type == "cpu"
        host = target if on_cpu else host_buffer(part.padded_bytes)
        self._read_part(file, part, host)
        if not on_cpu:
            target.copy_(host)
        return target[: part.num_bytes]

    def _place_decoded(
        self,
        file: DirectFile,
        part: StoredPart,
        read: Callable[[Linear], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """A residual, decoded once and for all: [rows, K] in fast memory. read: a substitute, as it
        is stored."""
        host = host_buffer(part.padded_bytes)
        self._read_part(file, part, host)
        codes, qparams = read(part.part.linear)
        self._digests.finish()  # a residual is decoded only over what it was made for
        rows = slice(part.part.first_row, part.part.first_row + part.part.num_rows)
        raw = self._memory.take("resident", part.part.padded_bytes, PAGE_BYTES)
        target = raw[: part.part.num_bytes].view(self._dtype).view(part.part.num_rows, -1)
        exact = residual_cpu.decode(
            host[: part.num_bytes],
            codes[rows],
            qparams[:, rows],
            self._dtype,
            self._artifact.plan.num_threads,
        )
        return target.copy_(exact)

    def _read_part(self, file: DirectFile, part: StoredPart, host: Tensor) -> None:
        file.read_into(host, self._entries[part.name].offset)
        self._check_part(part, host)

    def _check_part(self, part: StoredPart, host: Tensor) -> None:
        """host: uint8, begins with the part's bytes."""
        substitute = self._substitute_digests[part.part.linear.name]
        self._digests.check_part(
            part.name,
            host[: part.num_bytes],
            self._entries[part.name].digest,
            substitute if part.encoding == "residual" else None,
        )

    def _check_block(self, block: Block, memory: Tensor) -> Callable[[], None]:
        """Begins to compare; what is returned waits. memory: uint8 on the host, the block's bytes,
        unchanged until then. Raises SubspecError(CORRUPT)."""
        offset = 0
        for part in block.parts:
            self._check_part(part, memory[offset:])
            offset += part.padded_bytes
        return self._digests.finish

    @contextmanager
    def _substitute_file(self) -> Iterator[Callable[[Linear], tuple[Tensor, Tensor]]]:
        """Reads a linear's codes and qparams as they are stored, on the host."""
        path = self._artifact.path / "substitutes.safetensors"
        stored = read_header(path)
        with TensorFile(path) as file:

            def read(linear: Linear) -> tuple[Tensor, Tensor]:
                codes = read_tensor(file, stored[f"{linear.name}.codes"])
                qparams = read_tensor(file, stored[f"{linear.name}.qparams"])
                expected = self._substitute_digests[linear.name]
                self._digests.check_substitute(linear.name, codes, qparams, expected)
                return codes, qparams

            yield read

    def _residual_decoder(
        self, stored: list[StoredPart], int4: dict[tuple[int, Kind], Int4Weight]
    ) -> ResidualDecoder | None:
        resident = set(self._placement.resident)
        coded = [p for p in stored if p.encoding == "residual" and p.name not in resident]
        if not coded:
            return None
        largest = max(p.part.padded_bytes for p in coded)
        return ResidualDecoder(
            int4,
            self._memory.take("scratch", largest, PAGE_BYTES),
            self._dtype,
            self._artifact.plan.num_threads,
            torch.zeros(1, dtype=torch.int32, device=self._memory.device),
            self._record,
        )

    def _ring(self, stored: list[StoredPart], link_bandwidth: float | None) -> Ring | None:
        placement = self._placement
        blocks = make_blocks(stored, placement)
        if not blocks:
            return None
        slots = [
            self._memory.take("staging", placement.block_bytes, PAGE_BYTES)
            for _ in range(placement.num_slots)
        ]
        offsets = [self._entries[block.parts[0].name].offset for block in blocks]
        path = self._artifact.path / "exact.safetensors"
        if self._memory.device.type == "cpu":
            disk = DiskLink(path, slots, link_bandwidth, self._record)
            return Ring(blocks, offsets, disk, placement.num_slots, self._check_block)
        ranges = [(o, block.num_bytes) for o, block in zip(offsets, blocks, strict=True)]
        host = HostLink(path, ranges, slots, link_bandwidth)
        for block, offset in zip(blocks, offsets, strict=True):
            self._check_block(block, host.host_bytes(offset))
        self._digests.finish()
        return Ring(blocks, offsets, host, placement.num_slots)


def fixed_weight(spec: ModelSpec, name: str, small: dict[str, Tensor]) -> Tensor:
    """The exact matrix of a linear that is never streamed."""
    if name == HEAD and spec.tied_head:
        return small[f"{EMBEDDING}.weight"]
    return small[f"{name}.weight"]


def read_tensor(file: TensorFile, stored: StoredTensor) -> Tensor:
    """A whole tensor on the host, in its own dtype and shape."""
    raw = torch.empty(stored.num_bytes, dtype=torch.uint8)
    file.read_into(bytes_of(raw), stored.offset)
    return raw.view(TORCH_DTYPES[stored.dtype]).view(stored.shape)
