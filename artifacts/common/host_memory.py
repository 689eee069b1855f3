"""Host memory that is free, of the machine and of the container that this may be."""

from pathlib import Path

# The cgroup of a container. Kubernetes kills the whole container if one process takes too much.
CONTAINER = Path("/sys/fs/cgroup")


def free_host_bytes() -> int:
    """Memory that is available for new allocations."""
    return max(0, min(free for _, free in [machine_memory(), *cgroup_memory(CONTAINER)]))


def machine_memory() -> tuple[int, int]:
    """(all, available)"""
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    total, available = (int(fields[x].split()[0]) << 10 for x in ("MemTotal", "MemAvailable"))
    return total, available


def cgroup_memory(folder: Path) -> list[tuple[int, int]]:
    """(limit, available) of a cgroup v2; [] without a limit. File caches count as available."""
    try:
        limit, used = (int((folder / f"memory.{x}").read_text()) for x in ("max", "current"))
        lines = (folder / "memory.stat").read_text().splitlines()
        fields = dict(line.split() for line in lines)
        caches = int(fields["active_file"]) + int(fields["inactive_file"])
    except (OSError, ValueError, KeyError):  # no such cgroup; the limit is the word max
        return []
    return [(limit, limit - used + caches)]
