"""An exact weight from its residual and the substitute that fast memory already holds.

The format and its plain twin are artifacts/format/residual.py. Here is which decoder runs where and
how it finds the codes inside the 4-bit kernel's own layout, so that no second copy is kept.
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
    scratch: Tensor  # uint8, of the largest part
    dtype: torch.dtype
    num_threads: int
    num_bad: Tensor  # int32 [1] on the device: tiles that could not be right (cuda)
    record: Record = unrecorded

    def decode(self, part: Part, stored: Tensor) -> Tensor:
        """stored uint8 -> the exact [rows, K], valid until the next call."""
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
        """After a pass: raises SubspecError(CORRUPT) if a tile was bad."""
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
    """out [R, K] = rows `first_row`.. of the exact matrix; by the compiled decoder if there is one,
    else by its plain twin."""
    codes, tile_rows = read_codes(substitute, first_row, out.shape[0])
    qparams = substitute.qparams[:, first_row : first_row + out.shape[0]]
    if residual_cpu.unavailable() is None:
        residual_cpu.decode_into(out, stored, codes, qparams, tile_rows, num_threads)
    else:
        out.copy_(residual.decode(stored, unpack(codes, tile_rows), qparams, out.dtype))
