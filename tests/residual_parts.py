"""Parts of matrices with their codes and qparams, ordinary and adversarial, for tests of residuals.

R = rows, K = columns, G = K / 64 groups
"""

import torch
from torch import Tensor

from subspec.artifacts.format.packing import pack_nibbles

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("typical", "extreme", "on the qparams", "tiny", "huge", "far away")


def random_qparams(kind: str, num_groups: int, num_rows: int, generator: torch.Generator) -> Tensor:
    """bf16 [G, R, 2] of (scale, zero_point), within what the format allows."""
    shape = (num_groups, num_rows)
    uniform, normal = (f(shape, generator=generator) for f in (torch.rand, torch.randn))
    if kind == "typical":
        scale = 0.002 + 0.01 * uniform
        zero_point = scale * normal * 2
    elif kind == "extreme":
        scale = 2.0 ** (uniform * 38 - 24)
        zero_point = (scale * normal * 50).clamp(-6e4, 6e4)
    elif kind == "on the qparams":  # interval ends exactly at zero and on powers of two
        scale = 2.0 ** torch.randint(-14, 3, shape, generator=generator)
        zero_point = scale * torch.randint(-16, 17, shape, generator=generator) / 2
    elif kind == "tiny":
        scale = 2.0 ** (uniform * 9 - 59)
        zero_point = scale * normal * 8
        zero_point[uniform < 0.2] = 1e-40  # subnormal
    elif kind == "huge":
        scale = 2.0 ** (uniform * 9 + 50)
        zero_point = scale * normal * 8
    else:
        scale = 2.0 ** (uniform * 100 - 55)
        zero_point = normal.sign() * torch.finfo(torch.bfloat16).max * (uniform < 0.5)
    qparams = torch.stack((scale, zero_point), -1).bfloat16()
    qparams[..., 0].clamp_(2.0**-59, 2.0**59)
    assert qparams.isfinite().all()
    return qparams


def random_part(
    kind: str,
    num_rows: int,
    num_columns: int,
    dtype: torch.dtype,
    stray: float = 0.03,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """weight [R, K] near its substitutes, a share `stray` of it any bits; codes [R, K]; qparams."""
    generator = torch.Generator().manual_seed(seed)
    qparams = random_qparams(kind, num_columns // 64, num_rows, generator)
    codes = torch.randint(0, 16, (num_rows, num_columns), dtype=torch.uint8, generator=generator)
    scale, zero_point = qparams.float().transpose(0, 1).repeat_interleave(64, 1).unbind(-1)
    inside = codes.float() - 8 + torch.rand(codes.shape, generator=generator) - 0.5
    weight = (inside * scale + zero_point).to(dtype)
    anything = torch.randint(0, 1 << 32, codes.shape, generator=generator).int()
    strays = torch.rand(codes.shape, generator=generator) < stray
    bits = bits_of(weight)
    return torch.where(strays, anything.to(bits.dtype), bits).view(dtype), codes, qparams


def every_pattern(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[64, 1024] with each of the 65,536 patterns once; f32: as upper halves of anything."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randperm(65536, generator=generator).view(64, 1024)
    if dtype != torch.float32:
        return patterns.short().view(dtype)
    lower = torch.randint(0, 65536, patterns.shape, generator=generator)
    return (patterns << 16 | lower).int().view(dtype)


def bits_of(weight: Tensor) -> Tensor:
    """Its bits as integers: NaN equals NaN, and -0 is not 0."""
    return weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16)


def in_layout(codes: Tensor, tile_rows: int) -> Tensor:
    """codes uint8 [R, K] -> bytes as stored (0), as our CPU kernel wants them (16), or ATen's (32,
    64)."""
    if tile_rows == 0:
        return pack_nibbles(codes)
    num_rows, num_columns = codes.shape
    if tile_rows == 16:
        words = pack_nibbles(codes).view(num_rows // 16, 16, num_columns // 8, 4)
        return words.transpose(1, 2).contiguous()
    halves = codes.view(num_rows // tile_rows, 2, tile_rows // 2, num_columns)
    return (halves[:, 0] | halves[:, 1] << 4).transpose(1, 2).contiguous()


def aten_layout(codes: Tensor, inner_tiles: int) -> Tensor:
    """uint8 [N, K] -> int32 [N / 8, K / (16 I), 32, I / 2]: the plain twin of torch's
    _convert_weight_to_int4pack on CUDA (aten/src/ATen/native/cuda/int4mm.cu).

    Column k of row n is in lane 4 (n % 8) + k % 8 / 2, word k % (16 I) / 32 of it, and nibble
    k % 32 / 8, plus 4 where k is odd.
    """
    # n-tile, row; outer k-tile, word, nibble, lane within the row, odd
    split = codes.view(len(codes) // 8, 8, -1, inner_tiles // 2, 4, 4, 2)
    nibbles = split.permute(0, 2, 1, 5, 3, 6, 4).flatten(5)  # [.., 8, 4, I / 2, 8 nibbles]
    words = (nibbles.long() << (4 * torch.arange(8))).sum(-1)
    return words.int().view(len(codes) // 8, -1, 32, inner_tiles // 2)


def gemlite_layout(codes: Tensor) -> Tensor:
    """uint8 [N, K] -> int32 [K / 8, N], column 8 r + j in nibble j of row r."""
    nibbles = codes.view(len(codes), -1, 8).transpose(0, 1)  # [K / 8, N, 8]
    return (nibbles.long() << (4 * torch.arange(8))).sum(-1).int()
