"""One full-precision weight -> its 4-bit substitute: HQQ, group 64 along the input features.

The algorithm is that of mobiusml/hqq (`optimize_weights_proximal_legacy`: 20 proximal iterations
on the zero, p = 0.7, beta = 10), with three differences. Scale and zero are rounded to fp16, as
they are stored, and the codes are rounded once more for them. There is no early stop: it looks at
the whole matrix, so that a group's codes would depend on its neighbours. And the iteration runs in
units of codes: see `_fit_zero`.

N = output features, K = input features, G = K / GROUP_SIZE, B = groups of one block
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.model import GROUP_SIZE
from subspec.artifacts.packing import dequantize, pack_nibbles, unpack_nibbles

HIGHEST_CODE = 15
ITERATIONS = 20
POWER = 0.7  # hqq's lp_norm
BETA = 10.0
SHRINK_BEGINS = 0.17  # |x| - |x|^(POWER - 1) / BETA is negative up to |x| = 0.1701

SMALLEST_SCALE = 2.0**-14  # the smallest normal fp16: kernels may flush what is below to zero
LARGEST_FP16 = 65504.0
LARGEST_ZERO = 32768.0  # initially; leaves the iterations room below LARGEST_FP16

# Speed only: the codes do not depend on them. A thread's share of the temporaries fits its cache; a
# GPU wants few large launches, of about 0.4 GB of temporaries.
CPU_GROUPS_PER_THREAD = 2048
CUDA_GROUPS = 1 << 18
HQQ_WEIGHTS_PER_CALL = 1 << 24  # hqq's temporaries are about ten times this, in f32


@dataclass(frozen=True)
class Substitute:
    """weight ~ (code - zero) * scale, on the host, as it is stored in an artifact."""

    codes: Tensor  # uint8 [N, K / 2], packed by pack_nibbles
    scale: Tensor  # fp16 [N, G], positive and normal
    zero: Tensor  # fp16 [N, G], a real number


@torch.no_grad()
def quantize(weight: Tensor, device: torch.device | str) -> Substitute:
    """weight bf16, fp16 or f32 [N, K] on any device -> its substitute, computed on `device`.

    Every group is quantised on its own, so the result depends neither on the number of rows nor on
    that of threads; it may differ in a few codes between a CPU and a GPU. Raises
    SubspecError(CORRUPT) if a weight is NaN or infinite; the caller knows the tensor's name.
    """
    _check(weight)
    device = torch.device(device)
    groups = weight.reshape(-1, GROUP_SIZE)
    codes = torch.empty(len(groups), GROUP_SIZE // 2, dtype=torch.uint8)
    scale = torch.empty(len(groups), 1, dtype=torch.float16)
    zero = torch.empty_like(scale)
    on_cpu = device.type == "cpu"
    num_groups = CPU_GROUPS_PER_THREAD * torch.get_num_threads() if on_cpu else CUDA_GROUPS
    for first in range(0, len(groups), num_groups):
        block = slice(first, first + num_groups)
        original = groups[block].to(device, torch.float32)  # [B, 64]
        low, high = torch.aminmax(original, dim=1, keepdim=True)
        stored_scale = _fit_scale(low, high).half()
        stored_zero = _fit_zero(original, low, high, stored_scale.float()).half()
        codes[block] = pack_nibbles(_nearest_codes(original, stored_scale, stored_zero))
        scale[block], zero[block] = stored_scale, stored_zero
    return _substitute(weight, codes, scale, zero)


@torch.no_grad()
def quantize_with_hqq(weight: Tensor, device: torch.device | str) -> Substitute:
    """The same with the hqq package: the reference. Its early stop looks at HQQ_WEIGHTS_PER_CALL
    weights. Raises SubspecError(USAGE) without the package, else as `quantize`."""
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
        scale = found["scale"].float().clamp(SMALLEST_SCALE, LARGEST_FP16).half()
        zero = found["zero"].float().nan_to_num(0.0).clamp(-LARGEST_FP16, LARGEST_FP16).half()
        codes = pack_nibbles(_nearest_codes(original, scale, zero))
        blocks.append((codes.cpu(), scale.cpu(), zero.cpu()))
    codes, scale, zero = (torch.cat(tensors) for tensors in zip(*blocks, strict=True))
    return _substitute(weight, codes, scale, zero)


QUANTIZERS: dict[str, Callable[[Tensor, torch.device | str], Substitute]] = {
    "blocked": quantize,
    "hqq": quantize_with_hqq,
}


@torch.no_grad()
def relative_error(weight: Tensor, substitute: Substitute) -> float:
    """|weight - substitute| / |weight| in the Frobenius norm; 0 for a matrix of zeros."""
    squared_error = squared_norm = 0.0
    rows = max(1, (1 << 22) // weight.shape[1])  # temporaries of about 100 MB
    pieces = zip(
        weight.split(rows),
        substitute.codes.split(rows),
        substitute.scale.split(rows),
        substitute.zero.split(rows),
        strict=True,
    )
    for exact, codes, scale, zero in pieces:
        exact = exact.cpu().double()  # the square of a large bf16 overflows f32
        approximate = dequantize(unpack_nibbles(codes), scale, zero).double()
        squared_error += (exact - approximate).square().sum().item()
        squared_norm += exact.square().sum().item()
    return float((squared_error / squared_norm) ** 0.5) if squared_norm else 0.0


def _fit_scale(low: Tensor, high: Tensor) -> Tensor:
    """Smallest and largest weight f32 [B, 1] of each group -> scale f32 [B, 1].

    The range over 15, but large enough that the zero, -low / scale, fits fp16 when the range is
    narrow and far from 0 (a constant group), and within the normal fp16 numbers itself.
    """
    magnitude = torch.maximum(low.abs(), high.abs())
    scale = torch.maximum((high - low) / HIGHEST_CODE, magnitude / LARGEST_ZERO)
    return scale.clamp_(SMALLEST_SCALE, LARGEST_FP16)


def _fit_zero(original: Tensor, low: Tensor, high: Tensor, scale: Tensor) -> Tensor:
    """original f32 [B, 64], low, high and scale f32 [B, 1] -> zero f32 [B, 1] within fp16.

    hqq repeats: e = shrink(residual); zero = mean(code - (weight - e) / scale), with the residual
    weight - (code - zero) * scale. In units of codes, r = residual / scale, that is
    zero -= mean(r - e / scale). And e is exactly 0 unless |residual| > SHRINK_BEGINS, which few
    groups of a language model reach: the others need no power, which is most of hqq's time.
    """
    scaled = original / scale  # [B, 64]
    zero = (-low / scale).clamp_(-LARGEST_FP16, LARGEST_FP16)
    # A residual beyond half a code is a weight outside the range, so the outermost two tell.
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
        zero = zero.sub_(residual.mean(dim=1, keepdim=True)).clamp_(-LARGEST_FP16, LARGEST_FP16)
    return zero


def _without_shrunk(residual: Tensor, scale: Tensor) -> Tensor:
    """residual - shrink(residual), both f32 [B, 64] in units of codes; scale f32 [B, 1].

    In f64, because torch computes a power in f32 by different code at the ends of a thread's share.
    """
    exact = residual.double() * scale
    magnitude = exact.abs()
    shrunk = (magnitude - magnitude.pow(POWER - 1) / BETA).clamp_min_(0.0)
    return ((exact - shrunk.copysign_(exact)) / scale).float()


def _nearest_codes(original: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """original f32 [B, 64], scale and zero fp16 [B, 1] -> their best codes, uint8 [B, 64]."""
    codes = (original / scale.float()).add_(zero.float()).round_()
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


def _substitute(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Substitute:
    """Tensors with one row per group -> one row per output feature."""
    rows = weight.shape[0]
    return Substitute(codes.view(rows, -1), scale.view(rows, -1), zero.view(rows, -1))
