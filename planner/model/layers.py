"""transformers' config object and what its family answers -> the layers of a ModelSpec."""

from dataclasses import replace

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import Attention, Block, DeltaNet, Dense, LayerSpec
from subspec.planner.model.families import FULL, LINEAR, Style
from subspec.planner.model.fields import MAX_LAYERS, MAX_POSITIONS, MAX_WIDTH, Fields
from subspec.planner.model.rope import read_rope

SLIDING = "sliding_attention"
PER_LAYER = "per_layer_config"  # in transformers' config object by the layer's index


def read_layers(config: Fields, style: Style, max_positions: int) -> tuple[LayerSpec, ...]:
    """Layers of a ModelSpec. config: transformers' object."""
    types = _layer_types(config, style)
    attentions = {
        kind: _attention(config, style, kind, _own_values(config, types, kind), max_positions)
        for kind in set(types) - {LINEAR}
    }
    intermediate_size = config.integer("intermediate_size", 1, MAX_WIDTH)
    dense = Dense(intermediate_size, style.mlp_bias, style.activation)
    layers = []
    for index, kind in enumerate(types):
        mixer: Attention | DeltaNet
        if kind == LINEAR:
            assert style.delta_net is not None
            mixer = style.delta_net
        else:
            mixer = attentions[kind]
            if style.rotates is not None and not style.rotates[index]:
                mixer = replace(mixer, rope=None)
        blocks = (
            Block(mixer, *style.norms.attention, style.residual_multiplier),
            Block(dense, *style.norms.dense, style.residual_multiplier),
        )
        layers.append(LayerSpec(blocks, style.layer_scalar))
    return tuple(layers)


def _attention(
    config: Fields, style: Style, kind: str, own: Fields, max_positions: int
) -> Attention:
    """Attention of the layers of one type. own: the config with these layers' own values."""
    heads = config.integer("num_attention_heads", 1, MAX_WIDTH)
    kv_heads = own.integer("num_key_value_heads", 1, MAX_WIDTH)
    if heads % kv_heads:
        raise own.wrong("num_key_value_heads", kv_heads, f"a divisor of {heads} heads")
    head_size = config.integer("hidden_size", 1, MAX_WIDTH) // heads
    head_size = own.integer("head_dim", 1, MAX_WIDTH, head_size)
    if head_size % 2:
        raise own.wrong("head_dim", head_size, "an even number")
    return Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        scale=style.attention_scale or head_size**-0.5,
        rope=read_rope(config, kind, head_size, style.interleaved_rope, style.partial_rope),
        window=_window(config, kind, max_positions),
        qkv_bias=style.qkv_bias,
        output_bias=style.output_bias,
        qk_norm=style.qk_norm,
        value_norm=style.value_norm,
        values_are_keys=style.values_are_keys and kind == FULL,
        output_gate=style.output_gate,
        query_growth=style.query_growth,
    )


def _own_values(config: Fields, types: list[str], kind: str) -> Fields:
    """The config, with the values of per_layer_config for the layers of one type, which must be the
    same for all of them, as their rotary embedding is."""
    own = config.values.get(PER_LAYER, {})
    found = [own.get(index, {}) for index, one in enumerate(types) if one == kind]
    if any(one != found[0] for one in found):
        raise config.wrong(PER_LAYER, own, f"the same for every layer of {kind}")
    where = f"{config.where}: {PER_LAYER}" if found[0] else config.where
    return Fields(where, {**config.values, **found[0]})


def _layer_types(config: Fields, style: Style) -> list[str]:
    num_layers = config.integer("num_hidden_layers", 1, MAX_LAYERS)
    if style.windows == "none" and style.delta_net is None:
        return [FULL] * num_layers
    if style.windows == "all_layers":
        return [SLIDING if config.has("sliding_window") else FULL] * num_layers
    types = config.texts("layer_types")
    other = SLIDING if style.delta_net is None else LINEAR
    if not set(types) <= {FULL, other}:
        raise config.unsupported("layer_types", f"{FULL} and {other}")
    if set(types) == {LINEAR}:
        raise config.unsupported("layer_types", f"models with {FULL} in some layers")
    if len(types) != num_layers:
        raise config.wrong("layer_types", types, f"{num_layers} entries, not {len(types)}")
    return types


def _window(config: Fields, layer_type: str, max_positions: int) -> int | None:
    """Sliding window of a layer type: a query at p sees the positions above p - window. None if it
    covers all positions."""
    if layer_type == FULL:
        return None
    if not config.has("sliding_window"):
        raise SubspecError(
            Exit.CORRUPT, f"{config.where}: layer_types has {SLIDING}, sliding_window is off"
        )
    window = config.integer("sliding_window", 1, MAX_POSITIONS)
    return window if window < max_positions else None
