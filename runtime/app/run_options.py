"""The parsed command line of subspec-run, and checks of option combinations."""

import re
from dataclasses import dataclass, replace

import click

from subspec.artifacts.common.command import HINT
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.precedence import Rules
from subspec.runtime.app.opening_options import (
    OPENING,
    OpeningOptions,
    check_opening,
    option_with_default_of,
)

BIAS = re.compile(r"([0-9]{1,9})=([+-]?[0-9]{1,9}(?:\.[0-9]{1,9})?)", re.ASCII)
MAX_LOGPROBS = 20  # likeliest tokens reported with each token


@dataclass(frozen=True)
class Options(OpeningOptions):
    """Options as parsed by click."""

    artifact: str | None = None
    prompt: str | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop: tuple[str, ...] = ()
    system: str | None = None
    raw: bool = False
    chat: bool = False
    unpadded: bool = False
    logprobs: int | None = None
    as_json: bool = False
    check: bool = False
    full: bool = False
    stats: bool = False


RULES = Rules(
    needs=(
        *OPENING.needs, ("full", "check"), ("unpadded", "no_speculation"), ("sequences", "model"),
        ("logprobs", "as_json"),
    ),
    excludes=(
        *OPENING.excludes, ("artifact", "model"), ("as_json", "chat"), ("raw", "chat"),
        ("raw", "system"), ("stats", "prompt"), ("stats", "chat"), ("stats", "check"),
    ),
    # With --model the only positional argument is PROMPT.
    only_if={**OPENING.only_if, ("artifact", "model"): lambda given: given["prompt"] is not None},
)  # fmt: skip


option = option_with_default_of(Options)


def bias_option(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[int, float], ...]:
    """Parse repeated ID=BIAS into pairs."""
    found = dict[int, float]()
    for value in values:
        match = BIAS.fullmatch(value)
        if match is None:
            raise click.BadParameter(
                f"{value!r} is not a token id and a bias{HINT}"
                "such as 198=-5, or 198=-100 to forbid it"
            )
        token = int(match[1])
        if token in found:
            raise click.BadParameter(f"token {token} has a bias already{HINT}leave one out")
        found[token] = float(match[2])
    return tuple(found.items())


def arranged(options: Options) -> Options:
    """Assign positional arguments: with --model the only one is PROMPT. Raises
    SubspecError(USAGE)."""
    if options.model is None:
        if options.artifact is None:
            raise SubspecError(
                Exit.USAGE,
                "neither an ARTIFACT nor --model REF was given",
                'such as subspec-run --model demo --vram 9MB "def f("',
            )
        return options
    if options.prompt is not None:
        raise SubspecError(
            Exit.USAGE,
            f"an ARTIFACT, {options.artifact}, and --model exclude each other",
            "leave one out; text with spaces is one argument only in quotes",
        )
    return replace(options, artifact=None, prompt=options.artifact)


def check_options(options: Options) -> None:
    """Raise SubspecError(USAGE) for combinations that click cannot check."""
    check_opening(options, RULES)
    if "" in options.stop:
        raise SubspecError(Exit.USAGE, "--stop is empty", "give the text that ends the answer")
    try:
        words = (
            options.prompt,
            options.system,
            options.model,
            options.draft_model,
            options.rehearse,
            *options.stop,
        )
        "".join(word or "" for word in words).encode("utf-8")
    except UnicodeEncodeError:  # surrogates stand for bytes that are not UTF-8
        raise SubspecError(Exit.USAGE, "an argument is not UTF-8", "convert it to UTF-8") from None
