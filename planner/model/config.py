"""config.json -> ModelSpec.

transformers' own config object says what a field means and defaults to; families.py says what its
model computes with it, rope.py how it turns positions. What is not computed exactly as transformers
5 does is refused here, by name, and every number is bounded before it is used.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import DTYPE_BYTES, DraftHead, DType, ModelSpec, NormStyle, Source
from subspec.planner.model.families import FAMILIES, WHOLES, Whole, mtp_notes
from subspec.planner.model.fields import (
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    Fields,
    read_fields,
)
from subspec.planner.model.fp8 import QUANTIZATION, Quantization, expected_fp8, read_quantization
from subspec.planner.model.layers import PER_LAYER, read_layers
from subspec.planner.model.library import reading
from subspec.planner.model.rope import check_rope, reach, rope_notes

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
MAX_END_TOKENS = 1_000

# What transformers' config class is given: nothing else in a config reaches it. It would set any
# name as an attribute, and enumerate num_labels.
READ = (
    "attention_bias",
    "attention_k_eq_v",
    "attention_multiplier",
    "attention_out_bias",
    "attn_output_gate",
    "embedding_multiplier",
    "enable_moe_block",
    "eos_token_id",
    "final_logit_softcapping",
    "full_attention_interval",
    "global_head_dim",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "hidden_size_per_layer_input",
    "intermediate_size",
    "layer_types",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
    "logits_scaling",
    "mamba_ssm_dtype",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings",
    "no_rope_layer_interval",
    "no_rope_layers",
    "num_attention_heads",
    "num_global_key_value_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_kv_shared_layers",
    "original_max_position_embeddings",
    "output_gate_type",
    "partial_rotary_factor",
    "per_layer_config",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rms_norm_eps",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "sliding_window_pattern",
    "tie_word_embeddings",
    "tokenizer_class",
    "use_bidirectional_attention",
    "use_double_wide_mlp",
    "use_sliding_window",
    "vocab_size",
)
# What transformers divides by or counts up to while it makes the object.
COUNTS = {
    "full_attention_interval": MAX_LAYERS,
    "global_head_dim": MAX_WIDTH,
    "head_dim": MAX_WIDTH,
    "hidden_size": MAX_WIDTH,
    "max_position_embeddings": MAX_POSITIONS,
    "no_rope_layer_interval": MAX_LAYERS,
    "num_attention_heads": MAX_WIDTH,
    "num_global_key_value_heads": MAX_WIDTH,
    "num_hidden_layers": MAX_LAYERS,
    "num_key_value_heads": MAX_WIDTH,
    "sliding_window_pattern": MAX_LAYERS,
}
ACTIVATIONS = {
    "silu": ("hidden_act", "silu"),
    "gelu_tanh": ("hidden_activation", "gelu_pytorch_tanh"),
}
ARCHITECTURES = {name: one.architecture for name, one in (FAMILIES | WHOLES).items()}
# Not its text part's.
OF_WHOLE = ("dtype", "eos_token_id", QUANTIZATION, "torch_dtype", "tie_word_embeddings")
TEXT = "text_config"
AUTO = "auto"  # a dtype: that of the tensors
OF_TEXT, OF_WHOLES = "ForCausalLM", "ForConditionalGeneration"  # how architectures end
LAYER_VALUES = {"head_dim", "num_key_value_heads"}  # that per_layer_config may give a layer


def read_config(folder: Path, source: Source) -> ModelSpec:
    """The decoder that config.json describes. Its dtype is only that of the config (if missing,
    float32, which is transformers' own default, or bfloat16 beside weights in FP8).

    Raises SubspecError: UNSUPPORTED for what we do not run, CORRUPT for invalid content.
    """
    return described(read_fields(folder / CONFIG), folder, source)


def described(written: Fields, folder: Path, source: Source) -> ModelSpec:
    """The decoder that these fields of a config.json describe. See read_config."""
    family, decoder = _decoder(written)
    made = load_config(written)
    per_layer = made.to_dict().get(PER_LAYER, {})
    by_index = {PER_LAYER: {int(index): own for index, own in per_layer.items()}}
    config = Fields(CONFIG, {**vars(made), **by_index})
    style = FAMILIES[family].read(config)
    field, activation = ACTIVATIONS[style.activation]
    if config.text(field) != activation:
        raise config.unsupported(field, repr(activation))
    max_positions = reach(config)
    layers = read_layers(config, style, max_positions)
    epsilon = config.number("rms_norm_eps", 1e-15, 1.0)
    norm = NormStyle(epsilon, style.rounds_late, style.zero_centered)
    quantization = read_quantization(decoder)
    attending = next((one for one in layers if one.attentions), None) if style.mtp else None
    spec = ModelSpec(
        family=family,
        dtype=_dtype(decoder, "bfloat16" if quantization else "float32"),
        hidden_size=config.integer("hidden_size", 1, MAX_WIDTH),
        vocab_size=config.integer("vocab_size", 1, MAX_VOCABULARY),
        max_positions=max_positions,
        layers=layers,
        norm=norm,
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        embedding_scale=style.embedding_scale,
        rounds_embedding_scale=style.rounds_embedding_scale,
        logits_divisor=style.logits_divisor,
        logits_soft_cap=style.logits_soft_cap,
        rope_in_f32=style.rope_in_f32,
        draft_head=DraftHead("mtp", attending, norm) if attending else None,
        eos_token_ids=_end_tokens(folder, config),
        source=source,
    )
    return replace(spec, fp8=expected_fp8(spec, quantization))


def quantization_of(folder: Path) -> Quantization | None:
    """FP8 quantization settings of config.json; None without FP8 weights."""
    return read_quantization(_decoder(read_fields(folder / CONFIG))[1])


def config_notes(folder: Path) -> tuple[str, ...]:
    """Notes for the user on settings of config.json that are ignored."""
    _, decoder = _decoder(read_fields(folder / CONFIG))
    return (*rope_notes(decoder), *mtp_notes(decoder))


def load_config(written: Fields) -> Any:
    """The config object that transformers makes of these fields, of a multimodal model that of its
    text part. It is given values, not the file: a field could otherwise name another file, and
    nothing is read twice."""
    family, written = _decoder(written)
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
    """Copy of a value, for transformers to modify. null counts as missing inside an object, too."""
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items() if item is not None}
    return value


def _decoder(written: Fields) -> tuple[str, Fields]:
    """The model_type and the fields of the decoder, of a multimodal model those of its text part,
    once nothing in the config asks for arithmetic that we do not do."""
    architectures = written.texts("architectures")
    name = written.text("model_type", "")
    if name not in ARCHITECTURES or ARCHITECTURES[name] not in architectures:
        shown = ", ".join(architectures)[:100] or "no architecture"
        message = f"{CONFIG} names {shown} of type {name[:100]!r}, expected {_known_classes()}"
        if "auto_map" in written.values:
            message += "; its own code (auto_map) is never run"
        raise SubspecError(Exit.UNSUPPORTED, message, "choose a model of one of these families")
    # transformers reads these as another class, but not inside a multimodal model.
    renamed = name == "mistral" and "layer_types" in written.values
    if name in WHOLES:
        name, written = _text_part(written, WHOLES[name])
    read_quantization(written)
    if not written.flag("is_causal", True):
        raise written.unsupported("is_causal", "true")
    if written.has(PER_LAYER):
        if not FAMILIES[name].sizes_differ:
            raise written.unsupported(PER_LAYER, "layers that config.json describes together")
        _check_per_layer(written)
    return ("ministral" if renamed else name), written


def _known_classes() -> str:
    """The architectures that we run, shorter than a list of them."""
    plain, whole = (
        ", ".join(one.architecture.removesuffix(suffix) for one in known.values())
        for known, suffix in ((FAMILIES, OF_TEXT), (WHOLES, OF_WHOLES))
    )
    return f"{OF_TEXT} of {plain}, or {OF_WHOLES} of {whole}"


def _text_part(written: Fields, whole: Whole) -> tuple[str, Fields]:
    """The model_type and the fields of a multimodal model's text part."""
    values = written.values.get(TEXT)
    if not isinstance(values, dict):
        raise written.wrong(TEXT, values, "an object")
    decided = {field: written.values[field] for field in OF_WHOLE if written.has(field)}
    # transformers looks at the whole's word alone, and at its class's where there is none.
    decided.setdefault("tie_word_embeddings", whole.tied)
    text = Fields(f"{written.where}: {TEXT}", {**values, **decided})
    name = text.text("model_type", whole.families[0])
    if name not in whole.families:
        raise text.unsupported("model_type", " or ".join(map(repr, whole.families)))
    return name, text


def _check_per_layer(written: Fields) -> None:
    """Raise SubspecError if per_layer_config changes anything but the heads of layers."""
    values = written.values[PER_LAYER]
    expected = "an object from the indices of layers to objects"
    if not isinstance(values, dict) or len(values) > MAX_LAYERS:
        raise written.wrong(PER_LAYER, values, expected)
    for index, own in values.items():
        fine = index.isascii() and index.isdigit() and len(index) < 6
        if not fine or not isinstance(own, dict):
            raise written.wrong(PER_LAYER, values, expected)
        layer = Fields(f"{written.where}: {PER_LAYER}.{index}", own)
        for name in own:
            if name not in LAYER_VALUES:
                raise layer.unsupported(name[:60], f"layers that differ in {sorted(LAYER_VALUES)}")
            layer.integer(name, 1, MAX_WIDTH)


def _dtype(written: Fields, usual: DType) -> DType:
    field = "dtype" if written.has("dtype") else "torch_dtype"
    name = written.text(field, AUTO)
    if name == AUTO:
        return usual
    if name not in DTYPE_BYTES:
        raise written.unsupported(field, ", ".join(DTYPE_BYTES))
    return cast(DType, name)


def _end_tokens(folder: Path, config: Fields) -> tuple[int, ...]:
    """End token ids of generation_config.json if it has any, else of the config."""
    fields = config
    if (folder / GENERATION_CONFIG).exists():
        generation = read_fields(folder / GENERATION_CONFIG)
        fields = generation if generation.has("eos_token_id") else config
    value = fields.values.get("eos_token_id")
    found = [] if value is None else value if isinstance(value, list) else [value]
    fine = all(type(token) is int and 0 <= token < MAX_VOCABULARY for token in found)
    if not fine or len(found) > MAX_END_TOKENS:
        raise fields.wrong("eos_token_id", value, "a token id or a list of them")
    return tuple(dict.fromkeys(found))
