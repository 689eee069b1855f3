"""Storage of the exact weights in an artifact: some parts as residuals, some raw.

A residual takes about half of the bytes on the link and in memory, and is decoded at every use. So
all weights are residuals if the link is slow, none if decoding is slow, and in between as many as
keep both busy. An existing artifact keeps its residuals: if memory is left and decoding is slow,
some are decoded once, while loading, and are resident as exact weights. Those of FP8 matrices come
in two sizes: as FP8 codes, which are multiplied by their scales at every use, or dequantized
once and for all, in twice the bytes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.footprint import draft_head_bytes, norms_bytes, substitutes_bytes
from subspec.artifacts.model import HEAD, Encoding, ModelSpec, Part, StoredPart, padded

# A search needs these thousands of times for one model, and iterating over its matrices is slow.
for_one_model = lru_cache(maxsize=4)

# Bits of a stored weight until it is encoded: normal to Student-t rows give 7.1 to 7.6 in bf16.
RESIDUAL_BITS = {"bfloat16": 7.4, "float16": 10.4, "float32": 23.4}
FP8_RESIDUAL_BITS = 3.3  # normal rows give 3.0, heavier tails 3.5
NUM_SHARES = 8  # steps: 0, 1/8, ... 1 of the weights raw, or decoded, or dequantized


@dataclass(frozen=True, eq=False)  # compared by identity: it is the key of what is worked out once
class Storage:
    """One way to store the exact weights, and which of them are decoded while loading. Names are in
    execution order."""

    parts: tuple[StoredPart, ...]  # in execution order
    decoded: tuple[str, ...] = ()  # while loading: residuals, and what is dequantized
    dequantized: tuple[str, ...] = ()  # of `decoded`: those of FP8 matrices, to 16 bits

    @cached_property
    def as_stored(self) -> tuple[StoredPart, ...]:
        """Parts that stream, or are resident, as they are stored: all but the decoded ones."""
        decoded = set(self.decoded)
        return tuple(part for part in self.parts if part.name not in decoded)

    @cached_property
    def decoded_bytes(self) -> int:
        """Fast memory of the parts that are decoded while loading."""
        decoded, dequantized = set(self.decoded), set(self.dequantized)
        return sum(
            padded(one.part.num_bytes if one.name in dequantized else one.part.plain_bytes)
            for one in self.parts
            if one.name in decoded
        )

    @cached_property
    def num_bytes(self) -> int:
        """Bytes that stream if nothing but decoded parts is resident."""
        return group_bytes(self.as_stored)

    @cached_property
    def largest_part(self) -> int:
        """Padded bytes of the largest part that may stream."""
        return max((part.padded_bytes for part in self.as_stored), default=0)

    @cached_property
    def layer_bytes(self) -> int:
        """Bytes of the largest layer, without the head."""
        return max((group_bytes(group) for group in self.layers), default=0)

    @cached_property
    def layers(self) -> list[list[StoredPart]]:
        """Parts of each layer that may stream, without the head."""
        found: dict[int, list[StoredPart]] = {}
        for part in self.as_stored:
            if part.part.linear.name != HEAD:
                found.setdefault(part.part.linear.layer, []).append(part)
        return list(found.values())

    @cached_property
    def resident_first(self) -> list[StoredPart]:
        """Parts that may stream, in the order in which they become resident as memory grows.

        The first matrix of every layer, then the second, each in evenly spread layers. So all
        layers stream about the same amount, in one piece, and neither the link nor compute is idle
        for longer than a part of a layer.
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
        """Names of the parts that are stored as residuals, decoded ones included."""
        return tuple(part.name for part in self.parts if part.is_residual)

    @cached_property
    def used_as(self) -> dict[Encoding, int]:
        """Number of weights by the encoding that they have at every use."""
        decoded, dequantized = set(self.decoded), set(self.dequantized)
        found = dict[Encoding, int]()
        for one in self.parts:
            encoding = one.part.plain_encoding if one.name in decoded else one.encoding
            encoding = "raw" if one.name in dequantized else encoding
            found[encoding] = found.get(encoding, 0) + one.part.num_weights
        return found

    @cached_property
    def coded_weights(self) -> int:
        """Number of weights that are decoded from residuals at every use."""
        return sum(part.part.num_weights for part in self.as_stored if part.is_residual)

    @cached_property
    def scratch_bytes(self) -> int:
        """Bytes of the largest part that is decoded at its use; 0: none is."""
        decoded, dequantized = set(self.decoded), set(self.dequantized)
        coded = (
            one.part.padded_bytes
            for one in self.parts
            if (one.is_residual and one.name not in decoded)
            or (one.part.linear.fp8 and one.name not in dequantized)
        )
        return max(coded, default=0)

    @cached_property
    def bits_per_residual(self) -> float:
        """Bits per weight of all residuals, indexes and padding included."""
        coded = [part for part in self.parts if part.is_residual]
        num_weights = sum(part.part.num_weights for part in coded)
        return 8 * group_bytes(coded) / num_weights if num_weights else 0.0


def choose_resident(storage: Storage, num_bytes: int) -> list[StoredPart]:
    """Parts that fill `num_bytes` as they are stored, in execution order.

    Greedy, in an order that does not depend on `num_bytes`.
    """
    left, chosen = num_bytes, set[str]()
    for part in storage.resident_first:
        if part.padded_bytes <= left:
            left -= part.padded_bytes
            chosen.add(part.name)
    return [part for part in storage.as_stored if part.name in chosen]


def evenly_spread(count: int) -> list[int]:
    """0 .. count - 1 in bit-reversed order, of which every prefix is spread over the whole
    range."""
    digits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda index: f"{index:0{digits}b}"[::-1])


def group_bytes(group: Iterable[StoredPart]) -> int:
    return sum(part.padded_bytes for part in group)


def storages(spec: ModelSpec, encoding: str, decodes: bool) -> tuple[Storage, ...]:
    """Storages that a new artifact may have with --encoding auto, residual or raw, fewest bytes
    first, and then those with FP8 weights dequantized. decodes: whether this machine has a fast
    decoder. Raises SubspecError(UNSUPPORTED) for residuals without one."""
    if encoding == "residual" and not decodes:
        raise SubspecError(
            Exit.UNSUPPORTED,
            "--encoding residual: this machine has no fast decoder for residuals",
            "install a C++ compiler (g++), or use --encoding auto",
        )
    if encoding == "raw" or not decodes:
        return held_decoded(raw_storage(spec))
    if encoding == "residual":
        return held_decoded(usual_storages(spec)[0])
    return any_storages(spec)


@for_one_model
def any_storages(spec: ModelSpec) -> tuple[Storage, ...]:
    usual = usual_storages(spec)
    bytes_of = ((some, tuple(p.name for p in some.parts if p.encoding == "fp8")) for some in usual)
    dequantized = (
        with_dequantized(some, names) for some, names in bytes_of if names and some.residuals
    )
    return (*usual, *dequantized, *held_decoded(raw_storage(spec))[1:])


@for_one_model
def usual_storages(spec: ModelSpec) -> tuple[Storage, ...]:
    """Storages from all weights as residuals to all raw. Raw matrices are evenly spread by bytes,
    so that neither the link nor the decoder is idle."""
    found: dict[tuple[str, ...], Storage] = {}
    for share in range(NUM_SHARES):
        storage = Storage(tuple(spread(spec, share / NUM_SHARES)))
        found.setdefault(storage.residuals, storage)
    found[()] = raw_storage(spec)
    return tuple(found.values())


def spread(spec: ModelSpec, raw_share: float) -> Iterator[StoredPart]:
    """The parts, a share of their bytes raw, the others with the usual size of residuals."""
    every = spec.parts
    raw = set(evenly_raw(every, raw_share))
    for part in every:
        yield plainly(part) if part in raw else usual_residual(spec, part)


def usual_residual(spec: ModelSpec, part: Part) -> StoredPart:
    each = FP8_RESIDUAL_BITS if part.linear.fp8 else RESIDUAL_BITS[spec.dtype]
    return StoredPart(part, part.residual_encoding, padded(int(part.num_weights * each / 8)))


def storage_with(spec: ModelSpec, residuals: tuple[str, ...]) -> Storage:
    """The storage of which these parts are residuals, of the usual size."""
    coded = set(residuals)
    return Storage(
        tuple(
            usual_residual(spec, part) if part.name in coded else plainly(part)
            for part in spec.parts
        )
    )


def artifact_bytes(spec: ModelSpec, stored: Storage, draft_model: ModelSpec | None) -> int:
    """Size of the weights on disk. Substitutes are stored as ATen's kernels read them."""
    total = sum(part.padded_bytes for part in stored.parts)
    total += draft_head_bytes(spec) + sum(
        substitutes_bytes(one, "aten") + norms_bytes(one) + one.embedding_bytes
        for one in (spec, draft_model)
        if one is not None
    )
    return total


def evenly_raw(some: Iterable[Part], share: float) -> Iterator[Part]:
    """A share of the bytes of the parts, evenly spread; parts that cannot be residuals are always
    included."""
    due = 0.0  # bytes that should have been raw by now
    for part in some:
        due += share * part.plain_bytes
        if due >= part.plain_bytes / 2 or not part.can_be_residual:
            due -= part.plain_bytes
            yield part


@for_one_model
def held_decoded(storage: Storage) -> tuple[Storage, ...]:
    """The storage with none, then more and more, then all of its residuals decoded while loading;
    likewise with FP8 matrices dequantized: first beside residuals, then beside FP8 codes."""
    shares = [share / NUM_SHARES for share in range(1, NUM_SHARES + 1)]
    coded = [part.part for part in storage.parts if part.is_residual]
    packed = [part.part for part in storage.parts if part.part.linear.fp8]
    ways = [storage]
    for share in shares:
        decoded = tuple(part.name for part in evenly_raw(coded, share))
        ways.append(replace(storage, decoded=decoded))
    for all_decoded in (storage, ways[-1]):
        for share in shares if packed else ():
            dequantized = tuple(part.name for part in evenly_raw(packed, share))
            ways.append(with_dequantized(all_decoded, dequantized))
    found = dict[tuple[tuple[str, ...], tuple[str, ...]], Storage]()
    for way in ways:
        found.setdefault((way.decoded, way.dequantized), way)
    return tuple(found.values())


def with_dequantized(storage: Storage, names: tuple[str, ...]) -> Storage:
    """The storage with these parts of FP8 matrices dequantized while loading."""
    chosen = {*storage.decoded, *names}
    decoded = tuple(part.name for part in storage.parts if part.name in chosen)
    return replace(storage, decoded=decoded, dequantized=names)


@for_one_model
def raw_storage(spec: ModelSpec) -> Storage:
    return Storage(tuple(map(plainly, spec.parts)))


def plainly(part: Part) -> StoredPart:
    """The part stored as in the checkpoint."""
    return StoredPart(part, part.plain_encoding, part.plain_bytes)
