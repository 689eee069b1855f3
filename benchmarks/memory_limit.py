"""A bound on the memory of a process by the kernel: a cgroup, of version 1 or 2.

Page cache counts too: what a process reads through it, and what a file maps.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from subspec.artifacts.common.control_groups import own_groups

ALLOWANCE_BYTES = 64 << 20  # above an idle interpreter and the budget
# What the commands have imported and started before they read a weight.
IDLE = (
    "import torch, subspec.runtime.engine, subspec.runtime.app.answer, subspec.runtime.app.replan; "
    "import subspec.planner.rehearse.rehearsal, subspec.planner.report.explain; "
    "torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()"
)


@dataclass(frozen=True)
class Group:
    folder: Path

    def enter(self) -> None:
        """For Popen's `preexec_fn`: what the child allocates from here on counts."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def num_killed(self) -> int:
        """Processes that the kernel killed because the limit was reached."""
        version_1 = self.folder / "memory.oom_control"
        events = version_1 if version_1.exists() else self.folder / "memory.events"
        counts = dict(line.split() for line in events.read_text().splitlines())
        return int(counts["oom_kill"])


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Group | None]:
    """A new group without swap; None where this process may not make one."""
    # In version 2 a folder with processes of its own bounds no children: those above come next.
    for parent in own_groups("memory"):
        folder = parent / f"subspec-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            bounded = set_limit(folder, limit_bytes)
            if bounded:
                yield Group(folder)
        finally:
            folder.rmdir()
        if bounded:
            return
    yield None


def set_limit(folder: Path, limit_bytes: int) -> bool:
    """False if memory is not bounded in this folder."""
    if (folder / "memory.limit_in_bytes").exists():
        bound = "memory.limit_in_bytes"
        no_swap = {"memory.swappiness": 0, "memory.memsw.limit_in_bytes": limit_bytes}
    else:
        bound, no_swap = "memory.max", {"memory.swap.max": 0}
    if not (folder / bound).exists():
        return False
    try:
        (folder / bound).write_text(str(limit_bytes))
        for name, value in no_swap.items():
            if (folder / name).exists():  # not where the kernel does not count swap
                (folder / name).write_text(str(value))
    except OSError:
        return False
    return True


def idle_bytes(program: str = IDLE) -> int:
    """The largest resident set of an interpreter that has imported what the commands import.

    It says so itself: getrusage counts what this process held when it forked, if that is more.
    """
    words = [sys.executable, "-P", "-c", f"{program}; print(open('/proc/self/status').read())"]
    status = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(peak) * 1024
