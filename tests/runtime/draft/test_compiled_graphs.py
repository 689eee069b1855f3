"""A draft pass of compiled pieces against its plain twin; compiled pieces travel with artifacts."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import build_artifact, replan
from running import QUESTION, run
from torch import Tensor
from toy_weights import empty_cache, random_weights, shared_weights
from toys import make_spec

from subspec.artifacts.common.user_cache import find_file, store_file
from subspec.artifacts.footprint import Shape, workspace_bytes
from subspec.artifacts.format.prebuilt import pack_prebuilt
from subspec.artifacts.format.store import Artifact, open_artifact, write_json, write_manifest
from subspec.artifacts.model import (
    Attention,
    Block,
    Dense,
    LayerSpec,
    ModelSpec,
    NormStyle,
    QueryGrowth,
    Rope,
)
from subspec.artifacts.plan import Tree
from subspec.planner.machine import compile_graphs
from subspec.planner.model.hub import DEMO
from subspec.runtime.draft import compiled_graphs, compiled_layers
from subspec.runtime.draft.compiled_graphs import CompiledGraphs, Graph, graphs_over
from subspec.runtime.draft.drafter import DecodeState, SubstituteDrafter
from subspec.runtime.draft.graph_pieces import (
    Gated,
    Heads,
    Join,
    Piece,
    example_of,
    module_of,
    pieces_of,
    program,
)
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.engine import Engine
from subspec.runtime.exact_pass import causal_rows
from subspec.runtime.kernels.linear import gemm_ranges
from subspec.runtime.load import biases_of
from subspec.runtime.memory import Temporaries
from subspec.runtime.model.attention import attend
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.transformer import Rows, forward

SLOTS = 128
LATE = NormStyle(1e-6, rounds_late=True, zero_centered=True)
ROPE = Rope(10_000.0, 32)
PLAIN = Attention(4, 2, 32, scale=0.2, rope=ROPE)
MLP = Dense(192)


def layer(attention: Attention, dense: Dense = MLP, scalar: str | None = None) -> LayerSpec:
    blocks = (Block(attention, "input_layernorm"), Block(dense, "post_attention_layernorm"))
    return LayerSpec(blocks, scalar)


def sandwich(attention: Attention, scalar: str | None = None) -> LayerSpec:
    gelu = Dense(192, activation="gelu_tanh")
    return LayerSpec((Block(attention, "a", "b"), Block(gelu, "c", "d")), scalar)


def spec_of(*layers: LayerSpec, norm: NormStyle | None = None, in_f32: bool = False) -> ModelSpec:
    norm = norm or NormStyle(1e-5)
    small = make_spec(hidden_size=128, vocab_size=512, norm=norm, rope_in_f32=in_f32)
    return replace(small, layers=layers, dtype="float32")


NORMED = replace(PLAIN, qk_norm="head")
SPECS = {
    "as llama": spec_of(layer(PLAIN), layer(PLAIN)),
    "sandwich norms, gelu, windows of another rope, as gemma 3": spec_of(
        sandwich(replace(NORMED, window=9, rope=Rope(500.0, 32))), sandwich(NORMED), norm=LATE
    ),
    "values are keys, other heads, scalars, as gemma 4": spec_of(
        sandwich(replace(NORMED, value_norm=True), "layer_scalar"),
        sandwich(
            Attention(
                *(4, 1, 64, 1.0, Rope(1e4, 64)),
                **{"qk_norm": "head", "value_norm": True, "values_are_keys": True},  # type: ignore[arg-type]
            ),
            "layer_scalar",
        ),
        norm=NormStyle(1e-6, rounds_late=True),
    ),
    "norms behind blocks and over all heads, as olmo 2": spec_of(
        *[
            LayerSpec(
                (
                    Block(replace(PLAIN, qk_norm="all_heads", qkv_bias=True), None, "a"),
                    Block(MLP, None, "b"),
                )
            )
        ]
        * 2,
        norm=NormStyle(1e-6, rounds_late=True),
    ),
    "half a head turns in pairs, as glm 4": spec_of(
        sandwich(replace(PLAIN, rope=Rope(1e4, 16, interleaved=True))), in_f32=True
    ),
    "multipliers, as granite": spec_of(
        LayerSpec((Block(PLAIN, "a", multiplier=0.3), Block(MLP, "b", multiplier=0.3)))
    ),
    "queries grow, as ministral 3": spec_of(
        layer(replace(PLAIN, query_growth=QueryGrowth(0.1, 8))), layer(PLAIN)
    ),
    "layers without positions, as smollm 3": spec_of(
        layer(PLAIN), layer(replace(PLAIN, rope=None)), layer(PLAIN)
    ),
}


def eagerly(piece: Piece) -> Graph:
    module, num_rows = module_of(piece), len(example_of(piece)[0])
    return lambda given: module(given[:num_rows], given[num_rows:])


def model_of(
    spec: ModelSpec, graph_of: Callable[[Piece], Graph] = eagerly
) -> tuple[CompiledGraphs, Callable[[Sequence[Rows]], Tensor]]:
    """A random model's draft by pieces, and its plain twin."""
    toy = random_weights(spec)
    weights = shared_weights(toy, SLOTS)
    matrices = Substitutes(spec.num_layers, toy.matrices, biases_of(spec, toy.tensors))
    graphs = graphs_over(weights, matrices, {piece: graph_of(piece) for piece in pieces_of(spec)})

    def twin(batch: Sequence[Rows]) -> Tensor:
        num_rows = sum(len(rows.tokens) for rows in batch)
        return forward(weights, matrices, batch, gemm_ranges([num_rows]))

    return graphs, twin


def filled_cache(spec: ModelSpec, num_tokens: int) -> Cache:
    cache = empty_cache(spec, SLOTS)
    torch.manual_seed(num_tokens)
    for kept in (*cache.keys, *cache.values):
        kept.normal_()
    cache.commit([0] * num_tokens)
    return cache


def rows_behind(cache: Cache, num_rows: int) -> Rows:
    return causal_rows(cache, torch.arange(7, 7 + num_rows), attend)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_pieces_and_the_plain_twin_compute_the_same(spec: ModelSpec) -> None:
    graphs, twin = model_of(spec)
    mine, others = ([filled_cache(spec, 20), filled_cache(spec, 41)] for _ in range(2))
    with torch.inference_mode():
        got = compiled_graphs.forward(
            graphs, [rows_behind(c, n) for c, n in zip(mine, (1, 4), strict=True)]
        )
        expected = twin([rows_behind(c, n) for c, n in zip(others, (1, 4), strict=True)])
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
    for one, other in zip(mine, others, strict=True):
        for pair in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
            torch.testing.assert_close(*pair, rtol=2e-4, atol=2e-4)


def test_layers_of_one_form_share_their_pieces() -> None:
    kinds = {name: [piece.kind for piece in pieces_of(spec)] for name, spec in SPECS.items()}
    assert kinds["as llama"] == ["heads", "join", "gated"]
    assert sorted(kinds["layers without positions, as smollm 3"]) == ["gated", "heads", "join"]
    other_heads = kinds["values are keys, other heads, scalars, as gemma 4"]
    assert sorted(other_heads) == ["gated", "heads", "heads", "join", "join"]


def test_windows_biases_and_thetas_are_no_other_piece() -> None:
    other = replace(PLAIN, window=7, scale=1.0, rope=Rope(99.0, 32), qkv_bias=True, name="other")
    assert pieces_of(spec_of(layer(PLAIN))) == pieces_of(spec_of(layer(other)))


@pytest.mark.parametrize("what", ["torch", "processor", "size"])
def test_a_program_has_another_name_for(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = Gated(192, "silu")
    before = program(piece)
    assert before == program(Gated(192, "silu")) and before.startswith("graphs/gated-")
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    if what == "processor":
        monkeypatch.setattr("subspec.artifacts.native.cpp.processor", lambda: "another")
    assert program(piece if what != "size" else Gated(256, "silu")) != before


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_the_temporaries_of_a_whole_draft_are_within_the_workspace(
    spec: ModelSpec, num_sequences: int
) -> None:
    """Operation by operation, a piece holds at least what it does compiled: intermediate results
    that inductor fuses away."""
    spec, width = replace(spec, dtype="bfloat16"), 24
    graphs, _ = model_of(spec)
    drafter = SubstituteDrafter((Tree(4, 5),), width, graphs.weights, graphs.substitutes, graphs)
    states = [DecodeState(filled_cache(spec, 80 + n), n, 50) for n in range(num_sequences)]
    with Temporaries() as seen, torch.inference_mode():
        drafter.draft(states)
    shape = Shape(SLOTS - width - 1, num_sequences, width, 4, 8, 1, 8)
    assert seen.peak_bytes <= workspace_bytes(spec, "cpu", shape)


# ---- compiled -----------------------------------------------------------------------------------

RUN_ONE = """
import sys, torch
from subspec.runtime.draft.compiled_graphs import load_graph
from pathlib import Path
graph = load_graph(Path(sys.argv[1]))
x = torch.linspace(-3, 3, 5 * 192).bfloat16().view(5, 192)
[got] = graph([x, x])
expected = torch.nn.functional.silu(x.float()) * x.float()
torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.02)
assert "torch._inductor" not in sys.modules and "torch._dynamo" not in sys.modules
"""


def has_compiler() -> bool:
    return compiled_layers.unavailable() is None


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no g++")
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_run_needs_no_compiler_and_none_of_torchs(tmp_path: Path) -> None:
    package = tmp_path / "gated.pt2"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    compile_graphs.compile_piece(Gated(192, "silu"), package, scratch)
    nothing = {**os.environ, "PATH": "", "CXX": "no-such-compiler"}
    command = [sys.executable, "-c", RUN_ONE, str(package)]
    ended = subprocess.run(command, env=nothing, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no g++")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_compiled_pieces_are_as_near_as_bf16_is(
    spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_graphs.compile_graphs(spec) is None
    torch.manual_seed(0)
    for piece in pieces_of(spec):
        path = find_file(program(piece))
        graph = compiled_graphs.load_graph(path) if path else None
        assert graph is not None
        for num_rows in (1, 2, 3, 16, 33):
            rows, weights = example_of(piece)
            rows = [torch.randn(num_rows, *one.shape[1:]).to(one.dtype) for one in rows]
            rows = [one if one.is_floating_point() else 100 * one.abs() for one in rows]
            weights = [torch.randn(one.shape).to(one.dtype) for one in weights]
            mine, plain = ([one.clone() for one in rows] for _ in range(2))
            wide = [one.float() if one.is_floating_point() else one for one in plain]
            got = [*graph([*mine, *weights]), *mine]
            expected = [*module_of(piece)(wide, [one.float() for one in weights]), *wide]
            for one, other in zip(got, expected, strict=True):
                assert (one.float() - other.float()).norm() <= 0.01 * other.float().norm() + 1e-6


def test_without_a_compiler_planning_is_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = compile_graphs.compile_graphs(spec_of(layer(PLAIN)))
    assert said is not None and said.startswith("torch could not compile: ")
    assert not [*(tmp_path / "subspec" / "graphs").iterdir()], "nothing is left behind"


def test_a_compilation_that_takes_too_long_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(command: Sequence[str], *rest: object) -> None:
        *_, cache, scratch = map(Path, command)
        assert scratch.stat().st_dev == cache.stat().st_dev, "a rename would not do"
        (scratch / "unfinished.pt2").write_bytes(b"half")
        raise subprocess.TimeoutExpired(command, 600.0)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compile_graphs, "run_child", killed)
    said = compile_graphs.compile_graphs(spec_of(layer(PLAIN)))
    assert said == "torch could not compile: it took longer than 600 seconds"
    assert not [*(tmp_path / "subspec" / "graphs").iterdir()]


# ---- in an artifact -----------------------------------------------------------------------------


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """The demo model, whose plan has graphs: files that stand for them, in an otherwise empty
    cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = build_artifact(DEMO, tmp_path / "artifact")
    for piece in pieces_of(made.spec):
        assert store_file(program(piece), piece.kind.encode())
    pack_prebuilt(made.path, map(program, pieces_of(made.spec)))
    write_json(made.path, "plan.json", replace(made.plan, draft_graphs=True))
    listed = made.manifest
    write_manifest(made.path, listed.producer, listed.parts, listed.substitutes, {})
    monkeypatch.setattr(compiled_graphs, "load_graph", stands_for(made.spec))
    return open_artifact(made.path)


def stands_for(spec: ModelSpec) -> Callable[[Path], Graph]:
    named = {program(piece).partition("/")[2]: piece for piece in pieces_of(spec)}
    return lambda path: eagerly(named[path.name])


def test_a_plan_with_graphs_drafts_with_them(artifact: Artifact) -> None:
    with Engine.open(artifact) as engine:
        drafter = engine.model.drafter
        assert isinstance(drafter, SubstituteDrafter)
        assert isinstance(drafter.compiled, CompiledGraphs) and engine.slow_draft_reason is None
    plain = replan(artifact)
    assert not plain.plan.draft_graphs
    with Engine.open(plain) as engine:
        drafter = engine.model.drafter
        assert isinstance(drafter, SubstituteDrafter) and drafter.compiled is None


def test_graphs_change_no_token(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    words = (QUESTION, "--max-tokens", 24, "--no-replan", "--no-record")
    drafted = run(capsys, artifact.path, *words)
    plainly = run(capsys, artifact.path, *words, "--no-speculation")
    assert drafted.exit_code == plainly.exit_code == 0
    assert drafted.out == plainly.out


def test_elsewhere_they_are_loaded_only_if_the_user_trusts_them(
    artifact: Artifact,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    words = (artifact.path, QUESTION, "--max-tokens", 4, "--no-replan", "--no-record")
    ended = run(capsys, *words)
    assert "--trust-kernels would load the artifact's compiled graphs" in ended.err
    graphs = tmp_path / "elsewhere" / "subspec" / "graphs"
    assert not graphs.exists() or not [*graphs.iterdir()], "nothing is kept unasked"
    trusted = run(capsys, *words, "--trust-kernels")
    assert "compiled graphs" not in trusted.err and trusted.out == ended.out
    assert len([*graphs.iterdir()]) == len(pieces_of(artifact.spec))


def test_graphs_of_another_torch_are_passed_over_with_a_line(
    artifact: Artifact, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subspec.artifacts.native.cpp.processor", lambda: "another")
    ended = run(
        capsys, artifact.path, QUESTION, "--max-tokens", 4, "--no-replan", "--no-record",
        "--trust-kernels",
    )  # fmt: skip
    assert ended.exit_code == 0
    assert "its compiled graphs are of another torch or processor" in ended.err


def test_every_kind_of_piece_is_named_after_itself() -> None:
    assert {piece.kind for piece in pieces_of(SPECS["as llama"])} == {
        kind.kind for kind in (Join, Heads, Gated)
    }
