"""Sampling settings for /set in a chat, named as subspec-run's options."""

from dataclasses import replace

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.sequence import GenerationParams

# Name -> parser of its value.
SETTINGS: dict[str, type[int] | type[float]] = {
    "max-tokens": int,
    "temperature": float,
    "top-p": float,
    "top-k": int,
    "min-p": float,
    "repetition-penalty": float,
    "presence-penalty": float,
    "frequency-penalty": float,
    "seed": int,
}
OF_THE_PARAMS = ("max-tokens",)  # all others are in params.sampling


def changed(params: GenerationParams, given: str) -> GenerationParams:
    """Return the params with one setting changed. given: NAME VALUE or NAME=VALUE. Raises
    SubspecError(USAGE)."""
    words = given.replace("=", " ", 1).split()
    name = words[0].replace("_", "-").lower() if words else ""
    if name not in SETTINGS or len(words) != 2:
        message = f"{given[:100]!r} is not a setting and its value"
        raise SubspecError(Exit.USAGE, message, f"the settings are {', '.join(SETTINGS)}")
    read, field = SETTINGS[name], name.replace("-", "_")
    try:
        value = read(words[1])
    except ValueError:
        what = "a whole number" if read is int else "a number"
        message = f"{name} is {words[1][:100]!r}, expected {what}"
        raise SubspecError(Exit.USAGE, message, f"such as /set {name} {read(1)}") from None
    if name in OF_THE_PARAMS:
        return replace(params, **{field: value})  # type: ignore[arg-type]
    return replace(params, sampling=replace(params.sampling, **{field: value}))  # type: ignore[arg-type]


def described(params: GenerationParams) -> str:
    """Format every setting and its value, one per line."""
    lines = []
    for name in SETTINGS:
        owner = params if name in OF_THE_PARAMS else params.sampling
        lines.append(f"  {name:<20} {getattr(owner, name.replace('-', '_'))}")
    return "\n".join(lines)
