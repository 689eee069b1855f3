"""Small random checkpoints with draft heads that agree with their models now and then."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from builders import converted, random_checkpoint
from families import FAMILIES
from safetensors.torch import load_file, save_file
from torch import Tensor

from subspec.artifacts.model import DraftHead, ModelSpec, Source
from subspec.planner.model.checkpoint import read_checkpoint

# Of what the layers of a model that is easily foreseen add to the last token's embedding.
SMALL = 0.02


def mtp_checkpoint(folder: Path, dtype: torch.dtype, foreseen: bool = False) -> Path:
    """A random qwen3_5 whose file has a head, and whose config.json says so. foreseen: the head is
    often right, because what comes next depends most on the last token."""
    import transformers

    config = transformers.AutoConfig.for_model(**FAMILIES["qwen3_5_text"])
    source = random_checkpoint(folder / "f32", config)
    said = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**said, "mtp_num_hidden_layers": 1}))
    spec = read_checkpoint(source, Source("org/toy")).spec
    layer = next(one for one in spec.layers if one.attentions)
    head = random_head(replace(spec, draft_head=DraftHead("mtp", layer, spec.norm)))
    tensors = load_file(source / "model.safetensors")
    if foreseen:
        quieten(tensors)
        quieten(head)
        both = torch.eye(spec.hidden_size), 0.03 * torch.eye(spec.hidden_size)
        head["fc.weight"] = torch.cat(both, dim=1)
        final = next(name for name in tensors if name.endswith("model.norm.weight"))
        head["norm.weight"] = tensors[final].clone()
        head["pre_fc_norm_embedding.weight"].zero_()
    tensors |= {f"mtp.{name}": tensor for name, tensor in head.items()}
    save_file(tensors, source / "model.safetensors")
    return converted(source, folder / "model", dtype)


def random_head(spec: ModelSpec) -> dict[str, Tensor]:
    generator, found = torch.Generator().manual_seed(3), {}
    for name, shape in spec.draft_head_shapes.items():
        noise = torch.randn(shape, generator=generator)
        found[name] = noise * (0.2 if len(shape) == 1 else shape[1] ** -0.5)
    return found


def quieten(tensors: dict[str, Tensor]) -> None:
    """Layers add little."""
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            tensor.mul_(SMALL)
        if name.endswith("embed_tokens.weight"):
            tensor.div_(tensor.std())


# ---- the definition -----


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * (1 + weight)


def turned(x: Tensor, position: int, size: int, theta: float) -> Tensor:
    """x [heads, D], of which the first `size` numbers turn."""
    angles = position * theta ** (-torch.arange(0, size, 2).double() / size)
    first, second, rest = x[:, : size // 2], x[:, size // 2 : size], x[:, size:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=1)


def defined_mtp(
    spec: ModelSpec, tensors: dict[str, Tensor], embedded: Tensor, hidden: Tensor
) -> Tensor:
    """What the head returns for a text, in f64, one row after the other. embedded, hidden [T, H]"""
    w = {name: one.double() for name, one in tensors.items()}
    layer = "layers.0."
    assert spec.draft_head is not None
    [body], epsilon = spec.draft_head.layer.attentions, spec.norm.epsilon
    assert body.rope is not None
    keys, values, found = list[Tensor](), list[Tensor](), []
    for position, (e, h) in enumerate(zip(embedded.double(), hidden.double(), strict=True)):
        e = norm(e, w["pre_fc_norm_embedding.weight"], epsilon)
        h = norm(h, w["pre_fc_norm_hidden.weight"], epsilon)
        x = w["fc.weight"] @ torch.cat((e, h))
        y = norm(x, w[f"{layer}input_layernorm.weight"], epsilon)
        q, gate = (
            (w[f"{layer}self_attn.q_proj.weight"] @ y)
            .view(body.num_heads, 2, body.head_size)
            .unbind(1)
        )
        k, v = (
            (w[f"{layer}self_attn.{name}_proj.weight"] @ y).view(-1, body.head_size)
            for name in "kv"
        )
        q = norm(q, w[f"{layer}self_attn.q_norm.weight"], epsilon)
        k = norm(k, w[f"{layer}self_attn.k_norm.weight"], epsilon)
        q, k = (turned(one, position, body.rope.size, body.rope.theta) for one in (q, k))
        keys.append(k)
        values.append(v)
        heads = []
        for head in range(body.num_heads):
            of = head * body.num_kv_heads // body.num_heads
            scores = torch.stack([one[of] @ q[head] for one in keys]) * body.head_size**-0.5
            mean = scores.softmax(0) @ torch.stack([one[of] for one in values])
            heads.append(mean * gate[head].sigmoid())
        x = x + w[f"{layer}self_attn.o_proj.weight"] @ torch.cat(heads)
        y = norm(x, w[f"{layer}post_attention_layernorm.weight"], epsilon)
        inner = F.silu(w[f"{layer}mlp.gate_proj.weight"] @ y) * (
            w[f"{layer}mlp.up_proj.weight"] @ y
        )
        x = x + w[f"{layer}mlp.down_proj.weight"] @ inner
        found.append(norm(x, w["norm.weight"], epsilon))
    return torch.stack(found)
