"""How fast residuals become weights; 0 where nothing decodes them."""

from dataclasses import replace

import pytest
import torch
from toys import make_fp8_spec, make_spec

from subspec.artifacts.model import Encoding, ModelSpec, layer_name
from subspec.artifacts.native import residual_cpu
from subspec.planner.machine import residual_rate
from subspec.planner.machine.residual_rate import decoded_weights_per_second
from subspec.planner.machine.timing import Effort

CPU = torch.device("cpu")


HASTY = Effort(fewest_samples=1, action_seconds=0.0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_decoding_takes_time(dtype: str) -> None:
    assert (
        1e6
        < decoded_weights_per_second(make_spec(dtype=dtype), CPU, "aten", "residual", HASTY)
        < 1e11
    )


def test_nothing_is_decoded_without_4_bit_substitutes() -> None:
    odd = make_spec(hidden_size=72, intermediate_size=100, head_size=18)
    assert decoded_weights_per_second(odd, CPU, "aten", "residual", HASTY) == 0.0


def test_nothing_is_decoded_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_cpu, "unavailable", lambda: "there is none")
    assert decoded_weights_per_second(make_spec(), CPU, "aten", "residual", HASTY) == 0.0


def with_first_layer_in_bf16() -> ModelSpec:
    """As `modules_to_not_convert` may leave it."""
    spec = make_fp8_spec()
    first = layer_name(0) + "."
    return replace(spec, fp8={n: one for n, one in spec.fp8.items() if not n.startswith(first)})


@pytest.mark.parametrize("encoding", ["fp8", "fp8-residual"])
def test_fp8_is_timed_in_the_first_layer_that_has_it(encoding: Encoding) -> None:
    spec = with_first_layer_in_bf16()
    assert spec.fp8 and all(one.fp8 is None for one in spec.linears if one.layer == 0)
    assert 1e6 < decoded_weights_per_second(spec, CPU, "aten", encoding, HASTY) < 1e11
    assert decoded_weights_per_second(make_spec(), CPU, "aten", encoding, HASTY) == 0.0


def test_fp8_codes_are_multiplied_out_in_any_layout_of_the_4_bit_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a CPU without AVX2, where residuals cannot be decoded."""
    monkeypatch.setattr(residual_rate, "cpu_tile_rows", lambda *_: None)
    assert decoded_weights_per_second(make_fp8_spec(), CPU, "aten", "fp8", HASTY) > 1e6
    assert decoded_weights_per_second(make_fp8_spec(), CPU, "aten", "fp8-residual", HASTY) == 0.0
