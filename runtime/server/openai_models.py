"""GET /v1/models and /props, POST /tokenize and /detokenize: model description and tokenizer."""

import asyncio
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tokenizers import Tokenizer

from subspec.runtime.lossy import verification_json
from subspec.runtime.server.errors import invalid
from subspec.runtime.server.model_info import ModelInfo, check_model
from subspec.runtime.server.openai_fields import DetokenizeFields, TokenizeFields
from subspec.runtime.server.request_bodies import read_body
from subspec.runtime.server.service import Service
from subspec.runtime.server.token_text import token_text
from subspec.runtime.text.tokenizer import MAX_COUNTED

JSON = dict[str, Any]
MAX_TEXTS = 1 << 16  # most tokens returned with their texts


async def list_models(service: Service, request: Request) -> Response:
    """data: OpenAI's; models: llama.cpp's, in Ollama's form."""
    model = service.model
    named = {
        "name": model.id,
        "model": model.id,
        "type": "model",
        "capabilities": ["completion"],
        "details": {"format": "subspec"},
        "context_length": model.context,
    }
    return JSONResponse({"object": "list", "data": [model_card(model)], "models": [named]})


async def one_model(service: Service, request: Request) -> Response:
    check_model(service.model, request.path_params["model"])
    return JSONResponse(model_card(service.model))


def model_card(model: ModelInfo) -> JSON:
    """One model's entry, with the context in every spelling that clients read."""
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "subspec",
        "max_model_len": model.context,
        "context_length": model.context,
        "context_window": model.context,
        "meta": {
            "n_ctx": model.context,
            "n_ctx_train": model.max_positions,
            "n_vocab": model.vocab_size,
            "size": model.weight_bytes,
        },
    }


async def props(service: Service, request: Request) -> Response:
    """llama.cpp's /props, reduced to the fields that clients read."""
    model, text, sampling = service.model, service.tokenizer, service.sampling
    params = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "n_predict": -1,
    }
    return JSONResponse(
        {
            "default_generation_settings": {"n_ctx": model.context, "params": params},
            "total_slots": model.num_sequences,
            "model_alias": model.id,
            "model_path": model.id,
            "modalities": {"vision": False, "audio": False},
            "chat_template": text.template or "",
            "chat_template_caps": dict(service.template_caps),
            "bos_token": text.special_tokens.get("bos_token") or "",
            "eos_token": text.special_tokens.get("eos_token") or "",
            "build_info": f"subspec {version('subspec')}",
            "is_sleeping": False,
            "memory": {
                "budget_bytes": model.budget_bytes,
                "peak_bytes": service.engine.engine.peak_bytes,
            },
            "subspec": {
                "method": model.method,
                "draft_width": model.width,
                "draft_depth": model.depth,
                "predicted_tokens_per_second": model.predicted_tokens_per_second,
                **verification_json(model.lossy),
            },
        }
    )


async def tokenize(service: Service, request: Request) -> Response:
    """Tokenize. llama.cpp's `content` adds special tokens on request, vLLM's `prompt` by
    default."""
    refused = {"messages": (), "parse_special": (True,)}
    asked = await read_body(request, TokenizeFields, refused, service.refuse_unknown)
    check_model(service.model, asked.model)
    text = asked.prompt if asked.prompt is not None else asked.content
    if text is None:
        raise invalid("content is missing", "content", "missing_required_parameter")
    adds = asked.add_special_tokens if asked.prompt is not None else asked.add_special
    special = asked.prompt is not None if adds is None else adds
    tokenizer = service.tokenizer

    def answer() -> Response:
        if tokenizer.is_longer(text, MAX_COUNTED):
            param = "content" if asked.prompt is None else "prompt"
            raise invalid(f"{param} has more than {MAX_COUNTED} tokens", param)
        ids = tokenizer.plain_ids(text) if special else tokenizer.rendered_ids(text)
        return JSONResponse(token_list(ids, asked, service))

    return await asyncio.to_thread(answer)


def token_list(ids: list[int], asked: TokenizeFields, service: Service) -> JSON:
    """The response's body. Raises ApiError for the texts of too many tokens."""
    tokenizer = service.tokenizer.tokenizer
    body: JSON = {"tokens": ids, "count": len(ids), "max_model_len": service.model.context}
    texts = "with_pieces" if asked.with_pieces else "return_token_strs"
    if len(ids) > MAX_TEXTS and (asked.with_pieces or asked.return_token_strs):
        raise invalid(f"{texts} is for at most {MAX_TEXTS} tokens, these are {len(ids)}", texts)
    if asked.with_pieces:
        body["tokens"] = [{"id": one, "piece": token_text(tokenizer, one)} for one in ids]
    if asked.return_token_strs:
        body["token_strs"] = [tokenizer.id_to_token(one) for one in ids]
    return body


async def detokenize(service: Service, request: Request) -> Response:
    asked = await read_body(request, DetokenizeFields, {}, service.refuse_unknown)
    check_model(service.model, asked.model)
    size = service.model.vocab_size
    if (wrong := next((one for one in asked.tokens if one >= size), None)) is not None:
        raise invalid(f"tokens has {wrong}, expected ids below {size}", "tokens")

    def answer() -> Response:
        text = text_of(service.tokenizer.tokenizer, asked.tokens)
        return JSONResponse({"content": text, "prompt": text})

    return await asyncio.to_thread(answer)


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decode in one batch, which releases the GIL: there may be a million tokens."""
    (text,) = tokenizer.decode_batch([ids], skip_special_tokens=False)
    return str(text)
