"""rope_parameters of transformers' config object -> Rope, and how far positions reach."""

import math
from collections.abc import Iterator

from subspec.artifacts.model import Rope
from subspec.planner.model.fields import MAX_POSITIONS, Fields

KINDS = ("default", "linear", "llama3", "yarn", "longrope", "proportional")
BOUNDS = {
    "rope_theta": (2.0, 1e18),
    "rope_local_base_freq": (2.0, 1e18),
    "partial_rotary_factor": (1e-3, 1.0),
    "factor": (1.0, 1e6),
    "low_freq_factor": (1e-3, 1e6),
    "high_freq_factor": (1e-3, 1e6),
    "beta_fast": (0.0, 1e6),
    "beta_slow": (0.0, 1e6),
    "mscale": (0.0, 1e3),
    "mscale_all_dim": (0.0, 1e3),
    "attention_factor": (1e-3, 1e3),
    "llama_4_scaling_beta": (0.0, 1e3),
}
ORIGINAL = "original_max_position_embeddings"
DIVISORS = (1e-3, 1e6)
COMPUTED_WITH = {*BOUNDS, ORIGINAL, "rope_type", "type", "truncate", "short_factor", "long_factor"}
# In a text all axes have one position; how a model was trained, and the config's own number again.
WITHOUT_EFFECT = {"mrope_section", "mrope_interleaved", "finetuned", "max_position_embeddings"}
MAX_SHOWN = 4


def check_rope(config: Fields) -> None:
    """Raise SubspecError for numbers of config.json that are invalid in a rotary embedding:
    transformers divides by some and compares others before it checks them."""
    for fields in (config, *_objects(config)):
        for name, (low, high) in BOUNDS.items():
            if fields.has(name):
                fields.number(name, low, high)
        if fields.has(ORIGINAL):
            fields.integer(ORIGINAL, 1, MAX_POSITIONS)
        for name in ("rope_type", "type"):
            if fields.has(name):
                fields.text(name)


def rope_notes(config: Fields) -> tuple[str, ...]:
    """Notes for the user on rotary-embedding fields of config.json that transformers ignores (it
    warns that they are unrecognized), such as attn_factor, which vLLM applies."""
    notes = []
    for fields in _objects(config):
        values = {name: one for name, one in fields.values.items() if not isinstance(one, dict)}
        unknown = [
            f"{name[:60]} {value!r:.40}"
            for name, value in sorted(values.items())
            if value is not None and name not in COMPUTED_WITH | WITHOUT_EFFECT
        ]
        if unknown:
            others = ", ..." if len(unknown) > MAX_SHOWN else ""
            notes.append(
                f"{fields.where} has {', '.join(unknown[:MAX_SHOWN])}{others}: transformers does "
                "not compute with it, nor does subspec; the tokens of an engine that does differ"
            )
    return tuple(notes)


def read_rope(
    config: Fields, layer_type: str, head_size: int, interleaved: bool, may_be_partial: bool
) -> Rope:
    """The rotary embedding of layers of one type. config: transformers' object, in which all values
    are in place."""
    values = rope_values(config, layer_type)
    size, kind, share = head_size, values.text("rope_type"), 1.0
    if values.has("partial_rotary_factor"):
        share = values.number("partial_rotary_factor", *BOUNDS["partial_rotary_factor"])
    if kind != "proportional":
        if share != 1.0 and not may_be_partial:
            raise values.unsupported("partial_rotary_factor", "1 for this family")
        size = int(head_size * share)
        if size % 2 or not size:
            raise values.wrong("partial_rotary_factor", share, f"an even share of {head_size}")
    theta = values.number("rope_theta", *BOUNDS["rope_theta"])
    if kind == "default":
        return Rope(theta, size, interleaved=interleaved)
    if kind == "linear":
        return Rope(theta, size, "linear", interleaved, values.number("factor", *BOUNDS["factor"]))
    if kind == "llama3":
        return _llama3(values, theta, size, interleaved)
    if kind == "yarn":
        # transformers looks for `truncate` beside the layer types, not inside them.
        truncate = config.values["rope_parameters"].get("truncate", True)
        if type(truncate) is not bool:
            raise values.wrong("truncate", truncate, "true or false")
        return _yarn(values, theta, size, interleaved, truncate)
    if kind == "longrope":
        return _longrope(config, values, theta, size, interleaved)
    if kind == "proportional":
        factor = values.number("factor", *BOUNDS["factor"], 1.0)
        pairs = int(share * head_size // 2)
        return Rope(theta, size, "proportional", interleaved, factor, turning_pairs=pairs)
    raise values.unsupported("rope_type", ", ".join(KINDS))


def reach(config: Fields) -> int:
    """The positions that a model may use. yarn reaches beyond max_position_embeddings; longrope has
    other frequencies beyond its original positions, for all tokens at once: it ends there."""
    positions = config.integer("max_position_embeddings", 1, MAX_POSITIONS)
    for values in _objects(config):
        kind = values.values.get("rope_type")
        if kind == "longrope":
            positions = min(positions, values.integer(ORIGINAL, 2, MAX_POSITIONS))
        if kind == "yarn":
            scaled = _original(values) * values.number("factor", *BOUNDS["factor"])
            positions = max(positions, min(int(scaled), MAX_POSITIONS))
    return positions


def rope_values(config: Fields, layer_type: str) -> Fields:
    """rope_parameters, or their entry for this type of layers."""
    name = "rope_parameters"
    values = config.values.get(name)
    if isinstance(values, dict) and isinstance(values.get(layer_type), dict):
        return Fields(f"{config.where}: {name}.{layer_type}", values[layer_type])
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise config.wrong(name, values, "an object, or one for each of layer_types")
    return Fields(f"{config.where}: {name}", values)


def _objects(config: Fields) -> Iterator[Fields]:
    """The objects that describe rotary embeddings: rope_parameters, or its entries for layer
    types."""
    for name in ("rope_parameters", "rope_scaling"):
        values = config.values.get(name) or {}
        if not isinstance(values, dict):
            raise config.wrong(name, values, "an object")
        yield Fields(f"{config.where}: {name}", values)
        for layer_type, inner in values.items():
            if isinstance(inner, dict):
                yield Fields(f"{config.where}: {name}.{layer_type[:60]}", inner)


def _original(values: Fields) -> int:
    return values.integer(ORIGINAL, 1, MAX_POSITIONS)


def _llama3(values: Fields, theta: float, size: int, interleaved: bool) -> Rope:
    low = values.number("low_freq_factor", *BOUNDS["low_freq_factor"])
    high = values.number("high_freq_factor", *BOUNDS["high_freq_factor"])
    if high <= low:
        raise values.wrong("high_freq_factor", high, f"more than low_freq_factor, {low:g}")
    factor = values.number("factor", *BOUNDS["factor"])
    return Rope(theta, size, "llama3", interleaved, factor, _original(values), low, high)


def _yarn(values: Fields, theta: float, size: int, interleaved: bool, truncate: bool) -> Rope:
    factor = values.number("factor", *BOUNDS["factor"])

    def gain(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    attention_factor = gain(1.0)
    mscale = values.number("mscale", *BOUNDS["mscale"], 0.0)
    mscale_all = values.number("mscale_all_dim", *BOUNDS["mscale_all_dim"], 0.0)
    if mscale and mscale_all:
        attention_factor = gain(mscale) / gain(mscale_all)
    return Rope(
        theta,
        size,
        "yarn",
        interleaved,
        factor,
        _original(values),
        # 0 counts as left out there.
        beta_fast=values.number("beta_fast", *BOUNDS["beta_fast"], 32.0) or 32.0,
        beta_slow=values.number("beta_slow", *BOUNDS["beta_slow"], 1.0) or 1.0,
        truncate=truncate,
        attention_factor=values.number(
            "attention_factor", *BOUNDS["attention_factor"], attention_factor
        ),
    )


def _longrope(config: Fields, values: Fields, theta: float, size: int, interleaved: bool) -> Rope:
    original = values.integer(ORIGINAL, 2, MAX_POSITIONS)
    positions = config.integer("max_position_embeddings", 1, MAX_POSITIONS)
    factor = values.number("factor", *BOUNDS["factor"], max(1.0, positions / original))
    attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    return Rope(
        theta,
        size,
        "longrope",
        interleaved,
        attention_factor=values.number(
            "attention_factor", *BOUNDS["attention_factor"], attention_factor
        ),
        divisors=values.numbers("short_factor", *DIVISORS, size // 2),
    )
