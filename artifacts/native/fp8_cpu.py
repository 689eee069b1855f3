"""fp8.cpp, the compiled twin of artifacts/format/fp8.py and fp8_residual.py, on the CPU.

R = rows of one part of a matrix, K = its columns, G = K / 64 groups
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.format import fp8, fp8_residual
from subspec.artifacts.format.fp8 import Scales
from subspec.artifacts.format.tiles import (
    GUARD_WORDS,
    TILE_ROWS,
    check_part,
    corrupt,
    index_and_payload,
    room_for_words,
)
from subspec.artifacts.model import GROUP_SIZE
from subspec.artifacts.native import cpp

SOURCE = Path(__file__).with_name("fp8.cpp")
MAX_TILE_WORDS = 897  # MOST_WORDS of fp8.cpp


def unavailable() -> str | None:
    """Build the library if needed. Returns None if it can be used, else the reason."""
    return cpp.unavailable(SOURCE, _declare)


def codes_by_windows(weight: Tensor, qparams: Tensor, scales: Scales, num_threads: int) -> Tensor:
    """FP8 codes uint8 [R, K], qparams bf16 [G, R, 2] -> packed 4-bit codes uint8 [R, K / 2], the
    same as fp8_residual.codes_by_windows, which is used if there is no library."""
    if unavailable() is not None:
        return fp8_residual.codes_by_windows(weight, qparams, scales)
    codes = torch.empty(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8)
    check_part(weight, codes, qparams)
    assert weight.dtype == torch.uint8
    cpp.loaded(SOURCE, _declare).subspec_fp8_choose(
        *weight.shape,
        weight.data_ptr(),
        qparams.data_ptr(),
        qparams.stride(0),
        *_fields(scales),
        codes.data_ptr(),
        num_threads,
    )
    return codes


def encode(
    weight: Tensor, codes: Tensor, qparams: Tensor, scales: Scales, num_threads: int
) -> Tensor:
    """weight: FP8 codes uint8 [R, K], codes uint8 [R, K / 2], qparams bf16 [G, R, 2] -> uint8
    [bytes], the same as fp8_residual.encode, which is used if there is no library. `qparams` may
    be rows of a larger tensor, with a stride over the first dimension."""
    if unavailable() is not None:
        return fp8_residual.encode(weight, codes, qparams, scales)
    check_part(weight, codes, qparams)
    assert weight.dtype == torch.uint8
    index, payload = room_for_words(weight.numel(), MAX_TILE_WORDS)
    num_words = cpp.loaded(SOURCE, _declare).subspec_fp8_encode(
        *weight.shape,
        weight.data_ptr(),
        codes.data_ptr(),
        qparams.data_ptr(),
        qparams.stride(0),
        *_fields(scales),
        index.data_ptr(),
        payload.data_ptr(),
        num_threads,
    )
    guard = torch.zeros(GUARD_WORDS, dtype=torch.int32)
    return torch.cat([part.view(torch.uint8) for part in (index, payload[:num_words], guard)])


def decode(
    stored: Tensor, codes: Tensor, qparams: Tensor, scales: Scales, num_threads: int
) -> Tensor:
    """stored uint8 [bytes], codes uint8 [R, K / 2], qparams bf16 [G, R, 2] -> FP8 codes uint8 [R,
    K]; the same as fp8_residual.decode, which is used if there is no library. Raises
    SubspecError(CORRUPT)."""
    out = torch.empty(codes.shape[0], codes.shape[1] * 2, dtype=torch.uint8)
    decode_any(stored, codes, qparams, scales, out, num_threads)
    return out


def decode_any(
    stored: Tensor, codes: Tensor, qparams: Tensor, scales: Scales, out: Tensor, num_threads: int
) -> None:
    """Fill out [R, K] with FP8 codes (uint8) or the exact weights (bf16) like `decode_into`, with
    codes uint8 [R, K / 2] as stored; by the plain twins if there is no library. Raises
    SubspecError(CORRUPT)."""
    if unavailable() is None:
        decode_into(out, stored, codes, qparams, scales, 0, num_threads)
        return
    found = fp8_residual.decode(stored, codes, qparams, scales)
    out.copy_(found if out.dtype == torch.uint8 else fp8.dequantize(found, scales))


def decode_into(
    out: Tensor,
    stored: Tensor,
    codes: Tensor,
    qparams: Tensor,
    scales: Scales,
    tile_rows: int,
    num_threads: int,
) -> None:
    """Fill out [R, K] from stored uint8: the FP8 codes (uint8) that fp8_residual.decode returns, or
    the exact weights (bf16). codes, tile_rows and qparams as in residual_cpu.decode_into. Raises
    SubspecError(CORRUPT) like fp8_residual.decode; `out` then holds nothing of use. Needs
    unavailable() to be None."""
    check_part(out, codes, qparams)
    assert out.dtype in (torch.uint8, torch.bfloat16)
    assert tile_rows in (0, 16, 32, 64) and out.shape[0] % (tile_rows or TILE_ROWS) == 0
    assert out.data_ptr() % 16 == 0, "it is written in vectors"
    index, payload = index_and_payload(stored, *out.shape)
    wrong = cpp.loaded(SOURCE, _declare).subspec_fp8_decode(
        *out.shape,
        codes.data_ptr(),
        tile_rows,
        qparams.data_ptr(),
        qparams.stride(0),
        *_fields(scales),
        index.data_ptr(),
        payload.data_ptr(),
        out.data_ptr(),
        out.dtype == torch.bfloat16,
        num_threads,
    )
    if wrong:
        raise corrupt("the length of a tile does not fit its weights")


def dequantize_into(out: Tensor, codes: Tensor, scales: Scales, num_threads: int) -> None:
    """Fill out bf16 [R, K] with what fp8.dequantize returns for the FP8 codes uint8 [R, K]; by it
    if there is no library."""
    assert out.dtype == torch.bfloat16 and codes.dtype == torch.uint8 and out.shape == codes.shape
    assert out.is_contiguous() and codes.is_contiguous() and out.shape[1] % GROUP_SIZE == 0
    if unavailable() is not None:
        out.copy_(fp8.dequantize(codes, scales))
        return
    assert out.data_ptr() % 16 == 0, "it is written in vectors"
    cpp.loaded(SOURCE, _declare).subspec_fp8_widen(
        *out.shape, codes.data_ptr(), *_fields(scales), out.data_ptr(), num_threads
    )


def _fields(scales: Scales) -> tuple[int, int, int, int, int]:
    values = scales.values
    assert values.dtype == torch.float32 and values.is_contiguous() and values.device.type == "cpu"
    assert scales.columns % GROUP_SIZE == 0
    groups = scales.columns // GROUP_SIZE
    return values.data_ptr(), values.shape[1], scales.rows, groups, scales.first_row


def _declare(library: ctypes.CDLL) -> None:
    number, size, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    scales = (address, size, size, size, size)  # values, columns, a block's rows, groups, first row
    library.subspec_fp8_encode.restype = size
    library.subspec_fp8_encode.argtypes = (
        *(size, size, address),  # rows, columns, weight
        *(address, address, size),  # codes, qparams, its stride
        *scales,
        *(address, address, number),  # index, payload, threads
    )
    library.subspec_fp8_choose.restype = None
    library.subspec_fp8_choose.argtypes = (
        *(size, size, address, address, size),  # rows, columns, weight, qparams, its stride
        *scales,
        *(address, number),  # out, threads
    )
    library.subspec_fp8_decode.restype = number
    library.subspec_fp8_decode.argtypes = (
        *(size, size, address, number),  # rows, columns, codes, tile rows
        *(address, size),  # qparams, its stride
        *scales,
        *(address, address, address, number, number),  # index, payload, out, as bf16, threads
    )
    library.subspec_fp8_widen.restype = None
    library.subspec_fp8_widen.argtypes = (size, size, address, *scales, address, number)
