"""How much of the processors other programs use: what is timed beside them is too slow."""

import os
import time
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")


@dataclass(frozen=True)
class CpuTimes:
    """A moment; two of them say what happened in between. All in seconds."""

    wall: float
    busy: float  # of the CPUs that this process may use, whoever used them
    own: float  # used by this process, and by its children that have ended
    num_cpus: int  # that `busy` is of; 0: the system does not tell


def cpu_times() -> CpuTimes:
    spent = os.times()
    own = spent.user + spent.system + spent.children_user + spent.children_system
    try:
        text = STAT.read_text("ascii")
    except OSError:  # not shown in some sandboxes
        text = ""
    ticks, num_cpus = busy_ticks(text, os.sched_getaffinity(0))
    return CpuTimes(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), own, num_cpus)


def others_share(start: CpuTimes, end: CpuTimes) -> float:
    """Share of the CPUs' time, 0 to 1, that was not this process's own and not idle: of other
    programs, and on a virtual machine of its host's other guests. 0 if it is not known."""
    available = (end.wall - start.wall) * end.num_cpus
    if available <= 0 or start.num_cpus != end.num_cpus:
        return 0.0
    others = (end.busy - start.busy) - (end.own - start.own)
    return min(1.0, max(0.0, others / available))


def busy_ticks(stat: str, cpus: Set[int]) -> tuple[int, int]:
    """Clock ticks that `cpus` were busy since the system started, stolen ones included, and the
    number of CPUs found. stat: text of /proc/stat (proc_stat(5))."""
    by_cpu = {}
    for line in stat.splitlines():
        name, *counts = line.split()
        if name.startswith("cpu") and name[3:].isdecimal():
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, counts[:8])
            by_cpu[int(name[3:])] = user + nice + system + irq + softirq + steal
    # A container may show only its own CPUs, numbered from 0.
    found = [ticks for cpu, ticks in by_cpu.items() if cpu in cpus] or list(by_cpu.values())
    return sum(found), len(found)
