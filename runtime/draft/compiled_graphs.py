"""A draft pass whose small operations are compiled by torch (graph_pieces.py), for layers that
draft_layers.cpp does not know. Its plain twin is forward() of transformer.py.

T = rows, H = hidden size, D = head size
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.common.user_cache import find_file
from subspec.artifacts.model import Attention, DeltaNet, Dense, ModelSpec, layer_name
from subspec.runtime.draft.graph_pieces import (
    Piece,
    Place,
    join_piece,
    own_piece,
    pieces_of,
    places_of,
    program,
)
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.kernels.linear import GemmRanges, gemm_ranges
from subspec.runtime.model.transformer import (
    Product,
    Rows,
    SharedWeights,
    embed,
    into_cache,
    join,
    normalize,
    to_logits,
    visible_slots,
)

Graph = Callable[[list[Tensor]], list[Tensor]]  # rows, then weights, each contiguous


@dataclass(frozen=True)
class Step:
    """A block: the products of its layer, and the pieces inside and behind it."""

    body: Attention | Dense
    index: int  # of its attention in the caches
    product: Product
    own: Graph | None
    own_weights: tuple[Tensor, ...]
    join: Graph
    join_weights: tuple[Tensor, ...]


@dataclass(frozen=True)
class CompiledGraphs:
    weights: SharedWeights
    substitutes: Substitutes
    first_norm: str | None
    steps: tuple[Step, ...]


def serves(spec: ModelSpec) -> bool:
    """Return True if every block has a form with pieces."""
    return all(
        isinstance(body, Dense) or (isinstance(body, Attention) and not body.output_gate)
        for body in spec.bodies
    )


def load_graphs(weights: SharedWeights, substitutes: Substitutes) -> CompiledGraphs | None:
    """Load graphs from the user's cache. Return None if the plain twin has to run, because a piece
    for this model, processor and torch is missing or cannot be loaded."""
    loaded = dict[Piece, Graph]()
    if not serves(weights.spec):
        return None
    for piece in pieces_of(weights.spec):
        path = find_file(program(piece))
        graph = load_graph(path) if path is not None else None
        if graph is None:
            return None
        loaded[piece] = graph
    return graphs_over(weights, substitutes, loaded)


def load_graph(path: Path) -> Graph | None:
    """Load a graph, or return None if torch cannot. Needs neither a compiler nor torch's own, which
    torch._inductor.aoti_load_package would import."""
    single_threaded = True  # it waits for nothing and shares its buffers with no thread
    try:
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", single_threaded, 1, -1).run
    except RuntimeError:
        return None


def graphs_over(
    weights: SharedWeights, substitutes: Substitutes, graphs: dict[Piece, Graph]
) -> CompiledGraphs:
    spec, steps, attentions = weights.spec, list[Step](), 0
    places, products = places_of(spec), list(substitutes)
    for place in places:
        body, scalar = place.block.body, weights.scalars[place.layer] if place.scalar else None
        norms = [weights.norms[name] if name else None for name in (place.after, place.before)]
        assert not isinstance(body, DeltaNet), "`serves` is asked before"
        own = own_piece(spec, body)
        steps.append(
            Step(
                body,
                attentions,
                products[place.layer],
                None if own is None else graphs[own],
                own_norms(weights, place),
                graphs[join_piece(spec, place)],
                tuple(one for one in (norms[0], scalar, norms[1]) if one is not None),
            )
        )
        attentions += isinstance(body, Attention)
    return CompiledGraphs(weights, substitutes, places[-1].before, tuple(steps))


def own_norms(weights: SharedWeights, place: Place) -> tuple[Tensor, ...]:
    body = place.block.body
    if not isinstance(body, Attention) or body.qk_norm == "none":
        return ()
    prefix = f"{layer_name(place.layer)}.{body.name}"
    return weights.norms[f"{prefix}.q_norm"], weights.norms[f"{prefix}.k_norm"]


# A pass


def forward(graphs: CompiledGraphs, batch: Sequence[Rows]) -> Tensor:
    """Run rows through all layers -> logits [T, V]."""
    x = embed(graphs.weights, join([rows.tokens for rows in batch]))
    run_layers(graphs, x, batch)
    return to_logits(graphs.weights, graphs.substitutes.head, x, gemm_ranges([len(x)]))


def run_layers(graphs: CompiledGraphs, x: Tensor, batch: Sequence[Rows]) -> None:
    """Update x bf16 [T, H] in place; write the rows' keys and values to their slots."""
    assert x.dtype == graphs.weights.dtype and x.is_contiguous()
    passing = Passing(graphs.weights, batch, gemm_ranges([len(x)]))
    first = graphs.first_norm
    normed = x if first is None else normalize(graphs.weights, first, x)
    for step in graphs.steps:
        if isinstance(step.body, Attention):
            out = passing.attend(step, step.body, normed)
        else:
            out = passing.feed_forward(step, step.body, normed)
        normed = next(iter(step.join([x, out, *step.join_weights])), x)


class Passing:
    """Tensors that all blocks of one pass share: made once, where transformer.py makes them for
    each."""

    def __init__(self, weights: SharedWeights, batch: Sequence[Rows], calls: GemmRanges) -> None:
        self.batch, self.calls = batch, calls
        self.positions = join([rows.positions for rows in batch])
        bodies = [body for body in weights.spec.bodies if isinstance(body, Attention)]
        self.turns = {
            rope: [cos[self.positions], sin[self.positions]]
            for rope, (cos, sin) in weights.tables.items()
        }
        self.visible = {
            window: [visible_slots(rows, slice(None), window) for rows in batch]
            for window in {body.window for body in bodies}
        }

    def attend(self, step: Step, body: Attention, x: Tensor) -> Tensor:
        """Attention: x [T, H] -> [T, H]. Writes the rows' keys and values to their caches."""
        q, k = (step.product(f"{body.name}.{letter}_proj", x, self.calls) for letter in "qk")
        v = k if body.values_are_keys else step.product(f"{body.name}.v_proj", x, self.calls)
        q, k, v = self.heads(step, body, q, k, v)
        found, first = list[Tensor](), 0
        for rows, visible in zip(self.batch, self.visible[body.window], strict=True):
            span = slice(first, first + len(rows.tokens))
            keys, values = into_cache(rows, step.index, body.window, k[:, span], v[:, span])
            out = rows.attend(q[:, span], keys, values, visible, body.scale)
            found.append(out.transpose(0, 1).flatten(1))
            first = span.stop
        return step.product(f"{body.name}.o_proj", join(found), self.calls)

    def heads(
        self, step: Step, body: Attention, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[T, heads * D] each -> q, k and v [heads, T, D], normed and rotated."""
        rows = [q, k, *([v] if body.value_norm and not body.values_are_keys else [])]
        if body.rope is not None:
            rows += self.turns[body.rope]
        if body.query_growth is not None:
            rows.append(self.positions)
        made = [] if step.own is None else step.own([*rows, *step.own_weights])
        every = [one.unflatten(1, (-1, body.head_size)).transpose(0, 1) for one in (q, k, v)]
        every[: len(made)] = made
        return every[0], every[1], every[2]

    def feed_forward(self, step: Step, body: Dense, x: Tensor) -> Tensor:
        assert step.own is not None
        both = [step.product(f"{body.name}.{part}_proj", x, self.calls) for part in ("gate", "up")]
        [inner] = step.own(both)
        return step.product(f"{body.name}.down_proj", inner, self.calls)
