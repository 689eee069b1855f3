"""benchmarks/write_gguf.py and real_model.py: a checkpoint survives the way to GGUF and back."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from scripts import benchmark
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from subspec.artifacts.common.errors import Exit, SubspecError

pytest.importorskip("gguf")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = [("t", "h"), ("th", "e"), ("i", "n")]


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    return benchmark("write_gguf")


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    return benchmark("real_model")


def save_tokenizer(folder: Path) -> int:
    """As real_model.py writes one -> the number of its tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, *("".join(pair) for pair in MERGES)]
    made = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, MERGES))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made.save(str(folder / "tokenizer.json"))
    named = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "unk_token": SPECIAL[0]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "chat_template": "{{ 1 }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return len(tokens)


def save_llama(folder: Path, tied: bool, shard: str = "5GB") -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).bfloat16()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms, that begin as ones
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize(("tied", "shard"), [(True, "5GB"), (False, "40KB")])
def test_a_checkpoint_written_as_gguf_is_read_back_bit_by_bit(
    writer: ModuleType, reader: ModuleType, tmp_path: Path, tied: bool, shard: str
) -> None:
    there, file, back = tmp_path / "there", tmp_path / "model.gguf", tmp_path / "back"
    save_llama(there, tied, shard)
    assert (len(list(there.glob("*.safetensors"))) > 1) == (not tied)
    writer.write_gguf(there, file)
    reader.make_checkpoint(back, file, torch.bfloat16)

    expected, got = tensors(there), tensors(back)
    assert expected.keys() == got.keys()
    assert ("lm_head.weight" in got) == (not tied)
    for name, weight in expected.items():
        assert torch.equal(weight, got[name]), name
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((there / name).read_text()) == json.loads((back / name).read_text())
    config = json.loads((back / "config.json").read_text())
    assert (config["num_key_value_heads"], config["rope_theta"]) == (2, 50000.0)
    assert config["tie_word_embeddings"] == tied
    assert not list(tmp_path.glob("*.partial"))


def test_the_halves_of_a_head_are_interleaved(writer: ModuleType) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, hidden_size=8)
    rows = torch.arange(8.0)[:, None]
    query, key = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    assert writer.permuted(query, rows, config).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert writer.permuted(key, rows[:4], config).flatten().tolist() == [0, 2, 1, 3]
    value = query.replace("q_proj", "v_proj")
    assert writer.permuted(value, rows, config) is rows


def test_a_model_that_a_file_could_not_say_is_refused(writer: ModuleType) -> None:
    from transformers import LlamaConfig, MistralConfig

    scaled = {
        "rope_type": "linear",
        "rope_theta": 10000.0,
        "factor": 2.0,
    }
    for config, message in (
        (MistralConfig(), "model type 'mistral', expected llama, qwen2, qwen3"),
        (LlamaConfig(rope_parameters=scaled), "rotary embeddings 'linear'"),
    ):
        with pytest.raises(SubspecError, match=message) as refused:
            writer.check_supported(config)
        assert refused.value.exit_code == Exit.UNSUPPORTED
    with pytest.raises(SubspecError, match="no GGUF name is known for the tensor model.layers.0.x"):
        writer.gguf_name("model.layers.0.x.weight")
