"""The loop: draft a tree for each sequence, verify all of them with one stream of the exact
weights, keep what they agree with.

Start reading here. `speculate` is one round of the method (substitute speculative decoding, arXiv
2509.18344); `decode_plainly` below it is its plain twin and must emit the same tokens. Both run the
exact weights over the same cache in calls of padded widths that give a row the same bits, with
batch-invariant attention and noise that depends on the position only. So a token's logits are
bit-equal with and without a draft, alone and in company.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.artifacts.footprint import PRODUCT_ROWS
from subspec.artifacts.plan import Plan
from subspec.runtime.clock import Clock
from subspec.runtime.draft.beam import TokenTree, narrowed, root_only
from subspec.runtime.draft.drafter import Drafter, Turn, tree_rows
from subspec.runtime.model.attention import attend, attend_batch_invariant
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.sampling import Sampling, choose
from subspec.runtime.model.transformer import Rows, SharedWeights, forward
from subspec.runtime.stream.exact_weights import ExactWeights
from subspec.runtime.verify import Verdict, accept, walk


@dataclass(frozen=True)
class Model:
    """Everything a pass needs, placed in fast memory by engine.py."""

    plan: Plan
    weights: SharedWeights
    exact: ExactWeights
    drafter: Drafter | None  # None: plain decoding only
    clock: Clock


@dataclass(frozen=True)
class Round:
    """What one sequence's draft and its verification gave; of plain decoding, one pass."""

    emitted: list[int]  # the accepted tokens and one more
    path: Tensor  # int64 [D + 1]: the root and the accepted nodes of the tree; then anything
    num_levels: int = 0  # drafted


def speculate(model: Model, turns: Sequence[Turn], sampling: Sequence[Sampling]) -> list[Round]:
    """One round of every sequence; each emits one token at least. Nothing is committed: `keep` is
    called once it is known how much of a round is kept."""
    assert model.drafter is not None
    with model.clock.phase("draft"):
        drafts = model.drafter.draft(turns)
        width = padded_width(model.plan, max(draft.num_nodes for draft in drafts))
        trees = [narrowed(draft, width) for draft in drafts]
    with model.clock.phase("verify"):
        logits = exact_logits(model, trees, [turn.cache for turn in turns])
        verdicts = [verify(model, *one) for one in zip(trees, logits, turns, sampling, strict=True)]
        return [
            Round(verdict.emitted(), verdict.path, (tree.num_nodes - 1) // model.plan.tree.width)
            for tree, verdict in zip(trees, verdicts, strict=True)
        ]


def decode_plainly(
    model: Model, turns: Sequence[Turn], sampling: Sequence[Sampling]
) -> list[Round]:
    """The plain twin: one token per sequence and pass, padded as a draft of one node, no draft."""
    with model.clock.phase("verify"):
        width = padded_width(model.plan, 1)
        trees = [root_only(root_of(turn), width) for turn in turns]
        logits = exact_logits(model, trees, [turn.cache for turn in turns])
        return chosen(logits, turns, sampling)


def decode_unpadded(
    model: Model, turns: Sequence[Turn], sampling: Sequence[Sampling]
) -> list[Round]:
    """The fastest plain decoding: one row, fast attention. The baseline of every speed figure."""
    with model.clock.phase("verify"):
        batch = [causal_rows(turn.cache, root_of(turn)) for turn in turns]
        logits = forward(model.weights, model.exact, batch, attend, rows_per_call=1)
        return chosen(logits.split(1), turns, sampling)


def keep(turn: Turn, done: Round, num_tokens: int) -> None:
    """Commits a round of which the first `num_tokens` emitted tokens are kept, one at least."""
    kept = done.emitted[:num_tokens]
    turn.cache.commit_path(done.path, [turn.root, *kept[:-1]])
    turn.root = kept[-1]
    turn.max_tokens -= len(kept)


def prefill(model: Model, cache: Cache, tokens: Sequence[int], sampling: Sampling) -> int:
    """Exact keys and values of `tokens` into the cache -> the next token.

    Layer after layer over the whole prompt, so that each weight streams once, whatever the prompt's
    length; only a plan too tight for the prompt's activations says less (`prefill_tokens`).
    """
    with model.clock.phase("prefill"):
        for first in range(0, len(tokens), model.plan.prefill_tokens):
            some = list(tokens[first : first + model.plan.prefill_tokens])
            rows = causal_rows(cache, torch.tensor(some, device=cache.device))
            logits = forward(
                model.weights, model.exact, [rows], attend, PRODUCT_ROWS, last_only=True
            )
            cache.commit(some)
        return choose(logits[0], cache.length, sampling)


def padded_width(plan: Plan, num_nodes: int) -> int:
    """Rows of the narrowest exact pass that has room for the nodes."""
    return next(width for width in plan.verify_widths if width >= num_nodes)


def verify(
    model: Model, tree: TokenTree, logits: Tensor, turn: Turn, sampling: Sampling
) -> Verdict:
    """What the exact model would say, from the root as far as the tree has it. logits [W, V].

    An argmax takes no time: all rows have theirs on the device. A sample takes some: only what is
    on the path is drawn.
    """
    first, depth = turn.cache.length + 1, model.plan.tree.depth
    if sampling.temperature == 0:
        return accept(tree, logits.argmax(-1), depth)

    def drawn(node: int, level: int) -> int:
        return choose(logits[node], first + level, sampling)

    return walk(tree, drawn, depth)


def exact_logits(
    model: Model, trees: Sequence[TokenTree], caches: Sequence[Cache]
) -> Sequence[Tensor]:
    """The exact model's, at every row of each tree: [W, V] each."""
    batch = [whole_tree(tree, cache) for tree, cache in zip(trees, caches, strict=True)]
    width = len(trees[0].tokens)
    logits = forward(model.weights, model.exact, batch, attend_batch_invariant, width)
    return list(logits.split(width))


def whole_tree(tree: TokenTree, cache: Cache) -> Rows:
    """Rows for all of a tree that follows what `cache` has committed."""
    nodes = torch.arange(len(tree.tokens), device=tree.tokens.device)
    return tree_rows(tree, nodes, cache, cache.tree_slots(len(nodes)))


def chosen(
    logits: Sequence[Tensor], turns: Sequence[Turn], sampling: Sequence[Sampling]
) -> list[Round]:
    """The next token of each sequence, from the logits [W, V] whose first row is its root's."""
    path = torch.zeros(1, dtype=torch.int64, device=turns[0].cache.device)
    return [
        Round([choose(some[0], turn.cache.length + 1, one)], path)
        for some, turn, one in zip(logits, turns, sampling, strict=True)
    ]


def root_of(turn: Turn) -> Tensor:
    return torch.tensor([turn.root], device=turn.cache.device)


def causal_rows(cache: Cache, tokens: Tensor) -> Rows:
    """Rows for tokens that follow the committed ones, each seeing all before it."""
    positions = torch.arange(len(tokens), device=tokens.device) + cache.length
    live = cache.live_slots(cache.length + len(tokens))
    slot_positions = torch.arange(live, device=tokens.device)
    return Rows(tokens, positions, positions, slot_positions, None, cache)
