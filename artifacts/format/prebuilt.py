"""Pre-built programs in an artifact, for machines like the one that made it: pack, find, install.

A program is known by where it lies, in the artifact and in the user's cache: `kernels/NAME` is a
library (`cpp.program`), `graphs/NAME` is compiled by torch (`graph_pieces.program`). Its name says
what it was built from and for. One is loaded only if the user asks for it, and its digest is in the
manifest.
"""

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.user_cache import find_file, store_file
from subspec.artifacts.format.store import AGAIN, Artifact, FileEntry
from subspec.artifacts.format.tensors import open_regular


def pack_prebuilt(folder: Path, programs: Iterable[str]) -> None:
    """Copy programs from the user's cache into the folder of an artifact that has no manifest
    yet."""
    for program in programs:
        built = find_file(program)
        if built is not None:
            (folder / program).parent.mkdir(exist_ok=True)
            shutil.copyfile(built, folder / program)


def find_prebuilt(artifact: Artifact, program: str) -> FileEntry | None:
    """The manifest entry of a program; None if the artifact has none."""
    return next((entry for entry in artifact.manifest.files if entry.path == program), None)


def install_prebuilt(artifact: Artifact, programs: Iterable[str]) -> list[str]:
    """Copy the artifact's programs, which the caller trusts, to the user's cache, or keep them for
    this process alone if it is not writable. Returns those that are missing. Raises
    SubspecError(CORRUPT) for one that does not match its digest."""
    missing = []
    for program in programs:
        entry = find_prebuilt(artifact, program)
        if entry is None:
            missing.append(program)
        else:
            store_file(program, checked(artifact.path, entry))
    return missing


def checked(folder: Path, entry: FileEntry) -> bytes:
    """Bytes of a file of one chunk. Raises SubspecError(CORRUPT) if its digest differs."""
    with open_regular(folder / entry.path) as file:
        found = file.read(entry.num_bytes)
    if (hashlib.sha256(found).hexdigest(),) != entry.chunks:
        raise SubspecError(Exit.CORRUPT, f"{entry.path} does not match its digest", AGAIN)
    return found
