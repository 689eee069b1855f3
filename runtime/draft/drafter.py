"""Drafters propose a tree of tokens for each sequence; verification decides. The substitute is the
model's own 4-bit copy, over the cache that verification shares; lookup is the text itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from subspec.artifacts.plan import Tree, tree_for
from subspec.runtime.draft import compiled_graphs, compiled_layers, graphs, hierarchical
from subspec.runtime.draft.beam import DraftPass, Level, PartialTree, TokenTree, grow, root_only
from subspec.runtime.draft.compiled_graphs import CompiledGraphs
from subspec.runtime.draft.compiled_layers import CompiledLayers
from subspec.runtime.draft.delta_draft import run_draft
from subspec.runtime.draft.graphs import Action, DraftGraphs, Replay
from subspec.runtime.draft.hierarchical import Propose
from subspec.runtime.draft.lookup import as_text, continuation
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.kernels.linear import gemm_ranges
from subspec.runtime.lossy import Lossy
from subspec.runtime.model.attention import attend
from subspec.runtime.model.cache import Cache, TreeSlots
from subspec.runtime.model.net_state import TreeNodes
from subspec.runtime.model.paths import window_rows
from subspec.runtime.model.sampling import Sampler, SamplingParams
from subspec.runtime.model.transformer import Attend, KVLocations, Rows, SharedWeights, forward


@dataclass
class DecodeState:
    """What a round needs to know of a sequence. `root` is its last token, whose keys and
    values are not in the cache yet."""

    cache: Cache
    root: int
    max_tokens: int  # that may still follow
    sampler: Sampler = field(default_factory=lambda: Sampler(SamplingParams()))
    num_logprobs: int | None = None  # likeliest tokens to report with each; None: nothing
    lossy: Lossy | None = None  # None: only what the exact model says
    end_tokens: frozenset[int] = frozenset()  # of the answer; a lossy rule counts nothing below one


Proposals = Callable[[Sequence[DecodeState]], Propose]


class Drafter(Protocol):
    """One with weights of its own also has a cache of its own for each state's, and brings it up to
    the state's tokens when it is asked: nobody tells it of prompts or of what was accepted."""

    def draft(self, states: Sequence[DecodeState]) -> list[TokenTree]:
        """A tree for each state, over its root, no deeper than its `max_tokens` leaves room for.
        May write anything into the cache's tree slots."""


@dataclass(frozen=True)
class SubstituteDrafter:
    """Drafts with the substitutes, which attend to the exact keys and values of what is committed
    and write approximate ones for their nodes; verification overwrites those."""

    trees: tuple[Tree, ...]  # of 1, 2, 4, ... sequences
    verify_width: int
    weights: SharedWeights  # bf16, where the 4-bit kernels need it
    substitutes: Substitutes
    # All layers in one call, or their small operations as graphs; None: the plain twin runs.
    compiled: CompiledLayers | CompiledGraphs | None
    proposals: Proposals | None = None  # that it checks in one pass; None: nobody proposes
    capture: Callable[[Action], Replay] | None = None  # of levels as CUDA graphs; None: launched
    # By the caches that draft together, the last batch last. Their numbers together are
    # `num_captured` at most: the ledger has memory for so many.
    captured: dict[tuple[Cache, ...], DraftGraphs] = field(default_factory=dict)
    num_captured: int = 1

    def draft(self, states: Sequence[DecodeState]) -> list[TokenTree]:
        tree, num_rows = tree_for(self.trees, len(states)), self.verify_width
        depths = [max(0, min(tree.depth, state.max_tokens - 1)) for state in states]
        device = states[0].cache.device
        roots = [torch.tensor([state.root], device=device) for state in states]
        caches = [state.cache for state in states]
        constrained = any(state.sampler.constraint for state in states)
        if self.capture is not None and not constrained and not self.may_propose(states):
            captured = self.captured_for(tuple(caches), self.capture)
            return graphs.grow(captured, roots, depths, caches, partial(self.pass_over, caches))
        slots = [cache.tree_slots(num_rows) for cache in caches]
        draft_pass = self.pass_over(caches, slots)
        if constrained:
            draft_pass = within_constraints(draft_pass, states)
        if self.proposals is not None:
            propose = self.proposals(states)
            return hierarchical.grow(roots, depths, propose, tree, num_rows, draft_pass)
        return grow(roots, depths, tree, num_rows, draft_pass)

    def captured_for(
        self, caches: tuple[Cache, ...], capture: Callable[[Action], Replay]
    ) -> DraftGraphs:
        """The graphs of this batch. Others, the longest unused first, make room for new ones."""
        captured = self.captured.pop(caches, None)
        if captured is None:
            tree = tree_for(self.trees, len(caches))
            captured = graphs.make_graphs(
                tree, self.verify_width, len(caches), caches[0].device, capture
            )
            while self.captured and sum(map(len, self.captured)) + len(caches) > self.num_captured:
                del self.captured[next(iter(self.captured))]
        self.captured[caches] = captured
        return captured

    def may_propose(self, states: Sequence[DecodeState]) -> bool:
        """Whether tokens are proposed that captured levels cannot check. What the text says of a
        deeper level than the first is left out, as looking it up would stop them."""
        if self.proposals is looked_up:
            return any(continuation(text_of(state), 1) for state in states)
        return self.proposals is not None

    def passes_after(
        self, caches: Sequence[Cache], lengths: Sequence[int], num_rows: int
    ) -> DraftPass:
        """Passes over trees of `num_rows` rows behind the first `lengths` tokens of the caches."""
        every = zip(caches, lengths, strict=True)
        return self.pass_over(caches, [one.tree_slots(num_rows, length) for one, length in every])

    def pass_over(self, caches: Sequence[Cache], slots: Sequence[TreeSlots]) -> DraftPass:
        """Passes over a tree in each cache."""

        def run(growing: Sequence[PartialTree]) -> Tensor:
            batch = [
                drafted_rows(one.tree, one.last, caches[one.index], slots[one.index])
                for one in growing
            ]
            if isinstance(self.compiled, CompiledGraphs):
                return compiled_graphs.forward(self.compiled, batch)
            if self.compiled is not None:
                return compiled_layers.forward(self.compiled, batch)
            num_rows = sum(len(rows.tokens) for rows in batch)
            return forward(self.weights, self.substitutes, batch, gemm_ranges([num_rows]))

        return run

    @property
    def graph_problem(self) -> str | None:
        """Why levels are launched kernel by kernel after all."""
        return next((one.problem for one in self.captured.values() if one.problem), None)


@dataclass(frozen=True)
class LookupDrafter:
    """Drafts a chain of the tokens that followed the last few where they stood before. No weights,
    no memory."""

    verify_width: int

    def draft(self, states: Sequence[DecodeState]) -> list[TokenTree]:
        return [self.chain(state) for state in states]

    def chain(self, state: DecodeState) -> TokenTree:
        most = max(0, min(self.verify_width, state.max_tokens) - 1)
        tokens = continuation(text_of(state), most)
        root = torch.tensor([state.root], device=state.cache.device)
        at_root = Level.of_root(root.device)
        start = PartialTree(0, root_only(root, self.verify_width), at_root)
        grown = hierarchical.with_guess(start, tokens, width=1).tree
        return replace(grown, num_levels=len(tokens), num_proposed=len(tokens))


def looked_up(states: Sequence[DecodeState]) -> Propose:
    """Proposes what may follow by prompt and answer."""
    return hierarchical.looked_up([text_of(state) for state in states])


def text_of(state: DecodeState) -> str:
    """What was said so far, to look tokens up in."""
    return as_text([*state.cache.tokens, state.root])


def within_constraints(draft_pass: DraftPass, states: Sequence[DecodeState]) -> DraftPass:
    """The pass, whose logits are -inf for tokens that a state's constraint forbids: they would not
    be accepted."""

    def run(growing: Sequence[PartialTree]) -> Tensor:
        logits = draft_pass(growing)
        sizes = [len(one.last.nodes) for one in growing]
        for one, rows in zip(growing, logits.split(sizes), strict=True):
            constraint = states[one.index].sampler.constraint
            if constraint is None:
                continue
            for node, row in zip(one.last.nodes.tolist(), rows, strict=True):
                path = one.tree.tokens[one.tree.ancestors[node]].tolist()[1:]  # without the root
                allowed = constraint.allowed_after(path, len(row))
                if allowed is not None:
                    row.masked_fill_(~allowed.to(row.device), -math.inf)
        return logits

    return run


def drafted_rows(tree: TokenTree, last: Level, cache: Cache, slots: TreeSlots) -> Rows:
    """Of a tree's last level, and of what is proposed below it, which has no scores: a chain."""
    rows = replace(tree_rows(tree, last.nodes, cache, slots, attend), run_nodes=run_draft)
    if rows.tree is None:
        return rows
    return replace(rows, tree=replace(rows.tree, num_together=len(last.scores)))


def tree_rows(
    tree: TokenTree, nodes: Tensor, cache: Cache, slots: TreeSlots, attention: Attend
) -> Rows:
    """Rows for `nodes` of a tree that lies after committed tokens. Nothing is read back, and
    nothing comes from the host but numbers that stay the same: a captured graph can do it."""
    positions = slots.length + tree.depths[nodes]
    live = torch.arange(slots.live_slots, device=nodes.device)
    all_slots = tree_places(tree, nodes, slots, live, slots.first, slots.padding_slot)
    rows = Rows(tree.tokens[nodes], positions, *all_slots, cache, attention)
    if slots.windowed is not None:
        base, padding_slot = slots.windowed.base, slots.windowed.padding_slot
        stretch = torch.arange(slots.windowed.live_slots, device=nodes.device) + base
        found = tree_places(tree, nodes, slots, stretch, slots.first - base, padding_slot)
        rows = replace(rows, windowed=KVLocations(*found))
    return (
        replace(rows, tree=tree_nodes(tree, nodes, cache.conv_kernel_size)) if cache.nets else rows
    )


def tree_places(
    tree: TokenTree, nodes: Tensor, slots: TreeSlots, live: Tensor, first: Tensor, padding_slot: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of nodes in stores that have the slots `live`, int64 [S], where the root's place is `first`:
    their own places, the positions of all, and which of them they see."""
    of_tree = torch.arange(len(tree.tokens), device=nodes.device) + first
    visible = (live < slots.length).repeat(len(nodes), 1)
    visible[:, of_tree] = tree.ancestors[nodes]
    slot_positions = live.clone()
    slot_positions[of_tree] = slots.length + tree.depths
    own = (first + nodes).masked_fill_(nodes >= tree.num_nodes, padding_slot)
    return own, slot_positions, visible


def tree_nodes(tree: TokenTree, nodes: Tensor, conv_kernel_size: int) -> TreeNodes:
    """Of a tree that grows, nothing read back."""
    rows = torch.arange(len(tree.parents), device=nodes.device)
    before = tree.parents.masked_fill(tree.parents == rows, -1)
    windows = window_rows(before, nodes, conv_kernel_size)
    above = tree.ancestors[nodes] & (rows != nodes[:, None])
    return TreeNodes(nodes, tree.parents[nodes], above, windows)
