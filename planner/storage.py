"""How the exact weights may lie in the artifact: some as residuals, some raw.

A residual costs the link and the memory about half of the bytes, and a decoding at every use. So
where the link is the slower all weights are residuals, where decoding is none, and in between as
many as keep both busy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.model import ModelSpec, StoredPart, padded, parts

# A search asks the same of one model thousands of times, and counting its matrices takes a while.
for_one_model = lru_cache(maxsize=4)

# Bits of a stored weight until it is encoded: normal to Student-t rows give 7.1 to 7.6 in bf16.
RESIDUAL_BITS = {"bfloat16": 7.4, "float16": 10.4, "float32": 23.4}
NUM_SHARES = 8  # of the weights: 0, 1/8, ... 1 of them raw


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
    def residuals(self) -> tuple[str, ...]:
        """Names of the parts that are stored as residuals."""
        return tuple(part.name for part in self.parts if part.encoding == "residual")

    @cached_property
    def coded_weights(self) -> int:
        """That are decoded at every use."""
        return sum(part.part.num_weights for part in self.parts if part.encoding == "residual")

    @cached_property
    def scratch_bytes(self) -> int:
        """Where one part is decoded at a time; 0: nothing is."""
        coded = [p.part.padded_bytes for p in self.parts if p.encoding == "residual"]
        return max(coded, default=0)

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
    """From all weights as residuals to all raw. A raw matrix here and there, evenly spread by
    bytes, so that neither the link nor the decoder is ever without work."""
    found: dict[tuple[str, ...], Storage] = {}
    for share in range(NUM_SHARES):
        storage = Storage(tuple(spread(spec, share / NUM_SHARES)))
        found.setdefault(storage.residuals, storage)
    found[()] = raw_storage(spec)
    return tuple(found.values())


def spread(spec: ModelSpec, raw_share: float) -> Iterator[StoredPart]:
    """The parts, a share of their bytes raw; the others as long as residuals usually are."""
    due = 0.0  # bytes that should have been raw by now
    for part in parts(spec):
        due += raw_share * part.num_bytes
        if due >= part.num_bytes / 2 or not part.can_be_residual:
            due -= part.num_bytes
            yield StoredPart(part, "raw", part.num_bytes)
        else:
            bits = part.num_weights * RESIDUAL_BITS[spec.dtype]
            yield StoredPart(part, "residual", padded(int(bits / 8)))


@for_one_model
def raw_storage(spec: ModelSpec) -> Storage:
    return Storage(tuple(StoredPart(part, "raw", part.num_bytes) for part in parts(spec)))
