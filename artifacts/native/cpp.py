"""C++ sources as shared libraries: each is built once per machine and loaded with ctypes."""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch  # noqa: F401  loads libgomp.so.1, which the libraries then share with it

from subspec.artifacts.common.child import child_process
from subspec.artifacts.common.user_cache import (
    find_file,
    find_in_memory,
    store_file,
    store_in_memory,
)

# No fast-math: windows and rounding rely on IEEE arithmetic. No contraction: results must not
# depend on which multiplications and additions a compiler fuses. No trapping math: nothing reads
# the floating-point exception flags, and keeping them exact would leave loops that divide or
# compare scalar on AVX2.
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fno-trapping-math",
    "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip
FOLDER = "kernels"  # of the user's cache, and of an artifact
MAX_BUILD_SECONDS = 120
CHECK_SECONDS = 0.1  # how often a build looks whether it is still wanted
WANTED = threading.Event()  # is never set; an event that is set stops a build
LOCAL_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)

Declare = Callable[[ctypes.CDLL], None]


class NoCompiler(Exception):
    """There is no C++ compiler; the message is one sentence."""


def unavailable(source: Path, declare: Declare) -> str | None:
    """Build the library of `source` if needed. Returns None if it can be used, else the reason, one
    sentence."""
    found = library(source, declare)
    return found if isinstance(found, str) else None


def loaded(source: Path, declare: Declare) -> ctypes.CDLL:
    """The library of `source`, for which `unavailable` must be None."""
    found = library(source, declare)
    assert not isinstance(found, str), found
    return found


@contextmanager
def build_ahead(sources: Iterable[Path]) -> Iterator[None]:
    """Build missing libraries in threads, one each, during the block; a thread that needs one waits
    for it. What is not finished by the end of the block is stopped, and leaves nothing behind."""
    stopped = threading.Event()
    threads = [
        threading.Thread(target=_found, args=(source, stopped), name="subspec-build", daemon=True)
        for source in sources
    ]
    try:
        for thread in threads:
            thread.start()
        yield
    finally:
        stopped.set()
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join()


@functools.cache
def library(source: Path, declare: Declare) -> ctypes.CDLL | str:
    """The library after `declare` has set the types of its functions, or why there is none."""
    found = _found(source)
    if not isinstance(found, str):
        declare(found)
    return found


def _found(source: Path, stopped: threading.Event = WANTED) -> ctypes.CDLL | str:
    with _lock(source):
        return _built(source, stopped)


@functools.cache
def _lock(source: Path) -> threading.Lock:
    return threading.Lock()


def _built(source: Path, stopped: threading.Event) -> ctypes.CDLL | str:
    try:
        return _kept(program(source)) or _compiled(source, stopped)
    except NoCompiler as error:
        return str(error)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines() or [f"exit status {error.returncode}"]
        # A linker says what failed before the compiler says that the linker did.
        line = next((line for line in lines if "error" in line or "failed" in line), lines[0])
        return f"{Path(error.cmd[0]).name} failed: {line.strip()[:300]}"
    except subprocess.TimeoutExpired as error:
        return f"the C++ compiler took longer than {error.timeout:.0f} seconds"
    except OSError as error:
        return f"{source.name} could not be built or loaded: {error}"


def library_name(source: Path) -> str:
    """File name of the library of `source` on such a machine, which depends on sources, flags and
    instruction sets. The compiler's version does not affect results, and a machine that installs a
    pre-built library may have no compiler."""
    words = (*_compiler(), *FLAGS, platform.machine(), processor())
    key = b"\0".join((*map(str.encode, words), *_texts(source)))
    return f"{source.stem}-{hashlib.sha256(key).hexdigest()[:32]}.so"


def program(source: Path) -> str:
    """Path of the library of `source`, relative to the user's cache or an artifact."""
    return f"{FOLDER}/{library_name(source)}"


def _texts(source: Path) -> list[bytes]:
    """Bytes of `source` and of every file that it includes in quotes, directly or indirectly."""
    paths, texts = [source], list[bytes]()
    for path in paths:  # grows
        texts.append(path.read_bytes())
        for name in LOCAL_INCLUDE.findall(texts[-1]):
            included = (path.parent / os.fsdecode(name)).resolve()
            if included not in paths:
                paths.append(included)
    return texts


def _kept(name: str) -> ctypes.CDLL | None:
    """The library of that name in the cache; None: there is none, or it cannot be loaded (damaged,
    or built for another C library)."""
    path = find_file(name)
    if path is None:
        return None
    with suppress(OSError):
        return ctypes.CDLL(str(path))
    with suppress(OSError):  # perhaps the cache is mounted noexec: memory is not
        return ctypes.CDLL(str(find_in_memory(name) or store_in_memory(name, path.read_bytes())))
    return None


def _compiled(source: Path, stopped: threading.Event) -> ctypes.CDLL:
    """Build the library of `source`, keep it if possible, and load it. Raises NoCompiler,
    CalledProcessError, TimeoutExpired or OSError."""
    name, *options = _compiler()
    compiler = shutil.which(name)
    if compiler is None:
        raise NoCompiler(f"there is no C++ compiler {name!r} (install g++ or set CXX)")
    with tempfile.TemporaryDirectory() as private:  # a cache may be full, or missing
        built = Path(private) / f"{source.stem}.so"
        _run([compiler, *options, *FLAGS, str(source), "-o", str(built)], stopped)
        store_file(program(source), built.read_bytes())
        return _kept(program(source)) or ctypes.CDLL(str(built))


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _run(command: list[str], stopped: threading.Event = WANTED) -> None:
    limit = time.monotonic() + MAX_BUILD_SECONDS
    with child_process(command) as child:
        while True:
            with suppress(subprocess.TimeoutExpired):
                _, said = child.communicate(timeout=CHECK_SECONDS)
                break
            if stopped.is_set() or time.monotonic() > limit:
                raise subprocess.TimeoutExpired(command, MAX_BUILD_SECONDS)
    if child.returncode:
        story = said.decode("utf-8", "replace")
        raise subprocess.CalledProcessError(child.returncode, command, stderr=story)


def processor() -> str:
    """The instruction sets that -march=native may use, as the kernel lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
