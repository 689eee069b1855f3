"""Typed access to a JSON object that somebody else wrote: config.json and its neighbours."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.codec import parse_json
from subspec.artifacts.format.tensors import open_regular

MAX_JSON = 32 << 20  # an index of 100,000 tensors has 10 MB
# How what some other program left in a file's place begins.
GIT_LFS = b"version https://git-lfs.github.com/"
WEB_PAGES = (b"<!doctype", b"<html", b"<?xml")

# A bound for every number, far above any model: what follows may then multiply and enumerate them.
MAX_WIDTH = 1 << 20
MAX_LAYERS = 10_000
MAX_VOCABULARY = 1 << 24
MAX_POSITIONS = 1 << 30


@dataclass(frozen=True)
class Fields:
    """One JSON object; each accessor checks type and range and raises SubspecError(CORRUPT).
    `null` counts as left out."""

    where: str
    values: dict[str, Any]

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self._value(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self._value(name, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.wrong(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self._value(name, default)
        if value is not True and value is not False:
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def texts(self, name: str) -> list[str]:
        value = self._value(name, [])
        if not isinstance(value, list) or not all(type(item) is str for item in value):
            raise self.wrong(name, value, "a list of strings")
        return value

    def numbers(self, name: str, low: float, high: float, count: int) -> tuple[float, ...]:
        value = self._value(name, None)
        fine = isinstance(value, list) and len(value) == count
        if not fine or not all(type(n) in (int, float) and low <= n <= high for n in value):
            raise self.wrong(name, value, f"{count} numbers from {low:g} to {high:g}")
        return tuple(float(number) for number in value)

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def wrong(self, name: str, value: Any, expected: str) -> SubspecError:
        got = repr(value)[:60]
        return SubspecError(Exit.CORRUPT, f"{self.where}: {name} is {got}, expected {expected}")

    def unsupported(self, name: str, supported: str) -> SubspecError:
        got = repr(self.values.get(name))[:60]
        message = f"{self.where}: {name} is {got}, we compute only {supported}"
        return SubspecError(Exit.UNSUPPORTED, message)

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is None:
            raise SubspecError(Exit.CORRUPT, f"{self.where} lacks {name}")
        return default if value is None else value


def read_fields(path: Path) -> Fields:
    """A JSON file that holds one object. Raises SubspecError(CORRUPT)."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON:
            raise SubspecError(
                Exit.CORRUPT, f"{path.name} is {size} bytes, expected at most {MAX_JSON}"
            )
        content = file.read()
    refuse_stand_in(path, content)
    values = parse_json(content, path.name)
    if not isinstance(values, dict):
        raise SubspecError(Exit.CORRUPT, f"{path.name} is not an object")
    return Fields(path.name, values)


def refuse_stand_in(path: Path, content: bytes) -> None:
    """Raises SubspecError(CORRUPT) if `content`, a file's beginning, shows that the file itself
    never arrived: Git LFS's pointer to it, a server's web page, or nothing at all."""
    again = "download the checkpoint again"
    if content.startswith(GIT_LFS):
        raise SubspecError(
            Exit.CORRUPT,
            f"{path.name} is a Git LFS pointer, expected the file itself",
            f"run `git lfs pull` in {path.parent}, or {again}",
        )
    if content.lstrip()[:16].lower().startswith(WEB_PAGES):
        message = f"{path.name} is a web page, expected the file itself"
        raise SubspecError(Exit.CORRUPT, message, again)
    if not content:
        raise SubspecError(Exit.CORRUPT, f"{path.name} is empty", again)
