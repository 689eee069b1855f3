"""config.json -> ModelSpec.

transformers' own config object says what a field means and defaults to; families.py says what its
model computes with it, rope.py how it turns positions. What is not computed exactly as transformers
5 does is refused here, by name, and every number is bounded before it is used.
"""

from pathlib import Path
from typing import Any, cast

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import DTYPE_BYTES, DType, ModelSpec, NormStyle, Source
from subspec.planner.model.families import FAMILIES, read_layers
from subspec.planner.model.fields import (
    LARGEST_VOCABULARY,
    LARGEST_WIDTH,
    MOST_LAYERS,
    MOST_POSITIONS,
    Fields,
    read_fields,
)
from subspec.planner.model.library import reading
from subspec.planner.model.rope import check_rope, reach

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
MOST_END_TOKENS = 1_000

# What transformers' config class is given: nothing else in a config reaches it. It would set any
# name as an attribute, and enumerate num_labels.
READ = (
    "attention_bias",
    "attention_multiplier",
    "attention_out_bias",
    "embedding_multiplier",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "logits_scaling",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "no_rope_layer_interval",
    "no_rope_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "residual_multiplier",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "tokenizer_class",
    "use_sliding_window",
    "vocab_size",
)
# What transformers divides by or counts up to while it makes the object.
COUNTS = {
    "hidden_size": LARGEST_WIDTH,
    "max_position_embeddings": MOST_POSITIONS,
    "no_rope_layer_interval": MOST_LAYERS,
    "num_attention_heads": LARGEST_WIDTH,
    "num_hidden_layers": MOST_LAYERS,
}


def read_config(folder: Path, source: Source) -> ModelSpec:
    """The decoder that config.json describes; its dtype is only the config's word (float32, which
    is transformers' own default, where it says nothing).

    Raises SubspecError: UNSUPPORTED for what we do not run, CORRUPT for what makes no sense."""
    written = read_fields(folder / CONFIG)
    family = _family(written)
    config = Fields(CONFIG, vars(load_config(written)))
    if config.text("hidden_act") != "silu":
        raise config.unsupported("hidden_act", "'silu'")
    style = FAMILIES[family].read(config)
    max_positions = reach(config)
    return ModelSpec(
        family=family,
        dtype=_dtype(written),
        hidden_size=config.integer("hidden_size", 1, LARGEST_WIDTH),
        vocab_size=config.integer("vocab_size", 1, LARGEST_VOCABULARY),
        max_positions=max_positions,
        layers=read_layers(config, style, max_positions),
        norm=NormStyle(config.number("rms_norm_eps", 1e-15, 1.0), style.rounds_late),
        tied_head=config.flag("tie_word_embeddings"),
        embedding_scale=style.embedding_scale,
        logits_divisor=style.logits_divisor,
        rope_in_f32=style.rope_in_f32,
        eos_token_ids=_end_tokens(folder, config),
        source=source,
    )


def load_config(written: Fields) -> Any:
    """The config object that transformers makes of these fields. It is given values, not the file:
    a field could otherwise name another file, and nothing is read twice."""
    family = _family(written)
    for name, largest in COUNTS.items():
        if written.has(name):
            written.integer(name, 1, largest)
    written.texts("layer_types")
    flags = written.values.get("no_rope_layers")  # looked up by layer
    num_layers = written.values.get("num_hidden_layers")
    if isinstance(flags, list) and num_layers is not None and len(flags) < num_layers:
        raise written.wrong("no_rope_layers", flags, f"{num_layers} entries, not {len(flags)}")
    check_rope(written)
    values = {name: _copy(written.values[name]) for name in READ if name in written.values}
    with reading(written.where):
        from transformers import AutoConfig

        config = AutoConfig.for_model(family, **values)
        config.standardize_rope_params()  # once more, as its model does before it computes
        return config


def _copy(value: Any) -> Any:
    """For transformers to write in. Inside an object, too, null counts as left out."""
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items() if item is not None}
    return value


def _family(written: Fields) -> str:
    """The model_type, once nothing in the config asks for arithmetic that we do not do."""
    known = ", ".join(family.architecture for family in FAMILIES.values())
    architectures = written.texts("architectures")
    name = written.text("model_type", "")
    if name not in FAMILIES or FAMILIES[name].architecture not in architectures:
        shown = ", ".join(architectures)[:100] or "no architecture"
        message = f"{CONFIG} names {shown} of type {name[:100]!r}, we run {known}"
        if "auto_map" in written.values:
            message += "; its own code (auto_map) is never run"
        raise SubspecError(Exit.UNSUPPORTED, message, "choose a model of one of these families")
    if written.has("quantization_config"):
        raise SubspecError(
            Exit.UNSUPPORTED,
            f"{CONFIG}: quantization_config says that the weights are already quantised",
            "use the original checkpoint in bfloat16, float16 or float32: we make the 4-bit copy",
        )
    if not written.flag("is_causal", True):
        raise written.unsupported("is_causal", "true")
    if written.has("per_layer_config"):
        raise written.unsupported("per_layer_config", "layers that config.json describes together")
    # transformers reads these as another class.
    return "ministral" if name == "mistral" and "layer_types" in written.values else name


def _dtype(written: Fields) -> DType:
    field = "dtype" if written.has("dtype") else "torch_dtype"
    name = written.text(field, "float32")
    if name not in DTYPE_BYTES:
        raise written.unsupported(field, ", ".join(DTYPE_BYTES))
    return cast(DType, name)


def _end_tokens(folder: Path, config: Fields) -> tuple[int, ...]:
    """generation_config.json decides where it has end tokens, else the config."""
    fields = config
    if (folder / GENERATION_CONFIG).exists():
        generation = read_fields(folder / GENERATION_CONFIG)
        fields = generation if generation.has("eos_token_id") else config
    value = fields.values.get("eos_token_id")
    found = [] if value is None else value if isinstance(value, list) else [value]
    fine = all(type(token) is int and 0 <= token < LARGEST_VOCABULARY for token in found)
    if not fine or len(found) > MOST_END_TOKENS:
        raise fields.wrong("eos_token_id", value, "a token id or a list of them")
    return tuple(dict.fromkeys(found))
