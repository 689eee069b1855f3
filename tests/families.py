"""One small model of every family, and the odd shapes among them, as the hub has their configs.

Sizes are such that 4 bits take every matrix, but where a name says otherwise. Windows and the
original positions of scaled ropes are shorter than PROMPT_TOKENS.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

PROMPT_TOKENS = 40
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
NETS = {
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 48,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.1 * index for index in range(12)],
    "long_factor": [2.0 + index for index in range(12)],
}
MINISTRAL3_ROPE = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def family(model_type: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, **SIZES, **fields}


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2, 7 heads to 1, tied": family(
        "qwen2", hidden_size=448, num_attention_heads=7, num_key_value_heads=1,
        tie_word_embeddings=True,
    ),
    "qwen2, windows on the upper layers": family(
        "qwen2", use_sliding_window=True, sliding_window=24, max_window_layers=1, rope_theta=1e6,
    ),
    "qwen3, head size not hidden / heads": family("qwen3", head_dim=48, attention_bias=True),
    "llama 3 rope, every bias": family(
        "llama", num_key_value_heads=4, attention_bias=True, mlp_bias=True, rope_theta=5000.0,
        rope_scaling=LLAMA3,
    ),
    "llama, yarn rope": family(
        "llama", num_attention_heads=2, num_key_value_heads=1, rope_scaling=YARN,
    ),
    "llama, yarn rope not truncated, tied": family(
        "llama", rope_scaling={**YARN, "truncate": False}, tie_word_embeddings=True,
    ),
    "llama, shapes that 4 bits do not take": family(
        "llama", hidden_size=96, intermediate_size=168, num_attention_heads=3,
        num_key_value_heads=3, vocab_size=2050,
    ),
    "llama, odd vocabulary, tied": family("llama", vocab_size=2041, tie_word_embeddings=True),
    "mistral, sliding window": family("mistral", head_dim=64, sliding_window=20),
    "ministral, windows on some layers": family(
        "ministral", head_dim=32, sliding_window=20, layer_types=[SLIDING, FULL, SLIDING],
    ),
    "ministral3": family("ministral3", head_dim=48, rope_parameters=MINISTRAL3_ROPE),
    "smollm3": family("smollm3", no_rope_layer_interval=2),
    "olmo2": family("olmo2", attention_bias=True),
    "olmo3, yarn on full layers": family(
        "olmo3", sliding_window=16, num_hidden_layers=4, rope_theta=5e5,
        rope_scaling={**YARN, "attention_factor": 1.2, "beta_fast": 32.0, "beta_slow": 1.0},
    ),
    "phi3, window": family("phi3", sliding_window=20),
    "phi3, longrope, tied": family(
        "phi3", original_max_position_embeddings=128, partial_rotary_factor=0.75,
        rope_scaling=LONGROPE, tie_word_embeddings=True,
    ),
    "glm4": family("glm4", head_dim=32),
    "granite": family(
        "granite", embedding_multiplier=12.0, logits_scaling=4.0, residual_multiplier=0.3,
        attention_multiplier=0.125, tie_word_embeddings=True,
    ),
    "seed_oss": family("seed_oss", head_dim=48, attention_out_bias=True),
    "qwen3_5_text": family("qwen3_5_text", num_hidden_layers=4, **NETS),
    "qwen3_5_text, odd heads, attention first, tied": family(
        "qwen3_5_text", num_hidden_layers=3, hidden_size=192, num_attention_heads=3,
        num_key_value_heads=1, head_dim=24, partial_rotary_factor=0.5, attention_bias=True,
        linear_num_key_heads=1, linear_num_value_heads=3, linear_key_head_dim=24,
        linear_value_head_dim=40, linear_conv_kernel_dim=3, tie_word_embeddings=True,
        layer_types=[FULL, LINEAR, LINEAR],
    ),
    "qwen3_5_text, as many key heads, every other layer": family(
        "qwen3_5_text", num_hidden_layers=5, full_attention_interval=2,
        **{**NETS, "linear_num_key_heads": 4, "linear_key_head_dim": 16},
    ),
    "gemma3_text, as the hub has it": family(
        "gemma3_text", head_dim=48, num_hidden_layers=6, sliding_window=20,
        sliding_window_pattern=3, query_pre_attn_scalar=56, rope_local_base_freq=5000.0,
        rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 8.0},
        attn_logit_softcapping=20.0,
    ),
    "gemma3_text, capped, 7 heads to 1, untied": family(
        "gemma3_text", hidden_size=448, num_attention_heads=7, num_key_value_heads=1, head_dim=32,
        sliding_window=24, layer_types=[SLIDING, FULL, SLIDING], final_logit_softcapping=3.0,
        attention_bias=True, tie_word_embeddings=False,
    ),
    "gemma4_text, keys are values in layers of other heads": family(
        "gemma4_text", num_hidden_layers=4, head_dim=32, global_head_dim=80, sliding_window=20,
        num_global_key_value_heads=1, attention_k_eq_v=True, hidden_size_per_layer_input=0,
        layer_types=[SLIDING, FULL, SLIDING, FULL], final_logit_softcapping=3.0,
        tie_word_embeddings=False,
    ),
    "gemma4_text, experts off, six layers": family(
        "gemma4_text", num_hidden_layers=6, head_dim=16, global_head_dim=32, sliding_window=24,
        hidden_size_per_layer_input=0, enable_moe_block=False, attention_bias=True,
        tie_word_embeddings=False,
    ),
    "gemma4_unified_text": family(
        "gemma4_unified_text", num_attention_heads=3, num_key_value_heads=3, head_dim=32,
        global_head_dim=64, num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=20,
        layer_types=[SLIDING, SLIDING, FULL], use_bidirectional_attention="vision",
        rope_parameters={
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.3, "rope_theta": 1e5},
        },
    ),
}  # fmt: skip


def config_of(case: str, **changes: Any) -> Any:
    """transformers' config of one of FAMILIES. transformers writes into the objects that it is
    given: without a copy, one test would change what another one reads."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**deepcopy({**FAMILIES[case], **changes}))


def save_random_model(folder: Path, config: Any, seed: int = 0) -> Any:
    """A transformers config -> its model with random f32 weights, also saved in the folder.

    Biases and norms are random too: zeros and ones would hide mistakes.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.normal_(1.0, 0.2)
    model.save_pretrained(folder)
    return model.eval()
