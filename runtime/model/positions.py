"""What the positions of rows change in their heads: rotary embedding, and queries that grow.

Drafts trace these functions too (runtime/draft/graph_pieces.py): a change here makes the compiled
graphs of artifacts useless.
T = rows, A = query heads, D = head size
"""

import torch
from torch import Tensor

from subspec.artifacts.model import Attention, Rope


def rotate(
    x: Tensor, rope: Rope | None, tables: tuple[Tensor, Tensor] | None, some: slice
) -> Tensor:
    """Rotary embedding of x [heads, T, D] with the rows `some` of cos and sin [rows, rope size];
    features beyond the rope's size pass."""
    if rope is None or tables is None:
        return x
    cos, sin = tables[0][some], tables[1][some]
    turning, passing = x[..., : rope.size], x[..., rope.size :]
    if rope.interleaved:
        swapped = torch.stack((-turning[..., 1::2], turning[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turning.chunk(2, dim=-1)
        swapped = torch.cat((-second, first), dim=-1)
    turned = (turning * cos + swapped * sin).to(x.dtype)
    return torch.cat((turned, passing), dim=-1) if passing.shape[-1] else turned


def grown(query: Tensor, body: Attention, positions: Tensor) -> Tensor:
    """query [A, T, D], larger the further back its row can look."""
    growth = body.query_growth
    if growth is None:
        return query
    factor = 1 + growth.beta * torch.log(1 + torch.floor(positions / growth.positions))
    return query * factor[:, None].to(query.dtype)
