"""Rotary embeddings against transformers; the other arithmetic is held by test_lossless.py."""

from dataclasses import replace

import pytest
import torch
from toys import make_spec

from subspec.artifacts.model import Rope
from subspec.runtime.model.transformer import rope_tables

ROPES = {
    "default": Rope(10_000.0),
    "linear": Rope(10_000.0, "linear", factor=4.0),
    "llama3": Rope(500_000.0, "llama3", factor=8.0, original_max_positions=8192),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_tables_equal_transformers(kind: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = ROPES[kind]
    parameters = {
        "rope_type": kind,
        "rope_theta": rope.theta,
        "factor": rope.factor,
        "low_freq_factor": rope.low_frequency_factor,
        "high_freq_factor": rope.high_frequency_factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }
    wanted = {
        "default": ("rope_type", "rope_theta"),
        "linear": ("rope_type", "rope_theta", "factor"),
        "llama3": tuple(parameters),
    }[kind]
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=32_768,
        rope_parameters={name: parameters[name] for name in wanted},
    )
    positions = torch.arange(3000)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float32), positions[None])
    got_cos, got_sin = rope_tables(replace(make_spec(), rope=rope), 3000)
    torch.testing.assert_close(got_cos, cos[0], rtol=0, atol=3e-4)
    torch.testing.assert_close(got_sin, sin[0], rtol=0, atol=3e-4)
