"""Products: packed layouts against ATen's own, kernels against their plain twin."""

import pytest
import torch
from torch import Tensor

from subspec.artifacts.packing import pack_nibbles
from subspec.runtime.linear import (
    ROWS_PER_CALL,
    exact_product,
    exact_product_into,
    int4_product,
    int4_product_plainly,
    pack,
    packed_bytes,
)


def stored(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(16, (n, k), dtype=torch.uint8, generator=generator)
    scale = torch.rand(n, k // 64, generator=generator) * 0.01 + 0.001
    zero = torch.rand(n, k // 64, generator=generator) * 15
    return codes, scale.half(), zero.half()


@pytest.mark.parametrize("shape", [(64, 64), (128, 256), (704, 128), (48, 64), (2048, 192)])
def test_packing_equals_atens_own_layout(shape: tuple[int, int]) -> None:
    codes, scale, zero = stored(*shape)
    room = [torch.empty(size, dtype=torch.uint8) for size in packed_bytes(*shape)]
    weight = pack(pack_nibbles(codes), scale, zero, "aten", *room)
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert torch.equal(weight.packed, expected)
    assert weight.packed.data_ptr() == room[0].data_ptr()


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_4_bit_kernel_agrees_with_its_plain_twin(rows: int) -> None:
    codes, scale, zero = stored(256, 512)
    room = [torch.empty(size, dtype=torch.uint8) for size in packed_bytes(256, 512)]
    weight = pack(pack_nibbles(codes), scale, zero, "aten", *room)
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = int4_product(x, weight).float()
    expected = int4_product_plainly(x, pack_nibbles(codes), scale, zero)
    assert ((got - expected).norm() / expected.norm()).item() < 6e-3  # bf16 scale, zero and result


@pytest.mark.parametrize("rows", [1, 5, ROWS_PER_CALL + 3])
def test_products_in_pieces_equal_one_product(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 64, generator=generator), torch.randn(32, 64, generator=generator)
    wide = torch.zeros(rows, 48)
    exact_product(x, weight, wide[:, 8:40])
    torch.testing.assert_close(wide[:, 8:40], x @ weight.t())
    assert wide[:, :8].abs().sum() + wide[:, 40:].abs().sum() == 0
    gate = torch.full((rows, 32), 2.0)
    exact_product_into(x, weight, gate)
    torch.testing.assert_close(gate, 2.0 * (x @ weight.t()))
