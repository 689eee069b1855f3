"""The user's cache: compiled code, re-solved plans, run records. All of it may be deleted."""

import os
import stat
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


def is_private(folder: Path) -> bool:
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
