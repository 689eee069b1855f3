"""A bfloat16 checkpoint in FP8, as the hub has them: a target for tests and benchmarks.

    python benchmarks/to_fp8.py SOURCE OUT [--scales block|channel|tensor] [--scale-dtype F32]

This step is lossy: every matrix of the layers is rounded to 8 bits, the largest weight of a block
to 448. What is made is another model than the source, and subspec runs *that* one exactly.
Embedding, head, norms and biases stay as they are. Blocks are written as transformers' fine-grained
FP8 has them, channels and tensors as compressed-tensors.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

MAX_FP8 = 448.0  # of e4m3
BLOCK = 128
SHARD_BYTES = 2_000_000_000
SCALE_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
WRITTEN = ("model.safetensors", "model.safetensors.index.json", "config.json")


def convert(
    source: Path,
    out: Path,
    scales: str = "block",
    scale_dtype: str = "F32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the checkpoint folder `out`; scales: of a block, a channel or a tensor."""
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in WRITTEN:
            shutil.copyfile(path, out / path.name)
    found = dict[str, Tensor]()
    for path in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if is_converted(name, tensor):
                suffix = "_scale_inv" if scales == "block" else "_scale"
                found[name], of_blocks = to_fp8(tensor, scales, SCALE_DTYPES[scale_dtype])
                found[name + suffix] = of_blocks
            else:
                found[name] = tensor.bfloat16()
    split = split_torch_state_dict_into_shards(
        found, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: found[name] for name in names}, out / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / WRITTEN[1]).write_text(json.dumps(index, indent=2))
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    config |= {"dtype": "bfloat16", "quantization_config": quantization(scales)}
    (out / "config.json").write_text(json.dumps(config, indent=2))


def is_converted(name: str, tensor: Tensor) -> bool:
    return ".layers." in name and tensor.dim() == 2


def to_fp8(weight: Tensor, scales: str, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> its FP8 codes, and the scales: of blocks [row blocks, column blocks], of
    channels [N, 1], of the tensor [1]."""
    num_rows, num_columns = weight.shape
    height, width = {
        "block": (BLOCK, BLOCK), "channel": (1, num_columns), "tensor": (num_rows, num_columns),
    }[scales]  # fmt: skip
    padding = (0, -num_columns % width, 0, -num_rows % height)
    blocks = torch.nn.functional.pad(weight.float(), padding)
    blocks = blocks.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    largest = blocks.abs().amax((1, 3), keepdim=True)
    scale = torch.where(largest > 0, largest / MAX_FP8, 1.0)
    if (
        scale_dtype == torch.float8_e8m0fnu
    ):  # a power of two; rounded up, so that nothing is clipped
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    stored = scale.to(scale_dtype)
    codes = (blocks / stored.float()).clamp(-MAX_FP8, MAX_FP8).to(torch.float8_e4m3fn)
    codes = codes.flatten(2, 3).flatten(0, 1)[:num_rows, :num_columns].contiguous()
    return codes, stored.flatten() if scales == "tensor" else stored[:, 0, :, 0].contiguous()


def quantization(scales: str) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    if scales == "block":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head"],
        }
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": scales}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scales", choices=("block", "channel", "tensor"), default="block")
    parser.add_argument("--scale-dtype", choices=tuple(SCALE_DTYPES), default="F32")
    given = parser.parse_args()
    if given.out.exists():
        print(f"error: {given.out} exists already", file=sys.stderr)
        return 2
    convert(given.source, given.out, given.scales, given.scale_dtype)
    print(f"{given.out}: rounded to FP8, another model than {given.source}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
