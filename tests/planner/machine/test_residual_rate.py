"""How fast residuals become weights; 0 where nothing decodes them."""

import pytest
import torch
from toys import make_spec

from subspec.artifacts.native import residual_cpu
from subspec.planner.machine.residual_rate import decode_rate
from subspec.planner.machine.timing import Effort

CPU = torch.device("cpu")


HASTY = Effort(fewest_samples=1, action_seconds=0.0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_decoding_takes_time(dtype: str) -> None:
    assert 1e6 < decode_rate(make_spec(dtype=dtype), CPU, "aten", "residual", HASTY) < 1e11


def test_nothing_is_decoded_without_4_bit_substitutes() -> None:
    odd = make_spec(hidden_size=72, inner_size=100, head_size=18)
    assert decode_rate(odd, CPU, "aten", "residual", HASTY) == 0.0


def test_nothing_is_decoded_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_cpu, "unavailable", lambda: "there is none")
    assert decode_rate(make_spec(), CPU, "aten", "residual", HASTY) == 0.0
