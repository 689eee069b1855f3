"""A draft's levels as CUDA graphs: the fast twin of `grow` of beam.py.

Launching the kernels of a level one by one takes the host longer than the GPU takes to run them. A
graph launches them at once: captured once for the first level and once for the others, replayed for
every level of every round. It reads and writes tensors at fixed addresses: for each sequence of the
batch the root, the number of committed tokens, the tree. It attends to a fixed number of live
slots, so a longer cache needs other graphs: live slots are rounded up to few different numbers.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from subspec.artifacts.footprint import GRAPH_SETS, SLOT_ALIGNMENT
from subspec.artifacts.plan import Tree
from subspec.runtime.draft import beam
from subspec.runtime.draft.beam import (
    DraftPass,
    Level,
    PartialTree,
    TokenTree,
    add_level,
    root_only,
    stops,
)
from subspec.runtime.model.cache import Cache, TreeSlots

MAX_STEP = 0.25  # share of the live slots that rounding up adds at most

Action = Callable[[], object]
Replay = Callable[[], object]
# Slots of trees in the caches -> the draft's passes over them.
PassesOver = Callable[[Sequence[TreeSlots]], DraftPass]


@dataclass(frozen=True)
class Buffers:
    """Tensors that the levels of one sequence read and write."""

    length: Tensor  # int64 [], committed tokens
    window_base: Tensor  # int64 [], the slot that lies first in layers with windows
    root: Tensor  # int64 [1]
    grown: TokenTree  # all of its rows count as nodes: a graph does not know how many levels follow
    last: Level  # the level that the next replay continues


@dataclass
class DraftGraphs:
    """Graphs of sequences that draft together. A round overwrites the trees of the one before."""

    tree: Tree
    capture: Callable[[Action], Replay]  # records an action without running it
    buffers: list[Buffers]
    children: Tensor  # int64 [k], the nodes of each tree that the next replay writes
    # By live slots, in order of capture: the oldest are dropped as the caches grow.
    replays: dict[int, tuple[Replay, Replay]] = field(default_factory=dict)
    problem: str | None = None  # why levels are launched kernel by kernel


def make_graphs(
    tree: Tree,
    verify_width: int,
    num_sequences: int,
    device: torch.device,
    capture: Callable[[Action], Replay],
) -> DraftGraphs:
    def buffers() -> Buffers:
        return Buffers(
            length=zeros(),
            window_base=zeros(),
            root=(root := zeros(1)),
            grown=replace(root_only(root, verify_width), num_nodes=verify_width),
            last=Level(zeros(tree.width), torch.zeros(tree.width, device=device)),
        )

    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64, device=device)

    all_buffers = [buffers() for _ in range(num_sequences)]
    return DraftGraphs(tree, capture, all_buffers, children=zeros(tree.width))


def grow(
    graphs: DraftGraphs,
    roots: Sequence[Tensor],
    depths: Sequence[int],
    caches: Sequence[Cache],
    passes: PassesOver,
) -> list[TokenTree]:
    """Grow each tree behind its committed tokens to as many levels as its entry of `depths`, or
    fewer if it ends early. roots: int64 [1] each.

    The first round with a number of live slots runs kernel by kernel, which builds missing kernels;
    the graphs are captured after it. A replay grows all trees: levels behind a tree's end are
    ignored.
    """
    tree, num_rows = graphs.tree, len(graphs.buffers[0].grown.tokens)
    usual = [cache.tree_slots(num_rows) for cache in caches]
    live_slots = min(rounded_up(max(slots.live_slots for slots in usual)), caches[0].num_slots)
    if max(depths) == 0 or live_slots not in graphs.replays:
        slots = [
            replace(tree_slots, live_slots=live_slots, windowed=cache.stretch(live_slots))
            for tree_slots, cache in zip(usual, caches, strict=True)
        ]
        trees = beam.grow(roots, depths, tree, num_rows, passes(slots))
        # The first run chooses and builds kernels, which a capture forbids.
        all_ran = min(grown.num_levels for grown in trees) >= min(2, tree.depth)
        if all_ran and graphs.problem is None:
            capture_levels(graphs, live_slots, caches, passes)
        return trees
    first, following = graphs.replays[live_slots]
    for buffers, root, cache in zip(graphs.buffers, roots, caches, strict=True):
        buffers.root.copy_(root)
        buffers.length.fill_(cache.length)
        if cache.windows is not None:
            buffers.window_base.fill_(cache.windows.base)
    num_levels, growing = [0] * len(depths), [*range(len(depths))]
    for level in range(max(depths)):
        growing = [
            index
            for index in growing
            if level < depths[index] and not (level and stops(tree, graphs.buffers[index].last))
        ]
        if not growing:
            break
        (following if level else first)()
        for index in growing:
            num_levels[index] += 1
    return [
        replace(buffers.grown, num_nodes=1 + tree.width * levels, num_levels=levels)
        for buffers, levels in zip(graphs.buffers, num_levels, strict=True)
    ]


def capture_levels(
    graphs: DraftGraphs, live_slots: int, caches: Sequence[Cache], passes: PassesOver
) -> None:
    slots = list[TreeSlots]()
    for buffers, cache in zip(graphs.buffers, caches, strict=True):
        windowed = cache.stretch(live_slots)
        if windowed is not None:
            windowed = replace(windowed, base=buffers.window_base)
        slots.append(
            TreeSlots(buffers.length, buffers.length, live_slots, cache.padding_slot, windowed)
        )
    draft_pass, tree, children = passes(slots), graphs.tree, graphs.children

    def add(before: Sequence[Level]) -> None:
        growing = [
            PartialTree(index, buffers.grown, last)
            for index, (buffers, last) in enumerate(zip(graphs.buffers, before, strict=True))
        ]
        logits = draft_pass(growing).split([len(last.nodes) for last in before])
        for buffers, last, rows in zip(graphs.buffers, before, logits, strict=True):
            level = add_level(buffers.grown, last, children, tree, rows)
            buffers.last.nodes.copy_(children)
            buffers.last.scores.copy_(level.scores)
        children.add_(tree.width)

    def first() -> None:
        for buffers in graphs.buffers:
            fresh = root_only(buffers.root, len(buffers.grown.tokens))
            buffers.grown.tokens.copy_(fresh.tokens)
            buffers.grown.parents.copy_(fresh.parents)
            buffers.grown.ancestors.copy_(fresh.ancestors)
            buffers.grown.depths.copy_(fresh.depths)
        torch.arange(1, tree.width + 1, out=children)
        add([Level.of_root(buffers.root.device) for buffers in graphs.buffers])

    def others() -> None:
        add([buffers.last for buffers in graphs.buffers])

    try:
        at_first = graphs.capture(first)
        graphs.replays[live_slots] = (
            at_first,
            graphs.capture(others) if tree.depth > 1 else at_first,
        )
        while len(graphs.replays) > GRAPH_SETS:
            del graphs.replays[next(iter(graphs.replays))]
    except RuntimeError as error:
        graphs.problem = f"CUDA graphs cannot be captured: {str(error).partition(chr(10))[0]}"


def rounded_up(live_slots: int) -> int:
    """Round up to a multiple of a step that grows with it, so that a long context has few
    graphs."""
    step = SLOT_ALIGNMENT
    while 2 * step <= MAX_STEP * live_slots:
        step *= 2
    return -(-live_slots // step) * step


@dataclass(frozen=True)
class Captured:
    """A graph and its action, which owns the tensors whose addresses the graph has."""

    graph: torch.cuda.CUDAGraph
    action: Action

    def __call__(self) -> None:
        self.graph.replay()


def capture_on_gpu(device: torch.device) -> Callable[[Action], Replay]:
    """Return a function that captures actions. All graphs take their temporaries from one pool:
    they never run at the same time."""
    pool = torch.cuda.graph_pool_handle()
    # torch's own capture stream belongs to the first GPU that captured: on another GPU it would
    # capture nothing.
    stream = torch.cuda.Stream(device)

    def capture(action: Action) -> Replay:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        # The ring may copy meanwhile, in other threads and on other streams.
        with torch.cuda.device(device):
            try:
                with torch.cuda.graph(
                    graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ):
                    action()
            except BaseException:
                # Where a capture fails torch 2.11 leaves its stream the current one, and goes on
                # allocating for the graph (pytorch/pytorch#180395).
                torch.cuda.set_stream(before)
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(device.index or 0, pool)
                raise
        return Captured(graph, action)

    return capture
