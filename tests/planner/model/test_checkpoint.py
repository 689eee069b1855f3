import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import config_of, save_random_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import Source
from subspec.planner.model.checkpoint import (
    Checkpoint,
    read_checkpoint,
    read_spec,
)
from subspec.planner.model.stored import INDEX, WEIGHTS, read_pieces, shard_names

SOURCE = Source("org/tiny", "0" * 40, "mit")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 10,
    "dtype": "bfloat16",
}
LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": [10, 8],
    f"{LAYER}.input_layernorm.weight": [8],
    f"{LAYER}.self_attn.q_proj.weight": [8, 8],
    f"{LAYER}.self_attn.k_proj.weight": [8, 8],
    f"{LAYER}.self_attn.v_proj.weight": [8, 8],
    f"{LAYER}.self_attn.o_proj.weight": [8, 8],
    f"{LAYER}.post_attention_layernorm.weight": [8],
    f"{LAYER}.mlp.gate_proj.weight": [12, 8],
    f"{LAYER}.mlp.up_proj.weight": [12, 8],
    f"{LAYER}.mlp.down_proj.weight": [8, 12],
    "model.norm.weight": [8],
    "lm_head.weight": [10, 8],
}
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "F8_E4M3": 1}


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """Each tensor's bytes are its own index, so that a wrong offset shows."""
    header, data = {}, b""
    for index, (name, (dtype, shape)) in enumerate(tensors.items()):
        num_bytes = ITEM_BYTES[dtype]
        for count in shape:
            num_bytes *= count
        offsets = [len(data), len(data) + num_bytes]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += bytes([index]) * num_bytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(torch.uint8).numpy().data)


def tensors(dtype: str = "BF16") -> dict[str, tuple[str, list[int]]]:
    return {name: (dtype, shape) for name, shape in SHAPES.items()}


def write(
    folder: Path, found: dict[str, tuple[str, list[int]]] | None = None, **config: Any
) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    write_safetensors(folder / WEIGHTS, tensors() if found is None else found)
    return folder


def write_shards(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Two shards and their index, whose weight_map `change` may spoil."""
    write(folder)
    (folder / WEIGHTS).unlink()
    names, weight_map = list(SHAPES), {}
    for number, held in enumerate((names[:5], names[5:]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(folder / shard, {name: tensors()[name] for name in held})
        weight_map.update(dict.fromkeys(held, shard))
    if change is not None:
        change(weight_map)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def refused(folder: Path, exit_code: Exit = Exit.CORRUPT) -> SubspecError:
    with pytest.raises(SubspecError) as caught:
        read_checkpoint(folder, SOURCE)
    assert caught.value.exit_code == exit_code
    return caught.value


def stored_bytes(checkpoint: Checkpoint, name: str) -> bytes:
    pieces = read_pieces(checkpoint.rows[name])
    return b"".join(bytes(piece.view(torch.uint8).numpy().data) for piece in pieces)


@pytest.mark.parametrize("tied", [False, True])
def test_the_tensors_of_a_saved_transformers_model_are_found_with_their_bytes(
    tmp_path: Path, tied: bool
) -> None:
    config = AutoConfig.for_model(
        "llama",
        **{key: CONFIG[key] for key in list(CONFIG)[2:-1]},
        num_key_value_heads=1,
        head_dim=6,
        tie_word_embeddings=tied,
        attention_bias=True,
        mlp_bias=True,
    )
    build: Any = AutoModelForCausalLM.from_config
    model = build(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    checkpoint = read_checkpoint(tmp_path, SOURCE)
    expected = dict(model.named_parameters())
    assert checkpoint.rows.keys() == expected.keys() | {"lm_head.weight"}
    assert checkpoint.spec.dtype == "bfloat16"
    assert checkpoint.spec.tie_word_embeddings is tied
    assert len(shard_names(tmp_path)) > 1
    for name, parameter in expected.items():
        assert stored_bytes(checkpoint, name) == as_bytes(parameter)


def test_fused_matrices_are_found_as_rows(tmp_path: Path) -> None:
    model = save_random_model(tmp_path, config_of("phi3, window", vocab_size=64))
    checkpoint = read_checkpoint(tmp_path, SOURCE)
    layer = model.model.layers[1]
    q, k, v = layer.self_attn.qkv_proj.weight.split((128, 64, 64))
    gate, up = layer.mlp.gate_up_proj.weight.split((192, 192))
    for name, expected in (("q", q), ("k", k), ("v", v)):
        found = stored_bytes(checkpoint, f"model.layers.1.self_attn.{name}_proj.weight")
        assert found == as_bytes(expected)
    for name, expected in (("gate", gate), ("up", up)):
        found = stored_bytes(checkpoint, f"model.layers.1.mlp.{name}_proj.weight")
        assert found == as_bytes(expected)
    assert checkpoint.rows["model.layers.1.mlp.up_proj.weight"].first == 192


def test_a_fused_matrix_of_other_rows_is_refused(tmp_path: Path) -> None:
    found = tensors()
    for name in ("q", "k", "v"):
        del found[f"{LAYER}.self_attn.{name}_proj.weight"]
    fused = f"{LAYER}.self_attn.qkv_proj.weight"
    read_checkpoint(write(tmp_path, {**found, fused: ("BF16", [24, 8])}), SOURCE)
    error = refused(write(tmp_path, {**found, fused: ("BF16", [23, 8])}))
    assert fused in error.message and "[24, 8]" in error.message


@pytest.mark.parametrize(
    "prefix", ["", "model.model.", "model.language_model.", "language_model.model."]
)
def test_a_decoder_is_found_under_other_prefixes(tmp_path: Path, prefix: str) -> None:
    renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors().items()}
    plain, other = tmp_path / "plain", tmp_path / "other"
    plain.mkdir()
    other.mkdir()
    expected = read_checkpoint(write(plain), SOURCE)
    found = read_checkpoint(write(other, renamed), SOURCE)
    assert found.spec == expected.spec
    assert found.rows.keys() == expected.rows.keys()
    for name in SHAPES:
        assert stored_bytes(found, name) == stored_bytes(expected, name)


@pytest.mark.parametrize("part", ["embed_tokens", "layers.0.mlp.up_proj", "norm", "layers"])
def test_some_names_alone_may_lack_their_prefix(tmp_path: Path, part: str) -> None:
    renamed = {
        name.removeprefix("model.") if name.startswith(f"model.{part}.") else name: tensor
        for name, tensor in tensors().items()
    }
    assert renamed.keys() != SHAPES.keys()
    assert read_checkpoint(write(tmp_path, renamed), SOURCE).rows.keys() == SHAPES.keys()


def test_two_tensors_for_one_matrix_are_refused_by_name(tmp_path: Path) -> None:
    message = refused(write(tmp_path, {**tensors(), "norm.weight": ("BF16", [8])})).message
    assert "model.norm.weight and norm.weight" in message


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod."])
def test_names_that_nobody_loads_are_shown(tmp_path: Path, prefix: str) -> None:
    error = refused(write(tmp_path, {prefix + name: one for name, one in tensors().items()}))
    assert f"{prefix}model.embed_tokens.weight" in error.message
    assert "save_pretrained" in error.hint


def test_a_matrix_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = read_checkpoint(write(tmp_path), SOURCE)
    whole = stored_bytes(checkpoint, f"{LAYER}.mlp.up_proj.weight")
    monkeypatch.setattr("subspec.planner.model.stored.MAPPED_BYTES", 3 * 16)
    pieces = list(read_pieces(checkpoint.rows[f"{LAYER}.mlp.up_proj.weight"]))
    assert [len(piece) for piece in pieces] == [3, 3, 3, 3]
    assert stored_bytes(checkpoint, f"{LAYER}.mlp.up_proj.weight") == whole


def test_shards_and_a_single_file_hold_the_same_tensors(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = read_checkpoint(write(tmp_path / "one"), SOURCE)
    two = read_checkpoint(write_shards(tmp_path / "two"), SOURCE)
    assert one.spec == two.spec
    assert one.rows.keys() == two.rows.keys() == SHAPES.keys()


@pytest.mark.parametrize(
    ("stored", "dtype"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")]
)
def test_the_dtype_is_that_of_the_tensors_whatever_the_config_says(
    tmp_path: Path, stored: str, dtype: str
) -> None:
    assert read_checkpoint(write(tmp_path, tensors(stored)), SOURCE).spec.dtype == dtype
    assert read_spec(tmp_path, SOURCE).dtype == dtype


def test_tensors_that_the_spec_does_not_call_for_are_left_out(tmp_path: Path) -> None:
    more = {f"{LAYER}.self_attn.rotary_emb.inv_freq": ("F32", [2]), "model.layers.1.x": ("I8", [1])}
    checkpoint = read_checkpoint(write(tmp_path, {**tensors(), **more}), SOURCE)
    assert checkpoint.rows.keys() == SHAPES.keys()


def test_what_lies_beside_the_decoder_is_set_aside_with_one_line(tmp_path: Path) -> None:
    more = {f"model.vision_tower.layers.{index}.x": ("F32", [2]) for index in range(3)}
    more |= {"mtp.fc.weight": ("I8", [1]), "model.language_model.norm2": ("I8", [1])}
    checkpoint = read_checkpoint(write(tmp_path, {**tensors(), **more}), SOURCE)
    assert checkpoint.rows.keys() == SHAPES.keys()
    [note] = checkpoint.notes
    assert note.startswith("set aside: 5 tensors of vision_tower, mtp, norm2, which")


@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    found = tensors()
    del found[name]
    assert name in refused(write(tmp_path, found)).message


def test_a_missing_head_is_told_about_tying(tmp_path: Path) -> None:
    found = tensors()
    del found["lm_head.weight"]
    assert "tie_word_embeddings" in refused(write(tmp_path, found)).hint
    tied = read_checkpoint(write(tmp_path, found, tie_word_embeddings=True), SOURCE)
    assert tied.spec.tie_word_embeddings


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_is_tied_or_not_as_transformers_takes_it_when_both_are_stored(
    tmp_path: Path, equal: bool
) -> None:
    config = AutoConfig.for_model("llama", **{key: CONFIG[key] for key in list(CONFIG)[2:-1]})
    save_random_model(tmp_path, config)
    stored = load_file(tmp_path / WEIGHTS)
    if equal:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / WEIGHTS, metadata={"format": "pt"})
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "tie_word_embeddings": True}))
    checkpoint = read_checkpoint(tmp_path, SOURCE)
    assert checkpoint.spec.tie_word_embeddings is equal
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert stored_bytes(checkpoint, name) == as_bytes(theirs.state_dict()[name])
    said = "".join(checkpoint.notes)
    assert ("lm_head.weight is not model.embed_tokens.weight" in said) is not equal


def test_of_a_tied_pair_the_head_alone_may_be_stored(tmp_path: Path) -> None:
    """As safetensors.torch.save_model leaves it."""
    found = tensors()
    del found["model.embed_tokens.weight"]
    tied = read_checkpoint(write(tmp_path, found, tie_word_embeddings=True), SOURCE)
    assert tied.spec.tie_word_embeddings
    embedding = tied.rows["model.embed_tokens.weight"]
    assert tied.rows["lm_head.weight"] == embedding
    assert embedding.tensor.name == "lm_head.weight"


def test_header_and_config_must_agree_on_every_shape(tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.up_proj.weight"
    error = refused(write(tmp_path, {**tensors(), name: ("BF16", [8, 12])}))
    assert all(part in error.message for part in (WEIGHTS, name, "[8, 12]", "[12, 8]"))
    assert "expected [11, 8]" in refused(write(tmp_path, vocab_size=11)).message
    assert "q_proj" in refused(write(tmp_path, head_dim=6)).message
    refused(write(tmp_path, num_hidden_layers=10_000))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8"])
def test_quantised_weights_are_refused(tmp_path: Path, dtype: str) -> None:
    error = refused(write(tmp_path, tensors(dtype)), Exit.UNSUPPORTED)
    assert dtype in error.message
    assert "original" in error.hint


def test_a_second_dtype_is_refused_by_the_tensors_name(tmp_path: Path) -> None:
    mixed = {**tensors(), "model.norm.weight": ("F32", [8])}
    error = refused(write(tmp_path, mixed), Exit.UNSUPPORTED)
    assert "model.norm.weight" in error.message
    assert "F32" in error.message


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "model\0.safetensors",
        "x" * 300 + ".safetensors",
        "pytorch_model.bin",
        "",
        3,
        None,
        ["model.safetensors"],
    ],
    ids=lambda shard: str(shard)[:30],
)
def test_an_index_leads_nowhere_but_to_files_of_its_own_folder(
    tmp_path: Path, shard: object
) -> None:
    write_safetensors(tmp_path.parent / "outside.safetensors", tensors())
    write_shards(tmp_path, lambda found: found.update({"model.norm.weight": shard}))
    error = refused(tmp_path)
    assert INDEX in error.message
    assert "model.norm.weight" in error.message
    assert len(error.message) < 300


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refused(tmp_path).message


def test_a_listed_tensor_that_nobody_needs_may_be_missing(tmp_path: Path) -> None:
    first = "model-00001-of-00002.safetensors"
    write_shards(tmp_path, lambda found: found.update({"model.layers.7.ghost": first}))
    assert read_checkpoint(tmp_path, SOURCE).rows.keys() == SHAPES.keys()


def test_a_shard_that_nobody_needs_may_be_missing(tmp_path: Path) -> None:
    third = "model-00003-of-00003.safetensors"
    write_shards(tmp_path, lambda found: found.update({"visual.patch_embed.weight": third}))
    assert read_checkpoint(tmp_path, SOURCE).rows.keys() == SHAPES.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_the_files_say_what_they_hold_where_the_index_forgets_it(tmp_path: Path, name: str) -> None:
    write_shards(tmp_path, lambda found: found.pop(name))
    assert read_checkpoint(tmp_path, SOURCE).rows.keys() == SHAPES.keys()


def test_an_index_may_name_tensors_without_the_files_prefix(tmp_path: Path) -> None:
    def bare(found: dict[str, Any]) -> None:
        renamed = {name.removeprefix("model."): shard for name, shard in found.items()}
        found.clear()
        found.update(renamed)

    write_shards(tmp_path, bare)
    assert read_checkpoint(tmp_path, SOURCE).rows.keys() == SHAPES.keys()


def test_a_tensor_placed_in_a_shard_that_lacks_it_is_refused(tmp_path: Path) -> None:
    first = "model-00001-of-00002.safetensors"
    write_shards(tmp_path, lambda found: found.update({"lm_head.weight": first}))
    error = refused(tmp_path)
    assert "lm_head.weight" in error.message
    assert first in error.message


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": []}',
        '{"weight_map": {}}',
        "{}",
        "[]",
        '{"weight_map": {"a": "b", "a": "c"}}',
    ],
)
def test_an_index_without_a_map_is_refused(tmp_path: Path, text: str) -> None:
    write_shards(tmp_path)
    (tmp_path / INDEX).write_text(text)
    assert INDEX in refused(tmp_path).message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf"])
def test_other_formats_alone_are_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / name)
    error = refused(tmp_path, Exit.UNSUPPORTED)
    assert name in error.message
    assert "save_pretrained" in error.hint


SHARD = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", INDEX, SHARD, "generation_config.json"])
def test_a_git_lfs_pointer_is_named_as_such(tmp_path: Path, name: str) -> None:
    (write_shards if name in (INDEX, SHARD) else write)(tmp_path)
    (tmp_path / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    )
    error = refused(tmp_path)
    assert name in error.message and "Git LFS" in error.message
    assert "git lfs pull" in error.hint


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", INDEX, SHARD, "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "is a web page"),
        (b"<html>Sign in</html>", "is a web page"),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "is a web page"),
    ],
)
def test_what_a_failed_download_left_is_named_as_such(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (write_shards if name in (INDEX, SHARD) else write)(tmp_path)
    (tmp_path / name).write_bytes(content)
    error = refused(tmp_path)
    assert error.message.startswith(f"{name} {said}")
    assert "download" in error.hint


def test_a_damaged_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    whole = (write(tmp_path) / WEIGHTS).read_bytes()
    changes = {
        "too short": whole[:5],
        "cut off": whole[:-3],
        "longer than described": whole + b"x",
        "no JSON": whole[:8] + b"x" * (len(whole) - 8),
        "a header beyond the file": struct.pack("<Q", 1 << 60) + whole[8:],
        "an unknown dtype": whole.replace(b"BF16", b"XF16", 1),
        "overlapping tensors": whole.replace(b"[0, 160]", b"[0, 158]", 1),
    }
    for what, content in changes.items():
        (tmp_path / WEIGHTS).write_bytes(content)
        error = refused(tmp_path)
        assert WEIGHTS in error.message, what
        assert "\n" not in error.message and len(error.message) < 300, what


def test_a_header_of_too_many_tensors_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    write(tmp_path)
    names = (f'"{n}":{{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}' for n in range(100_100))
    text = ("{" + ",".join(names) + "}").encode()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)
    assert "more than 100000 tensors" in refused(tmp_path).message


def test_a_folder_without_weights_and_a_pipe_in_their_place_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert "no weights" in refused(tmp_path).message
    os.mkfifo(tmp_path / WEIGHTS)
    assert "not a regular file" in refused(tmp_path).message


def test_a_dry_run_believes_the_config_only_while_weights_are_missing(tmp_path: Path) -> None:
    write_shards(tmp_path)
    complete = read_spec(tmp_path, SOURCE)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert read_spec(tmp_path, SOURCE) == complete
    (tmp_path / INDEX).unlink()
    assert read_spec(tmp_path, SOURCE) == complete
    write(tmp_path, tensors("F16"))
    assert read_spec(tmp_path, SOURCE).dtype == "float16"
