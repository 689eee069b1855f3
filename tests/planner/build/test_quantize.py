import importlib.util
import sys

import pytest
import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.packing import dequantize, pack_nibbles, unpack_nibbles
from subspec.artifacts.model import GROUP_SIZE
from subspec.planner.build import quantize as module
from subspec.planner.build.quantize import (
    MAX_SCALE,
    MIN_SCALE,
    QUANTIZERS,
    Substitute,
    quantize,
    quantize_with_hqq,
)

needs_hqq = pytest.mark.skipif(
    importlib.util.find_spec("hqq") is None, reason="needs the hqq package: pip install hqq"
)


def like_a_model(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    """Normal weights, a few rows far larger, one weight in 500 an outlier; bf16."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator) * 0.03
    weight *= torch.randn(num_rows, 1, generator=generator).exp()
    outliers = torch.rand(num_rows, num_columns, generator=generator) < 0.002
    return torch.where(outliers, weight * 10, weight).bfloat16()


def codes_of(substitute: Substitute) -> Tensor:
    return unpack_nibbles(substitute.codes).int()


def per_weight(substitute: Substitute) -> tuple[Tensor, Tensor]:
    """scale and zero_point, f64 [N, K] each"""
    qparams = substitute.qparams.double().transpose(0, 1).repeat_interleave(GROUP_SIZE, dim=1)
    return qparams[..., 0], qparams[..., 1]


def restored(substitute: Substitute) -> Tensor:
    return dequantize(unpack_nibbles(substitute.codes), substitute.qparams)


def relative_error(weight: Tensor, substitute: Substitute) -> float:
    """|weight - substitute| / |weight| in the Frobenius norm; 0 for zeros."""
    exact = weight.cpu().double()  # the square of a large bf16 overflows f32
    norm = exact.norm().item()
    return (exact - restored(substitute).double()).norm().item() / norm if norm else 0.0


def same(a: Substitute, b: Substitute) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.qparams, b.qparams)


def of_groups(weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Substitute:
    """codes [N * G, 64], scale and zero_point [N * G, 1] in any dtype -> a Substitute with qparams
    in the dtype of scale"""
    rows = weight.shape[0]
    packed = pack_nibbles(codes.to(torch.uint8).view(rows, -1))
    return Substitute(packed, torch.cat((scale, zero_point), 1).view(rows, -1, 2).transpose(0, 1))


def rounded_to_nearest(weight: Tensor) -> Substitute:
    groups = weight.float().view(-1, GROUP_SIZE)
    low, high = torch.aminmax(groups, dim=1, keepdim=True)
    scale = (high - low) / 15
    codes = (groups / scale - low / scale).round().clamp(0, 15)
    return of_groups(weight, codes, scale, low + 8 * scale)


def iterated_plainly(weight: Tensor, scale: Tensor) -> Substitute:
    """The plain twin: hqq's iteration as it is written down, in units of weights, in f64.
    scale [G, N]"""
    groups, scale = weight.double().view(-1, GROUP_SIZE), scale.double().t().reshape(-1, 1)
    zero = -groups.amin(dim=1, keepdim=True) / scale
    for _ in range(20):
        codes = (groups / scale + zero).round().clamp(0, 15)
        residual = groups - (codes - zero) * scale
        shrunk = (residual.abs() - residual.abs().pow(0.7 - 1) / 10).clamp_min(0) * residual.sign()
        zero = (codes - (groups - shrunk) / scale).mean(dim=1, keepdim=True)
    zero_point = ((8 - zero) * scale).bfloat16()
    codes = ((groups - zero_point.double()) / scale).round().add(8).clamp(0, 15)
    return of_groups(weight, codes, scale.bfloat16(), zero_point)


SPREADS = pytest.mark.parametrize("spread", [1.0, 40.0], ids=["not shrinking", "shrinking"])


@SPREADS
def test_the_iteration_in_units_of_codes_is_the_one_in_units_of_weights(spread: float) -> None:
    weight = (like_a_model(128, 512).float() * spread).bfloat16()
    ours = quantize(weight, "cpu")
    plain = iterated_plainly(weight, ours.qparams[..., 0])
    assert (codes_of(ours) == codes_of(plain)).float().mean() > 0.9995
    steps_apart = (ours.qparams - plain.qparams)[..., 1].abs() / ours.qparams[..., 0]
    assert steps_apart.max() < 0.1 and (steps_apart < 0.01).float().mean() > 0.99


@SPREADS
@needs_hqq
@pytest.mark.filterwarnings("ignore")  # importing hqq imports torch.jit, which is deprecated
def test_error_and_codes_are_those_of_hqq(spread: float) -> None:
    weight = (like_a_model(256, 512).float() * spread).bfloat16()
    ours, theirs = quantize(weight, "cpu"), quantize_with_hqq(weight, "cpu")
    assert relative_error(weight, ours) == pytest.approx(relative_error(weight, theirs), rel=0.01)
    difference = (codes_of(ours) - codes_of(theirs)).abs()
    assert (difference == 0).float().mean() > 0.98
    assert difference.max() <= 1


def test_a_missing_hqq_package_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    with pytest.raises(SubspecError) as caught:
        QUANTIZERS["hqq"](like_a_model(16, 64), "cpu")
    assert caught.value.exit_code == Exit.USAGE
    assert caught.value.hint == "pip install 'subspec[hqq]'"


@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_below_that_of_rounding_to_nearest(seed: int) -> None:
    weight = like_a_model(64, 512, seed)
    assert relative_error(weight, quantize(weight, "cpu")) < 0.98 * relative_error(
        weight, rounded_to_nearest(weight)
    )


def test_tensors_have_the_stored_shapes_and_types() -> None:
    substitute = quantize(like_a_model(48, 192), "cpu")
    assert substitute.codes.shape == (48, 96) and substitute.codes.dtype == torch.uint8
    assert substitute.qparams.shape == (3, 48, 2) and substitute.qparams.dtype == torch.bfloat16
    assert substitute.codes.is_contiguous() and substitute.qparams.is_contiguous()


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("magnitude", [1e-20, 1e-9, 1e-4, 0.03, 1.0, 1e3, 1e17, 1e30])
def test_every_code_is_the_nearest_one_for_the_stored_grid(magnitude: float, offset: float) -> None:
    weight = ((like_a_model(16, 256).float() + offset) * magnitude).bfloat16()
    substitute = quantize(weight, "cpu")
    exact, (scale, zero_point) = weight.double(), per_weight(substitute)
    candidates = (torch.arange(16).view(-1, 1, 1) - 8) * scale + zero_point  # [16, N, K]
    best = (candidates - exact).abs().amin(dim=0)
    got = ((codes_of(substitute) - 8) * scale + zero_point - exact).abs()
    assert (got <= best + 1e-5 * scale).all()  # the codes are computed in f32


ODD = {
    "zeros": torch.zeros(1, 64),
    "constant": torch.full((1, 64), 0.37),
    "negative constant": torch.full((1, 64), -123.0),
    "large constant": torch.full((1, 64), 3e5),
    "far from zero": torch.linspace(1000, 1000.5, 64)[None],
    "far from zero, bf16": torch.linspace(-1, -1.05, 64)[None].bfloat16(),
    "tiny": torch.linspace(-1e-15, 1e-15, 64)[None],
    "tinier than any scale": torch.linspace(-1e-25, 1e-25, 64)[None],
    "subnormal": torch.full((1, 64), 1e-40),
    "one outlier": torch.cat((torch.full((1, 63), 1e-3), torch.full((1, 1), 1e4)), dim=1),
    "fp16's largest": torch.linspace(-65504, 65504, 64)[None],
    "large": torch.linspace(-4, 4, 64)[None] * 1e18,
    "huge": torch.linspace(-3, 3, 64)[None] * 1e38,
    "huge and positive": torch.linspace(2, 3, 64)[None] * 1e38,
    "f32's largest": torch.full((1, 64), torch.finfo(torch.float32).max),
    "f32's two ends": torch.tensor([[-1.0, 1.0] * 32]) * torch.finfo(torch.float32).max,
    "every exponent": torch.tensor(2.0) ** torch.arange(-127, 128, dtype=torch.float32)[None, ::4],
}


def sane(qparams: Tensor) -> bool:
    scale, zero_point = qparams.unbind(-1)
    in_range = (scale >= MIN_SCALE) & (scale <= MAX_SCALE)
    return bool((in_range & torch.isfinite(zero_point)).all())


@pytest.mark.parametrize("weight", ODD.values(), ids=ODD.keys())
def test_odd_groups_give_scales_within_the_range_and_finite_centers(weight: Tensor) -> None:
    substitute = quantize(weight, "cpu")
    assert sane(substitute.qparams)
    assert torch.isfinite(restored(substitute)).all()


@needs_hqq
@pytest.mark.filterwarnings("ignore")
def test_odd_groups_give_as_sane_a_grid_with_hqq() -> None:
    for name, weight in ODD.items():
        substitute = quantize_with_hqq(weight, "cpu")
        assert sane(substitute.qparams) and torch.isfinite(restored(substitute)).all(), name


def test_weights_of_any_finite_bits_give_a_sane_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (64, 1024), generator=generator).int()
    weight = bits.view(torch.float32).nan_to_num(0.0)
    weight[:32] = weight[:32, :1] * (1 + weight[32:].sign() * 1e-3)  # of one magnitude
    weight = weight.nan_to_num()
    substitute = quantize(weight, "cpu")
    assert sane(substitute.qparams)
    assert torch.isfinite(restored(substitute)).all()


@pytest.mark.parametrize("name", ["constant", "negative constant", "large constant",
                                  "far from zero", "far from zero, bf16", "tiny", "one outlier",
                                  "fp16's largest", "large"])  # fmt: skip
def test_odd_groups_are_approximated(name: str) -> None:
    assert relative_error(ODD[name], quantize(ODD[name], "cpu")) < 0.07  # 15 equal steps: 0.067


@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e-3, 1e-2])
def test_narrow_groups_far_from_zero_are_as_near_as_bf16_allows(spread: float) -> None:
    """A zero_point has 8 bits, so that it may lie beside the group: the codes must reach it."""
    generator = torch.Generator().manual_seed(0)
    far = torch.randn(256, 1, generator=generator).sign() * torch.logspace(-6, 6, 256)[:, None]
    weight = far * (1 + spread * torch.rand(256, 128, generator=generator))
    error = (restored(quantize(weight, "cpu")) - weight) / weight
    assert error.abs().max() < 1 / 256 and error.square().mean().sqrt() < 1 / 1024


def test_a_constant_group_of_bf16_numbers_is_kept_exactly() -> None:
    constants = torch.randn(256, 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = constants.expand(256, 64).contiguous()
    substitute = quantize(weight, "cpu")
    assert torch.equal(restored(substitute), weight.float())
    assert (codes_of(substitute) == 8).all()


def test_zeros_have_the_middle_code_and_stay_zeros() -> None:
    weight = torch.zeros(32, 128, dtype=torch.bfloat16)
    weight[1:] = like_a_model(31, 128)
    weight[0, 64:] = -0.0
    substitute = quantize(weight, "cpu")
    assert (restored(substitute)[0] == 0).all()
    assert (codes_of(substitute)[0] == 8).all() and (substitute.qparams[:, 0, 1] == 0).all()
    assert relative_error(weight[:1], quantize(weight[:1], "cpu")) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_counted_and_refused(bad: float) -> None:
    weight = like_a_model(16, 128)
    weight[3, 70] = weight[15, 127] = bad
    with pytest.raises(SubspecError, match="2 of 2048 weights are NaN or infinite") as caught:
        quantize(weight, "cpu")
    assert caught.value.exit_code == Exit.CORRUPT


def test_the_number_of_threads_changes_nothing() -> None:
    weight = like_a_model(512, 512)  # 4,096 groups: two blocks with one thread, one with two
    weight[100:200] *= 100  # these need the shrinking step
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(quantize(weight, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert same(results[0], results[1]) and same(results[0], results[2])


@pytest.mark.parametrize("num_groups", [1, 7, 64, 1 << 20])
def test_the_size_of_a_block_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, num_groups: int
) -> None:
    weight = like_a_model(32, 192)
    weight[5:9] *= 100
    expected = quantize(weight, "cpu")
    monkeypatch.setattr(module, "CPU_GROUPS_PER_THREAD", num_groups)
    assert same(quantize(weight, "cpu"), expected)


def test_rows_are_quantised_independently_of_each_other() -> None:
    weight = like_a_model(64, 128)
    whole, part = quantize(weight, "cpu"), quantize(weight[16:32], "cpu")
    assert torch.equal(whole.codes[16:32], part.codes)
    assert torch.equal(whole.qparams[:, 16:32], part.qparams)


def test_a_strided_weight_gives_what_its_copy_gives() -> None:
    weight = like_a_model(128, 64).t()
    assert same(quantize(weight, "cpu"), quantize(weight.contiguous(), "cpu"))


def test_the_weight_itself_is_left_alone() -> None:
    weight = like_a_model(16, 64).float()
    before = weight.clone()
    quantize(weight, "cpu")
    assert torch.equal(weight, before)


@pytest.mark.gpu
def test_a_gpu_gives_nearly_the_codes_of_the_cpu() -> None:
    weight = like_a_model(256, 512)
    on_gpu, on_cpu = quantize(weight, "cuda"), quantize(weight, "cpu")
    assert (codes_of(on_gpu) == codes_of(on_cpu)).float().mean() > 0.999
    assert relative_error(weight, on_gpu) == pytest.approx(relative_error(weight, on_cpu), rel=1e-3)
