"""generation_config.json: changes to the logits by transformers' generate() that we do not make."""

from pathlib import Path
from typing import Any

from subspec.planner.model.config import CONFIG, GENERATION_CONFIG
from subspec.planner.model.fields import read_fields

# What makes generate() choose other tokens even when it does not sample, and the value that does
# not. Empty and 0 change nothing either.
PROCESSORS: dict[str, float | None] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "dola_layers": None,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "min_length": None,
    "min_new_tokens": None,
    "no_repeat_ngram_size": None,
    "num_beams": 1,
    "penalty_alpha": None,
    "repetition_penalty": 1,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "token_healing": None,
    "watermarking_config": None,
}
MAX_VALUE = 40  # characters of a value that are shown


def read_generation(folder: Path) -> dict[str, Any]:
    """The file's fields; where there is none those of config.json that transformers then takes."""
    if (folder / GENERATION_CONFIG).exists():
        return read_fields(folder / GENERATION_CONFIG).values
    values = read_fields(folder / CONFIG).values
    return {name: values[name] for name in PROCESSORS if values.get(name) is not None}


def generation_notes(generation: dict[str, Any]) -> tuple[str, ...]:
    """One line that names the fields which are not obeyed."""
    found = []
    for name, neutral in PROCESSORS.items():
        value = generation.get(name)
        # A token's id is set even if it is 0.
        is_set = value is not None if name == "forced_eos_token_id" else bool(value)
        if is_set and value != neutral:
            shown = repr(value)
            cut = shown[:MAX_VALUE] + "…" if len(shown) > MAX_VALUE else shown
            found.append(f"{name} {cut}")
    if not found:
        return ()
    return (
        f"{', '.join(found)} in the model's generation settings: transformers' generate() obeys, "
        "subspec does not, so their tokens differ",
    )
