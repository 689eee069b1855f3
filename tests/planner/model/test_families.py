"""Every family's spec and weights give transformers' logits."""

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, PROMPT_TOKENS, save_random_model
from plain_decoder import logits_of
from transformers import AutoConfig

from subspec.artifacts.model import Source
from subspec.planner.model.checkpoint import read_checkpoint
from subspec.planner.model.config import read_config
from subspec.planner.model.families import FAMILIES as SUPPORTED
from subspec.planner.model.stored import read_pieces

SOURCE = Source("org/tiny", "0" * 40, "mit")


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = AutoConfig.for_model(**FAMILIES[case])
    model = save_random_model(tmp_path, config)
    checkpoint = read_checkpoint(tmp_path, SOURCE)
    prompt = torch.randint(3, 2040, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1))

    def weights(name: str) -> torch.Tensor:
        return torch.cat(list(read_pieces(checkpoint.rows[name])))

    with torch.no_grad():
        theirs = model(prompt[None]).logits[0]
        ours = logits_of(checkpoint.spec, weights, prompt)
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()

    # The config as the hub has it means the same as that which transformers has written.
    raw = FAMILIES[case]
    raw = {**raw, "architectures": [SUPPORTED[raw["model_type"]].architecture]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "generation_config.json").unlink()
    assert read_config(tmp_path, SOURCE) == checkpoint.spec


def test_every_family_has_a_case() -> None:
    assert {case["model_type"] for case in FAMILIES.values()} == set(SUPPORTED)
