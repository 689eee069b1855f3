"""benchmarks/widen.py: a wide model is the source's function, in other and larger weights."""

import importlib.util
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from families import FAMILIES, save_random_model
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from subspec.artifacts.model import Source
from subspec.planner.model.config import read_config

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "widen.py"
CODE = '''import os


def read_lines(path, encoding="utf-8"):
    """Return the lines of a file, without their ends."""
    with open(os.fspath(path), encoding=encoding) as stream:
        return [line.rstrip("\\n") for line in stream if not line.startswith("#")]
'''


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("widen", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of torch's own deprecated corners, when transformers loads
        spec.loader.exec_module(module)
        import transformers.cache_utils  # noqa: F401  (what is lazy and warns)
    return module


@torch.no_grad()
def logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.tensor([tokens])).logits[0]  # [positions, vocabulary]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})
    return found


def assert_same_function(source: Path, wide: Path, tokens: list[int]) -> None:
    expected, got = logits(source, tokens), logits(wide, tokens)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(("hidden", "layers", "heads"), [(384, 6, 6), (896, 6, 14), (512, 8, 8)])
def test_a_wide_model_has_the_logits_of_its_source(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    hidden: int,
    layers: int,
    heads: int,
) -> None:
    out = tmp_path / "wide"
    size = ["--hidden", str(hidden), "--layers", str(layers)]
    assert script.main([*size, "--dtype", "float32", "--no-check", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])

    spec = read_config(out, Source("wide"))
    attention = spec.layers[0].attentions[0]
    assert (spec.hidden_size, spec.num_layers, attention.num_heads) == (hidden, layers, heads)
    assert attention.num_kv_heads == heads // 2
    assert spec.linears[-2].in_features % 64 == 0  # the inner size
    origin = json.loads((out / "config.json").read_text())["subspec_widened_from"]
    assert origin["hidden_size"] == 256 and "not the acceptance" in origin["note"]

    weights = tensors(out)
    assert result["parameters"] == sum(weight.numel() for weight in weights.values())
    for name, weight in weights.items():
        columns = weight.view(len(weight), -1).abs().sum(0)
        assert bool((columns > 0).all()) and bool(weight.isfinite().all()), name
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert_same_function(script.DEMO_MODEL, out, tokenizer.encode(CODE).ids)


def test_no_two_rows_or_columns_of_a_wide_matrix_are_equal(
    script: ModuleType, tmp_path: Path
) -> None:
    out = tmp_path / "wide"
    size = ["--hidden", "512", "--layers", "7", "--dtype", "float32"]
    assert script.main([*size, "--no-check", "--out", str(out)]) == 0
    for name, weight in tensors(out).items():
        if weight.ndim == 2:
            assert len(weight.unique(dim=0)) == len(weight), name
            assert len(weight.T.unique(dim=0)) == len(weight.T), name


def test_a_rounded_wide_model_passes_its_check(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--hidden", "320", "--out", str(tmp_path / "wide")]) == 0
    assert json.loads(capsys.readouterr().out)["argmax_agreement"] > 0.9


def test_the_seed_alone_decides_the_weights(script: ModuleType, tmp_path: Path) -> None:
    files = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(number)
        size = ["--hidden", "320", "--seed", str(seed)]
        assert script.main([*size, "--no-check", "--out", str(out)]) == 0
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_an_untied_head_head_norms_and_shards_are_widened_too(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    source = tmp_path / "source"
    model = Qwen3ForCausalLM(Qwen3Config(**settings))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms, that begin as ones
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(source)
    monkeypatch.setattr(script, "SHARD_BYTES", 200_000)
    monkeypatch.setattr(script, "CHUNK_WEIGHTS", 1000)
    out = tmp_path / "wide"
    size = ["--hidden", "192", "--layers", "4", "--intermediate", "256", "--dtype", "float32"]
    assert script.main([*size, "--model", str(source), "--no-check", "--out", str(out)]) == 0
    assert len(list(out.glob("*.safetensors"))) > 1
    assert_same_function(source, out, list(range(96)))


def test_a_hybrid_is_widened_head_by_head_and_its_f32_tensors_stay_so(
    script: ModuleType, tmp_path: Path
) -> None:
    """Key heads that several value heads use, gated queries, a config inside another."""
    from transformers import AutoConfig

    values = {**FAMILIES["qwen3_5_text"], "hidden_size": 64, "intermediate_size": 80}
    source, out = tmp_path / "source", tmp_path / "wide"
    save_random_model(source, AutoConfig.for_model(**values, tie_word_embeddings=True))
    kept = {
        name: weight if name.endswith(("A_log", "attn.norm.weight")) else weight.bfloat16()
        for name, weight in tensors(source).items()
    }
    save_file(kept, source / "model.safetensors")
    size = ["--hidden", "192", "--layers", "6", "--model", str(source), "--no-check"]
    assert script.main([*size, "--dtype", "float32", "--out", str(out)]) == 0
    assert_same_function(source, out, list(range(3, 60)))
    assert script.main([*size, "--out", str(tmp_path / "bf16")]) == 0
    for name, weight in tensors(tmp_path / "bf16").items():
        in_f32 = name.endswith(("A_log", "attn.norm.weight"))
        assert weight.dtype == (torch.float32 if in_f32 else torch.bfloat16), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "400"], "--hidden 400"),
        (["--hidden", "192"], "192 channels hold 0 copies of one of 256"),
        (["--hidden", "512", "--layers", "5"], "--layers 5"),
        (["--hidden", "384", "--layers", "8"], "384 channels hold 1 copies of one of 256"),
    ],
)
def test_a_size_that_cannot_keep_the_function_is_refused_and_leaves_nothing(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert script.main([*arguments, "--out", str(tmp_path / "wide")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
