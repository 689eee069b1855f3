"""The 4-bit layout: pack and unpack side by side, plain torch; the reference for linear.py.

N = output features, K = input features, G = K / GROUP_SIZE
"""

import torch
from torch import Tensor

from subspec.artifacts.model import GROUP_SIZE


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [N, K] in 0..15 -> uint8 [N, K / 2]; an even column goes to the low nibble."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2] -> uint8 [N, K] in 0..15."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).view(packed.shape[0], -1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """codes uint8 [N, K], scale and zero [N, G] -> f32 [N, K]; weight = (code - zero) * scale.

    HQQ's convention (mobiusml/hqq): the zero is a real number.
    """
    grouped = codes.view(codes.shape[0], -1, GROUP_SIZE).float()
    weight = (grouped - zero.float()[..., None]) * scale.float()[..., None]
    return weight.view(codes.shape)
