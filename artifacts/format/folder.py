"""Atomic creation of a folder: it appears complete or not at all."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from subspec.artifacts.common.command import say
from subspec.artifacts.common.errors import Exit, SubspecError

MANIFEST = "manifest.json"
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOST_AND_FOUND = "lost+found"  # what an empty disk holds
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system without them says
NO_FOLDER_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
OWN_NAMES = (".lock", ".building", ".complete", ".replaced")  # in a folder that is filled in place


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that is renamed to `path` at the end of the block; or
    one inside `path`, whose files are moved up, if `path` has to stay where it is.

    An error or a kill leaves `path` as it was. After a kill among the renames the next call
    finishes or undoes them. Raises SubspecError: USAGE if `path` exists and may not be replaced,
    RESOURCES if the disk is full or another process is building `path`.
    """
    path = path.resolve()  # a link is followed, not replaced
    inside = stays_in_place(path)
    home, prefix = (path, ".") if inside else (path.parent, f".{path.name}.")
    temporary, old = home / f"{prefix}building", home / f"{prefix}replaced"
    clean_up, publish = (_settle, _move_up) if inside else (_clean_up, _rename)
    with _only_builder(path, home / f"{prefix}lock"):
        clean_up(path, temporary, old)
        check_target(path, overwrite)
        temporary.mkdir()
        try:
            yield temporary
            _sync_tree(temporary)
            publish(path, temporary, old)
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            raise SubspecError(
                Exit.RESOURCES,
                f"{path} could not be written: {error.strerror}",
                "make room or choose another --out",
            ) from error
        finally:
            clean_up(path, temporary, old)


def stays_in_place(path: Path) -> bool:
    """Return True for a folder that is filled where it is: an empty one, which may be the only
    place where its owner may write, and a mount point, which cannot be renamed."""
    path = path.resolve()
    if not path.is_dir():
        return False
    begun = any((path / name).is_dir() for name in OWN_NAMES)
    return begun or not _contents(path) or _is_mount_point(path)


def place_of(path: Path) -> Path:
    """The folder in which new_folder() works, on the disk that `path` will lie on."""
    path = path.resolve()
    if stays_in_place(path):
        return path
    return next(parent for parent in path.parents if parent.exists())


def _contents(path: Path) -> list[Path]:
    """Entries of a folder, the manifest last: with it an artifact is complete."""
    found = [one for one in path.iterdir() if one.name not in (*OWN_NAMES, LOST_AND_FOUND)]
    return sorted(found, key=lambda one: one.name == MANIFEST)


def _is_mount_point(path: Path) -> bool:
    if os.path.ismount(path):
        return True
    try:  # knows of folders that are mounted from their own disk, as containers do
        mounts = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
    except OSError:
        return False
    escaped = "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in str(path))
    return any(line.split(" ")[4] == escaped for line in mounts.splitlines())


@contextlib.contextmanager
def _only_builder(path: Path, lock: Path) -> Iterator[None]:
    """Hold the lock file of `path`; the kernel releases it however this process ends."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        opened = open(lock, "a+", encoding="utf-8")
    except OSError as error:
        raise SubspecError(
            Exit.USAGE, f"cannot write in {lock.parent}: {error.strerror}", "choose another --out"
        ) from error
    with opened as file:
        try:
            lock_file(file, waiting=False)
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


def lock_file(file: IO[str], waiting: bool) -> None:
    """Take the lock of an open file, or go on without one, with a note, where the file system has
    none: few users plan into one folder twice at once. Raises BlockingIOError if another process
    has it and this is not `waiting`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if waiting else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        say(
            f"note: the file system of {file.name} has no locks ({error.strerror}): two plannings "
            "at once are not kept apart there"
        )


def check_target(path: Path, overwrite: bool) -> None:
    """Raise SubspecError(USAGE) if `path` exists and may not be replaced. An empty folder may."""
    if not path.exists() or (path.is_dir() and not _contents(path)):
        return
    is_artifact = (path / MANIFEST).is_file() and (path / "plan.json").is_file()
    if not overwrite:
        hint = "add --overwrite or another --out" if is_artifact else "choose another --out"
        raise SubspecError(Exit.USAGE, f"{path} exists already", hint)
    if not is_artifact:
        raise SubspecError(
            Exit.USAGE, f"{path} exists and is not an artifact", "choose another --out"
        )


def _rename(path: Path, temporary: Path, old: Path) -> None:
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    _sync(path.parent)


def _clean_up(path: Path, temporary: Path, old: Path) -> None:
    """Remove what a build left behind; restore the old folder if nothing replaced it."""
    if old.exists() and not path.exists():
        old.rename(path)
    _remove(old, temporary)


def _move_up(path: Path, temporary: Path, old: Path) -> None:
    """The old contents move into `old`, then the new ones out of `temporary`, whose name says until
    then that none of them has moved."""
    replaced = _contents(path)
    if replaced:
        old.mkdir()
    for one in reversed(replaced):  # the manifest first: from here on there is no artifact
        one.rename(old / one.name)
    temporary.rename(path / ".complete")
    _settle(path, temporary, old)


def _settle(path: Path, temporary: Path, old: Path) -> None:
    """Finish what _move_up() began, or undo it if no new file has moved yet."""
    complete = path / ".complete"
    source = complete if complete.exists() else old
    if source.exists():
        for one in _contents(source):
            one.rename(path / one.name)
        _sync(path)
    _remove(complete, old, temporary)


def _remove(*folders: Path) -> None:
    for folder in folders:
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
    """Flush a file or folder to disk. Ignores file systems that cannot flush folders (exFAT, some
    in user space)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
