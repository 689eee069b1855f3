"""An artifact under other plans, solved by subspec-plan --from. No folder is changed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import DrafterName, method_of
from subspec.runtime.app.folder import open_folder
from subspec.runtime.app.opening import opened, planned_for_here, progress_line, trust_kernels
from subspec.runtime.app.opening_options import OpeningOptions
from subspec.runtime.app.planner_command import run_planner
from subspec.runtime.app.replan import load_plan, words_as_before
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.open_model import check_drafter, check_head

# The drafter, or plain for none.
Way = DrafterName | Literal["plain"]


@dataclass(frozen=True)
class Variant:
    """Requested changes to a plan; None: as in the artifact's own request."""

    budget_bytes: int | None = None
    context: int | None = None
    width: int | None = None
    depth: int | None = None


@dataclass(frozen=True)
class Source:
    """An artifact and its opening options from a command line."""

    folder: Path
    how: OpeningOptions = OpeningOptions()


def variants(
    budgets: Sequence[int], contexts: Sequence[int], widths: Sequence[int], depths: Sequence[int]
) -> list[Variant]:
    """Return every combination; an empty axis keeps the plan's value."""
    given = (budgets, contexts, widths, depths)
    axes: list[list[int | None]] = [[*axis] or [None] for axis in given]
    return [Variant(*point) for point in product(*axes)]


def planned(source: Source, variant: Variant) -> Artifact:
    """Return the artifact with a variant's plan. Raises the planner's SubspecError."""
    artifact, how = open_folder(source.folder), source.how
    if how.trust_kernels:
        trust_kernels(artifact)
    if variant == Variant():
        return planned_for_here(artifact, how)
    budget = variant.budget_bytes or how.vram
    changed = {
        "--vram": f"{budget}B" if budget else None,
        "--context": variant.context,
        "--width": variant.width,
        "--depth": variant.depth,
        "--device": how.device,
        "--link-bandwidth": f"{how.link_bandwidth}B" if how.link_bandwidth else None,
    }
    given: dict[str, object] = {name: one for name, one in changed.items() if one is not None}
    if (variant.width or variant.depth) and artifact.plan.constraints.method == "plain":
        given["--method"] = None  # plain decoding has no tree
    text = run_planner([*words_as_before(artifact, given), "--print-plan"])
    return replace(artifact, plan=load_plan(text, artifact))


def plans(
    source: Source, every: Sequence[Variant], notify: Callable[[str], None]
) -> list[Artifact]:
    """Return the artifact with each variant's plan. Plans that do not fit their budget are reported
    and skipped. Raises the planner's SubspecError, also if none is left."""
    found, problem = list[Artifact](), None
    for variant in every:
        try:
            found.append(planned(source, variant))
        except SubspecError as error:
            if error.exit_code != Exit.INFEASIBLE:
                raise
            notify(f"left out: {error.message}")
            problem = error
    if problem is not None and not found:
        raise problem
    return found


def measurable(
    artifacts: Sequence[Artifact], ways: Sequence[Way], notify: Callable[[str], None]
) -> list[tuple[Artifact, Way]]:
    """Return each artifact with each way that its plan has memory for; others are reported and
    skipped. ways: empty: the plan's drafter and plain decoding. Raises SubspecError if none is
    left."""
    found, problem = list[tuple[Artifact, Way]](), None
    for artifact in artifacts:
        for way in ways or usual_ways(artifact):
            if (error := problem_of(artifact, way)) is None:
                found.append((artifact, way))
                continue
            notify(f"left out: {way}: {error.message}")
            problem = error
    if problem is not None and not found:
        raise problem
    return found


def usual_ways(artifact: Artifact) -> tuple[Way, ...]:
    _, drafter = OpenOptions().chosen(artifact.plan)
    return ("plain",) if drafter is None else (drafter, "plain")


def problem_of(artifact: Artifact, way: Way) -> SubspecError | None:
    """Why the plan does not support this way of decoding; None if it does."""
    drafter = None if way == "plain" else way
    try:
        check_drafter(artifact, drafter)
        placement = artifact.plan.placement(method_of(drafter) if drafter else "plain")
        check_head(artifact.spec, placement, drafter)
    except SubspecError as error:
        return error
    return None


@contextmanager
def opened_engine(
    artifact: Artifact, source: Source, way: Way | None, padded: bool = False
) -> Iterator[Engine]:
    """Open an engine. way: None: the source's. Plain decoding is the fastest one, or with `padded`
    the twin with the draft's exact tokens."""
    how = source.how
    if way is not None:
        drafter = None if way == "plain" else way
        how = replace(how, no_speculation=way == "plain", drafter=drafter)
    with opened(artifact, how, progress_line(), padded) as engine:
        yield engine
