"""Compiled kernels that an artifact brings, for machines like the one that made it.

They are programs: nothing of them is loaded unless the user says so, its digest is in the manifest,
and it was made of the very sources that are installed here (`cpp.library_name`).
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
    """Copies what was built of `sources` into the artifact `folder`, before its manifest is
    written."""
    for source in sources:
        built = cpp.built_file(source)
        if built is not None:
            (folder / FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(built, folder / FOLDER / built.name)


def find_prebuilt(artifact: Artifact, source: Path) -> FileEntry | None:
    """The library of `source` for this machine; None: the artifact has none."""
    wanted = f"{FOLDER}/{cpp.library_name(source)}"
    return next((entry for entry in artifact.manifest.files if entry.path == wanted), None)


def install_prebuilt(artifact: Artifact, sources: Iterable[Path]) -> list[str]:
    """What the artifact brings of `sources` is loaded from now on; returns the names of those that
    it does not bring. Raises SubspecError(CORRUPT) for one that is not as the manifest says."""
    missing = []
    for source in sources:
        entry = find_prebuilt(artifact, source)
        if entry is None or not cpp.install_prebuilt(source, checked(artifact.path, entry)):
            missing.append(source.stem)
    return missing


def checked(folder: Path, entry: FileEntry) -> bytes:
    """The file's bytes; libraries have one chunk."""
    with open_regular(folder / entry.path) as file:
        found = file.read(entry.num_bytes)
    if (hashlib.sha256(found).hexdigest(),) != entry.chunks:
        raise SubspecError(Exit.CORRUPT, f"{entry.path} does not match its digest", AGAIN)
    return found
