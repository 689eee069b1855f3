"""Small random checkpoints with draft heads that agree with their models now and then."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from builders import converted, random_checkpoint
from families import FAMILIES, family
from safetensors.torch import load_file, save_file
from torch import Tensor

from subspec.artifacts.model import TOKEN_IDS, DraftHead, Eagle3, LayerSpec, ModelSpec, Source
from subspec.planner.model.checkpoint import read_checkpoint

# Of what the layers of a model that is easily foreseen add to the last token's embedding.
SMALL = 0.02
SURE = 1.5


def mtp_checkpoint(
    folder: Path, dtype: torch.dtype, foreseen: bool = False, hybrid: bool = True
) -> Path:
    """A random qwen3_5 whose file has a head, and whose config.json says so. foreseen: the head is
    often right, because what comes next depends most on the last token. hybrid: with delta nets."""
    import transformers

    fields = dict(FAMILIES["qwen3_5_text"])
    if not hybrid:
        fields["layer_types"] = ["full_attention"] * fields["num_hidden_layers"]
    config = transformers.AutoConfig.for_model(**fields)
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


def eagle_checkpoints(
    folder: Path, dtype: torch.dtype, foreseen: bool = False, bias: bool = True
) -> tuple[Path, Path]:
    """A random llama, and a random head of EAGLE for it, which is in f32. bias: of the fusion."""
    import transformers

    config = transformers.AutoConfig.for_model(**family("llama"))
    source = random_checkpoint(folder / "f32", config)
    spec = read_checkpoint(source, Source("org/toy")).spec
    said = json.loads((source / "config.json").read_text())
    first, *others = spec.layers[0].blocks
    layer = LayerSpec((replace(first, before=None), *others))
    own = random_head(replace(spec, draft_head=DraftHead("eagle", layer, spec.norm, bias)))
    tensors = load_file(source / "model.safetensors")
    if foreseen:
        quieten(tensors)
        quieten(own)
        both = torch.eye(spec.hidden_size), 0.03 * torch.eye(spec.hidden_size)
        own["fc.weight"] = torch.cat(both, dim=1)
        tensors["model.norm.weight"].fill_(1.0)
        save_file(tensors, source / "model.safetensors")
    head = folder / "head"
    head.mkdir()
    (head / "config.json").write_text(json.dumps({**said, "num_hidden_layers": 1}))
    save_file(own, head / "model.safetensors")
    return converted(source, folder / "model", dtype), head


EAGLE3_READS, EAGLE3_TOKENS = (1, 2, 3), 1500
# Its own config.json beside a model's: keys and values of every head, and tokens of its own.
OF_EAGLE3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "num_key_value_heads": 4,
    "draft_vocab_size": EAGLE3_TOKENS,
}  # fmt: skip


def eagle3_checkpoints(
    folder: Path, dtype: torch.dtype, foreseen: bool = False, speculators: bool = False
) -> tuple[Path, Path]:
    """A random llama, and a random head of EAGLE-3 for it, which is in f32. speculators: in their
    form, where its layer adds to the normed hidden state."""
    import transformers

    config = transformers.AutoConfig.for_model(**family("llama"))
    source = random_checkpoint(folder / "f32", config)
    spec = read_checkpoint(source, Source("org/toy")).spec
    said = json.loads((source / "config.json").read_text())
    first, feeding = spec.layers[0].blocks
    body = replace(spec.layers[0].attentions[0], num_kv_heads=4)
    head = DraftHead("eagle3", LayerSpec((replace(first, body=body), feeding)), spec.norm)
    own = random_head(
        replace(spec, draft_head=head, eagle3=Eagle3(EAGLE3_READS, EAGLE3_TOKENS, speculators))
    )
    order = torch.randperm(spec.vocab_size, generator=torch.Generator().manual_seed(8))
    ids = order[:EAGLE3_TOKENS].sort().values
    tensors = load_file(source / "model.safetensors")
    if foreseen:  # each row attends to itself, and so to the embedding that comes next
        quieten(tensors)
        quieten(own)
        size = spec.hidden_size
        for letter, weight in (("q", 2.0), ("k", 2.0), ("v", 1.0)):
            own[f"layers.0.self_attn.{letter}_proj.weight"][:, :size] = weight * torch.eye(size)
            own[f"layers.0.self_attn.{letter}_proj.weight"][:, size:] *= 0.03
        own["layers.0.self_attn.o_proj.weight"] = torch.eye(size)
        own["fc.weight"] *= 0.03
        for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
            own[f"layers.0.{name}.weight"] = torch.full((size,), 0.03 if "hidden" in name else 1.0)
        own["norm.weight"] = torch.ones(size)
        own["lm_head.weight"] = tensors["lm_head.weight"][ids].clone()
        tensors["model.norm.weight"].fill_(1.0)
        save_file(tensors, source / "model.safetensors")
    del own[TOKEN_IDS]
    own["d2t"] = ids - torch.arange(EAGLE3_TOKENS)
    own["t2d"] = torch.zeros(spec.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    if speculators:
        inner = {**said, **OF_EAGLE3, "architectures": ["LlamaForCausalLM"]}
        outer = {
            "architectures": ["Eagle3Speculator"], "draft_vocab_size": EAGLE3_TOKENS,
            "speculators_model_type": "eagle3", "transformer_layer_config": inner,
            "eagle_aux_hidden_state_layer_ids": EAGLE3_READS,
        }  # fmt: skip
        own["embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    else:
        after = [layer - 1 for layer in EAGLE3_READS]
        outer = {**said, **OF_EAGLE3, "eagle_config": {"eagle_aux_hidden_state_layer_ids": after}}
        own = {name.replace("layers.0.", "midlayer."): one for name, one in own.items()}
    path = folder / "head"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(outer))
    save_file(own, path / "model.safetensors")
    return converted(source, folder / "model", dtype), path


def head_checkpoints(
    layout: str, folder: Path, dtype: torch.dtype, foreseen: bool = False
) -> tuple[Path, Path | None]:
    """A model with a head of this layout, and the head's own folder, if it has one."""
    if layout == "mtp":
        return mtp_checkpoint(folder, dtype, foreseen), None
    made = eagle_checkpoints if layout == "eagle" else eagle3_checkpoints
    return made(folder, dtype, foreseen)


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
        if name.endswith("lm_head.weight"):  # what comes next is clear, to the substitutes as well
            tensor.mul_(SURE / tensor.std())


# ---- the definition -----


def defined(
    spec: ModelSpec, tensors: dict[str, Tensor], embedded: Tensor, hidden: Tensor
) -> Tensor:
    """What the head returns for a text, in f64, one row after the other. embedded, hidden [T, H];
    of EAGLE-3 what it has made of the streams that it reads."""
    w, head, layer = (
        {name: one.double() for name, one in tensors.items()},
        spec.draft_head,
        "layers.0.",
    )
    assert head is not None
    [body], epsilon, is_mtp = head.layer.attentions, head.norm.epsilon, head.layout == "mtp"
    eagle3 = spec.eagle3
    assert body.rope is not None

    def norm(x: Tensor, name: str) -> Tensor:
        return (
            x
            / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
            * (is_mtp + w[f"{name}.weight"])
        )

    def of_heads(x: Tensor, letter: str) -> Tensor:
        return torch.stack([norm(one, f"{layer}self_attn.{letter}_norm") for one in x])

    def product(name: str, x: Tensor) -> Tensor:
        return w[f"{layer}{name}.weight"] @ x + w.get(f"{layer}{name}.bias", 0)

    keys, values, found = list[Tensor](), list[Tensor](), []
    for position, (e, h) in enumerate(zip(embedded.double(), hidden.double(), strict=True)):
        if is_mtp:
            e, h = norm(e, "pre_fc_norm_embedding"), norm(h, "pre_fc_norm_hidden")
        if eagle3 is not None:
            normed = norm(h, f"{layer}hidden_norm")
            x = normed if eagle3.norm_before_residual else h
            y = torch.cat((norm(e, f"{layer}input_layernorm"), normed))
        else:
            x = w["fc.weight"] @ torch.cat((e, h)) + w.get("fc.bias", 0)
            y = norm(x, f"{layer}input_layernorm") if is_mtp else x
        q, k, v = (product(f"self_attn.{one}_proj", y).view(-1, body.head_size) for one in "qkv")
        gate = None
        if is_mtp:
            q, gate = q.view(body.num_heads, 2, -1).unbind(1)
            q, k = (of_heads(one, name) for one, name in ((q, "q"), (k, "k")))
        q, k = (turned(one, position, body.rope.size, body.rope.theta) for one in (q, k))
        keys.append(k)
        values.append(v)
        heads = []
        for number in range(body.num_heads):
            of = number * body.num_kv_heads // body.num_heads
            scores = torch.stack([one[of] @ q[number] for one in keys]) * body.head_size**-0.5
            mean = scores.softmax(0) @ torch.stack([one[of] for one in values])
            heads.append(mean if gate is None else mean * gate[number].sigmoid())
        x = x + product("self_attn.o_proj", torch.cat(heads))
        y = norm(x, f"{layer}post_attention_layernorm")
        inner = F.silu(product("mlp.gate_proj", y)) * product("mlp.up_proj", y)
        x = x + product("mlp.down_proj", inner)
        found.append(norm(x, "norm") if is_mtp else x)
    return torch.stack(found)


def turned(x: Tensor, position: int, size: int, theta: float) -> Tensor:
    """x [heads, D], of which the first `size` numbers turn."""
    angles = position * theta ** (-torch.arange(0, size, 2).double() / size)
    first, second, rest = x[:, : size // 2], x[:, size // 2 : size], x[:, size:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=1)
