"""How the exact weights may lie in the artifact: some as residuals, some raw.

A residual costs the link and the memory about half of the bytes, and a decoding at every use. So
where the link is the slower all weights are residuals, where decoding is none, and in between as
many as keep both busy. An artifact that is there already keeps its residuals: where memory is left
and decoding is the slower, some are decoded once, while loading, and fast memory holds the weights.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import HEAD, ModelSpec, Part, StoredPart, padded

# A search asks the same of one model thousands of times, and counting its matrices takes a while.
for_one_model = lru_cache(maxsize=4)

# Bits of a stored weight until it is encoded: normal to Student-t rows give 7.1 to 7.6 in bf16.
RESIDUAL_BITS = {"bfloat16": 7.4, "float16": 10.4, "float32": 23.4}
NUM_SHARES = 8  # of the weights: 0, 1/8, ... 1 of them raw; of the residuals: held decoded


@dataclass(frozen=True, eq=False)  # compared by identity: it is the key of what is worked out once
class Storage:
    """One way to store the exact weights, and which of their residuals fast memory holds decoded,
    whatever else stays there."""

    parts: tuple[StoredPart, ...]  # in execution order
    decoded: tuple[str, ...] = ()  # residuals that are decoded while loading; in execution order

    @cached_property
    def as_stored(self) -> tuple[StoredPart, ...]:
        """The parts that stream, or stay, as they are stored: all but those held decoded."""
        decoded = set(self.decoded)
        return tuple(part for part in self.parts if part.name not in decoded)

    @cached_property
    def decoded_bytes(self) -> int:
        """Of fast memory, for the parts that are held decoded."""
        decoded = set(self.decoded)
        return sum(part.part.padded_bytes for part in self.parts if part.name in decoded)

    @cached_property
    def num_bytes(self) -> int:
        """What would stream if nothing else stayed in fast memory."""
        return group_bytes(self.as_stored)

    @cached_property
    def largest_part(self) -> int:
        """Of those that may stream."""
        return max((part.padded_bytes for part in self.as_stored), default=0)

    @cached_property
    def layer_bytes(self) -> int:
        """Of the largest layer, without the head."""
        return max((group_bytes(group) for group in self.layers), default=0)

    @cached_property
    def layers(self) -> list[list[StoredPart]]:
        """What may stream of each, without the head."""
        found: dict[int, list[StoredPart]] = {}
        for part in self.as_stored:
            if part.part.linear.name != HEAD:
                found.setdefault(part.part.linear.layer, []).append(part)
        return list(found.values())

    @cached_property
    def resident_first(self) -> list[StoredPart]:
        """What may stream, in the order in which more and more of it stays in fast memory.

        The first matrix of every layer, then the second, each in layers that are evenly spread: so
        all layers stream about the same, in one piece, and neither the link nor compute is without
        work for longer than a part of a layer.
        """
        order = {layer: rank for rank, layer in enumerate(evenly_spread(self._num_layers))}

        def rank(part: StoredPart) -> tuple[bool, int, int, int]:
            linear = part.part.linear
            is_head = linear.name == HEAD
            return is_head, linear.place, part.part.first_row, order[linear.layer]

        return sorted(self.as_stored, key=rank)

    @cached_property
    def _num_layers(self) -> int:
        return 1 + max((part.part.linear.layer for part in self.parts), default=0)

    @cached_property
    def residuals(self) -> tuple[str, ...]:
        """Names of the parts that are stored as residuals, those held decoded among them."""
        return tuple(part.name for part in self.parts if part.encoding == "residual")

    @cached_property
    def coded_weights(self) -> int:
        """That are decoded at every use."""
        return sum(p.part.num_weights for p in self.as_stored if p.encoding == "residual")

    @cached_property
    def scratch_bytes(self) -> int:
        """Where one part is decoded at a time; 0: nothing is."""
        coded = [p.part.padded_bytes for p in self.as_stored if p.encoding == "residual"]
        return max(coded, default=0)

    @cached_property
    def bits_per_residual(self) -> float:
        """Of one weight that is stored as a residual, everything counted."""
        coded = [part for part in self.parts if part.encoding == "residual"]
        num_weights = sum(part.part.num_weights for part in coded)
        return 8 * group_bytes(coded) / num_weights if num_weights else 0.0


def choose_resident(storage: Storage, num_bytes: int) -> list[StoredPart]:
    """Parts that fill `num_bytes` as they are stored, in execution order.

    Greedy in an order that does not depend on `num_bytes`: more bytes never hold less.
    """
    left, chosen = num_bytes, set[str]()
    for part in storage.resident_first:
        if part.padded_bytes <= left:
            left -= part.padded_bytes
            chosen.add(part.name)
    return [part for part in storage.as_stored if part.name in chosen]


def evenly_spread(count: int) -> list[int]:
    """0 .. count - 1 in an order whose every beginning is spread over the whole: that of the
    reversed bits."""
    digits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda index: f"{index:0{digits}b}"[::-1])


def group_bytes(group: Iterable[StoredPart]) -> int:
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
        return held_decoded(usual_storages(spec)[0])
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
    every = spec.parts
    raw = set(evenly_raw(every, raw_share))
    for part in every:
        if part in raw:
            yield StoredPart(part, "raw", part.num_bytes)
        else:
            bits = part.num_weights * RESIDUAL_BITS[spec.dtype]
            yield StoredPart(part, "residual", padded(int(bits / 8)))


def evenly_raw(some: Iterable[Part], share: float) -> Iterator[Part]:
    """A share of their bytes, evenly spread over their order; what can be nothing but raw is among
    it whatever the share."""
    due = 0.0  # bytes that should have been raw by now
    for part in some:
        due += share * part.num_bytes
        if due >= part.num_bytes / 2 or not part.can_be_residual:
            due -= part.num_bytes
            yield part


@for_one_model
def held_decoded(storage: Storage) -> tuple[Storage, ...]:
    """The storage with none of its residuals held decoded, then more and more, then all."""
    coded = [part.part for part in storage.parts if part.encoding == "residual"]
    found: dict[tuple[str, ...], Storage] = {(): storage}
    for share in range(1, NUM_SHARES + 1):
        decoded = tuple(part.name for part in evenly_raw(coded, share / NUM_SHARES))
        found.setdefault(decoded, replace(storage, decoded=decoded))
    return tuple(found.values())


@for_one_model
def raw_storage(spec: ModelSpec) -> Storage:
    return Storage(tuple(StoredPart(part, "raw", part.num_bytes) for part in spec.parts))
