"""The user's cache: compiled code, re-solved plans, run records. All of it may be deleted."""

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path


def user_cache_dir(kind: str) -> Path | None:
    """Private folder for files of one kind; None if there cannot be one.

    Code is loaded from here, so a folder that others could write to is not used.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        ours = Path(base) / "subspec"
        ours.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = ours / kind
        folder.mkdir(mode=0o700, exist_ok=True)
        private = is_private(ours) and is_private(folder)
    except (OSError, RuntimeError):  # Path.home() raises RuntimeError if there is none
        return None
    return folder if private and os.access(folder, os.W_OK | os.X_OK) else None


def kept_file(name: str) -> Path | None:
    """The file `KIND/NAME` of the cache; None: there is none."""
    kind, _, rest = name.partition("/")
    folder = user_cache_dir(kind)
    path = folder / rest if folder else None
    return path if path is not None and path.exists() else None


def keep_file(name: str, content: bytes) -> bool:
    """Write the file `KIND/NAME`. False: there is no folder for it."""
    kind, _, rest = name.partition("/")
    folder = user_cache_dir(kind)
    if folder is None:
        return False
    put(folder / rest, lambda unfinished: unfinished.write_bytes(content))
    return True


def put(target: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name and rename, so that concurrent writers do not conflict."""
    descriptor, unfinished = tempfile.mkstemp(dir=target.parent, suffix=target.suffix)
    os.close(descriptor)
    try:
        write(Path(unfinished))
        os.replace(unfinished, target)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def is_private(folder: Path) -> bool:
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
