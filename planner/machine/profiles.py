"""Profiles: reading, medians of several, limiting the link, and checking the model they are for."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.codec import load_dataclass
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.profile import Corrections, LinkRate, Profile, Timing, out_of_order
from subspec.planner.model.fields import read_fields


def read_profile(path: Path) -> Profile:
    """Read a profile.json. Raises SubspecError: USAGE if there is no such file, CORRUPT if
    invalid."""
    hint = "give the profile.json of an artifact, or leave --profile out to measure this machine"
    if not path.is_file():
        raise SubspecError(
            Exit.USAGE,
            f"--profile {path} is not a file",
            hint,
        )
    try:
        profile: Profile = load_dataclass(Profile, read_fields(path).values, path.name)
    except SubspecError as error:
        raise SubspecError(error.exit_code, error.message, error.hint or hint) from None
    if wrong := out_of_order(profile):
        raise SubspecError(
            Exit.CORRUPT,
            f"{path.name}.{wrong} is not in order, expected ascending widths or block sizes",
            hint,
        )
    return profile


def shapes_of(spec: ModelSpec | None) -> str:
    """Description of the model shapes that timings depend on, with a digest; "" without a model.
    Models of one architecture and size have the same."""
    if spec is None:
        return ""
    heads = [
        (one.num_heads, one.num_kv_heads, one.head_size, one.window) for one in spec.attentions
    ]
    nets = [net.memory_shape for layer in spec.layers for net in layer.delta_nets]
    matrices = [(one.name, one.out_features, one.in_features) for one in spec.linears]
    digest = hashlib.sha256(repr((heads, nets, matrices)).encode()).hexdigest()[:12]
    dtype = f"FP8 and {spec.dtype}" if spec.fp8 else spec.dtype
    dtype += "" if spec.quantized else " without 4-bit copies"
    return (
        f"{spec.num_layers} layers of {spec.hidden_size}, vocabulary {spec.vocab_size}, {dtype} "
        f"({digest})"
    )


def measured_for(profile: Profile, spec: ModelSpec, draft_model: ModelSpec | None) -> bool:
    wanted = shapes_of(spec), shapes_of(draft_model)
    return (profile.shapes, profile.draft_model_shapes) == wanted


def check_shapes(profile: Profile, spec: ModelSpec, draft_model: ModelSpec | None) -> None:
    """Raise SubspecError(USAGE) if the profile names another model that it was measured for."""
    pairs = [("model", profile.shapes, shapes_of(spec))]
    if profile.has_draft_model:  # if it has none, that is said where one is wanted
        pairs.append(("draft model", profile.draft_model_shapes, shapes_of(draft_model)))
    for what, measured, wanted in pairs:
        if measured and wanted and measured != wanted:
            raise SubspecError(
                Exit.USAGE,
                f"the profile is of another {what}: of {measured}, and this one has {wanted}",
                "give the profile.json of an artifact of this model, or leave --profile out to "
                "measure this machine",
            )


def typical_of(profiles: Sequence[Profile]) -> Profile:
    """One profile with the median of each time and rate of several."""
    found: dict[str, Any] = {}
    for name, first in vars(profiles[0]).items():
        values = [getattr(profile, name) for profile in profiles]
        if isinstance(first, float):
            found[name] = median(values)
        elif isinstance(first, tuple) and first and isinstance(first[0], Timing | LinkRate):
            found[name] = tuple(middle_of(some) for some in zip(*values, strict=True))
    return replace(profiles[0], **found)


def middle_of(some: Sequence[Timing] | Sequence[LinkRate]) -> Timing | LinkRate:
    """Median of timings at one width, or of rates at one block size."""
    timings = [one for one in some if isinstance(one, Timing)]
    if timings:
        return middle_timing(timings)
    rates = [one for one in some if isinstance(one, LinkRate)]
    return LinkRate(rates[0].block_bytes, median(rate.bytes_per_second for rate in rates))


def middle_timing(some: Sequence[Timing]) -> Timing:
    """Median of timings at one width."""
    seconds, slowest = median(t.seconds for t in some), max(t.slowest for t in some)
    return Timing(some[0].width, seconds, slowest)


def under_link(profile: Profile, bytes_per_second: int | None) -> Profile:
    """The profile for a plan with --link-bandwidth; None: without. Correction factors from rounds
    at another speed of the link do not apply, except that of drafts, which stream nothing."""
    corrections = profile.corrections
    if corrections.link_bandwidth != bytes_per_second:
        corrections = Corrections(
            draft=corrections.draft,
            draft_model=corrections.draft_model,
            hierarchical_draft=corrections.hierarchical_draft,
            num_rounds=corrections.num_rounds,
            link_bandwidth=bytes_per_second,
        )
    profile = replace(profile, corrections=corrections)
    return profile if bytes_per_second is None else with_link(profile, bytes_per_second)


def with_link(profile: Profile, bytes_per_second: int) -> Profile:
    """The profile with the link limited to `bytes_per_second`."""
    capped = (
        replace(rate, bytes_per_second=min(rate.bytes_per_second, float(bytes_per_second)))
        for rate in profile.link
    )
    contended_link, contended_compute = profile.contended_shares(bytes_per_second)
    return replace(
        profile,
        link=tuple(capped),
        contended_link=contended_link,
        contended_compute=contended_compute,
    )
