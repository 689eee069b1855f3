"""Decoders by model_type, where they differ from Llama's, after transformers'
models/*/modeling_*.py. A family is one function here and one case in tests/families.py."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import DeltaNet, QueryGrowth
from subspec.planner.model.fields import MAX_LAYERS, MAX_POSITIONS, MAX_WIDTH, Fields
from subspec.planner.model.rope import BOUNDS, ORIGINAL, rope_values

FULL = "full_attention"
LINEAR = "linear_attention"
MAX_TAPS = 64
MTP_LAYERS, MAX_MTP_LAYERS = "mtp_num_hidden_layers", 64
MTP_EMBEDDINGS = "mtp_use_dedicated_embeddings"
MULTIPLIER = (1e-6, 1e6)  # of granite's
CAP = (1e-3, 1e6)  # of logits


@dataclass(frozen=True)
class Norms:
    """Names of the norms before and after attention and feed-forward."""

    attention: tuple[str | None, str | None]
    dense: tuple[str | None, str | None]


PRE = Norms(("input_layernorm", None), ("post_attention_layernorm", None))
POST = Norms((None, "post_attention_layernorm"), (None, "post_feedforward_layernorm"))
SANDWICH = Norms(
    ("input_layernorm", "post_self_attn_layernorm"),
    ("post_attention_layernorm", "post_mlp_layernorm"),
)
GEMMA = Norms(
    ("input_layernorm", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)


@dataclass(frozen=True)
class Style:
    """One model's answers to what families differ in; the defaults are Llama's without biases."""

    windows: Literal["none", "all_layers", "layer_types"] = "none"
    norms: Norms = PRE
    rounds_late: bool = False
    zero_centered: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "all_heads"] = "none"
    value_norm: bool = False
    values_are_keys: bool = False  # in full layers
    output_gate: bool = False
    delta_net: DeltaNet | None = None  # of the layers that layer_types calls LINEAR
    mtp: bool = False  # a head for the token after the next one, of a layer with attention
    interleaved_rope: bool = False
    partial_rope: bool = False
    rope_in_f32: bool = False
    rotates: tuple[bool, ...] | None = None  # which layers turn positions; None: all
    query_growth: QueryGrowth | None = None
    attention_scale: float | None = None  # None: head_size ** -0.5
    residual_multiplier: float = 1.0
    layer_scalar: str | None = None
    embedding_scale: float = 1.0
    rounds_embedding_scale: bool = False
    logits_divisor: float = 1.0
    logits_soft_cap: float | None = None


@dataclass(frozen=True)
class Family:
    architecture: str
    read: Callable[[Fields], Style]  # of transformers' config object
    sizes_differ: bool = False  # per_layer_config may give layers their own heads


def _llama(config: Fields) -> Style:
    bias = config.flag("attention_bias")
    return Style(qkv_bias=bias, output_bias=bias, mlp_bias=config.flag("mlp_bias"))


def _qwen2(config: Fields) -> Style:
    return Style(qkv_bias=True, windows="layer_types")


def _qwen3(config: Fields) -> Style:
    bias = config.flag("attention_bias")
    return Style(qkv_bias=bias, output_bias=bias, qk_norm="head", windows="layer_types")


def _mistral(config: Fields) -> Style:
    return Style(windows="all_layers")


def _ministral(config: Fields) -> Style:
    return Style(windows="layer_types")


def _ministral3(config: Fields) -> Style:
    values = rope_values(config, FULL)
    beta = values.number("llama_4_scaling_beta", *BOUNDS["llama_4_scaling_beta"])
    growth = QueryGrowth(beta, values.integer(ORIGINAL, 1, MAX_POSITIONS))
    return Style(windows="all_layers", query_growth=growth)


def _smollm3(config: Fields) -> Style:
    flags = config.values["no_rope_layers"]  # 1: this layer does turn positions
    enough = len(flags) >= config.integer("num_hidden_layers", 1, MAX_LAYERS)
    if not enough or not all(type(flag) is int and flag in (0, 1) for flag in flags):
        raise config.wrong("no_rope_layers", flags, "0 or 1 for each layer")
    rotates = tuple(bool(flag) for flag in flags)
    return replace(_llama(config), windows="layer_types", rotates=rotates)


def _olmo2(config: Fields) -> Style:
    bias = config.flag("attention_bias")
    return Style(
        qkv_bias=bias,
        output_bias=bias,
        norms=POST,
        rounds_late=True,
        qk_norm="all_heads",
        rope_in_f32=True,
    )


def _olmo3(config: Fields) -> Style:
    return replace(_olmo2(config), windows="layer_types")


def _phi3(config: Fields) -> Style:
    return Style(windows="all_layers", partial_rope=True)


def _glm4(config: Fields) -> Style:
    return Style(
        qkv_bias=config.flag("attention_bias"),
        norms=SANDWICH,
        interleaved_rope=True,
        partial_rope=True,
    )


def _granite(config: Fields) -> Style:
    return replace(
        _llama(config),
        attention_scale=config.number("attention_multiplier", *MULTIPLIER),
        residual_multiplier=config.number("residual_multiplier", *MULTIPLIER),
        embedding_scale=config.number("embedding_multiplier", *MULTIPLIER),
        logits_divisor=config.number("logits_scaling", *MULTIPLIER),
    )


def _seed_oss(config: Fields) -> Style:
    return Style(
        qkv_bias=config.flag("attention_bias"),
        output_bias=config.flag("attention_out_bias"),
        mlp_bias=config.flag("mlp_bias"),
    )


def _gemma(config: Fields) -> Style:
    bias = config.flag("attention_bias")
    return Style(
        windows="layer_types",
        norms=GEMMA,
        rounds_late=True,
        activation="gelu_tanh",
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        embedding_scale=config.integer("hidden_size", 1, MAX_WIDTH) ** 0.5,
        rounds_embedding_scale=True,
        logits_soft_cap=(
            config.number("final_logit_softcapping", *CAP)
            if config.has("final_logit_softcapping")
            else None
        ),
    )


def _gemma3(config: Fields) -> Style:
    """Gemma 3. attn_logit_softcapping has no effect in transformers either."""
    if config.flag("use_bidirectional_attention", False):
        raise config.unsupported("use_bidirectional_attention", "false")
    scale = config.integer("query_pre_attn_scalar", 1, MAX_WIDTH) ** -0.5
    return replace(_gemma(config), zero_centered=True, attention_scale=scale)


def _gemma4(config: Fields) -> Style:
    """Gemma 4: the dense models without embeddings per layer."""
    for name, of in (
        ("hidden_size_per_layer_input", "the embeddings per layer of Gemma 4 E2B and E4B"),
        ("num_kv_shared_layers", "the keys that layers of Gemma 4 E2B and E4B share"),
        ("use_double_wide_mlp", "the wide feed-forwards of Gemma 4 E2B and E4B"),
        ("enable_moe_block", "the experts of Gemma 4 26B-A4B"),
    ):
        if config.values.get(name):  # 0 or false where it is not so; some are not in every class
            raise SubspecError(
                Exit.UNSUPPORTED,
                f"{config.where}: {name} is {config.values[name]!r:.40}: we do not compute {of}",
                "of Gemma 4 choose 12B or 31B, which are dense",
            )
    if config.values.get("use_bidirectional_attention") not in (None, "vision"):
        raise config.unsupported("use_bidirectional_attention", "'vision', which no text is")
    return replace(
        _gemma(config),
        attention_scale=1.0,
        value_norm=True,
        values_are_keys=config.flag("attention_k_eq_v"),
        layer_scalar="layer_scalar",
    )


def _qwen3_5(config: Fields) -> Style:
    """Qwen3.5. For text all three axes of its multimodal rotary embedding have the same
    position."""
    for name, computed in (
        ("attn_output_gate", (True,)),
        ("output_gate_type", ("swish", "silu")),  # two names of one function
        ("mamba_ssm_dtype", ("float32",)),
    ):
        if config.has(name) and config.values[name] not in computed:
            raise config.unsupported(name, " or ".join(map(repr, computed)))
    key_heads, value_heads, key_size, value_size = (
        config.integer(f"linear_{name}", 1, MAX_WIDTH)
        for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    )
    if value_heads % key_heads:
        expected = f"a multiple of linear_num_key_heads, {key_heads}"
        raise config.wrong("linear_num_value_heads", value_heads, expected)
    conv_kernel_size = config.integer("linear_conv_kernel_dim", 2, MAX_TAPS)
    bias = config.flag("attention_bias")
    return Style(
        rounds_late=True,
        zero_centered=True,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        partial_rope=True,
        output_gate=True,
        delta_net=DeltaNet(key_heads, value_heads, key_size, value_size, conv_kernel_size),
        mtp=_mtp_layers(config) == 1 and not config.flag(MTP_EMBEDDINGS, False),
    )


def _mtp_layers(config: Fields) -> int:
    return config.integer(MTP_LAYERS, 0, MAX_MTP_LAYERS, 0)


def mtp_notes(config: Fields) -> tuple[str, ...]:
    """Notes for the user on a head for multi-token prediction that is not run."""
    if not (_mtp_layers(config) and config.flag(MTP_EMBEDDINGS, False)):
        return ()
    return (
        f"{config.where}: {MTP_EMBEDDINGS} is true: the draft head is set aside, as we run only "
        "one that reads the model's embedding",
    )


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3),
    "mistral": Family("MistralForCausalLM", _mistral),
    "ministral": Family("MinistralForCausalLM", _ministral),
    "ministral3": Family("Ministral3ForCausalLM", _ministral3),
    "smollm3": Family("SmolLM3ForCausalLM", _smollm3),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2),
    "olmo3": Family("Olmo3ForCausalLM", _olmo3),
    "phi3": Family("Phi3ForCausalLM", _phi3),
    "glm4": Family("Glm4ForCausalLM", _glm4),
    "granite": Family("GraniteForCausalLM", _granite),
    "seed_oss": Family("SeedOssForCausalLM", _seed_oss),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", _qwen3_5),
    "gemma3_text": Family("Gemma3ForCausalLM", _gemma3),
    "gemma4_text": Family("Gemma4ForCausalLM", _gemma4, sizes_differ=True),
    "gemma4_unified_text": Family("Gemma4UnifiedForCausalLM", _gemma4, sizes_differ=True),
}


@dataclass(frozen=True)
class Whole:
    """A multimodal model, of which we run the text part."""

    architecture: str
    families: tuple[str, ...]  # of its text part; the first where that has no model_type
    tied: bool  # whether the head is the embedding where its config does not say


WHOLES: dict[str, Whole] = {
    "mistral3": Whole("Mistral3ForConditionalGeneration", ("mistral", "ministral3"), True),
    "qwen3_5": Whole("Qwen3_5ForConditionalGeneration", ("qwen3_5_text",), False),
    "gemma3": Whole("Gemma3ForConditionalGeneration", ("gemma3_text",), True),
    "gemma4": Whole("Gemma4ForConditionalGeneration", ("gemma4_text",), True),
    "gemma4_unified": Whole(
        "Gemma4UnifiedForConditionalGeneration", ("gemma4_unified_text",), True
    ),
}
