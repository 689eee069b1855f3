"""`subspec-bench trace`: a timeline of each round, and the probabilities of drafted tokens.

The answer is decoded twice. Times are from the first run, which only records times; the second one
reads the draft's probabilities, which takes time. Both must give the same tokens, which is checked.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact
from subspec.runtime.bench.records import Setting, setting_of
from subspec.runtime.bench.tasks import Asking
from subspec.runtime.bench.throughput import warm_up
from subspec.runtime.bench.variants import Source
from subspec.runtime.clock import Span, chrome_trace
from subspec.runtime.draft.beam import Level, PartialTree, TokenTree
from subspec.runtime.draft.drafter import DecodeState, Drafter, SubstituteDrafter
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.sequence import GenerationParams

TRACE, STEPS = "trace.json", "steps.jsonl"


@dataclass(frozen=True)
class Node:
    """A drafted token. probability: the substitutes', given its parents and without sharpening,
    whichever drafter proposed it; None: the draft has no substitutes."""

    token: int
    parent: int  # its index in the round; 0 is the root
    depth: int
    probability: float | None


@dataclass(frozen=True)
class Step:
    """One round. The prompt's pass is round 0."""

    round: int
    emitted: tuple[int, ...]
    logprobs: tuple[float, ...]  # of the emitted tokens, by the exact model
    accepted: int
    levels: int
    draft_seconds: float
    verify_seconds: float
    stream_wait_seconds: float
    streamed_bytes: int
    lossy_tokens: int  # of `emitted`, that differ from the exact model's
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Watched:
    """A drafter that also records each tree, with its nodes' probabilities if the substitutes draft
    or check it."""

    drafter: Drafter
    found: list[tuple[Node, ...]]

    def draft(self, states: Sequence[DecodeState]) -> list[TokenTree]:
        trees = self.drafter.draft(states)
        [state], [tree] = states, trees
        likely = None
        if isinstance(self.drafter, SubstituteDrafter):
            likely = probabilities(self.drafter, state, tree)
        self.found.append(nodes_of(tree, likely))
        return trees


def probabilities(drafter: SubstituteDrafter, state: DecodeState, tree: TokenTree) -> list[float]:
    """Probability of each node except the root. Computed level by level, even if the draft checked
    several levels in one pass."""
    slots = state.cache.tree_slots(drafter.verify_width)
    run = drafter.pass_over([state.cache], [slots])
    found = [0.0] * tree.num_nodes
    for level in range(int(tree.depths[: tree.num_nodes].max())):
        nodes = torch.nonzero(tree.depths[: tree.num_nodes] == level).flatten()
        logits = run(
            [PartialTree(0, tree, Level(nodes, torch.zeros(len(nodes), device=nodes.device)))]
        )
        for parent, row in zip(nodes.tolist(), logits, strict=True):
            children = torch.nonzero(tree.parents[: tree.num_nodes] == parent).flatten().tolist()
            likely = row.float().softmax(-1)
            for child in children:
                if child:  # the root is its own parent
                    found[child] = float(likely[tree.tokens[child]])
    return found


def nodes_of(tree: TokenTree, likely: Sequence[float] | None) -> tuple[Node, ...]:
    tokens, parents, depths = (
        one[: tree.num_nodes].tolist() for one in (tree.tokens, tree.parents, tree.depths)
    )
    return tuple(
        Node(tokens[at], parents[at], depths[at], likely[at] if likely else None)
        for at in range(1, tree.num_nodes)
    )


def traced(
    artifact: Artifact, source: Source, prompt: list[int], how: Asking
) -> tuple[Setting, list[Span], list[Step]]:
    """Trace one answer: return its spans, rounds and setting. Raises SubspecError."""
    assert how.max_tokens is not None, "the command has a default"
    opened, params = source.how, how.params(how.max_tokens, artifact, logprobs=0)
    options = OpenOptions(
        opened.method,
        opened.drafter,
        device=opened.device,
        link_bandwidth=opened.link_bandwidth,
        graphs=not opened.no_graphs,
        trace=True,
        draft_temperature=opened.draft_temperature,
    )
    with Engine.open(artifact, options) as engine:
        setting = setting_of(engine, how.temperature, how.seed, how.lossy)
        spans = engine.model.clock.spans
        assert spans is not None
        warm_up(engine, prompt)
        spans.clear()
        steps = list(steps_of(engine, prompt, params))
        timed = list(spans)
        drafter = engine.model.drafter
        if drafter is None:
            return setting, timed, steps
        watched = Watched(drafter, [])
        engine.model = replace(engine.model, drafter=watched)
        again = list(steps_of(engine, prompt, params))
    if [step.emitted for step in again] != [step.emitted for step in steps]:
        raise SubspecError(Exit.UNEXPECTED, "two runs of one prompt gave different rounds")
    every = [(), *watched.found]
    steps = [replace(one, nodes=nodes) for one, nodes in zip(steps, every, strict=True)]
    return setting, timed, steps


def steps_of(engine: Engine, prompt: list[int], params: GenerationParams) -> Iterator[Step]:
    with engine.new_sequence() as sequence:
        before = sequence.stats
        for number, emitted in enumerate(sequence.generate(prompt, params)):
            now = sequence.stats
            yield Step(
                number,
                tuple(emitted),
                tuple(one.logprob for one in sequence.logprobs[-len(emitted) :]),
                now.accepted[-1] if number else 0,
                now.drafted[-1] if number else 0,
                now.draft_seconds - before.draft_seconds if number else 0.0,
                now.verify_seconds - before.verify_seconds
                if number
                else now.time_to_first_token_seconds,
                now.stream_wait_seconds - before.stream_wait_seconds,
                now.streamed_bytes - before.streamed_bytes,
                now.lossy_tokens - before.lossy_tokens,
                (),
            )
            before = now


def write_trace(
    folder: Path, setting: Setting, spans: Sequence[Span], steps: Sequence[Step]
) -> None:
    """Write trace.json (Perfetto, chrome://tracing) and steps.jsonl."""
    about = {
        "artifact": setting.artifact,
        "machine": setting.machine,
        "method": setting.label,
        "temperature": f"{setting.temperature:g}",
        "seed": str(setting.seed),
    }
    (folder / TRACE).write_text(json.dumps(chrome_trace(spans, about)) + "\n", "utf-8")
    lines = [json.dumps(asdict(step)) + "\n" for step in steps]
    (folder / STEPS).write_text("".join(lines), "utf-8")
