"""residual.cpp, the compiled twin of artifacts/format/residual.py, on the CPU.

R = rows of one part of a matrix, K = its columns, G = K / 64 groups
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.format import residual
from subspec.artifacts.format.residual import FRACTION_BITS, sections
from subspec.artifacts.format.tiles import (
    GUARD_WORDS,
    TILE_ROWS,
    check_part,
    corrupt,
    room_for_words,
)
from subspec.artifacts.native import cpp

SOURCE = Path(__file__).with_name("residual.cpp")
MAX_TILE_WORDS = 1920  # MOST_WORDS of residual.cpp


def unavailable() -> str | None:
    """Build the library if needed. Returns None if it can be used, else the reason."""
    return cpp.unavailable(SOURCE, _declare)


def encode(weight: Tensor, codes: Tensor, qparams: Tensor, num_threads: int) -> Tensor:
    """weight bf16, fp16 or f32 [R, K], codes uint8 [R, K / 2], qparams bf16 [G, R, 2] -> uint8
    [bytes], the same as residual.encode, which is used if there is no library. `qparams` may be
    rows of a larger tensor, with a stride over the first dimension."""
    if unavailable() is not None:
        return residual.encode(weight, codes, qparams)
    check_part(weight, codes, qparams)
    num_rows, num_columns = weight.shape
    assert codes.shape == (num_rows, num_columns // 2)
    index, payload = room_for_words(weight.numel(), MAX_TILE_WORDS)
    num_words = cpp.loaded(SOURCE, _declare).subspec_encode(
        num_rows,
        num_columns,
        weight.data_ptr(),
        FRACTION_BITS[weight.dtype],
        weight.dtype == torch.float32,
        codes.data_ptr(),
        qparams.data_ptr(),
        qparams.stride(0),
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
    stored: Tensor, codes: Tensor, qparams: Tensor, dtype: torch.dtype, num_threads: int
) -> Tensor:
    """stored uint8 [bytes], codes uint8 [R, K / 2], qparams bf16 [G, R, 2] -> [R, K] of `dtype`;
    the same as residual.decode, which is used if there is no library. Raises
    SubspecError(CORRUPT)."""
    out = torch.empty(codes.shape[0], codes.shape[1] * 2, dtype=dtype)
    decode_any(stored, codes, qparams, out, num_threads)
    return out


def decode_any(
    stored: Tensor, codes: Tensor, qparams: Tensor, out: Tensor, num_threads: int
) -> None:
    """Fill out [R, K] like `decode`, with codes uint8 [R, K / 2] as stored; by the plain twin if
    there is no library. Raises SubspecError(CORRUPT)."""
    if unavailable() is None:
        decode_into(out, stored, codes, qparams, 0, num_threads)
    else:
        out.copy_(residual.decode(stored, codes, qparams, out.dtype))


def decode_into(
    out: Tensor, stored: Tensor, codes: Tensor, qparams: Tensor, tile_rows: int, num_threads: int
) -> None:
    """Fill out [R, K] (bf16, fp16 or f32) with what residual.decode returns for stored uint8.

    codes: the uint8 bytes of exactly these rows; tile_rows = 0: as stored, nibble pairs [R, K / 2];
    64 or 32: ATen's packed CPU layout, [R / tile_rows, K, tile_rows / 2] bytes, where byte (k, r)
    holds row r in its low nibble and row r + tile_rows / 2 in its high one; 16: that of
    runtime/kernels/int4.py, [R / 16, K / 8, 16, 4] bytes of nibble pairs. qparams as in `encode`.
    Raises SubspecError(CORRUPT) like residual.decode; `out` then holds nothing of use. Needs
    unavailable() to be None.
    """
    check_part(out, codes, qparams)
    assert out.dtype in FRACTION_BITS
    assert tile_rows in (0, 16, 32, 64) and out.shape[0] % (tile_rows or TILE_ROWS) == 0
    assert out.data_ptr() % 16 == 0, "it is written in vectors"
    num_rows, num_columns = out.shape
    index, payload, lower = sections(stored, num_rows, num_columns, out.dtype)
    wrong = cpp.loaded(SOURCE, _declare).subspec_decode(
        num_rows,
        num_columns,
        codes.data_ptr(),
        tile_rows,
        qparams.data_ptr(),
        qparams.stride(0),
        index.data_ptr(),
        payload.data_ptr(),
        lower.data_ptr() if out.dtype == torch.float32 else None,
        out.data_ptr(),
        FRACTION_BITS[out.dtype],
        num_threads,
    )
    if wrong:
        raise corrupt("the length of a tile does not fit its weights")


def _declare(library: ctypes.CDLL) -> None:
    number, size, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.subspec_encode.restype = size
    library.subspec_encode.argtypes = (
        *(size, size, address, number, number),  # rows, columns, weights, fraction bits, is f32
        *(address, address, size),  # codes, qparams, its stride
        *(address, address, number),  # index, payload, threads
    )
    library.subspec_decode.restype = number
    library.subspec_decode.argtypes = (
        *(size, size, address, number),  # rows, columns, codes, tile rows
        *(address, size, address, address, address),  # qparams, its stride, index, payload, lower
        *(address, number, number),  # out, fraction bits, threads
    )
