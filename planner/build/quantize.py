"""One full-precision weight -> its 4-bit substitute: HQQ, group 64 along the input features.

The algorithm is that of mobiusml/hqq (`optimize_weights_proximal_legacy`: 20 proximal iterations
on the zero, p = 0.7, beta = 10), with these differences. Scale and zero point are stored in bf16,
as the 4-bit kernels use them: the scale is rounded before the zero is fitted to it, and at the end
the codes are rounded again for both. There is no early stop: it depends on the whole matrix, so a
group's codes would depend on other groups. The iteration runs in units of codes: see `_fit_zero`.

N = output features, K = input features, G = K / GROUP_SIZE, B = groups of one block
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.packing import ZERO_POINT_CODE, pack_nibbles
from subspec.artifacts.model import GROUP_SIZE

HIGHEST_CODE = 15
ITERATIONS = 20
POWER = 0.7  # hqq's lp_norm
BETA = 10.0
SHRINK_BEGINS = 0.17  # |x| - |x|^(POWER - 1) / BETA is negative up to |x| = 0.1701

MIN_SCALE = 2.0**-59  # no end of a code's interval, zero_point + (code - 8 +- 1/2) * scale, is a
MAX_SCALE = 2.0**59  # subnormal f32, which a machine may take for zero, and none overflows
MAX_ZERO_POINT = torch.finfo(torch.bfloat16).max
ZERO_POINT_STEPS = (
    256 * 7
)  # a zero_point within as many steps of 0 is rounded to bf16 by at most 7 steps

# Speed only: the codes do not depend on them. A thread's share of the temporaries fits its cache; a
# GPU wants few large launches, of about 0.4 GB of temporaries.
CPU_GROUPS_PER_THREAD = 2048
CUDA_GROUPS = 1 << 18
HQQ_WEIGHTS_PER_CALL = 1 << 24  # hqq's temporaries are about ten times this, in f32


@dataclass(frozen=True)
class Substitute:
    """weight ~ (code - ZERO_POINT_CODE) * scale + zero_point, on the host, as it is stored."""

    codes: Tensor  # uint8 [N, K / 2], packed by pack_nibbles
    qparams: Tensor  # bf16 [G, N, 2]: scale, within MIN_ and MAX_SCALE, and zero_point, finite


@torch.no_grad()
def quantize(weight: Tensor, device: torch.device | str) -> Substitute:
    """weight bf16, fp16 or f32 [N, K] on any device -> its substitute, computed on `device`.

    Every group is quantized on its own, so the result depends neither on the number of rows nor on
    that of threads; a few codes may differ between CPU and GPU. Raises SubspecError(CORRUPT) if a
    weight is NaN or infinite; the caller adds the tensor's name.
    """
    _check(weight)
    device = torch.device(device)
    groups = weight.reshape(-1, GROUP_SIZE)
    codes = torch.empty(len(groups), GROUP_SIZE // 2, dtype=torch.uint8)
    qparams = torch.empty(len(groups), 2, dtype=torch.bfloat16)
    on_cpu = device.type == "cpu"
    num_groups = CPU_GROUPS_PER_THREAD * torch.get_num_threads() if on_cpu else CUDA_GROUPS
    for first in range(0, len(groups), num_groups):
        block = slice(first, first + num_groups)
        original = groups[block].to(device, torch.float32)  # [B, 64]
        low, high = torch.aminmax(original, dim=1, keepdim=True)
        scale = _fit_scale(low, high).bfloat16().float()
        stored = _qparams(scale, _fit_zero(original, low, high, scale))
        codes[block] = pack_nibbles(_nearest_codes(original, stored))
        qparams[block] = stored
    return _substitute(weight, codes, qparams)


@torch.no_grad()
def quantize_with_hqq(weight: Tensor, device: torch.device | str) -> Substitute:
    """Quantize like `quantize`, with the hqq package, the reference. Its early stop depends on
    blocks of HQQ_WEIGHTS_PER_CALL weights. Raises SubspecError(USAGE) without the package."""
    try:
        from hqq.core.quantize import Quantizer  # 3 s and torch._dynamo: only when asked for
    except ImportError as error:
        raise SubspecError(
            Exit.USAGE, f"the quantizer hqq cannot be loaded: {error}", "pip install 'subspec[hqq]'"
        ) from None
    _check(weight)
    groups = weight.reshape(-1, GROUP_SIZE)
    num_groups = HQQ_WEIGHTS_PER_CALL // GROUP_SIZE
    blocks = []
    for original in groups.split(num_groups):
        original = original.to(device, torch.float32)
        _, found = Quantizer.quantize(
            original, nbits=4, group_size=GROUP_SIZE, axis=1, bitpack=False, device=str(device)
        )
        scale = found["scale"].float().clamp(MIN_SCALE, MAX_SCALE).bfloat16().float()
        stored = _qparams(scale, found["zero"].float().nan_to_num(0.0))
        codes = pack_nibbles(_nearest_codes(original, stored))
        blocks.append((codes.cpu(), stored.cpu()))
    codes, qparams = (torch.cat(tensors) for tensors in zip(*blocks, strict=True))
    return _substitute(weight, codes, qparams)


QUANTIZERS: dict[str, Callable[[Tensor, torch.device | str], Substitute]] = {
    "blocked": quantize,
    "hqq": quantize_with_hqq,
}


def _fit_scale(low: Tensor, high: Tensor) -> Tensor:
    """Smallest and largest weight f32 [B, 1] of each group -> scale f32 [B, 1].

    The range over 15, but large enough that the codes reach a group that is narrow and far from 0
    (a constant one) wherever bf16 puts the zero_point: it moves by up to 1/256 of itself.
    """
    magnitude = torch.maximum(low.abs(), high.abs())
    scale = torch.maximum((high - low) / HIGHEST_CODE, magnitude / ZERO_POINT_STEPS)
    return scale.clamp_(MIN_SCALE, MAX_SCALE)


def _fit_zero(original: Tensor, low: Tensor, high: Tensor, scale: Tensor) -> Tensor:
    """original f32 [B, 64], low, high and scale f32 [B, 1] -> zero f32 [B, 1].

    hqq begins with the lowest weight at code 0, and repeats: e = shrink(residual);
    zero = mean(code - (weight - e) / scale), with the residual weight - (code - zero) * scale. In
    units of codes, r = residual / scale, that is zero -= mean(r - e / scale). And e is exactly 0
    unless |residual| > SHRINK_BEGINS, which few groups of a language model reach: the others need
    no power, which is most of hqq's time.
    """
    scaled = original / scale  # [B, 64]
    # If the scale was clamped it does not span the range, so start with the middle of the range at
    # ZERO_POINT_CODE: zeros are then exactly 0, and codes remain on both sides of a rounded
    # zero_point.
    at_bound = ((high - low) / scale - HIGHEST_CODE).abs() > 1
    middle = low / 2 + high / 2  # the sum of two large f32 would overflow
    zero = torch.where(at_bound, ZERO_POINT_CODE - middle / scale, -low / scale)
    # A residual above half a code is a weight outside the range, so the extremes suffice.
    allowed = SHRINK_BEGINS / scale
    allowed = allowed.masked_fill_(allowed <= 0.5, -torch.inf)
    lowest, highest = -allowed - low / scale, HIGHEST_CODE + allowed - high / scale
    residual, codes = torch.empty_like(scaled), torch.empty_like(scaled)
    for _ in range(ITERATIONS):
        torch.add(scaled, zero, out=residual)
        torch.round(residual, out=codes).clamp_(0, HIGHEST_CODE)
        residual.sub_(codes)
        large = ((zero < lowest) | (zero > highest)).squeeze(1).nonzero().squeeze(1)
        if len(large):
            residual[large] = _without_shrunk(residual[large], scale[large])
        zero.sub_(residual.mean(dim=1, keepdim=True))
    return zero


def _without_shrunk(residual: Tensor, scale: Tensor) -> Tensor:
    """residual - shrink(residual), both f32 [B, 64] in units of codes; scale f32 [B, 1].

    In f64, because torch computes a power in f32 by different code at the ends of a thread's share.
    """
    exact = residual.double() * scale
    magnitude = exact.abs()
    shrunk = (magnitude - magnitude.pow(POWER - 1) / BETA).clamp_min_(0.0)
    return ((exact - shrunk.copysign_(exact)) / scale).float()


def _qparams(scale: Tensor, zero: Tensor) -> Tensor:
    """scale, already rounded to bf16, and zero, both f32 [B, 1] -> bf16 [B, 2]."""
    zero_point = ((ZERO_POINT_CODE - zero) * scale).clamp_(-MAX_ZERO_POINT, MAX_ZERO_POINT)
    return torch.cat((scale, zero_point), dim=1).bfloat16()


def _nearest_codes(original: Tensor, qparams: Tensor) -> Tensor:
    """original f32 [B, 64], qparams bf16 [B, 2] -> the nearest codes, uint8 [B, 64]."""
    scale, zero_point = qparams[:, :1].float(), qparams[:, 1:].float()
    codes = (original - zero_point).div_(scale).round_().add_(ZERO_POINT_CODE)
    return codes.clamp_(0, HIGHEST_CODE).to(torch.uint8)


def _check(weight: Tensor) -> None:
    assert weight.dim() == 2 and weight.shape[1] % GROUP_SIZE == 0, "has_substitute is false"
    assert weight.dtype in (torch.bfloat16, torch.float16, torch.float32), weight.dtype
    num_bad = sum(int((~torch.isfinite(rows)).sum()) for rows in weight.split(1024))
    if num_bad:
        raise SubspecError(
            Exit.CORRUPT,
            f"{num_bad} of {weight.numel()} weights are NaN or infinite, expected finite numbers",
            "download the checkpoint again",
        )


def _substitute(weight: Tensor, codes: Tensor, qparams: Tensor) -> Substitute:
    """Tensors with one row per group, [N * G, ...], -> those of a matrix."""
    rows = weight.shape[0]
    by_row = qparams.view(rows, -1, 2)  # [N, G, 2]
    return Substitute(codes.view(rows, -1), by_row.transpose(0, 1).contiguous())
