"""Promised against real: plans of one model for several budgets, on prompts they have not seen.

    python benchmarks/planner_grid.py MODEL [--budgets 0.45,0.6,0.8] [--plannings 3] [--rivals 2x8]
        [--beside MODEL]

MODEL is a checkpoint folder; a budget is a size or a share of the model. Another form of it, such
as its FP8 twin, may be planned for the same bytes and decode in turns with it. Every planning
measures the machine, builds an artifact and rehearses it, as `subspec-plan` does. Then the plans,
and rivals picked by hand over the first artifact, decode each prompt in turns, so that slow minutes
of the machine favour nobody. Answers end where the model ends them, or where they begin to repeat
themselves. The prompts (prompts.jsonl) were written independently of those that plans are rehearsed
on.

Each line says what was predicted and reached in tokens/s over all tokens, and a round's tokens.
`repeats` is how far the real speeds of the plannings of one budget lie apart; `beside` is what the
other form streams a round and reaches, as a share of the model's. The last line of stdout is one
JSON object.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import click
from speed import opened

from subspec.artifacts.common.command import reported, size_option
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import parse_size, short_size
from subspec.artifacts.footprint import model_bytes
from subspec.artifacts.format.store import Artifact, open_artifact
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import Constraints, Plan
from subspec.planner.model.checkpoint import read_spec
from subspec.planner.model.hub import resolve
from subspec.planner.planning import PlanRequest, plan_again, plan_model
from subspec.planner.rehearse.calibration import in_turns, read_samples, sample_ids
from subspec.planner.rehearse.rehearsal import before_loop
from subspec.runtime.engine import Engine
from subspec.runtime.sequence import GenerationParams, Stats
from subspec.runtime.text.tokenizer import load_tokenizer

PROMPTS = Path(__file__).with_name("prompts.jsonl")
Kind = Literal["planning", "beside", "by hand"]  # beside: another form of the model
CONTEXT = 512
RIVALS = "1x8,2x8,4x12"  # width and depth, of whole trees


@dataclass(frozen=True)
class Contender:
    """One plan on all prompts."""

    kind: Kind
    number: int  # of its kind, from 1
    budget_bytes: int
    plan: str
    predicted: float  # tokens/s
    actual: float
    predicted_tokens: float  # a round
    tokens_actual: float
    levels_actual: float
    streamed_bytes: float  # a round
    ledger_bytes: int
    peak_bytes: int

    @property
    def error(self) -> float:
        return self.predicted / self.actual - 1


Entry = tuple[Kind, int, Artifact]


def planned(model: Path, budget_bytes: int, out: Path, link_bandwidth: int | None) -> Artifact:
    request = PlanRequest(
        budget_bytes, Constraints(context=CONTEXT), "cpu", link_bandwidth=link_bandwidth
    )
    plan_model(request, resolve(str(model)), out, notify=say)
    return open_artifact(out)


def rivals_of(artifact: Artifact, trees: str, link_bandwidth: int | None) -> list[Entry]:
    """Over the artifact's weights and profile; those that fit."""
    found = list[Entry]()
    for tree in filter(None, trees.split(",")):
        width, depth = map(int, tree.split("x"))
        constraints = Constraints(CONTEXT, width, depth, "substitute", min_path_probability=0.0)
        request = PlanRequest(
            artifact.plan.budget_bytes, constraints, "cpu", link_bandwidth=link_bandwidth
        )
        try:
            plan = plan_again(request, artifact, artifact.path, sweeps=False).plan
        except SubspecError as error:
            if error.exit_code != Exit.INFEASIBLE:
                raise
            continue
        found.append(("by hand", len(found) + 1, replace(artifact, plan=plan)))
    return found


def decode_in_turns(
    entries: list[Entry],
    prompts: list[list[int]],
    num_tokens: int,
    link_bandwidth: int | None,
) -> list[Contender]:
    """All contenders decode each prompt; who begins alternates."""
    answers: list[list[Stats]] = [[] for _ in entries]
    with ExitStack() as stack:
        engines = [
            stack.enter_context(opened(artifact, artifact.plan.method, link_bandwidth))
            for *_, artifact in entries
        ]
        for engine in engines:
            answer(engine, prompts[0], 2)  # weights are checked when they stream first
        for turn, prompt in enumerate(prompts):
            order = range(len(engines)) if turn % 2 else reversed(range(len(engines)))
            for index in order:
                answers[index].append(answer(engines[index], prompt, num_tokens))
        every = zip(entries, engines, answers, strict=True)
        return [contender_of(*entry[:2], engine, some) for entry, engine, some in every]


def answer(engine: Engine, prompt: list[int], num_tokens: int) -> Stats:
    ends, said = frozenset(engine.artifact.spec.eos_token_ids), list[int]()

    def repeats(tokens: Sequence[int]) -> int | None:
        return len(tokens) if before_loop([*said, *tokens]) < len(said) + len(tokens) else None

    params = GenerationParams(num_tokens, stop_token_ids=ends, stopping_criteria=repeats)
    with engine.new_sequence() as sequence:
        for tokens in sequence.generate(prompt, params):
            said += tokens
        return sequence.stats


def contender_of(kind: Kind, number: int, engine: Engine, answers: list[Stats]) -> Contender:
    plan, tokens = engine.plan, sum(one.generated_tokens - 1 for one in answers)
    rounds = max(1, sum(len(one.accepted) for one in answers))
    said = plan.predicted[plan.method]
    return Contender(
        kind=kind,
        number=number,
        budget_bytes=plan.budget_bytes,
        plan=name_of(plan),
        predicted=said.tokens_per_second,
        actual=tokens / sum(one.decode_seconds for one in answers),
        predicted_tokens=said.tokens_per_round,
        tokens_actual=tokens / rounds,
        levels_actual=sum(one.drafted_levels for one in answers) / rounds,
        streamed_bytes=sum(one.streamed_bytes for one in answers) / rounds,
        ledger_bytes=plan.placement(plan.method).ledger.total_bytes,
        peak_bytes=engine.peak.peak_bytes,
    )


def name_of(plan: Plan) -> str:
    if plan.method == "plain":
        return "plain"
    stop = plan.tree.min_path_probability
    return f"{plan.tree.width}x{plan.tree.depth}" + (f" to {stop:g}" if stop else "")


def line_of(one: Contender) -> str:
    return (
        f"{short_size(one.budget_bytes):>9} {one.kind:8} {one.number} {one.plan:12}"
        f" predicted {one.predicted:6.2f} actual {one.actual:6.2f} ({one.error:+.0%})"
        f"  a round {one.predicted_tokens:.1f}, {one.tokens_actual:.1f}"
        f" of {one.levels_actual:.1f} levels, {short_size(one.streamed_bytes)}"
        f"  peak {short_size(one.peak_bytes)} of {short_size(one.ledger_bytes)}"
    )


def summary_of(found: list[Contender]) -> dict[str, object]:
    def of(kind: Kind, size: int) -> list[Contender]:
        return [one for one in found if one.kind == kind and one.budget_bytes == size]

    budgets = sorted({one.budget_bytes for one in found})
    ours = [one for one in found if one.kind == "planning"]
    speeds = [[one.actual for one in of("planning", size)] for size in budgets]
    errors = [abs(one.error) for one in ours]
    pairs = [(of("planning", size), of("beside", size)) for size in budgets]
    beside = [against(*pair) for pair in pairs if pair[1]]
    return {
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "repeats": [max(some) / min(some) - 1 for some in speeds],
        "best_rival": [
            max((one.actual for one in of("by hand", size)), default=0.0) / statistics.median(some)
            for size, some in zip(budgets, speeds, strict=True)
        ],
        "worst_peak": max(one.peak_bytes / one.ledger_bytes for one in ours),
        "beside": beside,
    }


def against(ours: list[Contender], others: list[Contender]) -> dict[str, float]:
    """What the other form reaches and streams as a share of ours, and its worst prediction."""

    def median(name: str, some: list[Contender]) -> float:
        return statistics.median(getattr(one, name) for one in some)

    streamed = median("streamed_bytes", ours)
    return {
        "speed": median("actual", others) / median("actual", ours),
        "streamed": median("streamed_bytes", others) / streamed if streamed else 0.0,
        "worst_error": max(abs(one.error) for one in others),
    }


def budget_of(text: str, spec: ModelSpec) -> int:
    """A size such as 8GB, or a share of the model."""
    is_share = text.replace(".", "").isdigit()
    return int(float(text) * model_bytes(spec)) if is_share else parse_size(text)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--budgets", default="0.45,0.6,0.8", show_default=True)
@click.option("--plannings", default=3, show_default=True, help="Of each budget.")
@click.option("--rivals", default=RIVALS, show_default=True, help="WIDTHxDEPTH of whole trees.")
@click.option("--prompts", "count", default=36, show_default=True, help="Few are not the average.")
@click.option("--tokens", default=80, show_default=True, help="Of each answer at most.")
@click.option("--beside", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--link-bandwidth", callback=size_option, metavar="SIZE")
@click.option("--folder", type=click.Path(path_type=Path), help="Keeps the artifacts in it.")
@reported
def main(
    model: Path,
    budgets: str,
    plannings: int,
    rivals: str,
    count: int,
    tokens: int,
    beside: Path | None,
    link_bandwidth: int | None,
    folder: Path | None,
) -> None:
    """Promised against real speed of plans for MODEL."""
    resolved = resolve(str(model))
    spec, found = read_spec(resolved.path, resolved.source), list[Contender]()
    with tempfile.TemporaryDirectory(dir=folder and folder.parent) as scratch:
        for budget in (budget_of(text, spec) for text in budgets.split(",")):
            out = (folder or Path(scratch)) / short_size(budget).replace(" ", "")
            entries = list[Entry]()
            for index in range(1, plannings + 1):
                of_model = planned(model, budget, Path(f"{out}-{index}"), link_bandwidth)
                entries.append(("planning", index, of_model))
                if beside is not None:
                    other = planned(beside, budget, Path(f"{out}-beside-{index}"), link_bandwidth)
                    entries.append(("beside", index, other))
            first = entries[0][2]
            entries += rivals_of(first, rivals, link_bandwidth)
            text = load_tokenizer(first.path / "tokenizer")
            prompts = [sample_ids(text, one) for one in in_turns(read_samples(PROMPTS))[:count]]
            some = decode_in_turns(
                entries, [p[: CONTEXT - tokens] for p in prompts], tokens, link_bandwidth
            )
            for one in some:
                say(line_of(one))
            found += some
    summary = {"model": model.name} | summary_of(found)
    say("".join(f"{name}: {value}\n" for name, value in summary.items()))
    print(json.dumps(summary | {"contenders": [asdict(one) for one in found]}))


if __name__ == "__main__":
    main()
