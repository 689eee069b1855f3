"""Memory is the machine's or that of the tightest control group, whichever is less."""

from collections.abc import Callable
from pathlib import Path

import pytest

from subspec.artifacts.common import control_groups, host_memory
from subspec.artifacts.common.control_groups import own_groups
from subspec.artifacts.common.host_memory import free_host_bytes, group_memory, host_bytes

Told = Callable[[str, str], None]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """Sets the two files of /proc that say which groups hold this process, and where they are."""
    own, mounts = tmp_path / "own", tmp_path / "mounts"
    monkeypatch.setattr(control_groups, "OWN", own)
    monkeypatch.setattr(control_groups, "MOUNTS", mounts)
    monkeypatch.setattr(host_memory, "machine_memory", lambda: (10_000, 6_000))

    def tell(groups: str, mounted: str) -> None:
        own.write_text(groups)
        mounts.write_text(f"22 27 0:21 / /proc rw - proc proc rw\n{mounted}")

    return tell


def limited(folder: Path, limit: int | str, used: int) -> Path:
    """A group of version 2 with 1000 bytes of file caches."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("anon 3000\nactive_file 300\ninactive_file 700\n")
    return folder


def test_without_a_limit_memory_is_the_machines(told: Told, tmp_path: Path) -> None:
    assert free_host_bytes() == 6_000, "no files in /proc"
    told("0::/a\n", f"30 23 0:26 / {tmp_path} rw - cgroup2 cgroup2 rw\n")
    assert (host_bytes(), free_host_bytes()) == (10_000, 6_000)
    limited(tmp_path / "a", "max", 5000)
    assert group_memory(tmp_path / "a") is None
    assert (host_bytes(), free_host_bytes()) == (10_000, 6_000)


def test_the_limit_of_a_service_and_of_those_above_it_counts_where_it_is_less(
    told: Told, tmp_path: Path
) -> None:
    root = tmp_path / "cgroup root"
    place = str(root).replace(" ", "\\040")
    told("0::/system.slice/a.service\n", f"30 23 0:26 / {place} rw shared:4 - cgroup2 cgroup2 rw\n")
    assert own_groups("memory") == [root / "system.slice/a.service", root / "system.slice", root]
    limited(root / "system.slice/a.service", 9_000, 5_000)
    assert (host_bytes(), free_host_bytes()) == (9_000, 5_000)
    limited(root / "system.slice", 8_000, 7_500)
    assert (host_bytes(), free_host_bytes()) == (8_000, 1_500)
    limited(root, 7_000, 9_000)
    assert (host_bytes(), free_host_bytes()) == (7_000, 0)


def test_a_group_of_version_1_counts_with_all_below_it(told: Told, tmp_path: Path) -> None:
    folder = tmp_path / "memory" / "slurm" / "job_7"
    folder.mkdir(parents=True)
    told(
        "4:memory:/slurm/job_7\n1:cpu,cpuacct:/\n0::/\n",
        f"35 31 0:32 / {tmp_path}/memory rw - cgroup cgroup rw,memory\n"
        f"36 31 0:33 / {tmp_path}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n",
    )
    (folder / "memory.limit_in_bytes").write_text("8000\n")
    (folder / "memory.usage_in_bytes").write_text("6000\n")
    stat = "active_file 1\ninactive_file 1\ntotal_active_file 500\ntotal_inactive_file 1000\n"
    (folder / "memory.stat").write_text(stat)
    assert (host_bytes(), free_host_bytes()) == (8_000, 3_500)
    (folder / "memory.limit_in_bytes").write_text(f"{(1 << 63) - 4096}\n")  # no limit
    assert (host_bytes(), free_host_bytes()) == (10_000, 6_000)


@pytest.mark.parametrize(
    ("root", "path"),
    [("/docker/c1", "/docker/c1"), ("/", "/"), ("/docker/c1", "/other"), ("/", "/../../c1")],
)
def test_a_container_finds_its_limit_where_its_own_group_is_mounted(
    told: Told, tmp_path: Path, root: str, path: str
) -> None:
    told(f"0::{path}\n", f"30 23 0:26 {root} {tmp_path} ro - cgroup2 cgroup rw\n")
    assert own_groups("memory") == [tmp_path]
    limited(tmp_path, 8_000, 5_000)
    assert (host_bytes(), free_host_bytes()) == (8_000, 4_000)
