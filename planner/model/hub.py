"""REF -> a local folder that holds the whole checkpoint, from this disk or the Hugging Face hub."""

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import Source
from subspec.planner.model.checkpoint import INDEX, WEIGHTS, shard_names
from subspec.planner.model.config import CONFIG, GENERATION_CONFIG
from subspec.planner.model.tokenizer_files import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG

DEMO = Path(__file__).parents[1] / "demo-model"
README = "README.md"
DRY_RUN_FILES = (CONFIG, GENERATION_CONFIG, INDEX, README)
SMALL_FILES = (*DRY_RUN_FILES, TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, "LICENSE*")

# Beginning of a bare model name -> the organisation that publishes the family.
ORGANISATIONS = {
    "Qwen2-": "Qwen",
    "Qwen2.5-": "Qwen",
    "Qwen3-": "Qwen",
    "Llama-": "meta-llama",
    "Meta-Llama-": "meta-llama",
    "Mistral-": "mistralai",
}
NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
REPOSITORY = re.compile(f"{NAME}/{NAME}", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}", re.ASCII)
LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", re.ASCII)
SHAPES_OF_REFERENCE = "give demo, a folder, org/name, hf://org/name@revision or Qwen2.5-7B"


@dataclass(frozen=True)
class Resolved:
    path: Path
    source: Source
    note: str = ""  # what a person should be told about how REF was read


def resolve(reference: str, revision: str | None = None, weights: bool = True) -> Resolved:
    """The folder of REF, downloaded if need be; without `weights` only what a dry run reads.

    Raises SubspecError: USAGE for a REF that means nothing, HUB for what cannot be fetched,
    UNSUPPORTED for a repository without safetensors."""
    if reference == "demo":
        _refuse_revision(reference, revision)
        return Resolved(DEMO, Source("demo", license=_license(DEMO)))
    if "://" not in reference:
        folder = _local_folder(reference)
        if folder is not None:
            _refuse_revision(reference, revision)
            return Resolved(folder, Source(folder.resolve().name, license=_license(folder)))
    repository, pinned = _parse(reference)
    if revision is not None and pinned is not None and revision != pinned:
        raise SubspecError(
            Exit.USAGE, f"{reference!r} is pinned to {pinned}, --revision says {revision}"
        )
    wanted = revision if revision is not None else pinned
    if wanted is not None and (not REVISION.fullmatch(wanted) or ".." in wanted):
        raise SubspecError(
            Exit.USAGE, f"{wanted[:100]!r} is not a revision", "give a commit, a branch or a tag"
        )
    folder = _download(repository, wanted, weights)
    note = f"{reference} is {repository}" if "/" not in reference else ""
    return Resolved(folder, Source(repository, folder.name, _license(folder)), note)


def _local_folder(reference: str) -> Path | None:
    """A path wins if it exists or looks like one; a missing path never turns into a hub id."""
    path = Path(os.path.expanduser(reference))
    exists = reference != "" and os.path.exists(path)
    looks_local = reference in (".", "..") or reference.startswith(("./", "../", "/", "~"))
    if not exists and not looks_local:
        return None
    if not path.is_dir():
        problem = "is not a folder" if exists else "does not exist"
        raise SubspecError(Exit.USAGE, f"{reference[:200]!r} {problem}", SHAPES_OF_REFERENCE)
    return path


def _parse(reference: str) -> tuple[str, str | None]:
    """A hub reference -> repository and revision."""
    scheme, separator, rest = reference.rpartition("://")
    if separator and scheme != "hf":
        message = f"{reference[:200]!r} begins with {scheme[:50]}://, expected hf:// or none"
        raise SubspecError(Exit.USAGE, message, SHAPES_OF_REFERENCE)
    repository, at, revision = rest.partition("@")
    if at and not revision:
        raise SubspecError(
            Exit.USAGE, f"{reference[:200]!r} has no revision after the @", SHAPES_OF_REFERENCE
        )
    if "/" not in repository and not separator:
        owners = [o for prefix, o in ORGANISATIONS.items() if repository.startswith(prefix)]
        if not owners:
            raise SubspecError(
                Exit.USAGE,
                f"{reference[:200]!r} is neither a folder nor a known model family",
                SHAPES_OF_REFERENCE,
            )
        repository = f"{owners[0]}/{repository}"
    # The rules of huggingface_hub: "--" separates org from name in the cache's folders.
    fine = REPOSITORY.fullmatch(repository) and len(repository) <= 96
    if not fine or "--" in repository or ".." in repository or repository.endswith(".git"):
        raise SubspecError(
            Exit.USAGE, f"{reference[:200]!r} is not a hub repository", SHAPES_OF_REFERENCE
        )
    return repository, revision or None


def _refuse_revision(reference: str, revision: str | None) -> None:
    if revision is not None:
        raise SubspecError(
            Exit.USAGE, f"--revision {revision} is for the hub, {reference} is local", "drop it"
        )


def _download(repository: str, revision: str | None, weights: bool) -> Path:
    """Two requests, because only the index says which files are the weights: repositories also
    hold them a second time in other formats."""
    folder = _fetch(repository, revision, SMALL_FILES if weights else DRY_RUN_FILES)
    if not (folder / CONFIG).exists():
        raise _incomplete(repository, revision, folder, CONFIG)
    if not weights:
        return folder
    missing = _missing(folder)
    if missing:
        _fetch(repository, folder.name, tuple(missing))
        missing = _missing(folder)
    if missing:
        raise _incomplete(repository, revision, folder, missing[0])
    return folder


def _missing(folder: Path) -> list[str]:
    names = shard_names(folder) if (folder / INDEX).exists() else [WEIGHTS]
    return [name for name in names if not (folder / name).exists()]


def _fetch(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download  # 0.3 s: only those who use the hub pay it

    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            cache_dir=_cache(),
            local_files_only=_is_offline(),
            allow_patterns=list(patterns),
        )
    # Its HTTP client's errors come through as they are, and the client changes with its version.
    except Exception as error:
        raise _explained(error, repository, revision) from error
    return Path(folder)


def _explained(error: Exception, repository: str, revision: str | None) -> SubspecError:
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    command = _command(repository, revision)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        message = f"no space left in {_cache()} for {repository}"
        return SubspecError(Exit.RESOURCES, message, "set HF_HOME to a folder on a larger disk")
    status = _status(error)
    if isinstance(error, RevisionNotFoundError):
        message = f"{repository} has no revision {revision}"
        return SubspecError(Exit.HUB, message, f"see https://huggingface.co/{repository}/commits")
    if status in (401, 403):
        return SubspecError(
            Exit.HUB,
            f"the hub refuses access to {repository} (HTTP {status}): gated, private or misspelt",
            f"accept its licence at https://huggingface.co/{repository}, set HF_TOKEN, "
            f"then: {command}",
        )
    if isinstance(error, RepositoryNotFoundError):
        hint = "check the spelling; a private one needs HF_TOKEN"
        return SubspecError(Exit.HUB, f"the hub has no repository {repository}", hint)
    if _is_offline():
        return SubspecError(
            Exit.HUB,
            f"{repository} is not in the cache {_cache()}, and HF_HUB_OFFLINE is set",
            f"with a network: HF_HUB_OFFLINE=0 {command}",
        )
    first_line = (str(error).splitlines() or [""])[0][:200]
    message = f"{repository} cannot be downloaded: {type(error).__name__}: {first_line}"
    return SubspecError(Exit.HUB, message, f"when the network is back: {command}")


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, which the hub library may have wrapped in another."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return int(error.response.status_code)
        error = error.__cause__
    return None


def _incomplete(repository: str, revision: str | None, folder: Path, name: str) -> SubspecError:
    """A file is not in the snapshot: not downloaded, or the repository never had it."""
    command = _command(repository, revision)
    if _is_offline() or (folder / INDEX).exists():
        message = f"{repository} is not complete in the cache: {folder} has no {name}"
        return SubspecError(Exit.HUB, message, f"with a network: HF_HUB_OFFLINE=0 {command}")
    return SubspecError(
        Exit.UNSUPPORTED,
        f"{repository} has no {name}: not a transformers checkpoint in safetensors",
        f"use the original model, or its safetensors; if a download broke off: {command}",
    )


def _command(repository: str, revision: str | None) -> str:
    return f"hf download {repository}" + (f" --revision {revision}" if revision else "")


def _cache() -> Path:
    """Where the hub library keeps its files; read when needed, because it reads once at import."""
    cache = os.environ.get("HF_HUB_CACHE")
    if not cache:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = os.environ.get("HF_HOME") or os.path.join(base, "huggingface")
        cache = os.path.join(home, "hub")
    return Path(os.path.expanduser(os.path.expandvars(cache)))


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _license(folder: Path) -> str:
    """`license:` of the README's front matter; "" where there is none."""
    path = folder / README
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(1 << 16)
    fields = {}
    if text.startswith("---\n"):
        for line in text[4:].partition("\n---")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key] = value.strip().strip("'\"")
    name = fields.get("license", "")
    if name == "other":  # the hub's word for a licence of one's own, which then has a name
        name = fields.get("license_name", name)
    return name if LICENSE.fullmatch(name) else ""
