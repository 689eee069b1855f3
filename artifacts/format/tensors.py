"""safetensors files: read untrusted headers, write headers, read data.

The format is that of huggingface/safetensors: u64 length, JSON header, tensors without gaps. The
header is padded with spaces so that the data begins on a page, which direct reads need.
"""

import fcntl
import io
import json
import os
import stat
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from subspec.artifacts.common.errors import DISK_FAILED, SHORTAGES, Exit, SubspecError, not_read
from subspec.artifacts.format.codec import parse_json
from subspec.artifacts.model import PAGE_BYTES

MAX_HEADER = 25 << 20
# Flags of a file (linux/fs.h): requests of ioctl, and the flag of those that are never compressed.
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_NOCOMP_FL = 0x80086601, 0x40086602, 0x400
LONG_FLAGS = struct.Struct("I4x")  # declared as a long, of which the kernel uses an int
AHEAD_BYTES = 4 << 20  # read ahead at a time
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
MAX_COUNT = 1 << 63  # of a dimension or a byte position; products can still be printed
ITEM_BYTES = {
    "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    name: str
    dtype: str  # as named by safetensors: "BF16"
    shape: tuple[int, ...]
    offset: int  # from the beginning of the file
    num_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of a safetensors file, checked against the size of the file.

    Raises SubspecError(CORRUPT).
    """
    where = path.name
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise SubspecError(Exit.CORRUPT, f"{where} is {size} bytes, too short for a header")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER, size - 8):
            raise SubspecError(
                Exit.CORRUPT,
                f"{where} claims a header of {length} bytes, expected at most "
                f"{min(MAX_HEADER, size - 8)}",
            )
        text = file.read(length)
    if text.count(b"{") > MAX_TENSORS + 2:  # before it is parsed: a million entries take 500 MB
        raise SubspecError(Exit.CORRUPT, f"{where} lists more than {MAX_TENSORS} tensors")
    header = parse_json(text, f"{where} (header)")
    if not isinstance(header, dict):
        raise SubspecError(Exit.CORRUPT, f"{where} (header) is not an object")
    header.pop("__metadata__", None)
    found = {name: _stored(where, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for tensor in sorted(found.values(), key=lambda t: (t.offset, t.num_bytes)):
        if tensor.offset != end:
            raise SubspecError(
                Exit.CORRUPT,
                f"{where}: {tensor.name[:200]!r} begins at byte {tensor.offset}, expected {end}",
            )
        end += tensor.num_bytes
    if end != size:
        raise SubspecError(Exit.CORRUPT, f"{where} is {size} bytes, its header describes {end}")
    return found


def _stored(where: str, name: str, entry: object, base: int) -> StoredTensor:
    def wrong(what: str) -> SubspecError:
        return SubspecError(Exit.CORRUPT, f"{where}: tensor {name[:200]!r} has {what}")

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise wrong("no dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise wrong(f"an unknown dtype {str(dtype)[:60]!r}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise wrong(f"the shape {str(shape)[:60]}, expected at most {MAX_DIMENSIONS} counts")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise wrong(f"the offsets {str(offsets)[:60]}, expected two byte positions")
    num_bytes = ITEM_BYTES[dtype]
    for count in shape:
        num_bytes *= count
    if offsets[1] - offsets[0] != num_bytes:
        raise wrong(f"the offsets {offsets}, expected a range of {num_bytes} bytes")
    return StoredTensor(name, dtype, tuple(shape), base + offsets[0], num_bytes)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < MAX_COUNT for n in value)


class Writable(Protocol):
    def write(self, data: bytes, /) -> int: ...


def write_header(
    file: Writable, tensors: Iterable[tuple[str, str, tuple[int, ...]]], num_bytes: int = 0
) -> int:
    """Write the header for (name, dtype, shape) in data order, at least `num_bytes` long and padded
    to whole pages; returns the offset of the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        size = ITEM_BYTES[dtype]
        for count in shape:
            size *= count
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(num_bytes - 8)
    text += b" " * (-(len(text) + 8) % PAGE_BYTES)
    file.write(struct.pack("<Q", len(text)) + text)
    return 8 + len(text)


def keep_uncompressed(descriptor: int) -> None:
    """Asks the file system (btrfs, f2fs) not to compress a file that is still empty. What it
    compresses it reads through the page cache whatever the reader asks for. Ignores errors: other
    file systems know no such flag."""
    with suppress(OSError):
        [flags] = LONG_FLAGS.unpack(fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, bytes(8)))
        fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, LONG_FLAGS.pack(flags | FS_NOCOMP_FL))


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file without waiting. Raises SubspecError: CORRUPT, also for a FIFO, a device
    or a folder; RESOURCES if the disk fails."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SubspecError(Exit.CORRUPT, f"{path.name} is missing in {path.parent}") from None
    except OSError as error:
        if error.errno in (*SHORTAGES, *DISK_FAILED):
            raise not_read(path.name, error) from None
        raise SubspecError(
            Exit.CORRUPT, f"{path.name} cannot be opened: {error.strerror}"
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SubspecError(Exit.CORRUPT, f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_ahead(path: Path, num_bytes: int) -> None:
    """Read the first bytes of a file into the page cache. Ignores errors: the next
    reader reports them."""
    buffer = bytearray(AHEAD_BYTES)
    with suppress(SubspecError, OSError), open_regular(path) as file:
        # (posix_fadvise reads at most the device's read-ahead window, often 128 KB.)
        while num_bytes > 0 and (count := file.readinto1(buffer)):
            num_bytes -= count


class TensorFile:
    """Reads tensor data; drops the file from the page cache at the end, as data is read once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> "TensorFile":
        self._file = open_regular(self._path)
        return self

    def __exit__(self, *_: object) -> None:
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._file.close()

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` from byte `offset`. Raises SubspecError: CORRUPT if the file ends before,
        RESOURCES if the disk fails."""
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._file.fileno(), [target[done:]], offset + done)
            except OSError as error:
                raise not_read(self._path.name, error) from None
            if count <= 0:
                raise SubspecError(
                    Exit.CORRUPT,
                    f"{self._path.name} ends at byte {offset + done}, "
                    f"expected {len(target) - done} more",
                    "copy or download it again",
                )
            done += count
