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
from pathlib import Path

import torch  # noqa: F401  loads libgomp.so.1, which the libraries then share with it

from subspec.artifacts.users_cache import users_folder

# No fast-math: windows and rounding are IEEE arithmetic. No contraction: results may not depend on
# which multiplications and additions a compiler finds side by side.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
LONGEST_BUILD_SECONDS = 120
LOCAL_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)

Declare = Callable[[ctypes.CDLL], None]


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
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    compiler = shutil.which(command[0])
    if compiler is None:
        return f"there is no C++ compiler {command[0]!r} (install g++ or set CXX)"
    command[0] = compiler
    try:
        version = _output([*command, "--version"])
        key = "\0".join((*command, version, *FLAGS, platform.machine(), _processor()))
        text = b"\0".join(_texts(source))
        digest = hashlib.sha256(key.encode() + text).hexdigest()
        folder = users_folder("kernels")
        if folder is not None:
            return _opened(command, source, folder / f"{source.stem}-{digest[:32]}.so")
        with tempfile.TemporaryDirectory() as private:  # once loaded, the file may go
            return _opened(command, source, Path(private) / f"{source.stem}.so")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines() or [f"exit status {error.returncode}"]
        line = next((line for line in lines if "error" in line), lines[0])
        return f"{command[0]} failed: {line.strip()[:300]}"
    except subprocess.TimeoutExpired as error:
        return f"{command[0]} took longer than {error.timeout:.0f} seconds"
    except OSError as error:
        return f"{source.name} could not be built or loaded: {error}"


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


def _opened(command: list[str], source: Path, target: Path) -> ctypes.CDLL:
    """Loads `target`, which is built under another name first if it is not there: whoever else
    does the same at the same time gets the same file."""
    if not target.exists():
        descriptor, unfinished = tempfile.mkstemp(dir=target.parent, suffix=".so")
        os.close(descriptor)
        try:
            _output([*command, *FLAGS, str(source), "-o", unfinished])
            os.replace(unfinished, target)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    return ctypes.CDLL(str(target))


def _output(command: list[str]) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=LONGEST_BUILD_SECONDS,
    )
    return done.stdout


def _processor() -> str:
    """The instruction sets that -march=native may use, as the kernel lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
