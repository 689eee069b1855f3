"""State of delta nets in a cache: the state behind the committed tokens, and the results of passes
that `commit` needs. delta_net.py has the arithmetic.

A pass only reads the committed state. A chunk of a text writes the state behind it to `read`; the
nodes of a tree keep their inputs, and committing a path of them replays these.
T = rows, W = rows of a tree, C = channels, K = taps, G / J = key / value heads, E / F = their sizes
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.artifacts.footprint import NET_ROWS
from subspec.artifacts.model import DeltaNet, ModelSpec, layer_name
from subspec.runtime.model.delta_net import (
    DeltaInputs,
    DeltaState,
    DeltaWeights,
    End,
    commit,
    delta_net,
)
from subspec.runtime.model.paths import Paths, chain_paths

Take = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True)
class NetState:
    """One delta net's part of a cache."""

    weights: DeltaWeights
    committed: DeltaState
    read: DeltaState  # behind the chunk of a text that a pass has read
    nodes: DeltaInputs  # [W, ...], of the tree that a pass has run
    # What a draft keeps of its nodes
    keys: Tensor  # f32 [G, W, E]
    updates: Tensor  # f32 [J, W, F]
    path_decays: Tensor  # f32 [J, W], logs, from the root on


@dataclass(frozen=True)
class TreeNodes:
    """Rows of a tree, the rows that they follow, and how delta nets run along them."""

    nodes: Tensor  # int64 [T], the rows' numbers in the tree
    parents: Tensor  # int64 [T], of those rows; a root's is itself
    above: Tensor  # bool [T, W], the nodes that each row follows
    windows: (
        Tensor  # int64 [T, K]: inputs of its convolution, among the last K - 1 rows and the tree's
    )
    paths: Paths | None = None  # of an exact pass; None: a draft's
    # Number of a draft's leading rows, whose parents have run before; each other row follows the
    # row before it, or the first. None: all of them.
    num_together: int | None = None


States = tuple[DeltaState, ...]  # of each delta net


@dataclass(frozen=True)
class Stop:
    """A number of rows of a chunk, after which the states are copied to `states`."""

    num_rows: int
    states: States


@dataclass(frozen=True)
class Cut:
    """Rows of a chunk that each delta net takes in one call."""

    rows: slice
    paths: Paths
    stops: Sequence[Stop]  # behind them


def cuts_of(
    num_rows: int, stops: Sequence[Stop], conv_kernel_size: int, device: torch.device
) -> list[Cut]:
    """Cut T >= 1 consecutive rows at `stops` and into bounded calls, which changes no bit."""
    ends = {*range(NET_ROWS, num_rows, NET_ROWS), num_rows, *(stop.num_rows for stop in stops)}
    found, first = list[Cut](), 0
    for last in sorted(ends):
        paths = chain_paths(last - first, conv_kernel_size, device)
        behind = [stop for stop in stops if stop.num_rows == last]
        found.append(Cut(slice(first, last), paths, behind))
        first = last
    return found


def run_chunk(
    state: NetState, index: int, inputs: DeltaInputs, z: Tensor, cuts: Sequence[Cut]
) -> None:
    """Run rows of a chunk. The outputs replace z [T, J F]. index: the net's in stops."""
    before = state.committed
    for cut in cuts:
        some, last = cut.rows, len(cut.paths) - 1
        ends = [End(last, state.read), *(End(last, stop.states[index]) for stop in cut.stops)]
        z[some] = delta_net(state.weights, before, cut.paths, slice_of(inputs, some), z[some], ends)
        before = state.read


def run_tree(state: NetState, inputs: DeltaInputs, z: Tensor, tree: TreeNodes) -> None:
    """Run a tree's rows, each behind its parent. The outputs replace z [T, J F]; inputs are kept
    for `commit_nodes`."""
    assert tree.paths is not None
    for kept, fresh in zip(tensors_of(state.nodes), tensors_of(inputs), strict=True):
        kept[: len(fresh)] = fresh
    z.copy_(delta_net(state.weights, state.committed, tree.paths, inputs, z))


def commit_nodes(state: NetState, path: Tensor, paths: Paths) -> None:
    """Commit the nodes `path` of the tree that was run: int64 [T], on the device, the root first.
    paths: a chain of T rows."""
    kept = DeltaInputs(*(one.index_select(0, path) for one in tensors_of(state.nodes)))
    commit(state.weights, state.committed, paths, kept)


def copy_state(target: DeltaState, source: DeltaState) -> None:
    target.conv.copy_(source.conv)
    target.memory.copy_(source.memory)


def copied_states(nets: Sequence[NetState]) -> States:
    """Return a copy of the committed states in host memory."""
    return tuple(
        DeltaState(
            *(one.to("cpu", copy=True) for one in (net.committed.conv, net.committed.memory))
        )
        for net in nets
    )


def clear_state(state: DeltaState) -> None:
    state.conv.zero_()
    state.memory.zero_()


def slice_of(inputs: DeltaInputs, some: slice) -> DeltaInputs:
    return DeltaInputs(*(one[some] for one in tensors_of(inputs)))


def tensors_of(inputs: DeltaInputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.qkv, inputs.b, inputs.a


# Made when a model is opened


def make_net_states(
    spec: ModelSpec, verify_width: int, tensors: Mapping[str, Tensor], take: Take
) -> tuple[NetState, ...]:
    """Return empty states in memory from `take(shape, dtype)`, which must be zeros. tensors: the
    artifact's resident tensors by name."""
    return tuple(
        _net_state(spec, net, f"{layer_name(index)}.{net.name}", verify_width, tensors, take)
        for index, layer in enumerate(spec.layers)
        for net in layer.delta_nets
    )


def _net_state(
    spec: ModelSpec,
    net: DeltaNet,
    name: str,
    width: int,
    tensors: Mapping[str, Tensor],
    take: Take,
) -> NetState:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    heads = (width, net.num_value_heads)
    return NetState(
        DeltaWeights(
            tensors[f"{name}.conv1d.weight"],
            tensors[f"{name}.A_log"],
            tensors[f"{name}.dt_bias"],
            tensors[f"{name}.norm.weight"],
            spec.norm.epsilon,
        ),
        make_state(spec, net, take),
        make_state(spec, net, take),
        DeltaInputs(take((width, net.num_channels), dtype), take(heads, dtype), take(heads, dtype)),
        take((net.num_key_heads, width, net.key_size), torch.float32),
        take((net.num_value_heads, width, net.value_size), torch.float32),
        take((net.num_value_heads, width), torch.float32),
    )


def make_state(spec: ModelSpec, net: DeltaNet, take: Take) -> DeltaState:
    recent = take((net.conv_kernel_size - 1, net.num_channels), getattr(torch, spec.dtype))
    return DeltaState(recent, take(net.memory_shape, torch.float32))
