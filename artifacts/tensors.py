"""safetensors files: read a header with distrust, write one as a stream; both directions here.

The format is the one of huggingface/safetensors: u64 length, JSON header, tensors without gaps.
We pad the header with spaces so that the data begins on a page: direct reads need that.
"""

import io
import json
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from subspec.artifacts.codec import parse_json
from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.model import PAGE_BYTES

LARGEST_HEADER = 25 << 20
MOST_TENSORS = 100_000
ITEM_BYTES = {
    "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    name: str
    dtype: str  # safetensors' name: "BF16"
    shape: tuple[int, ...]
    offset: int  # from the beginning of the file
    num_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of a safetensors file, every number checked against the file's real size."""
    where = path.name
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise SubspecError(Exit.CORRUPT, f"{where} is {size} bytes, too short for a header")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(LARGEST_HEADER, size - 8):
            raise SubspecError(
                Exit.CORRUPT,
                f"{where} claims a header of {length} bytes, expected at most "
                f"{min(LARGEST_HEADER, size - 8)}",
            )
        header = parse_json(file.read(length), f"{where} (header)")
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise SubspecError(Exit.CORRUPT, f"{where} does not list 1 to {MOST_TENSORS} tensors")
    header.pop("__metadata__", None)
    found = {name: _stored(where, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for tensor in sorted(found.values(), key=lambda t: (t.offset, t.num_bytes)):
        if tensor.offset != end:
            raise SubspecError(
                Exit.CORRUPT,
                f"{where}: {tensor.name!r} begins at byte {tensor.offset}, expected {end}",
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
    if dtype not in ITEM_BYTES:
        raise wrong(f"an unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise wrong(f"the shape {str(shape)[:60]}, expected a list of counts")
    if not isinstance(offsets, list) or not all(type(n) is int and n >= 0 for n in offsets):
        raise wrong(f"the offsets {str(offsets)[:60]}, expected two byte positions")
    num_bytes = ITEM_BYTES[dtype]
    for count in shape:
        num_bytes *= count
    if len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
        raise wrong(f"the offsets {offsets}, expected a range of {num_bytes} bytes")
    return StoredTensor(name, dtype, tuple(shape), base + offsets[0], num_bytes)


def write_header(file: BinaryIO, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
    """Writes the header for (name, dtype, shape) in data order; returns the data's offset."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        num_bytes = ITEM_BYTES[dtype]
        for count in shape:
            num_bytes *= count
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [end, end + num_bytes],
        }
        end += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE_BYTES)
    file.write(struct.pack("<Q", len(text)) + text)
    return 8 + len(text)


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a regular file: a FIFO, a device or a folder is refused instead of waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SubspecError(Exit.CORRUPT, f"{path.name} is missing in {path.parent}") from None
    except OSError as error:
        raise SubspecError(
            Exit.CORRUPT, f"{path.name} cannot be opened: {error.strerror}"
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SubspecError(Exit.CORRUPT, f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")
