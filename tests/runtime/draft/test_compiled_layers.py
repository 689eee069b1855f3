"""A draft pass in one call, against its plain twin and against exact arithmetic."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_artifact, demo_checkpoint, replan
from instruction_sets import Build, built
from torch import Tensor
from toys import make_spec

from subspec.artifacts.footprint import (
    Shape,
    Slots,
    cache_slots,
    compiled_draft_bytes,
    packed_bytes,
    workspace_bytes,
)
from subspec.artifacts.format.packing import dequantize, unpack_nibbles
from subspec.artifacts.model import (
    DeltaNet,
    Dense,
    LayerSpec,
    ModelSpec,
    NormStyle,
    QueryGrowth,
    Rope,
)
from subspec.artifacts.native import cpp
from subspec.artifacts.plan import Tree
from subspec.planner.build.quantize import quantize
from subspec.planner.model.hub import DEMO
from subspec.runtime.decode import commit_chunk, prefill
from subspec.runtime.draft import compiled_layers
from subspec.runtime.draft.beam import Level, PartialTree, TokenTree
from subspec.runtime.draft.compiled_layers import (
    CompiledLayers,
    compile_layers,
    known_form,
    run_layers,
    scratch_bytes,
)
from subspec.runtime.draft.drafter import DecodeState, SubstituteDrafter
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.exact_pass import PrefillChunk, causal_rows
from subspec.runtime.kernels import int4
from subspec.runtime.kernels.linear import GemmRanges, Int4Weight, gemm_ranges, pack
from subspec.runtime.memory import Temporaries
from subspec.runtime.model.attention import attend
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.embedding import EmbeddingRows
from subspec.runtime.model.net_state import NetState, make_net_states
from subspec.runtime.model.sampling import Sampler, SamplingParams
from subspec.runtime.model.transformer import (
    Rows,
    SharedWeights,
    forward,
    make_shared,
    make_tables,
)
from subspec.runtime.text.tokenizer import load_tokenizer

BF16, F32 = torch.bfloat16, torch.float32
BUILDS = {
    "native": Build((), ""),
    "avx-vnni": Build(("-march=haswell", "-mavxvnni"), "avx_vnni"),
    "avx2": Build(("-march=haswell",), "avx2"),
    "sse2": Build(("-march=x86-64",), "sse2"),
}
YARN = Rope(10_000.0, 0, "yarn", factor=4.0, original_max_positions=64, attention_factor=1.1)
LLAMA3 = Rope(
    5000.0, 0, "llama3", factor=8.0, original_max_positions=64, low_frequency_factor=1.0,
    high_frequency_factor=4.0,
)  # fmt: skip
SPECS = {
    "qwen2, 7 heads to 1, tied": make_spec(
        num_layers=3, hidden_size=448, num_heads=7, num_kv_heads=1, tie_word_embeddings=True
    ),
    "qwen2, windows on the upper layers": make_spec(
        num_layers=3, hidden_size=128, head_size=32, window=24, windowed_layers=(1, 2)
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
        family="mistral", num_layers=2, num_kv_heads=4, head_size=128, window=20,
        windowed_layers=(0, 1), qkv_bias=False,
    ),
}  # fmt: skip


def each(spec: ModelSpec, change: Callable[[LayerSpec], LayerSpec]) -> ModelSpec:
    return replace(spec, layers=tuple(map(change, spec.layers)))


def with_attention(layer: LayerSpec, **changes: Any) -> LayerSpec:
    first, second = layer.blocks
    return LayerSpec((replace(first, body=replace(first.body, **changes)), second))


def with_block(layer: LayerSpec, index: int, **changes: Any) -> LayerSpec:
    blocks = list(layer.blocks)
    blocks[index] = replace(blocks[index], **changes)
    return LayerSpec(tuple(blocks))


GATED = make_spec(
    num_layers=3, hidden_size=192, num_heads=6, head_size=32, rope=Rope(500.0, 0), qk_norm=True,
    qkv_bias=False,
)  # fmt: skip


def gated(spec: ModelSpec, turning: int = 8) -> ModelSpec:
    """Attention as qwen3_5 has it."""
    return replace(
        each(
            spec,
            lambda one: with_attention(one, output_gate=True, rope=Rope(500.0, turning)),
        ),
        norm=NormStyle(1e-6, rounds_late=True, zero_centered=True),
    )


def with_nets(spec: ModelSpec, net: DeltaNet, full: int) -> ModelSpec:
    """Delta nets in all layers but one."""

    def mixed(index: int, layer: LayerSpec) -> LayerSpec:
        return layer if index == full else with_block(layer, 0, body=net)

    layers = tuple(mixed(index, layer) for index, layer in enumerate(spec.layers))
    return replace(spec, layers=layers)


SPECS["gated, a part of a head turns, norms around zero"] = gated(GATED)
NETS = {
    "one attention behind two nets": with_nets(
        gated(GATED), DeltaNet(2, 4, 32, 16, 4, ("A_log", "norm.weight")), 2
    ),
    "as many key heads, three taps": with_nets(
        gated(GATED, 32), DeltaNet(3, 3, 16, 64, 3, ("conv1d.weight", "dt_bias")), 0
    ),
}
SLOTS = 192
WIDTH = 24  # of trees
PASSES = [(1, 0), (1, 40), (3, 100), (4, 128), (8, 70), (9, 1), (16, 150)]  # rows, tokens before


@pytest.fixture(scope="module", params=BUILDS)
def build(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """The layers as they are, and as built for other instruction sets, once each."""
    cache = tmp_path_factory.getbasetemp() / f"layers-{request.param}"
    cache.mkdir(mode=0o700, exist_ok=True)
    with built(BUILDS[request.param], cache):
        assert compiled_layers.unavailable() is None and int4.unavailable() is None
        yield


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """One, unless a test says otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_one_call(batch: Sequence[Rows]) -> GemmRanges:
    return gemm_ranges([sum(len(rows.tokens) for rows in batch)])


@dataclass(frozen=True)
class Toy:
    """A random model, and the same one in f32 with the weights that its substitutes stand for."""

    embedding: Tensor
    weights: SharedWeights
    substitutes: Substitutes
    exact_weights: SharedWeights
    exact: Substitutes
    kept: Cache  # of random keys and values: every test has its own copy

    @property
    def spec(self) -> ModelSpec:
        return self.weights.spec

    def cache(self, dtype: torch.dtype = BF16) -> Cache:
        keys, values = (
            tuple(one.to(dtype, copy=True) for one in kept)
            for kept in (self.kept.keys, self.kept.values)
        )
        nets = tuple(copied(net, dtype) for net in self.kept.nets)
        return Cache(keys, values, nets, tokens=list(self.kept.tokens))

    def compiled(self) -> CompiledLayers:
        layers = compile_layers(self.weights, self.substitutes)
        assert layers is not None
        return layers

    def logits(self, *batch: Rows) -> Tensor:
        """By the compiled layers: f32 [T, V]. Of rows without a cache each has its own copy."""
        return compiled_layers.forward(self.compiled(), self.over(batch)).float()

    def twin_logits(self, *batch: Rows) -> Tensor:
        return forward(self.weights, self.substitutes, self.over(batch), in_one_call(batch)).float()

    def exact_logits(self, rows: Rows) -> Tensor:
        own = replace(rows, cache=self.cache(F32))
        return forward(self.exact_weights, self.exact, [own], in_one_call([own]))

    def over(self, batch: Sequence[Rows]) -> list[Rows]:
        return [r if r.cache is not NONE else replace(r, cache=self.cache()) for r in batch]


def copied(net: NetState, dtype: torch.dtype) -> NetState:
    """With rows in `dtype`; what is f32 stays so."""

    def in_dtype(one: Any) -> Any:
        values = ((name, getattr(one, name).to(dtype, copy=True)) for name in vars(one))
        return replace(one, **dict(values))

    committed = replace(
        net.committed, conv=net.committed.conv.to(dtype), memory=net.committed.memory.clone()
    )
    drafted = {name: getattr(net, name).clone() for name in ("keys", "updates", "path_decays")}
    return replace(net, committed=committed, nodes=in_dtype(net.nodes), **drafted)


NONE = Cache((), ())


def shared(
    spec: ModelSpec, rows: EmbeddingRows, small: dict[str, Tensor], dtype: torch.dtype
) -> SharedWeights:
    tables = make_tables(spec, SLOTS, dtype, torch.clone)
    return make_shared(spec, rows, small, tables, dtype, torch.clone)


def make_toy(spec: ModelSpec) -> Toy:
    kv_size = sum(one.kv_size for one in spec.attentions)
    generator = torch.Generator().manual_seed(spec.hidden_size + 2 * kv_size * spec.item_bytes)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    small = {}
    for name, shape in spec.resident_shapes.items():
        middle, size = (1.0, 0.2) if "norm" in name else (0.0, 0.2)
        small[name] = (middle + size * noise(*shape)).to(BF16)
    weights: dict[str, Int4Weight | Tensor] = {}
    exact: dict[str, Int4Weight | Tensor] = {}
    biases: dict[str, Tensor] = {}
    for linear in spec.linears:
        shape = (linear.out_features, linear.in_features)
        if linear.stays_exact:
            weights[linear.name] = (noise(*shape) * shape[1] ** -0.5).to(BF16)
            exact[linear.name] = weights[linear.name].float()
            continue
        made = quantize((noise(*shape) * 1.5 * shape[1] ** -0.5).to(BF16), "cpu")
        room = [torch.empty(count, dtype=torch.uint8) for count in packed_bytes(*shape, "w4a8")]
        weights[linear.name] = pack(made.codes, made.qparams, "w4a8", *room)
        exact[linear.name] = dequantize(unpack_nibbles(made.codes), made.qparams)
        if linear.has_bias:
            biases[linear.name] = small[f"{linear.name}.bias"]
    embedding = noise(spec.vocab_size, spec.hidden_size).to(BF16)
    rows = embedding.__getitem__
    shapes = [
        (one.num_kv_heads, SLOTS, one.head_size)
        for layer in spec.layers
        for one in layer.attentions
    ]
    keys, values = (tuple(noise(*shape).to(BF16) for shape in shapes) for _ in range(2))
    small |= {name: one.float() for name, one in small.items() if is_f32(spec, name)}

    def filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return (noise(*shape) * 0.3).to(dtype)

    nets = make_net_states(spec, WIDTH, small, filled)
    return Toy(
        embedding,
        shared(spec, rows, small, BF16),
        Substitutes(spec.num_layers, weights, biases),
        shared(spec, rows, small, F32),
        Substitutes(spec.num_layers, exact, {name: b.float() for name, b in biases.items()}),
        Cache(keys, values, nets),
    )


def is_f32(spec: ModelSpec, name: str) -> bool:
    return spec.resident_dtype(name) == "float32"


@pytest.fixture(scope="module", params=SPECS)
def toy(request: pytest.FixtureRequest) -> Toy:
    return make_toy(SPECS[request.param])


def tree_like(spec: ModelSpec, num_rows: int, length: int, seed: int = 0) -> Rows:
    """Rows behind `length` committed slots: two a level, each sees itself and some before it."""
    generator = torch.Generator().manual_seed(num_rows + 100 * seed)
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
    return Rows(tokens, positions, own, slot_positions, visible, NONE, attend)


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
    rows = tree_like(toy.spec, num_rows, length)
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
    rows = tree_like(toy.spec, 1, 0)
    assert torch.equal(toy.logits(rows), toy.twin_logits(rows))


def test_keys_and_values_go_into_the_slots_of_the_rows_and_nowhere_else(toy: Toy) -> None:
    rows, before = tree_like(toy.spec, 4, 70), toy.cache()
    mine, twins = toy.cache(), toy.cache()
    toy.logits(replace(rows, cache=mine))
    toy.twin_logits(replace(rows, cache=twins))
    written = torch.isin(torch.arange(SLOTS), rows.slots)
    pairs = [
        (old, got, twin)
        for caches in (
            (before.keys, mine.keys, twins.keys),
            (before.values, mine.values, twins.values),
        )
        for old, got, twin in zip(*caches, strict=True)
    ]
    for index, (old, got, twin) in enumerate(pairs):
        assert torch.equal(got[:, ~written], old[:, ~written])
        got, twin = got[:, written], twin[:, written]
        if index % toy.spec.num_layers == 0:  # bf16, rounded up to three times
            torch.testing.assert_close(got, twin, rtol=2**-6, atol=2**-6)
        assert (got.float() - twin.float()).norm() < 0.04 * twin.float().norm()


def test_windows_hide_what_lies_before_them() -> None:
    spec = SPECS["mistral, a sliding window, heads of 128"]
    toy, rows = make_toy(spec), tree_like(spec, 3, 100)
    before = toy.logits(rows)
    hidden = toy.cache()
    for kept in (*hidden.keys, *hidden.values):
        kept[:, :80] = torch.nan
    assert torch.equal(toy.logits(replace(rows, cache=hidden)), before)
    for kept in (*hidden.keys, *hidden.values):
        kept[:, 82] = torch.nan
    assert toy.logits(replace(rows, cache=hidden)).isnan().all()


def test_layers_without_a_window_see_what_others_do_not() -> None:
    spec = SPECS["qwen2, windows on the upper layers"]
    toy, rows = make_toy(spec), tree_like(spec, 3, 100)
    before, cache = toy.logits(rows), toy.cache()
    for kept in (*cache.keys[1:], *cache.values[1:]):
        kept[:, :70] = torch.nan
    assert torch.equal(toy.logits(replace(rows, cache=cache)), before)
    cache.keys[0][:, :70] = 0
    assert not torch.equal(toy.logits(replace(rows, cache=cache)), before)


def test_scaled_embeddings_and_divided_logits_are_those_of_the_twin() -> None:
    spec = replace(SPECS["qwen3, head size 48"], embedding_scale=12.0, logits_divisor=4.0)
    toy, rows = make_toy(spec), tree_like(spec, 4, 20)
    assert distance(toy.logits(rows), toy.twin_logits(rows)) < 0.09
    assert distance(toy.logits(rows), toy.exact_logits(rows)) < 0.09


# ---- delta nets ---------------------------------------------------------------------------------


def a_tree(spec: ModelSpec, seed: int = 0) -> TokenTree:
    """Three nodes on every level but the first, each under any of the level above."""
    generator = torch.Generator().manual_seed(seed)
    parents, depths = [0], [0]
    for depth in range(1, 5):
        above = [node for node, its in enumerate(depths) if its == depth - 1]
        for _ in range(3):
            parents.append(above[int(torch.randint(len(above), (1,), generator=generator))])
            depths.append(depth)
    num_nodes = len(parents)
    parents += [0] * (WIDTH - num_nodes)
    depths += [0] * (WIDTH - num_nodes)
    ancestors = torch.eye(WIDTH, dtype=torch.bool)
    for node in range(1, WIDTH):
        ancestors[node] |= ancestors[parents[node]]
    tokens = torch.randint(spec.vocab_size, (WIDTH,), generator=generator)
    return TokenTree(tokens, torch.tensor(parents), ancestors, torch.tensor(depths), num_nodes)


def of_levels(
    drafter: SubstituteDrafter, caches: Sequence[Cache], trees: Sequence[TokenTree]
) -> list[Tensor]:
    """Logits of each level of all trees, f32."""
    run = drafter.pass_over(caches, [cache.tree_slots(WIDTH) for cache in caches])
    found = []
    for depth in range(5):
        growing = []
        for index, tree in enumerate(trees):
            nodes = (tree.depths == depth).nonzero().flatten()
            nodes = nodes[nodes < tree.num_nodes]
            growing.append(PartialTree(index, tree, Level(nodes, torch.zeros(len(nodes)))))
        found.append(run(growing).float())
    return found


def drafter_of(toy: Toy, compiled: bool) -> SubstituteDrafter:
    layers = toy.compiled() if compiled else None
    return SubstituteDrafter((Tree(3, 4),), WIDTH, toy.weights, toy.substitutes, layers)


def behind(cache: Cache, length: int) -> Cache:
    return replace(cache, tokens=[1] * length)


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("name", NETS)
def test_a_draft_with_delta_nets_is_as_near_to_exact_arithmetic_as_its_twin(name: str) -> None:
    toy = make_toy(NETS[name])
    tree, exact = a_tree(toy.spec), replace(drafter_of(toy, False), weights=toy.exact_weights)
    exact = replace(exact, substitutes=toy.exact)
    mine, twins = behind(toy.cache(), 70), behind(toy.cache(), 70)
    got = of_levels(drafter_of(toy, True), [mine], [tree])
    twin = of_levels(drafter_of(toy, False), [twins], [tree])
    true = of_levels(exact, [behind(toy.cache(F32), 70)], [tree])
    for level, levels_twin, levels_true in zip(got, twin, true, strict=True):
        assert distance(level, levels_true) < 0.09 and distance(level, levels_twin) < 0.09
    error = sum((one - other).norm() for one, other in zip(twin, true, strict=True))
    assert sum((one - other).norm() for one, other in zip(got, true, strict=True)) < 1.25 * error
    for net, other in zip(mine.nets, twins.nets, strict=True):  # what nodes leave
        assert torch.equal(net.committed.memory, other.committed.memory)
        for what in ("keys", "updates", "path_decays"):
            some, others = (getattr(one, what)[:, : tree.num_nodes] for one in (net, other))
            assert (some - others).norm() < 0.05 * others.norm()


@pytest.mark.usefixtures("build")
def test_neither_company_nor_threads_change_a_bit_of_a_draft_with_delta_nets() -> None:
    toy = make_toy(NETS["one attention behind two nets"])
    drafter, trees = drafter_of(toy, True), [a_tree(toy.spec, seed) for seed in range(3)]
    lengths = (5, 120, 64)
    alone = [
        of_levels(drafter, [behind(toy.cache(), length)], [tree])
        for tree, length in zip(trees, lengths, strict=True)
    ]
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        caches = [behind(toy.cache(), length) for length in lengths]
        for depth, together in enumerate(of_levels(drafter, caches, trees)):
            assert torch.equal(together, torch.cat([levels[depth] for levels in alone]))


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("name", NETS)
def test_a_proposed_chain_has_the_bits_of_a_pass_for_each_of_its_nodes(name: str) -> None:
    toy = make_toy(NETS[name])
    tree = a_tree(toy.spec)
    tree.parents[[1, 2, 3, 4, 7, 10]] = torch.tensor([0, 0, 0, 1, 4, 7])
    for node in range(1, tree.num_nodes):
        tree.ancestors[node] = tree.ancestors[tree.parents[node]]
        tree.ancestors[node, node] = True
    one_by_one = ([0], [1, 2, 3], [4], [7], [10])
    for num_threads, compiled in ((1, False), (1, True), (2, True), (5, True)):
        torch.set_num_threads(num_threads)
        drafter, lengths = drafter_of(toy, compiled), (5, 120)
        apart, caches = ([behind(toy.cache(), length) for length in lengths] for _ in range(2))
        run = drafter.pass_over(apart, [cache.tree_slots(WIDTH) for cache in apart])
        expected = [run([growing(index, tree, nodes)]) for nodes in one_by_one for index in (0, 1)]
        run = drafter.pass_over(caches, [cache.tree_slots(WIDTH) for cache in caches])
        run([growing(index, tree, [0]) for index in (0, 1)])
        # One of them checks a chain beside its level, the other has only the level.
        both = growing(0, tree, [1, 2, 3, 4, 7, 10], 3), growing(1, tree, [1, 2, 3])
        got = run(both)
        for rows, other in zip(got.split([3, 1, 1, 1, 3]), (2, 4, 6, 8, 3), strict=True):
            assert_same(rows, expected[other], bits=compiled)


def growing(
    index: int, tree: TokenTree, nodes: list[int], num_scores: int | None = None
) -> PartialTree:
    scores = torch.zeros(len(nodes) if num_scores is None else num_scores)
    return PartialTree(index, tree, Level(torch.tensor(nodes), scores))


def assert_same(got: Tensor, expected: Tensor, bits: bool) -> None:
    """The plain twin's products depend on how many rows they have."""
    if bits:
        assert torch.equal(got, expected)
    else:
        assert distance(got.float(), expected.float()) < 0.05


# ---- several sequences --------------------------------------------------------------------------


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("num_rows", [(1, 1), (3, 3, 3), (4, 1, 9), (1, 16, 2)])
def test_sequences_in_one_call_have_the_bits_of_calls_alone(
    toy: Toy, num_rows: tuple[int, ...]
) -> None:
    """Of logits and of what they leave in their caches; lengths and live slots differ."""
    lengths = (5, 150, 64)
    batch = [
        tree_like(toy.spec, count, length, seed)
        for seed, (count, length) in enumerate(zip(num_rows, lengths, strict=False))
    ]
    batch = toy.over(batch)
    together = toy.logits(*batch).split(list(num_rows))
    for rows, got in zip(batch, together, strict=True):
        alone = replace(rows, cache=toy.cache())
        assert torch.equal(got, toy.logits(alone))
        kept = zip((*rows.cache.keys, *rows.cache.values), (*alone.cache.keys, *alone.cache.values),
                   strict=True)  # fmt: skip
        assert all(torch.equal(mine, theirs) for mine, theirs in kept)


@pytest.mark.usefixtures("build")
def test_the_number_of_threads_changes_no_bit_of_several_sequences() -> None:
    spec = make_spec(num_layers=1, hidden_size=512, intermediate_size=3072, qk_norm=True)
    toy = make_toy(spec)
    batch = [tree_like(spec, count, length) for count, length in ((2, 20), (3, 130), (1, 64))]
    alone = toy.logits(*batch)
    for num_threads in (2, 5):
        torch.set_num_threads(num_threads)
        assert torch.equal(toy.logits(*batch), alone), f"{num_threads} threads"


def test_a_cache_that_comes_back_is_found_again(toy: Toy) -> None:
    layers, caches = toy.compiled(), [toy.cache(), toy.cache()]
    for _ in range(2):
        for cache in caches:
            compiled_layers.forward(layers, [replace(tree_like(toy.spec, 2, 9), cache=cache)])
    assert list(layers.caches) == caches


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
        toy.embedding[rows.tokens[0]] = torch.nan
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
    spec = toy.spec
    rows = tree_like(spec, 6, 40)
    alone = toy.logits(some_of(rows, [0]))
    slots = torch.full((6,), SLOTS - 1)
    slots[0] = 40
    assert torch.equal(toy.logits(replace(rows, slots=slots))[:1], alone)


# ---- where it runs ------------------------------------------------------------------------------


def only_last(spec: ModelSpec, change: Callable[[LayerSpec], LayerSpec]) -> ModelSpec:
    return replace(spec, layers=(*spec.layers[:-1], change(spec.layers[-1])))


PLAIN = make_spec(
    num_layers=2, hidden_size=128, head_size=32, intermediate_size=128, vocab_size=256
)
REFUSED = {
    "no positions": each(PLAIN, lambda one: with_attention(one, rope=None)),
    "an interleaved rope": each(
        PLAIN, lambda one: with_attention(one, rope=Rope(500.0, 32, interleaved=True))
    ),
    "norms over all heads": each(PLAIN, lambda one: with_attention(one, qk_norm="all_heads")),
    "queries that grow": each(
        PLAIN, lambda one: with_attention(one, query_growth=QueryGrowth(0.1, 64))
    ),
    "norms behind the blocks": each(
        PLAIN, lambda one: with_block(one, 0, before=None, after="behind")
    ),
    "norms on both sides": each(PLAIN, lambda one: with_block(one, 1, after="behind")),
    "blocks that count less": each(PLAIN, lambda one: with_block(one, 1, multiplier=0.5)),
    "ropes in f32": replace(PLAIN, rope_in_f32=True),
    "a feed-forward of gelu": each(
        PLAIN, lambda one: with_block(one, 1, body=Dense(128, activation="gelu_tanh"))
    ),
    "heads of delta nets that are no whole vectors": with_nets(PLAIN, DeltaNet(2, 2, 8, 32, 4), 1),
    "other delta nets in one layer": only_last(
        with_nets(make_spec(num_layers=3, hidden_size=128), DeltaNet(2, 2, 16, 32, 4), 0),
        lambda one: with_block(one, 0, body=DeltaNet(2, 4, 16, 16, 4)),
    ),
    "values that are normed": each(PLAIN, lambda one: with_attention(one, value_norm=True)),
    "values that are keys": each(PLAIN, lambda one: with_attention(one, values_are_keys=True)),
    "a scalar of one layer": only_last(PLAIN, lambda one: replace(one, scalar="layer_scalar")),
    "the feed-forward first": each(PLAIN, lambda one: LayerSpec(one.blocks[::-1])),
    "two attentions": each(
        PLAIN,
        lambda one: LayerSpec(
            (
                *one.blocks,
                replace(one.blocks[0], body=replace(one.blocks[0].body, name="second"), before="n"),
            )
        ),
    ),
    "an attention alone": each(PLAIN, lambda one: LayerSpec(one.blocks[:1])),
    "another inner size in one layer": only_last(
        PLAIN, lambda one: with_block(one, 1, body=Dense(192))
    ),
    "other heads in one layer": only_last(PLAIN, lambda one: with_attention(one, num_kv_heads=4)),
    "another scale in one layer": only_last(PLAIN, lambda one: with_attention(one, scale=0.1)),
    "another rope in one layer": only_last(
        PLAIN, lambda one: with_attention(one, rope=Rope(77.0, 32))
    ),
    "two windows": replace(
        PLAIN,
        layers=tuple(
            with_attention(one, window=size)
            for one, size in zip(PLAIN.layers, (8, 16), strict=True)
        ),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_that_it_does_not_compute_is_left_to_the_twin(name: str) -> None:
    """Which drafts it."""
    spec = REFUSED[name]
    assert known_form(spec) is None
    toy = make_toy(spec)
    assert compile_layers(toy.weights, toy.substitutes) is None
    drafter = SubstituteDrafter((Tree(2, 3),), 8, toy.weights, toy.substitutes, None)
    caches = [replace(toy.cache(), tokens=[1] * length) for length in (5, 70)]
    trees = drafter.draft([DecodeState(cache, 7, 50) for cache in caches])
    assert [tree.num_nodes for tree in trees] == [7, 7]


@pytest.mark.parametrize("name", SPECS)
def test_the_form_that_it_computes_is_the_one_that_all_layers_share(name: str) -> None:
    spec = SPECS[name]
    form = known_form(spec)
    assert form is not None
    assert form.attention == replace(spec.layers[0].attentions[0], window=None)
    assert form.dense == spec.layers[0].blocks[1].body and form.net is None


def test_embeddings_logits_and_windows_of_one_size_are_no_other_form() -> None:
    for spec in (
        replace(PLAIN, embedding_scale=3.0, logits_divisor=2.0),
        replace(PLAIN, embedding_scale=3.3, rounds_embedding_scale=True, logits_soft_cap=5.0),
        replace(PLAIN, tie_word_embeddings=True),
        only_last(PLAIN, lambda one: with_attention(one, window=9)),
        each(PLAIN, lambda one: with_attention(one, window=9)),
        each(PLAIN, lambda one: with_attention(one, qk_norm="head", scale=0.3)),
        only_last(PLAIN, lambda one: with_block(one, 0, before="another_name")),
    ):
        assert known_form(spec) is not None


def test_norms_are_found_by_the_names_that_each_layer_gives_them() -> None:
    spec = only_last(PLAIN, lambda one: with_block(one, 0, before="another_layernorm"))
    toy, rows = make_toy(spec), tree_like(spec, 3, 20)
    assert distance(toy.logits(rows), toy.twin_logits(rows)) < 0.09


def test_the_scale_of_the_scores_is_the_specs() -> None:
    spec = each(PLAIN, lambda one: with_attention(one, scale=0.7))
    toy, rows = make_toy(spec), tree_like(spec, 3, 20)
    assert distance(toy.logits(rows), toy.twin_logits(rows)) < 0.12
    other = replace(toy, weights=replace(toy.weights, spec=PLAIN))
    assert distance(other.logits(rows), toy.twin_logits(rows)) > 0.3


def test_another_dtype_leaves_the_layers_to_their_twin(toy: Toy) -> None:
    assert compile_layers(toy.exact_weights, toy.substitutes) is None
    f32 = replace(toy.weights, spec=replace(toy.spec, dtype="float32"))
    assert compile_layers(f32, toy.substitutes) is None  # the cache is f32


def test_a_matrix_without_a_substitute_leaves_the_layers_to_their_twin(toy: Toy) -> None:
    def compiled_without(name: str) -> CompiledLayers | None:
        weights = {**toy.substitutes.weights, name: toy.exact.weights[name]}
        return compile_layers(toy.weights, replace(toy.substitutes, weights=weights))

    assert compiled_without("model.layers.1.mlp.down_proj") is None
    assert compiled_without("lm_head") is not None


def test_a_draft_model_without_a_substitute_leaves_the_layers_to_their_twin(toy: Toy) -> None:
    exact = replace(toy.weights, spec=replace(toy.spec, quantized=False))
    assert compile_layers(exact, replace(toy.substitutes, weights=toy.exact.weights)) is None


def test_without_a_compiler_the_twin_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make_toy(SPECS["llama, yarn rope, heads of 24"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpp.library.cache_clear()
    reason = compiled_layers.unavailable()
    assert reason is not None and "no-such-compiler" in reason
    assert compile_layers(toy.weights, toy.substitutes) is None
    cpp.library.cache_clear()


def test_the_demo_models_drafts_are_those_of_the_twin(tmp_path: Path) -> None:
    """A trained model is sure of most tokens: its favourites survive other roundings."""
    artifact = replan(
        build_artifact(DEMO, tmp_path / "artifact"), width=3, depth=6, int4_kernel="w4a8"
    )
    sharp = Tree(3, 6, temperature=0.2)  # grows where the draft is sure
    artifact = replace(artifact, plan=replace(artifact.plan, tree=sharp))
    with Engine.open(artifact) as engine, torch.inference_mode():
        drafter = engine.model.drafter
        assert isinstance(drafter, SubstituteDrafter) and drafter.compiled is not None
        twin = replace(drafter, compiled=None)
        cache = engine.new_sequence().cache
        same, num_rows, farthest = 0, 0, 0.0
        text = load_tokenizer(artifact.path / "tokenizer").plain_ids(Path(__file__).read_text())
        for begin in range(300, 700, 100):
            prompt = text[begin : begin + 30 + begin // 10]
            cache.roll_back(0)
            chunk = PrefillChunk(cache, prompt, Sampler(SamplingParams()))
            [done] = prefill(engine.model, [chunk])
            commit_chunk(chunk, done)
            root = done.first_token
            assert root is not None
            [tree] = drafter.draft([DecodeState(cache, root, 100)])
            slots = [cache.tree_slots(drafter.verify_width)]
            for depth in range(6):
                nodes = (tree.depths == depth).nonzero().flatten()
                nodes = nodes[nodes < tree.num_nodes]
                growing = [PartialTree(0, tree, Level(nodes, torch.zeros(len(nodes))))]
                kept = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
                got = drafter.pass_over([cache], slots)(growing).float()
                for tensor, before in zip((*cache.keys, *cache.values), kept, strict=True):
                    tensor.copy_(before)
                expected = twin.pass_over([cache], slots)(growing).float()
                same += int((got.argmax(1) == expected.argmax(1)).sum())
                num_rows += len(nodes)
                farthest = max(farthest, distance(got, expected))
        assert same >= 0.95 * num_rows and farthest < 0.06


def test_other_kernels_and_other_types_leave_the_draft_to_its_twin(tmp_path: Path) -> None:
    artifact = build_artifact(DEMO, tmp_path / "aten")
    with Engine.open(artifact) as engine:
        drafter = engine.model.drafter
        assert isinstance(drafter, SubstituteDrafter)
        assert drafter.compiled is None  # the plan's kernel is aten
    with Engine.open(replan(artifact, int4_kernel="w4a8"), OpenOptions(method="plain")) as engine:
        assert engine.model.drafter is None
    folder = demo_checkpoint(tmp_path / "model", torch.float32)
    with Engine.open(build_artifact(folder, tmp_path / "f32", int4_kernel="w4a8")) as engine:
        drafter = engine.model.drafter
        assert isinstance(drafter, SubstituteDrafter)
        assert drafter.compiled is None  # the cache is f32


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.parametrize("num_rows", [1, 3, 16])
def test_the_planner_grants_the_scratch(toy: Toy, num_rows: int, num_threads: int) -> None:
    granted = compiled_draft_bytes(toy.spec, 1, num_rows, Slots(0, None), num_threads)
    assert scratch_bytes(toy.compiled().sizes, num_rows, num_threads) <= granted


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_the_temporaries_of_a_draft_step_are_those_that_the_planner_grants(
    toy: Toy, width: int, num_sequences: int
) -> None:
    batch = toy.over([tree_like(toy.spec, width, 100 + n, n) for n in range(num_sequences)])
    layers = toy.compiled()
    with Temporaries() as seen:
        compiled_layers.forward(layers, batch)
    of_logits = 4 * num_sequences * width * toy.spec.vocab_size
    granted = (
        compiled_draft_bytes(toy.spec, num_sequences, width, Slots(SLOTS, None), 1) + of_logits
    )
    assert seen.peak_bytes <= granted


@pytest.mark.parametrize("name", [*SPECS, *NETS, *REFUSED])
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_the_temporaries_of_a_whole_draft_are_within_the_workspace(
    name: str, num_sequences: int
) -> None:
    """Compiled or by the twin."""
    toy, width = make_toy((SPECS | NETS | REFUSED)[name]), 24
    compiled = compile_layers(toy.weights, toy.substitutes)
    for one in (compiled, None) if compiled else (None,):
        drafter = SubstituteDrafter((Tree(4, 5),), width, toy.weights, toy.substitutes, one)
        states = [
            DecodeState(replace(toy.cache(), tokens=[1] * (100 + n)), n, 50)
            for n in range(num_sequences)
        ]
        with Temporaries() as seen:
            drafter.draft(states)
        context = SLOTS - width - 1
        assert cache_slots(context, width) == SLOTS
        shape = Shape(context, num_sequences, width, 4, 8, 1, 8)
        assert seen.peak_bytes <= workspace_bytes(toy.spec, "cpu", shape)


def test_a_prompts_rows_go_through_it_as_well(toy: Toy) -> None:
    """No draft has so many rows, and none has these masks; the layers take both."""
    caches = [replace(toy.cache(), tokens=[0] * 20) for _ in range(2)]
    rows = [causal_rows(cache, torch.arange(40), attend) for cache in caches]
    assert distance(toy.logits(rows[0]), toy.twin_logits(rows[1])) < 0.08


def test_rows_that_see_nothing_add_nothing() -> None:
    toy = make_toy(SPECS["qwen3, head size 48"])
    rows = replace(tree_like(toy.spec, 2, 30), cache=toy.cache())
    assert rows.visible is not None
    rows.visible[1] = False
    x = torch.ones(2, toy.spec.hidden_size, dtype=BF16)
    run_layers(toy.compiled(), x, [rows])
    assert x.isfinite().all()
