"""What can be said of it without a GPU: where the bytes lie, and where its tuning is kept."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from subspec.artifacts.footprint import packed_bytes
from subspec.artifacts.format.packing import dequantize, pack_nibbles
from subspec.runtime.kernels import gemlite_kernel
from subspec.runtime.kernels.gemlite_kernel import keep_tuning, tuning_file
from subspec.runtime.kernels.linear import pack

GPU = torch.device("cuda", 0)


def substitute(num_rows: int, num_columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(16, (num_rows, num_columns), dtype=torch.uint8, generator=generator)
    qparams = torch.randn(num_columns // 64, num_rows, 2, generator=generator)
    return codes, qparams.bfloat16()


def test_codes_and_qparams_lie_in_the_given_bytes_and_mean_what_is_stored() -> None:
    codes, qparams = substitute(48, 192)
    room = [torch.empty(n, dtype=torch.uint8) for n in packed_bytes(48, 192, "gemlite")]
    weight = pack(pack_nibbles(codes), qparams, "gemlite", *room)
    own = weight.packed
    assert own.codes.shape == (24, 48) and own.codes.is_contiguous()
    assert own.scales.shape == own.offsets.shape == (3, 48) and own.offsets.is_contiguous()
    where = [
        tensor.untyped_storage().data_ptr() for tensor in (own.codes, weight.qparams, own.scales)
    ]
    assert where == [one.data_ptr() for one in room]
    assert torch.equal(weight.qparams, qparams)

    nibbles = (own.codes.long()[..., None] >> (4 * torch.arange(8))) & 15  # [K / 8, N, 8]
    unpacked = nibbles.permute(1, 0, 2).flatten(1)
    assert torch.equal(unpacked, codes.long())
    steps = unpacked.view(48, 3, 64) * own.scales.float().t()[..., None]
    values = (steps + own.offsets.float().t()[..., None]).flatten(1)
    # The offset of code 0 is rounded to bf16: it lies eight steps from the zero point.
    assert (values - dequantize(codes, qparams)).abs().max() <= own.offsets.abs().max() / 2**8


def test_only_gemlite_has_its_qparams_twice() -> None:
    assert packed_bytes(48, 192, "aten") == packed_bytes(48, 192, "w4a8") == (4608, 576)
    assert packed_bytes(48, 192, "gemlite") == (4608, 576, 576)


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """gemlite as far as its tuning goes: `cache_config` adds what a process knows to a file."""
    fake = ModuleType("gemlite")
    fake.known = {}  # type: ignore[attr-defined]

    def cache_config(path: str) -> None:
        text = Path(path).read_text()
        Path(path).write_text(json.dumps((json.loads(text) if text else {}) | fake.known))

    fake.cache_config = cache_config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gemlite", fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gemlite_kernel, "version", lambda name: f"{name} 1.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Toy")
    return fake


def test_tuning_is_kept_and_added_to(tuned: ModuleType) -> None:
    path = tuning_file("NVIDIA Toy")
    assert path is not None and not path.exists()
    for found in ({"a": 1}, {"b": 2}):
        tuned.known = found  # type: ignore[attr-defined]
        keep_tuning(GPU)
    assert json.loads(path.read_text()) == {"a": 1, "b": 2}
    assert list(path.parent.iterdir()) == [path]


def test_tuning_is_of_one_gpu_and_one_set_of_versions(
    tuned: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tuning_file("NVIDIA Toy")
    assert here != tuning_file("NVIDIA Doll")
    monkeypatch.setattr(gemlite_kernel, "version", lambda name: f"{name} 2.0")
    assert here != tuning_file("NVIDIA Toy")


def test_a_place_that_cannot_be_written_is_no_error(
    tuned: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert tuning_file("NVIDIA Toy") is None
    keep_tuning(GPU)
