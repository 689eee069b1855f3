"""Engines of real shapes without a byte: tensors are on torch's meta device, memory is what the
allocator's model says. Everything but the reading of weights is the project's own code."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from builders import PROFILE
from simcuda.device import simulated
from simcuda.simulation import Simulation
from torch import Tensor
from toys import ACCEPTANCE, make_spec

from subspec.artifacts.format.store import Artifact, Manifest
from subspec.artifacts.model import PAGE_BYTES, ModelSpec, StoredPart
from subspec.artifacts.plan import Constraints, Int4Kernel, Method, Plan, make_blocks
from subspec.artifacts.profile import LinkRate, Profile, Timing
from subspec.planner.solve.search import search
from subspec.planner.solve.storage import storages
from subspec.runtime import open_model
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.stream.ring import Ring

MB = 10**6
OVERHEAD_BYTES = 400 * MB  # of the context; a guess, and the same on both sides
MEMORY_RATE, LINK_RATE = 0.9e12, 25e9  # bytes a second of an RTX 4090, about


def paper_spec(layers: int, hidden: int, heads: int, kv_heads: int, inner: int) -> ModelSpec:
    """As Qwen2.5 has them."""
    return make_spec(
        layers, heads, kv_heads, 128, inner,
        hidden_size=hidden, vocab_size=152064, max_positions=32768,
    )  # fmt: skip


SPECS = {
    "1.5B": paper_spec(28, 1536, 12, 2, 8960),
    "7B": paper_spec(28, 3584, 28, 4, 18944),
    "14B": paper_spec(48, 5120, 40, 8, 13824),
    "32B": paper_spec(64, 5120, 40, 8, 27648),
}


def paper_profile(spec: ModelSpec, kernel: Int4Kernel = "aten") -> Profile:
    """A GPU whose passes take as long as reading their weights."""
    layer = sum(one.num_weights for one in spec.linears if one.layer == 0) * 2 / MEMORY_RATE
    head = spec.linears[-1].num_weights * 2 / MEMORY_RATE

    def timings(seconds: float) -> tuple[Timing, ...]:
        return tuple(Timing(width, seconds * (1 + width / 200)) for width in (1, 8, 64))

    return replace(
        PROFILE,
        device="cuda",
        machine="cuda: paper",
        overhead_bytes=OVERHEAD_BYTES,
        free_bytes=1 << 40,
        link=(LinkRate(1 << 20, LINK_RATE * 0.8), LinkRate(64 << 20, LINK_RATE)),
        exact_layer=timings(layer),
        fast_layer=timings(layer),
        draft_layer=timings(layer / 4),
        exact_head=timings(head),
        draft_head=timings(head / 4),
        residual_weights_per_second=300e9,
        int4_kernel=kernel,
    )


@dataclass(frozen=True)
class PaperArtifact(Artifact):
    stored: tuple[StoredPart, ...] = ()

    def stored_parts(self) -> list[StoredPart]:
        return list(self.stored)


def paper_artifact(
    spec: ModelSpec, budget_bytes: int, constraints: Constraints | None = None
) -> PaperArtifact:
    profile = paper_profile(spec)
    plan: Plan = search(spec, profile, budget_bytes, constraints or Constraints(), ACCEPTANCE)
    [stored] = [
        one.as_stored
        for one in storages(spec, "auto", True)
        if set(one.residuals) == set(plan.residuals)
    ]
    manifest = Manifest("", "", (), (), ())
    return PaperArtifact(Path("paper"), manifest, spec, plan, profile, stored=tuple(stored))


class PaperRows:
    """The embedding."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size, self._device = size, device

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.empty(len(tokens), self._size, dtype=torch.bfloat16, device=self._device)

    def close(self) -> None: ...


class PaperLink:
    wait_seconds = 0.0

    def __init__(self, slots: list[Tensor]) -> None:
        self._slots = slots

    def begin(self, slot: int, offset: int, num_bytes: int) -> None: ...
    def wait(self, slot: int) -> Tensor:
        return self._slots[slot]

    def release(self, slot: int) -> None: ...
    def forget(self) -> None: ...
    def close(self) -> None: ...


class PaperWeights:
    """In place of ArtifactWeights: reads nothing."""

    def __init__(self, artifact: Artifact) -> None:
        self._spec = artifact.spec

    def read_tensor(self, name: str, target: Tensor) -> None: ...
    def read_substitute(self, linear: Any, weight: Any) -> None: ...
    def read_exact(self, stored: Any, target: Tensor) -> None: ...
    def read_stored(self, stored: Any, target: Tensor) -> None: ...
    def check_resident(self) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...

    def open_embedding(self, device: torch.device) -> PaperRows:
        return PaperRows(self._spec.hidden_size, device)

    def open_ring(
        self, stored: Any, placement: Any, memory: Any, link_bandwidth: Any, record: Any
    ) -> Ring | None:
        blocks = make_blocks(stored, placement)
        if not blocks:
            return None
        count = placement.num_slots
        slots = [memory.take("staging", placement.block_bytes, PAGE_BYTES) for _ in range(count)]
        return Ring(blocks, [0] * len(blocks), PaperLink(slots), count, torch.bfloat16)


@contextmanager
def paper_engine(artifact: PaperArtifact, method: Method) -> Iterator[tuple[Engine, Simulation]]:
    with (
        simulated(
            total_bytes=96 << 30,
            capability=(9, 0),  # whose workspaces of cuBLAS are the largest
            context_bytes=OVERHEAD_BYTES,
            back=torch.device("meta"),
            keeps=False,
        ) as gpus,
        patch.object(open_model, "ArtifactWeights", PaperWeights),
    ):
        with Engine.open(artifact, OpenOptions(method)) as engine:
            gpus.allocators[0].most_reserved = gpus.allocators[0].reserved
            yield engine, gpus
