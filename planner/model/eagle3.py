"""A published head of EAGLE-3 (arXiv 2503.01840): what its config.json and its tensors say.

Two forms of config.json are common. The method's own, which SpecForge and SGLang share, is that of
a model of the one layer; `eagle_config` may name the layers whose results the head reads. That of
speculators and vLLM may have this model inside, and names the layers before which it reads.
"""

from typing import TYPE_CHECKING

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import HIDDEN_NORM, TOKEN_IDS, Eagle3, ModelSpec
from subspec.planner.model.config import ARCHITECTURES, CONFIG
from subspec.planner.model.fields import MAX_LAYERS, Fields
from subspec.planner.model.stored import AGAIN, Rows, StoredTensor, read_pieces, read_small

if TYPE_CHECKING:
    from torch import Tensor

MIDLAYER = "midlayer"  # its layer's name in most checkpoints
OFFSETS = "d2t"  # of each token that it has logits of: the model's id, less its own
NOT_READ = "t2d"  # says the same
MARKS = (MIDLAYER, OFFSETS, NOT_READ)
INNER = "transformer_layer_config"
READS = "eagle_aux_hidden_state_layer_ids"
COMPARED_ROWS = 1024  # of embeddings, at a time
MAX_DIFFERENCE = 2.0**-6  # between a model's embedding and a head's copy, of the largest entry


def is_eagle3(tensors: dict[str, StoredTensor]) -> bool:
    """Return True if the stored names are those of an EAGLE-3 head."""
    return f"{HIDDEN_NORM}.weight" in tensors or any(n.split(".")[0] in MARKS for n in tensors)


def decoder_fields(written: Fields) -> Fields:
    """The fields of the head's layer as those of a one-layer model."""
    inner = written.values[INNER] if written.has(INNER) else written.values
    if not isinstance(inner, dict):
        raise written.wrong(INNER, inner, "an object")
    fields = Fields(written.where, inner)
    known = ARCHITECTURES.get(fields.text("model_type", ""))
    return Fields(written.where, {**inner, "architectures": [known]}) if known else fields


def eagle3_of(written: Fields, model: ModelSpec) -> Eagle3:
    """Eagle3 of a head's config. Raises SubspecError: UNSUPPORTED for what we do not compute,
    CORRUPT for invalid content."""
    eagle_config = written.values.get("eagle_config") or {}
    if not isinstance(eagle_config, dict):
        raise written.wrong("eagle_config", eagle_config, "an object")
    nested = Fields(f"{CONFIG}: eagle_config", eagle_config)
    for name in ("norm_before_fc", "fc_norm", "norm_output", "parallel_drafting"):
        for fields in (written, nested):
            if fields.values.get(name):
                raise fields.unsupported(name, "heads without it")
    if not nested.flag("use_aux_hidden_state", True):
        raise nested.unsupported("use_aux_hidden_state", "true")
    return Eagle3(
        reads=layers_read(written, nested, model.num_layers),
        vocab_size=written.integer("draft_vocab_size", 1, model.vocab_size, model.vocab_size),
        norm_before_residual=written.flag("norm_before_residual", written.has(INNER)),
    )


def layers_read(written: Fields, nested: Fields, num_layers: int) -> tuple[int, ...]:
    """Layers before which the head reads; num_layers: after the last one."""
    if written.has(READS):
        fields, first = written, 0
    elif nested.has(READS):
        fields, first = nested, 1
    else:
        low_middle_high = 2, num_layers // 2, num_layers - 3
        if num_layers < 7:
            message = (
                f"{CONFIG} has no {READS}, and of {num_layers} layers none are read by default"
            )
            raise SubspecError(Exit.CORRUPT, message, f"add {READS}")
        return low_middle_high
    given = fields.values[READS]
    expected = f"a list of different layers, {-first} to {num_layers - first}"
    if not isinstance(given, list) or not 1 <= len(given) <= 16:
        raise fields.wrong(READS, given, expected)
    whole = all(type(one) is int and -MAX_LAYERS < one < MAX_LAYERS for one in given)
    found = tuple(one + first for one in given) if whole else ()
    if len(set(found)) < len(given) or not all(0 <= one <= num_layers for one in found):
        raise fields.wrong(READS, given, expected)
    return found


def renamed(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by their names in an artifact."""
    found = {}
    for name, tensor in tensors.items():
        first, dot, rest = name.partition(".")
        own = {MIDLAYER: "layers.0", OFFSETS: TOKEN_IDS}.get(first, first)
        found[own + dot + rest] = tensor
    return found


def token_ids(tensor: StoredTensor, vocab_size: int) -> "Tensor":
    """The model's tokens that the head has logits of, int64 [tokens]. Raises SubspecError(CORRUPT)
    unless they are different tokens of the vocabulary."""
    import torch  # not needed for headers

    offsets = read_small(tensor).to(torch.int64)
    found = offsets + torch.arange(len(offsets))
    if int(found.min()) < 0 or int(found.max()) >= vocab_size or len(found.unique()) < len(found):
        message = f"{tensor.name} does not lead to different tokens of the {vocab_size}"
        raise SubspecError(Exit.CORRUPT, message, AGAIN)
    return found


def check_embedding(own: StoredTensor, models: Rows) -> None:
    """Raises SubspecError(UNSUPPORTED) if the embedding beside the head is not the model's, but for
    another rounding."""
    import torch

    for first in range(0, models.count, COMPARED_ROWS):
        count = min(COMPARED_ROWS, models.count - first)
        both = Rows(models.tensor, models.first + first, count), Rows(own, first, count)
        ours, theirs = (torch.cat([*read_pieces(one)]).float() for one in both)
        if not bool(((ours - theirs).abs() <= MAX_DIFFERENCE * ours.abs().max()).all()):
            raise SubspecError(
                Exit.UNSUPPORTED,
                f"{own.name} is not the embedding of its model",
                "give a head that was trained with the model's own embedding",
            )
