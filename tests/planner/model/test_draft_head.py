"""A published draft head beside its model: what is read, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_artifact
from heads import eagle_checkpoints
from safetensors.torch import load_file, save_file

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.checks import HEAD_FILE
from subspec.artifacts.model import Source
from subspec.planner.model.checkpoint import read_checkpoint
from subspec.planner.model.draft_head import with_draft_head


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return eagle_checkpoints(tmp_path_factory.mktemp("eagle"), torch.bfloat16)


def test_the_artifact_has_the_head_in_the_dtype_of_the_model(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    model, head = folders
    artifact = build_artifact(model, tmp_path / "artifact", draft_head=head)
    found, given = load_file(artifact.path / HEAD_FILE), load_file(head / "model.safetensors")
    assert artifact.spec.draft_head is not None and artifact.spec.draft_head.fusion_bias
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], one.bfloat16()) for name, one in given.items())


@pytest.mark.parametrize(
    "changed, exit_code, said",
    [
        ({"hidden_size": 256}, Exit.USAGE, "a hidden size of 256.* and has 128"),
        ({"vocab_size": 2047}, Exit.USAGE, "a vocabulary of 2047.* and has 2048"),
        ({"num_hidden_layers": 2}, Exit.UNSUPPORTED, "has 2 layers"),
        ({"intermediate_size": 64}, Exit.CORRUPT, r"mlp.* has the shape \[192, 128\], expected"),
        ({"tensors": {"fc.weight": None}}, Exit.CORRUPT, "no fc.weight"),
        ({"tensors": {"d2t": torch.zeros(8)}}, Exit.CORRUPT, "3 layers none are read by default"),
    ],
)
def test_a_head_of_another_model_is_refused_with_a_sentence(
    folders: tuple[Path, Path], tmp_path: Path, changed: dict[str, Any], exit_code: Exit, said: str
) -> None:
    model, head = folders
    copy = shutil.copytree(head, tmp_path / "head")
    config, tensors = (
        json.loads((copy / "config.json").read_text()),
        load_file(copy / "model.safetensors"),
    )
    replaced = changed.pop("tensors", {})
    tensors = {n: t for n, t in {**tensors, **replaced}.items() if t is not None}
    (copy / "config.json").write_text(json.dumps({**config, **changed}))
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(SubspecError, match=said) as raised:
        with_draft_head(read_checkpoint(model, Source("org/toy")), copy)
    assert raised.value.exit_code == exit_code


def test_a_head_in_a_pickle_is_refused_with_what_converts_it(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    model, head = folders
    copy = shutil.copytree(head, tmp_path / "head")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(SubspecError, match="pytorch_model.bin, we read only") as raised:
        with_draft_head(read_checkpoint(model, Source("org/toy")), copy)
    assert raised.value.hint is not None and "weights_only=True" in raised.value.hint
