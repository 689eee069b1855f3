import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from subspec.artifacts.common.user_cache import user_cache_dir


@pytest.fixture(autouse=True)
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "subspec"


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_folder_is_the_users_own(ours: Path, open_umask: None) -> None:
    assert user_cache_dir("plans") == ours / "plans"
    for path in (ours, ours / "plans"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert user_cache_dir("plans") == ours / "plans"


@pytest.mark.parametrize("open_one", ["", "kernels"])
def test_a_folder_that_others_may_write_to_is_not_used(ours: Path, open_one: str) -> None:
    assert user_cache_dir("kernels") is not None
    (ours / open_one).chmod(0o777)
    assert user_cache_dir("kernels") is None


def test_without_a_place_for_a_cache_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for impossible in (os.devnull, str(tmp_path / "file")):
        monkeypatch.setenv("XDG_CACHE_HOME", impossible)
        assert user_cache_dir("plans") is None
