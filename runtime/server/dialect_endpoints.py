"""The endpoints of Responses and Messages, and what they need out of the server's service."""

from collections.abc import Awaitable, Callable

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from subspec.runtime.server import figures
from subspec.runtime.server.dialect import DialectService
from subspec.runtime.server.messages import count_tokens, create_message
from subspec.runtime.server.messages_request import CountTokens, CreateMessage
from subspec.runtime.server.model_info import check_model
from subspec.runtime.server.responses import create_response
from subspec.runtime.server.responses_request import CreateResponse
from subspec.runtime.server.service import Service
from subspec.runtime.server.token_text import chat_logprobs

DialectEndpoint = Callable[[DialectService, Request], Awaitable[Response]]

DIALECT_POSTS: tuple[tuple[str, DialectEndpoint, type[BaseModel]], ...] = (
    ("/v1/responses", create_response, CreateResponse),
    ("/v1/messages", create_message, CreateMessage),
    ("/v1/messages/count_tokens", count_tokens, CountTokens),
)


def dialect_service(service: Service) -> DialectService:
    return DialectService(
        model_id=service.model.id,
        check_model=lambda name: check_model(service.model, name),
        check_ready=service.engine.check_ready,
        chat=service.chat,
        count_tokens=service.count_tokens,
        token_logprobs=lambda found: chat_logprobs(service.tokenizer.tokenizer, found),
        figures=lambda outcome: {
            "metrics": figures.metrics(outcome, service.model),
            "timings": figures.timings(outcome, service.model),
        },
        sampling=service.sampling,
        refuse_unknown=service.refuse_unknown,
    )
