"""Host memory, all and free: of the machine, or of a control group that leaves less."""

from pathlib import Path

from subspec.artifacts.common.control_groups import own_groups


def free_host_bytes() -> int:
    """Memory that is available for new allocations."""
    return max(0, min(available for _, available in memories()))


def host_bytes() -> int:
    """All memory that this process may have, in use or not."""
    return min(most for most, _ in memories())


def memories() -> list[tuple[int, int]]:
    """(all, available) of the machine, and (limit, available) of each group that holds this
    process. The kernel kills a process that takes more than any of them has."""
    groups = (group_memory(folder) for folder in own_groups("memory"))
    return [machine_memory(), *(one for one in groups if one is not None)]


def machine_memory() -> tuple[int, int]:
    """(all, available)"""
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    total, available = (int(fields[x].split()[0]) << 10 for x in ("MemTotal", "MemAvailable"))
    return total, available


def group_memory(folder: Path) -> tuple[int, int] | None:
    """(limit, available) of a control group; None without a limit. File caches count as
    available."""
    if (folder / "memory.limit_in_bytes").exists():
        names, of_all = ("limit_in_bytes", "usage_in_bytes"), "total_"  # version 1
    else:
        names, of_all = ("max", "current"), ""
    try:
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in names)
        lines = (folder / "memory.stat").read_text().splitlines()
        fields = dict(line.split() for line in lines)
        caches = int(fields[f"{of_all}active_file"]) + int(fields[f"{of_all}inactive_file"])
    except (OSError, ValueError, KeyError):  # no such group; the limit is the word max
        return None
    return limit, limit - used + caches
