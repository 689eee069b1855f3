"""Runs a built artifact on calibration prompts: acceptance of draft trees (`replay.py`) on
several answers at once, and times of real rounds, one answer at a time.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Several
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from subspec.artifacts.acceptance import Acceptance, HierarchicalCost
from subspec.artifacts.common.progress import Progress
from subspec.artifacts.format.prebuilt import pack_prebuilt
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.native import cpp
from subspec.artifacts.plan import DraftHeadResult, Method, Plan, Tree, Usage, split_rows
from subspec.planner.rehearse.calibration import Sample, known_ids
from subspec.planner.rehearse.corrections import PredictFor, Rounds, Timed, drafted_rounds
from subspec.planner.rehearse.replay import MAX_DEPTH, WIDTHS, Answer, Grown, curves_of, walk
from subspec.planner.rehearse.trail import Trail
from subspec.planner.solve.problem import make_tree
from subspec.runtime.decode import commit_chunk, commit_round, prefill, speculate
from subspec.runtime.draft.beam import PartialTree
from subspec.runtime.draft.draft_model import DraftModelDrafter
from subspec.runtime.draft.drafter import DecodeState, SubstituteDrafter
from subspec.runtime.draft.head_drafter import HeadDrafter
from subspec.runtime.draft.hierarchical import Propose
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.exact_pass import PrefillChunk, tokens_that_fit
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.sampling import Sampler, SamplingParams
from subspec.runtime.programs import graph_programs, kernel_sources
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.text.tokenizer import load_tokenizer

Settled = Callable[[Acceptance], bool]  # whether more answers would not change the plan
Trees = dict[tuple[int, str], list[list[Grown]]]  # of each answer, by width and kind of text

AT_ONCE = (8, 4, 2, 1)  # answers that acceptance is measured on together; as many as fit the budget
ANSWER_TOKENS = 80  # of each at most: another prompt says more than the rest of an answer
CONTEXT = 256  # of each, prompt and answer
# The answers are decoded with chains, which give most tokens for the rows that they verify.
CHAIN = make_tree(1, 16, 0.2)
# A pass of one layer is cheap, and trained for the first few tokens.
HEAD_TREES = make_tree(1, 2), make_tree(1, 4), make_tree(2, 4), make_tree(4, 6, 0.1)
LOOP_TOKENS = 12  # that a repetition has at least
MAX_PERIOD = 24  # tokens


@dataclass(frozen=True)
class Effort:
    """Time limits of a rehearsal."""

    acceptance_seconds: float = 45.0  # for acceptance; less once the choice is settled
    time_seconds: float = 8.0  # for rounds of the plan that was chosen
    plain_seconds: float = 4.0  # for plain decoding

    def divided(self, num_methods: int) -> "Effort":
        """The limits for each of several methods that draft."""
        return Effort(
            self.acceptance_seconds / num_methods,
            self.time_seconds / num_methods,
            self.plain_seconds,
        )

    @staticmethod
    def within(seconds: float) -> "Effort":
        usual = Effort()
        whole = usual.acceptance_seconds + usual.time_seconds + usual.plain_seconds
        return Effort(*(seconds / whole * share for share in vars(usual).values()))


USUAL_EFFORT = Effort()


@dataclass(frozen=True)
class Setting:
    """Settings with which an artifact is run."""

    link_bandwidth: float | None = None
    device: str | None = None


def measure_acceptance(
    artifact: Artifact,
    plan: Plan,
    samples: Several[Sample],
    setting: Setting,
    settled: Settled,
    progress: Progress,
    effort: Effort = USUAL_EFFORT,
    method: Method = "substitute",
) -> Acceptance | None:
    """Acceptance of the method's trees along answers to the samples, all kinds alike, as many at a
    time as `plan` has sequences, until the samples or the time are used up or the choice is
    settled. None: no answer was long enough."""
    staged = replace(artifact, plan=with_tree(plan, method, CHAIN))
    text = load_tokenizer(artifact.path / "tokenizer")
    turns = known_ids(text, samples, artifact.spec.vocab_size)
    trees: Trees = {}
    found, so_far, whole = None, "", Tree(2, MAX_DEPTH)
    until = time.perf_counter() + effort.acceptance_seconds
    with opened(staged, method, setting) as engine:
        for first in range(0, len(turns), plan.num_sequences):
            progress(f"rehearsing{so_far}", first / len(turns))
            add_answers(engine, turns[first : first + plan.num_sequences], trees)
            found = acceptance_of(trees)
            if found is not None:
                tokens, margin = found.acceptance_length(whole), found.margin(whole)
                so_far = f": {tokens:.1f} ± {margin:.1f} tokens a round, two wide"
                if settled(found):
                    break
            if time.perf_counter() > until:
                break
    progress(f"rehearsing{so_far}", 1.0)
    return found


@torch.inference_mode()
def add_answers(engine: Engine, turns: Several[tuple[str, list[int]]], trees: Trees) -> None:
    """Decode an answer to each prompt, in one batch, and add the trees along them."""
    engine.prepare()
    drafter = engine.model.drafter
    assert isinstance(drafter, SubstituteDrafter | DraftModelDrafter)
    drafting = drafter if isinstance(drafter, SubstituteDrafter) else drafter.model
    with ExitStack() as stack:
        caches = [stack.enter_context(engine.new_sequence()).cache for _ in turns]
        trails = [Trail(cache) for cache in caches]
        answers = decode_together(engine, trails, [prompt for _, prompt in turns])
        for width in WIDTHS[engine.plan.device]:
            has_room = 1 + width * MAX_DEPTH <= engine.plan.verify_width
            if has_room and width <= engine.artifact.spec.vocab_size:
                along = walk(drafting, trails, answers, width)
                for (kind, _), some in zip(turns, along, strict=True):
                    if some:
                        trees.setdefault((width, kind), []).append(some)


def decode_together(
    engine: Engine, trails: Several[Trail], prompts: Several[list[int]]
) -> list[Answer]:
    """Greedy answers to the prompts, in one batch, up to where they begin to repeat themselves."""
    model, ends = engine.model, frozenset(engine.artifact.spec.eos_token_ids)
    room = min(ANSWER_TOKENS, engine.plan.context // 2)
    prompts = [prompt[: engine.plan.context - room] for prompt in prompts]
    caches = [trail.cache for trail in trails]
    roots = read_together(engine, caches, prompts)
    for trail in trails:
        trail.begin()
    states = [DecodeState(cache, root, room - 1) for cache, root in zip(caches, roots, strict=True)]
    texts = [[*prompt, root] for prompt, root in zip(prompts, roots, strict=True)]
    ended = [root in ends for root in roots]
    while active := [n for n, state in enumerate(states) if state.max_tokens > 0 and not ended[n]]:
        rounds, _ = speculate(model, [states[n] for n in active])
        for n, done in zip(active, rounds, strict=True):
            some = done.new_tokens[: states[n].max_tokens]
            kept = next((index for index, one in enumerate(some, 1) if one in ends), len(some))
            commit_round(states[n], done, kept)
            trails[n].add(done.path[:kept])
            texts[n] += some[:kept]
            ended[n] = texts[n][-1] in ends
    answers = []
    for trail, prompt, text, whole in zip(trails, prompts, texts, ended, strict=True):
        kept = len(prompt) + before_loop(text[len(prompt) :])
        trail.cut(kept - 1)
        answers.append(Answer(text[:kept], len(prompt), whole and kept == len(text)))
    return answers


def read_together(engine: Engine, caches: Several[Cache], prompts: Several[list[int]]) -> list[int]:
    """Prefill the prompts into the caches. Returns the first token of each answer."""
    model, plan, first_tokens = engine.model, engine.plan, dict[int, int]()
    while len(first_tokens) < len(prompts):
        room, chunks = plan.prefill_chunk_tokens, dict[int, PrefillChunk]()
        for n, (cache, prompt) in enumerate(zip(caches, prompts, strict=True)):
            unread = prompt[cache.length :]
            count = tokens_that_fit(plan, len(unread), room) if unread else 0
            if count:
                ends = Sampler(SamplingParams()) if count == len(unread) else None
                chunks[n] = PrefillChunk(cache, unread[:count], ends)
                room -= sum(split_rows(plan.prompt_widths, count))
        for n, done in zip(chunks, prefill(model, list(chunks.values())), strict=True):
            commit_chunk(chunks[n], done)
            if done.first_token is not None:
                first_tokens[n] = done.first_token
    return [first_tokens[n] for n in range(len(prompts))]


def before_loop(tokens: Several[int]) -> int:
    """Number of tokens before the text repeats itself for the second time: at least LOOP_TOKENS
    tokens, with a period of at most MAX_PERIOD."""
    for first in range(len(tokens)):
        for period in range(1, MAX_PERIOD + 1):
            repeated = max(LOOP_TOKENS, 2 * period)
            again = tokens[first + period : first + period + repeated]
            if len(again) == repeated and again == tokens[first : first + repeated]:
                return first + period
    return len(tokens)


def acceptance_of(trees: Trees) -> Acceptance | None:
    """Acceptance of the trees; None if there are none."""
    curves = [
        curve for (width, kind), some in trees.items() for curve in curves_of(some, width, kind)
    ]
    order = sorted(curves, key=lambda curve: (curve.width, curve.min_path_probability))
    return Acceptance(tuple(order), measured=True) if order else None


def time_rounds(
    artifact: Artifact,
    plan: Plan,
    predict_for: PredictFor,
    samples: Several[Sample],
    setting: Setting,
    progress: Progress,
    effort: Effort = USUAL_EFFORT,
) -> Rounds:
    """Rounds of the plan, one answer at a time, and of plain decoding. `predict_for`: the plan's
    predictions for a usage, without corrections."""
    staged, prompts = replace(artifact, plan=plan), prompts_of(artifact, samples)
    rounds, drafting = Rounds(), [method for method in plan.placements if method != "plain"]
    methods: list[Method] = [*drafting, "plain"]
    for method in methods:
        seconds = effort.plain_seconds if method == "plain" else effort.time_seconds
        progress(f"timing rounds, {method}", 0.0)
        until = time.perf_counter() + seconds
        with opened(staged, method, setting) as engine:
            for prompt in prompts:
                rounds = rounds.and_also(timed_rounds(engine, prompt, predict_for, until))
                if time.perf_counter() > until:
                    break
    return rounds


def timed_rounds(
    engine: Engine, prompt: list[int], predict_for: PredictFor, until: float
) -> Rounds:
    """Rounds of one answer, greedy, one at least. The first one is not timed if there are others,
    as the engine measures temporaries in it."""
    prompt = prompt[: engine.plan.context // 2]
    params = GenerationParams(
        ANSWER_TOKENS, stop_token_ids=frozenset(engine.artifact.spec.eos_token_ids)
    )
    clock = [(0.0, 0.0, 0)]
    exact = engine.model.exact
    checked = exact.streamed is None or exact.streamed_bytes > 0
    with engine.new_sequence() as sequence:
        for _ in sequence.generate(prompt, params):
            stats = sequence.stats
            if stats.accepted:
                clock.append((stats.draft_seconds, stats.verify_seconds, stats.drafted_levels))
                if time.perf_counter() > until:
                    break
        stats = sequence.stats
    said = predict_for(engine.method, Usage(len(prompt), max(2, stats.generated_tokens)))
    passed = [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in pairwise(clock)]
    passed = passed[1:] or passed
    verify = (Timed(tuple(seconds for _, seconds, _ in passed), said.verify_seconds),)
    first = Timed((stats.time_to_first_token_seconds,), said.time_to_first_token_seconds)
    asked = (first,) if checked else ()  # else the time includes the check of digests
    if engine.method == "plain":
        return Rounds(plain=verify, prompt=asked)
    # As if each had the levels of a usual round.
    drafted = [seconds * said.levels_per_round / max(1, levels) for seconds, _, levels in passed]
    draft = (Timed(tuple(drafted), said.draft_seconds),)
    return drafted_rounds(engine.method, draft, verify, asked)


def measure_hierarchical_cost(
    artifact: Artifact,
    plan: Plan,
    samples: Several[Sample],
    setting: Setting,
    progress: Progress,
    seconds: float,
) -> HierarchicalCost | None:
    """Measure the passes per level of hierarchical drafting on answers to the samples, one after
    another. None: no level was drafted."""
    method: Method = "substitute+draft-model"
    tree = plan.draft_of(method).tree
    usual = make_tree(min(2, tree.width), tree.depth, 0.1)
    staged, levels, agreed = replace(artifact, plan=with_tree(plan, method, usual)), 0, 0
    progress("rehearsing the draft model's proposals", 0.0)
    until = time.perf_counter() + seconds
    with opened(staged, method, setting) as engine:
        drafter = engine.model.drafter
        assert isinstance(drafter, SubstituteDrafter) and drafter.proposals is not None
        proposals, tries = drafter.proposals, list[int]()

        def counted(states: Several[DecodeState]) -> Propose:
            propose = proposals(states)

            def run(growing: Several[PartialTree], rooms: Several[int]) -> list[list[int]]:
                found = propose(growing, rooms)
                # Where it stops before there is no room, one more pass said so.
                tries.extend(min(len(f) + 1, room) for f, room in zip(found, rooms, strict=True))
                return found

            return run

        engine.model = replace(engine.model, drafter=replace(drafter, proposals=counted))
        ends = frozenset(artifact.spec.eos_token_ids)
        for prompt in prompts_of(artifact, samples):
            with engine.new_sequence() as sequence:
                some = prompt[: engine.plan.context // 2]
                for _ in sequence.generate(
                    some, GenerationParams(ANSWER_TOKENS, stop_token_ids=ends)
                ):
                    pass
                levels += sequence.stats.drafted_levels
                agreed += sum(sequence.stats.proposed)
            if time.perf_counter() > until:
                break
    return HierarchicalCost((levels - agreed) / levels, sum(tries) / levels) if levels else None


def time_head(
    artifact: Artifact,
    plan: Plan,
    samples: Several[Sample],
    setting: Setting,
    progress: Progress,
    seconds: float,
) -> DraftHeadResult | None:
    """Time real rounds of the draft head with each of a few trees, on answers to the samples.
    Returns the best tree's result; None: the plan has no memory for a head, or no tree fits."""
    head, placement = artifact.spec.draft_head, plan.placements.get("substitute")
    if head is None or placement is None or not placement.ledger.drafter:
        return None
    prompts, found = prompts_of(artifact, samples), list[DraftHeadResult]()
    most, widest = plan.verify_width, plan.tree.width
    trees = [tree for tree in HEAD_TREES if tree.num_nodes <= most and tree.width <= widest]
    how = OpenOptions(
        drafter=head.layout, device=setting.device, link_bandwidth=setting.link_bandwidth
    )
    with Engine.open(replace(artifact, plan=plan), how) as engine:
        drafter = engine.model.drafter
        assert isinstance(drafter, HeadDrafter)
        speed_of_answers(engine, prompts[:1], seconds / 8)  # temporaries are measured in it
        for number, tree in enumerate(trees):
            progress("timing the draft head", number / len(trees))
            engine.model = replace(engine.model, drafter=replace(drafter, trees=(tree,)))
            speeds = speed_of_answers(engine, prompts, seconds / len(trees))
            found.append(DraftHeadResult(tree, *speeds))
    return max(found, key=lambda one: one.tokens_per_second or 0.0, default=None)


def speed_of_answers(
    engine: Engine, prompts: Several[list[int]], seconds: float
) -> tuple[float, float]:
    """Tokens per second and per round, after the first token, of about `seconds` of answers."""
    tokens, rounds, spent, until = 0, 0, 0.0, time.perf_counter() + seconds
    params = GenerationParams(
        ANSWER_TOKENS, stop_token_ids=frozenset(engine.artifact.spec.eos_token_ids)
    )
    for prompt in prompts:
        with engine.new_sequence() as sequence:
            for _ in sequence.generate(prompt[: engine.plan.context // 2], params):
                if sequence.stats.accepted and time.perf_counter() > until:
                    break
            stats = sequence.stats
        tokens += stats.generated_tokens - 1
        rounds += len(stats.accepted)
        spent += stats.decode_seconds
        if rounds and time.perf_counter() > until:
            break
    return (tokens / spent, tokens / rounds) if rounds else (0.0, 0.0)


def prompts_of(artifact: Artifact, samples: Several[Sample]) -> list[list[int]]:
    text = load_tokenizer(artifact.path / "tokenizer")
    return [ids for _, ids in known_ids(text, samples, artifact.spec.vocab_size)]


def with_tree(plan: Plan, method: Method, tree: Tree) -> Plan:
    """The plan with another tree for a method, at any batch size."""
    if method == "substitute":
        return replace(plan, tree=tree)
    return replace(plan, drafts={method: replace(plan.drafts[method], tree=tree)})


def pack_programs(folder: Path, plan: Plan, spec: ModelSpec) -> None:
    """Pack what was compiled for the plan into the artifact `folder`."""
    pack_prebuilt(folder, map(cpp.program, kernel_sources(spec, plan)))
    pack_prebuilt(folder, graph_programs(plan, spec))


def opened(artifact: Artifact, method: Method, setting: Setting) -> Engine:
    how = OpenOptions(
        method, padded=False, device=setting.device, link_bandwidth=setting.link_bandwidth
    )
    return Engine.open(artifact, how)
