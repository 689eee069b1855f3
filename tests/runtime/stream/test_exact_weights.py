"""The exact weights of a pass: right whatever the delays; failures are never skipped."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import build_artifact, replan
from streaming import StrictLink
from torch import Tensor
from toy_weights import exact_weights, random_weights
from toys import make_spec

from subspec.artifacts import model as model_module
from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Block, Ledger, Placement, make_blocks
from subspec.planner.model.hub import DEMO
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.kernels.linear import gemm_ranges
from subspec.runtime.load import ArtifactWeights
from subspec.runtime.memory import host_buffer
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.stream.exact_weights import ExactWeights
from subspec.runtime.stream.link import DiskLink
from subspec.runtime.stream.ring import Ring

PLAIN = OpenOptions(method="plain")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_artifact(DEMO, tmp_path_factory.mktemp("stream") / "artifact")


def answer(engine: Engine, prompt: list[int], count: int) -> list[int]:
    with engine.new_sequence() as sequence:
        rounds = sequence.generate(prompt, GenerationParams(count))
        return [token for some in rounds for token in some]


def short_name(linear: model_module.Linear) -> str:
    """As its layer's product is asked for it."""
    return linear.name.removeprefix(f"{model_module.layer_name(linear.layer)}.")


# ---- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part_rows", [64, 128, 10_000])
@pytest.mark.parametrize("bias", [False, True])
def test_a_matrix_in_parts_has_the_product_of_the_whole_one(
    part_rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last part is smaller than the others; with a gate as well as without, and with a bias."""
    monkeypatch.setattr(model_module, "PART_BYTES", part_rows * 64 * 4)
    spec = make_spec(
        num_layers=2,
        head_size=16,
        intermediate_size=336,
        hidden_size=64,
        dtype="float32",
        mlp_bias=bias,
    )
    toy = random_weights(spec)
    pieces = [part for part in spec.parts if part.linear.name == "model.layers.1.mlp.up_proj"]
    assert len(pieces) == {64: 6, 128: 3, 10_000: 1}[part_rows]
    _, layer, _ = exact_weights(toy)
    x, gate = (torch.randn(7, n, generator=torch.Generator().manual_seed(n)) for n in (64, 336))
    expected = x @ toy.matrices["model.layers.1.mlp.up_proj"].t()
    if bias:
        expected += toy.tensors["model.layers.1.mlp.up_proj.bias"]
    torch.testing.assert_close(layer("mlp.up_proj", x, gemm_ranges([len(x)])), expected)
    gated = layer("mlp.up_proj", x, gemm_ranges([len(x)]), gate.clone())
    torch.testing.assert_close(gated, gate * expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("intermediate_size", [320, 40])
def test_the_rows_of_several_sequences_have_the_bits_of_separate_products(
    dtype: str, intermediate_size: int
) -> None:
    """Also of a matrix that has no substitute."""
    spec = make_spec(
        num_layers=1, head_size=16, intermediate_size=intermediate_size, hidden_size=64,
        dtype=dtype, mlp_bias=True,
    )  # fmt: skip
    layer, head = exact_weights(random_weights(spec))
    x, gate = (
        torch.randn(24, n, generator=torch.Generator().manual_seed(n)).to(getattr(torch, dtype))
        for n in (64, intermediate_size)
    )
    for product, name, gated in (
        (layer, "mlp.gate_proj", False),
        (layer, "mlp.up_proj", True),
        (head, "lm_head", False),
    ):
        together = product(name, x, gemm_ranges([8] * 3), gate.clone() if gated else None)
        for some in (slice(0, 8), slice(8, 16), slice(16, 24)):
            alone = product(name, x[some], gemm_ranges([8]), gate[some].clone() if gated else None)
            assert torch.equal(together[some], alone), name


def test_a_gate_without_a_bias_is_multiplied_in_its_place() -> None:
    layer, _ = exact_weights(random_weights(make_spec(num_layers=1, dtype="float32")))
    gate = torch.ones(3, 512)
    assert layer("mlp.up_proj", torch.ones(3, 256), gemm_ranges([3]), gate) is gate


# ---- an artifact's weights ----------------------------------------------------------------------


@pytest.mark.parametrize("copy_delay, compute_delay", [(0.0, 0.0), (0.003, 0.0), (0.0, 0.003)])
@pytest.mark.parametrize("num_slots", [2, 3])
def test_every_pass_sees_the_checkpoints_weights(
    artifact: Artifact, copy_delay: float, compute_delay: float, num_slots: int
) -> None:
    from safetensors.torch import load_file

    spec, checkpoint = artifact.spec, load_file(DEMO / "model.safetensors")
    stored = artifact.stored_parts()
    resident = tuple(part.name for part in stored[5:9])
    block_bytes = max(500_000, *(part.padded_bytes for part in stored))
    blocks = make_blocks(stored, Placement(resident, (), block_bytes, num_slots, Ledger()))
    where = artifact.part_entries()
    slots = [host_buffer(block_bytes // 4096 * 4096 + 4096) for _ in range(num_slots)]
    link = StrictLink(DiskLink(artifact.path / "exact.safetensors", slots, None), slots, copy_delay)
    offsets = [where[block.parts[0].name].offset for block in blocks]
    ring = Ring(blocks, offsets, link, num_slots, torch.bfloat16)
    kept = {name: checkpoint[f"{name}.weight"] for name in resident}
    weights = ExactWeights(spec, stored, {}, kept, {}, ring)
    for _ in range(3):
        for layer, product in enumerate(weights):
            for linear in (n for n in spec.linears if n.layer == layer):
                x = torch.eye(linear.in_features, dtype=torch.bfloat16)
                time.sleep(compute_delay)
                is_head = linear.name == model_module.HEAD
                name = (
                    model_module.EMBEDDING if is_head and spec.tie_word_embeddings else linear.name
                )
                expected = checkpoint[f"{name}.weight"].t()
                got = product(short_name(linear), x, gemm_ranges([len(x)]))
                assert torch.equal(got[:, : expected.shape[1]], expected), linear.name
                assert not got[:, expected.shape[1] :].any(), "a head is padded with zeros"
    ring.close()


def test_an_answer_after_a_pass_that_was_cut_short_is_the_same(artifact: Artifact) -> None:
    prompt = list(range(5, 45))
    with Engine.open(replan(artifact, resident_share=0.3), PLAIN) as engine:
        expected = answer(engine, prompt, 12)
        for num_layers in range(1, 4):
            for layer, product in enumerate(engine.model.exact):
                for linear in (n for n in artifact.spec.linears if n.layer == layer):
                    x = torch.zeros(1, linear.in_features).bfloat16()
                    product(short_name(linear), x, gemm_ranges([1]))
                if layer == num_layers:
                    break
            assert answer(engine, prompt, 12) == expected


def test_a_file_that_shrinks_while_it_streams_is_an_error_not_a_wrong_weight(
    artifact: Artifact, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact.path, copy)
    changed = replan(replace(artifact, path=copy), resident_share=0.0)
    with Engine.open(changed, PLAIN) as engine, engine.new_sequence() as sequence:
        tokens = sequence.generate([5] * 20, GenerationParams(50))
        next(tokens)
        with open(copy / "exact.safetensors", "r+b") as file:
            file.truncate(1 << 20)
        with pytest.raises(SubspecError, match="exact.safetensors ends at byte"):
            list(tokens)
        with pytest.raises(SubspecError, match="exact.safetensors ends at byte"):
            list(sequence.generate([6] * 20, GenerationParams(2)))


def test_the_last_block_of_a_pass_is_checked_before_the_pass_has_ended(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So no token depends on bytes that were not compared."""
    asked = list[str]()
    begin = ArtifactWeights._check_block

    def note(files: ArtifactWeights, block: Block, memory: Tensor) -> Callable[[], None]:
        wait = begin(files, block, memory)

        def noted() -> None:
            wait()
            asked.append(block.parts[-1].name)

        return noted

    monkeypatch.setattr(ArtifactWeights, "_check_block", note)
    with Engine.open(replan(artifact, resident_share=0.0), PLAIN) as engine:
        with engine.new_sequence() as sequence:
            next(sequence.generate([5] * 20, GenerationParams(3)))
            assert asked[-1] == artifact.stored_parts()[-1].name


def test_a_slower_link_is_slower_by_the_bytes_it_moves(artifact: Artifact) -> None:
    """Not a timing of ours: the throttle is a lower bound on the time of a pass."""
    changed = replan(artifact, resident_share=0.0)
    with Engine.open(changed, replace(PLAIN, link_bandwidth=100e6)) as engine:
        started = time.perf_counter()
        answer(engine, [5] * 20, 3)
        moved = 3 * sum(part.padded_bytes for part in artifact.spec.parts)
        assert time.perf_counter() - started >= 0.9 * moved / 100e6
