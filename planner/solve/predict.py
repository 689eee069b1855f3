"""Seconds of a candidate plan, and what that makes in tokens/s; arithmetic, no torch.

A round is a draft and a verification. Every term is a measurement of the profile at the candidate's
widths; `corrections` is what real rounds took longer than their terms.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import Prediction, Usage
from subspec.artifacts.profile import LIVE_TOKENS, MORE_TOKENS, Profile, Timing, seconds_at
from subspec.planner.solve.storage import Storage


@dataclass(frozen=True)
class Candidate:
    """One point of the search: how the weights are stored, a tree (width 0: plain decoding),
    padding and staging."""

    storage: Storage
    width: int
    depth: int
    verify_width: int
    block_bytes: int
    num_slots: int


@dataclass(frozen=True)
class Emitted:
    """What a round is expected to give."""

    mean: float  # tokens
    mean_square: float
    levels: float  # drafted
    min_path_probability: float = 0.0  # of the tree that gives it


# Where only some matrices are decoded, some blocks keep the link longer than the threads, others
# the threads. A ring of two slots cannot even that out: while one is read, only the other is
# filled. That costs 12 to 25 % of a pass whose lanes are equally long, and nothing with a slot more
# (docs/LOG.md).
TURNS = 0.15

# Shares of what trees that end early were accepted that are not counted on. Replayed trees begin
# where rounds of whole trees do, and rounds that end early begin in harder places: 4 to 9 % on the
# same prompts. And on few trees a gain may be luck: 27 of them promised 5 %, and 5 % were lost; 273
# promised 5 %, and other prompts gave 6 % less than the same ones (docs/LOG.md).
EARLY_BIAS = 0.09
EARLY_SPREAD = 0.9  # over the root of the number of trees; those of one answer are alike

ONE_TOKEN = Emitted(1.0, 1.0, 0.0)  # a pass of plain decoding


@dataclass(frozen=True)
class Passes:
    """Seconds that are computed with a tree, however the weights are stored and streamed."""

    first_level: float  # of the draft: its root
    level: float  # of the draft
    exact: float  # the verification, or a token of plain decoding
    prompt: float  # a piece of the prompt, without the head
    num_prompts: int  # pieces of the prompt; the weights stream once for each
    head: float  # at one row

    def draft(self, levels: float) -> float:
        """So many levels, at least one; 0: plain decoding."""
        return self.first_level + (levels - 1) * self.level if levels else 0.0


def emitted_by_depth(
    acceptance: Acceptance, width: int, deepest: int, kind: str, min_path_probability: float = 0.0
) -> tuple[Emitted, ...]:
    """Of trees 0, 1, ... `deepest` levels deep. A round emits what was accepted and one more."""
    counted = 1 - early_doubt(acceptance) if min_path_probability else 1.0
    shares = acceptance.under(min_path_probability).reached(width, deepest, kind)
    reached = tuple(counted * share for share in shares)
    levels = acceptance.levels(width, deepest, kind, min_path_probability)
    means = accumulate(reached, initial=1.0)
    squares = accumulate(((2 * n + 1) * p for n, p in enumerate(reached, 1)), initial=1.0)
    return tuple(
        Emitted(mean, square, drafted, min_path_probability)
        for mean, square, drafted in zip(means, squares, levels, strict=True)
    )


def early_doubt(acceptance: Acceptance) -> float:
    """The share of accepted tokens that is not counted on where drafts end early."""
    luck = EARLY_SPREAD / math.sqrt(max(1, acceptance.num_trees()))
    return min(1.0, EARLY_BIAS + luck)


def rounds_needed(num_tokens: int, emitted: Emitted) -> float:
    """Expected rounds until `num_tokens` are out: by Wald's identity, the last round's overshoot
    being that of a renewal process."""
    overshoot = (emitted.mean_square - emitted.mean) / (2 * emitted.mean)
    return max(1.0, (num_tokens + overshoot) / emitted.mean)


def passes_of(
    spec: ModelSpec,
    profile: Profile,
    width: int,
    verify_width: int,
    prefill_tokens: int,
    usage: Usage,
) -> Passes:
    """Of a tree (width 0: plain decoding), in the middle of an answer."""
    live = usage.prompt_tokens + usage.answer_tokens / 2
    head = seconds_at(profile.exact_head, 1)
    if width:
        exact = pass_seconds(spec, profile.exact_layer, profile.exact_attention, verify_width, live)
        exact += seconds_at(profile.exact_head, verify_width)
    else:
        exact = pass_seconds(spec, profile.fast_layer, profile.fast_attention, 1, live) + head
    rows, before = min(prefill_tokens, usage.prompt_tokens), usage.prompt_tokens / 2
    prompt = pass_seconds(spec, profile.fast_layer, profile.fast_attention, rows, before)
    return Passes(
        first_level=level_seconds(spec, profile, 1, live),
        level=level_seconds(spec, profile, width, live) if width else 0.0,
        exact=exact,
        prompt=prompt,
        num_prompts=-(-usage.prompt_tokens // prefill_tokens),
        head=head,
    )


@dataclass(frozen=True)
class Round:
    """Seconds of one round; the draft's and the verification's as they are expected to be, their
    terms as they were measured."""

    draft: float
    verify: float
    stream: float
    compute: float  # with decoding
    decode: float

    def tokens_per_second(self, emitted: Emitted, usage: Usage) -> float:
        num_tokens = max(1, usage.answer_tokens - 1)  # the first one is the prompt's
        return num_tokens / (rounds_needed(num_tokens, emitted) * (self.draft + self.verify))


def round_of(
    profile: Profile, candidate: Candidate, passes: Passes, streamed: int, levels: float
) -> Round:
    """One round of `candidate` that drafts `levels` and streams `streamed` bytes.

    What fits the staging ring crosses the link while the draft runs. Residuals are decoded by the
    threads that compute, in turn with the products.
    """
    corrections, coded = profile.corrections, candidate.storage.coded_weights
    decode = coded / profile.residual_weights_per_second if coded else 0.0
    lanes, compute = lanes_of(profile, candidate, streamed), passes.exact + decode
    # By the draft's own term: what verification was learned to take is compared with that too.
    draft = passes.draft(levels)
    ahead = min(candidate.block_bytes * candidate.num_slots, streamed, draft * lanes.speed)
    verify = lanes.seconds((streamed - ahead) / lanes.speed, compute) + profile.round_seconds
    verify *= corrections.verify if candidate.width else corrections.plain
    return Round(draft * corrections.draft, verify, streamed / lanes.speed, compute, decode)


def predict(
    profile: Profile,
    candidate: Candidate,
    passes: Passes,
    streamed: int,
    emitted: Emitted,
    peak: int,
    usage: Usage,
) -> Prediction:
    found = round_of(profile, candidate, passes, streamed, emitted.levels)
    return Prediction(
        tokens_per_second=found.tokens_per_second(emitted, usage),
        time_to_first_token_seconds=prompt_seconds(
            profile, candidate, passes, streamed, found.decode
        ),
        fast_peak_bytes=peak,
        tokens_per_round=emitted.mean,
        levels_per_round=emitted.levels,
        draft_seconds=found.draft,
        verify_seconds=found.verify,
        stream_seconds=found.stream,
        compute_seconds=found.compute,
        decode_seconds=found.decode,
        streamed_bytes=streamed,
    )


def level_seconds(spec: ModelSpec, profile: Profile, rows: int, live: float) -> float:
    """One level of a draft; the first one has one row, the root."""
    layers = pass_seconds(spec, profile.draft_layer, profile.draft_attention, rows, live)
    return layers + seconds_at(profile.draft_head, rows)


def prompt_seconds(
    profile: Profile, candidate: Candidate, passes: Passes, streamed: int, decode: float
) -> float:
    """Until the first token of a prompt that nothing came before. The first time that the weights
    stream they are checked."""
    one = passes.prompt + decode
    checked = streamed / profile.digest_rate if profile.digest_rate else 0.0
    lanes = lanes_of(profile, candidate, streamed)
    link = streamed / lanes.speed
    seconds = lanes.seconds(link, one + checked)
    seconds += (passes.num_prompts - 1) * lanes.seconds(link, one)
    return (seconds + passes.head) * profile.corrections.prompt


def pass_seconds(
    spec: ModelSpec,
    layer: tuple[Timing, ...],
    attention: tuple[Timing, ...],
    width: int,
    live: float,
) -> float:
    """All layers at `width` rows with `live` tokens in the cache."""
    more = (live - LIVE_TOKENS) / MORE_TOKENS * seconds_at(attention, width)
    return spec.num_layers * max(0.0, seconds_at(layer, width) + more)


@dataclass(frozen=True)
class Lanes:
    """The link and the threads that compute, over a stream of blocks."""

    speed: float  # of the link, bytes per second
    contended_shares: tuple[float, float]
    num_blocks: float  # not rounded up: then a byte less to stream could cost a whole block's time
    turns: float  # share of the shorter lane's time in which both wait for each other

    def seconds(self, link: float, compute: float) -> float:
        """Both lanes at once, and at the ends one block of the shorter alone."""
        alone = min(link, compute) * (1 / self.num_blocks + self.turns)
        return both_at_once(self.contended_shares, link, compute) + alone


def lanes_of(profile: Profile, candidate: Candidate, streamed: int) -> Lanes:
    speed = profile.link_rate(candidate.block_bytes)
    num_blocks = max(1.0, streamed / max(1, candidate.block_bytes))
    turns = TURNS if candidate.num_slots == 2 and candidate.storage.is_mixed else 0.0
    return Lanes(speed, profile.contended_shares(speed), num_blocks, turns)


def both_at_once(contended_shares: tuple[float, float], link: float, compute: float) -> float:
    """Each lane slows the other until the shorter has ended; the longer has its full speed then."""
    contended_link, contended_compute = contended_shares
    slow_link, slow_compute = link / contended_link, compute / contended_compute
    if slow_link >= slow_compute:
        return link + slow_compute * (1 - contended_link)
    return compute + slow_link * (1 - contended_compute)


def usage_within(context: int, usage: Usage) -> Usage:
    """The usage as far as `context` tokens allow it."""
    prompt = min(usage.prompt_tokens, context // 2)
    return Usage(prompt, min(usage.answer_tokens, context - prompt), usage.kind)


Emissions = dict[int, Sequence[Emitted]]  # by tree width, then by depth


def emissions(
    acceptance: Acceptance, widths: Sequence[int], deepest: int, kind: str = ""
) -> Emissions:
    """For all trees that a search may try, none of which ends early, worked out once. Width 0 is
    plain decoding."""
    found: Emissions = {0: (ONE_TOKEN,)}
    for width in widths:
        found[width] = emitted_by_depth(acceptance, width, deepest, kind)
    return found


def ending_early(
    acceptance: Acceptance,
    trees: Emissions,
    tokens_per_second: float,
    level_seconds: Callable[[int], float],
    kind: str = "",
) -> Emissions:
    """Each tree with the stop that serves a plan of `tokens_per_second` best: a level is worth its
    tokens less what the plan would emit in its time. level_seconds: of a tree's width.

    Solving for that speed again and again finds the fastest plan (Dinkelbach 1967): no stop is ever
    chosen that is slower, and where none changes any more no other would be faster.
    """

    def worth(emitted: Emitted, level: float) -> float:
        return emitted.mean - tokens_per_second * emitted.levels * level

    found: Emissions = {0: trees[0]}
    for width in trees.keys() - {0}:
        level, deepest = level_seconds(width), len(trees[width]) - 1
        ways = [
            emitted_by_depth(acceptance, width, deepest, kind, stop) for stop in acceptance.stops
        ]
        found[width] = tuple(
            max(some, key=lambda emitted: worth(emitted, level)) for some in zip(*ways, strict=True)
        )
    return found
