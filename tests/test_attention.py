"""Attention: the folded kernel, and its order-free twin."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subspec.runtime.attention import attend, attend_order_free

A, B, T, S, D = 14, 2, 24, 192, 32  # query heads, KV heads, rows, slots, head size


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(A, T, D, generator=generator).to(dtype)
    keys, values = torch.randn(2, B, S, D, generator=generator).to(dtype)
    visible = torch.arange(S) <= 100 + torch.arange(T)[:, None]
    return q, keys, values, visible


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_agree_with_grouped_query_attention_of_torch(dtype: torch.dtype) -> None:
    q, keys, values, visible = inputs(dtype)
    repeated = [t.float().repeat_interleave(A // B, 0) for t in (keys, values)]
    expected = F.scaled_dot_product_attention(q.float(), *repeated, attn_mask=visible)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for attention in (attend, attend_order_free):
        got = attention(q, keys, values, visible).float()
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_free_twin_gives_the_same_bits_wherever_the_slots_are(
    dtype: torch.dtype,
) -> None:
    q, keys, values, visible = inputs(dtype)
    expected = attend_order_free(q, keys, values, visible)
    for seed in range(5):
        order = torch.randperm(S, generator=torch.Generator().manual_seed(seed))
        moved = attend_order_free(q, keys[:, order], values[:, order], visible[:, order])
        assert torch.equal(moved, expected)


def test_the_order_free_twin_ignores_how_many_hidden_slots_there_are() -> None:
    q, keys, values, visible = inputs(torch.bfloat16)
    expected = attend_order_free(q, keys, values, visible)
    shorter = attend_order_free(q, keys[:, :128], values[:, :128], visible[:, :128])
    assert torch.equal(shorter, expected)
