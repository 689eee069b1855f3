"""Predicted against actual: plans for budgets x contexts, on kinds of text they have not seen.

    python benchmarks/planner_grid.py ARTIFACT [--budgets 0.4,0.5,0.65] [--contexts 512,2048]

First the machine is measured and the artifact rehearsed, as `subspec-plan --from --reprofile` does.
Budgets are sizes (8GB) or shares of the model. Every cell (budget, context, kind of text) prints
what was predicted and reached, in tokens/s, and the peak; every (budget, context) also plain
decoding unpadded, and rivals picked by hand: half the depth, a chain, a wider tree, the smallest
tree with most residency. A rival and the plan decode each prompt in turns. In the end a budget that
is too small is asked for, and the smallest that the error names is run. Prompts fill a third of the
context.

A shared machine has fast and slow minutes: `repeats` says how far the plan's own speed moved when
it decoded the same prompts again against each rival. The last line of stdout is one JSON object.
"""

import json
import re
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path

import click
import torch
from speed import opened

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.common.command import reported, size_option
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import parse_size, short_size
from subspec.artifacts.footprint import model_bytes
from subspec.artifacts.format.store import Artifact, open_artifact
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import USUAL, Constraints, Method, Plan, Prediction, Usage
from subspec.artifacts.profile import Profile
from subspec.planner.machine.profiles import under_link
from subspec.planner.planning import PlanRequest, plan_again
from subspec.planner.rehearse.calibration import Sample, read_samples, sample_ids
from subspec.planner.solve.outlook import predict_for
from subspec.planner.solve.search import search
from subspec.planner.solve.storage import Storage
from subspec.runtime.engine import Engine
from subspec.runtime.sequence import GenerationParams, Stats
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
    stats: Stats
    peak_bytes: int


Prompts = dict[str, list[list[int]]]  # token ids by kind of text


@dataclass(frozen=True)
class Grid:
    """What all cells share."""

    artifact: Artifact
    profile: Profile
    stored: Storage
    acceptance: Acceptance
    num_tokens: int  # of each answer
    link_bandwidth: int | None

    def plan(self, budget_bytes: int, constraints: Constraints) -> Plan:
        """Over the artifact's weights as they are, to be fast for the grid's own prompts."""
        context = constraints.context
        prompt_tokens = prompt_length(context) if context else USUAL.prompt_tokens
        return search(
            self.artifact.spec,
            self.profile,
            budget_bytes,
            replace(constraints, encoding="kept"),
            self.acceptance,
            self.stored,
            Usage(prompt_tokens, self.num_tokens),
        )

    def predict(self, profile: Profile, plan: Plan, method: Method, usage: Usage) -> Prediction:
        return predict_for(self.artifact.spec, profile, plan, self.stored, method, usage)


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
def warm(grid: Grid, plan: Plan, method: Method, prompts: Prompts) -> Iterator[Engine]:
    """An engine whose weights have been checked: that happens when they stream first."""
    staged = replace(grid.artifact, plan=plan)
    first = next(iter(prompts.values()))[0]
    with opened(staged, method, grid.link_bandwidth) as engine:
        run_one(engine, "", first[:16], 2)
        yield engine


def run_one(engine: Engine, kind: str, prompt: list[int], num_tokens: int) -> Ran:
    ends = frozenset(engine.artifact.spec.eos_token_ids)
    with engine.new_sequence() as sequence:
        for _ in sequence.generate(prompt, GenerationParams(num_tokens, end_tokens=ends)):
            pass
        return Ran(kind, sequence.stats, engine.peak.peak_bytes)


def run(grid: Grid, plan: Plan, method: Method, prompts: Prompts, num_tokens: int) -> list[Ran]:
    """All prompts in one engine."""
    with warm(grid, plan, method, prompts) as engine:
        return [
            run_one(engine, kind, prompt, num_tokens)
            for kind, some in prompts.items()
            for prompt in some
        ]


def speed(some: list[Ran]) -> float:
    answered = sum(ran.stats.generated_tokens - 1 for ran in some)
    return answered / sum(ran.stats.decode_seconds for ran in some)


def cells_of(grid: Grid, plan: Plan, ran: list[Ran]) -> list[Cell]:
    """Each kind of text; its prompts' predictions are weighted as they turned out long."""
    cells = []
    checked = replace(grid.profile, digest_rate=0.0)  # a first pass has been, see `warm`
    for kind in dict.fromkeys(one.kind for one in ran):
        own = [one for one in ran if one.kind == kind]
        stats = [one.stats for one in own]
        said = [
            grid.predict(
                checked, plan, plan.method, Usage(one.prompt_tokens, one.generated_tokens, kind)
            )
            for one in stats
        ]
        answered = [one.generated_tokens - 1 for one in stats]
        seconds = [n / s.tokens_per_second for n, s in zip(answered, said, strict=True)]
        a_round = [s.draft_seconds + s.verify_seconds for s in said]
        rounds = [total / one for total, one in zip(seconds, a_round, strict=True)]
        cells.append(
            Cell(
                budget_bytes=plan.budget_bytes,
                context=plan.context,
                kind=kind,
                plan=name_of(plan),
                predicted=sum(answered) / sum(seconds),
                actual=speed(own),
                first_token_predicted=statistics.mean(s.time_to_first_token_seconds for s in said),
                first_token_actual=statistics.mean(s.time_to_first_token_seconds for s in stats),
                accepted_predicted=sum(answered) / sum(rounds),
                accepted_actual=sum(answered) / sum(len(one.accepted) for one in stats),
                peak_predicted=max(s.fast_peak_bytes for s in said),
                peak_actual=max(one.peak_bytes for one in own),
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


def run_rivals(grid: Grid, plan: Plan, prompts: Prompts) -> list[Rival]:
    """Those that fit."""
    rivals = []
    for name, constraints in rivals_of(plan).items():
        try:
            fixed = replace(constraints, context=plan.context, method="substitute")
            other = grid.plan(plan.budget_bytes, fixed)
        except SubspecError as error:
            if error.exit_code != Exit.INFEASIBLE:
                raise
            continue
        theirs, ours = duel(grid, other, plan, prompts)
        rival = Rival(plan.budget_bytes, plan.context, name, theirs, ours)
        say(f"    rival {name}: {theirs:.2f}, the plan {ours:.2f} ({rival.advantage:+.0%})")
        rivals.append(rival)
    return rivals


def duel(grid: Grid, rival: Plan, plan: Plan, prompts: Prompts) -> tuple[float, float]:
    """tokens/s of both; they decode each prompt in turns, and who begins alternates."""
    listed = [(kind, prompt) for kind, some in prompts.items() for prompt in some]
    theirs, ours = list[Ran](), list[Ran]()
    with (
        warm(grid, rival, "substitute", prompts) as challenger,
        warm(grid, plan, plan.method, prompts) as holder,
    ):
        for index, (kind, prompt) in enumerate(listed):
            pair = [(challenger, theirs), (holder, ours)]
            for engine, ran in pair if index % 2 else pair[::-1]:
                ran.append(run_one(engine, kind, prompt, grid.num_tokens))
    return speed(theirs), speed(ours)


def repeats(rivals: list[Rival]) -> float:
    """The largest share by which a plan's own speed differed between its duels."""
    by_plan: dict[tuple[int, int], list[float]] = {}
    for rival in rivals:
        key = (rival.budget_bytes, rival.context)
        by_plan.setdefault(key, []).append(rival.plans_tokens_per_second)
    return max((max(some) / min(some) - 1 for some in by_plan.values()), default=0.0)


def run_plain(grid: Grid, plan: Plan, prompts: Prompts) -> Plain:
    """Unpadded, one prompt."""
    some = dict([*prompts.items()][:1])
    [ran] = run(grid, plan, "plain", some, PLAIN_TOKENS)
    usage = Usage(ran.stats.prompt_tokens, PLAIN_TOKENS)
    said = grid.predict(grid.profile, plan, "plain", usage).tokens_per_second
    say(f"    plain, unpadded: predicted {said:.2f}, actual {speed([ran]):.2f} tokens/s")
    return Plain(plan.budget_bytes, plan.context, said, speed([ran]))


def smallest_budget(grid: Grid, prompts: Prompts) -> dict[str, object]:
    """Asks for far too little; the budget that the refusal names must work."""
    try:
        grid.plan(model_bytes(grid.artifact.spec) // 50, Constraints())
    except SubspecError as error:
        named = re.search(r"--vram (\d+)B", error.hint)
        assert named is not None, f"no budget is named: {error.hint}"
        budget = int(named[1])
        plan = grid.plan(budget, Constraints())
        short = {kind: [some[0][: plan.context // 2]] for kind, some in prompts.items()}
        ran = run(grid, plan, plan.method, short, 8)
        peak = max(one.peak_bytes for one in ran)
        return {"refused": error.message, "budget_bytes": budget, "peak_bytes": peak,
                "plan": name_of(plan), "works": peak <= budget}  # fmt: skip
    return {"refused": None}


def budget_of(text: str, spec: ModelSpec) -> int:
    """A size such as 8GB, or a share of the model."""
    is_share = text.replace(".", "").isdigit()
    return int(float(text) * model_bytes(spec)) if is_share else parse_size(text)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def make_grid(artifact: Artifact, num_tokens: int, link_bandwidth: int | None) -> Grid:
    """Measures this machine and rehearses the artifact."""
    say(f"measuring and rehearsing for {short_size(artifact.plan.budget_bytes)}")
    request = PlanRequest(artifact.plan.budget_bytes, link_bandwidth=link_bandwidth)
    planned = plan_again(request, artifact, artifact.path, measure_again=True, tell=say)
    profile, plan = planned.profile, planned.plan
    say(f"corrections: {profile.corrections}")
    return Grid(
        artifact,
        under_link(profile, link_bandwidth),
        Storage(tuple(artifact.stored_parts())),
        plan.acceptance,
        num_tokens,
        link_bandwidth,
    )


@click.command()
@click.argument("folder", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.option(
    "--budgets", default="0.4,0.5,0.65", show_default=True, help="Sizes, or shares of the model."
)
@click.option("--contexts", default="512,2048", show_default=True)
@click.option("--prompts", "count", default=2, show_default=True, help="Of each kind.")
@click.option("--tokens", default=64, show_default=True, help="Of each answer.")
@click.option("--link-bandwidth", callback=size_option, metavar="SIZE")
@click.option("--no-rivals", is_flag=True)
@reported
def main(
    folder: Path,
    budgets: str,
    contexts: str,
    count: int,
    tokens: int,
    link_bandwidth: int | None,
    no_rivals: bool,
) -> None:
    """Predicted against actual, cell by cell, for plans over ARTIFACT's weights."""
    artifact = open_artifact(folder)
    torch.set_num_threads(artifact.plan.num_threads)
    text, samples = load_tokenizer(folder / "tokenizer"), read_samples(PROMPTS)
    grid = make_grid(artifact, tokens, link_bandwidth)
    cells, rivals, plain = list[Cell](), list[Rival](), list[Plain]()
    for context in map(int, contexts.split(",")):
        prompts = long_prompts(text, samples, context, count)
        first = {kind: some[:1] for kind, some in prompts.items()}
        for budget in (budget_of(one, artifact.spec) for one in budgets.split(",")):
            try:
                plan = grid.plan(budget, Constraints(context=context))
            except SubspecError as error:
                if error.exit_code != Exit.INFEASIBLE:
                    raise
                say(f"{short_size(budget)}, context {context}: {error.message}")
                continue
            found = cells_of(grid, plan, run(grid, plan, plan.method, prompts, tokens))
            for cell in found:
                say(line_of(cell))
            cells += found
            plain.append(run_plain(grid, plan, first))
            if not no_rivals:
                rivals += run_rivals(grid, plan, first)
    if not cells:
        raise SubspecError(
            Exit.INFEASIBLE, f"no plan fits any of --budgets {budgets}", "ask for larger ones"
        )
    errors = [abs(cell.error) for cell in cells]
    summary = {
        "artifact": artifact.path.name,
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "plain_errors": [one.predicted / one.actual - 1 for one in plain],
        "first_token_median_error": statistics.median(
            abs(c.first_token_predicted / c.first_token_actual - 1) for c in cells
        ),
        "worst_peak_error": max(abs(c.peak_actual / c.peak_predicted - 1) for c in cells),
        "cells_above_the_budget": sum(cell.peak_actual > cell.budget_bytes for cell in cells),
        "repeats": repeats(rivals),
        "rivals_faster": sum(r.tokens_per_second > RIVAL_SHARE * r.plans_tokens_per_second
                             for r in rivals),
        "smallest_budget": smallest_budget(grid, prompts),
    }  # fmt: skip
    say("".join(f"{name}: {value}\n" for name, value in summary.items()))
    tables = {
        "cells": [asdict(one) for one in cells],
        "plain": [asdict(one) for one in plain],
        "rivals": [asdict(one) for one in rivals],
    }
    print(json.dumps(summary | tables))


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
