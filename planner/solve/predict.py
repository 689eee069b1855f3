"""Predicted seconds and tokens/s of a candidate plan; arithmetic, no torch.

A round is a draft and a verification. Every term is a measurement of the profile at the candidate's
widths, multiplied by the correction factors that were measured on real rounds.
"""

from bisect import bisect_left
from dataclasses import dataclass
from math import ceil, sqrt

from subspec.artifacts.acceptance import Acceptance, ExpectedRound, HierarchicalCost
from subspec.artifacts.footprint import CATCH_UP_ROWS, PRODUCT_ROWS, Ring, tokens_held
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import (
    USUAL,
    WITH_DRAFT_MODEL,
    Method,
    Prediction,
    Tree,
    Usage,
    split_rows,
)
from subspec.artifacts.profile import LIVE_TOKENS, MORE_TOKENS, Profile, Timing, seconds_at
from subspec.planner.solve.storage import Storage

# While compute threads keep all CPUs busy, the reading thread is scheduled only every few
# milliseconds. A ring that holds less than the link transfers in between runs full (docs/LOG.md).
READ_AHEAD_SECONDS = 0.006
SHORT_RING_SHARE = 0.5


@dataclass(frozen=True)
class Candidate:
    """One point of the search: storage of the weights, tree, padding and staging."""

    storage: Storage
    tree: Tree | None  # None: plain decoding
    verify_widths: tuple[int, ...]  # as in Plan
    ring: Ring | None  # None: nothing streams
    method: Method  # "plain" without a tree

    @property
    def verify_width(self) -> int:
        """Rows of the widest exact pass."""
        return self.verify_widths[-1]

    @property
    def draft_width(self) -> int | None:
        """Width of the tree; None without a draft."""
        return self.tree.width if self.tree else None

    @property
    def ring_bytes(self) -> int:
        return self.ring.num_bytes if self.ring else 0


@dataclass(frozen=True)
class Proposer:
    """A draft model that a plan may use, and what was measured of it."""

    spec: ModelSpec
    acceptance: Acceptance  # of its own trees
    hierarchical_cost: HierarchicalCost  # of trees that it proposes and the substitutes check


@dataclass(frozen=True)
class Passes:
    """Compute seconds with a tree, independent of how the weights are stored and streamed."""

    draft: float  # all levels of a usual round; 0: plain decoding
    exact: float  # the verification, or a token of plain decoding
    prompt: float  # a chunk of the prompt, without the head
    num_prompts: int  # chunks of the prompt; each streams the weights once
    head: float  # at one row
    catch_up: float = 0.0  # of a draft model with the prompt, once


def rounds_needed(num_tokens: int, expected: ExpectedRound) -> float:
    """Expected number of rounds for `num_tokens`: by Wald's identity, with the overshoot of a
    renewal process in the last round."""
    overshoot = (expected.tokens_squared - expected.tokens) / (2 * expected.tokens)
    return max(1.0, (num_tokens + overshoot) / expected.tokens)


def passes_of(
    spec: ModelSpec,
    profile: Profile,
    tree: Tree | None,
    verify_widths: tuple[int, ...],
    expected: ExpectedRound,
    prefill_chunk_tokens: int,
    usage: Usage,
    num_answers: int = 1,
    method: Method = "substitute",
    proposer: Proposer | None = None,
) -> Passes:
    """Passes with a tree (None: plain decoding), in the middle of an answer. A verification is as
    wide as its draft needs: `gives.shares` says how often it has how many levels. Several answers
    at once have a tree each, whose rows share calls."""
    cached_tokens = usage.prompt_tokens + usage.answer_tokens / 2
    head = seconds_at(profile.exact_head, 1)
    if tree:
        if num_answers == 1:
            shares = shares_by_width(tree, verify_widths, expected)
        else:
            shares = batched_call_counts(
                tree, prompt_widths(profile, verify_widths[-1]), expected, num_answers
            )
        exact = 0.0
        for width, share in shares.items():
            one = pass_seconds(
                spec, profile.exact_layer, profile.exact_attention, width, cached_tokens
            )
            exact += share * (one + seconds_at(profile.exact_head, width))
    else:
        exact = (
            pass_seconds(spec, profile.fast_layer, profile.fast_attention, 1, cached_tokens) + head
        )
    rows, before = min(prefill_chunk_tokens, usage.prompt_tokens), usage.prompt_tokens / 2
    prompt = pass_seconds(spec, profile.fast_layer, profile.exact_attention, rows, before)
    draft = catch_up = 0.0
    if tree and method == "substitute":
        draft = draft_seconds(spec, profile, tree, expected.levels, cached_tokens, num_answers)
    elif tree:
        assert proposer is not None
        caught_up = -(-usage.prompt_tokens // CATCH_UP_ROWS)
        catch_up = caught_up * model_pass_seconds(proposer, profile, CATCH_UP_ROWS, 1, before)
        if method == "draft-model":
            draft = model_draft_seconds(
                proposer, profile, tree, expected, cached_tokens, num_answers
            )
        else:
            draft = hierarchical_draft_seconds(
                spec, proposer, profile, tree, expected.levels, cached_tokens, num_answers
            )
    return Passes(
        draft=draft,
        exact=exact,
        prompt=prompt,
        num_prompts=-(-usage.prompt_tokens // prefill_chunk_tokens),
        head=head,
        catch_up=catch_up,
    )


def prompt_widths(profile: Profile, verify_width: int) -> tuple[int, ...]:
    """Rows of the calls for a prompt, ascending: widths in which a row has the same bits as in a
    verification of `verify_width` rows."""
    alike = next(some for some in profile.batch_invariant_widths if verify_width in some)
    return tuple(width for width in alike if width <= PRODUCT_ROWS) or (verify_width,)


def shares_by_width(
    tree: Tree, verify_widths: tuple[int, ...], expected: ExpectedRound
) -> dict[int, float]:
    """Share of the rounds by the rows of their verification."""
    found = dict[int, float]()
    for levels, share in enumerate(expected.shares):
        if share:
            width = verify_widths[bisect_left(verify_widths, 1 + tree.width * levels)]
            found[width] = found.get(width, 0.0) + share
    return found


def batched_call_counts(
    tree: Tree, widths: tuple[int, ...], expected: ExpectedRound, num_answers: int
) -> dict[int, float]:
    """Average number of calls of each width in a round. For independent drafts, rows add up, and so
    do their variances: half of the rounds count as one standard deviation above the mean, half
    below."""
    squares = sum(share * levels**2 for levels, share in enumerate(expected.shares))
    deviation = sqrt(max(0.0, squares - expected.levels**2) * num_answers)
    found = dict[int, float]()
    for levels in (
        expected.levels * num_answers - deviation,
        expected.levels * num_answers + deviation,
    ):
        for width in split_rows(widths, max(num_answers, ceil(num_answers + tree.width * levels))):
            found[width] = found.get(width, 0.0) + 0.5
    return found


def draft_seconds(
    spec: ModelSpec,
    profile: Profile,
    tree: Tree,
    levels: float,
    cached_tokens: float,
    num_trees: int,
) -> float:
    """Seconds of so many levels of trees that grow together; the first one has one row of each, the
    root."""
    if not levels:
        return 0.0
    first, level = (
        pass_seconds(spec, profile.draft_layer, profile.draft_attention, rows, cached_tokens)
        + seconds_at(profile.draft_head, rows)
        for rows in (num_trees, num_trees * tree.width)
    )
    return first + max(0.0, levels - 1) * level


def model_draft_seconds(
    proposer: Proposer,
    profile: Profile,
    tree: Tree,
    expected: ExpectedRound,
    cached_tokens: float,
    num_trees: int,
) -> float:
    """Seconds of the levels of trees that a draft model grows alone. The first pass also reads what
    the round before gave."""
    if not expected.levels:
        return 0.0
    read, rows = ceil(num_trees * expected.tokens), num_trees * tree.width
    first = model_pass_seconds(proposer, profile, read, num_trees, cached_tokens)
    level = model_pass_seconds(proposer, profile, rows, rows, cached_tokens)
    return first + max(0.0, expected.levels - 1) * level


def hierarchical_draft_seconds(
    spec: ModelSpec,
    proposer: Proposer,
    profile: Profile,
    tree: Tree,
    levels: float,
    cached_tokens: float,
    num_trees: int,
) -> float:
    """Seconds of so many levels of trees that a draft model proposes and the substitutes check."""
    cost = proposer.hierarchical_cost
    rows = ceil(num_trees * (tree.width + cost.proposer_passes / max(cost.substitute_passes, 0.01)))
    check = pass_seconds(spec, profile.draft_layer, profile.draft_attention, rows, cached_tokens)
    check += seconds_at(profile.draft_head, rows)
    proposal = model_pass_seconds(proposer, profile, num_trees, num_trees, cached_tokens)
    return levels * (cost.substitute_passes * check + cost.proposer_passes * proposal)


def model_pass_seconds(
    proposer: Proposer, profile: Profile, rows: int, head_rows: int, cached_tokens: float
) -> float:
    """Seconds of a draft model's pass, with logits of some of its rows."""
    layer, attention = profile.draft_model_layer, profile.draft_model_attention
    layers = pass_seconds(proposer.spec, layer, attention, rows, cached_tokens)
    return layers + seconds_at(profile.draft_model_head, head_rows)


def draft_correction(profile: Profile, method: Method) -> float:
    corrections = profile.corrections
    if method == "draft-model":
        return corrections.draft_model
    return corrections.hierarchical_draft if method in WITH_DRAFT_MODEL else corrections.draft


def predict(
    profile: Profile,
    candidate: Candidate,
    passes: Passes,
    streamed: int,
    expected: ExpectedRound,
    peak: int,
    usage: Usage,
) -> Prediction:
    """Prediction for `candidate` if each round streams `streamed` bytes. Correction factors apply
    to draft and verification, not to the terms they consist of.

    Blocks that fit the staging ring are copied while the draft runs. Residuals are decoded by the
    threads that compute, in turn with the products.
    """
    corrections = profile.corrections
    decode = sum(
        n / profile.weights_per_second(one) for one, n in candidate.storage.used_as.items()
    )
    link_rate = profile.link_rate(candidate.ring.block_bytes if candidate.ring else 0)
    if profile.device == "cpu" and candidate.ring:
        read_ahead = candidate.ring_bytes / READ_AHEAD_SECONDS
        link_rate = min(link_rate, max(SHORT_RING_SHARE * link_rate, read_ahead))
    link, compute = streamed / link_rate, passes.exact + decode

    def overlapped(link: float, compute: float) -> float:
        """Seconds of streaming and computing in parallel, plus one block of the shorter one at the
        ends. The number of blocks is not rounded, so that the time is continuous in the bytes."""
        num_blocks = max(1.0, streamed / candidate.ring.block_bytes) if candidate.ring else 1.0
        both = overlapped_seconds(profile.contended_shares(link_rate), link, compute)
        return both + min(link, compute) / num_blocks

    # With the uncorrected time of the draft, because the factor of verification was measured so.
    ahead = min(candidate.ring_bytes, streamed, passes.draft * link_rate)
    verify = overlapped((streamed - ahead) / link_rate, compute) + profile.round_overhead_seconds
    verify *= corrections.verify if candidate.tree else corrections.plain
    slower = draft_correction(profile, candidate.method)
    draft = passes.draft * slower
    # Weights are checked when they stream first, which is during the first prompt.
    checked = streamed / profile.digest_bytes_per_second if profile.digest_bytes_per_second else 0.0
    prompt = passes.prompt + decode
    piece = overlapped(link, prompt)
    first = passes.num_prompts * piece + passes.head
    num_tokens = max(1, usage.answer_tokens - 1)  # the first one is the prompt's
    seconds = rounds_needed(num_tokens, expected) * (draft + verify) + passes.catch_up * slower
    return Prediction(
        tokens_per_second=num_tokens / seconds,
        time_to_first_token_seconds=first * corrections.prompt,
        fast_peak_bytes=peak,
        tokens_per_round=expected.tokens,
        levels_per_round=expected.levels,
        draft_seconds=draft,
        verify_seconds=verify,
        stream_seconds=link,
        compute_seconds=compute,
        decode_seconds=decode,
        streamed_bytes=streamed,
        digest_seconds=(overlapped(link, prompt + checked) - piece) * corrections.prompt,
    )


def pass_seconds(
    spec: ModelSpec,
    layer: tuple[Timing, ...],
    attention: tuple[Timing, ...],
    width: int,
    cached_tokens: float,
) -> float:
    """Seconds of all layers at `width` rows with `cached_tokens` tokens in the cache."""
    more = sum(
        count * (tokens_held(spec, window, cached_tokens) - LIVE_TOKENS)
        for window, count in spec.attentions_by_window.items()
    )
    attending = more / MORE_TOKENS * seconds_at(attention, width)
    return max(0.0, spec.num_layers * seconds_at(layer, width) + attending)


def overlapped_seconds(contended_shares: tuple[float, float], link: float, compute: float) -> float:
    """Seconds of both in parallel: each slows the other down until the shorter one has ended."""
    contended_link, contended_compute = contended_shares
    slow_link, slow_compute = link / contended_link, compute / contended_compute
    if slow_link >= slow_compute:
        return link + slow_compute * (1 - contended_link)
    return compute + slow_link * (1 - contended_compute)


def usual_usage(context: int) -> Usage:
    """The usage of a plan's own predictions: the usual one, reduced to fit `context` tokens."""
    prompt = min(USUAL.prompt_tokens, context // 2)
    return Usage(prompt, min(USUAL.answer_tokens, context - prompt))


def full_usage(context: int) -> Usage:
    """The usual answer to a prompt that leaves no more of the context."""
    answer = usual_usage(context).answer_tokens
    return Usage(context - answer, answer)
