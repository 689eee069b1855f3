"""FP8 matrices with their codes, qparams and scales, ordinary and adversarial."""

import torch
from residual_parts import random_qparams
from torch import Tensor

from subspec.artifacts.format import fp8, fp8_residual
from subspec.artifacts.format.fp8 import Scales
from subspec.planner.build.quantize import quantize

KINDS = ("typical", "extreme", "on the qparams", "tiny", "huge", "far away")
MAX_FP8 = 448.0


def quantized(matrix: Tensor, block: tuple[int, int]) -> tuple[Tensor, Scales]:
    """f32 [N, K] in whole blocks -> FP8 codes uint8 and their scales."""
    height, width = block
    blocks = matrix.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    largest = blocks.abs().amax((1, 3), keepdim=True)
    scale = torch.where(largest > 0, largest / MAX_FP8, torch.ones_like(largest))
    codes = (blocks / scale).to(torch.float8_e4m3fn).view(matrix.shape).view(torch.uint8)
    return codes, Scales(scale[:, 0, :, 0].contiguous(), height, width)


def own_part(
    num_rows: int,
    num_columns: int,
    block: tuple[int, int] = (128, 128),
    matrix: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Scales]:
    """As an artifact has it: FP8 codes [R, K], packed codes by windows, qparams, scales."""
    generator = torch.Generator().manual_seed(seed)
    if matrix is None:
        matrix = torch.randn(num_rows, num_columns, generator=generator) * 0.02
    weight, scales = quantized(matrix, block)
    qparams = quantize(fp8.dequantize(weight, scales), "cpu").qparams
    return weight, fp8_residual.codes_by_windows(weight, qparams, scales), qparams, scales


def adversarial_part(
    kind: str, scale: float, num_columns: int = 128, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Scales]:
    """Every FP8 code beside every 4-bit code: FP8 codes [256, K], codes [256, K], qparams, scales
    of blocks of 64 rows, of which every second one is `scale`, the others bring the windows near
    FP8 numbers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.stack([torch.randperm(256, generator=generator) for _ in range(num_columns)], 1)
    codes = (torch.arange(256)[:, None] + torch.arange(num_columns)) // 16 % 16
    qparams = random_qparams(kind, num_columns // 64, 256, generator)
    near = qparams[..., 0].float().median() * 2.0 ** torch.randint(-6, 2, (), generator=generator)
    values = torch.tensor([[scale], [float(near)], [scale], [float(near)]])
    scales = Scales(values.expand(4, num_columns // 64).contiguous(), 64, 64)
    return weight.to(torch.uint8), codes.to(torch.uint8), qparams, scales
