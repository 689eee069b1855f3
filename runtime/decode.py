"""The loop: draft a tree, verify it with the exact weights, keep what they agree with.

Start reading here. `speculate` is the method (substitute speculative decoding, arXiv 2509.18344);
`decode_plainly` below it is its plain twin and must emit the same tokens. Both run the exact
weights at the same padded width over the same cache, with attention that does not depend on slot
order and noise that depends on the position only, so a token's logits are bit-equal in both.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subspec.artifacts.plan import Plan
from subspec.runtime import draft_layers
from subspec.runtime.attention import attend, attend_exactly
from subspec.runtime.cache import Cache
from subspec.runtime.clock import Clock
from subspec.runtime.draft import DraftPass, TokenTree, grow, root_only
from subspec.runtime.draft_layers import DraftLayers
from subspec.runtime.sampling import Sampling, choose
from subspec.runtime.stream import ExactWeights
from subspec.runtime.substitutes import Substitutes
from subspec.runtime.transformer import Decoder, Rows, forward
from subspec.runtime.verify import accept


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


def speculate(model: Model, root: int, sampling: Sampling, max_tokens: int) -> Iterator[list[int]]:
    """Yields what each round emits: the accepted tokens and one more, at least one.

    `root` is the last emitted token; its keys and values are not in the cache yet. No level is
    drafted that `max_tokens` leaves no room for.
    """
    plan, cache, clock = model.plan, model.cache, model.clock
    while True:
        with clock.phase("draft"):
            token = torch.tensor([root], device=model.decoder.embedding.device)
            shape = replace(plan.tree, depth=max(0, min(plan.tree.depth, max_tokens - 1)))
            tree = grow(token, shape, plan.verify_width, draft_pass(model))
        with clock.phase("verify"):
            choices = exact_choices(model, tree, sampling)
            verdict = accept(tree, choices, plan.tree.depth)
            cache.compact(verdict.path)
            emitted = verdict.emitted()
        cache.commit([root, *emitted[:-1]])
        root = emitted[-1]
        max_tokens -= len(emitted)
        yield emitted


def decode_plainly(model: Model, root: int, sampling: Sampling) -> Iterator[list[int]]:
    """The plain twin: one token per pass, padded to the same width, without a draft."""
    while True:
        with model.clock.phase("verify"):
            token = torch.tensor([root], device=model.decoder.embedding.device)
            choices = exact_choices(model, root_only(token, model.plan.verify_width), sampling)
            emitted = int(choices[0])
        model.cache.commit([root])
        root = emitted
        yield [emitted]


def decode_unpadded(model: Model, root: int, sampling: Sampling) -> Iterator[list[int]]:
    """The fastest plain decoding: one row, fast attention. The baseline of every speed figure."""
    while True:
        with model.clock.phase("verify"):
            token = torch.tensor([root], device=model.decoder.embedding.device)
            rows = causal_rows(model.cache, token)
            logits = forward(model.decoder, model.exact, rows, model.cache, attend)
            emitted = int(choose(logits, [model.cache.length + 1], sampling)[0])
        model.cache.commit([root])
        root = emitted
        yield [emitted]


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
        return int(choose(logits, [model.cache.length], sampling)[0])


def exact_choices(model: Model, tree: TokenTree, sampling: Sampling) -> Tensor:
    """The exact model's next token at every row of the tree: int64 [W]."""
    nodes = torch.arange(len(tree.depths), device=tree.tokens.device)
    rows = tree_rows(model.cache, tree, nodes, tree.depths)
    logits = forward(model.decoder, model.exact, rows, model.cache, attend_exactly)
    positions = [model.cache.length + depth + 1 for depth in tree.depths]
    return choose(logits, positions, sampling)


def draft_pass(model: Model) -> DraftPass:
    """The substitutes' logits for some nodes of a tree; they write approximate keys and values
    into the tree's slots, which verification overwrites."""
    substitutes = model.substitutes
    assert substitutes is not None

    def run(tree: TokenTree, nodes: Tensor, depth: int) -> Tensor:
        rows = tree_rows(model.cache, tree, nodes, (depth,) * len(nodes))
        if model.draft_layers is not None:
            return draft_layers.forward(model.draft_layers, rows, model.cache)
        return forward(model.draft_decoder, substitutes, rows, model.cache, attend)

    return run


def tree_rows(cache: Cache, tree: TokenTree, nodes: Tensor, depths: tuple[int, ...]) -> Rows:
    """Rows for `nodes` of a tree that lies behind the committed tokens.

    The live slots are those of the committed tokens and of the whole tree, whatever was drafted,
    so that every pass of a round has one shape.
    """
    length, device = cache.length, tree.tokens.device
    live = cache.live_slots(length + len(tree.depths))
    visible = torch.zeros(len(nodes), live, dtype=torch.bool, device=device)
    visible[:, :length] = True
    visible[:, length : length + len(tree.depths)] = tree.ancestors[nodes]
    slot_positions = torch.arange(live, device=device)
    slot_positions[length : length + len(tree.depths)] = length + torch.tensor(
        tree.depths, device=device
    )
    slots = torch.where(nodes < tree.num_nodes, length + nodes, cache.padding_slot)
    positions = length + torch.tensor(depths, device=device)
    return Rows(tree.tokens[nodes], positions, slots, slot_positions, visible)


def causal_rows(cache: Cache, tokens: Tensor) -> Rows:
    """Rows for tokens that follow the committed ones, each seeing all before it."""
    positions = torch.arange(len(tokens), device=tokens.device) + cache.length
    live = cache.live_slots(cache.length + len(tokens))
    slot_positions = torch.arange(live, device=tokens.device)
    return Rows(tokens, positions, positions, slot_positions, visible=None)
