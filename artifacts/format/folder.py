"""Atomic creation of a folder: it appears complete or not at all."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from subspec.artifacts.common.errors import Exit, SubspecError

MANIFEST = "manifest.json"
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that is renamed to `path` at the end of the block.

    An error or a kill leaves `path` as it was. After a kill between the two renames of an overwrite
    the old folder is beside it, and the next call restores it. Raises SubspecError: USAGE if `path`
    exists and may not be replaced, RESOURCES if the disk is full or another process is building
    `path`.
    """
    path = path.resolve()  # a link is followed, not replaced
    temporary = path.parent / f".{path.name}.building"
    old = path.parent / f".{path.name}.replaced"
    with _only_builder(path):
        _clean_up(path, temporary, old)
        check_target(path, overwrite)
        temporary.mkdir()
        try:
            yield temporary
            _sync_tree(temporary)
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            _sync(path.parent)
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            raise SubspecError(
                Exit.RESOURCES,
                f"{path} could not be written: {error.strerror}",
                "make room or choose another --out",
            ) from error
        finally:
            _clean_up(path, temporary, old)


@contextlib.contextmanager
def _only_builder(path: Path) -> Iterator[None]:
    """Hold the lock file of `path`; the kernel releases it however this process ends."""
    lock = path.parent / f".{path.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = open(lock, "a+", encoding="utf-8")
    except OSError as error:
        raise SubspecError(
            Exit.USAGE, f"cannot write in {path.parent}: {error.strerror}", "choose another --out"
        ) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the file that we opened.
            held = os.path.samestat(os.fstat(file.fileno()), lock.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            file.seek(0)
            holder = file.read(20) or "unknown"
            raise SubspecError(
                Exit.RESOURCES,
                f"{path} is being built by another process, {holder}",
                "wait for it or choose another --out",
            )
        try:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
        finally:
            lock.unlink(missing_ok=True)


def check_target(path: Path, overwrite: bool) -> None:
    """Raise SubspecError(USAGE) if `path` exists and may not be replaced."""
    if not path.exists():
        return
    if not overwrite:
        raise SubspecError(Exit.USAGE, f"{path} exists already", "add --overwrite or another --out")
    is_artifact = (path / MANIFEST).is_file() and (path / "plan.json").is_file()
    if not is_artifact and (not path.is_dir() or any(path.iterdir())):
        raise SubspecError(
            Exit.USAGE, f"{path} exists and is not an artifact", "choose another --out"
        )


def _clean_up(path: Path, temporary: Path, old: Path) -> None:
    """Remove what a build left behind; restore the old folder if nothing replaced it."""
    if old.exists() and not path.exists():
        old.rename(path)
    for folder in (old, temporary):
        try:
            if folder.exists():
                shutil.rmtree(folder)
        except OSError as error:
            raise SubspecError(
                Exit.RESOURCES,
                f"{folder} could not be removed: {error.strerror}",
                "remove it by hand",
            ) from error


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
