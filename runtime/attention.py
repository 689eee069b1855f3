"""Grouped-query attention over cache slots: fast for drafts and prompts, order-free for exactness.

The query heads that share a KV head are folded into rows, so that keys and values are never
repeated and one code serves both devices, chains and trees.
A = query heads, B = KV heads, T = query rows, S = live slots, D = head size
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """q [A, T, D]; keys, values [B, S, D]; visible bool [T, S] -> [A, T, D] in q's dtype."""
    num_heads, num_rows, head_size = q.shape
    repeats = num_heads // keys.shape[0]
    folded = q.to(keys.dtype).reshape(1, keys.shape[0], repeats * num_rows, head_size)
    bias = torch.zeros(visible.shape, dtype=keys.dtype, device=q.device)
    bias.masked_fill_(~visible, float("-inf"))
    output = F.scaled_dot_product_attention(
        folded, keys[None], values[None], attn_mask=bias.repeat(repeats, 1)
    )
    return output.view(num_heads, num_rows, head_size).to(q.dtype)


def attend_order_free(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """The same in fp64, one KV head at a time: after rounding to q's dtype the result does not
    depend on which slots the visible keys are in, nor on how many hidden ones lie between them."""
    num_heads, num_rows, head_size = q.shape
    repeats = num_heads // keys.shape[0]
    folded = q.reshape(keys.shape[0], repeats * num_rows, head_size)
    hidden = ~visible.repeat(repeats, 1)
    output = torch.empty_like(folded)
    for head in range(keys.shape[0]):
        scores = folded[head].double() @ keys[head].double().t()
        scores.mul_(head_size**-0.5).masked_fill_(hidden, float("-inf"))
        output[head] = scores.softmax(-1) @ values[head].double()
    return output.view(num_heads, num_rows, head_size)
