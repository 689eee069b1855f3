"""Exact weights from residuals and the substitutes that are in fast memory.

The format and its plain twin are in artifacts/format/residual.py. This module chooses the decoder
of the device, which reads the codes in the 4-bit kernel's layout, so that no second copy is needed.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format import residual
from subspec.artifacts.model import Part
from subspec.artifacts.native import residual_cpu
from subspec.runtime.clock import Record, unrecorded
from subspec.runtime.kernels.linear import Int4Weight, read_codes, unpack


@dataclass(frozen=True)
class ResidualDecoder:
    """Decodes one part at a time into `scratch`, which the next part overwrites."""

    substitutes: Mapping[str, Int4Weight]  # by matrix
    scratch: Tensor  # uint8 [bytes of the largest part]
    dtype: torch.dtype
    num_threads: int
    num_bad: Tensor  # int32 [1] on the device: number of invalid tiles (cuda)
    record: Record = unrecorded

    def decode(self, part: Part, stored: Tensor) -> Tensor:
        """stored uint8 [bytes] -> exact weights [rows, K], valid until the next call. Raises
        SubspecError(CORRUPT); on cuda only `check` finds invalid tiles."""
        started = time.perf_counter()
        out = self.scratch[: part.num_bytes].view(self.dtype).view(part.num_rows, -1)
        substitute = self.substitutes[part.linear.name]
        if out.device.type == "cuda":
            self._on_gpu(out, part, stored, substitute)
        else:
            decode_on_cpu(out, part.first_row, stored, substitute, self.num_threads)
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

    def _on_gpu(self, out: Tensor, part: Part, stored: Tensor, substitute: Int4Weight) -> None:
        from subspec.runtime.kernels import residual_triton  # triton: only where there is a GPU

        gemlite = substitute.kernel == "gemlite"
        codes = substitute.packed.codes if gemlite else substitute.packed
        residual_triton.decode_into(
            out, stored, codes, substitute.qparams, part.first_row, substitute.kernel, self.num_bad
        )


def decode_on_cpu(
    out: Tensor, first_row: int, stored: Tensor, substitute: Int4Weight, num_threads: int
) -> None:
    """Fill out [R, K] with the rows of the exact matrix from `first_row`, from stored uint8
    [bytes]. By the compiled decoder if there is one, else by its plain twin. Raises
    SubspecError(CORRUPT)."""
    codes, tile_rows = read_codes(substitute, first_row, out.shape[0])
    qparams = substitute.qparams[:, first_row : first_row + out.shape[0]]
    if residual_cpu.unavailable() is None:
        residual_cpu.decode_into(out, stored, codes, qparams, tile_rows, num_threads)
    else:
        out.copy_(residual.decode(stored, unpack(codes, tile_rows), qparams, out.dtype))
