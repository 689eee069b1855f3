"""Counts, measurements and durations as people read them; byte sizes are in sizes.py."""

TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def counted(count: int, noun: str) -> str:
    """ "1 token", "2 tokens"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def number(value: float) -> str:
    """Three significant digits from 1 on, two decimals below and four below 0.1, without an
    exponent: "0.0812", "0.46", "9.10", "14.3", "1234"."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 4 if 0 < value < 0.1 else 2
    return f"{value:.{decimals}f}"


def big_number(count: int) -> str:
    """ "7.62 billion"."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{number(count / unit)} {name}"
    return str(count)


def duration(seconds: float) -> str:
    """ "1.50 s", "250 ms", "12.0 µs"."""
    unit, name = next(((u, n) for u, n in TIME_UNITS if seconds >= u), TIME_UNITS[-1])
    return f"{number(seconds / unit)} {name}" if seconds else "0 s"
