"""A draft model: a smaller model of the same vocabulary, all of it in fast memory, with a cache of
its own for each sequence.

It is not notified of prompts or accepted tokens. When it drafts, it compares the tokens of its
cache with those of the exact model's, drops those that are gone, and reads the new ones: the last
few in the pass that drafts.
V = vocabulary of the exact model
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec.artifacts.common.progress import Progress
from subspec.artifacts.footprint import CATCH_UP_ROWS, MAX_PROPOSED
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Tree, tree_for
from subspec.runtime.draft import compiled_layers
from subspec.runtime.draft.beam import DraftPass, PartialTree, TokenTree, grow
from subspec.runtime.draft.compiled_layers import CompiledLayers
from subspec.runtime.draft.drafter import DecodeState, drafted_rows, within_constraints
from subspec.runtime.draft.hierarchical import Propose, likeliest, likeliest_path, probable_chains
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.exact_pass import causal_rows
from subspec.runtime.kernels.linear import gemm_ranges
from subspec.runtime.load import (
    DRAFT_DTYPE,
    ArtifactWeights,
    make_substitutes,
    place_substitutes,
    place_tensors,
)
from subspec.runtime.memory import FastMemory
from subspec.runtime.model.attention import attend
from subspec.runtime.model.cache import Cache, TreeSlots, make_cache
from subspec.runtime.model.embedding import EmbeddingRows
from subspec.runtime.model.net_state import make_net_states
from subspec.runtime.model.transformer import (
    HeadRows,
    Rows,
    SharedWeights,
    forward,
    make_shared,
    make_tables,
)


@dataclass(frozen=True)
class DraftModel:
    weights: SharedWeights
    substitutes: Substitutes  # its own
    compiled: CompiledLayers | None  # all layers in one call; None: the plain twin runs
    vocab_size: int  # of the exact model: nothing else is drafted
    caches: Mapping[Cache, Cache]  # its own, by the exact model's

    def passes_after(
        self, caches: Sequence[Cache], lengths: Sequence[int], num_rows: int
    ) -> DraftPass:
        """Return passes over trees of `num_rows` rows behind the first `lengths` tokens of the
        exact model's caches."""
        own = [self.caches[cache] for cache in caches]
        texts = [cache.tokens[:length] for cache, length in zip(caches, lengths, strict=True)]
        num_unread = [0 if cache.nets else MAX_PROPOSED for cache in own]
        self.catch_up(own, texts, num_unread)
        pairs = zip(own, lengths, strict=True)
        slots = [tree_after(cache, length, num_rows) for cache, length in pairs]

        def run(growing: Sequence[PartialTree]) -> Tensor:
            batch, wanted, unread = list[Rows](), list[slice](), list[list[int]]()
            first = 0
            for draft in growing:
                cache, last = own[draft.index], draft.last.nodes
                unread.append(texts[draft.index][cache.length :])
                if unread[-1]:  # the tree is its root
                    before = torch.tensor(unread[-1], device=last.device)
                    tokens = torch.cat((before, draft.tree.tokens[:1]))
                    batch.append(causal_rows(cache, tokens, attend))
                else:
                    batch.append(drafted_rows(draft.tree, draft.last, cache, slots[draft.index]))
                first += len(batch[-1].tokens)
                wanted.append(slice(first - len(last), first))
            logits = self.logits(batch, wanted)
            for draft, tokens_read in zip(growing, unread, strict=True):
                if tokens_read:
                    own[draft.index].commit(tokens_read)
            return logits

        return run

    def catch_up(
        self, own: Sequence[Cache], texts: Sequence[Sequence[int]], num_unread: Sequence[int]
    ) -> None:
        """Make each cache hold its text, except for at most its last `num_unread` tokens."""
        for cache, text in zip(own, texts, strict=True):
            if text[: cache.length] != cache.tokens:
                cache.roll_back(cache.reachable(cache.common_prefix(list(text))))
        while True:
            room, pieces = CATCH_UP_ROWS, dict[Cache, list[int]]()
            for cache, text, left in zip(own, texts, num_unread, strict=True):
                count = min(room, len(text) - left - cache.length)
                if count > 0:
                    pieces[cache] = list(text[cache.length : cache.length + count])
                    room -= count
            if not pieces:
                return
            batch = [
                causal_rows(cache, torch.tensor(tokens, device=cache.device), attend)
                for cache, tokens in pieces.items()
            ]
            self.logits(batch, [slice(CATCH_UP_ROWS - room - 1, CATCH_UP_ROWS - room)])
            for cache, tokens in pieces.items():
                cache.commit(tokens)

    def logits(self, batch: Sequence[Rows], wanted: Sequence[slice]) -> Tensor:
        """Logits [wanted rows, V], -inf for tokens that this model does not have."""
        num_rows = sum(len(rows.tokens) for rows in batch)
        head = HeadRows(wanted, gemm_ranges([sum(rows.stop - rows.start for rows in wanted)]))
        pieces_of_nets = any(rows.cache.nets and rows.tree is None for rows in batch)
        if self.compiled is not None and not pieces_of_nets:
            logits = compiled_layers.forward(self.compiled, batch, head)
        else:
            calls = gemm_ranges([num_rows])
            logits = forward(self.weights, self.substitutes, batch, calls, head)
        missing = self.vocab_size - logits.shape[1]
        if missing > 0:
            return F.pad(logits, (0, missing), value=float("-inf"))
        return logits[:, : self.vocab_size]

    def proposals(self, states: Sequence[DecodeState]) -> Propose:
        """Return a proposer of the chain of the model's likeliest tokens, as far as it is probable,
        for the substitutes to check. Its cache advances along the proposals and rolls back where
        they are rejected."""

        def propose(growing: Sequence[PartialTree], rooms: Sequence[int]) -> list[list[int]]:
            texts = dict[int, list[int]]()
            for draft in growing:
                state = states[draft.index]
                texts[draft.index] = [*state.cache.tokens, state.root, *likeliest_path(draft)]
            room_of = {draft.index: room for draft, room in zip(growing, rooms, strict=True)}
            found = probable_chains(texts, room_of, continued)
            return [found[draft.index] for draft in growing]

        def continued(texts: Mapping[int, list[int]]) -> list[tuple[int, float]]:
            own = [self.caches[states[index].cache] for index in texts]
            return self.continued(own, list(texts.values()))

        return propose

    def continued(
        self, own: Sequence[Cache], texts: Sequence[list[int]]
    ) -> list[tuple[int, float]]:
        """Likeliest next token of each text and its probability; the caches then hold the texts."""
        assert not any(cache.nets for cache in own), "states of delta nets do not roll back"
        self.catch_up(own, [text[:-1] for text in texts], [MAX_PROPOSED] * len(own))
        batch, wanted, first = list[Rows](), list[slice](), 0
        unread = [text[cache.length :] for cache, text in zip(own, texts, strict=True)]
        for cache, tokens in zip(own, unread, strict=True):
            batch.append(causal_rows(cache, torch.tensor(tokens, device=cache.device), attend))
            first += len(tokens)
            wanted.append(slice(first - 1, first))
        logits = self.logits(batch, wanted)
        for cache, tokens in zip(own, unread, strict=True):
            cache.commit(tokens)
        return likeliest(logits)


def tree_after(cache: Cache, length: int, num_rows: int) -> TreeSlots:
    """Slots of a tree behind `length` tokens, whether or not the cache has read all of them."""
    first = torch.full((), length, device=cache.device)
    return TreeSlots(first, first, cache.live_slots(length + num_rows), cache.padding_slot)


def load_draft_model(
    artifact: Artifact,
    files: ArtifactWeights,
    embedding: EmbeddingRows,
    memory: FastMemory,
    caches: Sequence[Cache],
    progress: Progress,
) -> DraftModel:
    """Load the artifact's draft model into the ledger's arenas for it. files, embedding: its own;
    caches: the exact model's."""
    spec, plan = artifact.draft_model, artifact.plan
    assert spec is not None

    def carved(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return memory.take_tensor("drafter_cache", shape, kind)

    def kept(tensor: Tensor) -> Tensor:
        return memory.take_tensor("drafter", tuple(tensor.shape), tensor.dtype).copy_(tensor)

    files.check_resident()
    tensors = place_tensors(spec, memory, files, "drafter")
    packed = place_substitutes(spec, plan.int4_kernel, memory, files, progress, "drafter")
    files.finish()
    slots, size = caches[0].num_slots, spec.vocab_size

    def known_rows(tokens: Tensor) -> Tensor:
        """Embedding rows, with ids clamped: the exact model's vocabulary may be padded to more."""
        return embedding(tokens.clamp(max=size - 1))

    tables = make_tables(spec, slots, DRAFT_DTYPE, kept)
    weights = make_shared(spec, known_rows, tensors, tables, DRAFT_DTYPE, kept)
    substitutes = make_substitutes(spec, tensors, packed, kept)
    compiled = None
    if memory.device.type == "cpu":
        compiled = compiled_layers.compile_layers(weights, substitutes)
    own = {}
    for cache in caches:
        nets = make_net_states(spec, plan.verify_width, tensors, carved)
        own[cache] = make_cache(spec, slots, carved, nets)
    return DraftModel(weights, substitutes, compiled, artifact.spec.vocab_size, own)


@dataclass(frozen=True)
class DraftModelDrafter:
    """Drafts trees with a draft model alone: classic speculative decoding (arXiv 2211.17192)."""

    trees: tuple[Tree, ...]  # of 1, 2, 4, ... sequences
    verify_width: int
    model: DraftModel

    def draft(self, states: Sequence[DecodeState]) -> list[TokenTree]:
        tree, num_rows = tree_for(self.trees, len(states)), self.verify_width
        depths = [max(0, min(tree.depth, state.max_tokens - 1)) for state in states]
        caches = [state.cache for state in states]
        roots = [torch.tensor([state.root], device=state.cache.device) for state in states]
        lengths = [cache.length for cache in caches]
        draft_pass = self.model.passes_after(caches, lengths, num_rows)
        if any(state.sampler.constraint for state in states):
            draft_pass = within_constraints(draft_pass, states)
        return grow(roots, depths, tree, num_rows, draft_pass)
