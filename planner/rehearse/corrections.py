"""Correction factors of a Profile: measured time of real rounds over the predicted one.

Rounds come from the planner's rehearsal and from the records of a user's runs.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean

from subspec.artifacts.acceptance import Acceptance, Curve, added, margin_of_ratio
from subspec.artifacts.plan import Method, Plan, Prediction, Tree, Usage
from subspec.artifacts.profile import Corrections, Profile
from subspec.artifacts.runs import Run

TRIMMED = 0.1  # share of the fastest and of the slowest rounds that a mean leaves out; chosen
MIN_FACTOR, MAX_FACTOR = 0.2, 5.0  # of a factor; chosen

PredictFor = Callable[[Method, Usage], Prediction]


@dataclass(frozen=True)
class Timed:
    """Rounds of one answer: measured seconds of one phase, and the prediction for each round."""

    actual: tuple[float, ...]
    predicted: float


@dataclass(frozen=True)
class Rounds:
    """Timed rounds by phase."""

    draft: tuple[Timed, ...] = ()
    verify: tuple[Timed, ...] = ()
    plain: tuple[Timed, ...] = ()
    prompt: tuple[Timed, ...] = ()
    draft_model: tuple[Timed, ...] = ()  # drafts of a draft model alone
    hierarchical_draft: tuple[Timed, ...] = ()  # it proposed, substitutes checked

    def and_also(self, other: "Rounds") -> "Rounds":
        return Rounds(
            self.draft + other.draft,
            self.verify + other.verify,
            self.plain + other.plain,
            self.prompt + other.prompt,
            self.draft_model + other.draft_model,
            self.hierarchical_draft + other.hierarchical_draft,
        )


def drafted_rounds(
    method: Method,
    draft: tuple[Timed, ...],
    verify: tuple[Timed, ...],
    prompt: tuple[Timed, ...],
) -> Rounds:
    """Rounds of a method that drafts."""
    if method == "draft-model":
        return Rounds((), verify, (), prompt, draft_model=draft)
    if method == "substitute+draft-model":
        return Rounds((), verify, (), prompt, hierarchical_draft=draft)
    return Rounds(draft, verify, (), prompt)


def corrections(rounds: Rounds, link_bandwidth: int | None = None) -> Corrections:
    """Correction factors from rounds. link_bandwidth: bytes per second that the link was limited
    to."""
    return Corrections(
        draft=slowdown(rounds.draft),
        draft_model=slowdown(rounds.draft_model),
        hierarchical_draft=slowdown(rounds.hierarchical_draft),
        verify=slowdown(rounds.verify),
        plain=slowdown(rounds.plain),
        prompt=slowdown(rounds.prompt),
        num_rounds=sum(len(timed.actual) for timed in (*rounds.verify, *rounds.plain)),
        link_bandwidth=link_bandwidth,
    )


def updated(before: Corrections, rounds: Rounds, found: Corrections) -> Corrections:
    """`found`, with the factors of `before`, from the same speed of the link, for phases that were
    not timed."""
    return Corrections(
        draft=found.draft if rounds.draft else before.draft,
        draft_model=found.draft_model if rounds.draft_model else before.draft_model,
        hierarchical_draft=found.hierarchical_draft
        if rounds.hierarchical_draft
        else before.hierarchical_draft,
        verify=found.verify if rounds.verify else before.verify,
        plain=found.plain if rounds.plain else before.plain,
        prompt=found.prompt if rounds.prompt else before.prompt,
        num_rounds=found.num_rounds or before.num_rounds,
        link_bandwidth=found.link_bandwidth,
    )


def slowdown(some: Sequence[Timed]) -> float:
    """Trimmed mean of measured over predicted seconds; 1 if nothing was timed."""
    ratios = sorted(a / t.predicted for t in some for a in t.actual if t.predicted > 0)
    if not ratios:
        return 1.0
    cut = int(len(ratios) * TRIMMED)
    return min(MAX_FACTOR, max(MIN_FACTOR, fmean(ratios[cut : len(ratios) - cut])))


def without_corrections(profile: Profile) -> Profile:
    """The profile without correction factors."""
    return replace(profile, corrections=Corrections())


def rounds_of_runs(runs: Iterable[Run], predict_for: PredictFor) -> Rounds:
    """Rounds of recorded runs. Only the sums of a run are known, so each of its rounds counts as
    the mean. `predict_for` predicts without corrections."""
    found = Rounds()
    for run in runs:
        usage = Usage(run.prompt_tokens, max(2, run.generated_tokens))
        said = predict_for(run.method, usage)
        verify = repeated(run.verify_seconds, run.rounds, said.verify_seconds)
        prompt: tuple[Timed, ...] = ()
        if not run.cached_tokens and not run.includes_digest_check:
            prompt = repeated(run.first_token_seconds, 1, said.time_to_first_token_seconds)
        if run.method == "plain":
            # The padded twin is slower, and its speed is not predicted.
            found = found.and_also(Rounds(plain=() if run.padded else verify, prompt=prompt))
        else:
            share = run.drafted_levels / max(1.0, run.rounds * said.levels_per_round)
            draft = repeated(run.draft_seconds, run.rounds, said.draft_seconds * share)
            found = found.and_also(drafted_rounds(run.method, draft, verify, prompt))
    return found


def repeated(seconds: float, rounds: int, predicted: float) -> tuple[Timed, ...]:
    return (Timed((seconds / rounds,) * rounds, predicted),) if rounds else ()


def with_runs(
    acceptance: Acceptance, plan: Plan, runs: Iterable[Run], method: Method = "substitute"
) -> Acceptance:
    """Acceptance with the trees of a method's runs as an additional kind of text. For widths other
    than the plan's, they are scaled by the ratio that other text had; all thresholds get the same
    counts."""
    drafted = [run for run in runs if run.method == method and any(run.drafted)]
    if not drafted:
        return acceptance
    own = curve_of(drafted, plan.draft_of(method).tree.width)
    others = tuple(curve for curve in acceptance.curves if curve.kind != RUNS)
    before = replace(acceptance, curves=others or acceptance.curves)
    widths = {own.width, *(curve.width for curve in before.curves)}
    found = [as_if(own, before, *pair) for pair in product(widths, before.thresholds)]
    every = (*(others if acceptance.measured else ()), *found)
    order = sorted(every, key=lambda curve: (curve.width, curve.min_path_probability))
    return Acceptance(tuple(order), measured=True)


def as_if(own: Curve, before: Acceptance, width: int, threshold: float) -> Curve:
    """The curve scaled to trees of another width, level by level, for those that end by a
    threshold."""
    levels, accepted, last = len(own.accepted), list[int](), own.num_trees
    here, there = (
        before.acceptance_rates(Tree(one, levels, min_path_probability=threshold))
        for one in (own.width, width)
    )
    for number, (count, most) in enumerate(zip(own.accepted, own.drafted, strict=True)):
        share = there[number] / here[number] if here[number] else 1.0
        last = min(last, most, round(count * share))
        accepted.append(last)
    return replace(own, width=width, min_path_probability=threshold, accepted=tuple(accepted))


RUNS = "runs"  # kind of text of a user's runs


def curve_of(runs: Sequence[Run], width: int) -> Curve:
    rounds = sum(run.rounds for run in runs)
    tokens = [sum(run.accepted_by_level) + run.rounds for run in runs]
    answers = zip(tokens, (run.rounds for run in runs), strict=True)
    return Curve(
        width,
        0.0,
        RUNS,
        len(runs),
        rounds,
        added(run.drafted for run in runs),
        added(run.accepted_by_level for run in runs),
        margin_of_ratio(list(answers)),
    )
