"""Exact weights from residuals and the substitutes that are in fast memory, or from FP8 codes.

The formats and their plain twins are residual.py, fp8.py and fp8_residual.py in artifacts/format.
This module chooses the decoder of the device, which reads the codes in the 4-bit kernel's layout,
so that no second copy is needed.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format import fp8, fp8_residual, residual
from subspec.artifacts.format.fp8 import Scales
from subspec.artifacts.model import Part
from subspec.artifacts.native import fp8_cpu, residual_cpu
from subspec.runtime.clock import Record, unrecorded
from subspec.runtime.kernels import triton_driver
from subspec.runtime.kernels.linear import Int4Weight, read_codes, unpack

DEQUANTIZED_ROWS = 64  # by the plain twin of FP8's kernel on a GPU, at a time: small temporaries


@dataclass(frozen=True)
class ResidualDecoder:
    """Decodes one part at a time into `scratch`, which the next part overwrites."""

    substitutes: Mapping[str, Int4Weight]  # by matrix
    scales: Mapping[str, Scales]  # of FP8 matrices
    scratch: Tensor  # uint8 [bytes of the largest part]
    dtype: torch.dtype
    num_threads: int
    num_bad: Tensor  # int32 [1] on the device: number of invalid tiles (cuda)
    record: Record = unrecorded

    def decode(self, part: Part, stored: Tensor) -> Tensor:
        """stored: residual uint8 [bytes], or FP8 codes [rows, K] -> exact weights [rows, K], valid
        until the next call. Raises SubspecError(CORRUPT); on cuda only `check` finds invalid
        tiles."""
        started = time.perf_counter()
        out = self.scratch[: part.num_bytes].view(self.dtype).view(part.num_rows, -1)
        scales = None
        if part.linear.fp8:
            scales = self.scales[part.linear.name].from_row(part.first_row)
        if stored.dtype != torch.uint8:
            assert scales is not None
            self._dequantize(out, stored.view(torch.uint8), scales)
        elif out.device.type == "cuda":
            self._on_gpu(out, part, stored, scales)
        else:
            substitute = self.substitutes[part.linear.name]
            decode_on_cpu(out, part.first_row, stored, substitute, scales, self.num_threads)
        self.record("decode", part.name, started, {"weights": part.num_weights})
        return out

    def check(self) -> None:
        """Raise SubspecError(CORRUPT) if a tile was invalid; call it after a pass."""
        if self.num_bad.device.type == "cuda" and int(self.num_bad):
            raise SubspecError(
                Exit.CORRUPT,
                f"{int(self.num_bad)} tiles of residuals do not fit their substitutes",
                "copy or build the artifact again",
            )

    def _dequantize(self, out: Tensor, codes: Tensor, scales: Scales) -> None:
        if out.device.type == "cpu":
            fp8_cpu.dequantize_into(out, codes, scales, self.num_threads)
        elif triton_driver.unavailable(out.device) is None:
            from subspec.runtime.kernels import fp8_triton  # triton: only where there is a GPU

            fp8_triton.dequantize_into(out, codes, scales)
        else:
            for first in range(0, len(out), DEQUANTIZED_ROWS):
                some = slice(first, first + DEQUANTIZED_ROWS)
                out[some] = fp8.dequantize(codes[some], scales.from_row(first))

    def _on_gpu(self, out: Tensor, part: Part, stored: Tensor, scales: Scales | None) -> None:
        from subspec.runtime.kernels import fp8_triton, residual_triton

        substitute = self.substitutes[part.linear.name]
        gemlite = substitute.kernel == "gemlite"
        codes = substitute.packed.codes if gemlite else substitute.packed
        kernel, qparams, bad = substitute.kernel, substitute.qparams, self.num_bad
        if scales is not None:
            fp8_triton.decode_into(out, stored, codes, qparams, scales, kernel, bad)
        else:
            residual_triton.decode_into(out, stored, codes, qparams, part.first_row, kernel, bad)


def decode_on_cpu(
    out: Tensor,
    first_row: int,
    stored: Tensor,
    substitute: Int4Weight,
    scales: Scales | None,
    num_threads: int,
) -> None:
    """Fill out [R, K] with the rows of the exact matrix from `first_row`, from stored uint8
    [bytes]. scales: of these rows, if the matrix is in FP8. By the compiled decoder if there is
    one, else by its plain twin. Raises SubspecError(CORRUPT)."""
    codes, tile_rows = read_codes(substitute, first_row, out.shape[0])
    qparams = substitute.qparams[:, first_row : first_row + out.shape[0]]
    if scales is None:
        if residual_cpu.unavailable() is None:
            residual_cpu.decode_into(out, stored, codes, qparams, tile_rows, num_threads)
        else:
            out.copy_(residual.decode(stored, unpack(codes, tile_rows), qparams, out.dtype))
    elif fp8_cpu.unavailable() is None:
        fp8_cpu.decode_into(out, stored, codes, qparams, scales, tile_rows, num_threads)
    else:
        found = fp8_residual.decode(stored, unpack(codes, tile_rows), qparams, scales)
        out.copy_(fp8.dequantize(found, scales))
