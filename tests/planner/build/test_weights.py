"""The weight files hold the checkpoint: every byte of it, and nothing that is not in it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_artifact, random_checkpoint
from families import config_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.packing import dequantize, unpack_nibbles
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.format.tensors import TensorFile
from subspec.artifacts.model import ModelSpec, Source
from subspec.planner.model.config import read_config
from subspec.planner.model.hub import DEMO

TESTS = Path(__file__).parents[2]  # where builders.py is
WEIGHT_FILES = tuple(
    f"{name}.safetensors" for name in ("embedding", "exact", "resident", "substitutes")
)
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Any] = {
    "tied, biases": Qwen2Config(**TINY, tie_word_embeddings=True),
    "untied, no biases": LlamaConfig(**TINY, tie_word_embeddings=False),
    "untied, biases everywhere": LlamaConfig(
        **TINY, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
}
ODD = LlamaConfig(  # no shape that 4 bits take
    **{**TINY, "hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 2},
    tie_word_embeddings=False,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two that wait for each other take minutes on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {name: random_checkpoint(folder / name, config) for name, config in CONFIGS.items()}
    return {**found, "odd": random_checkpoint(folder / "odd", ODD)}


def in_dtype(checkpoint: Path, dtype: torch.dtype, folder: Path) -> Path:
    tensors = load_file(checkpoint / "model.safetensors")
    return rewritten(checkpoint, folder, {name: t.to(dtype) for name, t in tensors.items()})


def rewritten(checkpoint: Path, folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors")
    return folder


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def canonical(spec: ModelSpec, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors under canonical names: fused ones apart, a tied head beside its
    embedding, zeros below a head."""
    found = dict(stored)
    for name in stored:
        layer, _, leaf = name.rpartition(".self_attn.")
        if leaf == "qkv_proj.weight":
            attention = spec.layers[0].attentions[0]
            sizes = (attention.query_size, attention.kv_size, attention.kv_size)
            for one, rows in zip("qkv", found.pop(name).split(sizes), strict=True):
                found[f"{layer}.self_attn.{one}_proj.weight"] = rows
        layer, _, leaf = name.rpartition(".mlp.")
        if leaf == "gate_up_proj.weight":
            for one, rows in zip(("gate", "up"), found.pop(name).chunk(2), strict=True):
                found[f"{layer}.mlp.{one}_proj.weight"] = rows
    if spec.tie_word_embeddings:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    head, padding = found["lm_head.weight"], spec.linears[-1].padding_rows
    found["lm_head.weight"] = torch.cat((head, head.new_zeros(padding, head.shape[1])))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_exact_bytes_are_those_of_the_checkpoint(
    name: str, dtype: torch.dtype, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = in_dtype(checkpoints[name], dtype, tmp_path / "checkpoint")
    artifact = build_artifact(source, tmp_path / "artifact")
    check_exact_bytes(artifact, source)


ODD_FAMILIES = (
    "llama, shapes that 4 bits do not take",
    "llama, odd vocabulary, tied",
    "phi3, window",
    "olmo2",
    "glm4",
    "qwen2, 7 heads to 1, tied",
)


@pytest.mark.parametrize("case", ODD_FAMILIES)
def test_fused_padded_tied_and_odd_matrices_are_kept_byte_by_byte(
    case: str, tmp_path: Path
) -> None:
    config = config_of(case)
    source = random_checkpoint(tmp_path / "checkpoint", config)
    check_exact_bytes(build_artifact(source, tmp_path / "artifact"), source)


def check_exact_bytes(artifact: Artifact, source: Path) -> None:
    """Between them the files hold the checkpoint."""
    spec = artifact.spec
    original = canonical(spec, load_file(source / "model.safetensors"))
    stored, exact = artifact.part_entries(), (artifact.path / "exact.safetensors").read_bytes()
    for part in spec.parts:
        rows = original[f"{part.linear.name}.weight"][part.first_row :][: part.num_rows]
        offset = stored[part.name].offset
        assert exact[offset : offset + part.num_bytes] == as_bytes(rows), part.name
        assert not any(exact[offset + part.num_bytes : offset + part.padded_bytes])
    resident = load_file(artifact.path / "resident.safetensors")
    assert {name: tuple(t.shape) for name, t in resident.items()} == spec.resident_shapes
    embedding = load_file(artifact.path / "embedding.safetensors")
    assert list(embedding) == ["model.embed_tokens.weight"]
    for name, tensor in {**resident, **embedding}.items():
        assert as_bytes(tensor) == as_bytes(original[name]), name
    in_parts = {f"{part.linear.name}.weight" for part in spec.parts}
    assert in_parts | resident.keys() | embedding.keys() == original.keys()


def test_other_readers_of_safetensors_see_slabs_of_layers_in_execution_order(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = checkpoints["untied, no biases"]
    artifact = build_artifact(source, tmp_path / "artifact")
    original = load_file(source / "model.safetensors")
    with safe_open(artifact.path / "exact.safetensors", "pt") as file:
        assert list(file.keys()) == ["layers.0", "layers.1", "layers.2"]
        for layer in range(3):
            expected = b""
            for part in (p for p in artifact.spec.parts if p.linear.layer == layer):
                weight = as_bytes(original[f"{part.linear.name}.weight"])
                expected += weight + bytes(part.padded_bytes - part.num_bytes)
            assert as_bytes(file.get_tensor(f"layers.{layer}")) == expected


def test_a_large_matrix_is_stored_in_row_parts(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subspec.artifacts.model.PART_BYTES", 100_000)
    source = checkpoints["untied, no biases"]
    artifact = build_artifact(source, tmp_path / "artifact")
    head = [part for part in artifact.spec.parts if part.linear.name == "lm_head"]
    assert len(head) > 2
    weight = as_bytes(load_file(source / "model.safetensors")["lm_head.weight"])
    exact, stored = (artifact.path / "exact.safetensors").read_bytes(), artifact.part_entries()
    got = b"".join(exact[stored[p.name].offset :][: p.num_bytes] for p in head)
    assert got == weight


def test_the_substitutes_approximate_every_matrix_and_a_tied_head(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = checkpoints["tied, biases"]
    artifact = build_artifact(source, tmp_path / "artifact")
    original = load_file(source / "model.safetensors")
    original["lm_head.weight"] = original["model.embed_tokens.weight"]
    found = load_file(artifact.path / "substitutes.safetensors")
    names = {name.rpartition(".")[0] for name in found}
    assert len(names) == 7 * 2 + 1 and "lm_head" in names
    for name in names:
        codes, qparams = found[f"{name}.codes"], found[f"{name}.qparams"]
        weight = original[f"{name}.weight"]
        error = weight - dequantize(unpack_nibbles(codes), qparams)
        assert error.norm() < 0.12 * weight.norm(), name


def test_matrices_of_odd_shape_are_kept_as_they_are(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    artifact = build_artifact(checkpoints["odd"], tmp_path / "artifact")
    assert artifact.spec.parts == ()
    assert load_file(artifact.path / "substitutes.safetensors") == {}
    check_exact_bytes(artifact, checkpoints["odd"])


def test_a_sharded_checkpoint_gives_the_same_weights(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    whole = checkpoints["untied, no biases"]
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (sharded / name).write_bytes((whole / name).read_bytes())
    placed: dict[str, str] = {}
    for index, (name, tensor) in enumerate(load_file(whole / "model.safetensors").items()):
        placed[name] = f"model-{index:05}.safetensors"
        save_file({name: tensor}, sharded / placed[name])
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    build_artifact(whole, tmp_path / "a")
    build_artifact(sharded, tmp_path / "b")
    for name in WEIGHT_FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_bytes_that_read_back_otherwise_are_refused(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = TensorFile.read_into

    def flip_one_bit(self: Any, target: memoryview, offset: int) -> None:
        honest(self, target, offset)
        if self._path.name == "exact.safetensors":
            target[len(target) // 2] ^= 1

    monkeypatch.setattr(TensorFile, "read_into", flip_one_bit)
    with pytest.raises(SubspecError, match="layers.0.self_attn.q_proj was read back") as caught:
        build_artifact(checkpoints["tied, biases"], tmp_path / "artifact")
    assert caught.value.exit_code == Exit.RESOURCES
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"],
)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named_and_nothing_is_left(
    name: str, bad: float, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(checkpoints["untied, no biases"] / "model.safetensors")
    tensors[name].view(-1)[17] = bad
    source = rewritten(checkpoints["untied, no biases"], tmp_path / "checkpoint", tensors)
    with pytest.raises(SubspecError, match=f"{name}: 1 .*NaN or infinite") as caught:
        build_artifact(source, tmp_path / "artifact")
    assert caught.value.exit_code == Exit.CORRUPT
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


MEMORY_OF_A_BUILD = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)  # threads that wait for each other are slow on a busy machine
from builders import build_artifact

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

build_artifact(Path(sys.argv[2]), Path(sys.argv[4]) / "warm")
before = peak()
build_artifact(Path(sys.argv[3]), Path(sys.argv[4]) / "artifact")
print(peak() - before)
"""


def test_a_build_takes_the_memory_of_a_few_matrices(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(DEMO, checkpoint)
    config = json.loads((DEMO / "config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 4096, "tie_word_embeddings": False}
    config |= {"num_hidden_layers": 3, "layer_types": None}
    (checkpoint / "config.json").write_text(json.dumps(config))
    spec = read_config(checkpoint, Source("test/model"))
    shapes = {f"{n.name}.weight": (n.out_features, n.in_features) for n in spec.linears}
    shapes["model.embed_tokens.weight"] = (spec.vocab_size, spec.hidden_size)
    noise = torch.randn(4096 * 1024).bfloat16()
    tensors = {
        name: noise[: torch.Size(shape).numel()].view(shape).clone()
        for name, shape in {**shapes, **spec.resident_shapes}.items()
    }
    save_file(tensors, checkpoint / "model.safetensors")
    matrix = 2 * len(noise)
    assert (checkpoint / "model.safetensors").stat().st_size > 12 * matrix
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_A_BUILD, TESTS, DEMO, checkpoint, tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Two matrices, one of them read back beside its substitute, and the quantiser's temporaries.
    assert int(done.stdout) < 5 * matrix
