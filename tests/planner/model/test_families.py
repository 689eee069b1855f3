"""Every family's spec and weights give transformers' logits."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, PROMPT_TOKENS, config_of, save_random_model
from plain_decoder import Weights, logits_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.model import Source
from subspec.planner.model.checkpoint import Checkpoint, read_checkpoint
from subspec.planner.model.config import read_config
from subspec.planner.model.families import FAMILIES as SUPPORTED
from subspec.planner.model.stored import read_pieces

SOURCE = Source("org/tiny", "0" * 40, "mit")


def weights_of(checkpoint: Checkpoint) -> Weights:
    return lambda name: torch.cat(list(read_pieces(checkpoint.rows[name])))


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = config_of(case)
    model = save_random_model(tmp_path, config)
    checkpoint = read_checkpoint(tmp_path, SOURCE)
    prompt = torch.randint(3, 2040, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        theirs = model(prompt[None]).logits[0]
        ours = logits_of(checkpoint.spec, weights_of(checkpoint), prompt)
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()

    # The config as the hub has it means the same as that which transformers has written.
    raw = FAMILIES[case]
    raw = {**raw, "architectures": [SUPPORTED[raw["model_type"]].architecture]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "generation_config.json").unlink()
    assert read_config(tmp_path, SOURCE) == checkpoint.spec


SIGHT: dict[str, dict[str, Any]] = {
    "gemma3": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
               "num_attention_heads": 2, "image_size": 28, "patch_size": 7},
    "gemma4": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
               "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
    "gemma4_unified": {"patch_size": 2, "mm_embed_dim": 128, "mm_posemb_size": 8,
                       "output_proj_dims": 128},
    "qwen3_5": {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2,
                "out_hidden_size": 128, "num_position_embeddings": 16},
    "mistral3": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 7},
}  # fmt: skip
TEXT_PARTS = [
    ("gemma3", "gemma3_text, as the hub has it"),
    ("gemma4", "gemma4_text, keys are values in layers of other heads"),
    ("gemma4_unified", "gemma4_unified_text"),
    ("qwen3_5", "qwen3_5_text"),
    ("mistral3", "mistral, sliding window"),
    ("mistral3", "ministral3"),
]


@pytest.mark.parametrize(("whole", "part"), TEXT_PARTS)
def test_the_text_part_of_a_model_that_sees_gives_its_logits(
    whole: str, part: str, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    text = deepcopy(FAMILIES[part])
    config = AutoConfig.for_model(whole, text_config=text, vision_config=SIGHT[whole])
    torch.manual_seed(0)
    auto: Any = AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path, SOURCE)
    assert any(tower in checkpoint.notes[0] for tower in ("vision", "visual"))
    assert len(checkpoint.notes) == 1
    prompt = torch.randint(3, 2040, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(input_ids=prompt[None]).logits[0]
        ours = logits_of(checkpoint.spec, weights_of(checkpoint), prompt)
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()


def test_small_f32_tensors_of_a_bf16_hybrid_are_kept_and_its_draft_head_set_aside(
    tmp_path: Path,
) -> None:
    """As Qwen3.5 has A_log and the norm of its delta nets, and Qwen3.6 has not."""
    save_random_model(tmp_path, config_of("qwen3_5_text"))
    weights = tmp_path / "model.safetensors"
    tensors = {
        name: tensor if name.endswith(("A_log", "linear_attn.norm.weight")) else tensor.bfloat16()
        for name, tensor in load_file(weights).items()
    }
    tensors["mtp.fc.weight"] = torch.zeros(128, 256)
    save_file(tensors, weights)
    checkpoint = read_checkpoint(tmp_path, SOURCE)
    spec = checkpoint.spec
    assert spec.dtype == "bfloat16" and [len(one.delta_nets) for one in spec.layers] == [1, 1, 1, 0]
    for net in spec.delta_nets:
        assert set(net.f32_tensors) == {"A_log", "norm.weight"}
    assert spec.resident_dtype("model.layers.0.linear_attn.A_log") == "float32"
    assert spec.resident_dtype("model.layers.0.linear_attn.dt_bias") == "bfloat16"
    assert spec.resident_bytes["model.layers.0.linear_attn.norm.weight"] == 48 * 4
    [note] = checkpoint.notes
    assert "1 tensors of mtp" in note

    name = next(name for name in tensors if name.endswith("0.linear_attn.dt_bias"))
    save_file({**tensors, name: tensors[name].half()}, weights)
    with pytest.raises(SubspecError, match="dt_bias is F16, expected BF16"):
        read_checkpoint(tmp_path, SOURCE)


def test_every_family_has_a_case() -> None:
    assert {case["model_type"] for case in FAMILIES.values()} == set(SUPPORTED)
