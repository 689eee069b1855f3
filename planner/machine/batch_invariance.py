"""Test whether exact passes on this machine are batch-invariant: a row's bits depend neither on its
position among the rows nor on other sequences in the pass.

Kernels treat whole blocks, tails and each thread's share of a tensor differently, so this is tested
with the runtime's own pass, at the number of threads that a plan will have.

W = rows of a sequence, H = hidden size
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from subspec.planner.machine.excerpt import cancelling, fill_with_noise
from subspec.runtime.kernels.linear import GemmRanges, gemm_ranges
from subspec.runtime.model.attention import attend_batch_invariant
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.net_state import TreeNodes
from subspec.runtime.model.paths import on_device, tree_paths
from subspec.runtime.model.transformer import (
    Attend,
    Pass,
    Product,
    Rows,
    SharedWeights,
    add_layer,
    to_logits,
)

POSITIONS = 32  # that rows are spread over, as in a tree of so many levels
COMPARED_ROWS = 8  # of passes of different widths

# By step of a layer: what goes into it or comes out of it, rows first, piece by piece.
Seen = dict[str, list[Tensor]]
# x [T, H] of some rows, the same rows -> what every step computed; x is changed in place.
Step = Callable[[Tensor, list[Rows]], Seen]


def rows_at_any_place(
    weights: SharedWeights, products: Iterable[Product], cache: Cache, width: int
) -> list[Tensor] | None:
    """Return the results of each step of each distinct layer, and of the head, for the first few of
    `width` rows, which are the same for every width. None if a row's bits depend on its place: each
    is compared in two passes, alone, and twice as two sequences of one pass, the second in another
    order.

    One shuffle is enough: it moves every row, and kernels differ between blocks and tails. All
    inputs and results of products and attention are compared, because the next step may hide a
    difference. products: of all layers and the head. Overwrites all of the cache but its tokens.
    """
    for kept in (*cache.keys, *cache.values):
        fill_with_noise(kept, 1.0)
    for net in cache.nets:
        fill_with_noise(net.committed.conv, 1.0)
        fill_with_noise(net.committed.memory, 0.1)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(width))
    order = order.to(cache.device)
    x = torch.empty(width, weights.spec.hidden_size, dtype=weights.dtype, device=cache.device)
    fill_with_noise(x, 1.0)
    found = list[Tensor]()
    for step in distinct_steps(weights, products):
        rows = same_bits(step, x, order, cache)
        if rows is None:
            return None
        found += rows
    return found


def distinct_steps(weights: SharedWeights, products: Iterable[Product]) -> Iterable[Step]:
    """Steps for each distinct layer, and for the head."""
    layers = weights.spec.layers
    for index, product in enumerate(products):
        if index == len(layers):
            yield head_step(weights, product)
        elif layers[index] not in layers[:index]:
            yield layer_step(weights, index, product)


def same_bits(step: Step, x: Tensor, order: Tensor, cache: Cache) -> list[Tensor] | None:
    """The first rows of all that the step computes; None if they depend on their place."""
    width, here = len(x), torch.arange(len(x), device=x.device)
    alone = step(x.clone(), [rows_at(cache, here, 0)])
    batch = [rows_at(cache, some, index) for index, some in enumerate((here, order))]
    batched = step(torch.cat((x, x[order])), batch)
    assert alone.keys() == batched.keys()
    for name, pieces in alone.items():
        rows, both = torch.cat(pieces), torch.cat(batched[name])
        if not (torch.equal(both[:width], rows) and torch.equal(both[width:], rows[order])):
            return None
    return [torch.cat(pieces)[:COMPARED_ROWS] for pieces in alone.values()]


def rows_at(cache: Cache, rows: Tensor, index: int) -> Rows:
    """The rows with the numbers `rows` int64 [W] as sequence `index` of a pass. A row sees what is
    committed, and itself; its position is the same wherever it stands."""
    width, length = len(rows), cache.length
    live = torch.arange(cache.live_slots(length + 2 * width), device=rows.device)
    slots = live[length + index * width :][:width]
    positions = length + rows % POSITIONS
    slot_positions = live.clone()
    slot_positions[slots] = positions
    visible = (live < length) | (live == slots[:, None])
    alone = None
    if cache.nets:
        paths = on_device(tree_paths([-1] * width, cache.conv_kernel_size), rows.device)
        alone = TreeNodes(rows, rows, visible, rows[:, None], paths)
    return Rows(
        rows,
        positions,
        slots,
        slot_positions,
        visible,
        cache,
        attend_batch_invariant,
        alone,
    )


def layer_step(weights: SharedWeights, index: int, product: Product) -> Step:
    def run(x: Tensor, batch: list[Rows]) -> Seen:
        seen: Seen = {}
        watched, attend = watch(product, attend_batch_invariant, seen)
        batch = [replace(rows, attend=attend) for rows in batch]
        positions = torch.cat([rows.positions for rows in batch])
        now = Pass(weights, batch, calls_for(batch), positions)
        add_layer(now, index, watched, x)
        return {**seen, "the layer": [x]}

    return run


def head_step(weights: SharedWeights, product: Product) -> Step:
    def run(x: Tensor, batch: list[Rows]) -> Seen:
        seen: Seen = {}
        watched, _ = watch(product, attend_batch_invariant, seen)
        logits = to_logits(weights, watched, x, calls_for(batch))
        return {**seen, "logits": [logits]}

    return run


def calls_for(batch: list[Rows]) -> GemmRanges:
    return gemm_ranges([len(rows.tokens) for rows in batch])


def watch(product: Product, attend: Attend, seen: Seen) -> tuple[Product, Attend]:
    """Wrap both functions so that their inputs and results are added to `seen`, together with
    products of rows that reveal the order of summation."""
    latest = ""  # product; an attention is named by the one before it

    def see(what: str, rows: Tensor) -> None:
        seen.setdefault(f"{latest} {what}", []).append(rows.clone())

    def watched_product(
        name: str, x: Tensor, calls: GemmRanges, gate: Tensor | None = None
    ) -> Tensor:
        nonlocal latest
        latest = name
        for what, rows in (("in", x), ("gate", gate)):
            if rows is not None:
                see(what, rows)
        ones = None if gate is None else torch.ones_like(gate)
        see("sums that cancel", product(name, cancelling(x), calls, ones))
        out = product(name, x, calls, gate)
        see("out", out)
        return out

    def watched_attend(
        q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float
    ) -> Tensor:
        out = attend(q, keys, values, visible, scale)
        see("queries", q.transpose(0, 1))
        see("attended", out.transpose(0, 1))
        return out

    return watched_product, watched_attend
