"""The head for multi-token prediction of qwen3_5: from a checkpoint through the artifact, and what
it computes against the definition, written out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import build_artifact, converted, replan
from heads import defined, mtp_checkpoint, random_head
from running import answer
from safetensors.torch import load_file, save_file
from scripts import benchmark

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.checks import HEAD_FILE
from subspec.artifacts.format.store import Artifact, open_artifact, verify
from subspec.artifacts.model import DraftHead, Source
from subspec.planner.model.checkpoint import read_checkpoint
from subspec.planner.model.draft_head import without_first_norm
from subspec.planner.model.hub import DEMO
from subspec.runtime.draft.draft_head import make_head, next_hidden
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.exact_pass import causal_rows
from subspec.runtime.model.attention import attend
from subspec.runtime.model.cache import make_cache
from subspec.runtime.model.transformer import make_shared, make_tables

to_fp8 = benchmark("to_fp8")
SLOTS = 64
MTP = OpenOptions(drafter="mtp")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mtp_checkpoint(tmp_path_factory.mktemp("mtp"), torch.float32)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_artifact(
        checkpoint, tmp_path_factory.mktemp("built") / "artifact", drafts_with_head=True
    )


def test_the_artifact_has_every_bit_of_the_head(checkpoint: Path, artifact: Artifact) -> None:
    stored, spec = load_file(checkpoint / "model.safetensors"), artifact.spec
    assert spec.draft_head is not None and spec.draft_head.layer in spec.layers
    assert len(spec.draft_head_shapes) == 15
    found = load_file(artifact.path / HEAD_FILE)
    assert found.keys() == spec.draft_head_shapes.keys()
    assert all(torch.equal(tensor, stored[f"mtp.{name}"]) for name, tensor in found.items())
    assert verify(artifact.path) > sum(tensor.nbytes for tensor in found.values())


def test_a_damaged_head_is_noticed_before_it_is_used(checkpoint: Path, tmp_path: Path) -> None:
    artifact = build_artifact(checkpoint, tmp_path / "artifact", drafts_with_head=True)
    path = artifact.path / HEAD_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for reads in (lambda: Engine.open(artifact, MTP), lambda: verify(artifact.path)):
        with pytest.raises(SubspecError, match=r"draft_head\.safetensors") as raised:
            reads()
        assert raised.value.exit_code == Exit.CORRUPT
    path.unlink()
    with pytest.raises(SubspecError, match=r"draft_head\.safetensors"):
        open_artifact(artifact.path)


def test_a_head_that_is_not_there_or_in_another_dtype_is_set_aside(
    checkpoint: Path, tmp_path: Path
) -> None:
    whole = read_checkpoint(checkpoint, Source("org/toy"))
    assert whole.spec.draft_head is not None and not whole.notes
    folder = converted(checkpoint, tmp_path / "copy", torch.float32)
    tensors = load_file(folder / "model.safetensors")
    others = {n: t.bfloat16() if n.startswith("mtp.") else t for n, t in tensors.items()}
    save_file(others, folder / "model.safetensors")
    read = read_checkpoint(folder, Source("org/toy"))
    assert read.spec.draft_head is None and "15 tensors of mtp" in read.notes[0]
    assert "set aside: mtp." in read.notes[1] and "is BF16, the model is float32" in read.notes[1]
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    save_file(rest, folder / "model.safetensors")
    read = read_checkpoint(folder, Source("org/toy"))
    assert read.spec.draft_head is None and not read.notes


@pytest.mark.parametrize("missing", ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"])
def test_a_head_that_is_not_whole_is_set_aside_with_a_note(
    checkpoint: Path, tmp_path: Path, missing: str
) -> None:
    folder = converted(checkpoint, tmp_path / "copy", torch.float32)
    tensors = load_file(folder / "model.safetensors")
    del tensors[missing]
    save_file(tensors, folder / "model.safetensors")
    read = read_checkpoint(folder, Source("org/toy"))
    assert read.spec.draft_head is None and not any("draft_head" in name for name in read.rows)
    aside, why = read.notes
    assert "14 tensors of mtp" in aside
    assert f"draft head is set aside: the checkpoint has no {missing}, expected" in why


@pytest.fixture(scope="module")
def fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The head's seven projections in FP8, as Qwen3.5-27B-FP8 has them."""
    folder = tmp_path_factory.mktemp("fp8")
    source = mtp_checkpoint(folder, torch.bfloat16, foreseen=True)
    to_fp8.convert(source, folder / "fp8")
    return folder / "fp8"


def test_a_head_in_fp8_is_multiplied_out_when_the_artifact_is_built(
    fp8_checkpoint: Path, tmp_path: Path
) -> None:
    stored = load_file(fp8_checkpoint / "model.safetensors")
    in_fp8 = [n for n, x in stored.items() if "mtp" in n and x.dtype == torch.float8_e4m3fn]
    assert len(in_fp8) == 7
    assert not read_checkpoint(fp8_checkpoint, Source("org/toy")).notes
    artifact = build_artifact(fp8_checkpoint, tmp_path / "artifact", drafts_with_head=True)
    assert artifact.spec.draft_head is not None and artifact.spec.fp8
    found = load_file(artifact.path / HEAD_FILE)
    assert len(found) == 15 and all(one.dtype == torch.bfloat16 for one in found.values())
    for name, one in found.items():
        expected = stored[f"mtp.{name}"]
        if expected.dtype == torch.float8_e4m3fn:
            scales = stored[f"mtp.{name}_scale_inv"].repeat_interleave(128, 0)
            whole = scales.repeat_interleave(128, 1)[: one.shape[0], : one.shape[1]]
            expected = (expected.float() * whole).bfloat16()
        assert torch.equal(one, expected), name
    prompt = torch.arange(3, 19).tolist()
    answers = []
    for options in (MTP, OpenOptions("plain")):
        with Engine.open(artifact, options) as engine:
            answers.append(answer(engine, prompt, 16))
    assert answers[0] == answers[1]


def test_a_head_in_fp8_without_its_scales_is_set_aside_and_the_model_is_read(
    fp8_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(fp8_checkpoint, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    del tensors["mtp.layers.0.self_attn.q_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    read = read_checkpoint(folder, Source("org/toy"))
    assert read.spec.draft_head is None and read.spec.fp8
    assert "mtp.layers.0.self_attn.q_proj.weight is F8_E4M3 with no scales" in read.notes[1]


def test_another_head_takes_the_place_of_one_in_fp8(fp8_checkpoint: Path, tmp_path: Path) -> None:
    """Its weights, which have the same names, are not multiplied by that one's scales."""
    read = read_checkpoint(fp8_checkpoint, Source("org/toy"))
    assert read.spec.draft_head is not None
    assert sum(name.startswith("draft_head.") for name in read.scales) == 7
    layer = without_first_norm(read.spec.draft_head.layer)
    given = random_head(replace(read.spec, draft_head=DraftHead("eagle", layer, read.spec.norm)))
    head = tmp_path / "head"
    head.mkdir()
    save_file(given, head / "model.safetensors")
    said = json.loads((fp8_checkpoint / "config.json").read_text())
    said |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    (head / "config.json").write_text(json.dumps(said))
    artifact = build_artifact(fp8_checkpoint, tmp_path / "artifact", draft_head=head)
    found = load_file(artifact.path / HEAD_FILE)
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], one.bfloat16()) for name, one in given.items())


def test_a_head_of_another_shape_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = converted(checkpoint, tmp_path / "copy", torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SubspecError, match=r"mtp\.fc\.weight has the shape"):
        read_checkpoint(folder, Source("org/toy"))


# ---- against the definition ---------------------------------------------------------------------


def test_it_computes_what_the_definition_says_in_any_number_of_pieces(artifact: Artifact) -> None:
    spec = artifact.spec
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(spec.vocab_size, spec.hidden_size, generator=generator)
    small = {name: torch.ones(shape) for name, shape in spec.resident_shapes.items()}
    tables = make_tables(spec, SLOTS, torch.float32, torch.clone)
    shared = make_shared(spec, table.__getitem__, small, tables, torch.float32, torch.clone)
    head = make_head(shared, load_file(artifact.path / HEAD_FILE))
    tokens = torch.randint(spec.vocab_size, (9,), generator=generator)
    hidden = torch.randn(9, spec.hidden_size, generator=generator)
    expected = defined(spec, load_file(artifact.path / HEAD_FILE), table[tokens], hidden)
    for sizes in ([9], [4, 1, 4]):
        cache = make_cache(head.decoder.spec, SLOTS, lambda shape, dtype: torch.zeros(shape))
        found = []
        for some, h in zip(tokens.split(sizes), hidden.split(sizes), strict=True):
            found.append(next_hidden(head, [causal_rows(cache, some, attend)], h))
            cache.commit(some.tolist())
        torch.testing.assert_close(torch.cat(found).double(), expected, rtol=1e-4, atol=1e-4)


def test_without_a_head_of_its_kind_or_memory_for_it_a_drafter_is_refused(
    artifact: Artifact, tmp_path: Path
) -> None:
    demo = build_artifact(DEMO, tmp_path / "demo")
    for some, drafter, said in (
        (replan(artifact), "mtp", "no memory for the drafter 'mtp'"),
        (artifact, "eagle", "this artifact has one for 'mtp'"),
        (demo, "mtp", "this artifact has none"),
    ):
        with pytest.raises(SubspecError, match=said):
            Engine.open(some, OpenOptions(drafter=drafter))  # type: ignore[arg-type]
