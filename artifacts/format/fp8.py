"""Exact weights that a checkpoint has in 8 bits: FP8 e4m3 (arXiv 2209.05433), with scales.

What such a weight is: bf16(f32(code) * f32(scale)), each rounded once to nearest even, as
transformers dequantizes it. The scale is that of a block of rows and columns.

R = rows of one part of a matrix, K = its columns, G = K / 64 groups
"""

from typing import NamedTuple

import torch
from torch import Tensor

from subspec.artifacts.model import GROUP_SIZE, Linear

NAN_CODE = 0x7F  # without its sign: the one code that is no number
# Of a scale, unless it is 0: no product with a code is a subnormal or infinite f32 or bf16, so it
# does not matter how a machine treats these.
MIN_SCALE, MAX_SCALE = 2.0**-100, 2.0**100
ROWS_AT_ONCE = 1024  # bounds the temporaries


class Scales(NamedTuple):
    """The scales of some rows of a matrix."""

    values: Tensor  # f32 [ceil(N / rows), ceil(K / columns)], of the whole matrix [N, K]
    rows: int  # of a block, counted from the matrix's first row
    columns: int  # of a block: a multiple of GROUP_SIZE
    first_row: int = 0  # of the part

    def from_row(self, first_row: int) -> "Scales":
        return self._replace(first_row=self.first_row + first_row)

    def by_group(self, num_rows: int, num_groups: int) -> Tensor:
        """Scale of every row and group of the part, f32 [R, G]."""
        device = self.values.device
        row = (torch.arange(num_rows, device=device) + self.first_row) // self.rows
        column = torch.arange(num_groups, device=device) * GROUP_SIZE // self.columns
        return self.values[row][:, column]


def scales_of(linear: Linear, values: Tensor, first_row: int = 0) -> Scales:
    assert linear.fp8 is not None and tuple(values.shape) == linear.scale_shape
    return Scales(values, linear.fp8.rows, linear.fp8.columns, first_row)


def dequantize(codes: Tensor, scales: Scales) -> Tensor:
    """FP8 codes uint8 [R, K] -> the exact weights, bf16 [R, K]."""
    out = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    for first in range(0, len(codes), ROWS_AT_ONCE):
        some = codes[first : first + ROWS_AT_ONCE].view(torch.float8_e4m3fn).float()
        groups = some.view(len(some), -1, GROUP_SIZE)
        of_rows = scales.from_row(first).by_group(*groups.shape[:2])
        torch.mul(groups, of_rows[..., None], out=groups)
        out[first : first + len(some)] = some
    return out
