"""Times the terms of a model's passes on this machine: layers, attention and heads of an excerpt of
the model, with the runtime's kernels.

`measure.py` decides what is timed for a profile, and how often.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor

from subspec.artifacts.footprint import (
    CATCH_UP_ROWS,
    Shape,
    cache_slots,
    make_ledger,
    substitutes_bytes,
)
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import DeviceKind, Int4Kernel, Ledger, Placement, Tree
from subspec.artifacts.profile import LIVE_TOKENS, MIN_SECONDS, MORE_TOKENS, Timing, seconds_at
from subspec.planner.machine.batch_invariance import rows_at_any_place
from subspec.planner.machine.compile_graphs import compile_graphs
from subspec.planner.machine.excerpt import (
    RandomWeights,
    excerpt,
    num_layers_of_every_kind,
    random_rows,
)
from subspec.planner.machine.timing import USUAL_EFFORT, Effort, time_each, time_widths
from subspec.planner.solve.storage import raw_storage
from subspec.runtime.draft import compiled_graphs
from subspec.runtime.draft.beam import PartialTree, grow, root_only
from subspec.runtime.draft.compiled_graphs import CompiledGraphs, load_graphs, serves
from subspec.runtime.draft.compiled_layers import compile_layers, run_layers
from subspec.runtime.draft.delta_draft import run_draft
from subspec.runtime.draft.drafter import drafted_rows
from subspec.runtime.draft.graphs import Action, Replay, capture_on_gpu
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.exact_pass import causal_rows, whole_tree
from subspec.runtime.kernels import gemlite_kernel, int4
from subspec.runtime.kernels.linear import gemm_ranges, single_row_kernels
from subspec.runtime.load import (
    DRAFT_DTYPE,
    biases_of,
    make_substitutes,
    place_resident,
    place_substitutes,
    place_tensors,
    unplaced_weights,
)
from subspec.runtime.memory import FastMemory
from subspec.runtime.model.attention import attend, attend_batch_invariant
from subspec.runtime.model.cache import make_cache
from subspec.runtime.model.net_state import commit_nodes, make_net_states
from subspec.runtime.model.paths import chain_paths
from subspec.runtime.model.sampling import Sampler, SamplingParams
from subspec.runtime.model.transformer import (
    Attend,
    Pass,
    Product,
    Rows,
    SharedWeights,
    add_layer,
    embed,
    forward,
    make_shared,
    make_tables,
    to_logits,
)
from subspec.runtime.stream.exact_weights import ExactWeights
from subspec.runtime.verify import accept

# Numbers of rows that are timed; others are interpolated (`seconds_at`).
EXACT_WIDTHS = (8, 16, 32, 64, 104)  # the last: trees 4 wide and 24 deep
CUDA_WIDTHS = (200, 400)  # with fewer rows a GPU may be memory-bound, so the slope is unknown
DRAFT_WIDTHS = (1, 2, 4, 8, 16)
CUDA_DRAFT_WIDTHS = (64,)  # likewise: several answers, or a wide tree
DRAFT_LEVELS = 5  # of the trees that are grown to time one level
ACCEPT_DEPTH = 12  # levels of an accepted path that are moved in the cache, as in a usual round
ATTENTION_WIDTHS = (1, 8, 64)
FAST_WIDTHS = (1, 16, 128)  # a token of plain decoding; prompts
CUDA_FAST_WIDTHS = (512,)  # likewise
LOADED_WIDTH = 32  # rows of the layers that are timed while the link is busy
# Verify widths that are tried, denser at usual sizes of trees; the last: 8 wide, 48 deep.
PADDED_WIDTHS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 104, 128, 160, 200, 256, 304, 400)
USUAL_WIDTH = 128  # wider ones are tried only within Effort.place_seconds


@dataclass(frozen=True)
class DraftTimings:
    """Timings of one level of a draft, by its number of rows."""

    layer: tuple[Timing, ...]
    attention: tuple[Timing, ...]  # MORE_TOKENS more in the cache, in one layer
    head: tuple[Timing, ...]  # everything outside the layers


class Bench:
    """An excerpt of the model in fast memory, as the engine loads it, with LIVE_TOKENS in its
    cache."""

    def __init__(
        self, spec: ModelSpec, device: torch.device, effort: Effort = USUAL_EFFORT
    ) -> None:
        self.effort = effort
        self.full_spec, self.spec, self.device = spec, excerpt(spec), device
        self.head_share = self.spec.vocab_size / spec.vocab_size
        self.exact_widths = EXACT_WIDTHS + (CUDA_WIDTHS if device.type == "cuda" else ())
        # Short calls are rarely disturbed, but layers that differ count by their shares; on cuda
        # long calls hide kernel launches.
        period = num_layers_of_every_kind(self.spec) if self.spec.delta_nets else 1
        self.layers_per_call = self.spec.num_layers if device.type == "cuda" else period
        dtype: torch.dtype = getattr(torch, spec.dtype)
        held, widest = LIVE_TOKENS + MORE_TOKENS, max(PADDED_WIDTHS)
        stored = raw_storage(self.spec)
        shape = Shape(held, 1, widest, 1, 1, 1, 1, keeps_all_tokens=True)
        kind: DeviceKind = "cuda" if device.type == "cuda" else "cpu"
        purposes = make_ledger(self.spec, kind, "aten", shape, 0, 0)
        purposes = replace(purposes, substitutes=0, resident=stored.num_bytes)
        self.memory = FastMemory(device, purposes)
        self.files = RandomWeights(dtype)
        self.tensors = place_tensors(self.spec, self.memory, self.files)
        self.unplaced = unplaced_weights(self.spec, self.tensors)
        names = tuple(part.name for part in stored.parts)
        placement = Placement(names, (), 0, 0, purposes)
        self.resident = place_resident(self.spec, stored.parts, placement, self.memory, self.files)
        biases = biases_of(self.spec, self.tensors)
        self.exact = ExactWeights(
            self.spec, stored.parts, self.unplaced, self.resident, biases, None
        )
        slots = cache_slots(held, widest)

        def carved(size: tuple[int, ...], kept: torch.dtype) -> Tensor:
            return self.memory.take_tensor("cache", size, kept)

        nets = make_net_states(self.spec, widest, self.tensors, carved)
        self.cache = make_cache(self.spec, slots, carved, nets)
        self.cache.commit([0] * LIVE_TOKENS)
        if nets:
            self.cache.save()  # to be rolled back to
        rows = random_rows(self.spec, device)
        tables = make_tables(self.spec, slots, dtype, self._keep)
        self.weights = make_shared(self.spec, rows, self.tensors, tables, dtype, self._keep)
        self.draft_weights = self.weights
        if dtype != DRAFT_DTYPE:
            if not self.spec.rope_in_f32:
                tables = make_tables(self.spec, slots, DRAFT_DTYPE, self._keep)
            self.draft_weights = make_shared(
                self.spec, rows, self.tensors, tables, DRAFT_DTYPE, self._keep
            )

    def exact_timings(self) -> tuple[tuple[Timing, ...], tuple[Timing, ...]]:
        """Timings of one exact layer, and of the rest of a verification: embedding, head,
        argmax."""
        through_head = self._through_head(self.weights, self.exact)

        def head(width: int) -> Callable[[], object]:
            return lambda: through_head(self._tree_rows(width)).argmax(-1)

        layers = {
            width: self._layers(self.weights, self.exact, self._tree_rows(width))
            for width in self.exact_widths
        }
        heads = {width: head(width) for width in self.exact_widths}
        return self._timed(layers, heads, 1, self.layers_per_call)

    def fast_timings(self) -> tuple[tuple[Timing, ...], float]:
        """Timings of an exact layer without padding (one row of plain decoding, more of a prompt),
        and seconds of the head at one row."""
        of_prompts = FAST_WIDTHS[1:] + (CUDA_FAST_WIDTHS if self.device.type == "cuda" else ())
        layers = {
            width: self._layers(
                self.weights, self.exact, self._causal_rows(width, attend_batch_invariant)
            )
            for width in of_prompts
        }
        layers[1] = self._layers(self.weights, self.exact, self._causal_rows(1, attend))
        through_head = self._through_head(self.weights, self.exact)
        actions: list[Callable[[], object]] = [
            layers[1],
            lambda: Sampler(SamplingParams()).sample(
                through_head(self._causal_rows(1, attend))[0], 0
            ),
        ]
        with single_row_kernels() if self.device.type == "cpu" else nullcontext():
            (layer, slowest), (head, _) = time_each(actions, self.device, self.effort)
        calls = self.layers_per_call
        prompts = time_widths({w: layers[w] for w in of_prompts}, self.device, calls, self.effort)
        return (Timing(1, layer / calls, slowest / calls), *prompts), head / self.head_share

    def attention_timings(self, attention: Attend, dtype: torch.dtype) -> tuple[Timing, ...]:
        """Timings of what MORE_TOKENS in the cache add to one layer."""

        def action(width: int, live: int) -> Callable[[], object]:
            query = torch.ones(body.num_heads, width, body.head_size, dtype=dtype)
            query, (keys, values) = query.to(self.device), self.cache.read(0, live)
            visible = torch.ones(width, live, dtype=torch.bool, device=self.device)
            return lambda: attention(query, keys, values, visible, body.scale)

        body = self.spec.attentions[0]
        near, far = (
            time_widths(
                {w: action(w, live) for w in ATTENTION_WIDTHS}, self.device, 1.0, self.effort
            )
            for live in (LIVE_TOKENS, LIVE_TOKENS + MORE_TOKENS)
        )
        return difference(near, far)

    def loaded_layers(self) -> Callable[[], None]:
        """Layers of a verification of LOADED_WIDTH rows, to be timed while the link is busy."""
        return self._layers(self.weights, self.exact, self._tree_rows(LOADED_WIDTH))

    def timed_kernels(
        self, others: Sequence[ModelSpec] = ()
    ) -> dict[Int4Kernel, tuple[Substitutes, DraftTimings]]:
        """The 4-bit kernels that may be used, the fastest at four rows first: random substitutes in
        the kernel's layout, and timings. One that is slower and takes no less memory is left out.
        others: models that they have to serve as well."""
        kernels: list[Int4Kernel] = ["aten"]
        every = [one for spec in (self.full_spec, *others) for one in spec.linears]
        columns = [one.in_features for one in every if one.has_substitute]
        if self.device.type == "cpu":
            kernels += ["w4a8"] if int4.unavailable() is None else []
        elif gemlite_kernel.unavailable(self.device, columns) is None:
            kernels.append("gemlite")
        packed = {kernel: self.random_substitutes(kernel) for kernel in kernels}
        timed = {kernel: self.draft_timings(packed[kernel]) for kernel in kernels}
        kernels.sort(key=lambda kernel: seconds_at(timed[kernel].layer, 4))
        sizes = [substitutes_bytes(self.spec, kernel) for kernel in kernels]
        return {
            kernel: (packed[kernel], timed[kernel])
            for index, kernel in enumerate(kernels)
            if sizes[index] < min(sizes[:index], default=sizes[index] + 1)
        }

    def faster_graphs(self, substitutes: Substitutes) -> CompiledGraphs | None:
        """The draft's small operations compiled by torch, if a pass of four rows is faster with
        them. draft_layers.cpp leaves nothing to gain where it knows the layers."""
        weights = self.draft_weights
        if self.device.type != "cpu" or not self.effort.compiles_graphs:
            return None
        if compile_layers(weights, substitutes) is not None:
            return None
        if not serves(self.spec) or compile_graphs(self.full_spec) is not None:
            return None
        graphs = load_graphs(weights, substitutes)
        if graphs is None:
            return None
        rows = self._draft_rows(4)
        calls = gemm_ranges([4])
        actions: list[Callable[[], object]] = [
            lambda: compiled_graphs.forward(graphs, [rows]),
            lambda: forward(weights, substitutes, [rows], calls),
        ]
        (compiled, _), (plain, _) = time_each(actions, self.device, self.effort)
        return graphs if compiled < plain else None

    def draft_timings(
        self,
        substitutes: Substitutes,
        graphs: CompiledGraphs | None = None,
        as_draft_model: bool = False,
    ) -> DraftTimings:
        through_head = self._through_head(self.draft_weights, substitutes)
        root = torch.zeros(1, dtype=torch.int64, device=self.device)

        def draft_pass(growing: Sequence[PartialTree]) -> Tensor:
            [one] = growing
            slots = self.cache.tree_slots(len(one.tree.tokens))
            return through_head(drafted_rows(one.tree, one.last, self.cache, slots))

        def levels(width: int) -> Callable[[], object]:
            tree = Tree(width, DRAFT_LEVELS)
            rows = max(*EXACT_WIDTHS, tree.num_nodes)
            return lambda: grow([root], [tree.depth], tree, rows, draft_pass)

        every = DRAFT_WIDTHS + (CUDA_DRAFT_WIDTHS if self.device.type == "cuda" else ())
        widths = [width for width in every if width <= self.spec.vocab_size]
        heads = {width: levels(width) for width in widths}
        if as_draft_model:
            widths.append(CATCH_UP_ROWS)
        run = self._whole_pass(substitutes, graphs)
        if run is not None:
            passes = {width: self._all_layers(run, width) for width in widths}
            layer, head = self._timed(passes, heads, DRAFT_LEVELS, self.spec.num_layers)
            self.cache.commit([0] * MORE_TOKENS)
            longer = {width: self._all_layers(run, width) for width in widths}
            self.cache.roll_back(LIVE_TOKENS)
            far = time_widths(longer, self.device, self.spec.num_layers, self.effort)
            return DraftTimings(layer, difference(layer, far), head)
        layers: dict[int, Callable[[], object]] = {
            width: self._layers(self.draft_weights, substitutes, self._draft_rows(width))
            for width in widths
        }
        if self.device.type == "cuda" and not as_draft_model:
            capture = capture_on_gpu(self.device)
            layers = {width: replayed(layers[width], capture) for width in widths}
            heads = {width: replayed(heads[width], capture) for width in widths}
        layer, head = self._timed(layers, heads, DRAFT_LEVELS, self.layers_per_call)
        return DraftTimings(layer, self.attention_timings(attend, DRAFT_DTYPE), head)

    def round_overhead_seconds(self) -> float:
        """Seconds of accepting a path and moving its keys and values in every layer's cache, or the
        layer's state along it."""
        tree = root_only(torch.zeros(1, dtype=torch.int64, device=self.device), 32)
        path = accept(tree, tree.tokens, ACCEPT_DEPTH).path

        def moving() -> None:
            self.cache.commit_path(path, [])
            if self.cache.nets:
                paths = chain_paths(len(path), self.cache.conv_kernel_size, self.device)
                for net in self.cache.nets:
                    commit_nodes(net, path, paths)

        actions: list[Callable[[], object]] = [
            lambda: accept(tree, tree.tokens, ACCEPT_DEPTH).tokens(),
            moving,
        ]
        (accepting, _), (moved, _) = time_each(actions, self.device, self.effort)
        return accepting + moved / self.spec.num_layers * self.full_spec.num_layers

    def batch_invariant_widths(self) -> tuple[tuple[int, ...], ...]:
        """Groups of widths at which exact passes are batch-invariant: a row has the same bits in
        all widths of a group."""
        groups = list[tuple[list[Tensor], list[int]]]()
        until = time.perf_counter() + self.effort.place_seconds
        for width in PADDED_WIDTHS:
            if width > USUAL_WIDTH and time.perf_counter() > until:
                break
            rows = rows_at_any_place(self.weights, self.exact, self.cache, width)
            if rows is None:
                continue
            alike = (widths for others, widths in groups if all(map(torch.equal, others, rows)))
            if (group := next(alike, None)) is not None:
                group.append(width)
            else:
                groups.append((rows, [width]))
        return tuple(tuple(widths) for _, widths in groups)

    def _timed(
        self,
        layers: Mapping[int, Callable[[], object]],
        heads: Mapping[int, Callable[[], object]],
        heads_per_action: int,
        layers_per_action: int,
    ) -> tuple[tuple[Timing, ...], tuple[Timing, ...]]:
        """Timings of one layer and of one whole head."""
        return (
            time_widths(layers, self.device, layers_per_action, self.effort),
            time_widths(heads, self.device, heads_per_action * self.head_share, self.effort),
        )

    def _tree_rows(self, width: int) -> Rows:
        tree = root_only(torch.zeros(1, dtype=torch.int64, device=self.device), width)
        return whole_tree(tree, self.cache)

    def _causal_rows(self, width: int, attention: Attend) -> Rows:
        tokens = torch.zeros(width, dtype=torch.int64, device=self.device)
        return causal_rows(self.cache, tokens, attention)

    def _draft_rows(self, width: int) -> Rows:
        return replace(self._tree_rows(width), attend=attend, run_nodes=run_draft)

    def _layers(
        self, weights: SharedWeights, products: Iterable[Product], rows: Rows
    ) -> Callable[[], None]:
        """Action that runs `layers_per_call` layers, cycling through all, which exceed a cache."""
        layers = cycle(enumerate(islice(products, self.spec.num_layers)))
        num_rows = len(rows.tokens)
        x = torch.ones(num_rows, self.spec.hidden_size, dtype=weights.dtype).to(self.device)
        now = Pass(weights, [rows], gemm_ranges([num_rows]), rows.positions)

        def run() -> None:
            for index, product in islice(layers, self.layers_per_call):
                add_layer(now, index, product, x)
                x.fill_(1.0)  # random layers would make it grow

        return run

    def _whole_pass(
        self, substitutes: Substitutes, graphs: CompiledGraphs | None
    ) -> Callable[[Tensor, Sequence[Rows]], None] | None:
        """All layers of a draft at once; None: they are run one by one."""
        if graphs is not None:
            return partial(compiled_graphs.run_layers, graphs)
        if self.device.type != "cpu":
            return None
        layers = compile_layers(self.draft_weights, substitutes)
        return None if layers is None else partial(run_layers, layers)

    def _all_layers(
        self, run: Callable[[Tensor, Sequence[Rows]], None], width: int
    ) -> Callable[[], None]:
        x = torch.empty(width, self.spec.hidden_size, dtype=DRAFT_DTYPE)
        rows = self._draft_rows(width)
        return lambda: run(x.fill_(1.0), [rows])

    def _through_head(
        self, weights: SharedWeights, products: Iterable[Product]
    ) -> Callable[[Rows], Tensor]:
        """The part of a pass outside its layers."""
        *_, head = products
        return lambda rows: to_logits(
            weights, head, embed(weights, rows.tokens), gemm_ranges([len(rows.tokens)])
        )

    def _keep(self, tensor: Tensor) -> Tensor:
        target = self.memory.take_tensor("tables", tuple(tensor.shape), tensor.dtype)
        return target.copy_(tensor)

    def random_substitutes(self, kernel: Int4Kernel) -> Substitutes:
        room = Ledger(substitutes=substitutes_bytes(self.spec, kernel))
        memory = FastMemory(self.device, room)
        packed = place_substitutes(self.spec, kernel, memory, self.files)
        return make_substitutes(self.spec, self.tensors, packed, torch.clone)


def replayed(action: Action, capture: Callable[[Action], Replay]) -> Action:
    """The action as the runtime would launch it: as a CUDA graph, if it can be captured."""
    action()  # builds what is not built yet
    try:
        return capture(action)
    except RuntimeError:
        return action


def difference(near: tuple[Timing, ...], far: tuple[Timing, ...]) -> tuple[Timing, ...]:
    return tuple(
        Timing(f.width, max(f.seconds - n.seconds, MIN_SECONDS), f.slowest)
        for n, f in zip(near, far, strict=True)
    )
