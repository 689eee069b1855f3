"""A built artifact decodes calibration prompts: how deep drafts are accepted there, and how long
real rounds take.

Acceptance is replayed: where the exact model's own answer is known, a tree of any width can be
grown over it and judged with the substitutes alone, level by level, until the answer leaves it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from subspec.artifacts.acceptance import Acceptance, Curve
from subspec.artifacts.plan import Method, Plan, Usage
from subspec.artifacts.store import Artifact
from subspec.planner.calibration import NUM_TOKENS, Sample, in_turns, sample_ids
from subspec.planner.learn import Foretell, Rounds, Timed
from subspec.planner.search import make_tree
from subspec.runtime.decode import draft_pass
from subspec.runtime.draft import levels
from subspec.runtime.sampling import Sampling
from subspec.runtime.session import Session
from subspec.runtime.text import load_text

WIDTHS = (1, 3, 8)
DEEPEST = 32
DRAFT_SECONDS = 120.0  # for speculation and its replays, at most
PLAIN_SECONDS = 10.0
PLAIN_TOKENS = 12

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Setting:
    """How the artifact is run."""

    link_bandwidth: float | None = None
    device: str | None = None


@dataclass(frozen=True)
class Rehearsal:
    acceptance: Acceptance | None  # None: no tree was judged
    rounds: Rounds


@dataclass(frozen=True)
class Played:
    """One answer as it was decoded."""

    tokens: tuple[int, ...]  # of prompt and answer
    starts: tuple[int, ...]  # where rounds began: the index of each one's root in `tokens`
    rounds: Rounds


@dataclass
class Counts:
    """Of the trees of one width on one kind of text."""

    tried: list[int] = field(default_factory=lambda: [0] * DEEPEST)
    accepted: list[int] = field(default_factory=lambda: [0] * DEEPEST)

    def add(self, num_accepted: int, num_tried: int) -> None:
        for level in range(num_tried):
            self.tried[level] += 1
            self.accepted[level] += level < num_accepted

    def curve(self, width: int, kind: str) -> Curve:
        deepest = sum(count > 0 for count in self.tried)
        return Curve(width, kind, tuple(self.tried[:deepest]), tuple(self.accepted[:deepest]))


@torch.inference_mode()
def rehearse(
    artifact: Artifact,
    plan: Plan,
    foretell: Foretell,
    samples: Sequence[Sample],
    setting: Setting,
    progress: Progress,
) -> Rehearsal:
    """Runs `plan` over the samples, all kinds alike, until they or the time is up; `foretell`: what
    it promises for a usage, without corrections."""
    staged, text = replace(artifact, plan=plan), load_text(artifact.path / "tokenizer")
    turns = [(sample.kind, sample_ids(text, sample)) for sample in in_turns(samples)]
    counts: dict[tuple[int, str], Counts] = {}
    rounds = Rounds()
    if plan.substitute is not None:
        with opened(staged, "substitute", setting) as session:
            until = time.perf_counter() + DRAFT_SECONDS
            for index, (kind, prompt) in enumerate(turns):
                progress("rehearsing the plan", index / len(turns))
                played = play(session, prompt, NUM_TOKENS, foretell, until)
                rounds = rounds.and_also(played.rounds)
                replay(session, played, kind, counts, until)
                if time.perf_counter() > until:
                    break
    with opened(staged, "plain", setting) as session:
        until = time.perf_counter() + PLAIN_SECONDS
        played = play(session, turns[0][1], PLAIN_TOKENS, foretell, until)
        rounds = rounds.and_also(played.rounds)
    progress("rehearsing the plan", 1.0)
    curves = tuple(c.curve(width, kind) for (width, kind), c in sorted(counts.items()))
    judged = tuple(curve for curve in curves if curve.tried)
    return Rehearsal(Acceptance(judged, measured=True) if judged else None, rounds)


def opened(artifact: Artifact, method: Method, setting: Setting) -> Session:
    return Session(
        artifact,
        method,
        padded=False,
        device=setting.device,
        link_bandwidth=setting.link_bandwidth,
    )


def play(
    session: Session, prompt: list[int], num_tokens: int, foretell: Foretell, until: float
) -> Played:
    """Decodes greedily, one round at least. The answer may become longer, so that no round's tree
    is cut for the end; and the first round is not timed: the session watches its temporaries."""
    depth = session.plan.tree.depth if session.method == "substitute" else 0
    prompt = prompt[: session.plan.context // 2]
    eos = frozenset(session.artifact.spec.eos_token_ids)
    tokens, starts, clock = [*prompt], list[int](), [(0.0, 0.0)]
    session.model.cache.roll_back(0)
    exact = session.model.exact
    checked = exact.ring is None or exact.streamed_bytes > 0
    for emitted in session.generate(prompt, num_tokens + depth, Sampling(), eos):
        stats = session.stats
        if len(tokens) > len(prompt):
            clock.append((stats.draft_seconds, stats.verify_seconds))
            starts.append(len(tokens) - 1)
        tokens += emitted
        if len(tokens) - len(prompt) >= num_tokens or (starts and time.perf_counter() > until):
            break
    said = foretell(session.method, Usage(len(prompt), len(tokens) - len(prompt)))
    passed = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(clock)][1:]
    draft = (Timed(tuple(draft for draft, _ in passed), said.draft_seconds),)
    verify = (Timed(tuple(verify for _, verify in passed), said.verify_seconds),)
    first = Timed((session.stats.time_to_first_token_seconds,), said.time_to_first_token_seconds)
    asked = (first,) if checked else ()  # what streams first is checked as well
    if session.method == "plain":
        rounds = Rounds(plain=verify, prompt=asked)
    else:
        rounds = Rounds(draft, verify, prompt=asked)
    return Played(tuple(tokens), tuple(starts), rounds)


def replay(
    session: Session,
    played: Played,
    kind: str,
    counts: dict[tuple[int, str], Counts],
    until: float,
) -> None:
    """Judges trees where rounds began, one place at least, the last first: what a tree leaves in
    the cache lies behind the starts that are still to come."""
    vocab_size = session.artifact.spec.vocab_size
    for start in reversed(played.starts):
        session.model.cache.roll_back(start)
        for width in WIDTHS:
            if width <= vocab_size:
                judged = judge(session, played.tokens[start:], width)
                counts.setdefault((width, kind), Counts()).add(*judged)
        if time.perf_counter() > until:
            return


def judge(session: Session, known: Sequence[int], width: int) -> tuple[int, int]:
    """(levels accepted, levels tried) of a tree over `known`: its root, and what follows."""
    cache = session.model.cache
    room = cache.padding_slot - cache.length
    tree = make_tree(width, min(DEEPEST, len(known) - 1, (room - 1) // width))
    root = torch.tensor(known[:1], device=session.device)
    alive, level = 0, 0
    if tree.depth < 1:
        return 0, 0
    for grown in levels(root, tree, tree.num_nodes, draft_pass(session.model)):
        first = 1 + width * level
        some = slice(first, first + width)
        nodes = list(zip(grown.parents[some].tolist(), grown.tokens[some].tolist(), strict=True))
        wanted = (alive, known[level + 1])
        if wanted not in nodes:
            return level, level + 1
        alive = first + nodes.index(wanted)
        level += 1
    return level, level
