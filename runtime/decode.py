"""The loop: draft a tree for each sequence, verify all of them with one stream of the exact
weights, keep what they agree with.

Start reading here. `speculate` is one round of the method (substitute speculative decoding, arXiv
2509.18344); `decode_plainly` below it is its plain twin and must emit the same tokens. Both run the
exact weights over the same cache in calls of widths that give a row the same bits, with
batch-invariant attention and noise that depends on the position only. So a token's logits are
bit-equal with and without a draft, alone and in company.

Prompts are read by the same stream and the same rules: what the cache holds of a token depends on
the tokens before it, not on who computed it, in which piece or in which company.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subspec.artifacts.common.errors import SubspecError
from subspec.runtime import lossy
from subspec.runtime.draft.beam import TokenTree, root_only
from subspec.runtime.draft.draft_head import read_from, read_text
from subspec.runtime.draft.drafter import Turn
from subspec.runtime.exact_pass import Model, Outputs, Piece, exact_outputs, filled, root_row
from subspec.runtime.kernels.linear import calls_of
from subspec.runtime.lossy import Lossy
from subspec.runtime.model.sampling import TokenLogprobs, logprobs_of
from subspec.runtime.model.transformer import forward
from subspec.runtime.verify import accept, walk


@dataclass(frozen=True)
class Round:
    """What one sequence's draft and its verification gave; of plain decoding, one pass."""

    emitted: list[int]  # the accepted tokens and one more
    path: Tensor  # int64 [1 + levels]: the root and the accepted nodes of the tree; then anything
    num_levels: int = 0  # drafted
    num_drafted: int = 0  # tokens, of all these levels
    num_proposed: int = 0  # levels that took no pass of the substitutes
    logprobs: tuple[TokenLogprobs, ...] = ()  # of `emitted`, if the turn asks for them
    lossy: Sequence[int] = ()  # places in `emitted` of tokens that are not the exact model's own
    problem: SubspecError | None = None  # of its constraint: why nothing was emitted
    hidden: Tensor | None = None  # [1 + levels, H], of the path, for a draft head


@dataclass(frozen=True)
class Read:
    """What a piece gave: the answer's first token, if it ends the prompt, and log probabilities of
    that token and of the prompt's own, if they were asked for."""

    first: int | None = None
    first_logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    problem: SubspecError | None = None  # of the constraint: why there is no first token
    hidden: Tensor | None = None  # [1, H], of the last token, for a draft head


def speculate(
    model: Model, turns: Sequence[Turn], pieces: Sequence[Piece] = ()
) -> tuple[list[Round], list[Read]]:
    """One round of every sequence, each of which emits one token at least, and the pieces of
    prompts. Nothing is committed: `keep` is called once it is known how much of a round is kept,
    and `keep_piece` for each piece."""
    assert model.drafter is not None
    with model.clock.phase("draft"):
        trees, calls = filled(model.plan, model.drafter.draft(turns))
    with model.clock.phase("verify"):
        passed = exact_outputs(model, trees, calls, turns, pieces)
        rounds = [verify(*one) for one in zip(trees, passed.of_trees, turns, strict=True)]
        return with_hidden(model, rounds, passed), finished(model, pieces, passed)


def decode_plainly(
    model: Model, turns: Sequence[Turn], pieces: Sequence[Piece] = ()
) -> tuple[list[Round], list[Read]]:
    """The plain twin: one token per sequence and pass, padded as a draft of one node, no draft."""
    with model.clock.phase("verify"):
        narrowest = model.plan.verify_widths[0]
        roots = [root_only(root_of(turn), narrowest) for turn in turns]
        trees, calls = filled(model.plan, roots)
        passed = exact_outputs(model, trees, calls, turns, pieces)
        rounds = [chosen(*one) for one in zip(passed.of_trees, turns, strict=True)]
        return rounds, finished(model, pieces, passed)


def decode_unpadded(model: Model, turns: Sequence[Turn]) -> list[Round]:
    """The fastest plain decoding: one row, fast attention. The baseline of every speed figure."""
    with model.clock.phase("verify"):
        batch = [root_row(turn.cache, root_of(turn)) for turn in turns]
        logits = forward(model.weights, model.exact, batch, calls_of([1] * len(turns)))
        return [chosen(*one) for one in zip(logits.split(1), turns, strict=True)]


def read(model: Model, pieces: Sequence[Piece]) -> list[Read]:
    """Exact keys and values of the pieces into their caches; `keep_piece` commits them.

    Layer after layer over all of them, so that each weight streams once, whatever their lengths;
    only a plan too tight for a prompt's activations cuts it (`prefill_tokens`).
    """
    with model.clock.phase("prefill"):
        return finished(model, pieces, exact_outputs(model, [], [], [], pieces))


def keep(turn: Turn, done: Round, num_tokens: int) -> None:
    """Commits a round of which the first `num_tokens` emitted tokens are kept, one at least."""
    kept = done.emitted[:num_tokens]
    turn.cache.commit_path(done.path, [turn.root, *kept[:-1]], done.hidden)
    turn.root = kept[-1]
    turn.max_tokens -= len(kept)
    for token in kept:
        turn.chooser.push(token)


def keep_piece(piece: Piece, done: Read) -> None:
    """Commits a piece of a prompt that was read."""
    piece.cache.commit(list(piece.tokens), done.hidden)


def verify(tree: TokenTree, logits: Tensor, turn: Turn) -> Round:
    """What the exact model would say, from the root as far as the tree has it. logits [W, V].

    An argmax takes no time: all rows have theirs on the device. Other choices take some, and may
    depend on those before: only what is on the path is chosen.
    """
    if turn.lossy is not None:
        return verify_lossily(tree, logits, turn, turn.lossy)
    first, depth, chooser = turn.cache.length + 1, tree.num_levels, turn.chooser
    if chooser.takes_the_best:
        verdict = accept(tree, logits.argmax(-1), depth)
    else:

        def choose_and_push(node: int, level: int) -> int | None:
            try:
                token = chooser.choose(logits[node], first + level)
            except SubspecError:
                if level == 0:
                    raise
                return None  # the answer may end before: if not, the next round begins here
            chooser.push(token)
            return token

        try:
            with chooser.ahead():
                verdict = walk(tree, choose_and_push, depth)
        except SubspecError as error:
            return failed(turn, error)
    emitted = verdict.emitted()
    told = logprobs(logits, verdict.path[: len(emitted)], emitted, turn.num_logprobs)
    num_drafted, num_proposed = tree.num_nodes - 1, tree.num_proposed
    return Round(emitted, verdict.path, tree.num_levels, num_drafted, num_proposed, told)


def verify_lossily(tree: TokenTree, logits: Tensor, turn: Turn, how: Lossy) -> Round:
    """The longest path that the rule accepts; every node's choice is made for it."""
    chooser, first, choices = turn.chooser, turn.cache.length + 1, list[int]()
    if chooser.takes_the_best:
        choices = logits.argmax(-1).tolist()
    else:
        for node in range(tree.num_nodes):
            above = tree.tokens[tree.ancestors[node]].tolist()[1:]  # without the root
            with chooser.ahead():
                for token in above:
                    chooser.push(token)
                choices.append(chooser.choose(logits[node], first + len(above)))
    verdict = lossy.accept(tree, choices, logits, how, turn.end_tokens)
    path = torch.tensor(verdict.path, device=turn.cache.device)
    told = logprobs(logits, path, verdict.emitted, turn.num_logprobs)
    num_drafted, num_proposed = tree.num_nodes - 1, tree.num_proposed
    kept = verdict.lossy
    return Round(verdict.emitted, path, tree.num_levels, num_drafted, num_proposed, told, kept)


def logprobs(
    logits: Tensor, rows: Tensor | slice, tokens: Sequence[int], num_top: int | None
) -> tuple[TokenLogprobs, ...]:
    """Of the tokens, each by its own of the `rows`, one after another: a row is large. num_top
    None: nothing is asked for."""
    if num_top is None:
        return ()
    every = range(len(logits))[rows] if isinstance(rows, slice) else rows.tolist()
    return tuple(
        logprobs_of(logits[row], token, num_top) for row, token in zip(every, tokens, strict=True)
    )


def chosen(logits: Tensor, turn: Turn) -> Round:
    """The next token of a sequence, from the logits [W, V] whose first row is its root's."""
    try:
        token = turn.chooser.choose(logits[0], turn.cache.length + 1)
    except SubspecError as error:
        return failed(turn, error)
    path = torch.zeros(1, dtype=torch.int64, device=turn.cache.device)
    told = logprobs(logits, slice(1), [token], turn.num_logprobs)
    return Round([token], path, logprobs=told)


def failed(turn: Turn, problem: SubspecError) -> Round:
    """It is one answer's alone: the pass that others share goes on."""
    return Round([], torch.zeros(1, dtype=torch.int64, device=turn.cache.device), problem=problem)


def with_hidden(model: Model, rounds: Sequence[Round], passed: Outputs) -> list[Round]:
    """The rounds, with what a draft head reads of their paths."""
    head = model.head
    if head is None:
        return list(rounds)
    return [
        replace(done, hidden=read_from(head, x[done.path]))
        for done, x in zip(rounds, passed.hidden_of_trees, strict=True)
    ]


def finished(model: Model, pieces: Sequence[Piece], passed: Outputs) -> list[Read]:
    """What the pieces gave; a draft head reads them too."""
    reads = [finish(*one) for one in zip(pieces, passed.of_pieces, strict=True)]
    head = model.head
    if head is None:
        return reads
    return [
        replace(done, hidden=read_text(head, piece.cache, piece.tokens, x[: len(piece.tokens)]))
        for piece, x, done in zip(pieces, passed.hidden_of_pieces, reads, strict=True)
    ]


def finish(piece: Piece, logits: Tensor) -> Read:
    """What the logits [rows, V] say, which are those of the piece's `head_rows`."""
    num_tokens, wanted = len(piece.tokens), slice(len(piece.following))
    own = logprobs(logits, wanted, piece.following, piece.num_following_logprobs)
    if piece.chooser is None:
        return Read(prompt_logprobs=own)
    last = min(num_tokens, len(logits)) - 1
    try:
        first = piece.chooser.choose(logits[last], piece.cache.length + num_tokens)
    except SubspecError as error:
        return Read(prompt_logprobs=own, problem=error)
    told = logprobs(logits, slice(last, last + 1), [first], piece.num_logprobs)
    return Read(first, told, own)


def root_of(turn: Turn) -> Tensor:
    return torch.tensor([turn.root], device=turn.cache.device)
