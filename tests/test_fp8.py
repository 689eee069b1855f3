"""FP8 checkpoints as exact targets: their weights are transformers' dequantised ones, bit for bit,
and their tokens those of a bfloat16 checkpoint of the same weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PROFILE, Encoding, build_artifact, converted, random_checkpoint, replan
from families import PROMPT_TOKENS, SIZES
from running import answer
from safetensors.torch import load_file, save_file
from scripts import benchmark
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format import fp8
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import Source
from subspec.artifacts.native import fp8_cpu, residual_cpu
from subspec.artifacts.plan import Constraints
from subspec.planner.build.weights import read_weight
from subspec.planner.model.checkpoint import read_checkpoint
from subspec.planner.solve.search import PRIOR, search
from subspec.planner.solve.storage import Storage
from subspec.runtime.engine import Engine, OpenOptions

to_fp8 = benchmark("to_fp8")
WAYS = [
    ("block", "F32"), ("channel", "BF16"),
    ("block", "BF16"), ("block", "F8_E8M0"), ("tensor", "F32"),
]  # fmt: skip
PROMPT = torch.arange(3, 3 + PROMPT_TOKENS).tolist()
SETTINGS: dict[str, Any] = {"width": 2, "depth": 3, "context": 128}


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose matrices do not divide into blocks of 128."""
    import transformers

    folder = tmp_path_factory.mktemp("source")
    config = transformers.AutoConfig.for_model(
        **{
            **SIZES,
            "model_type": "qwen3",
            "intermediate_size": 320,
            "hidden_size": 192,
            "head_dim": 64,
        }
    )
    return converted(random_checkpoint(folder / "f32", config), folder / "bf16", torch.bfloat16)


def dequantized(source: Path, out: Path) -> dict[str, Tensor]:
    """A bfloat16 checkpoint of the weights that an FP8 one has, and these."""
    shutil.copytree(source, out)
    found = {}
    stored = load_file(source / "model.safetensors")
    for name, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = next(
                stored[name + end] for end in ("_scale_inv", "_scale") if name + end in stored
            )
            rows, columns = tensor.shape
            scale = scale.float().view(-1, scale.shape[-1] if scale.dim() > 1 else 1)
            height = 128 if scale.shape[0] not in (1, rows) else -(-rows // scale.shape[0])
            width = 128 if scale.shape[1] > 1 else columns
            whole = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)
            found[name] = (tensor.float() * whole[:, :columns]).bfloat16()
        elif not name.endswith(("_scale_inv", "_scale")):
            found[name] = tensor
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return found


@pytest.fixture(scope="module", params=WAYS, ids="-".join)
def checkpoint(
    request: pytest.FixtureRequest, bf16: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "model"
    to_fp8.convert(bf16, folder, *request.param)
    return folder


def test_every_matrix_is_the_codes_times_their_scales(checkpoint: Path, tmp_path: Path) -> None:
    expected = dequantized(checkpoint, tmp_path / "bf16")
    read = read_checkpoint(checkpoint, Source("test/model"))
    num_fp8 = 0
    for linear in read.spec.linears:
        exact = read_weight(read, linear)
        weight = exact.weight
        if exact.scales is not None:
            weight = fp8.dequantize(weight, exact.scales)
            num_fp8 += 1
        own = weight[: linear.out_features - linear.padding_rows]
        assert torch.equal(own, expected[f"{linear.name}.weight"]), linear.name
    assert num_fp8 == 7 * read.spec.num_layers == len(read.spec.fp8)


@pytest.mark.parametrize("scale_dtype", ["F32", "BF16", "F8_E8M0"])
def test_transformers_multiplies_whole_blocks_out_to_the_same_weights(scale_dtype: str) -> None:
    """Of blocks that do not fill a matrix it takes none."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * 0.02
    codes, scales = to_fp8.to_fp8(weight, "block", to_fp8.SCALE_DTYPES[scale_dtype])
    stored = {"weight": codes, "weight_scale_inv": scales.float()}
    theirs = Fp8Dequantize(None).convert(stored)["weight"].bfloat16()
    ours = fp8.dequantize(codes.view(torch.uint8), fp8.Scales(scales.float(), 128, 128))
    assert torch.equal(ours, theirs)


def answers(artifact: Artifact, method: Any) -> list[int]:
    with Engine.open(artifact, OpenOptions(method)) as engine:
        return answer(engine, PROMPT, 24)


@pytest.mark.parametrize("scales", ["block", pytest.param("channel", marks=pytest.mark.slow)])
def test_tokens_are_those_of_the_same_weights_in_bf16(
    scales: str, bf16: Path, tmp_path: Path
) -> None:
    """Residuals and FP8 bytes, resident in part and streamed, drafted and not."""
    checkpoint = tmp_path / "fp8"
    to_fp8.convert(bf16, checkpoint, scales)
    dequantized(checkpoint, tmp_path / "bf16")
    wide = build_artifact(tmp_path / "bf16", tmp_path / "wide", "raw", **SETTINGS)
    expected = answers(wide, "plain")
    for encoding in ("raw", "residual"):
        out = tmp_path / encoding
        own = build_artifact(checkpoint, out, encoding, resident_share=0.4, **SETTINGS)
        stored = {part.encoding for part in own.stored_parts()}
        assert stored == ({"fp8", "raw"} if encoding == "raw" else {"fp8-residual", "residual"})
        for share in (0.0, 0.4, 1.0):
            again = replan(own, resident_share=share, **SETTINGS)
            assert answers(again, "substitute") == answers(again, "plain") == expected


@pytest.mark.parametrize("encoding", ["raw", "residual"])
def test_weights_may_be_multiplied_out_while_loading(
    encoding: Encoding, bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All or some, as the planner places them; the ledger grants what is used, and no more."""
    to_fp8.convert(bf16, tmp_path / "fp8", "channel")
    own = build_artifact(tmp_path / "fp8", tmp_path / "out", encoding, **SETTINGS)
    expected = answers(own, "plain")
    stored = Storage(tuple(own.stored_parts()))
    constraints = Constraints(128, 2, 3, encoding="kept")
    rates = {"residual_weights_per_second": 1e6, "fp8_residual_weights_per_second": 1e6}
    slow = replace(PROFILE, num_threads=1, fp8_weights_per_second=2e6, **rates)
    every = len(own.spec.fp8)
    for budget_bytes, least, most in ((4_500_000, 1, every - 1), (9_000_000, every, every)):
        plan = search(own.spec, slow, budget_bytes, constraints, PRIOR, stored)
        again = replace(own, plan=plan)
        with Engine.open(again, OpenOptions("substitute", trace=True)) as engine:
            wide = set(engine.placement.dequantized)
            assert least <= len(wide) <= most
            assert answer(engine, PROMPT, 24) == expected
            assert not any(arena.numel() for arena in engine.memory._free.values())
            assert engine.peak.peak_bytes <= budget_bytes
            decoded = {
                span.name for span in engine.model.clock.spans or () if span.lane == "decode"
            }
            assert not wide & decoded and (decoded or least == every)
    monkeypatch.setattr(fp8_cpu, "unavailable", lambda: "no compiler")
    monkeypatch.setattr(residual_cpu, "unavailable", lambda: "no compiler")
    assert answers(again, "substitute") == expected


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["streamed", "resident"])
def test_a_damaged_residual_is_an_error_before_a_token(
    share: float, bf16: Path, tmp_path: Path
) -> None:
    to_fp8.convert(bf16, tmp_path / "fp8")
    artifact = build_artifact(
        tmp_path / "fp8", tmp_path / "out", "residual", resident_share=share, **SETTINGS
    )
    part = next(one for one in artifact.stored_parts() if one.encoding == "fp8-residual")
    with open(artifact.path / "exact.safetensors", "r+b") as file:
        file.seek(artifact.part_entries()[part.name].offset + part.num_bytes // 2)
        [byte] = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 255]))
    with pytest.raises(SubspecError, match="digest") as caught:
        answers(artifact, "substitute")
    assert caught.value.exit_code == Exit.CORRUPT
