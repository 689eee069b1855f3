"""The user's cache: compiled code, re-solved plans, run records. All of it may be deleted."""

import functools
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def user_cache_dir(kind: str) -> Path | None:
    """Private folder for files of one kind, in which this process may write; None if there cannot
    be one, and `cache_problem` says why."""
    found = _writable(kind)
    return found if isinstance(found, Path) else None


def cache_problem(kind: str) -> str | None:
    """Reason why no file of one kind can be stored, to follow a colon; None if it can."""
    found = _writable(kind)
    return found if isinstance(found, str) else None


def readable_cache_dir(kind: str) -> Path | None:
    """Folder of one kind for reading, which need not be writable; None if there is none, or if
    other users could have written its files."""
    try:
        folder = _base() / kind
        private = all(_not_private(one) is None for one in (folder.parent, folder))
    except (OSError, RuntimeError):
        return None
    return folder if private and os.access(folder, os.R_OK | os.X_OK) else None


def find_file(name: str) -> Path | None:
    """The file `KIND/NAME` of the cache, else of this process's memory; None: there is none."""
    return find_on_disk(name) or find_in_memory(name)


def find_on_disk(name: str) -> Path | None:
    """The file `KIND/NAME` of the cache, which outlives this process; None: there is none."""
    kind, _, rest = name.partition("/")
    folder = readable_cache_dir(kind)
    return folder / rest if folder is not None and (folder / rest).exists() else None


def store_file(name: str, content: bytes) -> bool:
    """Write the file `KIND/NAME`. Returns False if the cache is not writable or its disk is full;
    the file is then kept in memory until the process ends, if there is enough."""
    kind, _, rest = name.partition("/")
    with suppress(OSError):
        if (folder := user_cache_dir(kind)) is not None:
            put(folder / rest, lambda unfinished: unfinished.write_bytes(content))
            return True
    with suppress(OSError):
        store_in_memory(name, content)
    return False


def store_in_memory(name: str, content: bytes) -> Path:
    """Keep the file `KIND/NAME` in memory until the process ends. Programs can be loaded from it
    whatever disks there are, and nobody else can write to it. Raises OSError."""
    descriptor = os.memfd_create(name.rpartition("/")[2], os.MFD_CLOEXEC)
    # It stays open: the loader takes a library of the same path for the one it has.
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        file.write(content)
    _held()[name] = Path(f"/proc/self/fd/{descriptor}")
    return _held()[name]


def find_in_memory(name: str) -> Path | None:
    """The file `KIND/NAME` that this process holds in memory."""
    return _held().get(name)


@functools.cache
def _held() -> dict[str, Path]:
    """Paths of what `store_in_memory` keeps, by name."""
    return {}


def put(target: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name and rename, so that concurrent writers do not conflict."""
    descriptor, unfinished = tempfile.mkstemp(dir=target.parent, suffix=".new")
    os.close(descriptor)
    try:
        write(Path(unfinished))
        os.replace(unfinished, target)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _base() -> Path:
    """Base folder of the cache. Raises RuntimeError if there is no home directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subspec"


def _writable(kind: str) -> Path | str:
    """The folder, or why nothing can be written there. Code is loaded from it, so one that others
    could write to is not used."""
    try:
        ours = _base()
        folder = ours / kind
        for one in (ours, folder):
            one.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (problem := _not_private(one)) is not None:
                return problem
    except RuntimeError:  # of Path.home()
        return "there is no home directory for a cache"
    except OSError as error:
        return f"{error.filename or ours} cannot be made: {error.strerror}"
    return folder if os.access(folder, os.W_OK | os.X_OK) else f"{folder} is not writable"


def _not_private(folder: Path) -> str | None:
    """Reason why other users could have written files in `folder`; None if not. Raises OSError."""
    status = folder.stat()
    if status.st_uid != os.getuid():
        return f"{folder} belongs to another user (id {status.st_uid}, expected {os.getuid()})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{folder} can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None
