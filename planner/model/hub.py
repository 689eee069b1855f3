"""REF -> a local folder that holds the whole checkpoint, from this disk or the Hugging Face hub."""

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import Source
from subspec.planner.model.config import CONFIG, GENERATION_CONFIG
from subspec.planner.model.stored import INDEX, WEIGHTS, shard_names
from subspec.planner.model.tokenizer_files import (
    ADDED_TOKENS,
    CHAT_TEMPLATE,
    MORE_TEMPLATES,
    SENTENCEPIECE,
    SPECIAL_TOKENS_MAP,
    TEKKEN,
    TOKENIZER,
    TOKENIZER_CONFIG,
)

DEMO = Path(__file__).parents[1] / "demo-model"
README = "README.md"
DRY_RUN_FILES = (CONFIG, INDEX)
SMALL_FILES = (*DRY_RUN_FILES, TOKENIZER, TOKENIZER_CONFIG)
# Optional files, often missing from a cache that other programs filled; a note names them.
EXTRA_FILES = (
    GENERATION_CONFIG,
    CHAT_TEMPLATE,
    f"{MORE_TEMPLATES}/*.jinja",
    ADDED_TOKENS,
    SPECIAL_TOKENS_MAP,
)
WELCOME_FILES = (README, "LICENSE*", "NOTICE")  # nothing is computed from them
MAX_README = 8 << 20

# Beginning of a bare model name -> the organisation that publishes the family.
ORGANISATIONS = {
    "Qwen2-": "Qwen",
    "Qwen2.5-": "Qwen",
    "Qwen3-": "Qwen",
    "Qwen3.5-": "Qwen",
    "Qwen3.6-": "Qwen",
    "Qwen3.8-": "Qwen",
    "Llama-": "meta-llama",
    "Meta-Llama-": "meta-llama",
    "Mistral-": "mistralai",
    "Ministral-": "mistralai",
    "Devstral-": "mistralai",
    "Magistral-": "mistralai",
    "DeepSeek-R1-Distill-": "deepseek-ai",
    "DeepSeek-R1-0528-": "deepseek-ai",
    "gemma-3-": "google",
    "gemma-4-": "google",
    "SmolLM2-": "HuggingFaceTB",
    "SmolLM3-": "HuggingFaceTB",
    "OLMo-2-": "allenai",
    "Olmo-3-": "allenai",
    "Olmo-3.1-": "allenai",
    "Phi-3-": "microsoft",
    "Phi-3.5-": "microsoft",
    "Phi-4-": "microsoft",
    "phi-4": "microsoft",
    "GLM-4-": "zai-org",
    "GLM-Z1-": "zai-org",
    "granite-": "ibm-granite",
    "Seed-OSS-": "ByteDance-Seed",
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
    notes: tuple[str, ...] = ()  # for the user, on how REF was read


def resolve(
    reference: str,
    revision: str | None = None,
    weights: bool = True,
    tokenizer: bool | None = None,
) -> Resolved:
    """The folder of REF, downloaded if need be; without `weights` only what a dry run reads. Its
    tokenizer comes too if that is wanted; None: with the weights.

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
    has_tokenizer = weights if tokenizer is None else tokenizer
    folder, lacking = _download(repository, wanted, weights, has_tokenizer)
    notes = [f"{reference} is {repository}"] if "/" not in reference else []
    if lacking:
        what = ", ".join(lacking)
        notes.append(f"note: planned without {what}, which {repository} has and the cache lacks")
    return Resolved(folder, Source(repository, folder.name, _license(folder)), tuple(notes))


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


def _download(
    repository: str, revision: str | None, weights: bool, tokenizer: bool
) -> tuple[Path, list[str]]:
    """The folder, and the extra files of the repository that it lacks. Several requests, because
    only the index says which files are the weights: repositories also hold them a second time in
    other formats."""
    away = _away(repository, revision)
    small, extra = (SMALL_FILES, EXTRA_FILES) if tokenizer else (DRY_RUN_FILES, EXTRA_FILES[:1])
    vocabulary = (SENTENCEPIECE,) if tokenizer else ()  # of a tokenizer without tokenizer.json
    lacking = []
    try:
        folder = _fetch(repository, revision, (*small, *extra, *vocabulary), away)
    except SubspecError:  # which of them, and does it matter?
        folder = _fetch(repository, revision, small, away)
        lacking = [name for name in extra if not _has(repository, folder, (name,), away)]
    if not (folder / CONFIG).exists():
        raise _incomplete(repository, revision, folder, CONFIG, away)
    _has(repository, folder, WELCOME_FILES, away)
    if tokenizer and not (folder / TOKENIZER).exists():
        _fetch(repository, folder.name, vocabulary, away)
        _has(repository, folder, (TEKKEN,), away)  # for the sentence that names it
        if away and not any((folder / name).exists() for name in (SENTENCEPIECE, TEKKEN)):
            raise _incomplete(repository, revision, folder, TOKENIZER, away)
    if not weights:
        return folder, lacking
    missing = _missing(folder)
    if missing:
        _fetch(repository, folder.name, tuple(missing), away)
        missing = _missing(folder)
    if missing:
        raise _incomplete(repository, revision, folder, missing[0], away)
    return folder, lacking


def _missing(folder: Path) -> list[str]:
    names = shard_names(folder) if (folder / INDEX).exists() else [WEIGHTS]
    return [name for name in names if not (folder / name).exists()]


def _away(repository: str, revision: str | None) -> str:
    """Reason for not asking the hub; "" if it can be asked. Without a network each request would be
    repeated for half a minute."""
    from huggingface_hub import HfApi, is_offline_mode  # 0.3 s: only when the hub is used
    from huggingface_hub.errors import HfHubHTTPError

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi().model_info(repository, revision=revision)
    except HfHubHTTPError:  # an answer
        return ""
    except Exception as error:  # as in _fetch
        return f"the hub cannot be reached ({type(error).__name__}: {_first_line(error)})"
    return ""


def _has(repository: str, folder: Path, patterns: tuple[str, ...], away: str) -> bool:
    """Fetch files that nothing depends on. Return False if the repository has some of them that are
    not to be had now."""
    try:
        _fetch(repository, folder.name, patterns, away)
    except SubspecError:
        return False
    return True


def _fetch(repository: str, revision: str | None, patterns: tuple[str, ...], away: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            local_files_only=bool(away),
            allow_patterns=list(patterns),
        )
    # Its HTTP client's errors come through as they are, and the client changes with its version.
    except Exception as error:
        raise _explained(error, repository, revision, away) from error
    return Path(folder)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _explained(error: Exception, repository: str, revision: str | None, away: str) -> SubspecError:
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    command = _command(repository, revision)
    cache = Path(constants.HF_HUB_CACHE)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        message = f"no space left in {cache} for {repository}"
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
    _, lacks_files, files = str(error).partition("is incomplete: ")
    if lacks_files:  # the library knows the repository's list of files
        message = f"{repository} is not complete in the cache: {files.splitlines()[0][:200]}"
        return SubspecError(Exit.HUB, message, f"with a network: HF_HUB_OFFLINE=0 {command}")
    if away:
        what = repository
        if (cache / repo_folder_name(repo_id=repository, repo_type="model")).is_dir():
            what = f"revision {revision or 'main'} of {repository}"
        return SubspecError(
            Exit.HUB,
            f"{what} is not in the cache {cache}, and {away}",
            f"with a network: HF_HUB_OFFLINE=0 {command}",
        )
    message = f"{repository} cannot be downloaded: {type(error).__name__}: {_first_line(error)}"
    return SubspecError(Exit.HUB, message, f"when the network is back: {command}")


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, which the hub library may have wrapped in another."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return int(error.response.status_code)
        error = error.__cause__
    return None


def _incomplete(
    repository: str, revision: str | None, folder: Path, name: str, away: str
) -> SubspecError:
    """A file is not in the snapshot: not downloaded, or the repository never had it."""
    command = _command(repository, revision)
    if away or (folder / INDEX).exists():
        message = f"{repository} is not complete in the cache: {folder} has no {name}"
        return SubspecError(Exit.HUB, message, f"with a network: HF_HUB_OFFLINE=0 {command}")
    return SubspecError(
        Exit.UNSUPPORTED,
        f"{repository} has no {name}: not a transformers checkpoint in safetensors",
        f"use the original model, or its safetensors; if a download broke off: {command}",
    )


def _command(repository: str, revision: str | None) -> str:
    return f"hf download {repository}" + (f" --revision {revision}" if revision else "")


def _license(folder: Path) -> str:
    """`license:` of the README's front matter; "" where there is none."""
    path = folder / README
    if not path.is_file() or path.stat().st_size > MAX_README:
        return ""
    from huggingface_hub.repocard import metadata_load

    try:
        fields = metadata_load(path) or {}
    except Exception:  # a card is for people: what cannot be parsed has no licence that we can name
        return ""
    name = fields.get("license")
    if name == "other":  # the hub's word for a licence of one's own, which then has a name
        name = fields.get("license_name", name)
    return name if isinstance(name, str) and LICENSE.fullmatch(name) else ""
