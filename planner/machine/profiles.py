"""Profiles from a file, from several measurements, and with a limited link."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.codec import load_dataclass
from subspec.artifacts.profile import Corrections, LinkRate, Profile, Timing, out_of_order
from subspec.planner.model.fields import read_fields


def read_profile(path: Path) -> Profile:
    """Read a profile.json. Raises SubspecError: USAGE if there is no such file, CORRUPT if
    invalid."""
    if not path.is_file():
        raise SubspecError(
            Exit.USAGE,
            f"--profile {path} is not a file",
            "give the profile.json of an artifact, or leave --profile out to measure",
        )
    profile: Profile = load_dataclass(Profile, read_fields(path).values, path.name)
    if wrong := out_of_order(profile):
        raise SubspecError(
            Exit.CORRUPT,
            f"{path.name}.{wrong} is not in order, expected ascending widths or block sizes",
            "leave --profile out to measure this machine",
        )
    return profile


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
    """Of timings at one width."""
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
            checked_draft=corrections.checked_draft,
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
