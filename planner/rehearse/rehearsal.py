"""Runs a built artifact on calibration prompts, to measure real rounds and (`replay.py`) acceptance
rates.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.format.prebuilt import pack_prebuilt
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Method, Plan, Usage
from subspec.planner.rehearse.calibration import Sample, in_turns, sample_ids
from subspec.planner.rehearse.corrections import PredictFor, Rounds, Timed
from subspec.planner.rehearse.replay import WIDTHS, Trees, acceptance_of, replay
from subspec.runtime.draft.drafter import SubstituteDrafter
from subspec.runtime.engine import Engine, OpenOptions, kernel_sources
from subspec.runtime.sequence import GenerationParams, Sequence
from subspec.runtime.text.tokenizer import load_tokenizer

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Effort:
    """How long a plan is rehearsed; the defaults take three minutes at most, less with few or
    quickly decoded samples."""

    draft_seconds: float = 180.0  # for speculation and its replays
    plain_seconds: float = 5.0
    num_tokens: int = 128  # of each answer; later tokens are easier to predict than the first
    plain_tokens: int = 12  # each streams the weights
    # Widths of replayed trees; others are interpolated (artifacts/acceptance.py).
    tree_widths: tuple[int, ...] = WIDTHS


USUAL_EFFORT = Effort()


@dataclass(frozen=True)
class Setting:
    """How the artifact is run."""

    link_bandwidth: float | None = None
    device: str | None = None


@dataclass(frozen=True)
class Rehearsal:
    acceptance: Acceptance | None  # None: no tree was replayed
    rounds: Rounds


@dataclass(frozen=True)
class DecodedSample:
    """One answer as it was decoded."""

    tokens: tuple[int, ...]  # of prompt and answer
    starts: tuple[int, ...]  # index in `tokens` of the root of each round
    rounds: Rounds


def rehearse(
    artifact: Artifact,
    plan: Plan,
    predict_for: PredictFor,
    samples: Several[Sample],
    setting: Setting,
    progress: Progress,
    effort: Effort = USUAL_EFFORT,
) -> Rehearsal:
    """Run `plan` on the samples, all kinds alike, until they or the time are used up.
    `predict_for`: its predictions for a usage, without corrections."""
    staged, text = replace(artifact, plan=plan), load_tokenizer(artifact.path / "tokenizer")
    turns = [(sample.kind, sample_ids(text, sample)) for sample in in_turns(samples)]
    trees: Trees = {}
    rounds = Rounds()
    if "substitute" in plan.placements:
        with opened(staged, "substitute", setting) as engine:
            drafter = engine.model.drafter
            assert isinstance(drafter, SubstituteDrafter)
            until = time.perf_counter() + effort.draft_seconds
            for index, (kind, prompt) in enumerate(turns):
                progress("rehearsing the plan", index / len(turns))
                with engine.new_sequence() as sequence:
                    count = effort.num_tokens
                    decoded = decode(engine, sequence, prompt, count, predict_for, until)
                    rounds = rounds.and_also(decoded.rounds)
                    known = decoded.tokens, decoded.starts
                    widths = effort.tree_widths
                    replay(drafter, sequence.cache, *known, kind, trees, until, widths)
                if time.perf_counter() > until:
                    break
    with opened(staged, "plain", setting) as engine, engine.new_sequence() as sequence:
        until = time.perf_counter() + effort.plain_seconds
        prompt = turns[0][1]
        decoded = decode(engine, sequence, prompt, effort.plain_tokens, predict_for, until)
        rounds = rounds.and_also(decoded.rounds)
    progress("rehearsing the plan", 1.0)
    return Rehearsal(acceptance_of(trees), rounds)


def pack_kernels(folder: Path, plan: Plan) -> None:
    """Pack the libraries that were compiled for the plan into the artifact `folder`."""
    pack_prebuilt(folder, kernel_sources(plan))


def opened(artifact: Artifact, method: Method, setting: Setting) -> Engine:
    how = OpenOptions(
        method, padded=False, device=setting.device, link_bandwidth=setting.link_bandwidth
    )
    return Engine.open(artifact, how)


def decode(
    engine: Engine,
    sequence: Sequence,
    prompt: list[int],
    num_tokens: int,
    predict_for: PredictFor,
    until: float,
) -> DecodedSample:
    """Decode greedily, at least one round. The limit of tokens is larger than `num_tokens`, so that
    no tree is shortened at the end. The first round is not timed, as the engine measures
    temporaries in it."""
    depth = engine.plan.tree.depth if engine.method == "substitute" else 0
    prompt = prompt[: engine.plan.context // 2]
    ends = frozenset(engine.artifact.spec.eos_token_ids)
    tokens, starts, clock = [*prompt], list[int](), [(0.0, 0.0, 0)]
    exact = engine.model.exact
    checked = exact.streamed is None or exact.streamed_bytes > 0
    params = GenerationParams(num_tokens + depth, end_tokens=ends)
    for emitted in sequence.generate(prompt, params):
        stats = sequence.stats
        if len(tokens) > len(prompt):
            clock.append((stats.draft_seconds, stats.verify_seconds, stats.drafted_levels))
            starts.append(len(tokens) - 1)
        tokens += emitted
        if len(tokens) - len(prompt) >= num_tokens or (starts and time.perf_counter() > until):
            break
    said = predict_for(engine.method, Usage(len(prompt), len(tokens) - len(prompt)))
    passed = [(b[0] - a[0], b[1] - a[1], b[2] - a[2]) for a, b in pairwise(clock)][1:]
    drafted = [seconds * depth / max(1, levels) for seconds, _, levels in passed]
    draft = (Timed(tuple(drafted), said.draft_seconds),)  # scaled to a whole tree
    verify = (Timed(tuple(seconds for _, seconds, _ in passed), said.verify_seconds),)
    first = Timed((sequence.stats.time_to_first_token_seconds,), said.time_to_first_token_seconds)
    asked = (first,) if checked else ()  # else the time includes the check of digests
    if engine.method == "plain":
        rounds = Rounds(plain=verify, prompt=asked)
    else:
        rounds = Rounds(draft, verify, prompt=asked)
    return DecodedSample(tuple(tokens), tuple(starts), rounds)
