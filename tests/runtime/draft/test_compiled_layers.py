"""A draft pass in one call, against its plain twin and against exact arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from builders import build_artifact, demo_checkpoint, replan
from instruction_sets import Build, built
from torch import Tensor
from toys import make_spec

from subspec.artifacts.format.packing import dequantize, unpack_nibbles
from subspec.artifacts.model import Kind, ModelSpec, Rope, linears, resident_tensors
from subspec.artifacts.native import cpp
from subspec.planner.build.quantize import quantize
from subspec.planner.model.hub import DEMO
from subspec.planner.solve.costs import compiled_draft_bytes
from subspec.runtime.decode import causal_rows, draft_pass, prefill
from subspec.runtime.draft import compiled_layers
from subspec.runtime.draft.beam import grow, root_only
from subspec.runtime.draft.compiled_layers import (
    DraftLayers,
    compile_layers,
    run_layers,
    scratch_bytes,
)
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.kernels import int4
from subspec.runtime.kernels.linear import Int4Weight, pack, packed_bytes
from subspec.runtime.memory import Temporaries
from subspec.runtime.model.attention import attend
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.sampling import Sampling
from subspec.runtime.model.transformer import Decoder, Rows, forward, make_decoder
from subspec.runtime.session import Session

BF16, F32 = torch.bfloat16, torch.float32
BUILDS = {
    "native": Build((), ""),
    "avx-vnni": Build(("-march=haswell", "-mavxvnni"), "avx_vnni"),
    "avx2": Build(("-march=haswell",), "avx2"),
    "sse2": Build(("-march=x86-64",), "sse2"),
}
YARN = Rope(10_000.0, "yarn", factor=4.0, original_max_positions=64, attention_factor=1.1)
LLAMA3 = Rope(
    5000.0, "llama3", factor=8.0, original_max_positions=64, low_frequency_factor=1.0,
    high_frequency_factor=4.0,
)  # fmt: skip
SPECS = {
    "qwen2, 7 heads to 1, tied": make_spec(
        num_layers=3, hidden_size=448, num_heads=7, num_kv_heads=1, tied_head=True
    ),
    "qwen2, windows on the upper layers": make_spec(
        num_layers=3, hidden_size=128, head_size=32, sliding_window=24, windowed_layers=(1, 2)
    ),
    "qwen3, head size 48": make_spec(
        family="qwen3", num_layers=3, hidden_size=128, head_size=48, qk_norm=True,
        output_bias=True,
    ),
    "llama 3 rope, every bias, 12 heads of 16": make_spec(
        family="llama", num_layers=3, num_heads=12, num_kv_heads=3, head_size=16, rope=LLAMA3,
        output_bias=True, mlp_bias=True,
    ),
    "llama, yarn rope, heads of 24": make_spec(
        family="llama", num_layers=3, num_heads=8, num_kv_heads=2, head_size=24, rope=YARN,
        qkv_bias=False,
    ),
    "mistral, a sliding window, heads of 128": make_spec(
        family="mistral", num_layers=2, num_kv_heads=4, head_size=128, sliding_window=20,
        windowed_layers=(0, 1), qkv_bias=False,
    ),
}  # fmt: skip
SLOTS = 192
PASSES = [(1, 0), (1, 40), (3, 100), (4, 128), (8, 70), (9, 1), (16, 150)]  # rows, tokens before


@pytest.fixture(scope="module", params=BUILDS)
def build(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """The layers as they are, and as built for other instruction sets."""
    with built(BUILDS[request.param], tmp_path_factory.mktemp("cache")):
        assert compiled_layers.unavailable() is None and int4.unavailable() is None
        yield


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """One, unless a test says otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Toy:
    """A random model, and the same one in f32 with the weights that its substitutes stand for."""

    decoder: Decoder
    substitutes: Substitutes
    exact_decoder: Decoder
    exact: Substitutes
    keys_values: Tensor

    def logits(self, rows: Rows, cache: Cache | None = None) -> Tensor:
        """By the compiled layers: f32 [T, V]."""
        cache = cache or Cache(self.keys_values.clone())
        layers = compile_layers(self.decoder, self.substitutes, cache)
        assert layers is not None
        return compiled_layers.forward(layers, rows, cache).float()

    def twin_logits(self, rows: Rows, cache: Cache | None = None) -> Tensor:
        cache = cache or Cache(self.keys_values.clone())
        return forward(self.decoder, self.substitutes, rows, cache, attend).float()

    def exact_logits(self, rows: Rows) -> Tensor:
        cache = Cache(self.keys_values.float())
        return forward(self.exact_decoder, self.exact, rows, cache, attend)


def make_toy(spec: ModelSpec) -> Toy:
    generator = torch.Generator().manual_seed(spec.hidden_size + spec.head_size)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    small = {}
    for name, shape in resident_tensors(spec).items():
        zero_point, size = (1.0, 0.2) if "norm" in name else (0.0, 0.2 if "bias" in name else 1.0)
        small[name] = (zero_point + size * noise(*shape)).to(BF16)
    weights: dict[tuple[int, Kind], Int4Weight | Tensor] = {}
    exact: dict[tuple[int, Kind], Int4Weight | Tensor] = {}
    biases: dict[tuple[int, Kind], Tensor] = {}
    for linear in linears(spec):
        key, shape = (linear.layer, linear.kind), (linear.out_features, linear.in_features)
        made = quantize((noise(*shape) * 1.5 * shape[1] ** -0.5).to(BF16), "cpu")
        room = [torch.empty(count, dtype=torch.uint8) for count in packed_bytes(*shape, "w4a8")]
        weights[key] = pack(made.codes, made.qparams, "w4a8", *room)
        exact[key] = dequantize(unpack_nibbles(made.codes), made.qparams)
        if linear.has_bias:
            biases[key] = small[f"{linear.name}.bias"]
    return Toy(
        make_decoder(spec, small, SLOTS, BF16, torch.clone),
        Substitutes(spec.num_layers, weights, biases),
        make_decoder(spec, small, SLOTS, F32, torch.clone),
        Substitutes(spec.num_layers, exact, {key: bias.float() for key, bias in biases.items()}),
        noise(spec.num_layers, 2, spec.num_kv_heads, SLOTS, spec.head_size).to(BF16),
    )


@pytest.fixture(scope="module", params=SPECS)
def toy(request: pytest.FixtureRequest) -> Toy:
    return make_toy(SPECS[request.param])


def tree_like(spec: ModelSpec, num_rows: int, length: int) -> Rows:
    """Rows behind `length` committed slots: two a level, each sees itself and some before it."""
    generator = torch.Generator().manual_seed(num_rows)
    live = -(-(length + num_rows) // 64) * 64
    own = length + torch.arange(num_rows)
    visible = torch.zeros(num_rows, live, dtype=torch.bool)
    visible[:, :length] = True
    visible[:, own] = torch.rand(num_rows, num_rows, generator=generator).tril(-1) > 0.5
    visible[torch.arange(num_rows), own] = True
    positions = length + torch.arange(num_rows) // 2
    slot_positions = torch.arange(live)
    slot_positions[own] = positions
    tokens = torch.randint(spec.vocab_size, (num_rows,), generator=generator)
    return Rows(tokens, positions, own, slot_positions, visible)


def some_of(rows: Rows, which: list[int]) -> Rows:
    return replace(
        rows,
        tokens=rows.tokens[which],
        positions=rows.positions[which],
        slots=rows.slots[which],
        visible=rows.visible[which] if rows.visible is not None else None,
    )


def distance(some: Tensor, other: Tensor) -> float:
    """Of the row that is farthest off, relative."""
    return float(((some - other).norm(dim=1) / other.norm(dim=1)).max())


# ---- against the twin ---------------------------------------------------------------------------


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize(("num_rows", "length"), PASSES)
def test_it_is_as_near_to_exact_arithmetic_as_its_twin_and_near_the_twin(
    toy: Toy, num_rows: int, length: int
) -> None:
    """Both round activations to 8 bits and results to bf16: after three layers that makes 2 to 6 %.
    Another order of sums turns some of these roundings over, so the two are as far from each other
    as two that round independently: up to sqrt(2) times that."""
    rows = tree_like(toy.decoder.spec, num_rows, length)
    got, twin, exact = toy.logits(rows), toy.twin_logits(rows), toy.exact_logits(rows)
    assert distance(got, exact) < 0.09 and distance(got, twin) < 0.09
    assert torch.cosine_similarity(got, twin).min() > 0.996
    error = (twin - exact).norm()
    assert (got - exact).norm() < 1.25 * error and (got - twin).norm() < 1.5 * error


@pytest.mark.usefixtures("build")
def test_the_first_token_of_all_has_every_bit_of_the_twin() -> None:
    """At position 0 nothing is rotated, and the mean of one value is that value; norms may differ
    by a sum's order, but not here."""
    toy = make_toy(SPECS["qwen3, head size 48"])
    rows = tree_like(toy.decoder.spec, 1, 0)
    assert torch.equal(toy.logits(rows), toy.twin_logits(rows))


def test_keys_and_values_go_into_the_slots_of_the_rows_and_nowhere_else(toy: Toy) -> None:
    rows = tree_like(toy.decoder.spec, 4, 70)
    mine, twins = Cache(toy.keys_values.clone()), Cache(toy.keys_values.clone())
    toy.logits(rows, mine)
    toy.twin_logits(rows, twins)
    written = torch.isin(torch.arange(SLOTS), rows.slots)
    assert torch.equal(mine.keys_values[:, :, :, ~written], toy.keys_values[:, :, :, ~written])
    first = (mine.keys_values[0, :, :, written], twins.keys_values[0, :, :, written])
    torch.testing.assert_close(*first, rtol=2**-6, atol=2**-6)  # bf16, rounded up to three times
    later = (mine.keys_values[:, :, :, written], twins.keys_values[:, :, :, written])
    assert distance(*(tensor.float().flatten(1) for tensor in later)) < 0.04


def test_windows_hide_what_lies_before_them() -> None:
    spec = SPECS["mistral, a sliding window, heads of 128"]
    toy, rows = make_toy(spec), tree_like(spec, 3, 100)
    before = toy.logits(rows)
    toy.keys_values[:, :, :, :80] = torch.nan
    assert torch.equal(toy.logits(rows), before)
    toy.keys_values[:, :, :, 82] = torch.nan
    assert toy.logits(rows).isnan().all()


# ---- rows and threads ---------------------------------------------------------------------------


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("num_rows", [3, 8, 11])
def test_a_row_depends_neither_on_its_place_nor_on_rows_that_it_does_not_see(num_rows: int) -> None:
    for spec in (SPECS["qwen3, head size 48"], SPECS["llama 3 rope, every bias, 12 heads of 16"]):
        toy, rows = make_toy(spec), tree_like(spec, num_rows, 90)
        visible = torch.zeros(num_rows, 128, dtype=torch.bool)
        visible[:, :90] = True
        visible[torch.arange(num_rows), rows.slots] = True
        rows = replace(rows, visible=visible)
        together = toy.logits(rows)
        for order in ([*range(num_rows)][::-1], [1, 2], [num_rows - 1]):
            assert torch.equal(toy.logits(some_of(rows, order)), together[order])
        toy.decoder.embedding[rows.tokens[0]] = torch.nan
        spoiled, others = toy.logits(rows), rows.tokens != rows.tokens[0]
        assert torch.equal(spoiled[others], together[others])
        assert spoiled[~others].isnan().all()


@pytest.mark.usefixtures("build")
def test_the_number_of_threads_changes_no_bit() -> None:
    spec = make_spec(num_layers=1, hidden_size=512, intermediate_size=3072, qk_norm=True)
    toy = make_toy(spec)  # enough for five
    for num_rows in (1, 3, 9):
        rows = tree_like(spec, num_rows, 70)
        alone = toy.logits(rows)
        for num_threads in (2, 3, 5):
            torch.set_num_threads(num_threads)
            assert torch.equal(toy.logits(rows), alone), f"{num_threads} threads"
        torch.set_num_threads(1)


def test_padding_rows_may_share_a_slot(toy: Toy) -> None:
    spec = toy.decoder.spec
    rows = tree_like(spec, 6, 40)
    alone = toy.logits(some_of(rows, [0]))
    slots = torch.full((6,), SLOTS - 1)
    slots[0] = 40
    assert torch.equal(toy.logits(replace(rows, slots=slots))[:1], alone)


# ---- where it runs ------------------------------------------------------------------------------


def test_the_demo_models_drafts_are_those_of_the_twin(tmp_path: Path) -> None:
    """A trained model is sure of most tokens: its favourites survive other roundings."""
    artifact = replan(
        build_artifact(DEMO, tmp_path / "artifact"), width=3, depth=6, int4_kernel="w4a8"
    )
    with Session(artifact) as session, torch.inference_mode():
        model = session.model
        assert model.draft_layers is not None
        twin = replace(model, draft_layers=None)
        same, num_rows, farthest = 0, 0, 0.0
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            prompt = torch.randint(3, 1000, (30 + 9 * seed,), generator=generator).tolist()
            model.cache.roll_back(0)
            root = torch.tensor([prefill(model, prompt, Sampling())])
            tree = grow(root, artifact.plan.tree, artifact.plan.verify_width, draft_pass(model))
            for depth in range(6):
                nodes = (tree.depths == depth).nonzero().flatten()
                nodes = nodes[nodes < tree.num_nodes]
                kept = model.cache.keys_values.clone()
                got = draft_pass(model)(tree, nodes).float()
                model.cache.keys_values.copy_(kept)
                expected = draft_pass(twin)(tree, nodes).float()
                same += int((got.argmax(1) == expected.argmax(1)).sum())
                num_rows += len(nodes)
                farthest = max(farthest, distance(got, expected))
        assert same >= 0.95 * num_rows and farthest < 0.06


def test_other_kernels_and_other_types_leave_the_draft_to_its_twin(tmp_path: Path) -> None:
    artifact = build_artifact(DEMO, tmp_path / "aten")
    with Session(artifact) as session:
        assert session.model.draft_layers is None  # the plan's kernel is aten
    with Session(replan(artifact, int4_kernel="w4a8"), method="plain") as session:
        assert session.model.draft_layers is None  # there is no draft
    folder = demo_checkpoint(tmp_path / "model", torch.float32)
    with Session(build_artifact(folder, tmp_path / "f32", int4_kernel="w4a8")) as session:
        assert session.model.draft_layers is None  # the cache is f32


def test_a_matrix_without_a_substitute_leaves_the_layers_to_their_twin(toy: Toy) -> None:
    cache = Cache(toy.keys_values)

    def compiled_without(key: tuple[int, Kind]) -> DraftLayers | None:
        weights = {**toy.substitutes.weights, key: toy.exact.weights[key]}
        return compile_layers(toy.decoder, replace(toy.substitutes, weights=weights), cache)

    assert compiled_without((1, "down")) is None
    assert compiled_without((toy.decoder.spec.num_layers, "head")) is not None


def test_without_a_compiler_the_twin_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make_toy(SPECS["llama, yarn rope, heads of 24"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpp.library.cache_clear()
    reason = compiled_layers.unavailable()
    assert reason is not None and "no-such-compiler" in reason
    assert compile_layers(toy.decoder, toy.substitutes, Cache(toy.keys_values)) is None
    cpp.library.cache_clear()


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.parametrize("num_rows", [1, 3, 16])
def test_the_planner_grants_the_scratch(toy: Toy, num_rows: int, num_threads: int) -> None:
    spec = toy.decoder.spec
    layers = compile_layers(toy.decoder, toy.substitutes, Cache(toy.keys_values))
    assert layers is not None
    granted = compiled_draft_bytes(spec, num_rows, 0, num_threads)
    assert scratch_bytes(layers.sizes, num_rows, num_threads) <= granted


@pytest.mark.parametrize("width", [1, 8])
def test_the_temporaries_of_a_draft_step_are_those_that_the_planner_grants(
    width: int, tmp_path: Path
) -> None:
    artifact = replan(
        build_artifact(DEMO, tmp_path / "artifact"), width=width, depth=3, int4_kernel="w4a8"
    )
    with Session(artifact) as session, torch.inference_mode():
        model, spec = session.model, artifact.spec
        prefill(model, [*range(10, 200)], Sampling())
        tree = root_only(torch.tensor([5]), artifact.plan.verify_width)
        nodes = torch.arange(width)
        with Temporaries() as seen:
            draft_pass(model)(tree, nodes)
        slots = model.cache.keys_values.shape[3]
        of_logits = 4 * width * spec.vocab_size
        granted = compiled_draft_bytes(spec, width, slots, artifact.plan.num_threads) + of_logits
        assert seen.peak_bytes <= granted


def test_a_prompts_rows_go_through_it_as_well(toy: Toy) -> None:
    """No draft has so many rows, and none has these masks; the layers take both."""
    cache = Cache(toy.keys_values.clone(), [0] * 20)
    rows = causal_rows(cache, torch.arange(40))
    layers = compile_layers(toy.decoder, toy.substitutes, cache)
    assert layers is not None
    got = compiled_layers.forward(layers, rows, cache).float()
    expected = toy.twin_logits(rows, Cache(toy.keys_values.clone(), [0] * 20))
    assert distance(got, expected) < 0.08


def test_rows_that_see_nothing_add_nothing() -> None:
    toy = make_toy(SPECS["qwen3, head size 48"])
    rows = tree_like(toy.decoder.spec, 2, 30)
    assert rows.visible is not None
    rows.visible[1] = False
    cache = Cache(toy.keys_values.clone())
    layers = compile_layers(toy.decoder, toy.substitutes, cache)
    assert layers is not None
    x = torch.ones(2, toy.decoder.spec.hidden_size, dtype=BF16)
    run_layers(layers, x, rows, cache)
    assert x.isfinite().all()
