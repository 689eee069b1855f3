"""The 4-bit layout of artifacts: pack and unpack in plain torch; the reference for linear.py.

N = output features, K = input features, G = K / GROUP_SIZE
"""

import torch
from torch import Tensor

from subspec.artifacts.model import GROUP_SIZE

ZERO_POINT_CODE = 8  # the code whose value is the zero point of its group


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [N, K] in 0..15 -> uint8 [N, K / 2]; even columns are in the low nibbles."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2] -> uint8 [N, K] in 0..15."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).view(packed.shape[0], -1)


def dequantize(codes: Tensor, qparams: Tensor) -> Tensor:
    """codes uint8 [N, K], qparams bf16 [G, N, 2] of (scale, zero_point) -> f32 [N, K].

    weight = (code - ZERO_POINT_CODE) * scale + zero_point, as in ATen's 4-bit kernels. The product
    is exact in f32, so a fused multiply-add gives the same bits.
    """
    scale, zero_point = qparams.float().transpose(0, 1)[..., None].unbind(2)  # [N, G, 1] each
    steps = codes.view(codes.shape[0], -1, GROUP_SIZE).float() - ZERO_POINT_CODE
    return (steps * scale + zero_point).view(codes.shape)
