"""Every family's spec and weights give transformers' logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, PROMPT_TOKENS, save_random_model
from plain_decoder import Weights, logits_of
from transformers import AutoConfig, AutoModelForImageTextToText

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
    config = AutoConfig.for_model(**FAMILIES[case])
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
}  # fmt: skip
TEXT_PART = {
    "gemma3": "gemma3_text, as the hub has it",
    "gemma4": "gemma4_text, keys are values in layers of other heads",
    "gemma4_unified": "gemma4_unified_text",
}


@pytest.mark.parametrize("whole", SIGHT)
def test_the_text_part_of_a_model_that_sees_gives_its_logits(whole: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    text = FAMILIES[TEXT_PART[whole]]
    config = AutoConfig.for_model(whole, text_config=text, vision_config=SIGHT[whole])
    torch.manual_seed(0)
    auto: Any = AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path, SOURCE)
    assert "vision" in checkpoint.notes[0] and len(checkpoint.notes) == 1
    prompt = torch.randint(3, 2040, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(input_ids=prompt[None]).logits[0]
        ours = logits_of(checkpoint.spec, weights_of(checkpoint), prompt)
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()


def test_every_family_has_a_case() -> None:
    assert {case["model_type"] for case in FAMILIES.values()} == set(SUPPORTED)
