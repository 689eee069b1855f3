"""A draft's levels as CUDA graphs: the fast twin of `grow` of beam.py.

One by one, the kernels of a level take the host longer to launch than the GPU to run. A graph of
them is launched at once: captured once for the first level and once for the others, replayed for
every level of every round. It reads and writes tensors that stay where they are: the root, how many
tokens are committed, the tree. It attends to a fixed number of live slots, so a longer cache needs
other graphs: live slots are rounded up to few different numbers.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from subspec.artifacts.footprint import GRAPH_SETS, SLOT_ALIGNMENT
from subspec.artifacts.plan import Tree
from subspec.runtime.draft import beam
from subspec.runtime.draft.beam import (
    DraftPass,
    Growing,
    Level,
    TokenTree,
    add_level,
    root_only,
    stops,
)
from subspec.runtime.model.cache import Cache, TreeSlots

LARGEST_STEP = 0.25  # of the live slots: what rounding up adds to them at most

Action = Callable[[], object]
Replay = Callable[[], object]
# The draft model's passes over a tree that lies in these slots of the cache.
PassesOver = Callable[[TreeSlots], DraftPass]


@dataclass
class DraftGraphs:
    """One round at a time: the tree of the round before is overwritten."""

    tree: Tree
    capture: Callable[[Action], Replay]  # records an action without running it
    length: Tensor  # int64 [], committed tokens
    window_base: Tensor  # int64 [], the slot that lies first in layers with windows
    root: Tensor  # int64 [1]
    grown: TokenTree  # all of its rows count as nodes: a graph does not know how many levels follow
    last: Level  # the level that the next replay continues
    children: Tensor  # int64 [k], the nodes that it writes
    # By live slots, the last captured one last: a longer cache forgets the graphs of a short one.
    replays: dict[int, tuple[Replay, Replay]] = field(default_factory=dict)
    problem: str | None = None  # why levels are launched kernel by kernel after all


def make_graphs(
    tree: Tree, verify_width: int, device: torch.device, capture: Callable[[Action], Replay]
) -> DraftGraphs:
    root = torch.zeros(1, dtype=torch.int64, device=device)
    nodes = torch.zeros(tree.width, dtype=torch.int64, device=device)
    scores = torch.zeros(tree.width, device=device)
    return DraftGraphs(
        tree=tree,
        capture=capture,
        length=torch.zeros((), dtype=torch.int64, device=device),
        window_base=torch.zeros((), dtype=torch.int64, device=device),
        root=root,
        grown=replace(root_only(root, verify_width), num_nodes=verify_width),
        last=Level(nodes, scores),
        children=nodes.clone(),
    )


def grow(
    graphs: DraftGraphs, root: Tensor, depth: int, cache: Cache, passes: PassesOver
) -> TokenTree:
    """The tree's first `depth` levels, or fewer if it ends early, behind the committed tokens.
    root int64 [1].

    Where live slots reach a number for the first time a round goes kernel by kernel, which builds
    what is not built yet, and the graphs are captured after it.
    """
    num_rows = len(graphs.grown.tokens)
    usual = cache.tree_slots(num_rows)
    live_slots = min(rounded_up(usual.live_slots), cache.num_slots)
    if depth == 0 or live_slots not in graphs.replays:
        windowed = cache.stretch(live_slots)
        draft_pass = passes(replace(usual, live_slots=live_slots, windowed=windowed))
        [grown] = beam.grow([root], [depth], graphs.tree, num_rows, draft_pass)
        # What was never run has kernels to be chosen and built, which a capture forbids.
        all_ran = grown.num_nodes > 1 + graphs.tree.width or graphs.tree.depth == 1
        if depth > 0 and all_ran and graphs.problem is None:
            capture_levels(graphs, live_slots, cache, passes)
        return grown
    first, following = graphs.replays[live_slots]
    graphs.root.copy_(root)
    graphs.length.fill_(cache.length)
    if cache.windows is not None:
        graphs.window_base.fill_(cache.windows.base)
    num_levels = 0
    while num_levels < depth and not (num_levels and stops(graphs.tree, graphs.last)):
        (following if num_levels else first)()
        num_levels += 1
    return replace(
        graphs.grown, num_nodes=1 + graphs.tree.width * num_levels, num_levels=num_levels
    )


def capture_levels(graphs: DraftGraphs, live_slots: int, cache: Cache, passes: PassesOver) -> None:
    windowed = cache.stretch(live_slots)
    if windowed is not None:
        windowed = replace(windowed, base=graphs.window_base)
    length = graphs.length
    draft_pass = passes(TreeSlots(length, length, live_slots, cache.padding_slot, windowed))
    grown, last, children = graphs.grown, graphs.last, graphs.children
    at_root = Level.of_root(graphs.root.device)

    def add(before: Level) -> None:
        logits = draft_pass([Growing(0, grown, before)])
        level = add_level(grown, before, children, graphs.tree, logits)
        last.nodes.copy_(children)
        last.scores.copy_(level.scores)
        children.add_(graphs.tree.width)

    def first() -> None:
        fresh = root_only(graphs.root, len(grown.tokens))
        grown.tokens.copy_(fresh.tokens)
        grown.parents.copy_(fresh.parents)
        grown.ancestors.copy_(fresh.ancestors)
        grown.depths.copy_(fresh.depths)
        torch.arange(1, graphs.tree.width + 1, out=children)
        add(at_root)

    try:
        at_first = graphs.capture(first)
        others = graphs.capture(lambda: add(last)) if graphs.tree.depth > 1 else at_first
        graphs.replays[live_slots] = at_first, others
        while len(graphs.replays) > GRAPH_SETS:
            del graphs.replays[next(iter(graphs.replays))]
    except RuntimeError as error:
        graphs.problem = f"CUDA graphs cannot be captured: {str(error).partition(chr(10))[0]}"


def rounded_up(live_slots: int) -> int:
    """To a multiple of a step that grows with it, so that a long context has few graphs."""
    step = SLOT_ALIGNMENT
    while 2 * step <= LARGEST_STEP * live_slots:
        step *= 2
    return -(-live_slots // step) * step


@dataclass(frozen=True)
class Captured:
    """A graph, and the action: it owns the tensors whose addresses the graph has."""

    graph: torch.cuda.CUDAGraph
    action: Action

    def __call__(self) -> None:
        self.graph.replay()


def capture_on_gpu(device: torch.device) -> Callable[[Action], Replay]:
    """All graphs take their temporaries from one pool: they never run at the same time."""
    pool = torch.cuda.graph_pool_handle()
    # Its own: torch's is one for the process, of the first GPU that captured. On another GPU what
    # is captured on it is nothing.
    stream = torch.cuda.Stream(device)

    def capture(action: Action) -> Replay:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        # Copies of the ring may go on meanwhile: they are other threads' and other streams'.
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
