"""Run records: measurements of each answer beside its plan's predictions, one JSON line each.

They contain no text and no token ids, and no manifest lists them. `runs.jsonl` is in the artifact's
folder or, if that is not writable, in the user's cache. Errors are ignored: a record that cannot be
written is dropped, one that cannot be read is skipped.
"""

import errno
import hashlib
import json
import os
import shlex
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from subspec.artifacts.common.bounds import (
    MAX_LEVELS,
    Between,
    Count,
    Length,
    Matching,
    Seconds,
)
from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.common.replace_file import replace_file
from subspec.artifacts.common.user_cache import user_cache_dir
from subspec.artifacts.format.codec import dump_json, load_dataclass, parse_json
from subspec.artifacts.format.folder import MANIFEST
from subspec.artifacts.plan import Method, Plan

RUNS = "runs.jsonl"
MAX_RUNS = 1000  # the newest are kept; the file grows to twice that before it is cut
MAX_FILE = 4 << 20  # bytes; of a larger one the end is read
MAX_LINE = 16 << 10
TIME = Matching(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", "a time such as 2026-11-20T16:45:00Z"
)
DIGEST = Matching(r"[0-9a-f]{64}", "64 hexadecimal digits")
Levels = Annotated[tuple[Count, ...], Length(0, MAX_LEVELS + 1)]
# Do not follow a link out of an untrusted folder, and do not wait for a FIFO.
SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Run:
    """One answer of at least one round."""

    time: Annotated[str, TIME]  # UTC at its end
    plan: Annotated[str, DIGEST]  # plan_digest of the plan that ran
    machine: str  # as in Plan
    method: Method
    padded: bool  # False: plain decoding at one row
    link_bandwidth: Count | None  # bytes per second that the link was limited to
    greedy: bool
    prompt_tokens: Count
    cached_tokens: Count  # of the prompt, already in the cache
    generated_tokens: Count
    includes_digest_check: bool  # the time to its first token includes the check of digests
    drafted: Levels  # by level: rounds that drafted it; the last ones may have room for few levels
    accepted: Levels  # at index n: rounds that accepted n drafted tokens of the text
    draft_seconds: Seconds
    verify_seconds: Seconds
    stream_wait_seconds: Seconds
    first_token_seconds: Seconds
    streamed_bytes: Count
    fast_peak_bytes: Count
    predicted_tokens_per_second: Annotated[float, Between(1e-9, 1e18)] | None
    predicted_first_token_seconds: Seconds | None
    predicted_peak_bytes: Count | None

    @property
    def rounds(self) -> int:
        return sum(self.accepted)

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first one over the seconds after the first one."""
        seconds = self.draft_seconds + self.verify_seconds
        return (self.generated_tokens - 1) / seconds if seconds else 0.0

    @property
    def drafted_levels(self) -> int:
        """Drafted levels of all rounds."""
        return sum(self.drafted)

    @property
    def accepted_by_level(self) -> tuple[int, ...]:
        """Number of rounds that accepted each level."""
        return tuple(sum(self.accepted[level:]) for level in range(1, len(self.drafted) + 1))


def recorded_by(plan: Plan, path: str) -> str:
    """The command whose answers are recorded for the plan. Predictions are for the method's own
    drafter, which need not be the default."""
    options = "" if plan.drafter in (None, plan.method) else f" --drafter {plan.method}"
    return f'subspec-run {shlex.quote(path)}{options} "your prompt"'


def plan_digest(plan: Plan) -> str:
    """SHA-256 of the plan's plan.json, hexadecimal."""
    return hashlib.sha256(dump_json(plan).encode()).hexdigest()


def append_run(artifact_path: Path, run: Run) -> None:
    """Append a record; ignores errors."""
    line = dump_run(run)
    try:
        append_line(artifact_path / RUNS, line)
    except OSError:
        with suppress(OSError):
            if (path := cache_file(artifact_path)) is not None:
                append_line(path, line)


def read_runs(artifact_path: Path) -> tuple[Run, ...]:
    """The newest MAX_RUNS records, oldest first."""
    lines = last_lines(artifact_path / RUNS)
    with suppress(OSError):
        if (path := cache_file(artifact_path)) is not None:
            lines += last_lines(path)
    found = (load_run(line) for line in lines)
    runs = sorted((run for run in found if run is not None), key=lambda run: run.time)
    return tuple(runs[-MAX_RUNS:])


def carry_runs(source: Path, target: Path) -> None:
    """Link the records of the folder `source` into `target`, which is about to replace it.

    A link, so that an answer that ends meanwhile is still recorded; a copy where there are none.
    """
    with suppress(OSError):
        if stat.S_ISREG(os.lstat(source / RUNS).st_mode):
            try:
                os.link(source / RUNS, target / RUNS)
            except OSError:
                shutil.copyfile(source / RUNS, target / RUNS)


# One line, both directions


def dump_run(run: Run) -> bytes:
    text = json.dumps(asdict(run), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


def load_run(line: bytes) -> Run | None:
    """Record of a line; None if the line is not a valid record."""
    if len(line) > MAX_LINE:
        return None
    try:
        run: Run = load_dataclass(Run, parse_json(line, RUNS), RUNS)
    except SubspecError:
        return None
    return run if is_sound(run) else None


def is_sound(run: Run) -> bool:
    """Return True if the numbers of a record are consistent."""
    return (
        len(run.accepted) <= len(run.drafted) + 1
        and all(a <= d for a, d in zip(run.accepted_by_level, run.drafted, strict=True))
        and all(more >= fewer for more, fewer in pairwise((run.rounds, *run.drafted)))
        and run.rounds > 0
        and run.generated_tokens > 1
        and run.draft_seconds + run.verify_seconds > 0
    )


# The file


def cache_file(artifact_path: Path) -> Path | None:
    """File in the user's cache for the records of a folder that is not writable; None: there is no
    cache. Raises OSError without a manifest."""
    manifest = (artifact_path / MANIFEST).read_bytes()
    folder = user_cache_dir("runs")
    return folder / f"{hashlib.sha256(manifest).hexdigest()[:16]}.jsonl" if folder else None


def append_line(path: Path, line: bytes) -> None:
    """Append in one write, so that two processes do not mix their lines. Raises OSError."""
    with regular_file(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as descriptor:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # the disk was full
        os.write(descriptor, b"\n" + line if torn else line)
    lines = last_lines(path)
    if len(lines) > 2 * MAX_RUNS or size > MAX_FILE:
        # A record that another process adds meanwhile is lost.
        replace_file(path, b"".join(one + b"\n" for one in lines[-MAX_RUNS:]))


def last_lines(path: Path) -> list[bytes]:
    """Lines within the last MAX_FILE bytes; none if the file cannot be read."""
    try:
        with regular_file(path, os.O_RDONLY) as descriptor:
            first = max(0, os.fstat(descriptor).st_size - MAX_FILE)
            data = os.pread(descriptor, MAX_FILE, first)
    except OSError:
        return []
    lines = data.split(b"\n")
    return [line for line in (lines[1:] if first else lines) if line]


@contextmanager
def regular_file(path: Path, flags: int) -> Iterator[int]:
    """Open descriptor of a regular file. Raises OSError, also for anything else."""
    descriptor = os.open(path, flags | SAFELY, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield descriptor
    finally:
        os.close(descriptor)
