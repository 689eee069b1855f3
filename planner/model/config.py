"""config.json -> ModelSpec: what the fields of each supported family mean and default to.

The meaning is that of transformers 5.23 (models/{qwen2,qwen3,llama,mistral}); nothing is executed.
Whatever we do not compute exactly as it does is refused here, by name.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import (
    DTYPE_BYTES,
    Attention,
    Block,
    Dense,
    DType,
    LayerSpec,
    ModelSpec,
    NormStyle,
    Rope,
    Source,
)
from subspec.planner.model.fields import Fields, read_fields

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

# A bound for every number, far above any model: what follows may then multiply and enumerate them.
LARGEST_WIDTH = 1 << 20
MOST_LAYERS = 10_000
LARGEST_VOCABULARY = 1 << 24
MOST_POSITIONS = 1 << 30
MOST_END_TOKENS = 1_000

FamilyName = Literal["qwen2", "qwen3", "llama", "mistral"]


@dataclass(frozen=True)
class Family:
    """What transformers' config class takes for a field that is left out."""

    architecture: str
    max_positions: int
    num_kv_heads: int | None  # None: as many as there are heads
    head_size: int | None  # None: hidden_size // num_attention_heads
    end_token: int | None


FAMILIES: dict[FamilyName, Family] = {
    "qwen2": Family("Qwen2ForCausalLM", 32768, 32, None, None),
    "qwen3": Family("Qwen3ForCausalLM", 32768, 32, 128, None),
    "llama": Family("LlamaForCausalLM", 2048, None, None, 2),
    "mistral": Family("MistralForCausalLM", 131072, 8, None, 2),
}


def read_config(folder: Path, source: Source) -> ModelSpec:
    """The decoder that config.json describes; its dtype is only the config's word (float32, which
    is transformers' own default, where it says nothing).

    Raises SubspecError: UNSUPPORTED for what we do not run, CORRUPT for what makes no sense."""
    config = read_fields(folder / CONFIG)
    name = _family(config)
    family = FAMILIES[name]
    num_layers = config.integer("num_hidden_layers", 1, MOST_LAYERS)
    num_heads = config.integer("num_attention_heads", 1, LARGEST_WIDTH)
    hidden_size = config.integer("hidden_size", 1, LARGEST_WIDTH)
    num_kv_heads = _num_kv_heads(config, family, num_heads)
    head_size = family.head_size or hidden_size // num_heads
    head_size = config.integer("head_dim", 1, LARGEST_WIDTH, head_size)
    if head_size % 2:
        raise config.wrong("head_dim", head_size, "an even number")
    positions = config.integer("max_position_embeddings", 1, MOST_POSITIONS, family.max_positions)
    rope, positions = _rope(config, positions)
    window, windowed_layers = _windows(config, name, num_layers, positions)
    attention_bias = name in ("llama", "qwen3") and config.flag("attention_bias", False)
    rope = replace(rope, size=head_size)
    layers = []
    for layer in range(num_layers):
        attention = Attention(
            num_heads,
            num_kv_heads,
            head_size,
            head_size**-0.5,
            rope,
            window if layer in windowed_layers else None,
            name == "qwen2" or attention_bias,
            attention_bias,
            "head" if name == "qwen3" else "none",
        )
        dense = Dense(
            config.integer("intermediate_size", 1, LARGEST_WIDTH),
            name == "llama" and config.flag("mlp_bias", False),
        )
        layers.append(
            LayerSpec(
                (Block(attention, "input_layernorm"), Block(dense, "post_attention_layernorm"))
            )
        )
    return ModelSpec(
        family=name,
        dtype=_dtype(config),
        hidden_size=hidden_size,
        vocab_size=config.integer("vocab_size", 1, LARGEST_VOCABULARY),
        max_positions=positions,
        layers=tuple(layers),
        norm=NormStyle(config.number("rms_norm_eps", 1e-15, 1.0, 1e-6)),
        tied_head=config.flag("tie_word_embeddings", False),
        eos_token_ids=_end_tokens(folder, config, family),
        source=source,
    )


def _family(config: Fields) -> FamilyName:
    """The family, once nothing in the config asks for arithmetic that we do not do."""
    known = ", ".join(family.architecture for family in FAMILIES.values())
    architectures = config.texts("architectures")
    model_type = config.text("model_type", "")
    name = cast(FamilyName, model_type)
    if name not in FAMILIES or FAMILIES[name].architecture not in architectures:
        shown = ", ".join(architectures)[:100] or "no architecture"
        message = f"{CONFIG} names {shown} of type {model_type[:100]!r}, we run {known}"
        if "auto_map" in config.values:
            message += "; its own code (auto_map) is never run"
        raise SubspecError(Exit.UNSUPPORTED, message, "choose a model of one of these families")
    if config.has("quantization_config"):
        raise SubspecError(
            Exit.UNSUPPORTED,
            f"{CONFIG}: quantization_config says that the weights are already quantised",
            "use the original checkpoint in bfloat16, float16 or float32: we make the 4-bit copy",
        )
    if config.text("hidden_act", "silu") != "silu":
        raise config.unsupported("hidden_act", "'silu'")
    if config.has("per_layer_config"):
        raise config.unsupported("per_layer_config", "layers that are all alike")
    return name


def _num_kv_heads(config: Fields, family: Family, num_heads: int) -> int:
    # transformers: left out means the class's default, null means as many as there are heads.
    default = num_heads if "num_key_value_heads" in config.values else family.num_kv_heads
    number = config.integer("num_key_value_heads", 1, LARGEST_WIDTH, default or num_heads)
    if num_heads % number:
        expected = f"a divisor of num_attention_heads, {num_heads}"
        raise config.wrong("num_key_value_heads", number, expected)
    return number


def _dtype(config: Fields) -> DType:
    field = "dtype" if config.has("dtype") else "torch_dtype"
    name = config.text(field, "float32")
    if name not in DTYPE_BYTES:
        raise config.unsupported(field, ", ".join(DTYPE_BYTES))
    return cast(DType, name)


def _windows(
    config: Fields, family: FamilyName, num_layers: int, max_positions: int
) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window and the layers that have it; a window that no position can leave is none.

    A query at p sees the positions above p - window."""
    if family == "llama":
        return None, ()
    used = family == "mistral" or config.flag("use_sliding_window", False)
    left_out = "sliding_window" not in config.values
    window = None
    if used and (left_out or config.has("sliding_window")):
        window = config.integer("sliding_window", 1, MOST_POSITIONS, 4096)
    layers = tuple(range(num_layers))
    if family != "mistral" and config.has("layer_types"):
        kinds = config.texts("layer_types")
        if not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise config.unsupported("layer_types", "full_attention and sliding_attention")
        if len(kinds) != num_layers:
            raise config.wrong("layer_types", kinds, f"{num_layers} entries, not {len(kinds)}")
        layers = tuple(layer for layer in layers if kinds[layer] == "sliding_attention")
        if layers and window is None:
            raise SubspecError(
                Exit.CORRUPT, f"{CONFIG}: layer_types has sliding_attention, sliding_window is off"
            )
    elif family != "mistral":
        layers = layers[config.integer("max_window_layers", 0, LARGEST_WIDTH, 28) :]
    if window is None or window >= max_positions or not layers:
        return None, ()
    return window, layers


def _rope(config: Fields, max_positions: int) -> tuple[Rope, int]:
    """The rotary embedding, and the positions it reaches: yarn may reach beyond the config's."""
    field = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    values = config.values.get(field) or {}
    if not isinstance(values, dict):
        raise config.wrong(field, values, "an object")
    if any(isinstance(value, dict) for value in values.values()):
        raise config.unsupported(field, "one rotary embedding for all layers")
    rope = Fields(f"{CONFIG}: {field}", values)
    kind = rope.text("rope_type", rope.text("type", "default"))
    partial = rope if rope.has("partial_rotary_factor") else config
    if partial.number("partial_rotary_factor", 0.0, 1e6, 1.0) != 1.0:
        raise partial.unsupported("partial_rotary_factor", "1")
    theta = (rope if rope.has("rope_theta") else config).number("rope_theta", 2.0, 1e18, 10_000.0)
    if kind == "default":
        return Rope(theta, 0), max_positions
    if kind not in ("linear", "llama3", "yarn"):
        name = "rope_type" if rope.has("rope_type") else "type"
        raise rope.unsupported(name, "default, linear, llama3 and yarn")
    factor = rope.number("factor", 1.0, 1e6)
    if kind == "linear":
        return Rope(theta, 0, "linear", False, factor), max_positions
    origin = config if config.has("original_max_position_embeddings") else rope
    original = origin.integer("original_max_position_embeddings", 1, MOST_POSITIONS, max_positions)
    if kind == "yarn":
        reach = max(max_positions, min(int(original * factor), MOST_POSITIONS))
        return _yarn(rope, theta, factor, original), reach
    low = rope.number("low_freq_factor", 1e-3, 1e6)
    high = rope.number("high_freq_factor", 1e-3, 1e6)
    if high <= low:
        raise rope.wrong("high_freq_factor", high, f"more than low_freq_factor, {low:g}")
    return Rope(theta, 0, "llama3", False, factor, original, low, high), max_positions


def _yarn(rope: Fields, theta: float, factor: float, original: int) -> Rope:
    if not rope.flag("truncate", True):
        raise rope.unsupported("truncate", "true")

    def gain(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    attention_factor = gain(1.0)
    mscale = rope.number("mscale", 0.0, 1e3, 0.0)
    mscale_all = rope.number("mscale_all_dim", 0.0, 1e3, 0.0)
    if mscale and mscale_all:
        attention_factor = gain(mscale) / gain(mscale_all)
    return Rope(
        theta,
        0,
        "yarn",
        False,
        factor,
        original,
        beta_fast=rope.number("beta_fast", 0.0, 1e6, 32.0) or 32.0,  # 0 counts as left out there
        beta_slow=rope.number("beta_slow", 0.0, 1e6, 1.0) or 1.0,
        attention_factor=rope.number("attention_factor", 1e-3, 1e3, attention_factor),
    )


def _end_tokens(folder: Path, config: Fields, family: Family) -> tuple[int, ...]:
    """generation_config.json decides where it has end tokens, else config.json, else the family."""
    fields = config
    if (folder / GENERATION_CONFIG).exists():
        generation = read_fields(folder / GENERATION_CONFIG)
        fields = generation if generation.has("eos_token_id") else config
    default = None if "eos_token_id" in config.values else family.end_token
    value = fields.values.get("eos_token_id", default)
    found = [] if value is None else value if isinstance(value, list) else [value]
    fine = all(type(token) is int and 0 <= token < LARGEST_VOCABULARY for token in found)
    if not fine or len(found) > MOST_END_TOKENS:
        raise fields.wrong("eos_token_id", value, "a token id or a list of them")
    return tuple(dict.fromkeys(found))
