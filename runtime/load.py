"""An artifact's weights -> the arenas of fast memory, one tensor at a time, in kernel layouts."""

from collections.abc import Callable

import torch
from torch import Tensor

from subspec.artifacts.model import (
    EMBEDDING,
    HEAD,
    PAGE_BYTES,
    Kind,
    ModelSpec,
    is_streamable,
    linears,
    parts,
    resident_tensors,
)
from subspec.artifacts.plan import Placement, make_blocks
from subspec.artifacts.store import Artifact
from subspec.artifacts.tensors import StoredTensor, TensorFile, read_header
from subspec.runtime.linear import Int4Weight, pack, packed_bytes
from subspec.runtime.link import DirectFile, DiskLink, HostLink, Link
from subspec.runtime.memory import FastMemory, bytes_of, host_buffer
from subspec.runtime.stream import ExactWeights, Ring
from subspec.runtime.substitutes import Substitutes

DRAFT_DTYPE = torch.bfloat16  # what the 4-bit kernels take
TORCH_DTYPES = {
    "U8": torch.uint8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
}  # fmt: skip


class Loader:
    """Reads an artifact's weights into the arenas of fast memory, one tensor at a time."""

    def __init__(
        self,
        artifact: Artifact,
        placement: Placement,
        memory: FastMemory,
        progress: Callable[[str, float], None],
    ) -> None:
        self._artifact = artifact
        self._spec: ModelSpec = artifact.spec
        self._placement = placement
        self._memory = memory
        self._progress = progress

    def small_tensors(self) -> dict[str, Tensor]:
        """Embedding, norms, biases and odd-shaped matrices, by checkpoint name."""
        stored = read_header(self._artifact.path / "resident.safetensors")
        found = {}
        with TensorFile(self._artifact.path / "resident.safetensors") as file:
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

    def substitutes(self, small: dict[str, Tensor]) -> Substitutes:
        spec, path = self._spec, self._artifact.path / "substitutes.safetensors"
        stored = read_header(path)
        weights: dict[tuple[int, Kind], Int4Weight | Tensor] = {}
        biases: dict[tuple[int, Kind], Tensor] = {}
        every = linears(spec)
        with TensorFile(path) as file:
            for index, linear in enumerate(every):
                key = linear.layer, linear.kind
                if linear.has_bias:
                    bias = small[f"{linear.name}.bias"]
                    same = bias.dtype == DRAFT_DTYPE
                    biases[key] = bias if same else self.keep(bias.to(DRAFT_DTYPE))
                if not linear.has_substitute:
                    weights[key] = fixed_weight(spec, linear.name, small)
                    continue
                codes, scale, zero = (
                    read_tensor(file, stored[f"{linear.name}.{part}"])
                    for part in ("codes", "scale", "zero")
                )
                room = packed_bytes(linear.out_features, linear.in_features)
                weights[key] = pack(
                    codes,
                    scale,
                    zero,
                    self._artifact.plan.int4_kernel,
                    *(self._memory.take("substitutes", num_bytes) for num_bytes in room),
                )
                self._progress("loading substitutes", (index + 1) / len(every))
        return Substitutes(spec.num_layers, weights, biases)

    def exact_weights(self, small: dict[str, Tensor], link_bandwidth: float | None) -> ExactWeights:
        spec = self._spec
        fixed = {
            linear.name: fixed_weight(spec, linear.name, small)
            for linear in linears(spec)
            if not is_streamable(spec, linear)
        }
        biases = {
            linear.name: small[f"{linear.name}.bias"] for linear in linears(spec) if linear.has_bias
        }
        resident = self._resident_parts()
        return ExactWeights(spec, fixed, resident, biases, self._ring(link_bandwidth))

    def _resident_parts(self) -> dict[str, Tensor]:
        offsets = self._artifact.part_offsets()
        wanted = set(self._placement.resident)
        dtype: torch.dtype = getattr(torch, self._spec.dtype)
        chosen = [part for part in parts(self._spec) if part.name in wanted]
        file = DirectFile(self._artifact.path / "exact.safetensors")
        found = {}
        for index, part in enumerate(chosen):
            target = self._memory.take("resident", part.padded_bytes, PAGE_BYTES)
            if target.device.type == "cpu":
                file.read_into(target, offsets[part.name].offset)
            else:
                through = host_buffer(part.padded_bytes)
                file.read_into(through, offsets[part.name].offset)
                target.copy_(through)
            found[part.name] = target[: part.num_bytes].view(dtype).view(part.num_rows, -1)
            self._progress("loading exact weights", (index + 1) / len(chosen))
        file.close()
        return found

    def _ring(self, link_bandwidth: float | None) -> Ring | None:
        placement = self._placement
        blocks = make_blocks(self._spec, placement.resident, placement.block_bytes)
        if not blocks:
            return None
        slots = [
            self._memory.take("staging", placement.block_bytes, PAGE_BYTES)
            for _ in range(placement.num_slots)
        ]
        where = self._artifact.part_offsets()
        offsets = [where[block.parts[0].name].offset for block in blocks]
        path = self._artifact.path / "exact.safetensors"
        link: Link
        if self._memory.device.type == "cpu":
            link = DiskLink(path, slots, link_bandwidth)
        else:
            ranges = [(o, block.num_bytes) for o, block in zip(offsets, blocks, strict=True)]
            link = HostLink(path, ranges, slots, link_bandwidth)
        return Ring(blocks, offsets, link, placement.num_slots)


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
