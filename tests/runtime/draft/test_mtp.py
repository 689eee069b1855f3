"""The head for multi-token prediction of qwen3_5: from a checkpoint through the artifact, and what
it computes against the definition, written out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import build_artifact, converted, random_checkpoint
from families import FAMILIES
from safetensors.torch import load_file, save_file
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact, open_artifact, verify
from subspec.artifacts.model import Source
from subspec.planner.model.checkpoint import read_checkpoint
from subspec.runtime.draft.mtp import make_head, next_hidden, read_tensors
from subspec.runtime.exact_pass import causal_rows
from subspec.runtime.model.attention import attend
from subspec.runtime.model.cache import make_cache
from subspec.runtime.model.transformer import make_shared, make_tables

SLOTS = 64


def with_head(folder: Path, dtype: torch.dtype) -> Path:
    """A random checkpoint whose file has a head, and whose config.json says so."""
    import transformers

    config = transformers.AutoConfig.for_model(**FAMILIES["qwen3_5_text"])
    source = random_checkpoint(folder / "f32", config)
    source = converted(source, folder / "model", dtype)
    said = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**said, "mtp_num_hidden_layers": 1}))
    spec = replace(read_checkpoint(source, Source("org/toy")).spec)
    layer = next(one for one in spec.layers if one.attentions)
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(source / "model.safetensors")
    for name, shape in replace(spec, mtp=layer).mtp_shapes.items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = (noise * (0.2 if len(shape) == 1 else shape[1] ** -0.5)).to(dtype)
    save_file(tensors, source / "model.safetensors")
    return source


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_head(tmp_path_factory.mktemp("mtp"), torch.float32)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_artifact(checkpoint, tmp_path_factory.mktemp("built") / "artifact")


def test_the_artifact_has_every_bit_of_the_head(checkpoint: Path, artifact: Artifact) -> None:
    stored, spec = load_file(checkpoint / "model.safetensors"), artifact.spec
    assert spec.mtp in spec.layers and len(spec.mtp_shapes) == 15
    found = read_tensors(artifact)
    assert found.keys() == spec.mtp_shapes.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in found.items())
    assert verify(artifact.path) > sum(tensor.nbytes for tensor in found.values())


def test_a_damaged_head_is_noticed_before_it_is_used(checkpoint: Path, tmp_path: Path) -> None:
    artifact = build_artifact(checkpoint, tmp_path / "artifact")
    path = artifact.path / "mtp.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for reads in (lambda: read_tensors(artifact), lambda: verify(artifact.path)):
        with pytest.raises(SubspecError, match=r"mtp\.safetensors") as raised:
            reads()
        assert raised.value.exit_code == Exit.CORRUPT
    path.unlink()
    with pytest.raises(SubspecError, match=r"mtp\.safetensors"):
        open_artifact(artifact.path)


def test_a_head_that_is_not_there_or_in_another_dtype_is_set_aside(
    checkpoint: Path, tmp_path: Path
) -> None:
    whole = read_checkpoint(checkpoint, Source("org/toy"))
    assert whole.spec.mtp is not None and not whole.notes
    folder = converted(checkpoint, tmp_path / "copy", torch.float32)
    tensors = load_file(folder / "model.safetensors")
    others = {n: t.bfloat16() if n.startswith("mtp.") else t for n, t in tensors.items()}
    save_file(others, folder / "model.safetensors")
    read = read_checkpoint(folder, Source("org/toy"))
    assert read.spec.mtp is None and "15 tensors of mtp" in read.notes[0]
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    save_file(rest, folder / "model.safetensors")
    read = read_checkpoint(folder, Source("org/toy"))
    assert read.spec.mtp is None and not read.notes


def test_a_head_of_another_shape_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = converted(checkpoint, tmp_path / "copy", torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SubspecError, match=r"mtp\.fc\.weight has the shape"):
        read_checkpoint(folder, Source("org/toy"))


# ---- against the definition ---------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * (1 + weight)


def turned(x: Tensor, position: int, size: int, theta: float) -> Tensor:
    """x [heads, D], of which the first `size` numbers turn."""
    angles = position * theta ** (-torch.arange(0, size, 2).double() / size)
    first, second, rest = x[:, : size // 2], x[:, size // 2 : size], x[:, size:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=1)


def defined(artifact: Artifact, embedded: Tensor, hidden: Tensor) -> Tensor:
    """A chain from position 0 on, in f64: one row after the other."""
    w = {name: tensor.double() for name, tensor in read_tensors(artifact).items()}
    spec, layer = artifact.spec, "mtp.layers.0."
    assert spec.mtp is not None
    [body], epsilon = spec.mtp.attentions, spec.norm.epsilon
    assert body.rope is not None
    keys, values, found = list[Tensor](), list[Tensor](), []
    for position, (e, h) in enumerate(zip(embedded.double(), hidden.double(), strict=True)):
        e = norm(e, w["mtp.pre_fc_norm_embedding.weight"], epsilon)
        h = norm(h, w["mtp.pre_fc_norm_hidden.weight"], epsilon)
        x = w["mtp.fc.weight"] @ torch.cat((e, h))
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
        found.append(norm(x, w["mtp.norm.weight"], epsilon))
    return torch.stack(found)


def test_it_computes_what_the_definition_says_in_any_number_of_pieces(artifact: Artifact) -> None:
    spec = artifact.spec
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(spec.vocab_size, spec.hidden_size, generator=generator)
    small = {name: torch.ones(shape) for name, shape in spec.resident_shapes.items()}
    tables = make_tables(spec, SLOTS, torch.float32, torch.clone)
    shared = make_shared(spec, table.__getitem__, small, tables, torch.float32, torch.clone)
    head = make_head(shared, read_tensors(artifact), torch.clone)
    tokens = torch.randint(spec.vocab_size, (9,), generator=generator)
    hidden = torch.randn(9, spec.hidden_size, generator=generator)
    expected = defined(artifact, table[tokens], hidden)
    for sizes in ([9], [4, 1, 4]):
        cache = make_cache(head.decoder.spec, SLOTS, lambda shape, dtype: torch.zeros(shape))
        found = []
        for some, h in zip(tokens.split(sizes), hidden.split(sizes), strict=True):
            found.append(next_hidden(head, causal_rows(cache, some, attend), h))
            cache.commit(some.tolist())
        torch.testing.assert_close(torch.cat(found).double(), expected, rtol=1e-4, atol=1e-4)
