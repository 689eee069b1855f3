"""Drafters propose a tree of tokens for each sequence; verification decides. The substitute drafter
uses the model's own 4-bit copy, over the cache that verification shares; the lookup drafter
searches the text."""

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
    """State of a decoding sequence. `root` is its last token, whose keys and values are not in the
    cache yet."""

    cache: Cache
    root: int
    max_tokens: int  # that may still follow
    sampler: Sampler = field(default_factory=lambda: Sampler(SamplingParams()))
    num_logprobs: int | None = None  # likeliest tokens to report with each; None: nothing
    lossy: Lossy | None = None  # None: only the exact model's tokens
    end_tokens: frozenset[int] = frozenset()  # end the answer; a lossy rule ignores nodes below one


Proposals = Callable[[Sequence[DecodeState]], Propose]


class Drafter(Protocol):
    """Proposes trees. A drafter with weights of its own has a cache for each state's and updates it
    to the state's tokens in `draft`: it is not notified of prompts or accepted tokens."""

    def draft(self, states: Sequence[DecodeState]) -> list[TokenTree]:
        """Return a tree for each state, over its root, no deeper than its `max_tokens` leaves room
        for. May write anything into the cache's tree slots."""


@dataclass(frozen=True)
class SubstituteDrafter:
    """Drafts with the substitutes. They attend to the exact keys and values of committed tokens and
    write approximate ones for their nodes, which verification overwrites."""

    trees: tuple[Tree, ...]  # of 1, 2, 4, ... sequences
    verify_width: int
    weights: SharedWeights  # bf16, where the 4-bit kernels need it
    substitutes: Substitutes
    # All layers in one call, or their small operations as graphs; None: the plain twin runs.
    compiled: CompiledLayers | CompiledGraphs | None
    proposals: Proposals | None = None  # checked in one pass; None: no proposals
    capture: Callable[[Action], Replay] | None = None  # levels as CUDA graphs; None: launched
    # By the caches that draft together, the last used last. They have `num_captured` caches in
    # all at most: the ledger has memory for so many.
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
        """Return the graphs of this batch. New ones replace the least recently used."""
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
        """Return True if tokens are proposed that captured levels cannot check. Lookup below the
        first level is left out, as it would interrupt the graphs."""
        if self.proposals is looked_up:
            return any(continuation(text_of(state), 1) for state in states)
        return self.proposals is not None

    def passes_after(
        self, caches: Sequence[Cache], lengths: Sequence[int], num_rows: int
    ) -> DraftPass:
        """Return passes over trees of `num_rows` rows behind the caches' first `lengths` tokens."""
        pairs = zip(caches, lengths, strict=True)
        slots = [cache.tree_slots(num_rows, length) for cache, length in pairs]
        return self.pass_over(caches, slots)

    def pass_over(self, caches: Sequence[Cache], slots: Sequence[TreeSlots]) -> DraftPass:
        """Return passes over a tree in each cache."""

        def run(growing: Sequence[PartialTree]) -> Tensor:
            batch = [
                drafted_rows(draft.tree, draft.last, caches[draft.index], slots[draft.index])
                for draft in growing
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
        """Why levels are launched kernel by kernel, or None if they need not be."""
        return next((graphs.problem for graphs in self.captured.values() if graphs.problem), None)


@dataclass(frozen=True)
class LookupDrafter:
    """Drafts the tokens that followed an earlier occurrence of the last few, as a chain. No
    weights, no memory."""

    verify_width: int

    def draft(self, states: Sequence[DecodeState]) -> list[TokenTree]:
        return [self.chain(state) for state in states]

    def chain(self, state: DecodeState) -> TokenTree:
        max_tokens = max(0, min(self.verify_width, state.max_tokens) - 1)
        tokens = continuation(text_of(state), max_tokens)
        root = torch.tensor([state.root], device=state.cache.device)
        at_root = Level.of_root(root.device)
        start = PartialTree(0, root_only(root, self.verify_width), at_root)
        grown = hierarchical.with_guess(start, tokens, width=1).tree
        return replace(grown, num_levels=len(tokens), num_proposed=len(tokens))


def looked_up(states: Sequence[DecodeState]) -> Propose:
    """Return a proposer that looks tokens up in prompt and answer."""
    return hierarchical.looked_up([text_of(state) for state in states])


def text_of(state: DecodeState) -> str:
    """The sequence's text so far, for lookup."""
    return as_text([*state.cache.tokens, state.root])


def within_constraints(draft_pass: DraftPass, states: Sequence[DecodeState]) -> DraftPass:
    """Return the pass with logits of -inf for tokens that a state's constraint forbids: they would
    not be accepted."""

    def run(growing: Sequence[PartialTree]) -> Tensor:
        logits = draft_pass(growing)
        sizes = [len(draft.last.nodes) for draft in growing]
        for draft, rows in zip(growing, logits.split(sizes), strict=True):
            constraint = states[draft.index].sampler.constraint
            if constraint is None:
                continue
            for node, row in zip(draft.last.nodes.tolist(), rows, strict=True):
                tree = draft.tree
                path = tree.tokens[tree.ancestors[node]].tolist()[1:]  # without the root
                allowed = constraint.allowed_after(path, len(row))
                if allowed is not None:
                    row.masked_fill_(~allowed.to(row.device), -math.inf)
        return logits

    return run


def drafted_rows(tree: TokenTree, last: Level, cache: Cache, slots: TreeSlots) -> Rows:
    """Rows of a tree's last level, and of the chain proposed below it, which has no scores."""
    rows = replace(tree_rows(tree, last.nodes, cache, slots, attend), run_nodes=run_draft)
    if rows.tree is None:
        return rows
    return replace(rows, tree=replace(rows.tree, num_together=len(last.scores)))


def tree_rows(
    tree: TokenTree, nodes: Tensor, cache: Cache, slots: TreeSlots, attention: Attend
) -> Rows:
    """Rows of `nodes` of a tree that follows committed tokens. Nothing is read back, and all
    numbers from the host are constant: a graph can capture it."""
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
    """Locations of nodes in stores with the slots `live`, int64 [S], where the root's is `first`:
    their own slots, the positions of all slots, and which of them they see."""
    of_tree = torch.arange(len(tree.tokens), device=nodes.device) + first
    visible = (live < slots.length).repeat(len(nodes), 1)
    visible[:, of_tree] = tree.ancestors[nodes]
    slot_positions = live.clone()
    slot_positions[of_tree] = slots.length + tree.depths
    own = (first + nodes).masked_fill_(nodes >= tree.num_nodes, padding_slot)
    return own, slot_positions, visible


def tree_nodes(tree: TokenTree, nodes: Tensor, conv_kernel_size: int) -> TreeNodes:
    """Nodes of a growing tree, for delta nets. Nothing is read back."""
    rows = torch.arange(len(tree.parents), device=nodes.device)
    before = tree.parents.masked_fill(tree.parents == rows, -1)
    windows = window_rows(before, nodes, conv_kernel_size)
    above = tree.ancestors[nodes] & (rows != nodes[:, None])
    return TreeNodes(nodes, tree.parents[nodes], above, windows)
