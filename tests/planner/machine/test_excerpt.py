import pytest
import torch
from toys import make_spec

from subspec.artifacts.format.packing import dequantize, unpack_nibbles
from subspec.planner.machine.excerpt import (
    CYCLED_BYTES,
    excerpt,
    fill_with_noise,
    random_substitute,
)

QWEN_32B = make_spec(
    hidden_size=5120, intermediate_size=27648, num_layers=64, num_heads=40, num_kv_heads=8,
    head_size=128, vocab_size=152064,
)  # fmt: skip


def test_a_small_model_is_measured_whole() -> None:
    assert excerpt(make_spec()) == make_spec()


def test_of_a_large_model_one_layer_and_part_of_the_head_are_measured() -> None:
    found = excerpt(QWEN_32B)
    assert found.num_layers == 1
    head = found.linears[-1]
    assert 0.9 * CYCLED_BYTES < head.num_weights * found.item_bytes <= CYCLED_BYTES
    assert found.hidden_size == QWEN_32B.hidden_size


def test_layers_in_between_make_more_than_a_cache_holds() -> None:
    spec = make_spec(hidden_size=1536, intermediate_size=8960, num_layers=28, head_size=128)
    found = excerpt(spec)
    layer_bytes = sum(n.num_weights for n in spec.linears if n.layer == 0) // 2
    assert CYCLED_BYTES - layer_bytes < found.num_layers * layer_bytes <= CYCLED_BYTES


def test_layers_keep_their_kinds_and_their_order() -> None:
    spec = make_spec(num_layers=60, window=8, windowed_layers=(3, 30, 59))
    found = excerpt(spec).layers
    assert found == spec.layers[: len(found)] and 3 < len(found) < 60


@pytest.mark.parametrize("last_kind", [0, 1, 5, 63])
def test_every_kind_of_layer_is_measured_however_large_the_layers_are(last_kind: int) -> None:
    """One layer would do, if all were alike."""
    spec = make_spec(
        hidden_size=5120, intermediate_size=27648, num_layers=64, head_size=128, vocab_size=152064,
        window=8, windowed_layers=(last_kind,),
    )  # fmt: skip
    found = excerpt(spec)
    assert set(found.layers) == set(spec.layers)
    assert found.num_layers == max(2, last_kind + 1)


@pytest.mark.parametrize("vocab_size", [152064, 152063, 151937])
def test_a_part_of_the_head_has_a_substitute_only_if_the_whole_has(vocab_size: int) -> None:
    spec = make_spec(hidden_size=5120, vocab_size=vocab_size)
    assert excerpt(spec).linears[-1].has_substitute == spec.linears[-1].has_substitute
    assert excerpt(spec).vocab_size < vocab_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (300, 1000)])
def test_noise_fills_a_tensor_with_finite_numbers(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    target = torch.full(shape, float("nan"), dtype=dtype)
    fill_with_noise(target, 0.5)
    assert target.isfinite().all()
    if target.numel() > 1000:
        assert target.float().std().item() == pytest.approx(0.5, rel=0.02)


def test_a_random_substitute_has_the_stored_shapes() -> None:
    codes, qparams = random_substitute(48, 192)
    assert codes.shape == (48, 96) and codes.dtype == torch.uint8
    assert (
        qparams.shape == (3, 48, 2) and qparams.dtype == torch.bfloat16 and qparams.is_contiguous()
    )


def test_a_random_substitute_has_weights_around_zero() -> None:
    codes, qparams = random_substitute(64, 1024)
    weight = dequantize(unpack_nibbles(codes), qparams)
    assert abs(weight.mean().item()) < 0.05 * weight.std().item()
