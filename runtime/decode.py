"""The loop: draft a tree, verify it with the exact weights, keep what they agree with.

Start reading here. `speculate` is the method (substitute speculative decoding, arXiv 2509.18344);
`decode_plainly` below it is its plain twin and must emit the same tokens. Both run the exact
weights at the same padded width over the same cache, with attention that does not depend on slot
order and noise that depends on the position only, so a token's logits are bit-equal in both.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from subspec.artifacts.plan import Plan
from subspec.runtime.clock import Clock
from subspec.runtime.draft import compiled_layers, graphs
from subspec.runtime.draft.beam import DraftPass, TokenTree, grow, root_only
from subspec.runtime.draft.compiled_layers import DraftLayers
from subspec.runtime.draft.graphs import DraftGraphs
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.model.attention import attend, attend_batch_invariant
from subspec.runtime.model.cache import Cache, TreeSlots
from subspec.runtime.model.sampling import Sampling, choose
from subspec.runtime.model.transformer import Decoder, Rows, forward
from subspec.runtime.stream.exact_weights import ExactWeights
from subspec.runtime.verify import Verdict, accept, walk


@dataclass(frozen=True)
class Model:
    """Everything a pass needs, placed in fast memory by session.py."""

    plan: Plan
    decoder: Decoder
    exact: ExactWeights
    cache: Cache
    clock: Clock
    draft_decoder: Decoder  # the same tensors; bf16 where the 4-bit kernels need it
    substitutes: Substitutes | None  # None: plain decoding only
    draft_layers: DraftLayers | None  # the draft's layers, compiled; None: their plain twin runs
    draft_graphs: DraftGraphs | None  # its levels, captured; None: their plain twin runs


@dataclass(frozen=True)
class Round:
    """What a draft and its verification gave; of plain decoding, one pass."""

    emitted: list[int]  # the accepted tokens and one more
    num_levels: int = 0  # drafted
    ended_early: bool = (
        False  # the draft found that no further level would pay (Tree.min_path_probability)
    )


def speculate(model: Model, root: int, sampling: Sampling, max_tokens: int) -> Iterator[Round]:
    """Round after round, each emits one token at least.

    `root` is the last emitted token; its keys and values are not in the cache yet. No level is
    drafted that `max_tokens` leaves no room for.
    """
    plan, cache, clock = model.plan, model.cache, model.clock
    while True:
        with clock.phase("draft"):
            token = torch.tensor([root], device=model.decoder.embedding.device)
            depth = max(0, min(plan.tree.depth, max_tokens - 1))
            tree = draft(model, token, depth)
        with clock.phase("verify"):
            verdict = verify(model, tree, sampling)
            cache.compact(verdict.path)
            emitted = verdict.emitted()
        cache.commit([root, *emitted[:-1]])
        root = emitted[-1]
        max_tokens -= len(emitted)
        num_levels = (tree.num_nodes - 1) // plan.tree.width
        yield Round(emitted, num_levels, ended_early=num_levels < depth)


def decode_plainly(model: Model, root: int, sampling: Sampling) -> Iterator[Round]:
    """The plain twin: one token per pass, padded to the same width, without a draft."""
    while True:
        with model.clock.phase("verify"):
            token = torch.tensor([root], device=model.decoder.embedding.device)
            logits = exact_logits(model, root_only(token, model.plan.verify_width))
            emitted = choose(logits[0], model.cache.length + 1, sampling)
        model.cache.commit([root])
        root = emitted
        yield Round([emitted])


def decode_unpadded(model: Model, root: int, sampling: Sampling) -> Iterator[Round]:
    """The fastest plain decoding: one row, fast attention. The baseline of every speed figure."""
    while True:
        with model.clock.phase("verify"):
            token = torch.tensor([root], device=model.decoder.embedding.device)
            rows = causal_rows(model.cache, token)
            logits = forward(model.decoder, model.exact, rows, model.cache, attend)
            emitted = choose(logits[0], model.cache.length + 1, sampling)
        model.cache.commit([root])
        root = emitted
        yield Round([emitted])


def prefill(model: Model, tokens: list[int], sampling: Sampling) -> int:
    """Exact keys and values of `tokens` into the cache -> the next token.

    Layer after layer over the whole prompt, so that each weight streams once, whatever the prompt's
    length; only a plan too tight for the prompt's activations says less (`prefill_tokens`).
    """
    with model.clock.phase("prefill"):
        device = model.decoder.embedding.device
        for first in range(0, len(tokens), model.plan.prefill_tokens):
            some = tokens[first : first + model.plan.prefill_tokens]
            rows = causal_rows(model.cache, torch.tensor(some, device=device))
            logits = forward(model.decoder, model.exact, rows, model.cache, attend, last_only=True)
            model.cache.commit(some)
        return choose(logits[0], model.cache.length, sampling)


def draft(model: Model, root: Tensor, depth: int) -> TokenTree:
    """The plan's tree over the token `root`, int64 [1], no deeper than `depth`."""
    plan = model.plan
    if model.draft_graphs is not None:
        passes = partial(draft_pass, model)
        return graphs.grow(model.draft_graphs, root, depth, model.cache, passes)
    return grow(root, replace(plan.tree, depth=depth), plan.verify_width, draft_pass(model))


def verify(model: Model, tree: TokenTree, sampling: Sampling) -> Verdict:
    """What the exact model would say, from the root as far as the tree has it.

    An argmax takes no time: all rows have theirs on the device. A sample takes some: only what is
    on the path is drawn.
    """
    logits, first = exact_logits(model, tree), model.cache.length + 1
    if sampling.temperature == 0:
        return accept(tree, logits.argmax(-1), model.plan.tree.depth)

    def drawn(node: int, depth: int) -> int:
        return choose(logits[node], first + depth, sampling)

    return walk(tree, drawn, model.plan.tree.depth)


def exact_logits(model: Model, tree: TokenTree) -> Tensor:
    """The exact model's, at every row of the tree: [W, V]."""
    num_rows = len(tree.tokens)
    nodes = torch.arange(num_rows, device=tree.tokens.device)
    rows = tree_rows(tree, nodes, model.cache.behind(num_rows))
    return forward(model.decoder, model.exact, rows, model.cache, attend_batch_invariant)


def draft_pass(model: Model, behind: TreeSlots | None = None) -> DraftPass:
    """The substitutes' logits for some nodes of a tree; they write approximate keys and values
    into the tree's slots, which verification overwrites. behind None: the committed tokens."""
    substitutes = model.substitutes
    assert substitutes is not None

    def run(tree: TokenTree, nodes: Tensor) -> Tensor:
        rows = tree_rows(tree, nodes, behind or model.cache.behind(len(tree.tokens)))
        if model.draft_layers is not None:
            return compiled_layers.forward(model.draft_layers, rows, model.cache)
        return forward(model.draft_decoder, substitutes, rows, model.cache, attend)

    return run


def tree_rows(tree: TokenTree, nodes: Tensor, behind: TreeSlots) -> Rows:
    """Rows for `nodes` of a tree that lies behind the committed tokens. Nothing is read back, and
    nothing comes from the host but numbers that stay the same: a captured graph can do it."""
    slots = torch.arange(behind.live_slots, device=nodes.device)
    slots_of_tree = slots[: len(tree.tokens)] + behind.length
    visible = (slots < behind.length).repeat(len(nodes), 1)
    visible[:, slots_of_tree] = tree.ancestors[nodes]
    slot_positions = slots.clone()
    slot_positions[slots_of_tree] = behind.length + tree.depths
    own = (behind.length + nodes).masked_fill_(nodes >= tree.num_nodes, behind.padding_slot)
    positions = behind.length + tree.depths[nodes]
    return Rows(tree.tokens[nodes], positions, own, slot_positions, visible)


def causal_rows(cache: Cache, tokens: Tensor) -> Rows:
    """Rows for tokens that follow the committed ones, each seeing all before it."""
    positions = torch.arange(len(tokens), device=tokens.device) + cache.length
    live = cache.live_slots(cache.length + len(tokens))
    slot_positions = torch.arange(live, device=tokens.device)
    return Rows(tokens, positions, positions, slot_positions, visible=None)
