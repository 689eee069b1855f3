"""Pre-built kernels in an artifact, for machines like the one that made it: pack, find, install.

They are programs: one is loaded only if the user asks for it, its digest is in the manifest, and it
was built from the same sources as are installed here (`cpp.library_name`).
"""

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import AGAIN, Artifact, FileEntry
from subspec.artifacts.format.tensors import open_regular
from subspec.artifacts.native import cpp

FOLDER = "kernels"


def pack_prebuilt(folder: Path, sources: Iterable[Path]) -> None:
    """Copy the libraries of `sources` into the folder of an artifact that has no manifest yet."""
    for source in sources:
        built = cpp.built_file(source)
        if built is not None:
            (folder / FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(built, folder / FOLDER / built.name)


def find_prebuilt(artifact: Artifact, source: Path) -> FileEntry | None:
    """Entry of the library of `source` for this machine; None: the artifact has none."""
    wanted = f"{FOLDER}/{cpp.library_name(source)}"
    return next((entry for entry in artifact.manifest.files if entry.path == wanted), None)


def install_prebuilt(artifact: Artifact, sources: Iterable[Path]) -> list[str]:
    """Install the artifact's libraries of `sources`; returns the names of those that are missing.
    Raises SubspecError(CORRUPT) for one that does not match its digest."""
    missing = []
    for source in sources:
        entry = find_prebuilt(artifact, source)
        if entry is None or not cpp.install_prebuilt(source, checked(artifact.path, entry)):
            missing.append(source.stem)
    return missing


def checked(folder: Path, entry: FileEntry) -> bytes:
    """Bytes of a file of one chunk. Raises SubspecError(CORRUPT) if its digest differs."""
    with open_regular(folder / entry.path) as file:
        found = file.read(entry.num_bytes)
    if (hashlib.sha256(found).hexdigest(),) != entry.chunks:
        raise SubspecError(Exit.CORRUPT, f"{entry.path} does not match its digest", AGAIN)
    return found
