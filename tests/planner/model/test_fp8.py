"""FP8 checkpoints: what is read of them, and what is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SIZES, save_random_model
from safetensors.torch import load_file, save_file
from scripts import benchmark
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format import fp8
from subspec.artifacts.model import ScaleBlock, Source
from subspec.planner.build.weights import read_weight
from subspec.planner.model.checkpoint import read_checkpoint, read_spec
from subspec.planner.model.config import read_config

to_fp8 = benchmark("to_fp8")
SOURCE = Source("test/model")
GATE = "model.layers.0.mlp.gate_proj"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("source")
    config = transformers.AutoConfig.for_model(
        **{
            **SIZES,
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_size": 192,
            "head_dim": 64,
        }
    )
    save_random_model(folder / "f32", config, 0)
    tensors = load_file(folder / "f32" / "model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(rounded, folder / "f32" / "model.safetensors", metadata={"format": "pt"})
    return folder / "f32"


@pytest.fixture
def folder(bf16: Path, tmp_path: Path) -> Path:
    to_fp8.convert(bf16, tmp_path / "fp8")
    return tmp_path / "fp8"


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("scales", "block"),
    [
        ("block", ScaleBlock(128, 128)),
        ("channel", ScaleBlock(1, 192)),
        ("tensor", ScaleBlock(192, 192)),
    ],
)
def test_scales_say_which_weights_they_belong_to(
    bf16: Path, tmp_path: Path, scales: str, block: ScaleBlock
) -> None:
    to_fp8.convert(bf16, tmp_path / "fp8", scales)
    spec = read_checkpoint(tmp_path / "fp8", SOURCE).spec
    assert spec.fp8[GATE] == block and len(spec.fp8) == 7
    assert spec.dtype == "bfloat16" and "lm_head" not in spec.fp8
    (tmp_path / "fp8" / "model.safetensors").unlink()
    assert read_spec(tmp_path / "fp8", SOURCE).fp8 == spec.fp8, "from config.json alone"


def test_several_files_are_one_checkpoint(bf16: Path, tmp_path: Path) -> None:
    to_fp8.convert(bf16, tmp_path / "fp8", shard_bytes=200_000)
    assert len(list((tmp_path / "fp8").glob("*.safetensors"))) > 1
    assert len(read_checkpoint(tmp_path / "fp8", SOURCE).spec.fp8) == 7


def test_modules_that_are_left_in_bf16_stay_so(folder: Path) -> None:
    def leave(tensors: Tensors) -> None:
        tensors[f"{GATE}.weight"] = tensors[f"{GATE}.weight"].bfloat16()
        del tensors[f"{GATE}.weight_scale_inv"]

    change_tensors(folder, leave)
    spec = read_checkpoint(folder, SOURCE).spec
    assert GATE not in spec.fp8 and len(spec.fp8) == 6
    assert {one.name: one.fp8 for one in spec.linears}[GATE] is None


@pytest.mark.parametrize("height", [96, 48])
def test_blocks_that_an_artifact_does_not_have_are_multiplied_out(
    folder: Path, height: int
) -> None:
    """Columns that are no multiple of a group's."""
    tensors = load_file(folder / "model.safetensors")
    scale = torch.rand(-(-192 // height), 4) + 0.5
    change_tensors(
        folder, lambda found: [found.pop(name) for name in list(found) if name.endswith("_inv")]
    )

    def with_scales(found: Tensors) -> None:
        for name in list(found):
            if found[name].dtype == torch.float8_e4m3fn:
                rows, columns = found[name].shape
                found[f"{name}_scale_inv"] = torch.rand(-(-rows // height), -(-columns // 48)) + 0.5
        found[f"{GATE}.weight_scale_inv"] = scale

    change_tensors(folder, with_scales)
    change_config(folder, lambda c: c["quantization_config"].update(weight_block_size=[height, 48]))
    read = read_checkpoint(folder, SOURCE)
    assert not read.spec.fp8
    exact = read_weight(read, next(one for one in read.spec.linears if one.name == GATE))
    whole = scale.repeat_interleave(height, 0)[:192].repeat_interleave(48, 1)
    expected = (tensors[f"{GATE}.weight"].float() * whole).bfloat16()
    assert exact.scales is None and torch.equal(exact.weight, expected)


@pytest.mark.parametrize("dtype", [None, "auto", "float16", "float32"])
def test_beside_fp8_the_configs_dtype_counts_only_where_no_tensors_are_read(
    folder: Path, dtype: str | None
) -> None:
    change_config(folder, lambda config: config.update(dtype=dtype, torch_dtype=dtype))
    spec = read_checkpoint(folder, SOURCE).spec
    assert spec.dtype == "bfloat16" and len(spec.fp8) == 7 and read_spec(folder, SOURCE) == spec
    (folder / "model.safetensors").unlink()
    if dtype in (None, "auto"):
        assert read_spec(folder, SOURCE).dtype == "bfloat16"
    else:
        with pytest.raises(SubspecError, match=f"in FP8 and others in {dtype}") as caught:
            read_spec(folder, SOURCE)
        assert caught.value.exit_code == Exit.UNSUPPORTED
        assert caught.value.hint and "the original checkpoint" in caught.value.hint


def gate_of(folder: Path) -> tuple[Tensor, Tensor]:
    """The exact gate as it is read, dequantized, and in f64 by its FP8 codes and scales of
    blocks."""
    read = read_checkpoint(folder, SOURCE)
    found = read_weight(read, next(one for one in read.spec.linears if one.name == GATE))
    assert found.scales is not None
    tensors = load_file(folder / "model.safetensors")
    scales = tensors[f"{GATE}.weight_scale_inv"]
    if scales.dtype == torch.uint8:
        scales = torch.exp2(scales.double() - 127)
    whole = scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)[:192, :192]
    return fp8.dequantize(found.weight, found.scales), tensors[f"{GATE}.weight"].double() * whole


def test_scales_in_float16_beside_weights_in_bfloat16_are_read(folder: Path) -> None:
    def in_f16(tensors: Tensors) -> None:
        tensors |= {n: (x * 256).half() for n, x in tensors.items() if n.endswith("_inv")}

    change_tensors(folder, in_f16)
    found, expected = gate_of(folder)
    assert torch.equal(found, expected.bfloat16())


def test_scales_that_are_bytes_are_exponents(bf16: Path, tmp_path: Path) -> None:
    to_fp8.convert(bf16, tmp_path / "fp8", "block", "F8_E8M0")

    def as_bytes(tensors: Tensors) -> None:
        found = {n: x for n, x in tensors.items() if n.endswith("_inv")}
        tensors |= {name: x.view(torch.uint8) for name, x in found.items()}

    change_tensors(tmp_path / "fp8", as_bytes)
    found, expected = gate_of(tmp_path / "fp8")
    assert torch.equal(found, expected.bfloat16())
    change_tensors(tmp_path / "fp8", lambda t: t[f"{GATE}.weight_scale_inv"].fill_(255))
    with pytest.raises(SubspecError, match="NaN or infinite"):
        gate_of(tmp_path / "fp8")


@pytest.mark.parametrize(
    ("scales", "block"), [("block", ScaleBlock(128, 128)), ("channel", ScaleBlock(1, 192))]
)
def test_fine_grained_fp8_that_does_not_say_has_blocks_of_128_or_what_its_scales_show(
    bf16: Path, tmp_path: Path, scales: str, block: ScaleBlock
) -> None:
    folder = tmp_path / "fp8"
    to_fp8.convert(bf16, folder, scales)
    quantization = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
    change_config(folder, lambda config: config.update(quantization_config=quantization))
    assert read_checkpoint(folder, SOURCE).spec.fp8[GATE] == block
    assert read_config(folder, SOURCE).fp8[GATE] == ScaleBlock(128, 128)
    change_tensors(folder, lambda t: t.update({f"{GATE}.weight_scale": torch.ones(3, 3)}))
    change_tensors(folder, lambda t: t.pop(f"{GATE}.weight_scale_inv", None))
    with pytest.raises(SubspecError, match=r"has the shape \[3, 3\]"):
        read_checkpoint(folder, SOURCE)


@pytest.mark.parametrize("by_modelopt", [True, False])
def test_weights_that_share_a_byte_are_refused_as_such(folder: Path, by_modelopt: bool) -> None:
    """As NVFP4 has them, whose older checkpoints say nothing in config.json."""
    change_config(folder, lambda config: config.pop("quantization_config"))
    change_tensors(
        folder, lambda t: t.update({f"{GATE}.weight": torch.zeros(192, 96, dtype=torch.uint8)})
    )
    if by_modelopt:
        (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(SubspecError, match=r"is U8 of the shape \[192, 96\]") as caught:
        read_checkpoint(folder, SOURCE)
    assert caught.value.exit_code == Exit.UNSUPPORTED and "original" in str(caught.value.hint)
    assert ("as hf_quant_config.json says" in caught.value.message) is by_modelopt


REFUSED: dict[str, tuple[Callable[[Tensors], object], Exit, str]] = {
    "e5m2": (
        lambda t: t.update({f"{GATE}.weight": t[f"{GATE}.weight"].float().to(torch.float8_e5m2)}),
        Exit.UNSUPPORTED,
        f"{GATE}.weight is F8_E5M2, of FP8 we read only F8_E4M3",
    ),
    "int8": (
        lambda t: t.update({f"{GATE}.weight": t[f"{GATE}.weight"].view(torch.int8)}),
        Exit.UNSUPPORTED,
        "8-bit integers as exact targets would need an encoding of their own",
    ),
    "no scales": (
        lambda t: t.pop(f"{GATE}.weight_scale_inv"),
        Exit.CORRUPT,
        f"{GATE}.weight is F8_E4M3 with no scales",
    ),
    "two scales": (
        lambda t: t.update({f"{GATE}.weight_scale": torch.ones(1)}),
        Exit.CORRUPT,
        f"{GATE}.weight_scale_inv and {GATE}.weight_scale",
    ),
    "scales of another shape": (
        lambda t: t.update({f"{GATE}.weight_scale_inv": torch.ones(3, 2)}),
        Exit.CORRUPT,
        "has the shape [3, 2]",
    ),
    "an embedding in FP8": (
        lambda t: t.update(
            {"model.embed_tokens.weight": t["model.embed_tokens.weight"].to(torch.float8_e4m3fn)}
        ),
        Exit.UNSUPPORTED,
        "model.embed_tokens.weight is F8_E4M3",
    ),
    "the rest in float16": (
        lambda t: t.update({n: x.half() for n, x in t.items() if x.dtype == torch.bfloat16}),
        Exit.UNSUPPORTED,
        "weights in FP8 and others in float16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_target_is_refused_by_name(folder: Path, case: str) -> None:
    change, code, said = REFUSED[case]
    change_tensors(folder, change)
    with pytest.raises(SubspecError) as caught:
        read_checkpoint(folder, SOURCE)
    assert caught.value.exit_code == code and said in caught.value.message
    if case == "the rest in float16":
        assert caught.value.hint and "the original checkpoint" in caught.value.hint


UNREADABLE: dict[str, tuple[Callable[[Tensors], object], Exit, str]] = {
    "NaN": (
        lambda t: t[f"{GATE}.weight"].view(torch.uint8)[5].fill_(0xFF),
        Exit.CORRUPT,
        f"{GATE}.weight: 192 FP8 weights are NaN",
    ),
    "infinite scales": (
        lambda t: t[f"{GATE}.weight_scale_inv"].fill_(torch.inf),
        Exit.CORRUPT,
        "scales that are NaN or infinite",
    ),
    "negative scales": (
        lambda t: t[f"{GATE}.weight_scale_inv"].neg_(),
        Exit.UNSUPPORTED,
        "a scale that is negative",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_weights_that_are_no_numbers_are_refused_when_they_are_read(
    folder: Path, case: str
) -> None:
    change, code, said = UNREADABLE[case]
    change_tensors(folder, change)
    read = read_checkpoint(folder, SOURCE)
    with pytest.raises(SubspecError) as caught:
        read_weight(read, next(one for one in read.spec.linears if one.name == GATE))
    assert caught.value.exit_code == code and said in caught.value.message


def expected(folder: Path, **quantization: Any) -> set[str]:
    """What a dry run takes for FP8, by the last part of its names; the layer's number is 0."""
    change_config(folder, lambda config: config.update(quantization_config=quantization))
    return {name.rpartition(".")[2] for name in read_config(folder, SOURCE).fp8}


def first_name(case: object) -> str:
    """An id that is the same in every process, as sets have no order of their own."""
    return str(case[0])[:40] if isinstance(case, list) else ""


ATTENTION, DENSE = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        (["lm_head", "model.layers.0.self_attn"], DENSE),
        (["re:.*self_attn.*"], DENSE),
        (["re:.*\\.(q|k|v)_proj$", "o_proj"], DENSE),
        (["model.language_model.layers.0.self_attn", "vision_tower"], DENSE),
        (["re:language_model\\.model\\.layers\\.\\d+\\.mlp\\."], ATTENTION),
        (["re:self_attn", "re:visual.*", "mlp", "layers.0.self"], ATTENTION | DENSE),
        (["Linear"], set()),
        # What might take forever, and what is no pattern.
        (
            ["re:(.*)*x", "re:" + "(.|.)" * 20, "re:" + ".*" * 20, "re:(", "re:" + "m" * 999],
            {"all"},
        ),
        (["re:[[a]", "re:" + ".?" * 40 + "x"], {"all"}),
    ],
    ids=first_name,
)
def test_a_dry_run_knows_which_matrices_stay_in_bf16(
    folder: Path, kept: list[str], left: set[str]
) -> None:
    left = ATTENTION | DENSE if left == {"all"} else left
    assert expected(folder, quant_method="fp8", modules_to_not_convert=kept) == left
    assert expected(folder, quant_method="fp8", ignored_layers=kept) == left
    assert expected(folder, **compressed(), ignore=kept) == left


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ([["Linear"]], ATTENTION | DENSE),
        ([["re:.*mlp.*"]], DENSE),
        ([["re:.*q_proj"], ["model.layers.0.mlp"]], {"q_proj", *DENSE}),
        ([["Embedding"]], set()),
    ],
    ids=first_name,
)
def test_a_dry_run_knows_which_matrices_are_meant(
    folder: Path, targets: list[list[str]], found: set[str]
) -> None:
    [group] = compressed()["config_groups"].values()
    groups = {str(number): {**group, "targets": own} for number, own in enumerate(targets)}
    assert expected(folder, **{**compressed(), "config_groups": groups}) == found


def compressed(**weights: Any) -> dict[str, Any]:
    values = {"num_bits": 8, "type": "float", "strategy": "channel", **weights}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": values}},
    }


@pytest.mark.parametrize(
    ("quantization", "code", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, Exit.UNSUPPORTED, "already quantised, by 'gptq'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, Exit.UNSUPPORTED, "fmt is 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, Exit.CORRUPT, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, Exit.CORRUPT, "weight_block_size"),
        (compressed(type="int"), Exit.UNSUPPORTED, "8-bit integers as exact targets would need"),
        (
            compressed(num_bits=4),
            Exit.UNSUPPORTED,
            "weights is 4-bit float, of compressed-tensors we read only 8-bit float",
        ),
        (compressed(symmetric=False), Exit.UNSUPPORTED, "symmetric"),
        (compressed(strategy="group"), Exit.UNSUPPORTED, "strategy"),
        (compressed() | {"kv_cache_scheme": {"num_bits": 8}}, Exit.UNSUPPORTED, "kv_cache_scheme"),
        (compressed() | {"config_groups": {}}, Exit.CORRUPT, "config_groups"),
        (compressed() | {"config_groups": {"a": 1}}, Exit.CORRUPT, "config_groups.a is 1"),
        (
            compressed() | {"config_groups": {"a": {"targets": ["Attention"], "weights": None}}},
            Exit.UNSUPPORTED,
            "config_groups.a.weights is null: the group quantises activations alone",
        ),
        (
            compressed() | {"config_groups": {"a": {"weights": 8}}},
            Exit.CORRUPT,
            "config_groups.a.weights is 8",
        ),
    ],
    ids=str,
)
def test_other_quantisations_are_refused_by_name(
    folder: Path, quantization: dict[str, Any], code: Exit, said: str
) -> None:
    change_config(folder, lambda config: config.update(quantization_config=quantization))
    with pytest.raises(SubspecError) as caught:
        read_checkpoint(folder, SOURCE)
    assert caught.value.exit_code == code and said in caught.value.message


def test_a_config_that_says_nothing_of_fp8_weights_is_refused(folder: Path) -> None:
    change_config(folder, lambda config: config.pop("quantization_config"))
    with pytest.raises(SubspecError, match="which says what its scales belong to") as caught:
        read_checkpoint(folder, SOURCE)
    assert caught.value.exit_code == Exit.UNSUPPORTED
