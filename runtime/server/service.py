"""The endpoints' dependencies: model, tokenizer, engine and defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.server.admission import Admission
from subspec.runtime.server.chat_events import Chat, CountTokens
from subspec.runtime.server.metrics import Metrics
from subspec.runtime.server.model_info import ModelInfo
from subspec.runtime.text.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Service:
    model: ModelInfo
    tokenizer: ChatTokenizer
    engine: Admission
    chat: Chat
    count_tokens: CountTokens  # number of tokens of a request's prompt
    metrics: Metrics
    sampling: SamplingParams = SamplingParams()  # defaults for requests
    refuse_unknown: bool = False  # fields of requests
    template_caps: Mapping[str, bool] = field(default_factory=dict)
