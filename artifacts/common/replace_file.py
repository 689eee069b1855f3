"""Replace a file as a whole."""

import os
import stat
import tempfile
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Replace the content of an existing file and flush it to disk, keeping its permissions. A link
    is itself replaced. Raises OSError; if this fails or is interrupted, the file is unchanged."""
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:99]}.")
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
