"""Cache of one sequence: write, commit, roll back. Draft and verification share it.

B = KV heads, S = slots, D = head size, T = rows
The slot of a committed token is its position. A tree of W nodes lies after the committed tokens,
node i at slot length + i; the last slot takes what padding rows write. Attentions keep tensors of
their own sizes, in execution order; those with windows may have places for a stretch of the slots
only (windows.py). Delta nets have no slots but states (net_state.py).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspec.artifacts.footprint import (
    CHECKPOINT_TOKENS,
    CHECKPOINTS,
    aligned_slots,
    tokens_in_windows,
)
from subspec.artifacts.model import ModelSpec
from subspec.runtime.model.net_state import (
    NetState,
    States,
    Stop,
    Take,
    clear_state,
    commit_nodes,
    copy_state,
    make_state,
)
from subspec.runtime.model.paths import chain_paths
from subspec.runtime.model.windows import WindowSlots


@dataclass(frozen=True)
class Stretch:
    """Slots that a pass attends to in the layers with windows."""

    base: Tensor  # int64 [], the first slot in the stores, on the device
    live_slots: int
    padding_slot: int  # its place in the stores


@dataclass(frozen=True)
class TreeSlots:
    """Slots of a tree in a cache, and the number of committed tokens that it sees; both numbers are
    on the device, where a captured graph reads them."""

    length: Tensor  # int64 [], tokens before the tree
    first: Tensor  # int64 [], slot of the root: behind all that is committed
    live_slots: int  # that a pass over the tree attends to, visible or not
    padding_slot: int
    windowed: Stretch | None = None  # None: layers with windows have all slots


@dataclass(frozen=True)
class Checkpoint:
    """The states of delta nets after so many tokens."""

    length: int
    states: States


@dataclass
class Unread:
    """Hidden states of the last committed tokens that a draft head has not read yet: it reads each
    with the token that follows."""

    rows: Tensor  # [R, H]
    first: int = 0  # the token that the first row is of
    count: int = 0

    def replace(self, first: int, hidden: Tensor) -> None:
        self.rows[: len(hidden)] = hidden
        self.first, self.count = first, len(hidden)

    def reaches(self, length: int) -> bool:
        """Return True if the last row belongs to the last of `length` tokens."""
        return bool(self.count) and self.first + self.count == length


@dataclass(eq=False)  # a sequence's own: two caches are never the same
class Cache:
    keys: tuple[Tensor, ...]  # [B, S, D] of each attention, a draft head's last
    values: tuple[Tensor, ...]
    nets: tuple[NetState, ...] = ()  # of each delta net
    # Of delta nets: states that `roll_back` can restore, ascending; host memory for more of them;
    # those that the next pass makes; and the last two places where a prompt began or ended, whose
    # checkpoints are kept.
    checkpoints: list[Checkpoint] = field(default_factory=list)
    unused: list[States] = field(default_factory=list)
    pending: list[Stop] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # ids whose exact keys and values are committed
    unread: Unread | None = None  # by a draft head; None: no draft head
    windows: WindowSlots | None = None  # None: every attention has all slots

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def num_slots(self) -> int:
        return self.keys[0].shape[1] if self.windows is None else self.windows.text_slots

    @property
    def padding_slot(self) -> int:
        return self.num_slots - 1

    @property
    def conv_kernel_size(self) -> int:
        """Taps of every delta net's convolution."""
        return self.nets[0].weights.conv.shape[-1]

    @property
    def committed_states(self) -> States:
        """Of delta nets; not copies."""
        return tuple(net.committed for net in self.nets)

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    def live_slots(self, end: int) -> int:
        return min(aligned_slots(end), self.num_slots)

    def tree_slots(self, num_rows: int, after: int | None = None) -> TreeSlots:
        """Slots of a tree of `num_rows` rows that follows the first `after` committed tokens, by
        default all. The live slots are those of the whole tree, however much is drafted yet, so
        that every pass of a round has one shape."""
        self.make_room(num_rows)
        assert after is None or self.windows is None or self.windows.reach(after)
        first = torch.full((), self.length, device=self.device)
        length = first if after is None else torch.full((), after, device=self.device)
        live_slots = self.live_slots(self.length + num_rows)
        return TreeSlots(length, first, live_slots, self.padding_slot, self.stretch(live_slots))

    def stretch(self, live_slots: int) -> Stretch | None:
        """The part of the live slots that layers with windows have; its size depends on
        `live_slots` only."""
        windows = self.windows
        if windows is None:
            return None
        base = torch.full((), windows.base, device=self.device)
        return Stretch(base, min(live_slots, windows.num_slots), windows.padding_slot)

    def make_room(self, num_rows: int) -> None:
        """Give the next `num_rows` rows places in the layers with windows, before a pass. If a
        chunk of a prompt has more rows than fit, all tokens that have to be kept then lie in the
        first half of the stores.

        An error does not change what is committed, except where a copy overlaps its source, which
        happens for such chunks only: then the cache is emptied.
        """
        windows = self.windows
        if windows is None or windows.fit(self.length + num_rows):
            return
        if self.length - windows.base <= windows.kept:
            return
        both = zip(self.keys, self.values, strict=True)
        pairs = (pair for index, pair in enumerate(both) if index in windows.attentions)
        overlap = windows.overlap(self.length)
        try:
            windows.move([store for pair in pairs for store in pair], self.length)
        except BaseException:
            if overlap:
                self.roll_back(0)
            raise

    def places(self, attention: int, first: int, end: int) -> slice:
        """Places of the tokens [first, end) in the stores of an attention."""
        if self.windows is None or attention not in self.windows.attentions:
            return slice(first, end)
        return self.windows.places(first, end)

    def write(self, attention: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """keys, values [B, T, D] -> slots [T]. attention: its index in execution order; in one with
        a window slots are places in its stores."""
        for kept, fresh in ((self.keys[attention], keys), (self.values[attention], values)):
            kept.index_copy_(1, slots, fresh.to(kept.dtype))

    def read(self, attention: int, num_slots: int) -> tuple[Tensor, Tensor]:
        """Views [B, num_slots, D] of the first slots."""
        return self.keys[attention][:, :num_slots], self.values[attention][:, :num_slots]

    def commit(self, tokens: list[int], hidden: Tensor | None = None) -> None:
        """Commit `tokens`, whose exact keys and values a pass wrote to the next slots. hidden [R,
        H]: states of the last R tokens, for a draft head, which has read those before."""
        end = self.length + len(tokens)
        if self.windows is not None and not self.windows.fit(end):
            self.windows.jump(end)
        if self.unread is not None and hidden is not None:
            self.unread.replace(end - len(hidden), hidden)
        for net in self.nets:
            copy_state(net.committed, net.read)
        for stop in self.pending:
            self.checkpoints.append(Checkpoint(self.length + stop.num_rows, stop.states))
        self.pending.clear()
        self.tokens.extend(tokens)

    def commit_path(self, path: Tensor, tokens: list[int], hidden: Tensor | None = None) -> None:
        """Move the tree nodes `path` (int64, ascending, on the device, the root first) to the first
        slots of the tree, and commit `tokens`, which are those of its first nodes.

        Rows of `path` beyond them may be anything: their slots are overwritten later. hidden [path,
        H]: for a draft head.
        """
        first, end = self.length, self.length + len(tokens)
        if self.unread is not None and hidden is not None:
            self.unread.replace(first, hidden[: len(tokens)])
        for index, pair in enumerate(zip(self.keys, self.values, strict=True)):
            places = self.places(index, first, first + len(path))
            for kept in pair:  # one at a time: a small temporary
                kept[:, places] = kept.index_select(1, path + places.start)
        if self.nets and tokens:
            paths = chain_paths(len(tokens), self.conv_kernel_size, self.device)
            for net in self.nets:
                commit_nodes(net, path[: len(tokens)], paths)
        self.tokens.extend(tokens)
        if self.nets and end // CHECKPOINT_TOKENS > first // CHECKPOINT_TOKENS:
            self.save()

    def begin_prompt(self, end: int) -> None:
        """Keep checkpoints for a prompt that follows the committed tokens, until another one
        begins: here, as its next version may be an edited question, and after `end` tokens, as the
        next turn differs there. They are made now or when those tokens are read."""
        if not self.nets:
            return
        places = {*self.ends, self.length} | ({end} if end > self.length else set())
        self.ends = sorted(places - {0})[-2:]
        if self.length and (not self.checkpoints or self.checkpoints[-1].length < self.length):
            self.save()

    def save(self) -> None:
        """Make a checkpoint of the committed state."""
        [stop] = self.stops([0])
        copy_states(stop.states, self.committed_states)
        self.checkpoints.append(Checkpoint(self.length, stop.states))
        self.pending.clear()

    def stops(self, num_rows: Sequence[int]) -> list[Stop]:
        """Reserve room for states after these numbers of rows of the next pass, ascending; `commit`
        makes them checkpoints. Room is limited: checkpoints nearest to others are dropped, or not
        made."""
        self.forget_pending()
        lengths = [one.length for one in self.checkpoints]
        lengths += [self.length + count for count in num_rows]
        lengths = thinned(lengths, self.ends, len(self.unused) + len(self.checkpoints))
        self.unused += [one.states for one in self.checkpoints if one.length not in lengths]
        self.checkpoints = [one for one in self.checkpoints if one.length in lengths]
        for count in num_rows:
            if self.length + count in lengths:
                self.pending.append(Stop(count, self.unused.pop()))
        return self.pending

    def forget_pending(self) -> None:
        self.unused += [stop.states for stop in self.pending]
        self.pending.clear()

    def reachable(self, length: int) -> int:
        """Number of tokens, at most `length`, that `roll_back` can keep."""
        if length >= self.length:
            return self.length
        if self.nets:
            before = (one.length for one in self.checkpoints if one.length <= length)
            length = max(before, default=0)
        return length if self.windows is None or self.windows.reach(length) else 0

    def roll_back(self, length: int) -> None:
        """Drop all but the first `length` tokens, which must be `reachable`; their slots are
        reused."""
        assert self.reachable(length) == length
        if self.unread is not None:
            self.unread.count = max(0, min(self.unread.count, length - self.unread.first))
        self.forget_pending()
        self.ends = [one for one in self.ends if one <= length]
        while self.checkpoints and self.checkpoints[-1].length > length:
            self.unused.append(self.checkpoints.pop().states)
        if self.nets and 0 < length < self.length:
            copy_states(self.committed_states, self.checkpoints[-1].states)
        elif not length:  # also of an empty cache: a commit may have failed half way
            for net in self.nets:
                clear_state(net.committed)
        if self.windows is not None and not length:
            self.windows.begin_at(0)
        del self.tokens[length:]

    def resume(
        self, tokens: Sequence[int], checkpoints: Sequence[Checkpoint], window_start: int = 0
    ) -> None:
        """Commit `tokens`, whose exact keys and values the slots already hold; layers with windows
        hold those from `window_start` on. The last checkpoint has the states of delta nets behind
        them."""
        self.roll_back(0)
        assert not tokens or not self.nets or checkpoints[-1].length == len(tokens)
        for one in checkpoints[-CHECKPOINTS:]:
            self.checkpoints.append(Checkpoint(one.length, self.unused.pop()))
            copy_states(self.checkpoints[-1].states, one.states)
        if self.checkpoints:
            copy_states(self.committed_states, self.checkpoints[-1].states)
        self.ends = [one.length for one in self.checkpoints[-2:]]
        if self.windows is not None:
            self.windows.begin_at(window_start)
        self.tokens = list(tokens)

    def common_prefix(self, tokens: list[int]) -> int:
        """Number of leading `tokens` that are committed."""
        for index, (mine, theirs) in enumerate(zip(self.tokens, tokens, strict=False)):
            if mine != theirs:
                return index
        return min(len(self.tokens), len(tokens))


def make_cache(
    spec: ModelSpec,
    num_slots: int,
    take: Take,
    nets: tuple[NetState, ...] = (),
    windowed: tuple[int, Take] | None = None,
) -> Cache:
    """Return an empty cache in memory from `take(shape, dtype)`. nets: one for each delta net.
    windowed: number of slots of layers with windows, and what allocates them; None: all slots, as
    in other layers."""
    assert len(nets) == len(spec.delta_nets)
    on_cpu = nets and nets[0].committed.memory.device.type == "cpu"
    room = take if on_cpu else in_host_memory
    unused = [host_states(spec, room) for _ in range(CHECKPOINTS)] if nets else []
    dtype: torch.dtype = getattr(torch, spec.dtype)
    keys, values, moving = list[Tensor](), list[Tensor](), list[int]()
    for index, attention in enumerate(spec.attentions):
        slots, given = num_slots, take
        if windowed is not None and attention.window is not None:
            moving.append(index)
            slots, given = windowed
        shape = attention.num_kv_heads, slots, attention.head_size
        keys.append(given(shape, dtype))
        values.append(given(shape, dtype))
    windows = None
    if windowed is not None:
        widest, kept = max(spec.windows), tokens_in_windows(spec)
        windows = WindowSlots(frozenset(moving), windowed[0], num_slots, widest, kept)
    return Cache(tuple(keys), tuple(values), nets, unused=unused, windows=windows)


def copy_states(targets: States, sources: States) -> None:
    for target, source in zip(targets, sources, strict=True):
        copy_state(target, source)


def host_states(spec: ModelSpec, take: Take) -> States:
    """Return room for a checkpoint."""
    return tuple(make_state(spec, net, take) for net in spec.delta_nets)


def in_host_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate host memory; the process gets its pages when they are first used."""
    return torch.empty(shape, dtype=dtype)


def thinned(lengths: Sequence[int], kept: Collection[int], most: int) -> list[int]:
    """Return at most `most` (1 or more) of the lengths, ascending. Those nearest to their
    neighbours are dropped first, as they cost the shortest way back. The last one stays, and those
    in `kept` stay as long as there are others."""
    left = list(lengths)
    while len(left) > most:
        gaps = zip(left, [0, *left], left[1:], strict=False)
        free = [(after - before, one) for one, before, after in gaps if one not in kept]
        left.remove(min(free)[1] if free else left[0])
    return left
