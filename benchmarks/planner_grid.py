"""Is the planner's word kept? Plans for caps x contexts, run on kinds of text they have not seen.

    python benchmarks/planner_grid.py ARTIFACT [--caps 0.4,0.5,0.65] [--contexts 512,2048]

First the machine is measured and the artifact rehearsed, as `subspec-plan --from --reprofile` does.
Caps are sizes (8GB) or shares of the model. Every cell (cap, context, kind of text) prints what was
predicted and reached, in tokens/s, and the peak; every (cap, context) also plain decoding unpadded,
and rivals picked by hand: half the depth, a chain, a wider tree, the smallest tree with most
residency. A rival and the plan decode each prompt in turns. In the end a cap that is too small is
asked for, and the smallest that the error names is run. Prompts fill a third of the context.

A shared machine has fast and slow minutes: `repeats` says how far the plan's own speed moved when
it decoded the same prompts again against each rival. The last line of stdout is one JSON object.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path

import click
import torch

from subspec.artifacts.common.command import reported, size_option
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import parse_size, short_size
from subspec.artifacts.format.store import Artifact, open_artifact
from subspec.artifacts.plan import USUAL, Constraints, Method, Plan, Usage
from subspec.artifacts.profile import Profile
from subspec.planner.machine.profiles import under_link
from subspec.planner.planning import PlanRequest, plan_again
from subspec.planner.rehearse.calibration import Sample, read_samples, sample_ids
from subspec.planner.solve.costs import model_bytes
from subspec.planner.solve.outlook import predict_for
from subspec.planner.solve.search import search
from subspec.planner.solve.storage import Storage
from subspec.runtime.model.sampling import Sampling
from subspec.runtime.session import Session
from subspec.runtime.text.tokenizer import ChatTokenizer, load_tokenizer

PROMPTS = Path(__file__).with_name("prompts.jsonl")
SHARE_OF_CONTEXT = 1 / 3  # that a prompt fills
SHORTEST = 64  # tokens of a prompt
PLAIN_TOKENS = 10
RIVAL_SHARE = 1.05  # a rival that is faster by more is a mistake of the planner


@dataclass(frozen=True)
class Cell:
    """One kind of text under one plan."""

    budget_bytes: int
    context: int
    kind: str
    plan: str
    predicted: float  # tokens/s
    actual: float
    first_token_predicted: float  # seconds
    first_token_actual: float
    accepted_predicted: float  # tokens a round
    accepted_actual: float
    peak_predicted: int
    peak_actual: int

    @property
    def error(self) -> float:
        return self.predicted / self.actual - 1


@dataclass(frozen=True)
class Rival:
    budget_bytes: int
    context: int
    name: str
    tokens_per_second: float
    plans_tokens_per_second: float  # of the plan, over the same prompts

    @property
    def advantage(self) -> float:
        return self.tokens_per_second / self.plans_tokens_per_second - 1


@dataclass(frozen=True)
class Plain:
    """Plain decoding under one plan."""

    budget_bytes: int
    context: int
    predicted: float
    actual: float


@dataclass(frozen=True)
class Ran:
    """One prompt."""

    kind: str
    prompt_tokens: int
    answer_tokens: int
    seconds: float  # after the first token
    first_seconds: float
    rounds: int
    peak_bytes: int


Prompts = dict[str, list[list[int]]]  # token ids by kind of text
Planner = Callable[[int, Constraints], Plan]


def prompt_length(context: int) -> int:
    """Tokens of a prompt under a plan for `context`."""
    return max(SHORTEST, int(context * SHARE_OF_CONTEXT))


def long_prompts(
    text: ChatTokenizer, samples: tuple[Sample, ...], context: int, count: int
) -> Prompts:
    """`count` prompts of each kind, each as long as a third of the context: samples of that kind
    after another, the last one to be continued."""
    wanted = prompt_length(context)
    found: Prompts = {}
    for kind in dict.fromkeys(sample.kind for sample in samples):
        own = [sample_ids(text, sample) for sample in samples if sample.kind == kind]
        if count > len(own):
            found_ones = f"--prompts {count}, and there are {len(own)} of the kind {kind}"
            raise SubspecError(Exit.USAGE, found_ones, f"--prompts {len(own)}")
        for last in range(count):
            ids, before = list(own[last]), cycle(own[last + 1 :] + own[: last + 1])
            while len(ids) < wanted:
                ids = next(before) + ids
            found.setdefault(kind, []).append(ids[-wanted:])
    return found


@contextmanager
def warm(
    artifact: Artifact, plan: Plan, method: Method, ids: list[int], link_bandwidth: int | None
) -> Iterator[Session]:
    """A session whose weights have been checked: that happens when they stream first."""
    staged = replace(artifact, plan=plan)
    with Session(staged, method, padded=False, link_bandwidth=link_bandwidth) as session:
        for _ in session.generate(ids[:16], 2, Sampling()):
            pass
        yield session


def run_one(session: Session, kind: str, ids: list[int], tokens: int) -> Ran:
    eos = frozenset(session.artifact.spec.eos_token_ids)
    session.model.cache.roll_back(0)
    for _ in session.generate(ids, tokens, Sampling(), eos):
        pass
    stats = session.stats
    return Ran(
        kind,
        len(ids),
        stats.generated_tokens,
        stats.decode_seconds,
        stats.time_to_first_token_seconds,
        len(stats.accepted),
        session.peak.peak_bytes,
    )


def run(
    artifact: Artifact,
    plan: Plan,
    method: Method,
    prompts: Prompts,
    tokens: int,
    link_bandwidth: int | None,
) -> list[Ran]:
    """All prompts in one session."""
    listed = [(kind, ids) for kind, some in prompts.items() for ids in some]
    with warm(artifact, plan, method, listed[0][1], link_bandwidth) as session:
        return [run_one(session, kind, ids, tokens) for kind, ids in listed]


def speed(some: list[Ran]) -> float:
    return sum(ran.answer_tokens - 1 for ran in some) / sum(ran.seconds for ran in some)


def cells_of(
    artifact: Artifact, profile: Profile, plan: Plan, stored: Storage, ran: list[Ran]
) -> list[Cell]:
    """Each kind of text; its prompts' predictions are weighted as they turned out long."""
    cells = []
    checked = replace(profile, digest_rate=0.0)  # a first pass has been, see `run`
    for kind in dict.fromkeys(one.kind for one in ran):
        own = [one for one in ran if one.kind == kind]
        said = [
            predict_for(
                artifact.spec, checked, plan, stored, plan.method,
                Usage(one.prompt_tokens, one.answer_tokens, kind),
            )
            for one in own
        ]  # fmt: skip
        answered = [one.answer_tokens - 1 for one in own]
        seconds = [n / s.tokens_per_second for n, s in zip(answered, said, strict=True)]
        a_round = [s.draft_seconds + s.verify_seconds for s in said]
        rounds = [total / one for total, one in zip(seconds, a_round, strict=True)]
        cells.append(
            Cell(
                plan.budget_bytes,
                plan.context,
                kind,
                name_of(plan),
                sum(answered) / sum(seconds),
                speed(own),
                statistics.mean(s.time_to_first_token_seconds for s in said),
                statistics.mean(one.first_seconds for one in own),
                sum(answered) / sum(rounds),
                sum(answered) / sum(one.rounds for one in own),
                max(s.fast_peak_bytes for s in said),
                max(one.peak_bytes for one in own),
            )
        )
    return cells


def name_of(plan: Plan) -> str:
    if plan.method == "plain":
        return "plain"
    at_most = "<" if plan.tree.min_path_probability else ""  # drafts may end early
    return f"{plan.tree.width}x{at_most}{plan.tree.depth}"


def rivals_of(plan: Plan) -> dict[str, Constraints]:
    """What a person might have picked instead."""
    width, depth = (plan.tree.width, plan.tree.depth) if plan.method == "substitute" else (1, 8)
    return {
        f"half as deep, {width}x{max(1, depth // 2)}": Constraints(
            width=width, depth=max(1, depth // 2)
        ),
        f"a chain, 1x{depth}": Constraints(width=1, depth=depth),
        f"twice as wide, {2 * width}x{max(1, depth // 2)}": Constraints(
            width=2 * width, depth=max(1, depth // 2)
        ),
        "most residency, 1x6": Constraints(width=1, depth=6),
    }


def run_rivals(
    artifact: Artifact,
    plan: Plan,
    planner: Planner,
    prompts: Prompts,
    tokens: int,
    link_bandwidth: int | None,
) -> list[Rival]:
    """Those that fit."""
    rivals = []
    for name, constraints in rivals_of(plan).items():
        try:
            fixed = replace(constraints, context=plan.context, method="substitute")
            other = planner(plan.budget_bytes, fixed)
        except SubspecError:
            continue
        theirs, ours = duel(artifact, other, plan, prompts, tokens, link_bandwidth)
        rival = Rival(plan.budget_bytes, plan.context, name, theirs, ours)
        say(f"    rival {name}: {theirs:.2f}, the plan {ours:.2f} ({rival.advantage:+.0%})")
        rivals.append(rival)
    return rivals


def duel(
    artifact: Artifact,
    rival: Plan,
    plan: Plan,
    prompts: Prompts,
    tokens: int,
    link_bandwidth: int | None,
) -> tuple[float, float]:
    """tokens/s of both; they decode each prompt in turns, and who begins alternates."""
    listed = [(kind, ids) for kind, some in prompts.items() for ids in some]
    first = listed[0][1]
    theirs, ours = list[Ran](), list[Ran]()
    with (
        warm(artifact, rival, "substitute", first, link_bandwidth) as challenger,
        warm(artifact, plan, plan.method, first, link_bandwidth) as holder,
    ):
        for index, (kind, ids) in enumerate(listed):
            pair = [(challenger, theirs), (holder, ours)]
            for session, ran in pair if index % 2 else pair[::-1]:
                ran.append(run_one(session, kind, ids, tokens))
    return speed(theirs), speed(ours)


def repeats(rivals: list[Rival]) -> float:
    """The largest share by which a plan's own speed differed between its duels."""
    by_plan: dict[tuple[int, int], list[float]] = {}
    for rival in rivals:
        key = (rival.budget_bytes, rival.context)
        by_plan.setdefault(key, []).append(rival.plans_tokens_per_second)
    return max((max(some) / min(some) - 1 for some in by_plan.values()), default=0.0)


def run_plain(
    artifact: Artifact,
    profile: Profile,
    plan: Plan,
    stored: Storage,
    prompts: Prompts,
    link_bandwidth: int | None,
) -> Plain:
    """Unpadded, one prompt."""
    some = dict([*prompts.items()][:1])
    [ran] = run(artifact, plan, "plain", some, PLAIN_TOKENS, link_bandwidth)
    usage = Usage(ran.prompt_tokens, PLAIN_TOKENS)
    said = predict_for(artifact.spec, profile, plan, stored, "plain", usage).tokens_per_second
    say(f"    plain, unpadded: predicted {said:.2f}, actual {speed([ran]):.2f} tokens/s")
    return Plain(plan.budget_bytes, plan.context, said, speed([ran]))


def smallest_cap(
    artifact: Artifact, planner: Planner, prompts: Prompts, link_bandwidth: int | None
) -> dict[str, object]:
    """Asks for far too little; the cap that the refusal names must work."""
    try:
        planner(model_bytes(artifact.spec) // 50, Constraints())
    except SubspecError as error:
        named = re.search(r"--vram (\d+)B", error.hint)
        assert named is not None, f"no cap is named: {error.hint}"
        budget = int(named[1])
        plan = planner(budget, Constraints())
        short = {kind: [some[0][: plan.context // 2]] for kind, some in prompts.items()}
        ran = run(artifact, plan, plan.method, short, 8, link_bandwidth)
        peak = max(one.peak_bytes for one in ran)
        return {"refused": error.message, "budget_bytes": budget, "peak_bytes": peak,
                "plan": name_of(plan), "works": peak <= budget}  # fmt: skip
    return {"refused": None}


def budget_of(cap: str, model_bytes: int) -> int:
    """A size such as 8GB, or a share of the model."""
    return int(float(cap) * model_bytes) if cap.replace(".", "").isdigit() else parse_size(cap)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--caps", default="0.4,0.5,0.65", show_default=True, help="Sizes, or shares of the model."
)
@click.option("--contexts", default="512,2048", show_default=True)
@click.option("--prompts", "count", default=2, show_default=True, help="Of each kind.")
@click.option("--tokens", default=64, show_default=True, help="Of each answer.")
@click.option("--link-bandwidth", callback=size_option, metavar="SIZE")
@click.option("--no-rivals", is_flag=True)
@reported
def main(
    artifact: Path,
    caps: str,
    contexts: str,
    count: int,
    tokens: int,
    link_bandwidth: int | None,
    no_rivals: bool,
) -> None:
    """Predicted against actual, cell by cell, for plans over ARTIFACT's weights."""
    opened = open_artifact(artifact)
    spec, stored = opened.spec, Storage(tuple(opened.stored_parts()))
    torch.set_num_threads(opened.plan.num_threads)
    asked = opened.plan.budget_bytes
    say(f"measuring and rehearsing for {short_size(asked)}")
    request = PlanRequest(asked, link_bandwidth=link_bandwidth)
    planned = plan_again(request, opened, artifact, measure_again=True, tell=say)
    profile, acceptance = planned.profile, planned.plan.acceptance
    say(f"corrections: {profile.corrections}")
    profile = under_link(profile, link_bandwidth)
    text, samples = load_tokenizer(artifact / "tokenizer"), read_samples(PROMPTS)

    def planner(budget: int, constraints: Constraints) -> Plan:
        fixed = replace(constraints, encoding="kept")
        prompt_tokens = (
            prompt_length(constraints.context) if constraints.context else USUAL.prompt_tokens
        )
        usage = Usage(prompt_tokens, tokens)
        return search(spec, profile, budget, fixed, acceptance, stored, usage)

    cells, rivals, plain = list[Cell](), list[Rival](), list[Plain]()
    for context in map(int, contexts.split(",")):
        prompts = long_prompts(text, samples, context, count)
        first = {kind: some[:1] for kind, some in prompts.items()}
        for cap in caps.split(","):
            budget = budget_of(cap, model_bytes(spec))
            try:
                plan = planner(budget, Constraints(context=context))
            except SubspecError as error:
                say(f"{short_size(budget)}, context {context}: {error.message}")
                continue
            ran = run(opened, plan, plan.method, prompts, tokens, link_bandwidth)
            found = cells_of(opened, profile, plan, stored, ran)
            for cell in found:
                say(line_of(cell))
            cells += found
            plain.append(run_plain(opened, profile, plan, stored, first, link_bandwidth))
            if not no_rivals:
                rivals += run_rivals(opened, plan, planner, first, tokens, link_bandwidth)
    errors = [abs(cell.error) for cell in cells]
    summary = {
        "artifact": artifact.name,
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "plain_errors": [one.predicted / one.actual - 1 for one in plain],
        "first_token_median_error": statistics.median(
            abs(c.first_token_predicted / c.first_token_actual - 1) for c in cells
        ),
        "worst_peak_error": max(abs(c.peak_actual / c.peak_predicted - 1) for c in cells),
        "cells_above_the_cap": sum(cell.peak_actual > cell.budget_bytes for cell in cells),
        "repeats": repeats(rivals),
        "rivals_faster": sum(r.tokens_per_second > RIVAL_SHARE * r.plans_tokens_per_second
                             for r in rivals),
        "smallest_cap": smallest_cap(opened, planner, prompts, link_bandwidth),
    }  # fmt: skip
    say("".join(f"{name}: {value}\n" for name, value in summary.items()))
    tables = {"cells": cells, "plain": plain, "rivals": rivals}
    listed = {name: [asdict(row) for row in rows] for name, rows in tables.items()}
    print(json.dumps({**summary, **listed}))


def line_of(cell: Cell) -> str:
    return (
        f"{short_size(cell.budget_bytes):>9} context {cell.context:<5} {cell.kind:8} {cell.plan:6}"
        f" predicted {cell.predicted:7.2f} actual {cell.actual:7.2f} ({cell.error:+.0%})"
        f"  a round {cell.accepted_predicted:.1f}, {cell.accepted_actual:.1f}"
        f"  first {cell.first_token_predicted:.2f}, {cell.first_token_actual:.2f} s"
        f"  peak {short_size(cell.peak_predicted)}, {short_size(cell.peak_actual)}"
    )


if __name__ == "__main__":
    main()
