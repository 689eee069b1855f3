"""Choose the default drafter: all that a plan has memory for answer the same prompts in turns, and
one other than the plan's own is chosen only if it is clearly faster.

Tokens do not depend on the drafter, so answers to a prompt differ in their time alone.
"""

import math
import time
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from subspec.artifacts.common.progress import Progress
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import DrafterName, Plan, method_of
from subspec.planner.rehearse.calibration import Sample
from subspec.planner.rehearse.rehearsal import Setting, prompts_of, speed_of_answers
from subspec.runtime.engine import Engine, OpenOptions

# How many times as fast as the plan's own another drafter must be. Chosen: what a person would
# notice, and more than two measurements of the same differ by.
CLEARLY = 1.05
SURE = 2.0  # standard errors that it must be faster by
MIN_PROMPTS = 3  # for an estimate of the error
NUM_PROMPTS = 8  # that the time is meant for

Speeds = dict[DrafterName, dict[int, float]]  # tokens a second, by the number of the prompt


@dataclass(frozen=True)
class Rival:
    """A drafter against the plan's own on the same prompts."""

    drafter: DrafterName
    times_as_fast: float
    is_sure: bool  # that it is faster at all


def with_fastest_drafter(
    artifact: Artifact,
    plan: Plan,
    samples: Several[Sample],
    setting: Setting,
    progress: Progress,
    seconds: float,
) -> Plan:
    """The plan with the fastest drafter on answers to the samples as its default, and a reason.
    seconds: for each drafter. A plan without a draft, or with memory for its substitutes only, is
    returned unchanged."""
    openers = memories(artifact, plan)
    if plan.method == "plain" or openers == ["substitute"]:
        return plan
    own = plan.drafter or plan.method
    prompts = prompts_of(artifact, samples)
    speeds = speeds_of(artifact, plan, openers, prompts, setting, progress, seconds)
    best = fastest(own, speeds)
    plan = replace(plan, reasons=(*plan.reasons, why_drafter(own, speeds, best)))
    if best is None:
        return plan
    return replace(plan, method=method_of(best.drafter), drafter=best.drafter)


def memories(artifact: Artifact, plan: Plan) -> list[DrafterName]:
    """Drafter to open an engine with, for each method that drafts, so that the engine has all
    drafters that fit the method's memory."""
    found, head = list[DrafterName](), artifact.spec.draft_head
    for method, placement in plan.placements.items():
        if method == "substitute" and head is not None and placement.ledger.drafter:
            found.append(head.layout)
        elif method != "plain":
            found.append(method)
    return found


def speeds_of(
    artifact: Artifact,
    plan: Plan,
    openers: Several[DrafterName],
    prompts: Several[list[int]],
    setting: Setting,
    progress: Progress,
    seconds: float,
) -> Speeds:
    """Speeds of each drafter, alternating prompt by prompt. Engines, which exclude each other,
    alternate too: forwards for every other prompt, backwards for the rest."""
    staged, found = replace(artifact, plan=plan), Speeds()
    turns = [openers] if len(openers) == 1 else [openers, openers[::-1]]
    for turn, order in enumerate(turns):
        own = list(enumerate(prompts))[turn :: len(turns)]
        for opener in order:
            progress(f"comparing drafters, {opener}", turn / len(turns))
            how = OpenOptions(
                drafter=opener, device=setting.device, link_bandwidth=setting.link_bandwidth
            )
            with Engine.open(staged, how) as engine:
                add_speeds(engine, own, seconds / len(turns), found)
    return found


def add_speeds(
    engine: Engine, prompts: Several[tuple[int, list[int]]], seconds: float, found: Speeds
) -> None:
    """Add the speeds of each drafter of the engine to `found`. seconds: for each drafter."""
    drafters, share = list(engine.drafters), seconds / NUM_PROMPTS
    for drafter in drafters:  # temporaries are measured in it, and weights are checked
        engine.set_drafter(drafter)
        speed_of_answers(engine, [prompt for _, prompt in prompts[:1]], share)
    until = time.perf_counter() + seconds * len(drafters)
    for turn, (number, prompt) in enumerate(prompts):
        for drafter in drafters if turn % 2 else reversed(drafters):
            engine.set_drafter(drafter)
            speed, _ = speed_of_answers(engine, [prompt], share)
            if speed:
                found.setdefault(drafter, {})[number] = speed
        if turn + 1 >= MIN_PROMPTS and time.perf_counter() > until:
            break


def fastest(own: DrafterName, speeds: Speeds) -> Rival | None:
    """The fastest rival of the plan's own drafter; None: no other one is clearly faster."""
    rivals = [rival for name in speeds if (rival := against(own, name, speeds)) is not None]
    clear = [one for one in rivals if one.is_sure and one.times_as_fast > CLEARLY]
    return max(clear, key=lambda one: one.times_as_fast, default=None)


def against(own: DrafterName, other: DrafterName, speeds: Speeds) -> Rival | None:
    """Compare a drafter with the plan's own. None: it is the same, or too few prompts were answered
    by both."""
    mine, others = speeds.get(own, {}), speeds[other]
    shared = [number for number in others if number in mine]
    if other == own or len(shared) < MIN_PROMPTS:
        return None
    gains = [math.log(others[number] / mine[number]) for number in shared]
    gain, error = fmean(gains), stdev(gains) / math.sqrt(len(gains))
    return Rival(other, math.exp(gain), gain > SURE * error)


def why_drafter(own: DrafterName, speeds: Speeds, best: Rival | None) -> str:
    usual = {name: math.exp(fmean(map(math.log, some.values()))) for name, some in speeds.items()}
    order = sorted(usual, key=lambda name: -usual[name])
    listed = ", ".join(f"{name} {usual[name]:.2f}" for name in order)
    num_prompts = len(speeds.get(own, {}))
    measured = f"measured tokens/s by drafter on the same {num_prompts} prompts: {listed}"
    if best is None:
        return f"{measured}; the default is {own}, no other one is clearly faster"
    ratio = f"{best.times_as_fast:.2f} times as fast as {own}"
    return f"{measured}; the default is {best.drafter}, {ratio}"
