"""Artifacts in the user's cache, planned by subspec-plan on first use.

An artifact NAME/ has an entry NAME.json, which records what it was planned for. A planning process
holds a lock on the entry. Nothing here deletes artifacts: planning again replaces them, and users
may delete any.
"""

import hashlib
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Literal

from subspec.artifacts.common.command import say
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import format_size, short_size
from subspec.artifacts.common.user_cache import cache_problem, readable_cache_dir, user_cache_dir
from subspec.artifacts.format.codec import dump_json, load_dataclass, parse_json
from subspec.artifacts.format.folder import MANIFEST, lock_file
from subspec.artifacts.format.store import MAX_JSON, open_artifact
from subspec.artifacts.format.tensors import open_regular
from subspec.artifacts.model import Source
from subspec.runtime.app.opening_options import OpeningOptions
from subspec.runtime.app.planner_command import run_planner

DEMO = "demo"  # the model that comes with subspec
# Files of a checkpoint folder that a plan may depend on.
CHECKPOINT_FILES = ("*", "additional_chat_templates/*")
CHECKPOINT_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
MAX_STEM = 60  # characters of a model's name in that of its artifact

Notify = Callable[[str], None]


@dataclass(frozen=True)
class ModelRequest:
    """Options of --model for subspec-plan. None: the planner's default."""

    model: str  # REF: a folder, org/name, hf://org/name@revision, a bare name, or demo
    budget_bytes: int
    device: str | None = None
    context: int | None = None
    sequences: int | None = None
    link_bandwidth: int | None = None
    rehearse: str | None = None
    draft_model: str | None = None  # REF


def request_of(options: OpeningOptions) -> ModelRequest:
    """Return the request of a command line with --model that passed `check_opening`."""
    assert options.model is not None and options.vram is not None
    return ModelRequest(
        options.model,
        options.vram,
        options.device,
        options.context,
        options.sequences,
        options.link_bandwidth,
        options.rehearse,
        options.draft_model,
    )


@dataclass(frozen=True)
class Entry:
    """What a cached artifact was planned for."""

    schema: Literal["subspec.planned/1"]
    request: ModelRequest
    # Local folder: digest of its files' names, sizes and times. Demo: subspec's version. Empty for
    # a hub model, whose artifact has its commit.
    checkpoint: str
    draft_model: str = ""  # likewise of the draft model


def planned_model(request: ModelRequest, notify: Notify = say) -> Path:
    """Return the folder of the artifact for `request`, from the user's cache, else planned into it,
    which takes from a minute to hours. The planner's progress goes to stderr.

    Raises SubspecError: the planner's own, or RESOURCES if there is no cache.
    """
    folder, wanted = readable_cache_dir("artifacts"), entry_of(request)
    if folder is not None and is_current(folder / artifact_name(wanted.request), wanted):
        return folder / artifact_name(wanted.request)
    folder = user_cache_dir("artifacts")
    if folder is None:
        raise SubspecError(
            Exit.RESOURCES,
            f"a planned model cannot be kept in the user's cache: {cache_problem('artifacts')}",
            "set XDG_CACHE_HOME, or plan into a folder of your choice: "
            f"subspec-plan --model {shlex.quote(request.model)} --vram SIZE --out DIR",
        )
    path = folder / artifact_name(wanted.request)
    with locked(entry_path(path), notify) as entry:
        if not is_current(path, wanted):  # may have been planned by another process meanwhile
            plan_into(path, wanted, entry, notify)
    return path


def entry_of(request: ModelRequest) -> Entry:
    """Return the current entry for `request`."""
    model, checkpoint = identified(request.model)
    named, own = replace(request, model=model), ""
    if request.draft_model is not None:
        draft_model, own = identified(request.draft_model)
        named = replace(named, draft_model=draft_model)
    return Entry("subspec.planned/1", named, checkpoint, own)


def identified(model: str) -> tuple[str, str]:
    """Return a REF in canonical form and its version, as `Entry.checkpoint`. A local folder is
    named by its real path, as in subspec-plan: an existing folder takes precedence over a hub name,
    except one that begins with hf://."""
    if model == DEMO:
        return model, version("subspec")
    local = Path(os.path.expanduser(model))
    if model and "://" not in model and local.is_dir():
        return str(local.resolve()), files_digest(local.resolve())
    name = model.removeprefix("hf://")
    return model if Path(os.path.expanduser(name)).exists() else name, ""


def files_digest(folder: Path) -> str:
    """Digest of names, sizes and times of the checkpoint's files in `folder`."""
    found = []
    for pattern in CHECKPOINT_FILES:
        for path in sorted(folder.glob(pattern)):
            if path.suffix in CHECKPOINT_SUFFIXES and path.is_file():
                status = path.stat()
                found.append([path.name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(dump_json(found).encode()).hexdigest()


def artifact_name(request: ModelRequest) -> str:
    """Return a readable name, unique per request: qwen2.5-32b-24.00gb-1f0c5ae37d42."""
    stem = request.model.partition("@")[0].rstrip("/").rpartition("/")[2][:MAX_STEM]
    size = short_size(request.budget_bytes).replace(" ", "")
    digest = hashlib.sha256(dump_json(request).encode()).hexdigest()[:12]
    return re.sub(r"[^a-z0-9._-]+", "-", f"{stem}-{size}-{digest}".lower()).lstrip("-.")


def entry_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def read_entry(path: Path) -> Entry | None:
    """Read an entry; None if it is missing, damaged or being written."""
    try:
        with open_regular(path) as file:
            value = parse_json(file.read(MAX_JSON), path.name)
        found: Entry = load_dataclass(Entry, value, path.name)
    except (SubspecError, OSError):
        return None
    return found


def is_current(path: Path, wanted: Entry) -> bool:
    """Return True if the artifact `path` matches `wanted` and its structure is complete. Raises
    SubspecError if the check itself fails for want of resources."""
    if read_entry(entry_path(path)) != wanted:
        return False
    try:
        artifact = open_artifact(path)
    except SubspecError as error:
        if error.exit_code not in (Exit.USAGE, Exit.CORRUPT, Exit.WRONG_MACHINE):
            raise
        return False
    pairs = [(artifact.spec.source, wanted.request.model)]
    if artifact.draft_model is not None and wanted.request.draft_model is not None:
        pairs.append((artifact.draft_model.source, wanted.request.draft_model))
    return all(is_downloaded(*pair) for pair in pairs)


def is_downloaded(source: Source, model: str) -> bool:
    """Return True if `source` is local or the REF's version in the hub's local cache."""
    commit = (
        downloaded_commit(source.repository, model.partition("@")[2]) if source.revision else None
    )
    return commit in (None, source.revision)


def downloaded_commit(repository: str, revision: str) -> str | None:
    """Return the commit of a revision ("": main) in the hub's local cache; None if there is none.
    The hub is not contacted, so that a start needs no network."""
    from huggingface_hub import try_to_load_from_cache  # 0.3 s, only for hub models

    try:
        found = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    except ValueError:  # the library validates names
        return None
    return Path(found).parent.name if isinstance(found, str) else None


@contextmanager
def locked(entry: Path, notify: Notify) -> Iterator[IO[str]]:
    """Open and lock the entry; the kernel releases the lock when the process ends. An error in the
    block removes the entry."""
    with lock_of(entry, notify) as file:
        try:
            yield file
        except BaseException:
            entry.unlink(missing_ok=True)
            raise


def lock_of(entry: Path, notify: Notify) -> IO[str]:
    while True:
        file = open(entry, "a+", encoding="utf-8")
        try:
            lock_file(file, waiting=False)
        except BlockingIOError:
            notify("another process is planning this model: waiting for it")
            lock_file(file, waiting=True)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), entry.stat()):
                return file
        file.close()  # the previous holder removed this file


def plan_into(path: Path, wanted: Entry, entry: IO[str], notify: Notify) -> None:
    """Run subspec-plan, then write the entry."""
    request = wanted.request
    if path.exists() and not (path / MANIFEST).is_file() and any(path.iterdir()):
        raise SubspecError(
            Exit.CORRUPT,
            f"{path} is an incomplete artifact",
            f"remove it: rm -r {shlex.quote(str(path))}",
        )
    similar = same_weights(path, wanted)
    notify(
        f"planning {request.model} for {short_size(request.budget_bytes)} into {path}, once"
        + (f", with the weights of {similar.name}" if similar else "")
    )
    entry.truncate(0)
    overwrite = ["--overwrite"] if path.exists() else []
    run_planner([*planner_words(request, similar), "--out", str(path), *overwrite], shown=True)
    entry.write(dump_json(wanted))
    entry.flush()
    notify(kept(path))


def kept(path: Path) -> str:
    """Describe a planned model's disk usage, the total if there are several, and how to remove
    it."""
    artifacts = list(path.parent.glob(f"[!.]*/{MANIFEST}"))
    said = f"kept for the next start: {format_size(disk_bytes(path))}"
    if len(artifacts) > 1:
        total = short_size(disk_bytes(path.parent))
        said += f"; the {len(artifacts)} models in {path.parent} take {total}"
    return f"{said}; to remove it: rm -r {shlex.quote(str(path))}"


def planner_words(request: ModelRequest, similar: Path | None = None) -> list[str]:
    """Return the options of subspec-plan; similar: an artifact to link weights and reuse
    measurements from."""
    words = ["--from", str(similar)] if similar else ["--model", request.model]
    words += ["--vram", f"{request.budget_bytes}B"]
    link = request.link_bandwidth
    given = {
        "--device": request.device,
        "--context": request.context,
        "--sequences": request.sequences,
        "--link-bandwidth": f"{link}B" if link else None,
        "--rehearse": None if similar else request.rehearse,
        "--draft-model": None if similar else request.draft_model,
    }
    return words + [str(word) for pair in given.items() if pair[1] is not None for word in pair]


def same_weights(path: Path, wanted: Entry) -> Path | None:
    """Return another artifact beside `path` that differs from `wanted` at most in the number and
    length of its sequences. Another budget may have encoded weights differently."""

    def weights(entry: Entry) -> Entry:
        return replace(entry, request=replace(entry.request, context=None, sequences=None))

    for other in sorted(path.parent.glob("*.json")):
        found, artifact = read_entry(other), other.with_suffix("")
        if artifact == path or found is None or weights(found) != weights(wanted):
            continue
        if is_current(artifact, found):
            return artifact
    return None


def disk_bytes(folder: Path) -> int:
    """Bytes of the files in `folder`; hard links count once."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            found[status.st_dev, status.st_ino] = status.st_size
    return sum(found.values())
