"""Byte sizes as people write them, strictly: GB is 10^9, GiB is 2^30, and both are printed."""

import re

from subspec.artifacts.common.errors import Exit, SubspecError

UNITS: dict[str, int] = {
    "B": 1,
    **{f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGTP")},
    **{f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGTP")},
}
MAX_BYTES = 1024**5  # 1 PiB: anything above is a typing error
SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?([KMGTP]i?B|B|[KMGTP])", re.ASCII)


def parse_size(text: str) -> int:
    """ "24GB" -> 24_000_000_000, "24GiB" -> 25_769_803_776; raises SubspecError(USAGE)."""
    match = SIZE.fullmatch(text)
    if match is None:
        hint = "write a number and a unit: 24GB (10^9 bytes) or 24GiB (2^30 bytes)"
        if re.fullmatch(r"[0-9.]+ ?[KMGTPkmgtp]b", text, re.ASCII):
            hint = f"a small b means bits; {hint}"
        raise SubspecError(Exit.USAGE, f"{text!r} is not a size", hint)
    number, unit = match.groups()
    num_bytes = round(float(number) * UNITS[unit if unit.endswith("B") else unit + "B"])
    if not 1 <= num_bytes <= MAX_BYTES:
        raise SubspecError(
            Exit.USAGE,
            f"{text!r} is {num_bytes} bytes, expected 1 byte to 1 PiB",
            "for example --vram 8GB",
        )
    return num_bytes


def format_size(num_bytes: int | float) -> str:
    """25_769_803_776 -> "25.77 GB (24.00 GiB)"."""
    return f"{_scaled(num_bytes, 1000, 'B')} ({_scaled(num_bytes, 1024, 'iB')})"


def short_size(num_bytes: int | float) -> str:
    """25_769_803_776 -> "25.77 GB"."""
    return _scaled(num_bytes, 1000, "B")


def size_argument(num_bytes: int) -> str:
    """The smallest size of four digits that is at least `num_bytes`, as an option's value:
    20_971_520_001 -> "20.98GB"."""
    unit = next((one for one in ("TB", "GB", "MB", "KB") if num_bytes >= UNITS[one]), "B")
    whole = len(str(num_bytes // UNITS[unit]))
    step = max(1, UNITS[unit] // 10 ** max(0, 4 - whole))
    return f"{-(-num_bytes // step) * step / UNITS[unit]:.10g}{unit}"


def _scaled(num_bytes: int | float, base: int, suffix: str) -> str:
    value, prefixes = float(num_bytes), ["", "K", "M", "G", "T"]
    while abs(value) >= base and len(prefixes) > 1:
        value /= base
        prefixes.pop(0)
    return f"{value:.0f} B" if prefixes[0] == "" else f"{value:.2f} {prefixes[0]}{suffix}"


def weights_rate(per_second: float) -> str:
    """1.89e9 -> "1.89 billion weights/s"."""
    unit, name = (1e9, "billion") if per_second >= 1e9 else (1e6, "million")
    return f"{per_second / unit:.3g} {name} weights/s"
