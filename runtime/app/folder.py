"""Open an artifact's folder before slow imports."""

import shlex
from pathlib import Path
from threading import Thread

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact, open_artifact
from subspec.artifacts.format.tensors import read_ahead
from subspec.artifacts.plan import Method

LOADED_FIRST_BYTES = 2 << 30  # that a disk reads in about a second


def open_folder(path: Path) -> Artifact:
    """Open an artifact. The error has a hint if `path` is a checkpoint or a model's name."""
    is_checkpoint = (path / "config.json").exists() and not (path / "manifest.json").exists()
    if path.exists() and not is_checkpoint:
        return open_artifact(path)
    what = "is a checkpoint, not an artifact" if is_checkpoint else "does not exist"
    model = shlex.quote(str(path)) if is_checkpoint or not path.is_absolute() else "REF"
    raise SubspecError(
        Exit.USAGE,
        f"{path} {what}",
        f"plan and run it: subspec-run --model {model} --vram SIZE; or give a folder that was made "
        f"with subspec-plan --model {model} --vram SIZE",
    )


def begin_to_read(artifact: Artifact, method: Method | None) -> None:
    """Prefetch the substitutes, which are loaded first, into the page cache: the disk is idle for a
    second or two while torch is imported. method None: the plan's."""
    placement = artifact.plan.placements.get(method or artifact.plan.method)
    if placement is not None and placement.ledger.substitutes:
        path = artifact.path / "substitutes.safetensors"
        Thread(target=read_ahead, args=(path, LOADED_FIRST_BYTES), daemon=True).start()
