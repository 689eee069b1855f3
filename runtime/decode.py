"""The loop: draft a tree for each sequence, verify all of them with one stream of the exact
weights, keep what they agree with.

Start reading here. `speculate` is one round of the method (substitute speculative decoding, arXiv
2509.18344); `decode_plainly` below it is its plain twin and must emit the same tokens. Both run the
exact weights over the same cache in calls of widths that give a row the same bits, with
batch-invariant attention and noise that depends on the position only. So a token's logits are
bit-equal with and without a draft, alone and in a batch.

Prompts are read by the same stream and the same rules: what the cache holds of a token depends on
the tokens before it, not on who computed it, in which chunk or in which batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor

from subspec.artifacts.common.errors import SubspecError
from subspec.runtime import lossy
from subspec.runtime.draft.beam import TokenTree, root_only
from subspec.runtime.draft.draft_head import read_from, read_text
from subspec.runtime.draft.drafter import DecodeState
from subspec.runtime.exact_pass import (
    Model,
    Outputs,
    PrefillChunk,
    exact_outputs,
    pad_trees,
    root_row,
)
from subspec.runtime.kernels.linear import gemm_ranges
from subspec.runtime.lossy import Lossy
from subspec.runtime.model.sampling import TokenLogprobs, logprobs_of
from subspec.runtime.model.transformer import forward
from subspec.runtime.verify import accept, accept_sequentially


@dataclass(frozen=True)
class Round:
    """Result of one draft and its verification, or of one plain pass, for one sequence."""

    new_tokens: list[int]  # the accepted tokens and one more
    path: Tensor  # int64 [1 + levels]: the root and the accepted nodes of the tree; then padding
    num_levels: int = 0  # drafted levels
    num_drafted: int = 0  # tokens in all these levels
    num_proposed: int = 0  # levels that took no pass of the substitutes
    logprobs: tuple[TokenLogprobs, ...] = ()  # of `new_tokens`, if the state asks for them
    lossy: Sequence[int] = ()  # places in `new_tokens` of tokens that are not the exact model's own
    error: SubspecError | None = None  # why its constraint gave no new tokens
    hidden: Tensor | None = None  # [1 + levels, H], of the path, for a draft head


@dataclass(frozen=True)
class PrefillResult:
    """Result of a chunk: the answer's first token if the chunk ends the prompt, and the requested
    log probabilities of that token and of the prompt's own."""

    first_token: int | None = None
    first_token_logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: SubspecError | None = None  # why the constraint gave no first token
    hidden: Tensor | None = None  # [1, H], of the last token, for a draft head


def speculate(
    model: Model, states: Sequence[DecodeState], chunks: Sequence[PrefillChunk] = ()
) -> tuple[list[Round], list[PrefillResult]]:
    """Run one round of every sequence, each of which emits at least one token, and prefill the
    chunks. Nothing is committed: call `commit_round` once it is known how much of a round is kept,
    and `commit_chunk` for each chunk."""
    assert model.drafter is not None
    with model.clock.phase("draft"):
        trees, calls = pad_trees(model.plan, model.drafter.draft(states))
    with model.clock.phase("verify"):
        outputs = exact_outputs(model, trees, calls, states, chunks)
        rounds = [
            verify(tree, logits, state)
            for tree, logits, state in zip(trees, outputs.tree_logits, states, strict=True)
        ]
        return with_hidden_states(model, rounds, outputs), prefill_results(model, chunks, outputs)


def decode_plainly(
    model: Model, states: Sequence[DecodeState], chunks: Sequence[PrefillChunk] = ()
) -> tuple[list[Round], list[PrefillResult]]:
    """Decode one token per sequence: the plain twin of `speculate`, padded as a tree of one
    node."""
    with model.clock.phase("verify"):
        narrowest = model.plan.verify_widths[0]
        roots = [root_only(root_of(state), narrowest) for state in states]
        trees, calls = pad_trees(model.plan, roots)
        outputs = exact_outputs(model, trees, calls, states, chunks)
        rounds = [
            sample_next(row, state) for row, state in zip(outputs.tree_logits, states, strict=True)
        ]
        return rounds, prefill_results(model, chunks, outputs)


def decode_unpadded(model: Model, states: Sequence[DecodeState]) -> list[Round]:
    """The fastest plain decoding: one row, fast attention. The baseline of every speed figure."""
    with model.clock.phase("verify"):
        batch = [root_row(state.cache, root_of(state)) for state in states]
        logits = forward(model.weights, model.exact, batch, gemm_ranges([1] * len(states)))
        return [sample_next(row, state) for row, state in zip(logits.split(1), states, strict=True)]


def prefill(model: Model, chunks: Sequence[PrefillChunk]) -> list[PrefillResult]:
    """Write exact keys and values of the chunks into their caches; `commit_chunk` commits them.

    All chunks go through a layer before the next one, so that each weight streams once, whatever
    their lengths; only a plan too tight for a prompt's activations cuts it
    (`prefill_chunk_tokens`).
    """
    with model.clock.phase("prefill"):
        return prefill_results(model, chunks, exact_outputs(model, [], [], [], chunks))


def commit_round(state: DecodeState, result: Round, num_tokens: int) -> None:
    """Commit the first `num_tokens` (1 or more) new tokens of a round."""
    kept = result.new_tokens[:num_tokens]
    state.cache.commit_path(result.path, [state.root, *kept[:-1]], result.hidden)
    state.root = kept[-1]
    state.max_tokens -= len(kept)
    for token in kept:
        state.sampler.push(token)


def commit_chunk(chunk: PrefillChunk, result: PrefillResult) -> None:
    """Commit a chunk of a prompt."""
    chunk.cache.commit(list(chunk.tokens), result.hidden)


def verify(tree: TokenTree, logits: Tensor, state: DecodeState) -> Round:
    """Return the path of the tree that the exact model agrees with, and its tokens. logits [W, V].

    Argmax is computed for all rows at once on the device. Sampling is slower and may depend on
    earlier tokens: only tokens on the path are sampled.
    """
    if state.lossy is not None:
        return verify_lossily(tree, logits, state, state.lossy)
    first, depth, sampler = state.cache.length + 1, tree.num_levels, state.sampler
    if sampler.is_argmax:
        verification = accept(tree, logits.argmax(-1), depth)
    else:

        def choose_and_push(node: int, level: int) -> int | None:
            try:
                token = sampler.sample(logits[node], first + level)
            except SubspecError:
                if level == 0:
                    raise
                return None  # the answer may end earlier; if not, the next round begins here
            sampler.push(token)
            return token

        try:
            with sampler.ahead():
                verification = accept_sequentially(tree, choose_and_push, depth)
        except SubspecError as error:
            return failed_round(state, error)
    new_tokens = verification.tokens()
    token_logprobs = logprobs(
        logits, verification.path[: len(new_tokens)], new_tokens, state.num_logprobs
    )
    num_drafted, num_proposed = tree.num_nodes - 1, tree.num_proposed
    return Round(
        new_tokens, verification.path, tree.num_levels, num_drafted, num_proposed, token_logprobs
    )


def verify_lossily(tree: TokenTree, logits: Tensor, state: DecodeState, rule: Lossy) -> Round:
    """Return the longest path that the rule accepts. The exact model's token is chosen at every
    node."""
    sampler, first, choices = state.sampler, state.cache.length + 1, list[int]()
    if sampler.is_argmax:
        choices = logits.argmax(-1).tolist()
    else:
        tokens, ancestors = tree.tokens.tolist(), tree.ancestors.tolist()  # one wait for a GPU
        for node in range(tree.num_nodes):
            above = list(compress(tokens, ancestors[node]))[1:]  # without the root
            with sampler.ahead():
                for token in above:
                    sampler.push(token)
                choices.append(sampler.sample(logits[node], first + len(above)))
    verification = lossy.accept(tree, choices, logits, rule, state.end_tokens)
    path = torch.tensor(verification.path, device=state.cache.device)
    token_logprobs = logprobs(logits, path, verification.tokens, state.num_logprobs)
    num_drafted, num_proposed = tree.num_nodes - 1, tree.num_proposed
    kept = verification.lossy
    return Round(
        verification.tokens, path, tree.num_levels, num_drafted, num_proposed, token_logprobs, kept
    )


def logprobs(
    logits: Tensor, rows: Tensor | slice, tokens: Sequence[int], num_top: int | None
) -> tuple[TokenLogprobs, ...]:
    """Log probabilities of `tokens`, each from its own row, one row after another as they are
    large. num_top=None returns ()."""
    if num_top is None:
        return ()
    indices = range(len(logits))[rows] if isinstance(rows, slice) else rows.tolist()
    return tuple(
        logprobs_of(logits[row], token, num_top) for row, token in zip(indices, tokens, strict=True)
    )


def sample_next(logits: Tensor, state: DecodeState) -> Round:
    """Sample a sequence's next token from logits [W, V], whose first row is its root's."""
    try:
        token = state.sampler.sample(logits[0], state.cache.length + 1)
    except SubspecError as error:
        return failed_round(state, error)
    path = torch.zeros(1, dtype=torch.int64, device=state.cache.device)
    token_logprobs = logprobs(logits, slice(1), [token], state.num_logprobs)
    return Round([token], path, logprobs=token_logprobs)


def failed_round(state: DecodeState, error: SubspecError) -> Round:
    """Return a round that failed with `error`; other sequences are unaffected."""
    return Round([], torch.zeros(1, dtype=torch.int64, device=state.cache.device), error=error)


def with_hidden_states(model: Model, rounds: Sequence[Round], outputs: Outputs) -> list[Round]:
    """Return the rounds with the hidden states of their paths, for a draft head."""
    head = model.head
    if head is None:
        return list(rounds)
    return [
        replace(result, hidden=read_from(head, x[result.path]))
        for result, x in zip(rounds, outputs.hidden_of_trees, strict=True)
    ]


def prefill_results(
    model: Model, chunks: Sequence[PrefillChunk], outputs: Outputs
) -> list[PrefillResult]:
    """Return the results of the chunks. A draft head reads the chunks too."""
    results = [
        prefill_result(chunk, logits)
        for chunk, logits in zip(chunks, outputs.chunk_logits, strict=True)
    ]
    head = model.head
    if head is None:
        return results
    return [
        replace(result, hidden=read_text(head, chunk.cache, chunk.tokens, x[: len(chunk.tokens)]))
        for chunk, x, result in zip(chunks, outputs.hidden_of_chunks, results, strict=True)
    ]


def prefill_result(chunk: PrefillChunk, logits: Tensor) -> PrefillResult:
    """Result of a chunk, from the logits [rows, V] of its `head_rows`."""
    num_tokens, wanted = len(chunk.tokens), slice(len(chunk.next_tokens))
    own = logprobs(logits, wanted, chunk.next_tokens, chunk.num_prompt_logprobs)
    if chunk.sampler is None:
        return PrefillResult(prompt_logprobs=own)
    last = min(num_tokens, len(logits)) - 1
    try:
        first = chunk.sampler.sample(logits[last], chunk.cache.length + num_tokens)
    except SubspecError as error:
        return PrefillResult(prompt_logprobs=own, error=error)
    token_logprobs = logprobs(logits, slice(last, last + 1), [first], chunk.num_logprobs)
    return PrefillResult(first, token_logprobs, own)


def root_of(state: DecodeState) -> Tensor:
    return torch.tensor([state.root], device=state.cache.device)
