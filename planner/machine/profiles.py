"""A Profile that was measured before, read with distrust; and one with a slower link."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.codec import load_dataclass
from subspec.artifacts.profile import Corrections, LinkRate, Profile, Timing
from subspec.planner.model.fields import read_fields

FASTEST = 1e15  # bytes a second
SHORTEST, LONGEST = 1e-9, 1e6  # seconds of anything that is timed


def read_profile(path: Path) -> Profile:
    """Raises SubspecError: USAGE if there is no such file, CORRUPT for what makes no sense."""
    if not path.is_file():
        raise SubspecError(
            Exit.USAGE,
            f"--profile {path} is not a file",
            "give the profile.json of an artifact, or leave --profile out to measure",
        )
    profile: Profile = load_dataclass(Profile, read_fields(path).values, path.name)
    wrong = first_fault(profile)
    if wrong:
        raise SubspecError(
            Exit.CORRUPT, f"{path.name}: {wrong}", "leave --profile out to measure this machine"
        )
    return profile


def first_fault(profile: Profile) -> str:
    """What no measurement gives, if there is any of it; "" otherwise."""
    rates = profile.link
    if not rates or any(a.block_bytes >= b.block_bytes for a, b in pairwise(rates)):
        return "link is not a list of rates with ascending block_bytes"
    if any(r.block_bytes < 1 or not 1 <= r.bytes_per_second <= FASTEST for r in rates):
        return f"link has a rate that is not from 1 to {FASTEST:g} bytes a second"
    timings = {
        "exact_layer": profile.exact_layer,
        "draft_layer": profile.draft_layer,
        "fast_layer": profile.fast_layer,
        "exact_attention": profile.exact_attention,
        "fast_attention": profile.fast_attention,
        "draft_attention": profile.draft_attention,
        "exact_head": profile.exact_head,
        "draft_head": profile.draft_head,
    }
    for name, points in timings.items():
        if not are_timings(points):
            return f"{name} is not a list of timings with ascending widths"
    seconds = [point.seconds for points in timings.values() for point in points]
    if (
        not all(SHORTEST <= s <= LONGEST for s in seconds)
        or not 0 <= profile.round_seconds < LONGEST
    ):
        return f"a time is not from {SHORTEST:g} to {LONGEST:g} seconds"
    for name, rate in (
        ("decode", profile.residual_weights_per_second),
        ("digest", profile.digest_rate),
    ):
        if not 0 <= rate <= FASTEST:
            return f"{name}_rate is not from 0 to {FASTEST:g} a second"
    if not all(0.01 <= share <= 1 for share in (profile.contended_link, profile.contended_compute)):
        return "contended_link or contended_compute is not from 0.01 to 1"
    corrections = profile.corrections
    factors = (corrections.draft, corrections.verify, corrections.plain, corrections.prompt)
    if not all(0.01 <= factor <= 100 for factor in factors) or corrections.num_rounds < 0:
        return "corrections has a factor that is not from 0.01 to 100"
    if corrections.link_bandwidth is not None and corrections.link_bandwidth < 1:
        return "corrections were learned over a link without bandwidth"
    if min(profile.free_bytes, profile.pinnable_bytes) < 0:
        return "free_bytes or pinnable_bytes is below 0"
    if not all(1 <= width <= 4096 for width in profile.batch_invariant_widths):
        return "batch_invariant_widths has a width that is not from 1 to 4096"
    if not 1 <= profile.num_threads <= 1024 or profile.overhead_bytes < 0:
        return "num_threads or overhead_bytes is out of range"
    return ""


def are_timings(points: tuple[Timing, ...]) -> bool:
    ascending = all(low.width < high.width for low, high in pairwise(points))
    return bool(points) and points[0].width >= 1 and ascending


def typical_of(profiles: Sequence[Profile]) -> Profile:
    """Several of one machine as one: of each time and rate the middle one."""
    found: dict[str, Any] = {}
    for name, first in vars(profiles[0]).items():
        values = [getattr(profile, name) for profile in profiles]
        if isinstance(first, float):
            found[name] = median(values)
        elif isinstance(first, tuple) and first and isinstance(first[0], Timing | LinkRate):
            found[name] = tuple(middle_of(some) for some in zip(*values, strict=True))
    return replace(profiles[0], **found)


def middle_of(some: Sequence[Timing] | Sequence[LinkRate]) -> Timing | LinkRate:
    """Of one width, or of one block size."""
    timings = [one for one in some if isinstance(one, Timing)]
    if timings:
        seconds, slowest = median(t.seconds for t in timings), max(t.slowest for t in timings)
        return Timing(timings[0].width, seconds, slowest)
    rates = [one for one in some if isinstance(one, LinkRate)]
    return LinkRate(rates[0].block_bytes, median(rate.bytes_per_second for rate in rates))


def under_link(profile: Profile, bytes_per_second: int | None) -> Profile:
    """For plans under --link-bandwidth; None: without it. What rounds at another speed of the link
    taught says nothing here, but of drafts, which stream nothing."""
    corrections = profile.corrections
    if corrections.link_bandwidth != bytes_per_second:
        corrections = Corrections(
            draft=corrections.draft,
            num_rounds=corrections.num_rounds,
            link_bandwidth=bytes_per_second,
        )
    profile = replace(profile, corrections=corrections)
    return profile if bytes_per_second is None else with_link(profile, bytes_per_second)


def with_link(profile: Profile, bytes_per_second: int) -> Profile:
    """The same machine as if its link gave no more than `bytes_per_second`."""
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
