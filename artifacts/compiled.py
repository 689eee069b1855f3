"""residual.cpp, the compiled twin of residual.py, and how a C++ file becomes a library: built once
per machine, loaded with ctypes.

R = rows of one part of a matrix, K = its columns, G = K / 64 groups
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch  # loads libgomp.so.1, which the library then shares with it
from torch import Tensor

from subspec.artifacts import residual
from subspec.artifacts.model import GROUP_SIZE
from subspec.artifacts.residual import (
    FRACTION_BITS,
    GUARD_WORDS,
    TILE_ROWS,
    TILE_WEIGHTS,
    corrupt,
    sections,
)

SOURCE = Path(__file__).with_name("residual.cpp")
# No fast-math: the windows are IEEE arithmetic. Contraction would not change them within the range
# of a grid; without it nothing has to be proved about what is outside.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
LONGEST_BUILD_SECONDS = 120
MOST_TILE_WORDS = 1920  # MOST_WORDS of residual.cpp


def unavailable() -> str | None:
    """None if the library works, which builds it where that has not been done; else the reason."""
    library = _library()
    return library if isinstance(library, str) else None


def encode(weight: Tensor, codes: Tensor, grid: Tensor, num_threads: int) -> Tensor:
    """What residual.encode returns for these tensors, on the CPU, and by it where there is no
    library; `grid` may be rows of a larger one, with a stride over its first dimension."""
    if unavailable() is not None:
        return residual.encode(weight, codes, grid)
    _check(weight, codes, grid)
    num_rows, num_columns = weight.shape
    assert codes.shape == (num_rows, num_columns // 2)
    num_tiles = weight.numel() // TILE_WEIGHTS
    assert num_tiles * MOST_TILE_WORDS < 1 << 31, "the index is int32"
    index = torch.empty(num_tiles + 1, dtype=torch.int32)
    payload = torch.empty(num_tiles * MOST_TILE_WORDS, dtype=torch.int32)
    num_words = _loaded().subspec_encode(
        num_rows,
        num_columns,
        weight.data_ptr(),
        FRACTION_BITS[weight.dtype],
        weight.dtype == torch.float32,
        codes.data_ptr(),
        grid.data_ptr(),
        grid.stride(0),
        index.data_ptr(),
        payload.data_ptr(),
        num_threads,
    )
    guard = torch.zeros(GUARD_WORDS, dtype=torch.int32)
    stream = [part.view(torch.uint8) for part in (index, payload[:num_words], guard)]
    if weight.dtype == torch.float32:
        lower = weight.view(torch.int16).view(-1, 2)[:, 0].contiguous()
        stream.append(lower.view(torch.uint8))
    return torch.cat(stream)


def decode(
    stored: Tensor, codes: Tensor, grid: Tensor, dtype: torch.dtype, num_threads: int
) -> Tensor:
    """What residual.decode returns for these tensors, on the CPU, and by it where there is no
    library."""
    if unavailable() is not None:
        return residual.decode(stored, codes, grid, dtype)
    out = torch.empty(codes.shape[0], codes.shape[1] * 2, dtype=dtype)
    decode_into(out, stored, codes, grid, 0, num_threads)
    return out


def decode_into(
    out: Tensor, stored: Tensor, codes: Tensor, grid: Tensor, tile_rows: int, num_threads: int
) -> None:
    """Fills out [R, K] (bf16, fp16 or f32) with what residual.decode returns for stored uint8.

    codes: the uint8 bytes of exactly these rows; tile_rows = 0: as stored, nibble pairs [R, K / 2];
    64 or 32: ATen's packed CPU layout, [R / tile_rows, K, tile_rows / 2] bytes, where byte (k, r)
    holds row r in its low nibble and row r + tile_rows / 2 in its high one; 16: that of
    runtime/int4.py, [R / 16, K / 8, 16, 4] bytes of nibble pairs. grid as in `encode`.
    Raises SubspecError(CORRUPT) like residual.decode; `out` then holds nothing of use. Needs
    unavailable() to be None.
    """
    _check(out, codes, grid)
    assert tile_rows in (0, 16, 32, 64) and out.shape[0] % (tile_rows or TILE_ROWS) == 0
    assert out.data_ptr() % 16 == 0, "it is written in vectors"
    num_rows, num_columns = out.shape
    index, payload, lower = sections(stored, num_rows, num_columns, out.dtype)
    wrong = _loaded().subspec_decode(
        num_rows,
        num_columns,
        codes.data_ptr(),
        tile_rows,
        grid.data_ptr(),
        grid.stride(0),
        index.data_ptr(),
        payload.data_ptr(),
        lower.data_ptr() if out.dtype == torch.float32 else None,
        out.data_ptr(),
        FRACTION_BITS[out.dtype],
        num_threads,
    )
    if wrong:
        raise corrupt("the length of a tile does not fit its weights")


def _check(weight: Tensor, codes: Tensor, grid: Tensor) -> None:
    """What the library relies on: shapes, dtypes, contiguous memory of the CPU."""
    assert weight.dtype in FRACTION_BITS and codes.dtype == torch.uint8
    assert grid.dtype == torch.bfloat16
    assert all(tensor.device.type == "cpu" for tensor in (weight, codes, grid))
    num_rows, num_columns = weight.shape
    assert num_rows % TILE_ROWS == 0 and num_columns % GROUP_SIZE == 0
    assert weight.is_contiguous() and codes.is_contiguous()
    assert codes.numel() * 2 == weight.numel()
    assert grid.shape == (num_columns // GROUP_SIZE, num_rows, 2)
    assert grid.stride()[1:] == (2, 1)


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert not isinstance(library, str), library
    return library


@functools.cache
def _library() -> ctypes.CDLL | str:
    """residual.cpp, or a sentence on why it is not there."""
    found = library(SOURCE)
    if isinstance(found, str):
        return found
    number, size, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    found.subspec_encode.restype = size
    found.subspec_encode.argtypes = (
        *(size, size, address, number, number),  # rows, columns, weights, fraction bits, is f32
        *(address, address, size),  # codes, grid, its stride
        *(address, address, number),  # index, payload, threads
    )
    found.subspec_decode.restype = number
    found.subspec_decode.argtypes = (
        *(size, size, address, number),  # rows, columns, codes, tile rows
        *(address, size, address, address, address),  # grid, its stride, index, payload, lower
        *(address, number, number),  # out, fraction bits, threads
    )
    return found


def library(source: Path) -> ctypes.CDLL | str:
    """`source`, a C++ file, as a shared library that is built where that has not been done; or one
    sentence on why there is none."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    compiler = shutil.which(command[0])
    if compiler is None:
        return f"there is no C++ compiler {command[0]!r} (install g++ or set CXX)"
    command[0] = compiler
    try:
        version = _output([*command, "--version"])
        key = "\0".join((*command, version, *FLAGS, platform.machine(), _processor()))
        digest = hashlib.sha256(key.encode() + source.read_bytes()).hexdigest()
        folder = _cache_folder()
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


def _cache_folder() -> Path | None:
    """The user's own folder for such files, mode 0700; None if there cannot be one.

    Code is loaded from it, so it is not used if somebody else could write to it.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "subspec"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # Path.home() raises RuntimeError if there is none
        return None
    private = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if private and os.access(folder, os.W_OK | os.X_OK) else None
