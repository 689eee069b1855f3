"""An artifact under other plans: subspec-plan --from solves them, and no folder is changed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import DrafterName
from subspec.runtime.app.folder import open_folder
from subspec.runtime.app.opening import (
    Opening,
    opened,
    planned_for_here,
    progress_line,
    trust_kernels,
)
from subspec.runtime.app.opening_options import OpeningOptions
from subspec.runtime.app.planner_command import run_planner
from subspec.runtime.app.replan import load_plan
from subspec.runtime.engine import Engine

# Who proposes tokens; plain: nobody does.
Way = DrafterName | Literal["plain"]


@dataclass(frozen=True)
class Variant:
    """What is asked of a plan; None: as it is in the artifact's own."""

    budget_bytes: int | None = None
    context: int | None = None
    width: int | None = None
    depth: int | None = None


@dataclass(frozen=True)
class Source:
    """An artifact and how it is opened, from a command line."""

    folder: Path
    how: OpeningOptions = OpeningOptions()


def variants(
    budgets: Sequence[int], contexts: Sequence[int], widths: Sequence[int], depths: Sequence[int]
) -> list[Variant]:
    """Every combination; an empty axis keeps the plan's own."""
    given = (budgets, contexts, widths, depths)
    axes: list[list[int | None]] = [[*axis] or [None] for axis in given]
    return [Variant(*point) for point in product(*axes)]


def planned(source: Source, variant: Variant) -> Artifact:
    """The artifact under a variant's plan. Raises the planner's own SubspecError."""
    artifact, how = open_folder(source.folder), source.how
    if how.trust_kernels:
        trust_kernels(artifact)
    if variant == Variant():
        return planned_for_here(artifact, Opening.of(how))
    asked = {
        "--vram": f"{variant.budget_bytes or how.vram or artifact.plan.budget_bytes}B",
        "--context": variant.context or artifact.plan.constraints.context,
        "--width": variant.width,
        "--depth": variant.depth,
        "--device": how.device or artifact.plan.device,
        "--link-bandwidth": f"{how.link_bandwidth}B" if how.link_bandwidth else None,
    }
    words = [str(word) for pair in asked.items() if pair[1] is not None for word in pair]
    text = run_planner(["--from", str(source.folder), "--print-plan", *words])
    return replace(artifact, plan=load_plan(text, artifact))


@contextmanager
def opened_engine(
    artifact: Artifact, source: Source, way: Way | None, padded: bool = False
) -> Iterator[Engine]:
    """way: None: what the source says. Plain decoding is the fastest one; padded: the twin that
    gives the draft's tokens."""
    how = source.how
    if way is not None:
        drafter = None if way == "plain" else way
        how = replace(how, no_speculation=way == "plain", drafter=drafter)
    with opened(artifact, Opening.of(how, padded), progress_line()) as engine:
        yield engine
