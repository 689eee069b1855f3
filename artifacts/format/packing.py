"""The 4-bit layout: pack and unpack side by side, plain torch; the reference for linear.py.

N = output features, K = input features, G = K / GROUP_SIZE
"""

import torch
from torch import Tensor

from subspec.artifacts.model import GROUP_SIZE

ZERO_POINT_CODE = 8  # the code whose value is the zero_point of its group's qparams


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [N, K] in 0..15 -> uint8 [N, K / 2]; an even column goes to the low nibble."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2] -> uint8 [N, K] in 0..15."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).view(packed.shape[0], -1)


def dequantize(codes: Tensor, qparams: Tensor) -> Tensor:
    """codes uint8 [N, K], qparams bf16 [G, N, 2] of (scale, zero_point) -> f32 [N, K].

    weight = (code - ZERO_POINT_CODE) * scale + zero_point, as ATen's 4-bit kernels have
    it. The product is exact in f32, so that a fused multiply-add gives the same bits.
    """
    scale, zero_point = qparams.float().transpose(0, 1)[..., None].unbind(2)  # [N, G, 1] each
    steps = codes.view(codes.shape[0], -1, GROUP_SIZE).float() - ZERO_POINT_CODE
    return (steps * scale + zero_point).view(codes.shape)
