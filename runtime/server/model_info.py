"""The model as clients see it."""

from dataclasses import dataclass

from subspec.artifacts.plan import Method
from subspec.runtime.lossy import Lossy
from subspec.runtime.server.errors import FINAL, ApiError


@dataclass(frozen=True)
class ModelInfo:
    """names: others by which it may be asked for. width, depth: of the
    draft; 0 without one."""

    id: str
    created: int  # Unix time
    context: int
    vocab_size: int
    end_tokens: frozenset[int]
    method: Method
    width: int
    depth: int
    num_sequences: int
    max_positions: int  # that the model was trained for
    weight_bytes: int
    budget_bytes: int  # of fast memory
    predicted_tokens_per_second: float | None = None
    names: frozenset[str] = frozenset()
    lossy: Lossy | None = None  # the rule by which its answers are verified; None: exactly


def check_model(model: ModelInfo, asked: str | None) -> None:
    """Raises ApiError(404) for another model than ours; None asks for the one there is."""
    if asked is None or asked == model.id or asked in model.names:
        return
    shown = asked[:100]
    raise ApiError(
        404,
        f"The model {shown!r} does not exist; this server has {model.id!r}",
        code="model_not_found",
        param="model",
        headers=FINAL,
    )
