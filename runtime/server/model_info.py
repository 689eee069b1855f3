"""The model's description for clients."""

from dataclasses import dataclass

from subspec.artifacts.plan import Method
from subspec.runtime.lossy import Lossy
from subspec.runtime.server.errors import FINAL, ApiError


@dataclass(frozen=True)
class ModelInfo:
    """names: accepted aliases. width, depth: of the draft; 0 without one."""

    id: str
    created: int  # Unix time
    context: int
    vocab_size: int
    end_tokens: frozenset[int]
    method: Method
    width: int
    depth: int
    num_sequences: int
    max_positions: int  # maximum in training
    weight_bytes: int
    budget_bytes: int  # of fast memory
    predicted_tokens_per_second: float | None = None  # None: the plan predicts no such answers
    names: frozenset[str] = frozenset()
    lossy: Lossy | None = None  # verification rule of its answers; None: exact


def check_model(model: ModelInfo, asked: str | None) -> None:
    """Raise ApiError(404) for another model than ours; None is accepted."""
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
