"""How the exact weights may lie in the artifact: layers as residuals, layers raw.

A residual costs the link and the memory about half of the bytes, and a decoding at every use. So
where the link is the slower all layers are residuals, where decoding is none, and in between as
many as keep both busy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.model import ModelSpec, Part, StoredPart, padded, parts

# A search asks the same of one model thousands of times, and counting its matrices takes a while.
for_one_model = lru_cache(maxsize=4)

# Bits of a stored weight until it is encoded: normal to Student-t rows give 7.1 to 7.6 in bf16.
RESIDUAL_BITS = {"bfloat16": 7.4, "float16": 10.4, "float32": 23.4}
NUM_SHARES = 8  # of the layers: 0, 1/8, ... 1 of them raw


@dataclass(frozen=True, eq=False)  # compared by identity: it is the key of what is worked out once
class Storage:
    """One way to store the exact weights."""

    parts: tuple[StoredPart, ...]  # in execution order

    @cached_property
    def num_bytes(self) -> int:
        """What would stream if nothing stayed in fast memory."""
        return sum(part.padded_bytes for part in self.parts)

    @cached_property
    def largest_part(self) -> int:
        return max((part.padded_bytes for part in self.parts), default=0)

    @cached_property
    def layer_bytes(self) -> int:
        """Of the largest layer, the head aside."""
        return max((group_bytes(group) for group in self.layers), default=0)

    @cached_property
    def layers(self) -> list[list[StoredPart]]:
        """The head aside."""
        found: dict[int, list[StoredPart]] = {}
        for part in self.parts:
            if part.part.linear.kind != "head":
                found.setdefault(part.part.linear.layer, []).append(part)
        return list(found.values())

    @cached_property
    def num_layers(self) -> int:
        """The head, where it can be streamed, is one of them."""
        return len({part.part.linear.layer for part in self.parts})

    @cached_property
    def residual_layers(self) -> tuple[int, ...]:
        found = {p.part.linear.layer for p in self.parts if p.encoding == "residual"}
        return tuple(sorted(found))

    @cached_property
    def coded_weights(self) -> int:
        """That are decoded at every use."""
        return sum(part.part.num_weights for part in self.parts if part.encoding == "residual")

    @cached_property
    def scratch_bytes(self) -> int:
        """Where one part is decoded at a time; 0: nothing is."""
        coded = [p.part.padded_bytes for p in self.parts if p.encoding == "residual"]
        return max(coded, default=0)

    @property
    def has_residuals(self) -> bool:
        return self.scratch_bytes > 0

    @cached_property
    def bits_per_residual(self) -> float:
        """Of one weight that is stored as a residual, everything counted."""
        coded = sum(part.padded_bytes for part in self.parts if part.encoding == "residual")
        return 8 * coded / self.coded_weights if self.coded_weights else 0.0


def group_bytes(group: Sequence[StoredPart]) -> int:
    return sum(part.padded_bytes for part in group)


def storages(spec: ModelSpec, encoding: str, decodes: bool) -> tuple[Storage, ...]:
    """What a new artifact may choose from, for --encoding auto, residual or raw; as few bytes as
    possible first. decodes: whether the machine can decode residuals at all."""
    if encoding == "residual" and not decodes:
        raise SubspecError(
            Exit.UNSUPPORTED,
            "--encoding residual: this machine has no fast decoder for residuals",
            "install a C++ compiler (g++), or leave the encoding to the plan",
        )
    if encoding == "raw" or not decodes:
        return (raw_storage(spec),)
    if encoding == "residual":
        return usual_storages(spec)[:1]
    return usual_storages(spec)


@for_one_model
def usual_storages(spec: ModelSpec) -> tuple[Storage, ...]:
    """From all layers as residuals to all raw. A raw layer here and there, evenly spread, so that
    neither the link nor the decoder is ever without work."""
    count = spec.num_layers
    raw_counts = sorted({round(count * share / NUM_SHARES) for share in range(NUM_SHARES + 1)})
    found = []
    for num_raw in raw_counts[:-1]:
        raw = {int((i + 0.5) * count / num_raw) for i in range(num_raw)}
        found.append(Storage(tuple(estimated(spec, part, raw) for part in parts(spec))))
    return (*found, raw_storage(spec))


@for_one_model
def raw_storage(spec: ModelSpec) -> Storage:
    return Storage(tuple(StoredPart(part, "raw", part.num_bytes) for part in parts(spec)))


def estimated(spec: ModelSpec, part: Part, raw_layers: set[int]) -> StoredPart:
    """The part before anything is encoded."""
    if part.linear.layer in raw_layers or not part.can_be_residual:
        return StoredPart(part, "raw", part.num_bytes)
    return StoredPart(
        part, "residual", padded(int(part.num_weights * RESIDUAL_BITS[spec.dtype] / 8))
    )
