"""The fields of OpenAI's requests and vLLM's and llama.cpp's extensions: supported, refused,
ignored. docs/server.md lists them."""

import secrets
from typing import Annotated, Any

from pydantic import Field, field_validator

from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.server.chat_events import JSONValue
from subspec.runtime.server.errors import invalid
from subspec.runtime.server.model_info import ModelInfo
from subspec.runtime.server.request_bodies import Fields

MAX_STOPS = 16
MAX_STOP = 256  # characters
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_TOKENS = 1 << 30
MAX_SCHEMA_TEXT = 1 << 16  # characters of a regular expression or a grammar

Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]

# Known unsupported fields, with the values besides null that have no effect.
REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "typical_p": (1, 1.0),
    "typ_p": (1, 1.0),
    "mirostat": (0,),
    "dynatemp_range": (0, 0.0),
    "xtc_probability": (0, 0.0),
    "dry_multiplier": (0, 0.0),
    "bad_words": ([],),
    "stop_token_ids": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "grammar": ("",),
    "json_schema": (),
    "priority": (0,),
}
REFUSED_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {**REFUSED, "suffix": ("",)}


# Clients' value -> template's value. Other values use the template's default.
EFFORTS = {
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "xhigh",
    "max": "xhigh",
}


class StreamOptions(Fields):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: in every chunk


class StructuredOutputs(Fields):
    """vLLM's structured_outputs; exactly one is given."""

    json_schema: dict[str, JSONValue] | None = Field(None, alias="json")
    regex: Annotated[str, Field(max_length=MAX_SCHEMA_TEXT)] | None = None
    grammar: Annotated[str, Field(max_length=MAX_SCHEMA_TEXT)] | None = None


class SamplingFields(Fields):
    """Fields of both chat and text completions."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None

    @field_validator("stop")
    @classmethod
    def few_and_short(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop texts")
        if not all(0 < len(one) <= MAX_STOP for one in texts):
            raise ValueError(f"a stop text has 1 to {MAX_STOP} characters")
        return stop

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        options = self.stream_options
        return bool(options and options.include_usage and options.continuous_usage_stats)


def sampling_of(asked: SamplingFields, usual: SamplingParams, model: ModelInfo) -> SamplingParams:
    """Return the sampling parameters. usual: server defaults. Without a seed, or with -1, each
    answer gets its own."""
    given = {
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "min_p": asked.min_p,
        "repetition_penalty": asked.repetition_penalty,
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
    }
    chosen = {
        name: getattr(usual, name) if value is None else value for name, value in given.items()
    }
    seed = asked.seed % (1 << 63) if asked.seed not in (None, -1) else secrets.randbits(63)
    return SamplingParams(
        **chosen,
        top_k=usual.top_k if asked.top_k is None else max(0, asked.top_k),
        seed=seed,
        logit_bias=bias_of(asked.logit_bias or {}, model.vocab_size),
    )


def bias_of(given: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    if len(given) > MAX_BIASES:
        message = f"logit_bias has {len(given)} tokens, expected at most {MAX_BIASES}"
        raise invalid(message, "logit_bias")
    found = []
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            message = f"logit_bias has the key {key[:40]!r}, expected a token id below {vocab_size}"
            raise invalid(message, "logit_bias")
        found.append((int(key), bias))
    return tuple(found)


# /v1/completions

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]
MAX_PROMPTS = 256


class CompletionFields(SamplingFields):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


# /tokenize, /detokenize


class TokenizeFields(Fields):
    """content, add_special: llama.cpp's; prompt, add_special_tokens: vLLM's."""

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    with_pieces: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeFields(Fields):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=1 << 31)]]
