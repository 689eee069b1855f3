"""Open an engine from an artifact, as subspec-run and subspec-serve do: re-plan for this machine if
needed, with progress and notes on stderr."""

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from subspec.artifacts.common.command import rewrites_lines, say
from subspec.artifacts.common.cpu_load import background_cpu_share, cpu_times
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.progress import Progress, unseen
from subspec.artifacts.common.user_cache import (
    cache_problem,
    find_file,
    find_in_memory,
    find_on_disk,
)
from subspec.artifacts.format.prebuilt import install_prebuilt
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.native import cpp
from subspec.artifacts.profile import UNDER_LOAD
from subspec.runtime.app.opening_options import OpeningOptions
from subspec.runtime.app.replan import fitted
from subspec.runtime.device import machine_name
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.open_model import check_drafter
from subspec.runtime.programs import graph_programs, kernel_sources

SECONDS_BETWEEN_LINES = 10.0  # of progress if stderr is not a terminal


def trust_kernels(artifact: Artifact) -> None:
    """Install the artifact's pre-built kernels and graphs, before anything is built or planned."""
    sources = {
        cpp.program(source): source.stem for source in kernel_sources(artifact.spec, artifact.plan)
    }
    install_prebuilt(artifact, graph_programs(artifact.plan, artifact.spec))
    missing = [sources[program] for program in install_prebuilt(artifact, sources)]
    if missing:
        say(f"note: no pre-built kernels for this machine, compiling: {', '.join(missing)}")


def planned_for_here(artifact: Artifact, options: OpeningOptions) -> Artifact:
    """Return the artifact, re-planned if its plan does not fit this machine."""
    check_drafter(artifact, options.drafter)
    if options.no_replan:
        return artifact
    artifact, note = fitted(
        artifact,
        options.method,
        options.vram,
        options.device,
        options.link_bandwidth,
        progress_line() if sys.stderr.isatty() else unseen,  # elsewhere only the note
        options.sequences,
    )
    if note:
        say(f"note: {note}")
    return artifact


@contextmanager
def opened(
    artifact: Artifact, options: OpeningOptions, progress: Progress, padded: bool = True
) -> Iterator[Engine]:
    """`open_engine` for the block; also prints notes that are known only at its end."""
    with short_of_memory_told(), open_engine(artifact, options, progress, padded) as engine:
        yield engine
        if (problem := engine.missing_graphs_reason) is not None:
            say(f"note: the draft's kernels were launched one by one: {problem}")


def open_engine(
    artifact: Artifact, options: OpeningOptions, progress: Progress, padded: bool = True
) -> Engine:
    """Open the engine, with notes on stderr. Raises SubspecError."""
    how = OpenOptions(
        options.method, options.drafter, padded, options.device, options.link_bandwidth,
        graphs=not options.no_graphs, draft_temperature=options.draft_temperature,
    )  # fmt: skip
    started = cpu_times()
    programs = map(cpp.program, kernel_sources(artifact.spec, artifact.plan))
    absent = [program for program in programs if find_file(program) is None]
    with short_of_memory_told():
        engine = Engine.open(artifact, how, progress)
    if any(find_in_memory(program) and not find_on_disk(program) for program in absent):
        why = cache_problem(cpp.FOLDER) or "writing there failed: its disk may be full"
        say(
            "note: the C++ kernels are compiled at every start because the user's cache is not "
            f"writable: {why}; set XDG_CACHE_HOME to a folder of yours"
        )
    here, planned = machine_name(engine.device), artifact.plan.machine
    if here != planned:
        say(
            f"note: planned on ({planned}), running on ({here}): speeds will differ; "
            "subspec-plan --from re-plans for this machine"
        )
    elif (
        planned == artifact.profile.machine
        and artifact.profile.under_load
        and background_cpu_share(started, cpu_times()) <= UNDER_LOAD
    ):
        say(measured_under_load(artifact))
    if (problem := engine.missing_kernels_reason) is not None:
        trust = " (--trust-kernels would load the artifact's own)"
        say(
            "note: without the C++ kernels residuals decode a hundred times slower, exact "
            "attention is several times slower, and near-ties may be decided differently: "
            f"{problem}"
            f"{trust if engine.has_prebuilt_kernels else ''}"
        )
    if (problem := engine.slow_attention_reason) is not None:
        say(f"note: exact attention runs in f64, which is slow on most GPUs: {problem}")
    if (problem := engine.slow_draft_reason) is not None:
        say(f"note: drafting is slower than it could be: {problem}")
    return engine


@contextmanager
def short_of_memory_told() -> Iterator[None]:
    """Raise torch's OutOfMemoryError of the block as SubspecError(RESOURCES)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SubspecError(
            Exit.RESOURCES,
            f"the GPU ran out of memory: {str(error).partition('. ')[0]}",
            "close other programs that use the GPU, or re-plan with a smaller --vram",
        ) from None


def measured_under_load(artifact: Artifact) -> str:
    return (
        f"note: other programs used {artifact.profile.background_cpu_share:.0%} of the CPUs "
        "while this plan was measured, so the predicted speed is too low and another plan may be "
        "faster: "
        f"subspec-plan --from {shlex.quote(str(artifact.path))} --reprofile"
    )


def progress_line() -> Progress:
    """Report progress on one line of a terminal; elsewhere one line every SECONDS_BETWEEN_LINES."""
    spoken = time.monotonic()

    def show(stage: str, share: float) -> None:
        nonlocal spoken
        if rewrites_lines():
            sys.stderr.write(f"\r\033[K{stage} {share:4.0%}" if share < 1 else "\r\033[K")
            sys.stderr.flush()
        elif time.monotonic() - spoken > SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            say(f"{stage} {share:4.0%}")

    return show
