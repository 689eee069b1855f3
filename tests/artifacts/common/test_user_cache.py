import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from subspec.artifacts.common import user_cache
from subspec.artifacts.common.user_cache import (
    cache_problem,
    find_file,
    find_on_disk,
    readable_cache_dir,
    store_file,
    user_cache_dir,
)


@pytest.fixture(autouse=True)
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "subspec"


@pytest.fixture(autouse=True)
def nothing_held() -> Iterator[None]:
    yield
    user_cache._held.cache_clear()


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
    (ours / open_one).chmod(0o775)
    assert user_cache_dir("kernels") is None and readable_cache_dir("kernels") is None
    problem = cache_problem("kernels")
    assert problem is not None and problem.endswith("can be written by others (mode 775)")


def test_a_folder_of_another_user_is_not_used(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_cache_dir("kernels") is not None
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert user_cache_dir("kernels") is None and readable_cache_dir("kernels") is None
    assert cache_problem("kernels") == (
        f"{ours} belongs to another user (id {owner}, expected {owner + 1})"
    )


def test_what_a_cache_holds_is_read_where_nothing_can_be_written(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store_file("kernels/a.so", b"a")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, how: not how & os.W_OK and access(path, how))
    assert user_cache_dir("kernels") is None
    assert cache_problem("kernels") == f"{ours / 'kernels'} is not writable"
    assert find_file("kernels/a.so") == ours / "kernels" / "a.so"


def test_what_cannot_be_kept_is_held_in_memory(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(target: Path, write: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(user_cache, "put", full)
        assert not store_file("kernels/a.so", b"first")
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    for content in (b"first", b"second"):
        held = find_file("kernels/a.so")
        assert held is not None and held.read_bytes() == content
        assert find_on_disk("kernels/a.so") is None
        assert not store_file("kernels/a.so", b"second")
    assert not store_file("kernels/b.so", b"b") and find_file("kernels/c.so") is None


def test_a_library_that_is_being_written_is_not_found_as_one(ours: Path) -> None:
    folder, seen = user_cache_dir("kernels"), list[list[Path]]()
    assert folder is not None

    def write(unfinished: Path) -> None:
        unfinished.write_bytes(b"a")
        seen.append([*folder.glob("*.so")])

    user_cache.put(folder / "a.so", write)
    assert seen == [[]] and [*folder.iterdir()] == [folder / "a.so"]


def test_without_a_place_for_a_cache_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for impossible in (os.devnull, str(tmp_path / "file")):
        monkeypatch.setenv("XDG_CACHE_HOME", impossible)
        assert user_cache_dir("plans") is None
