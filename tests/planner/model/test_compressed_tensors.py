"""FP8 checkpoints as the package compressed-tensors writes them, as llm-compressor does, against
what it and transformers dequantize. Skipped without the package."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import DEMO

from subspec.artifacts.format import fp8
from subspec.artifacts.model import Source
from subspec.planner.build.weights import read_weight
from subspec.planner.model.checkpoint import read_checkpoint

pytest.importorskip("compressed_tensors")


def written_by_the_package(folder: Path, strategy: str, scale_dtype: torch.dtype) -> None:
    """The demo model, its matrices in FP8; what calibration would do is done by hand."""
    import transformers
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    number = {"num_bits": 8, "type": "float", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": strategy, "dynamic": False},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
    }
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    apply_quantization_config(model, config)
    modules: list[Any] = [one for one in model.modules() if hasattr(one, "weight_scale")]
    assert len(modules) == 7 * model.config.num_hidden_layers
    for one in modules:
        largest = one.weight.float().abs().amax(1, keepdim=True)
        largest = largest if strategy == "channel" else largest.max().view(1)
        assert one.weight_scale.shape == largest.shape
        scale = (largest / 448).to(scale_dtype)
        one.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    compressor = ModelCompressor.from_pretrained_model(model)
    assert compressor is not None
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_weights_are_those_that_transformers_multiplies_out(
    strategy: str, scale_dtype: torch.dtype, tmp_path: Path
) -> None:
    import transformers

    written_by_the_package(tmp_path, strategy, scale_dtype)
    read = read_checkpoint(tmp_path, Source("test/model"))
    assert len(read.spec.fp8) == 7 * read.spec.num_layers
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )
    theirs = model.state_dict()
    for linear in read.spec.linears:
        exact = read_weight(read, linear)
        ours = fp8.dequantize(exact.weight, exact.scales) if exact.scales else exact.weight
        rows = linear.out_features - linear.padding_rows
        assert torch.equal(ours[:rows], theirs[f"{linear.name}.weight"]), linear.name
