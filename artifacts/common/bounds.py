"""Bounds of dataclass fields, declared with the field: `width: Annotated[int, Between(1, 256)]`.
`artifacts/format/codec.py` enforces them on what it reads.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Between:
    """A number from `minimum` to `maximum`, both included."""

    minimum: float
    maximum: float

    def holds(self, value: Any) -> bool:
        return bool(self.minimum <= value <= self.maximum)  # False for NaN

    def __str__(self) -> str:
        return f"{self.minimum:g} to {self.maximum:g}"


@dataclass(frozen=True)
class Below:
    """A number less than `limit`."""

    limit: float

    def holds(self, value: Any) -> bool:
        return bool(value < self.limit)

    def __str__(self) -> str:
        return f"a number below {self.limit:g}"


@dataclass(frozen=True)
class Length:
    """A list of `minimum` to `maximum` entries."""

    minimum: int
    maximum: int

    def holds(self, value: Any) -> bool:
        return self.minimum <= len(value) <= self.maximum

    def __str__(self) -> str:
        return f"{self.minimum} to {self.maximum} entries"


@dataclass(frozen=True)
class Matching:
    """Text that the regular expression matches in full, in ASCII."""

    pattern: str
    described: str

    def holds(self, value: Any) -> bool:
        return re.fullmatch(self.pattern, value, re.ASCII) is not None

    def __str__(self) -> str:
        return self.described


Bound = Between | Below | Length | Matching

Probability = Annotated[float, Between(0, 1), Below(1)]
Count = Annotated[int, Between(0, 1 << 62)]  # of tokens, bytes, rounds
Seconds = Annotated[float, Between(0, 1e9)]
Threads = Annotated[int, Between(1, 1024)]
VerifyWidth = Annotated[int, Between(1, 4096)]
VerifyWidths = Annotated[tuple[VerifyWidth, ...], Length(1, 64)]
TreeWidth = Annotated[int, Between(1, 256)]
MAX_LEVELS = 1024  # of a tree
