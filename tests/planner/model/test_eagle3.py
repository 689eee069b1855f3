"""A published head of EAGLE-3 beside its model: what is read, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_artifact
from heads import EAGLE3_READS, EAGLE3_TOKENS, eagle3_checkpoints
from safetensors.torch import load_file, save_file
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.checks import HEAD_FILE
from subspec.artifacts.format.store import verify
from subspec.artifacts.model import Eagle3, Source
from subspec.planner.model.checkpoint import read_checkpoint
from subspec.planner.model.draft_head import with_draft_head
from subspec.planner.model.eagle3 import layers_read
from subspec.planner.model.fields import Fields

READS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module", params=["as published", "of speculators"])
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    speculators = request.param == "of speculators"
    folder = tmp_path_factory.mktemp("eagle3")
    return eagle3_checkpoints(folder, torch.bfloat16, speculators=speculators)


def test_the_artifact_has_the_head_in_the_dtype_of_the_model(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    model, head = folders
    given = load_file(head / "model.safetensors")
    is_speculators = "embed_tokens.weight" in given
    artifact = build_artifact(model, tmp_path / "artifact", draft_head=head)
    spec = artifact.spec
    assert spec.draft_head is not None and spec.draft_head.layout == "eagle3"
    assert spec.eagle3 == Eagle3(EAGLE3_READS, EAGLE3_TOKENS, is_speculators)
    assert spec.draft_head.layer.attentions[0].num_kv_heads == 4 != spec.attentions[0].num_kv_heads
    found = load_file(artifact.path / HEAD_FILE)
    assert found.keys() == spec.draft_head_shapes.keys()
    offsets = given.pop("d2t")
    assert torch.equal(found.pop("token_ids"), offsets + torch.arange(EAGLE3_TOKENS))
    for name, tensor in found.items():
        stored = name if is_speculators else name.replace("layers.0.", "midlayer.")
        assert torch.equal(tensor, given[stored].bfloat16())
    assert verify(artifact.path)


def test_the_layers_that_it_reads_are_told_in_two_ways_or_by_their_number() -> None:
    nothing = Fields("config.json", {})
    before, after = Fields("config.json", {READS: [2, 18, 33]}), Fields("e", {READS: [1, 17, 32]})
    assert layers_read(nothing, nothing, 36) == (2, 18, 33)
    assert layers_read(before, nothing, 36) == layers_read(nothing, after, 36) == (2, 18, 33)
    assert layers_read(before, Fields("e", {READS: [4, 5, 6]}), 36) == (2, 18, 33)
    assert layers_read(nothing, Fields("e", {READS: [-1, 35]}), 36) == (0, 36)


BAD_IDS = torch.arange(EAGLE3_TOKENS)


@pytest.mark.parametrize(
    "changed, exit_code, said",
    [
        ({"hidden_size": 256}, Exit.USAGE, "a hidden size of 256.* and has 128"),
        ({"vocab_size": 2047}, Exit.USAGE, "a vocabulary of 2047.* and has 2048"),
        ({"num_hidden_layers": 2}, Exit.UNSUPPORTED, "has 2 layers"),
        ({"model_type": "deepseek_v3"}, Exit.UNSUPPORTED, "of type 'deepseek_v3', expected"),
        ({"intermediate_size": 64}, Exit.CORRUPT, r"mlp.* has the shape \[192, 128\], expected"),
        (
            {"num_key_value_heads": 2},
            Exit.CORRUPT,
            r"has the shape \[128, 256\], expected \[64, 256",
        ),
        ({"draft_vocab_size": 8}, Exit.CORRUPT, r"lm_head.* has the shape \[1500, 128\]"),
        ({"draft_vocab_size": 2049}, Exit.CORRUPT, "draft_vocab_size is 2049, expected"),
        ({"draft_vocab_size": None}, Exit.CORRUPT, r"\[1500, 128\], expected \[2048, 128\]"),
        ({"draft_vocab_size": "many"}, Exit.CORRUPT, "draft_vocab_size is 'many'"),
        ({"norm_before_fc": True}, Exit.UNSUPPORTED, "norm_before_fc is True, we compute only"),
        ({"norm_before_residual": "no"}, Exit.CORRUPT, "norm_before_residual is 'no'"),
        ({"eagle_config": [1]}, Exit.CORRUPT, "eagle_config is .*, expected an object"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, Exit.UNSUPPORTED, "is False"),
        ({"eagle_config": None}, Exit.CORRUPT, "of 3 layers none are read by default"),
        ({READS: [1, 2]}, Exit.CORRUPT, r"fc.* has the shape \[128, 384\], expected \[128, 256\]"),
        ({READS: [1, 2, 4]}, Exit.CORRUPT, "different layers, 0 to 3"),
        ({READS: [1, 2, 2]}, Exit.CORRUPT, "different layers"),
        ({READS: [1, 2, -1]}, Exit.CORRUPT, "different layers"),
        ({READS: [1, 2, True]}, Exit.CORRUPT, "different layers"),
        ({READS: [1, 2, 1 << 80]}, Exit.CORRUPT, "different layers"),
        ({READS: "all"}, Exit.CORRUPT, "expected a list"),
        ({"transformer_layer_config": 3}, Exit.CORRUPT, "transformer_layer_config is 3"),
        ({"tensors": {"fc.weight": None}}, Exit.CORRUPT, "no fc.weight"),
        ({"tensors": {"midlayer.hidden_norm.weight": None}}, Exit.CORRUPT, "hidden_norm.weight"),
        ({"tensors": {"lm_head.weight": None}}, Exit.CORRUPT, "no lm_head.weight"),
        ({"tensors": {"d2t": None}}, Exit.CORRUPT, "no token_ids"),
        ({"tensors": {"d2t": BAD_IDS}}, Exit.CORRUPT, "d2t does not lead to different tokens"),
        ({"tensors": {"d2t": -BAD_IDS}}, Exit.CORRUPT, "d2t does not lead to different tokens"),
        ({"tensors": {"d2t": -1 - 0 * BAD_IDS}}, Exit.CORRUPT, "d2t does not lead to different"),
        ({"tensors": {"d2t": BAD_IDS[:9]}}, Exit.CORRUPT, r"d2t has the shape \[9\]"),
        ({"tensors": {"d2t": BAD_IDS * 0.0}}, Exit.UNSUPPORTED, "d2t"),
        ({"tensors": {"embed_tokens.weight": torch.ones(2048, 128)}}, Exit.UNSUPPORTED, "not the"),
        ({"tensors": {"embed_tokens.weight": torch.ones(9, 128)}}, Exit.CORRUPT, "has the shape"),
    ],
)
def test_a_head_of_another_model_or_form_is_refused_with_a_sentence(
    tmp_path: Path, changed: dict[str, Any], exit_code: Exit, said: str
) -> None:
    model, head = eagle3_checkpoints(tmp_path, torch.bfloat16)
    replaced: dict[str, Tensor | None] = changed.get("tensors", {})
    fields = {name: value for name, value in changed.items() if name != "tensors"}
    config = json.loads((head / "config.json").read_text())
    tensors = {**load_file(head / "model.safetensors"), **replaced}
    (head / "config.json").write_text(json.dumps({**config, **fields}))
    save_file({n: t for n, t in tensors.items() if t is not None}, head / "model.safetensors")
    with pytest.raises(SubspecError, match=said) as raised:
        with_draft_head(read_checkpoint(model, Source("org/toy")), head)
    assert raised.value.exit_code == exit_code


def test_a_copy_of_the_embedding_may_be_rounded_otherwise(tmp_path: Path) -> None:
    model, head = eagle3_checkpoints(tmp_path, torch.bfloat16, speculators=True)
    tensors = load_file(head / "model.safetensors")
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"].half()
    save_file(tensors, head / "model.safetensors")
    found = with_draft_head(read_checkpoint(model, Source("org/toy")), head)
    assert found.spec.eagle3 is not None
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"].roll(1, dims=0)
    save_file(tensors, head / "model.safetensors")
    with pytest.raises(SubspecError, match="not the embedding of its model"):
        with_draft_head(read_checkpoint(model, Source("org/toy")), head)


def test_a_head_with_logits_of_every_token_has_no_list_of_them(tmp_path: Path) -> None:
    model, head = eagle3_checkpoints(tmp_path / "models", torch.bfloat16)
    copy = shutil.copytree(head, tmp_path / "head")
    tensors, config = (
        load_file(copy / "model.safetensors"),
        json.loads((copy / "config.json").read_text()),
    )
    del tensors["d2t"], tensors["t2d"], config["draft_vocab_size"]
    tensors["lm_head.weight"] = torch.ones(2048, 128)
    (copy / "config.json").write_text(json.dumps(config))
    save_file(tensors, copy / "model.safetensors")
    spec = with_draft_head(read_checkpoint(model, Source("org/toy")), copy).spec
    assert spec.eagle3 is not None and spec.eagle3.vocab_size == 2048
    assert "token_ids" not in spec.draft_head_shapes
