"""The parsed command line of subspec-serve, and checks of option combinations."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from subspec.artifacts.common.command import size_option
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.app.opening_options import (
    OPENING,
    OpeningOptions,
    check_opening,
    option_with_default_of,
)

MAX_KEY_FILE = 64 << 10  # bytes
KEY = re.compile(r"[\x21-\x7e]{1,512}")  # valid in a header
ORIGIN = re.compile(r"\*|https?://[^\s/@?#]+|[a-z][a-z0-9+.-]*://[^\s/@?#]*", re.ASCII)
MODEL_NAME = re.compile(r"[A-Za-z0-9._:/@-]{1,128}")
KEY_VARIABLE = "SUBSPEC_API_KEY"
RULES = replace(OPENING, excludes=(*OPENING.excludes, ("artifact", "model")))


@dataclass(frozen=True)
class Options(OpeningOptions):
    """Options as parsed by click."""

    artifact: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    insecure_no_auth: bool = False
    cors_origin: tuple[str, ...] = ()
    model_name: str | None = None
    queue: int = 8
    prefix_cache: int = 0
    shutdown_timeout: float = 30.0
    log_format: str = "text"
    strict: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


option = option_with_default_of(Options)


def matching(
    pattern: re.Pattern[str], expected: str
) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return a callback that refuses text not matching the pattern."""

    def check(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        given = value if isinstance(value, tuple) else (value,) if value is not None else ()
        for one in given:
            if pattern.fullmatch(one) is None:
                raise click.BadParameter(f"{one!r} is not {expected}")
        return value

    return check


def no_size_or_size(context: click.Context, parameter: click.Parameter, value: Any) -> int | None:
    return 0 if value in (0, "0") else size_option(context, parameter, value)


def check_options(options: Options, keys: tuple[str, ...]) -> None:
    """Raise SubspecError(USAGE) for combinations that click cannot check."""
    if options.artifact is None and options.model is None:
        message = "neither an ARTIFACT nor --model REF was given"
        raise SubspecError(Exit.USAGE, message, "such as subspec-serve --model demo --vram 9MB")
    if options.artifact is not None and options.model is not None:
        message = f"an ARTIFACT, {options.artifact}, and --model exclude each other"
        raise SubspecError(Exit.USAGE, message, "leave one out")
    check_opening(options)
    from subspec.runtime.server.middleware import is_loopback

    if not keys and not options.insecure_no_auth and not is_loopback(options.host):
        raise SubspecError(
            Exit.USAGE,
            f"--host {options.host} accepts other machines, but there is no API key",
            f"give --api-key-file FILE or {KEY_VARIABLE}; or allow access with --insecure-no-auth",
        )


def api_keys(file: Path | None, variable: str | None) -> tuple[str, ...]:
    """Read keys from the environment and from the file, one per line. Raises SubspecError(USAGE),
    also if either is given but empty, since the server would be open to all."""
    places = []
    if variable is not None:
        places.append((KEY_VARIABLE, [variable]))
    if file is not None:
        try:
            with open(file, "rb") as opened:
                lines = opened.read(MAX_KEY_FILE).decode("utf-8").splitlines()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            message = f"--api-key-file {file} cannot be read: {reason}"
            raise SubspecError(Exit.USAGE, message, "give a file with one key per line") from None
        places.append((f"--api-key-file {file}", lines))
    keys = []
    for place, lines in places:
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise SubspecError(Exit.USAGE, f"{place} has no key", "write one, or leave it out")
        if not all(KEY.fullmatch(key) for key in found):
            message = f"a key of {place} is not printable ASCII without spaces"
            raise SubspecError(Exit.USAGE, message, "such as 32 hexadecimal digits")
        keys += found
    return tuple(keys)
