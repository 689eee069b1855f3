import torch

from subspec.artifacts.format.packing import dequantize, pack_nibbles, unpack_nibbles


def test_an_even_column_lies_in_the_low_nibble_of_its_byte() -> None:
    codes = torch.tensor([[1, 2, 3, 4], [15, 0, 0, 15]], dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.uint8
    assert packed.numpy().tobytes() == bytes([0x21, 0x43, 0x0F, 0xF0])


def test_unpacking_undoes_packing_for_every_pair_of_codes() -> None:
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)  # [256, 2]
    codes = pairs.view(4, 128)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


def test_packing_undoes_unpacking_for_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack_nibbles(unpack_nibbles(packed)), packed)


def test_dequantizing_gives_the_numbers_computed_by_hand() -> None:
    codes = torch.tensor([[3] * 64 + [5] * 64, [0] * 64 + [15] * 64], dtype=torch.uint8)
    qparams = torch.tensor([[[0.5, 3.5], [0.25, 3.0]], [[2.0, 1.0], [1.0, -7.0]]]).bfloat16()
    weight = dequantize(codes, qparams)
    assert weight.dtype == torch.float32
    expected = torch.tensor([[1.0] * 64 + [-5.0] * 64, [1.0] * 64 + [0.0] * 64])
    assert torch.equal(weight, expected)


def test_dequantizing_rounds_once_to_f32() -> None:
    codes = torch.arange(64, dtype=torch.uint8).remainder(16).expand(7, 64).contiguous()
    qparams = torch.randn(1, 7, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale, zero_point = qparams[0].double().split(1, dim=1)
    exact = (codes.double() - 8) * scale + zero_point
    assert torch.equal(dequantize(codes, qparams), exact.float())
