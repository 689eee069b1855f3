"""Distil the demo model into a small hybrid of gated delta nets, in the layout of Qwen3.5.

Eight layers, of which every fourth attends; 7 M parameters, the demo's tokenizer and texts. It
starts from the demo's embedding, final norm and feed-forwards, and learns the demo's distribution
of the next token (arXiv 1503.02531):

    OMP_NUM_THREADS=1 python train_hybrid_model.py --out build/hybrid --minutes 50

As of the demo: the budget is time, so the weights depend on the machine. It is for tests and
measurements, and draft acceptance on it says nothing about a large model.
"""

import copy
import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from train_demo_model import argument_parser, read_texts, split_tokens, train
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3_5TextConfig
from transformers import Qwen3_5ForCausalLM as Hybrid

DEMO_MODEL = Path(__file__).resolve().parent.parent / "planner" / "demo-model"
LAYERS, INTERVAL = 8, 4  # every fourth layer attends
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
# As Qwen3.5 stores them beside bf16 weights
IN_F32 = ("A_log", "linear_attn.norm.weight")


def main() -> None:
    parser = argument_parser((__doc__ or "").split("\n")[0])
    parser.set_defaults(minutes=20, seq=256, batch=8, warmup_steps=20)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    torch.manual_seed(0)
    for name in COPIED:
        shutil.copyfile(DEMO_MODEL / name, args.out / name)
    tokens = split_tokens(Tokenizer.from_file(str(args.out / "tokenizer.json")), *read_texts())
    teacher = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    teacher.to(args.device).eval()
    model = started_from(teacher).to(args.device)

    def loss_of(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
        """Divergence from the teacher's next token, in nats."""
        with torch.no_grad():
            expected = teacher(input_ids=windows).logits.float().log_softmax(-1).flatten(0, 1)
        got = model(input_ids=windows).logits.float().log_softmax(-1).flatten(0, 1)
        return F.kl_div(got, expected, reduction="batchmean", log_target=True)

    def save() -> None:
        save_as_on_the_hub(model, args.out)

    train(model, loss_of, save, *tokens, args)


def started_from(teacher: PreTrainedModel) -> Hybrid:
    """A new hybrid with the teacher's embedding, final norm and feed-forwards. Layers that attend
    are more than the teacher has: their feed-forwards begin with nothing to add."""
    theirs = teacher.config
    config = Qwen3_5TextConfig(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        intermediate_size=theirs.intermediate_size,
        num_hidden_layers=LAYERS,
        full_attention_interval=INTERVAL,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        max_position_embeddings=theirs.max_position_embeddings,
        tie_word_embeddings=True,
        eos_token_id=theirs.eos_token_id,
        pad_token_id=theirs.pad_token_id,
    )
    model, taught = Hybrid(config), iter(teacher.model.layers)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight)
        model.model.norm.weight.copy_(teacher.model.norm.weight - 1)  # of Qwen3.5: 1 + w
        for layer, kind in zip(model.model.layers, config.layer_types, strict=True):
            if kind == "full_attention":
                layer.mlp.down_proj.weight.zero_()
                continue
            their = next(taught)
            layer.mlp.load_state_dict(their.mlp.state_dict())
            for norm in ("input_layernorm", "post_attention_layernorm"):
                getattr(layer, norm).weight.copy_(getattr(their, norm).weight - 1)
    return model


def save_as_on_the_hub(model: Hybrid, out: Path) -> None:
    """The text inside a model that could see as well, had it a tower."""
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor.to(
            "cpu", torch.float32 if name.endswith(IN_F32) else torch.bfloat16
        ).contiguous()
        for name, tensor in copy.copy(model.state_dict()).items()
        if name != "lm_head.weight"  # the embedding
    }
    text = model.config.to_diff_dict() | {"dtype": "bfloat16", "tie_word_embeddings": True}
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text,
        "tie_word_embeddings": True,
    }
    save_file(tensors, out / "model.safetensors.part", {"format": "pt"})
    (out / "model.safetensors.part").rename(out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
