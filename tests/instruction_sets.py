"""The C++ kernels as they are built here, and as they would be for other processors."""

import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from subspec.artifacts.native import cpp


@dataclass(frozen=True)
class Build:
    flags: tuple[str, ...]  # beside the usual ones
    needed: str  # the flag of /proc/cpuinfo that the result needs; "": runs wherever this one does


@contextmanager
def built(build: Build, cache: Path) -> Iterator[None]:
    """Inside the block sources are built with the build's flags, into `cache`; skips the test where
    that cannot run."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    has = platform.machine() == "x86_64" and build.needed in cpp.processor().split()
    if build.needed and not has:
        pytest.skip(f"not a processor with {build.needed}")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CXX", raising=False)
        if build.flags:
            patch.setattr(cpp, "FLAGS", (*cpp.FLAGS, *build.flags))
            patch.setenv("XDG_CACHE_HOME", str(cache))
        cpp.library.cache_clear()
        yield
    cpp.library.cache_clear()
