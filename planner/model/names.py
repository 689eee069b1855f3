"""Names of a decoder's tensors in checkpoints."""

from subspec.artifacts.model import HEAD

# What a decoder's names begin with, canonical and elsewhere: the bare decoder and the wrapped one,
# and inside a multimodal model, as transformers writes it today and as transformers 4 did.
PREFIXES = ("model.", "", "model.model.", "model.language_model.", "language_model.model.")
HEADS = (f"{HEAD}.weight", f"language_model.{HEAD}.weight", f"model.{HEAD}.weight")
HEAD_WEIGHT = HEADS[0]


def stored_names(name: str) -> tuple[str, ...]:
    """Names that a checkpoint may have for a canonical tensor. Each tensor is looked up on its own,
    as in transformers: merged checkpoints mix prefixes."""
    if name == HEAD_WEIGHT:
        return HEADS
    return tuple(prefix + name.removeprefix(PREFIXES[0]) for prefix in PREFIXES)
