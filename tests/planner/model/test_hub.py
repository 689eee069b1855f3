"""No network: a cache laid out by hand, and a double of the one function that downloads."""

import errno
import fnmatch
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import Source
from subspec.planner.model.hub import DEMO, resolve

SHA = "0123456789abcdef0123456789abcdef01234567"
OTHER_SHA = "f" * 40
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
CARD = "---\nlicense: apache-2.0\ntags:\n- x\n---\n# Tiny\nlicense: mit\n"


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and working folder; returns the cache."""
    # The library reads its environment once: see test_the_environment_of_the_hub_library_counts.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return tmp_path / "home" / "hub"


def repository_files(sharded: bool) -> dict[str, str]:
    files = {"config.json": "{}", "README.md": CARD, "tokenizer.json": "{}", "LICENSE.txt": "words"}
    if not sharded:
        return {**files, "model.safetensors": "weights", "consolidated.safetensors": "again"}
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    files["model.safetensors.index.json"] = json.dumps(index)
    return {**files, **dict.fromkeys(SHARDS, "weights"), "pytorch_model.bin": "pickle"}


def fill_cache(
    cache: Path, repository: str, sharded: bool = True, sha: str = SHA, branch: str = "main"
) -> Path:
    """The hub library's layout: refs, blobs, and snapshots of links into them."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / sha
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    reference = root / "refs" / branch
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(sha)
    for number, (name, content) in enumerate(repository_files(sharded).items()):
        blob = root / "blobs" / f"{sha}{number}"
        blob.write_text(content)
        (snapshot / name).symlink_to(blob)
    return snapshot


def refused(reference: str, exit_code: Exit, **options: Any) -> SubspecError:
    with pytest.raises(SubspecError) as caught:
        resolve(reference, **options)
    assert caught.value.exit_code == exit_code
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500
    return caught.value


def test_demo_is_the_embedded_model() -> None:
    found = resolve("demo")
    assert found.path == DEMO
    assert (found.path / "model.safetensors").is_file()
    assert found.source.repository == "demo"


def test_a_folder_that_exists_wins_over_the_hub(offline: Path) -> None:
    fill_cache(offline, "org/name")
    folder = Path("org/name")
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    found = resolve("org/name")
    assert found.path == folder
    assert found.source == Source("name", "", "apache-2.0")


@pytest.mark.parametrize("reference", ["./here", "../work/here", "here"])
def test_a_path_may_be_relative_absolute_or_in_the_home_folder(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("here").mkdir()
    monkeypatch.setenv("HOME", str(Path.cwd()))
    for form in (reference, str(Path("here").resolve()), "~/here"):
        found = resolve(form)
        assert found.path.resolve() == Path("here").resolve()
        assert found.source.repository == "here"


@pytest.mark.parametrize(
    "reference", ["./Qwen/Qwen2.5-7B", "../../x", "/Qwen/Qwen2.5-7B", "~/no/such", "~nobody/x"]
)
def test_a_missing_path_is_never_tried_on_the_hub(reference: str) -> None:
    assert "does not exist" in refused(reference, Exit.USAGE).message


def test_a_file_is_not_a_checkpoint() -> None:
    Path("model.gguf").write_text("x")
    assert "not a folder" in refused("model.gguf", Exit.USAGE).message


@pytest.mark.parametrize(
    "reference",
    [
        *"unknown-model a/b/c hf://a/b/c hf://../../x hf://name hf:// org/name@ hf://org/name@".split(),
        *"Qwen2.5-7B@ org/name@a/../../x org/name@-x org/.. org/a--b org/a..b".split(),
        *"org/name.git -org/name org/näme Qwen2.5-/../x HF://org/name ://org/name file:///etc".split(),
        *"https://huggingface.co/org/name s3://bucket/name".split(),
        "",
        "org/name@a b",
        "org/na me",
        "org/name\n",
        "org/\0",
        "o/" + "x" * 200,
    ],
)
def test_what_is_no_reference_is_a_usage_error_with_a_hint(reference: str) -> None:
    assert refused(reference, Exit.USAGE).hint


def test_a_revision_is_for_the_hub_and_only_one_is_given(offline: Path) -> None:
    fill_cache(offline, "org/name")
    refused("demo", Exit.USAGE, revision="main")
    Path("here").mkdir()
    refused("./here", Exit.USAGE, revision="main")
    refused("hf://org/name@main", Exit.USAGE, revision="other")
    refused("org/name", Exit.USAGE, revision="")
    assert resolve("hf://org/name@main", revision="main").path.name == SHA


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("reference", ["org/name", "hf://org/name", "hf://org/name@main"])
def test_a_cached_repository_needs_no_network_and_records_its_commit(
    offline: Path, reference: str, sharded: bool
) -> None:
    snapshot = fill_cache(offline, "org/name", sharded)
    found = resolve(reference)
    assert found.path == snapshot
    assert found.source == Source("org/name", SHA, "apache-2.0")
    assert found.notes == ()


def test_branches_and_commits_find_their_own_snapshot(offline: Path) -> None:
    fill_cache(offline, "org/name")
    fill_cache(offline, "org/name", sha=OTHER_SHA, branch="refs/pr/1")
    assert resolve("org/name").source.revision == SHA
    assert resolve("org/name", revision="refs/pr/1").source.revision == OTHER_SHA
    assert resolve(f"hf://org/name@{OTHER_SHA}").source.revision == OTHER_SHA


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("Qwen2.5-32B", "Qwen/Qwen2.5-32B"),
        ("Qwen3-8B", "Qwen/Qwen3-8B"),
        ("Qwen3.5-27B", "Qwen/Qwen3.5-27B"),
        ("Qwen3.6-27B", "Qwen/Qwen3.6-27B"),
        ("gemma-3-27b-it", "google/gemma-3-27b-it"),
        ("gemma-4-31B-it", "google/gemma-4-31B-it"),
        ("Olmo-3.1-32B-Think", "allenai/Olmo-3.1-32B-Think"),
        ("GLM-Z1-9B-0414", "zai-org/GLM-Z1-9B-0414"),
        ("DeepSeek-R1-Distill-Qwen-32B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"),
        ("DeepSeek-R1-0528-Qwen3-8B", "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B"),
        ("Devstral-Small-2-24B-Instruct-2512", "mistralai/Devstral-Small-2-24B-Instruct-2512"),
        ("Magistral-Small-2509", "mistralai/Magistral-Small-2509"),
        ("Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("SmolLM3-3B", "HuggingFaceTB/SmolLM3-3B"),
        ("Olmo-3-1125-32B", "allenai/Olmo-3-1125-32B"),
        ("Phi-4-mini-instruct", "microsoft/Phi-4-mini-instruct"),
        ("phi-4", "microsoft/phi-4"),
        ("GLM-4-9B-0414", "zai-org/GLM-4-9B-0414"),
        ("granite-3.3-8b-instruct", "ibm-granite/granite-3.3-8b-instruct"),
        ("Seed-OSS-36B-Instruct", "ByteDance-Seed/Seed-OSS-36B-Instruct"),
    ],
)
def test_a_bare_name_of_a_known_family_is_found_and_said(
    offline: Path, name: str, repository: str
) -> None:
    fill_cache(offline, repository)
    found = resolve(name)
    assert found.source.repository == repository
    assert found.notes == (f"{name} is {repository}",)


ENVIRONMENT = """
from subspec.planner.model.hub import resolve
print(resolve("org/name").path)
"""


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_environment_of_the_hub_library_counts(tmp_path: Path, variable: str) -> None:
    folder = tmp_path / "elsewhere"
    snapshot = fill_cache(folder / "hub" if variable == "HF_HOME" else folder, "org/name")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ENVIRONMENT],
        capture_output=True,
        text=True,
        env={**environment, variable: str(folder)},
    )
    assert done.stdout.strip() == str(snapshot), done.stderr


def test_what_is_not_cached_says_how_to_download_it() -> None:
    error = refused("org/name", Exit.HUB, revision="v1")
    assert "HF_HUB_OFFLINE" in error.message
    assert "hf download org/name --revision v1" in error.hint


def test_another_revision_in_the_cache_is_not_taken_for_the_one_asked_for(offline: Path) -> None:
    fill_cache(offline, "org/name")
    assert "revision v1 of org/name is not" in refused("org/name", Exit.HUB, revision="v1").message


def list_files(cache: Path, repository: str, names: list[str]) -> None:
    """The repository's own list of files, as the library keeps it."""
    entries = {name: {"size": 1, "blob_id": "0" * 40} for name in names}
    trees = cache / f"models--{repository.replace('/', '--')}" / "trees"
    trees.mkdir(parents=True)
    (trees / f"{SHA}.json").write_text(json.dumps({"format_version": 1, "files": entries}))


def test_files_that_nothing_is_computed_from_may_be_missing(offline: Path) -> None:
    snapshot = fill_cache(offline, "org/name")
    list_files(offline, "org/name", [*repository_files(True), "LICENSE"])
    (snapshot / "README.md").unlink()
    assert resolve("org/name").path == snapshot
    assert resolve("org/name").source.license == ""


EXTRA = ["generation_config.json", "chat_template.jinja", "special_tokens_map.json"]


@pytest.fixture(params=["offline", "dead network"])
def away(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Why the hub does not answer; a second request would be one too many."""
    if request.param == "offline":
        return "HF_HUB_OFFLINE is set"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = Mock(side_effect=[ConnectionError("refused")])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    return "the hub cannot be reached (ConnectionError: refused)"


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("reference", ["org/name", "hf://org/name@main", f"org/name@{SHA}"])
@pytest.mark.parametrize("lost", [*([name] for name in EXTRA), EXTRA, ["LICENSE"]])
def test_files_that_a_model_runs_without_may_be_missing_and_are_named(
    offline: Path, reference: str, lost: list[str]
) -> None:
    snapshot = fill_cache(offline, "org/name")
    list_files(offline, "org/name", [*repository_files(True), *lost, "tokenizer.model"])
    found = resolve(reference)
    assert found.path == snapshot
    named = [name for name in lost if name in EXTRA]
    assert len(found.notes) == bool(named)
    assert all(name in found.notes[0] for name in named)


def test_a_tokenizer_that_is_not_in_the_cache_is_named(offline: Path) -> None:
    (fill_cache(offline, "org/name") / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused("org/name", Exit.HUB).message
    list_files(offline, "org/name", ["config.json", "tokenizer.model", *SHARDS])
    assert "tokenizer.model" in refused("org/name", Exit.HUB).message


def test_named_chat_templates_come_with_the_tokenizer(
    downloads: Callable[[bool], list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "additional_chat_templates/tool_use.jinja"
    files = {**repository_files(True), template: "{{ tools }}"}
    monkeypatch.setattr(sys.modules[__name__], "repository_files", lambda sharded: files)
    downloads(True)
    assert (resolve("org/name").path / template).read_text() == "{{ tools }}"


def test_a_tekken_comes_only_where_there_is_no_other_tokenizer(
    downloads: Callable[[bool], list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {**repository_files(True), "tekken.json": "{}"}
    monkeypatch.setattr(sys.modules[__name__], "repository_files", lambda sharded: files)
    downloads(True)
    assert not (resolve("org/name", weights=False, tokenizer=True).path / "tekken.json").exists()
    del files["tokenizer.json"]
    shutil.rmtree("../home")
    downloads(True)
    assert (resolve("org/name", weights=False, tokenizer=True).path / "tekken.json").exists()


@pytest.mark.usefixtures("away")
def test_a_draft_head_needs_no_tokenizer(offline: Path) -> None:
    snapshot = fill_cache(offline, "org/head")
    (snapshot / "tokenizer.json").unlink()
    list_files(offline, "org/head", ["config.json", *SHARDS])
    assert resolve("org/head", tokenizer=False).path == snapshot
    (snapshot / SHARDS[0]).unlink()
    assert SHARDS[0] in refused("org/head", Exit.HUB, tokenizer=False).message


@pytest.mark.parametrize("revision", [None, "dev", OTHER_SHA, SHA[:7]])
def test_what_is_not_cached_is_said_with_the_reason(
    offline: Path, away: str, revision: str | None
) -> None:
    fill_cache(offline, "org/name", branch="other")
    wanted = f"revision {revision or 'main'} of org/name is not in the cache"
    message = refused("org/name", Exit.HUB, revision=revision).message
    assert message.startswith(wanted) and message.endswith(away)


@pytest.mark.parametrize("lost", ["tokenizer.json", "tokenizer_config.json", SHARDS[0]])
def test_a_listed_file_that_is_not_in_the_cache_is_named(offline: Path, lost: str) -> None:
    snapshot = fill_cache(offline, "org/name")
    list_files(offline, "org/name", [*repository_files(True), lost])
    (snapshot / lost).unlink(missing_ok=True)
    assert lost in refused("org/name", Exit.HUB).message


@pytest.mark.parametrize("lost", ["config.json", SHARDS[1]])
def test_an_incomplete_snapshot_is_not_used(offline: Path, lost: str) -> None:
    (fill_cache(offline, "org/name") / lost).unlink()
    error = refused("org/name", Exit.HUB)
    assert lost in error.message
    assert "hf download org/name" in error.hint


def test_a_dry_run_is_content_without_weights(offline: Path) -> None:
    snapshot = fill_cache(offline, "org/name", sharded=False)
    (snapshot / "model.safetensors").unlink()
    refused("org/name", Exit.HUB)
    assert resolve("org/name", weights=False).path == snapshot


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: 'mit'\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "qwen-research"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: <script>\n---\n", ""),
        ("---\nlicense:\n- mit\n- gpl\n---\n", ""),
        ("# Title\nlicense: mit\n", ""),
        ("", ""),
    ],
)
def test_the_licence_is_that_of_the_cards_front_matter(card: str, expected: str) -> None:
    Path("here").mkdir()
    Path("here/README.md").write_text(card)
    assert resolve("./here").source.license == expected


@pytest.fixture
def downloads(offline: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[list[str]]]:
    """Puts a repository online; the list that it returns grows by the names of each request."""

    def put_online(sharded: bool) -> list[list[str]]:
        requests: list[list[str]] = []

        def snapshot_download(
            repository: str,
            *,
            revision: str | None,
            local_files_only: bool,
            allow_patterns: list[str],
        ) -> str:
            assert not local_files_only
            assert (repository, revision) == ("org/name", SHA if requests else None)
            snapshot = offline / "models--org--name" / "snapshots" / SHA
            snapshot.mkdir(parents=True, exist_ok=True)
            requests.append([])
            for name, content in repository_files(sharded).items():
                if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                    (snapshot / name).parent.mkdir(exist_ok=True)
                    (snapshot / name).write_text(content)
                    requests[-1].append(name)
            return str(snapshot)

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", Mock())
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return requests

    return put_online


def test_only_the_weights_of_the_index_are_downloaded(
    downloads: Callable[[bool], list[list[str]]],
) -> None:
    requests = downloads(True)
    assert resolve("org/name").source.revision == SHA
    small = ["config.json", "tokenizer.json", "model.safetensors.index.json"]
    assert requests == [small, ["README.md", "LICENSE.txt"], SHARDS]


def test_a_single_file_is_downloaded_without_its_twin(
    downloads: Callable[[bool], list[list[str]]],
) -> None:
    requests = downloads(False)
    resolve("org/name")
    assert requests[2:] == [["model.safetensors"]]


def test_a_dry_run_downloads_no_weights(downloads: Callable[[bool], list[list[str]]]) -> None:
    requests = downloads(True)
    resolve("org/name", weights=False)
    small = ["config.json", "model.safetensors.index.json"]
    assert requests == [small, ["README.md", "LICENSE.txt"]]


def test_a_repository_without_safetensors_is_unsupported(
    downloads: Callable[[bool], list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": "{}", "pytorch_model.bin": "pickle"}
    monkeypatch.setattr(sys.modules[__name__], "repository_files", lambda sharded: files)
    downloads(False)
    assert "model.safetensors" in refused("org/name", Exit.UNSUPPORTED).message
    files.pop("config.json")
    shutil.rmtree("../home")
    downloads(False)
    assert "config.json" in refused("org/name", Exit.UNSUPPORTED).message


def http_error(kind: type[Exception], status: int) -> Exception:
    return kind("said the hub", response=Mock(status_code=status, headers={}))  # type: ignore[call-arg]


def wrapped(error: Exception) -> Exception:
    outer = LocalEntryNotFoundError("cannot find the file")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "exit_code", "said"),
    [
        (http_error(GatedRepoError, 403), Exit.HUB, "HF_TOKEN"),
        (http_error(RepositoryNotFoundError, 401), Exit.HUB, "HF_TOKEN"),
        (wrapped(http_error(GatedRepoError, 403)), Exit.HUB, "HF_TOKEN"),
        (http_error(RepositoryNotFoundError, 404), Exit.HUB, "no repository org/name"),
        (http_error(RevisionNotFoundError, 404), Exit.HUB, "no revision v9"),
        (LocalEntryNotFoundError("down\nand out"), Exit.HUB, "hf download org/name --revision v9"),
        (TimeoutError("slow"), Exit.HUB, "slow"),
        (RuntimeError("a client's own error"), Exit.HUB, "a client's own error"),
        (OSError(errno.ENOSPC, "full"), Exit.RESOURCES, "HF_HOME"),
    ],
    ids=lambda part: str(part)[:30],
)
def test_the_hubs_errors_become_one_sentence_and_a_way_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception, exit_code: Exit, said: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", Mock())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
    found = refused("org/name", exit_code, revision="v9")
    assert said in f"{found.message} {found.hint}"
    assert found.hint
    assert found.__cause__ is error


def test_the_demo_model_is_found_without_heavy_imports() -> None:
    code = (
        "import sys; from subspec.planner.model import hub; hub.resolve('demo')\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
