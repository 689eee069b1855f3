"""The loop: draft a tree for each sequence, verify all of them with one stream of the exact
weights, keep what they agree with.

Start reading here. `speculate` is one round of the method (substitute speculative decoding, arXiv
2509.18344); `decode_plainly` below it is its plain twin and must emit the same tokens. Both run the
exact weights over the same cache in calls of padded widths that give a row the same bits, with
batch-invariant attention and noise that depends on the position only. So a token's logits are
bit-equal with and without a draft, alone and in company.

Prompts are read by the same stream and the same rules: what the cache holds of a token depends on
the tokens before it, not on who computed it, in which piece or in which company.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.artifacts.plan import Plan
from subspec.runtime.clock import Clock
from subspec.runtime.draft.beam import TokenTree, narrowed, root_only
from subspec.runtime.draft.drafter import Drafter, Turn, tree_rows
from subspec.runtime.kernels.linear import calls_of
from subspec.runtime.model.attention import attend, attend_batch_invariant
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.sampling import Chooser, TokenLogprobs, logprobs_of
from subspec.runtime.model.transformer import Attend, HeadRows, Rows, SharedWeights, forward
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
    logprobs: tuple[TokenLogprobs, ...] = ()  # of `emitted`, if the turn asks for them


@dataclass(frozen=True)
class Piece:
    """The next tokens of a prompt."""

    cache: Cache
    tokens: Sequence[int]
    chooser: Chooser | None  # of the answer's first token; None: more of the prompt follows
    num_logprobs: int | None = None  # likeliest tokens to report with the first token
    # With the prompt's own log probabilities: the tokens that follow each of `tokens` in the
    # prompt, and how many of the likeliest tokens to report.
    following: Sequence[int] = ()
    num_following_logprobs: int = 0


@dataclass(frozen=True)
class Read:
    """What a piece gave: the answer's first token, if it ends the prompt, and log probabilities of
    that token and of the prompt's own, if they were asked for."""

    first: int | None = None
    first_logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


def speculate(
    model: Model, turns: Sequence[Turn], pieces: Sequence[Piece] = ()
) -> tuple[list[Round], list[Read]]:
    """One round of every sequence, each of which emits one token at least, and the pieces of
    prompts. Nothing is committed: `keep` is called once it is known how much of a round is kept,
    and `keep_piece` for each piece."""
    assert model.drafter is not None
    with model.clock.phase("draft"):
        drafts = model.drafter.draft(turns)
        width = padded_width(model.plan, max(draft.num_nodes for draft in drafts))
        trees = [narrowed(draft, width) for draft in drafts]
    with model.clock.phase("verify"):
        logits, of_pieces = exact_logits(model, trees, turns, pieces)
        rounds = [verify(model, *one) for one in zip(trees, logits, turns, strict=True)]
        return rounds, [finish(*one) for one in zip(pieces, of_pieces, strict=True)]


def decode_plainly(
    model: Model, turns: Sequence[Turn], pieces: Sequence[Piece] = ()
) -> tuple[list[Round], list[Read]]:
    """The plain twin: one token per sequence and pass, padded as a draft of one node, no draft."""
    with model.clock.phase("verify"):
        width = padded_width(model.plan, 1)
        trees = [root_only(root_of(turn), width) for turn in turns]
        logits, of_pieces = exact_logits(model, trees, turns, pieces)
        rounds = [chosen(*one) for one in zip(logits, turns, strict=True)]
        return rounds, [finish(*one) for one in zip(pieces, of_pieces, strict=True)]


def decode_unpadded(model: Model, turns: Sequence[Turn]) -> list[Round]:
    """The fastest plain decoding: one row, fast attention. The baseline of every speed figure."""
    with model.clock.phase("verify"):
        batch = [causal_rows(turn.cache, root_of(turn), attend) for turn in turns]
        logits = forward(model.weights, model.exact, batch, calls_of([1] * len(turns)))
        return [chosen(*one) for one in zip(logits.split(1), turns, strict=True)]


def read(model: Model, pieces: Sequence[Piece]) -> list[Read]:
    """Exact keys and values of the pieces into their caches; `keep_piece` commits them.

    Layer after layer over all of them, so that each weight streams once, whatever their lengths;
    only a plan too tight for a prompt's activations cuts it (`prefill_tokens`).
    """
    with model.clock.phase("prefill"):
        _, logits = exact_logits(model, [], [], pieces)
        return [finish(*one) for one in zip(pieces, logits, strict=True)]


def keep(turn: Turn, done: Round, num_tokens: int) -> None:
    """Commits a round of which the first `num_tokens` emitted tokens are kept, one at least."""
    kept = done.emitted[:num_tokens]
    turn.cache.commit_path(done.path, [turn.root, *kept[:-1]])
    turn.root = kept[-1]
    turn.max_tokens -= len(kept)
    for token in kept:
        turn.chooser.push(token)


def keep_piece(piece: Piece) -> None:
    """Commits a piece of a prompt that was read."""
    piece.cache.commit(list(piece.tokens))


def padded_width(plan: Plan, num_nodes: int) -> int:
    """Rows of the narrowest exact pass that has room for the nodes."""
    return next(width for width in plan.verify_widths if width >= num_nodes)


def verify(model: Model, tree: TokenTree, logits: Tensor, turn: Turn) -> Round:
    """What the exact model would say, from the root as far as the tree has it. logits [W, V].

    An argmax takes no time: all rows have theirs on the device. Other choices take some, and may
    depend on those before: only what is on the path is chosen.
    """
    first, depth, chooser = turn.cache.length + 1, model.plan.tree.depth, turn.chooser
    if chooser.takes_the_best:
        verdict = accept(tree, logits.argmax(-1), depth)
    else:

        def choose_and_push(node: int, level: int) -> int:
            token = chooser.choose(logits[node], first + level)
            chooser.push(token)
            return token

        verdict = walk(tree, choose_and_push, depth)
        chooser.pop(verdict.num_emitted)
    emitted = verdict.emitted()
    num_levels = (tree.num_nodes - 1) // model.plan.tree.width
    return Round(emitted, verdict.path, num_levels, told(turn, logits, verdict, emitted))


def told(
    turn: Turn, logits: Tensor, verdict: Verdict, emitted: Sequence[int]
) -> tuple[TokenLogprobs, ...]:
    """Log probabilities of the emitted tokens, if the turn asks for them."""
    if turn.num_logprobs is None:
        return ()
    rows = logits[verdict.path[: len(emitted)]]
    pairs = zip(rows, emitted, strict=True)
    return tuple(logprobs_of(row, token, turn.num_logprobs) for row, token in pairs)


def chosen(logits: Tensor, turn: Turn) -> Round:
    """The next token of a sequence, from the logits [W, V] whose first row is its root's."""
    token = turn.chooser.choose(logits[0], turn.cache.length + 1)
    path = torch.zeros(1, dtype=torch.int64, device=turn.cache.device)
    count = turn.num_logprobs
    return Round([token], path, 0, () if count is None else (logprobs_of(logits[0], token, count),))


def finish(piece: Piece, logits: Tensor) -> Read:
    """What the logits [rows, V] say, which are those of the piece's `head_rows`."""
    num_tokens = len(piece.tokens)
    last = logits[min(num_tokens, len(logits)) - 1]
    own = tuple(
        logprobs_of(row, token, piece.num_following_logprobs)
        for row, token in zip(logits, piece.following, strict=False)
    )
    if piece.chooser is None:
        return Read(prompt_logprobs=own)
    first, count = piece.chooser.choose(last, piece.cache.length + num_tokens), piece.num_logprobs
    return Read(first, () if count is None else (logprobs_of(last, first, count),), own)


def exact_logits(
    model: Model, trees: Sequence[TokenTree], turns: Sequence[Turn], pieces: Sequence[Piece]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The exact model's logits: [W, V] of each tree, and those of each piece's `head_rows`."""
    plan, width = model.plan, len(trees[0].tokens) if trees else 0
    batch = [whole_tree(tree, turn.cache) for tree, turn in zip(trees, turns, strict=True)]
    batch += [padded_rows(plan, piece) for piece in pieces]
    sizes, wanted, head_sizes = [width] * len(trees), list[slice](), [width] * len(trees)
    for piece in pieces:
        calls = list(prompt_calls(plan, len(piece.tokens)))
        some, some_sizes = head_rows(plan, piece, calls)
        wanted.append(slice(sum(sizes) + some.start, sum(sizes) + some.stop))
        sizes += calls
        head_sizes += some_sizes
    of_trees = slice(0, width * len(trees))
    head = HeadRows([of_trees, *wanted] if trees else wanted, calls_of(head_sizes))
    logits = forward(model.weights, model.exact, batch, calls_of(sizes), head)
    first, *others = logits.split([some.stop - some.start for some in (of_trees, *wanted)])
    return first.split(width) if trees else [], others


def head_rows(plan: Plan, piece: Piece, calls: list[int]) -> tuple[slice, list[int]]:
    """Which rows of a piece have logits, and the head's calls for them: all, if the prompt's own
    log probabilities are wanted, or the fewest that end with its last token."""
    if piece.following:
        return slice(0, sum(calls)), calls
    few = plan.prompt_widths[0]
    first = max(0, len(piece.tokens) - few)
    return slice(first, first + few), [few]


def prompt_calls(plan: Plan, num_tokens: int) -> Iterator[int]:
    """Rows of the exact products' calls for so many tokens of a prompt: widths in which a row has
    the same bits as in any other exact pass. The last one may be padded."""
    widest = plan.prompt_widths[-1]
    while num_tokens > widest:
        yield widest
        num_tokens -= widest
    yield next(width for width in plan.prompt_widths if width >= num_tokens)


def tokens_that_fit(plan: Plan, num_tokens: int, num_rows: int) -> int:
    """How many of so many tokens of a prompt can be read by `num_rows` rows."""
    if sum(prompt_calls(plan, num_tokens)) <= num_rows:
        return num_tokens
    whole, rest = divmod(num_rows, plan.prompt_widths[-1])
    fitting = [width for width in plan.prompt_widths if width <= rest]
    return whole * plan.prompt_widths[-1] + (fitting[-1] if fitting else 0)


def whole_tree(tree: TokenTree, cache: Cache) -> Rows:
    """Rows for all of a tree that follows what `cache` has committed."""
    nodes = torch.arange(len(tree.tokens), device=tree.tokens.device)
    slots = cache.tree_slots(len(nodes))
    return tree_rows(tree, nodes, cache, slots, attend_batch_invariant)


def padded_rows(plan: Plan, piece: Piece) -> Rows:
    """Rows for a piece, and for padding: copies of its last row that write where nobody reads."""
    tokens = torch.tensor(list(piece.tokens), device=piece.cache.device)
    rows = causal_rows(piece.cache, tokens, attend_batch_invariant)
    num_rows = sum(prompt_calls(plan, len(piece.tokens)))
    return repeated_last(rows, num_rows - len(piece.tokens))


def repeated_last(rows: Rows, count: int) -> Rows:
    if not count:
        return rows
    tokens, positions = (
        torch.cat((some, some[-1:].repeat(count))) for some in (rows.tokens, rows.positions)
    )
    padding = torch.full((count,), rows.cache.padding_slot, device=rows.slots.device)
    slots = torch.cat((rows.slots, padding))
    return Rows(tokens, positions, slots, rows.slot_positions, None, rows.cache, rows.attend)


def causal_rows(cache: Cache, tokens: Tensor, attention: Attend) -> Rows:
    """Rows for tokens int64 [T] that follow the committed ones, each seeing all before it."""
    positions = torch.arange(len(tokens), device=tokens.device) + cache.length
    live = cache.live_slots(cache.length + len(tokens))
    slot_positions = torch.arange(live, device=tokens.device)
    return Rows(tokens, positions, positions, slot_positions, None, cache, attention)


def root_of(turn: Turn) -> Tensor:
    return torch.tensor([turn.root], device=turn.cache.device)
