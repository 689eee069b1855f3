"""CPUs that this process may use, and the share that other programs use, which makes timings too
slow."""

import math
import os
import sys
import time
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from subspec.artifacts.common.control_groups import own_groups

STAT = Path("/proc/stat")


@dataclass(frozen=True)
class CpuTimes:
    """CPU time counters at one moment, in seconds; two of them give the usage in between."""

    wall: float
    busy: float  # of the CPUs that this process may use, by all processes
    own: float  # used by this process, and by its children that have ended
    num_cpus: int  # counted in `busy`; 0: unknown


def usable_cpus() -> int:
    """CPUs that this process may keep busy: those that it may run on, or the share of their time
    that its control groups grant. Threads beyond a quota spend it early, and all of them then wait
    for the next period."""
    if sys.platform != "linux":  # no CPU affinity elsewhere
        return os.cpu_count() or 1
    quotas = (cpu_quota(folder) for folder in own_groups("cpu"))
    granted = [max(1, math.ceil(quota)) for quota in quotas if quota is not None]
    return min([len(os.sched_getaffinity(0)), *granted])


def cpu_quota(folder: Path) -> float | None:
    """CPUs' worth of time that a control group grants; None without a limit."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = map(int, " ".join((folder / x).read_text() for x in names).split())
        except (OSError, ValueError):  # of the other version; the limit is the word max
            continue
        if quota > 0 and period > 0:  # -1: no limit
            return quota / period
    return None


def cpu_times() -> CpuTimes:
    spent = os.times()
    own = spent.user + spent.system + spent.children_user + spent.children_system
    try:
        text = STAT.read_text("ascii")
    except OSError:  # not shown in some sandboxes
        text = ""
    ticks, num_cpus = busy_ticks(text, os.sched_getaffinity(0))
    return CpuTimes(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), own, num_cpus)


def background_cpu_share(start: CpuTimes, end: CpuTimes) -> float:
    """Share of CPU time, 0 to 1, used by other programs and, on a virtual machine, by the host's
    other guests; 0 if unknown."""
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
