"""A kernel of Triton that calls another function of Triton."""

# mypy: allow-untyped-decorators

import torch
import triton
import triton.language as tl

BLOCK = 32


def twice_plus_one(x: torch.Tensor, out: torch.Tensor) -> None:
    """out = 2 x + 1"""
    _twice_plus_one[(-(-len(x) // BLOCK),)](x, out, len(x), BLOCK=BLOCK, num_warps=1)


@triton.jit
def _twice(x: tl.tensor) -> tl.tensor:
    return x * 2


@triton.jit
def _twice_plus_one(x: tl.tensor, out: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, _twice(tl.load(x + at, mask=at < count)) + 1, mask=at < count)
