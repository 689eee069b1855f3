"""Exact weights as residuals over the substitutes in memory: the same bits, or an error."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import PROFILE, build_artifact, demo_checkpoint, replan
from safetensors.torch import load_file

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact, open_artifact, verify
from subspec.artifacts.format.tensors import read_header
from subspec.artifacts.model import HEAD, StoredPart, layer_name
from subspec.artifacts.native import residual_cpu
from subspec.artifacts.plan import Constraints, Method, Placement
from subspec.planner.model.hub import DEMO
from subspec.planner.solve.search import PRIOR, search
from subspec.planner.solve.storage import Storage
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.kernels.linear import gemm_ranges
from subspec.runtime.sequence import GenerationParams

PROMPT = [5 + n % 90 for n in range(30)]
METHODS: list[Method] = ["substitute", "plain"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("residuals")
    source = demo_checkpoint(folder / "model", request.param)
    return build_artifact(source, folder / "artifact", "residual", resident_share=0.3)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("bf16") / "artifact"
    return build_artifact(DEMO, out, "residual", resident_share=0.3)


def products(engine: Engine) -> dict[str, torch.Tensor]:
    """Every exact matrix of a pass, read through its product."""
    found = {}
    spec = engine.artifact.spec
    dtype = getattr(torch, spec.dtype)
    for layer, product in enumerate(engine.model.exact):
        for linear in (n for n in spec.linears if n.layer == layer):
            x = torch.eye(linear.in_features, dtype=dtype)
            name = linear.name.removeprefix(f"{layer_name(layer)}.")
            found[linear.name] = product(name, x, gemm_ranges([len(x)])).t()
    return found


def tokens(artifact: Artifact, method: Method = "substitute") -> list[int]:
    with Engine.open(artifact, OpenOptions(method=method)) as engine:
        return answer(engine, 24)


def answer(engine: Engine, count: int) -> list[int]:
    with engine.new_sequence() as sequence:
        rounds = sequence.generate(PROMPT, GenerationParams(count))
        return [token for some in rounds for token in some]


def test_every_product_is_that_of_the_checkpoints_weight(artifact: Artifact) -> None:
    original = load_file(DEMO / "model.safetensors")
    spec = artifact.spec
    dtype = getattr(torch, spec.dtype)
    encodings = {part.encoding for part in artifact.stored_parts()}
    assert encodings == {"residual"}
    placement = artifact.plan.placement("plain")
    assert placement.residuals and placement.num_slots
    with Engine.open(artifact, OpenOptions(method="plain")) as engine, torch.inference_mode():
        for _ in range(2):  # the first pass is checked against the digests, the second is not
            for name, got in products(engine).items():
                bias = original.get(f"{name}.bias")
                known = "model.embed_tokens" if name == HEAD and spec.tie_word_embeddings else name
                expected = original[f"{known}.weight"].to(dtype)
                if bias is not None:
                    expected = expected + bias.to(dtype)[:, None]
                assert torch.equal(got[: len(expected)], expected), name


def test_a_residual_is_smaller_than_the_weights(artifact: Artifact) -> None:
    """Everything counted; small matrices pay for pages and guards."""
    most = {"bfloat16": 7.7, "float16": 10.9, "float32": 23.7}[artifact.spec.dtype]
    for part in artifact.stored_parts():
        if part.part.num_weights >= 1 << 16:
            assert 8 * part.num_bytes / part.part.num_weights < most, part.name


def test_the_plain_twin_decodes_the_same_tokens(
    bf16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = tokens(bf16)
    monkeypatch.setattr(residual_cpu, "unavailable", lambda: "no compiler")
    assert tokens(bf16) == fast


def test_residuals_and_raw_weights_give_the_same_tokens(bf16: Artifact, tmp_path: Path) -> None:
    raw = build_artifact(DEMO, tmp_path / "raw", "raw", resident_share=0.3)
    assert tokens(raw) == tokens(bf16)


def test_a_residual_can_be_decoded_for_good_while_loading(bf16: Artifact) -> None:
    """A plan with memory to spare: no substitute stays for plain decoding."""
    stored = bf16.stored_parts()
    plan, raw_bytes = bf16.plan, sum(part.part.padded_bytes for part in stored)
    ledger = replace(
        plan.placement("plain").ledger,
        resident=raw_bytes, residuals=0, staging=0, substitutes=0, scratch=0,
    )  # fmt: skip
    everything = Placement(tuple(part.name for part in stored), (), 0, 0, ledger)
    placements = {**plan.placements, "plain": everything}
    loaded = replace(bf16, plan=replace(plan, placements=placements))
    assert tokens(loaded, "plain") == tokens(bf16, "plain")


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_that_holds_some_residuals_decoded_says_the_same_in_its_ledgers_bytes(
    bf16: Artifact, method: Method
) -> None:
    """Planned for a decoder that is far slower than the link. What is held decoded is never decoded
    again."""
    stored = Storage(tuple(bf16.stored_parts()))
    constraints = Constraints(context=256, width=2, depth=3, method="substitute", encoding="kept")
    slow, fast = (
        replace(PROFILE, num_threads=1, residual_weights_per_second=rate) for rate in (1e6, 1e12)
    )
    plan, none = (
        search(bf16.spec, p, 11_000_000, constraints, PRIOR, stored) for p in (slow, fast)
    )
    every = set(plan.residuals)
    assert plan.verify_width == none.verify_width and every == set(none.residuals)
    options = OpenOptions(method=method, trace=True)
    with Engine.open(replace(bf16, plan=plan), options) as engine:
        placement = engine.placement
        assert 0 < len(placement.resident) < len(every) and placement.residuals
        got = answer(engine, 24)
        unused = {name: arena.numel() for name, arena in engine.memory._free.items()}
        assert max(unused.values()) == 0, f"the ledger grants more than is used: {unused}"
        assert engine.peak.peak_bytes <= plan.predicted[method].fast_peak_bytes <= 11_000_000
        spans = engine.model.clock.spans
        assert spans is not None
        decoded = {span.name for span in spans if span.lane == "decode"}
        assert decoded == every - set(placement.resident)
    assert none.placement(method).resident == ()
    assert got == tokens(replace(bf16, plan=none), method)


# Corruption


def flip_in_part(folder: Path, at: int) -> None:
    """One bit of a streamed part, `at` bytes from its beginning."""
    part = next(p for p in streamed(open_artifact(folder)) if p.num_bytes > at + 4096)
    offset = open_artifact(folder).part_entries()[part.name].offset
    flip(folder / "exact.safetensors", offset + at)


def streamed(artifact: Artifact) -> list[StoredPart]:
    placement = artifact.plan.placement("plain")
    held = {*placement.resident, *placement.residuals}
    return [part for part in artifact.stored_parts() if part.name not in held]


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def flip_tensor(file: str, name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / f"{file}.safetensors"
        flip(path, read_header(path)[name].offset + 100)

    return change


def flip_held(folder: Path) -> None:
    opened = open_artifact(folder)
    name = opened.plan.placement("plain").residuals[0]
    flip(folder / "exact.safetensors", opened.part_entries()[name].offset + 9)


DAMAGES = {
    "a tile's place": lambda folder: flip_in_part(folder, 8),
    "a residual": lambda folder: flip_in_part(folder, 5000),
    "a residual that stays": flip_held,
    "a code": flip_tensor("substitutes", "model.layers.1.mlp.up_proj.codes"),
    "a scale": flip_tensor("substitutes", "model.layers.2.self_attn.k_proj.qparams"),
    "a norm": flip_tensor("resident", "model.norm.weight"),
    "an embedding": flip_tensor("embedding", "model.embed_tokens.weight"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("method", METHODS)
def test_damage_is_an_error_before_a_token(
    bf16: Artifact, tmp_path: Path, method: Method, damage: Callable[[Path], None]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bf16.path, copy)
    damage(copy)
    emitted = []
    with pytest.raises(SubspecError, match="does not match its digest") as caught:
        with Engine.open(copy, OpenOptions(method=method)) as engine:
            with engine.new_sequence() as sequence:
                emitted += list(sequence.generate(PROMPT, GenerationParams(4)))
    assert caught.value.exit_code == Exit.CORRUPT
    assert not emitted
    with pytest.raises(SubspecError, match="do not match their digest"):
        verify(copy)


def test_a_substitute_is_not_exchanged_under_its_residuals(bf16: Artifact) -> None:
    """The digests of a part and of its substitute belong together."""
    listed = bf16.manifest
    swapped = tuple(
        replace(entry, digest=listed.substitutes[1].digest) if index == 0 else entry
        for index, entry in enumerate(listed.substitutes)
    )
    changed = replace(bf16, manifest=replace(listed, substitutes=swapped))
    with pytest.raises(SubspecError, match="does not match its digest"):
        tokens(changed)


def test_a_plan_may_be_changed_over_the_same_residuals(bf16: Artifact) -> None:
    expected = tokens(replan(bf16, resident_share=0.0, verify_widths=(16,)), "plain")
    for share in (0.5, 1.0):
        changed = replan(bf16, resident_share=share, verify_widths=(16,))
        assert tokens(changed, "plain") == expected
