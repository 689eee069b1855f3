"""What each field means is compared with transformers' model; the logits: test_families.py."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import FULL, LLAMA3, SLIDING, YARN

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import (
    Attention,
    DeltaNet,
    Dense,
    ModelSpec,
    NormStyle,
    QueryGrowth,
    Rope,
    ScaleBlock,
    Source,
)
from subspec.planner.model.config import config_notes, read_config
from subspec.planner.model.families import FAMILIES, WHOLES

SOURCE = Source("org/tiny", "0" * 40, "mit")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 80,
}


# What a family's class takes for itself and we do not compute.
NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "qwen3_5_text": {"full_attention_interval": 3},  # of three layers one attends
}
GEMMA_NORM = NormStyle(1e-6, rounds_late=True)


def config(family: str = "llama", **fields: Any) -> dict[str, Any]:
    architectures = [FAMILIES[family].architecture]
    needed = NEEDED.get(family, {})
    return {"architectures": architectures, "model_type": family, **SIZES, **needed, **fields}


def inside(family: str, whole: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The config of the multimodal model around a family."""
    [(name, one)] = [(name, one) for name, one in WHOLES.items() if family in one.families]
    text = config(family, **fields)
    del text["architectures"]
    own = {"architectures": [one.architecture], "model_type": name, "text_config": text}
    return {**own, **whole}


def write(folder: Path, values: object, generation: object = None) -> Path:
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def read(folder: Path, values: object, generation: object = None) -> ModelSpec:
    return read_config(write(folder, values, generation), SOURCE)


@pytest.fixture(scope="module")
def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own deprecated corners, at import
        import transformers
        import transformers.modeling_rope_utils
        from transformers import AutoConfig, AutoModelForCausalLM  # noqa: F401  (both are lazy)

        return transformers


def by_transformers(transformers: Any, folder: Path) -> dict[str, Any]:
    """What transformers computes with, under our names."""
    theirs = transformers.AutoConfig.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    layer = model.model.layers[0]
    attention, norm = layer.self_attn, layer.input_layernorm
    windows = [other.self_attn for other in model.model.layers]
    if theirs.model_type == "mistral":
        windows = [theirs.sliding_window for _ in windows]
    else:
        windows = [getattr(attention, "sliding_window", None) for attention in windows]
    rope = theirs.rope_parameters
    return {
        "hidden_size": theirs.hidden_size,
        "num_layers": len(model.model.layers),
        "num_heads": attention.q_proj.out_features // attention.head_dim,
        "num_kv_heads": attention.k_proj.out_features // attention.head_dim,
        "head_size": attention.head_dim,
        "norm_epsilon": norm.variance_epsilon,
        "tie_word_embeddings": model.lm_head.weight is model.model.embed_tokens.weight,
        "qkv_bias": attention.q_proj.bias is not None,
        "output_bias": attention.o_proj.bias is not None,
        "mlp_bias": layer.mlp.up_proj.bias is not None,
        "qk_norm": hasattr(attention, "q_norm"),
        "windows": windows,
        "rope": (rope["rope_theta"], rope["rope_type"], rope.get("factor", 1.0)),
        "attention_factor": model.model.rotary_emb.attention_scaling,
        "original": rope.get("original_max_position_embeddings", 0),
    }


def attentions(spec: ModelSpec) -> list[Attention]:
    return [layer.attentions[0] for layer in spec.layers]


def rope_of(spec: ModelSpec) -> Rope:
    """The one of all layers."""
    (rope,) = spec.ropes
    return rope


def windows_of(spec: ModelSpec) -> list[int | None]:
    return [attention.window for attention in attentions(spec)]


def by_us(spec: ModelSpec) -> dict[str, Any]:
    attention, rope = attentions(spec)[0], rope_of(spec)
    dense = spec.layers[0].blocks[1].body
    assert isinstance(dense, Dense)
    return {
        "hidden_size": spec.hidden_size,
        "num_layers": spec.num_layers,
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_size": attention.head_size,
        "norm_epsilon": spec.norm.epsilon,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "qkv_bias": attention.qkv_bias,
        "output_bias": attention.output_bias,
        "mlp_bias": dense.bias,
        "qk_norm": attention.qk_norm == "head",
        "windows": windows_of(spec),
        "rope": (rope.theta, rope.kind, rope.factor),
        "attention_factor": pytest.approx(rope.attention_factor, rel=1e-12),
        "original": rope.original_max_positions,
    }


NEW_AND_OLD = [
    config("qwen2", num_key_value_heads=2, dtype="bfloat16"),
    config("qwen2", num_key_value_heads=None, num_attention_heads=8),
    config("qwen2", num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
    config("qwen2", num_attention_heads=32, use_sliding_window=True, max_window_layers=1),
    config("qwen2", num_key_value_heads=2, use_sliding_window=True, num_hidden_layers=30),
    config("qwen2", num_key_value_heads=2, use_sliding_window=False, sliding_window=16),
    config(
        "qwen2",
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=16,
        layer_types=[FULL, SLIDING, FULL],
        rope_parameters={"rope_theta": 5e5, "rope_type": "default"},
    ),
    config("qwen2", num_key_value_heads=2, use_sliding_window=True, sliding_window=None),
    config("qwen3", num_key_value_heads=2),
    config("qwen3", num_key_value_heads=2, head_dim=16, attention_bias=True, rope_theta=1e6),
    config("qwen3", num_key_value_heads=1, rope_scaling=YARN, max_position_embeddings=64),
    config("llama"),
    config("llama", num_key_value_heads=1, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5),
    config("llama", rope_theta=5e5, rope_scaling=LLAMA3, torch_dtype="bfloat16"),
    config("llama", rope_parameters={**LLAMA3, "rope_theta": 5e5}),
    config("llama", rope_scaling={"type": "linear", "factor": 2}),
    config("llama", rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 0.8}),
    config("llama", rope_scaling={**YARN, "mscale": 0.5}),
    config("llama", rope_scaling={**YARN, "attention_factor": 1.25, "beta_fast": 16}),
    config("llama", rope_scaling={"type": "yarn", "factor": 1}),
    config("llama", head_dim=8, layer_types=[SLIDING] * 3),
    config("mistral", num_attention_heads=8),
    config("mistral", num_key_value_heads=2, head_dim=32, sliding_window=None),
    config("mistral", num_key_value_heads=2, sliding_window=16, rope_theta=10000),
]


@pytest.mark.parametrize("values", NEW_AND_OLD, ids=lambda values: values["model_type"])
def test_a_config_means_what_it_means_to_transformers(
    tmp_path: Path, transformers: Any, values: dict[str, Any]
) -> None:
    ours = read(tmp_path, values)
    assert by_us(ours) == by_transformers(transformers, tmp_path)
    assert ours.source == SOURCE


# What each class takes for itself, where the config says nothing: 2 heads divide all of them.
@pytest.mark.parametrize("family", FAMILIES)
def test_what_save_pretrained_writes_reads_like_the_short_form(
    tmp_path: Path, transformers: Any, family: str
) -> None:
    short = read(tmp_path, config(family, num_key_value_heads=2, dtype="bfloat16"))
    written = transformers.AutoConfig.from_pretrained(tmp_path)
    written.save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    assert read_config(tmp_path, SOURCE) == short
    assert short.max_positions == written.max_position_embeddings
    assert short.vocab_size == written.vocab_size
    assert short.tie_word_embeddings == written.tie_word_embeddings
    assert short.dtype == "bfloat16"


def test_a_mistral_with_layer_types_is_read_as_transformers_does(
    tmp_path: Path, transformers: Any
) -> None:
    values = config(
        "mistral",
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        layer_types=[SLIDING, FULL, SLIDING],
    )
    assert windows_of(read(tmp_path, values)) == [16, None, 16]
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "ministral"


def test_no_field_of_a_config_names_another_file(tmp_path: Path) -> None:
    (tmp_path / "config.5.0.0.json").write_text(json.dumps(config(hidden_size=4096)))
    names = {"configuration_files": ["config.5.0.0.json"], "_name_or_path": "../elsewhere"}
    assert read(tmp_path, config(**names)).hidden_size == 64


def test_smollm3_turns_no_positions_in_some_layers(tmp_path: Path) -> None:
    spec = read(tmp_path, config("smollm3", num_key_value_heads=2, no_rope_layers=[1, 0, 1]))
    assert [attention.rope is None for attention in attentions(spec)] == [False, True, False]


def test_olmo3_has_a_rope_of_its_own_for_full_layers(tmp_path: Path) -> None:
    spec = read(tmp_path, config("olmo3", num_hidden_layers=4, rope_scaling=YARN))
    kinds = [attention.rope.kind for attention in attentions(spec) if attention.rope]
    assert kinds == ["default", "default", "default", "yarn"]
    assert windows_of(spec) == [None] * 4  # 4096 positions: none can leave a window of 4096
    assert len(spec.ropes) == 2


def test_longrope_ends_where_its_other_frequencies_begin(tmp_path: Path) -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [3.0] * 6}
    values = config(
        "phi3",
        partial_rotary_factor=0.75,
        max_position_embeddings=512,
        original_max_position_embeddings=128,
        rope_scaling=scaling,
    )
    for name in ("longrope", "yarn"):  # the class takes its yarn for longrope
        spec = read(tmp_path, {**values, "rope_scaling": {**scaling, "type": name}})
        assert spec.max_positions == 128
        rope = rope_of(spec)
        assert (rope.kind, rope.size, rope.divisors) == ("longrope", 12, (1.0,) * 6)
        assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(128)))


def test_the_queries_of_ministral3_grow(tmp_path: Path) -> None:
    spec = read(tmp_path, config("ministral3", num_key_value_heads=2))
    assert attentions(spec)[0].query_growth == QueryGrowth(0.1, 16384)


def test_the_multipliers_of_granite_are_kept(tmp_path: Path) -> None:
    spec = read(
        tmp_path,
        config(
            "granite",
            attention_multiplier=0.5,
            embedding_multiplier=12,
            logits_scaling=8.0,
            residual_multiplier=0.25,
        ),
    )
    assert (attentions(spec)[0].scale, spec.embedding_scale, spec.logits_divisor) == (0.5, 12, 8)
    assert {block.multiplier for layer in spec.layers for block in layer.blocks} == {0.25}


def test_a_gemma_3_of_the_hub_is_its_text_part_and_leaves_much_to_its_class(
    tmp_path: Path,
) -> None:
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    whole = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "model_type": "gemma3",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    spec = read(tmp_path, whole)
    assert (spec.family, spec.dtype, spec.eos_token_ids) == ("gemma3_text", "bfloat16", (1, 106))
    assert spec.tie_word_embeddings and spec.vocab_size == 262_208
    assert spec.norm == replace(GEMMA_NORM, zero_centered=True)
    assert spec.embedding_scale == 2560**0.5 and spec.rounds_embedding_scale
    assert windows_of(spec) == [None if layer % 6 == 5 else 1024 for layer in range(34)]
    near, far = attentions(spec)[0], attentions(spec)[5]
    assert (near.num_heads, near.num_kv_heads, near.head_size, near.scale) == (8, 4, 256, 1 / 16)
    assert near.rope == Rope(10_000.0, 256)
    assert far.rope == Rope(1_000_000.0, 256, "linear", factor=8.0)
    # The whole's word on a tied head counts, and its class's where it has none.
    text["tie_word_embeddings"] = False
    assert read(tmp_path, whole).tie_word_embeddings
    assert not read(tmp_path, {**whole, "tie_word_embeddings": False}).tie_word_embeddings


def test_a_mistral_that_sees_is_the_family_that_its_text_part_says(tmp_path: Path) -> None:
    """Mistral Small 3.x and Ministral 3; the whole decides whether the head is the embedding."""
    fields: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 32}
    for family in ("mistral", "ministral3"):
        whole = inside(family, {"dtype": "bfloat16"}, **fields, tie_word_embeddings=False)
        spec = read(tmp_path, whole)
        assert (spec.family, spec.tie_word_embeddings, config_notes(tmp_path)) == (family, True, ())
        whole["tie_word_embeddings"] = False
        spec = read(tmp_path, whole)
        assert spec == replace(read(tmp_path, config(family, **fields)), dtype="bfloat16")
    del whole["text_config"]["model_type"]
    whole["text_config"]["layer_types"] = [FULL] * 3  # alone it would be a ministral
    spec = read(tmp_path, whole)
    assert spec.family == "mistral" and windows_of(spec) == [4096] * 3
    with pytest.raises(SubspecError, match="model_type is 'mistral4'.*'mistral' or 'ministral3'"):
        read(tmp_path, {**whole, "text_config": {**whole["text_config"], "model_type": "mistral4"}})


def test_the_fp8_form_of_ministral_3_has_one_scale_for_a_matrix(tmp_path: Path) -> None:
    quantization = {
        "activation_scheme": "static",
        "dequantize": False,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        "quant_method": "fp8",
        "weight_block_size": None,
    }
    whole = {"dtype": "bfloat16", "quantization_config": quantization}
    sizes = {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 128}
    spec = read(tmp_path, inside("ministral3", whole, **sizes))
    assert len(spec.fp8) == 3 * 7 and "lm_head" not in spec.fp8
    gate = "model.layers.0.mlp.gate_proj"
    assert spec.fp8[gate] == ScaleBlock(128, SIZES["hidden_size"])


@pytest.mark.parametrize("whole", WHOLES)
def test_the_class_of_a_whole_says_whether_its_head_is_the_embedding(
    transformers: Any, whole: str
) -> None:
    theirs = transformers.CONFIG_MAPPING[whole]
    assert WHOLES[whole].tied == theirs.tie_word_embeddings
    assert theirs.sub_configs_defaults["text_config"].model_type in (*WHOLES[whole].families, "")


@pytest.mark.parametrize("family", ["gemma4_text", "gemma4_unified_text"])
def test_the_full_layers_of_gemma_4_have_heads_of_their_own(tmp_path: Path, family: str) -> None:
    fields: dict[str, Any] = {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_global_key_value_heads": 1,
        "global_head_dim": 128,
        "attention_k_eq_v": True,
        "final_logit_softcapping": 30.0,
        "layer_types": [SLIDING, FULL, FULL],
    }
    spec = read(tmp_path, inside(family, {"dtype": "bfloat16"}, **fields))
    near, far, _ = attentions(spec)
    assert (near.num_kv_heads, near.head_size, near.values_are_keys) == (2, 32, False)
    assert (far.num_kv_heads, far.head_size, far.values_are_keys) == (1, 128, True)
    assert near.scale == far.scale == 1.0 and near.value_norm and far.value_norm
    assert far.rope == Rope(1_000_000.0, 128, "proportional", turning_pairs=16)
    assert {layer.scalar for layer in spec.layers} == {"layer_scalar"}
    assert (spec.norm, spec.logits_soft_cap) == (GEMMA_NORM, 30.0)
    assert spec == replace(read(tmp_path, config(family, **fields)), dtype="bfloat16")


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("gemma4_text", {"hidden_size_per_layer_input": 256}, "E2B and E4B"),
        ("gemma4_unified_text", {"num_kv_shared_layers": 1}, "E2B and E4B"),
        ("gemma4_text", {"use_double_wide_mlp": True}, "E2B and E4B"),
        ("gemma4_text", {"enable_moe_block": True}, "26B-A4B"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation"),
        ("gemma4_text", {"per_layer_config": {"2": {"sliding_window": 3}}}, "sliding_window"),
        ("gemma3_text", {"per_layer_config": {"2": {"head_dim": 32}}}, "per_layer_config"),
        ("gemma3_text", {"quantization_config": {"quant_method": "qat"}}, "quantization_config"),
    ],
    ids=str,
)
def test_what_we_do_not_compute_of_gemma_is_refused_by_name(
    tmp_path: Path, family: str, change: dict[str, Any], named: str
) -> None:
    for values in (config(family, **change), inside(family, {}, **change)):
        with pytest.raises(SubspecError) as caught:
            read(tmp_path, values)
        assert caught.value.exit_code == Exit.UNSUPPORTED
        assert named in caught.value.message and "config.json" in caught.value.message


def test_a_hybrid_has_delta_nets_in_all_layers_but_some(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "num_hidden_layers": 5,
        "full_attention_interval": 2,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 24,
        "linear_value_head_dim": 40,
        "linear_conv_kernel_dim": 3,
        "num_key_value_heads": 2,
        "attn_output_gate": True,
        "output_gate_type": "swish",
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "rope_parameters": {
            "rope_theta": 1e7, "partial_rotary_factor": 0.25, "rope_type": "default",
            "mrope_section": [11, 11, 10], "mrope_interleaved": True,
        },
    }  # fmt: skip
    spec = read(tmp_path, inside("qwen3_5_text", {"dtype": "bfloat16"}, **fields))
    net = DeltaNet(3, 6, 24, 40, 3)
    assert [layer.delta_nets for layer in spec.layers] == [(net,), (), (net,), (), (net,)]
    [attention] = spec.layers[1].attentions
    assert attention.rope == Rope(1e7, 64) and attention.head_size == 256
    assert attention.output_gate and attention.qk_norm == "head" and not attention.qkv_bias
    assert spec.norm == NormStyle(1e-6, rounds_late=True, zero_centered=True)
    assert spec == replace(read(tmp_path, config("qwen3_5_text", **fields)), dtype="bfloat16")


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"attn_output_gate": False}, Exit.UNSUPPORTED, "attn_output_gate"),
        ({"output_gate_type": "sigmoid"}, Exit.UNSUPPORTED, "output_gate_type"),
        ({"output_gate_type": []}, Exit.UNSUPPORTED, "output_gate_type"),
        ({"mamba_ssm_dtype": "bfloat16"}, Exit.UNSUPPORTED, "mamba_ssm_dtype"),
        ({"layer_types": ["linear_attention"] * 3}, Exit.UNSUPPORTED, "layer_types"),
        ({"layer_types": [FULL, SLIDING, FULL]}, Exit.UNSUPPORTED, "layer_types"),
        ({"layer_types": [FULL, "linear_attention"]}, Exit.CORRUPT, "layer_types"),
        ({"full_attention_interval": 0}, Exit.CORRUPT, "full_attention_interval"),
        ({"full_attention_interval": 1.5}, Exit.CORRUPT, "full_attention_interval"),
        ({"linear_num_key_heads": 5}, Exit.CORRUPT, "linear_num_value_heads"),
        ({"linear_num_key_heads": 0}, Exit.CORRUPT, "linear_num_key_heads"),
        ({"linear_num_value_heads": 2**40}, Exit.CORRUPT, "linear_num_value_heads"),
        ({"linear_key_head_dim": -1}, Exit.CORRUPT, "linear_key_head_dim"),
        ({"linear_value_head_dim": "128"}, Exit.CORRUPT, "linear_value_head_dim"),
        ({"linear_conv_kernel_dim": 1}, Exit.CORRUPT, "linear_conv_kernel_dim"),
        ({"linear_conv_kernel_dim": 1000}, Exit.CORRUPT, "linear_conv_kernel_dim"),
        ({"linear_conv_kernel_dim": True}, Exit.CORRUPT, "linear_conv_kernel_dim"),
        ({"hidden_act": "gelu"}, Exit.UNSUPPORTED, "hidden_act"),
        ({"head_dim": 10, "partial_rotary_factor": 0.5}, Exit.CORRUPT, "partial_rotary_factor"),
    ],
    ids=str,
)
def test_what_a_hybrid_cannot_be_gets_a_sentence(
    tmp_path: Path, change: dict[str, Any], code: Exit, named: str
) -> None:
    for values in (config("qwen3_5_text", **change), inside("qwen3_5_text", {}, **change)):
        with pytest.raises(SubspecError) as caught:
            read(tmp_path, values)
        assert caught.value.exit_code == code
        assert named in caught.value.message and "config.json" in caught.value.message


def test_a_text_part_of_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SubspecError, match="model_type is 'llama'") as caught:
        read(tmp_path, inside("gemma3_text", {}, model_type="llama"))
    assert caught.value.exit_code == Exit.UNSUPPORTED
    for text in (None, [], "gemma3_text"):
        with pytest.raises(SubspecError, match="text_config") as caught:
            read(tmp_path, inside("gemma3_text", {"text_config": text}))
        assert caught.value.exit_code == Exit.CORRUPT


def test_a_dtype_of_auto_is_none_at_all(tmp_path: Path) -> None:
    for name in ("dtype", "torch_dtype"):
        assert read(tmp_path, config(**{name: "auto"})) == read(tmp_path, config())


def test_the_fields_of_llama3_and_yarn_are_kept(tmp_path: Path) -> None:
    assert rope_of(read(tmp_path, config(rope_theta=5e5, rope_scaling=LLAMA3))) == Rope(
        5e5, 16, "llama3", False, 8.0, 64, 1.0, 4.0
    )
    scaling = {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False}
    rope = rope_of(read(tmp_path, config(rope_scaling=scaling)))
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (16.0, 2.0, False)


def test_a_field_of_a_rope_that_transformers_ignores_is_named_and_ignored(tmp_path: Path) -> None:
    """As DeepSeek-R1-0528-Qwen3-8B has attn_factor, which vLLM multiplies in."""
    plain = read(tmp_path, config("llama", rope_scaling=YARN))
    assert config_notes(tmp_path) == ()
    scaling = {**YARN, "attn_factor": 0.8782488562869419}
    assert read(tmp_path, config("llama", rope_scaling=scaling)) == plain
    [note] = config_notes(tmp_path)
    assert "rope_scaling has attn_factor 0.8782488562869419" in note
    # Of some layers, of axes that are one in a text, and nothing at all.
    own = {FULL: {**YARN, "extrapolation_factor": 2.0, "mrope_section": [1, 2], "finetuned": True}}
    own[SLIDING] = {"rope_type": "default", "rope_theta": 1e4, "factor": None, "other": None}
    write(tmp_path, config("olmo3", rope_parameters=own))
    [note] = config_notes(tmp_path)
    assert "rope_parameters.full_attention has extrapolation_factor 2.0: " in note


def test_a_head_that_drafts_with_an_embedding_of_its_own_is_set_aside_with_a_note(
    tmp_path: Path,
) -> None:
    head: dict[str, Any] = {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    for own in (config("qwen3_5_text", **head), inside("qwen3_5_text", {}, **head)):
        assert read(tmp_path, own).draft_head is not None and config_notes(tmp_path) == ()
    head["mtp_use_dedicated_embeddings"] = True
    for own in (config("qwen3_5_text", **head), inside("qwen3_5_text", {}, **head)):
        assert read(tmp_path, own).draft_head is None
        [note] = config_notes(tmp_path)
        assert "mtp_use_dedicated_embeddings is true: the draft head is set aside" in note
    head["mtp_num_hidden_layers"] = 0
    read(tmp_path, config("qwen3_5_text", **head))
    assert config_notes(tmp_path) == ()


def test_yarn_reaches_beyond_the_configs_positions_and_llama3_does_not(tmp_path: Path) -> None:
    positions: dict[str, Any] = {"max_position_embeddings": 64}
    assert read(tmp_path, config(rope_scaling=YARN, **positions)).max_positions == 256
    assert (
        read(tmp_path, config(rope_scaling=YARN, max_position_embeddings=512)).max_positions == 512
    )
    assert read(tmp_path, config(rope_scaling=LLAMA3, **positions)).max_positions == 64


def test_a_window_that_no_position_can_leave_is_no_window(tmp_path: Path) -> None:
    at_limit = config("mistral", num_key_value_heads=2, max_position_embeddings=32)
    assert windows_of(read(tmp_path, {**at_limit, "sliding_window": 32})) == [None] * 3
    assert windows_of(read(tmp_path, {**at_limit, "sliding_window": 31})) == [31] * 3


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        ({"eos_token_id": 5}, None, (5,)),
        ({"eos_token_id": [5, 6]}, None, (5, 6)),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 5, 7]}, (7, 5)),
        ({"eos_token_id": 5}, {"eos_token_id": None}, (5,)),
        ({"eos_token_id": 5}, {}, (5,)),
        ({"eos_token_id": None}, None, ()),
        ({"eos_token_id": None}, {"eos_token_id": 0}, (0,)),
        ({}, None, (2,)),  # what transformers' LlamaConfig takes
    ],
)
def test_end_tokens_are_those_of_the_generation_config_if_it_has_any(
    tmp_path: Path, in_config: dict[str, Any], in_generation: object, expected: tuple[int, ...]
) -> None:
    assert read(tmp_path, config(**in_config), in_generation).eos_token_ids == expected


@pytest.mark.parametrize(
    ("family", "expected"),
    [("mistral", (2,)), ("qwen3", ()), ("glm4", (151329, 151336, 151338)), ("phi3", (32000,))],
)
def test_a_config_without_end_tokens_has_those_of_its_class(
    tmp_path: Path, family: str, expected: tuple[int, ...]
) -> None:
    assert read(tmp_path, config(family, num_key_value_heads=2)).eos_token_ids == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"architectures": None}, "no architecture"),
        ({"architectures": [""], "model_type": "mamba"}, "mamba"),
        ({"model_type": "qwen2_moe"}, "qwen2_moe"),
        ({"model_type": None}, "''"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"per_layer_config": {"0": {"mlp_bias": True}}}, "per_layer_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"is_causal": False}, "is_causal"),
        ({"model_type": "gemma3", "text_config": {}}, "gemma3"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
    ids=str,
)
def test_what_we_do_not_compute_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(SubspecError) as caught:
        read(tmp_path, config(**change))
    assert caught.value.exit_code == Exit.UNSUPPORTED
    assert "config.json" in caught.value.message
    assert named in caught.value.message


def test_unknown_layer_types_are_refused_where_they_have_a_meaning(tmp_path: Path) -> None:
    with pytest.raises(SubspecError, match="chunked_attention") as caught:
        read(
            tmp_path, config("qwen3", num_key_value_heads=2, layer_types=["chunked_attention"] * 3)
        )
    assert caught.value.exit_code == Exit.UNSUPPORTED


def test_an_unknown_architecture_is_told_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SubspecError) as caught:
        read(tmp_path, config(architectures=["MambaForCausalLM"], model_type="mamba"))
    plain, whole = caught.value.message.split("ForConditionalGeneration of ")
    assert "MambaForCausalLM of type 'mamba', expected ForCausalLM of Llama, Qwen2" in plain
    for known, ending, said in (
        (FAMILIES, "ForCausalLM", plain),
        (WHOLES, "ForConditionalGeneration", f" {whole},"),
    ):
        for one in known.values():
            assert one.architecture.endswith(ending)
            assert f" {one.architecture.removesuffix(ending)}," in said


def test_a_models_own_code_is_never_run_but_harmless_beside_a_known_class(tmp_path: Path) -> None:
    own_code: dict[str, Any] = {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('this ran')")
    assert read(tmp_path, config(**own_code)).family == "llama"
    with pytest.raises(SubspecError, match="auto_map") as caught:
        read(tmp_path, config(architectures=["EvilForCausalLM"], **own_code))
    assert caught.value.exit_code == Exit.UNSUPPORTED


HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_size": 0}, "hidden_size"),
    ("llama", {"hidden_size": -64}, "hidden_size"),
    ("llama", {"hidden_size": 1 << 40}, "hidden_size"),
    ("llama", {"hidden_size": 64.0}, "hidden_size"),
    ("llama", {"hidden_size": "64"}, "hidden_size"),
    ("llama", {"hidden_size": True}, "hidden_size"),
    ("llama", {"hidden_size": None}, "hidden_size"),
    ("llama", {"intermediate_size": 0}, "intermediate_size"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads"),
    ("llama", {"num_attention_heads": 128}, "number of attention heads"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads"),
    ("qwen2", {}, "num_key_value_heads"),  # 32 where left out, which does not divide 4 heads
    ("llama", {"head_dim": 7}, "head_dim"),
    ("llama", {"head_dim": 0}, "head_dim"),
    ("llama", {"vocab_size": 10**12}, "vocab_size"),
    ("llama", {"max_position_embeddings": 10**15}, "max_position_embeddings"),
    ("llama", {"max_position_embeddings": 0}, "max_position_embeddings"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ("llama", {"rope_theta": 0}, "rope_theta"),
    ("llama", {"rope_theta": -1e4}, "rope_theta"),
    ("llama", {"rope_theta": float("nan")}, "NaN"),
    ("llama", {"rope_theta": float("inf")}, "Infinity"),
    ("llama", {"rope_theta": 10**4000}, "rope_theta"),
    ("llama", {"rope_parameters": {"rope_theta": 0.0}}, "rope_theta"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling"),
    ("llama", {"rope_scaling": {"type": 3}}, "type"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
    ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
    ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor"),
    ("llama", {"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "original_max"),
    ("llama", {"rope_scaling": {**YARN, "attention_factor": 0.0}}, "attention_factor"),
    ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    ("llama", {"attention_bias": 1}, "attention_bias"),
    ("llama", {"architectures": "LlamaForCausalLM"}, "architectures"),
    ("llama", {"eos_token_id": -1}, "eos_token_id"),
    ("llama", {"eos_token_id": "</s>"}, "eos_token_id"),
    ("llama", {"eos_token_id": [1] * 100_000}, "eos_token_id"),
    ("mistral", {"sliding_window": 0, "num_key_value_heads": 2}, "sliding_window"),
    ("llama", {"rope_parameters": {FULL: {"rope_theta": 1e4}}}, "rope_parameters"),
    ("llama", {"rope_scaling": {**YARN, "truncate": 1}}, "truncate"),
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "short_factor"),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}, "sh"),
    ("phi3", {"original_max_position_embeddings": 0}, "original_max"),
    ("glm4", {"partial_rotary_factor": 0.01, "num_key_value_heads": 2}, "partial_rotary_factor"),
    ("granite", {"logits_scaling": 0.0}, "logits_scaling"),
    ("granite", {"attention_multiplier": None}, "attention_multiplier"),
    ("ministral3", {"num_key_value_heads": 2, "rope_parameters": YARN}, "llama_4_scaling_beta"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("smollm3", {"no_rope_layers": [2, 2, 2]}, "no_rope_layers"),
    ("qwen3", {"layer_types": [FULL], "num_key_value_heads": 2}, "layer_types"),
    ("qwen3", {"layer_types": [SLIDING] * 3, "num_key_value_heads": 2}, "layer_types"),
    ("qwen3", {"layer_types": "full_attention", "num_key_value_heads": 2}, "layer_types"),
    ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    ("gemma3_text", {"query_pre_attn_scalar": 0.5}, "query_pre_attn_scalar"),
    ("gemma3_text", {"rope_local_base_freq": 0.0}, "rope_local_base_freq"),
    ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
    ("gemma3_text", {"sliding_window": 0}, "sliding_window"),
    ("gemma3_text", {"final_logit_softcapping": 0.0}, "final_logit_softcapping"),
    ("gemma3_text", {"final_logit_softcapping": -30.0}, "final_logit_softcapping"),
    ("gemma3_text", {"use_bidirectional_attention": 7}, "use_bidirectional_attention"),
    ("gemma3_text", {"hidden_activation": 3}, "hidden_activation"),
    ("gemma4_text", {"global_head_dim": 0}, "global_head_dim"),
    ("gemma4_text", {"global_head_dim": 31}, "head_dim"),
    ("gemma4_text", {"global_head_dim": 1 << 40}, "global_head_dim"),
    ("gemma4_text", {"attention_k_eq_v": "yes"}, "attention_k_eq_v"),
    (
        "gemma4_text",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 3},
        "num_key_value_heads",
    ),
    ("gemma4_text", {"num_global_key_value_heads": -1}, "num_global_key_value_heads"),
    ("gemma4_text", {"per_layer_config": [1]}, "per_layer_config"),
    ("gemma4_text", {"per_layer_config": {"2": 64}}, "per_layer_config"),
    ("gemma4_text", {"per_layer_config": {"-1": {"head_dim": 64}}}, "per_layer_config"),
    ("gemma4_text", {"per_layer_config": {"7": {"head_dim": 64}}}, "per_layer_config"),
    ("gemma4_text", {"per_layer_config": {"2": {"head_dim": "64"}}}, "head_dim"),
    ("gemma4_text", {"per_layer_config": {"1": {"head_dim": 64}}}, "per_layer_config"),
    (
        "gemma4_text",
        {"rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 1e4}}},
        "rope_parameters",
    ),
]


@pytest.mark.parametrize(("family", "change", "named"), HOSTILE, ids=lambda part: str(part)[:60])
def test_a_number_that_makes_no_sense_is_refused_by_name(
    tmp_path: Path, family: str, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(SubspecError) as caught:
        read(tmp_path, config(family, **change))
    assert caught.value.exit_code == Exit.CORRUPT
    assert caught.value.message.startswith("config.json")
    assert named in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"hidden_size": 1, "hidden_size": 2}'])
def test_what_is_not_one_json_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SubspecError, match=r"config\.json") as caught:
        read(tmp_path, text)
    assert caught.value.exit_code == Exit.CORRUPT


def test_a_missing_and_a_huge_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SubspecError, match=r"config\.json is missing"):
        read_config(tmp_path, SOURCE)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(SubspecError, match="expected at most"):
        read_config(tmp_path, SOURCE)
