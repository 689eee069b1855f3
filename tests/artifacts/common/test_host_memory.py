"""Free memory is the machine's or the container's, whichever is less."""

from pathlib import Path

import pytest

from subspec.artifacts.common import host_memory
from subspec.artifacts.common.host_memory import free_host_bytes


def test_a_containers_limit_counts_where_it_is_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "CONTAINER", tmp_path)
    monkeypatch.setattr(host_memory, "machine_memory", lambda: (10_000, 6_000))
    assert free_host_bytes() == 6_000
    (tmp_path / "memory.max").write_text("8000\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("active_file 500\ninactive_file 1000\n")
    assert free_host_bytes() == 4_500
    (tmp_path / "memory.current").write_text("9900\n")
    assert free_host_bytes() == 0
