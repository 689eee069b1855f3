import errno
import fcntl
import io
import json
import os
import struct
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.tensors import (
    StoredTensor,
    keep_uncompressed,
    open_regular,
    read_ahead,
    read_header,
    write_header,
)
from subspec.artifacts.model import PAGE_BYTES


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(path: Path) -> SubspecError:
    start = time.monotonic()
    with pytest.raises(SubspecError) as caught:
        read_header(path)
    assert time.monotonic() - start < 1
    assert caught.value.exit_code == Exit.CORRUPT
    assert path.name in caught.value.message
    assert len(caught.value.message) < 600
    return caught.value


def test_a_header_is_written_as_these_bytes_and_ends_on_a_page() -> None:
    file = io.BytesIO()
    offset = write_header(file, [("a", "BF16", (2, 3)), ("b", "U8", (5,))])
    text = (
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        b'"b":{"dtype":"U8","shape":[5],"data_offsets":[12,17]}}'
    )
    assert offset == PAGE_BYTES
    assert file.getvalue() == struct.pack("<Q", 4088) + text.ljust(4088)


@pytest.mark.parametrize("known", [True, False])
def test_a_file_keeps_its_flags_and_is_not_compressed_where_the_file_system_can(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of the calls are those of linux/fs.h."""
    calls = []

    def ioctl(descriptor: int, request: int, argument: bytes) -> bytes:
        calls.append((request, argument))
        if not known:
            raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")
        return b"\x50\0\0\0\0\0\0\0"

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with (tmp_path / "file").open("wb") as file:
        keep_uncompressed(file.fileno())
    get, put = (0x80086601, bytes(8)), (0x40086602, b"\x50\x04\0\0\0\0\0\0")
    assert calls == ([get, put] if known else [get])


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    weight = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    codes = torch.arange(5, dtype=torch.uint8)
    path = tmp_path / "ours.safetensors"
    with path.open("wb") as file:
        write_header(file, [("a", "BF16", (2, 3)), ("b", "U8", (5,))])
        file.write(weight.view(torch.uint8).numpy().tobytes() + codes.numpy().tobytes())
    loaded = safetensors.torch.load_file(path)
    assert torch.equal(loaded["a"], weight)
    assert torch.equal(loaded["b"], codes)


def test_we_read_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    tensors = {"x": torch.arange(4, dtype=torch.float32), "empty": torch.zeros(0, 3)}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    assert found.keys() == tensors.keys()
    x = found["x"]
    assert x == StoredTensor("x", "F32", (4,), x.offset, 16)
    stored = path.read_bytes()[x.offset : x.offset + x.num_bytes]
    assert stored == tensors["x"].numpy().tobytes()
    assert found["empty"].num_bytes == 0


def test_a_fifo_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    assert "not a regular file" in refused(path).message


def test_a_folder_a_device_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder")
    refused(Path("/dev/zero"))
    refused(tmp_path / "missing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop")


def test_a_link_to_a_regular_file_is_followed_as_in_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"x"


def entry(
    dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)
) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_the_entry_that_the_hostile_ones_vary_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(entry(), b"1234"))
    assert read_header(path)["a"].shape == (4,)


@pytest.mark.parametrize(
    "header",
    [
        [],
        3,
        {"a": 3},
        {"a": {}},
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        b'"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        b"{" * 100_000,
        b"\xff\xfe",
        b"",
        # A5: byte positions
        entry(offsets=(0, 2**64 + 4)),
        entry(offsets=(-4, 0)),
        entry(offsets=(4, 0)),
        entry(offsets=(0, 5)),
        entry(offsets=(1, 5)),
        entry(offsets=(0, 4, 8)),
        entry(offsets=(0.0, 4.0)),
        entry(offsets=(False, 4)),
        entry(offsets="04"),
        entry(shape=(0,), offsets=(4, 4)),
        entry(shape=(2**40,), offsets=(0, 2**40)),
        entry(shape=(2**62,), dtype="F64", offsets=(0, 2**65)),
        {**entry(), "b": entry(offsets=(2, 4), shape=(2,))["a"]},
        {**entry(), "b": entry(offsets=(5, 9))["a"]},
        # A6: dtypes and shapes
        entry(dtype="F16"),
        entry(dtype="NF4"),
        entry(dtype=8),
        entry(dtype=["U8"]),
        entry(shape=(-1,)),
        entry(shape=(2, -2)),
        entry(shape=(0,)),
        entry(shape=(2**40, 2**40)),
        entry(shape=(True, 4)),
        entry(shape=(10**18,) * 300),
        entry(shape="4"),
        entry(shape=4),
    ],
    ids=lambda header: str(header)[:60],
)
def test_a_hostile_header_is_refused(tmp_path: Path, header: object) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(header, b"1234"))
    refused(path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 26 << 20, 100])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    assert str(length) in refused(path).message


def test_a_header_above_25_mib_is_refused_although_the_file_has_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate(8 + (1 << 30))  # sparse
    refused(path)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_too_short_for_a_length_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize("data", [b"123", b"12345"])
def test_a_truncated_or_extended_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(entry(), data))
    assert "header describes" in refused(path).message


def test_half_a_million_tiny_tensors_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    one = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = "{" + ",".join(one % number for number in range(300_000)) + "}"
    path.write_bytes(safetensors_bytes(text.encode()))
    assert "more than 100000 tensors" in refused(path).message


def test_reading_ahead_reads_and_says_nothing_of_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))
    for wanted in (0, 1, 10_000, 1 << 40):
        read_ahead(path, wanted)
    read_ahead(tmp_path / "missing", 10)
    os.mkfifo(tmp_path / "fifo")
    read_ahead(tmp_path / "fifo", 10)
