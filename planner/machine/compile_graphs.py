"""Compiles the pieces of a model's draft (runtime/draft/graph_pieces.py) with torch's AOTInductor
into the user's cache, from where they are packed into artifacts.

In a process of its own: inductor takes hundreds of MB, which no measurement is to see.
"""

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from subspec.artifacts.common.child import run_child
from subspec.artifacts.common.user_cache import cache_problem, user_cache_dir
from subspec.artifacts.format.codec import dump_json, load_dataclass, parse_json
from subspec.artifacts.model import ModelSpec
from subspec.runtime.draft.graph_pieces import (
    FOLDER,
    Piece,
    example_of,
    module_of,
    pieces_of,
    program,
)

MAX_SECONDS = 600
MAX_ROWS = 1 << 16  # a bound that torch.export wants
# Few rows: one thread is done before another one wakes.
CONFIGURATION = {"cpp.threads": 1}


def compile_graphs(spec: ModelSpec) -> str | None:
    """Compile the missing pieces of the model's draft. Returns the reason if that is not
    possible."""
    folder = user_cache_dir(FOLDER)
    if folder is None:
        return f"nothing can be kept: {cache_problem(FOLDER)}"
    if all((folder.parent / program(piece)).exists() for piece in pieces_of(spec)):
        return None
    # Quiet, and nothing is left behind: of torch's own cache, or of a child that had to be ended.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", __spec__.name, str(folder.parent), scratch]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": scratch}
        try:
            ended = run_child(command, dump_json(spec).encode(), MAX_SECONDS, False, environment)
        except subprocess.TimeoutExpired:
            return f"torch could not compile: it took longer than {MAX_SECONDS} seconds"
        except OSError as error:
            return f"torch could not compile: {error}"
    if ended.returncode:
        lines = ended.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
        return f"torch could not compile: {lines[-1][:300]}"
    return None


def compile_piece(piece: Piece, path: Path, scratch: Path) -> None:
    """Write the package in `scratch`, of the same file system, and rename it."""
    rows, weights = example_of(piece)
    num_rows = torch.export.Dim("T", min=1, max=MAX_ROWS)
    dynamic: tuple[list[dict[int, object]], list[None]] = (
        [{0: num_rows} for _ in rows],
        [None for _ in weights],
    )
    unfinished = scratch / path.name
    with torch.no_grad():
        exported = torch.export.export(
            module_of(piece), (rows, weights), dynamic_shapes=dynamic, strict=False
        )
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(unfinished), inductor_configs=CONFIGURATION
        )
    os.replace(unfinished, path)


def main() -> None:
    """stdin: a ModelSpec as JSON. Arguments: the cache, and a folder for what is unfinished."""
    warnings.simplefilter("ignore")
    spec = load_dataclass(ModelSpec, parse_json(sys.stdin.read(), "stdin"), "stdin")
    cache, scratch = map(Path, sys.argv[1:])
    for piece in pieces_of(spec):
        path = cache / program(piece)
        if not path.exists():
            compile_piece(piece, path, scratch)


if __name__ == "__main__":
    main()
