"""C++ sources as libraries: each is built once per machine and loaded with ctypes."""

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
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch  # noqa: F401  loads libgomp.so.1, which the libraries then share with it

from subspec.artifacts.common.user_cache import user_cache_dir

# No fast-math: windows and rounding are IEEE arithmetic. No contraction: results may not depend on
# which multiplications and additions a compiler finds side by side.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
LONGEST_BUILD_SECONDS = 120
LOCAL_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)

Declare = Callable[[ctypes.CDLL], None]


class NoCompiler(Exception):
    """One sentence."""


def unavailable(source: Path, declare: Declare) -> str | None:
    """None if `source` works, which builds it where that has not been done; else one sentence on
    why not."""
    found = library(source, declare)
    return found if isinstance(found, str) else None


def loaded(source: Path, declare: Declare) -> ctypes.CDLL:
    """The library of a `source` that is not unavailable."""
    found = library(source, declare)
    assert not isinstance(found, str), found
    return found


def build_ahead(sources: Iterable[Path]) -> None:
    """Starts to build, each in a thread, what is not there yet; who needs it waits for the rest."""
    for source in sources:
        threading.Thread(target=_found, args=(source,), name="subspec-build", daemon=True).start()


@functools.cache
def library(source: Path, declare: Declare) -> ctypes.CDLL | str:
    """The library, once `declare` has given its functions their types, or why there is none."""
    found = _found(source)
    if not isinstance(found, str):
        declare(found)
    return found


def _found(source: Path) -> ctypes.CDLL | str:
    with _lock(source):
        return _built(source)


@functools.cache
def _lock(source: Path) -> threading.Lock:
    return threading.Lock()


def _built(source: Path) -> ctypes.CDLL | str:
    try:
        folder = user_cache_dir("kernels")
        if folder is not None:
            return _opened(source, folder / library_name(source))
        with tempfile.TemporaryDirectory() as private:  # once loaded, the file may go
            return _opened(source, Path(private) / f"{source.stem}.so")
    except NoCompiler as error:
        return str(error)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines() or [f"exit status {error.returncode}"]
        line = next((line for line in lines if "error" in line), lines[0])
        return f"{Path(error.cmd[0]).name} failed: {line.strip()[:300]}"
    except subprocess.TimeoutExpired as error:
        return f"the C++ compiler took longer than {error.timeout:.0f} seconds"
    except OSError as error:
        return f"{source.name} could not be built or loaded: {error}"


def library_name(source: Path) -> str:
    """Of what `source` becomes on such a machine: instruction sets, sources, flags. Not of the
    compiler's version: results do not depend on it, and a machine may have none."""
    words = (*_compiler(), *FLAGS, platform.machine(), _processor())
    key = b"\0".join((*map(str.encode, words), *_texts(source)))
    return f"{source.stem}-{hashlib.sha256(key).hexdigest()[:32]}.so"


# Elsewhere: libraries travel with an artifact to machines that need not build them then.


def built_file(source: Path) -> Path | None:
    """The library of a `source` that is not unavailable; None: it is kept nowhere."""
    folder = user_cache_dir("kernels")
    path = folder / library_name(source) if folder else None
    return path if path is not None and path.exists() else None


def install_prebuilt(source: Path, library: bytes) -> bool:
    """Keeps what was built of `source` on such a machine, to be loaded from now on. It is a
    program: who calls this trusts it. False: there is no place to keep it."""
    folder = user_cache_dir("kernels")
    if folder is None:
        return False
    _put(folder / library_name(source), lambda unfinished: unfinished.write_bytes(library))
    return True


def _texts(source: Path) -> list[bytes]:
    """The bytes of `source` and of every file that it includes in quotes, directly or not."""
    paths, texts = [source], list[bytes]()
    for path in paths:  # grows
        texts.append(path.read_bytes())
        for name in LOCAL_INCLUDE.findall(texts[-1]):
            included = (path.parent / os.fsdecode(name)).resolve()
            if included not in paths:
                paths.append(included)
    return texts


def _opened(source: Path, target: Path) -> ctypes.CDLL:
    """Loads `target`, built if it is not there or cannot be loaded: it may be damaged, or made for
    another C library."""
    if target.exists():
        with suppress(OSError):
            return ctypes.CDLL(str(target))
    name, *options = _compiler()
    compiler = shutil.which(name)
    if compiler is None:
        raise NoCompiler(f"there is no C++ compiler {name!r} (install g++ or set CXX)")
    command = [compiler, *options, *FLAGS, str(source), "-o"]
    _put(target, lambda unfinished: _run([*command, str(unfinished)]))
    return ctypes.CDLL(str(target))


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _put(target: Path, write: Callable[[Path], object]) -> None:
    """Under another name first: whoever else does the same at the same time gets the same file."""
    descriptor, unfinished = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(descriptor)
    try:
        write(Path(unfinished))
        os.replace(unfinished, target)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=LONGEST_BUILD_SECONDS,
    )


def _processor() -> str:
    """The instruction sets that -march=native may use, as the kernel lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
