"""Write a checkpoint as a GGUF file, for llama.cpp: the inverse of `real_model.py`.

    python benchmarks/write_gguf.py CHECKPOINT OUT

Llama, Qwen2 and Qwen3 with plain rotary embeddings. Matrices keep their bits (bfloat16, float16 or
float32), vectors become float32, as llama.cpp expects. Tensors are read and written one at a time.
"""

import json
import math
from pathlib import Path

import click
import numpy
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from real_model import NAMES, PARTS
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from subspec.artifacts.common.command import Program, reported
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.tensors import StoredTensor, read_header

ARCHITECTURES = ("llama", "qwen2", "qwen3")
KINDS = {
    "BF16": (torch.bfloat16, GGMLQuantizationType.BF16),
    "F16": (torch.float16, GGMLQuantizationType.F16),
    "F32": (torch.float32, GGMLQuantizationType.F32),
}
GGUF_NAMES = {name: gguf for gguf, name in NAMES.items()}
GGUF_PARTS = {part: gguf for gguf, part in PARTS.items()}


def write_gguf(checkpoint: Path, out: Path) -> None:
    """Raises SubspecError(UNSUPPORTED) for a model that the file could not say in full."""
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    check_supported(config)
    stored = stored_tensors(checkpoint, config.tie_word_embeddings)
    kinds = {name: gguf_kind(tensor) for name, (_, tensor) in stored.items()}
    partial = out.with_name(out.name + ".partial")  # what an interrupted run leaves
    writer = GGUFWriter(partial, config.model_type)
    query = stored["model.layers.0.self_attn.q_proj.weight"][1]
    add_config(writer, config, head_size=query.shape[0] // config.num_attention_heads)
    add_tokenizer(writer, checkpoint, config)
    for name, (_, tensor) in stored.items():
        dtype, kind = kinds[name]
        num_bytes = dtype.itemsize * math.prod(tensor.shape)
        # The numpy type matters only where no kind is given.
        writer.add_tensor_info(
            gguf_name(name), tensor.shape, numpy.dtype(numpy.float32), num_bytes, kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (file, _) in stored.items():
        with safe_open(file, "pt") as opened:
            weight = opened.get_tensor(name).to(kinds[name][0])
        if config.model_type == "llama":
            weight = permuted(name, weight, config)
        writer.write_tensor_data(weight.contiguous().view(torch.uint8).numpy())
    writer.close()
    partial.rename(out)


def check_supported(config: PretrainedConfig) -> None:
    if config.model_type not in ARCHITECTURES:
        raise SubspecError(
            Exit.UNSUPPORTED,
            f"a GGUF file of model type {config.model_type!r}, expected {', '.join(ARCHITECTURES)}",
        )
    kind = config.rope_parameters["rope_type"]
    if kind != "default":
        raise SubspecError(
            Exit.UNSUPPORTED, f"a GGUF file with rotary embeddings {kind!r}, expected 'default'"
        )


def stored_tensors(checkpoint: Path, tied: bool) -> dict[str, tuple[Path, StoredTensor]]:
    """Name -> file and header entry, over all shards."""
    found = {
        name: (file, tensor)
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in read_header(file).items()
    }
    if tied:  # some checkpoints store the embedding twice
        found.pop("lm_head.weight", None)
    return found


def gguf_kind(tensor: StoredTensor) -> tuple[torch.dtype, GGMLQuantizationType]:
    if tensor.dtype not in KINDS:
        raise SubspecError(
            Exit.UNSUPPORTED,
            f"{tensor.name} has dtype {tensor.dtype}, expected one of {', '.join(KINDS)}",
        )
    return KINDS["F32" if len(tensor.shape) == 1 else tensor.dtype]


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    words = name.split(".")
    part = ".".join(words[3:-1])
    if words[:2] != ["model", "layers"] or part not in GGUF_PARTS:
        raise SubspecError(Exit.UNSUPPORTED, f"no GGUF name is known for the tensor {name}")
    return f"blk.{words[2]}.{GGUF_PARTS[part]}.{words[-1]}"


def permuted(name: str, weight: Tensor, config: PretrainedConfig) -> Tensor:
    """GGUF interleaves the two halves of each Llama head that a rope rotates."""
    for letter, num_heads in (
        ("q", config.num_attention_heads),
        ("k", config.num_key_value_heads),
    ):
        if f".{letter}_proj." in name:
            halves = weight.view(num_heads, 2, len(weight) // num_heads // 2, -1)
            return halves.transpose(1, 2).reshape(weight.shape)
    return weight


def add_config(writer: GGUFWriter, config: PretrainedConfig, head_size: int) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer: GGUFWriter, checkpoint: Path, config: PretrainedConfig) -> None:
    """The vocabulary and its merges. What splits a text before them has a name in GGUF that says
    all of it; "default" where it is none that we know: `peers.py` gives token ids."""
    said = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))
    ids = dict(said["model"]["vocab"])
    ids |= {added["content"]: added["id"] for added in said["added_tokens"]}
    control = {added["id"] for added in said["added_tokens"] if added["special"]}
    # An embedding may have more rows than there are tokens.
    tokens = [f"[PAD{id}]" for id in range(config.vocab_size)]
    kinds = [TokenType.UNUSED] * config.vocab_size
    for token, id in ids.items():
        tokens[id] = token
        kinds[id] = TokenType.CONTROL if id in control else TokenType.NORMAL
    merges = said["model"]["merges"]  # "a b" in older files
    splits = [part["type"] for part in (said["pre_tokenizer"] or {}).get("pretokenizers", [])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if splits == ["Digits", "ByteLevel"] else "default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_add_bos_token(False)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    for add, id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if id is not None:
            add(id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


@click.command(cls=Program)
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@reported
def main(checkpoint: Path, out: Path) -> None:
    """Write CHECKPOINT as the GGUF file OUT."""
    write_gguf(checkpoint, out)
    print(json.dumps({"path": str(out), "bytes": out.stat().st_size}))


if __name__ == "__main__":
    main()
