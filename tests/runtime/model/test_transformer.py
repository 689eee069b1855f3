"""A pass over the layers against plain arithmetic in f64, and the bits that a batch may not change.

T = rows, H = hidden size, A = query heads, B = KV heads, D = head size, V = vocabulary
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy_weights import ToyWeights, empty_cache, exact_weights, random_weights, shared_weights
from toys import make_spec

from subspec.artifacts.model import (
    FINAL_NORM,
    HEAD,
    Attention,
    Block,
    Dense,
    LayerSpec,
    ModelSpec,
    NormStyle,
    QueryGrowth,
    Rope,
    layer_name,
)
from subspec.runtime.draft.beam import TokenTree, root_only
from subspec.runtime.exact_pass import causal_rows, whole_tree
from subspec.runtime.kernels.linear import GemmRanges, gemm_ranges
from subspec.runtime.model.attention import attend, attend_batch_invariant
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.transformer import (
    HeadRows,
    Pass,
    Rows,
    SharedWeights,
    feed_forward,
    forward,
    forward_hidden,
    grown,
    normalize,
    rope_frequencies,
    rope_tables,
    rotate,
    to_logits,
)

BF16, F32 = torch.bfloat16, torch.float32
SLOTS = 448
LLAMA = make_spec(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    intermediate_size=128,
    hidden_size=64,
    vocab_size=96,
    dtype="float32",
    qkv_bias=False,
)


def with_layers(spec: ModelSpec = LLAMA, /, blocks: Any = None, **changes: Any) -> ModelSpec:
    """The same with changes to every attention, and to how its blocks are normed."""

    def layer(one: LayerSpec) -> LayerSpec:
        first, second = one.blocks
        assert isinstance(first.body, Attention)
        own = replace(first, body=replace(first.body, **changes))
        return LayerSpec(tuple(blocks(index, b) for index, b in enumerate((own, second))))

    blocks = blocks or (lambda index, block: block)
    return replace(spec, layers=tuple(map(layer, spec.layers)))


def after_only(index: int, block: Block) -> Block:
    return replace(block, before=None, after=f"post_{index}_layernorm")


def both_sides(index: int, block: Block) -> Block:
    return replace(block, after=f"after_{index}_layernorm")


def weighted(index: int, block: Block) -> Block:
    return replace(block, multiplier=(0.22, 0.5)[index])


SPECS = {
    "llama": LLAMA,
    "every bias": make_spec(
        num_layers=2, head_size=16, intermediate_size=128, hidden_size=64, vocab_size=96,
        dtype="float32", qkv_bias=True, output_bias=True, mlp_bias=True,
    ),
    "a rope over a part of each head": with_layers(rope=Rope(10_000.0, 6)),
    "an interleaved rope": with_layers(rope=Rope(10_000.0, 16, interleaved=True)),
    "an interleaved rope over a part": with_layers(rope=Rope(500.0, 8, interleaved=True)),
    "a rope that multiplies": with_layers(
        rope=Rope(500.0, 16, "yarn", factor=4.0, original_max_positions=64, attention_factor=1.3)
    ),
    "no positions": with_layers(rope=None),
    "positions on some layers, windows on others": replace(
        LLAMA,
        layers=(
            with_layers(window=20).layers[0],
            with_layers(rope=None).layers[0],
            with_layers(rope=Rope(100.0, 16), window=150).layers[0],
        ),
    ),
    "norms behind the blocks only": with_layers(blocks=after_only),
    "norms on both sides": with_layers(blocks=both_sides),
    "blocks that count less": with_layers(blocks=weighted),
    "norms of each head": with_layers(qk_norm="head"),
    "norms over all heads": with_layers(qk_norm="all_heads", qkv_bias=True),
    "queries that grow": with_layers(query_growth=QueryGrowth(0.3, 37), scale=0.2),
    "scaled embeddings, divided logits": replace(LLAMA, embedding_scale=12.0, logits_divisor=8.0),
    "ropes in f32, norms rounded late": replace(
        LLAMA, rope_in_f32=True, norm=NormStyle(1e-5, rounds_late=True)
    ),
    "norms around zero, a feed-forward of gelu, scalars": replace(
        LLAMA,
        norm=NormStyle(1e-5, rounds_late=True, zero_centered=True),
        layers=tuple(
            replace(layer, scalar=scalar, blocks=(layer.blocks[0], replace(
                layer.blocks[1], body=Dense(77, True, "gelu_tanh")
            )))
            for layer, scalar in zip(LLAMA.layers, ("layer_scalar", None), strict=True)
        ),
    ),
    "values that are keys, and normed": with_layers(
        values_are_keys=True, value_norm=True, qk_norm="head",
        rope=Rope(500.0, 16, "proportional", factor=2.0, turning_pairs=3),
    ),
    "values that are keys as they are": with_layers(values_are_keys=True, qk_norm="all_heads"),
    "capped logits, a scale that is rounded": replace(
        LLAMA, embedding_scale=3.3, rounds_embedding_scale=True, logits_soft_cap=2.5,
    ),
    "a head that needs padding": replace(LLAMA, vocab_size=83),
    "matrices without a substitute": replace(
        with_layers(), layers=tuple(
            replace(layer, blocks=(layer.blocks[0], replace(layer.blocks[1], body=Dense(37, True))))
            for layer in LLAMA.layers
        ),
    ),
    "layers of other sizes": replace(
        LLAMA,
        layers=(
            LLAMA.layers[0],
            with_layers(num_heads=6, num_kv_heads=1, head_size=24, rope=Rope(50.0, 24)).layers[0],
        ),
    ),
    "two attentions in a layer": replace(
        LLAMA,
        layers=(
            LayerSpec((*LLAMA.layers[0].blocks, Block(
                replace(LLAMA.layers[0].attentions[0], name="second_attn", num_kv_heads=4), "third"
            ))),
            LLAMA.layers[1],
        ),
    ),
}  # fmt: skip
EVERYTHING = replace(
    with_layers(
        blocks=lambda index, block: replace(
            block, after=f"after_{index}_layernorm", multiplier=0.7
        ),
        rope=Rope(10_000.0, 12, interleaved=True),
        qk_norm="all_heads",
        query_growth=QueryGrowth(0.3, 3),
        qkv_bias=True,
        window=33,
    ),
    embedding_scale=5.5,
    logits_divisor=3.0,
)


def tokens_of(spec: ModelSpec, count: int, seed: int = 0) -> Tensor:
    return torch.randint(spec.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


# ---- the definitions, in f64 --------------------------------------------------------------------


def plainly(toy: ToyWeights, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """A sequence from its start -> logits [T, V] and the residual stream [T, H]."""
    spec = toy.spec
    x = toy.embedding[tokens].double() * spec.embedding_scale
    for index, layer in enumerate(spec.layers):
        name = layer_name(index)
        for block in layer.blocks:
            y = plain_norm(toy, f"{name}.{block.before}", x) if block.before else x
            if isinstance(block.body, Attention):
                y = plain_attention(toy, name, block.body, y)
            else:
                gate, up = (plain_product(toy, f"{name}.mlp.{p}_proj", y) for p in ("gate", "up"))
                silu = block.body.activation == "silu"
                gate = F.silu(gate) if silu else F.gelu(gate, approximate="tanh")
                y = plain_product(toy, f"{name}.mlp.down_proj", gate * up)
            if block.after:
                y = plain_norm(toy, f"{name}.{block.after}", y)
            x = x + block.multiplier * y
        if layer.scalar:
            x = x * toy.tensors[f"{name}.{layer.scalar}"].double()
    logits = plain_product(toy, HEAD, plain_norm(toy, FINAL_NORM, x)) / spec.logits_divisor
    if spec.logits_soft_cap is not None:
        logits = spec.logits_soft_cap * torch.tanh(logits / spec.logits_soft_cap)
    return logits[:, : spec.vocab_size], x


def plain_norm(toy: ToyWeights, name: str, x: Tensor) -> Tensor:
    weight = toy.tensors[f"{name}.weight"].double() + toy.spec.norm.zero_centered
    return without_weight(toy.spec, x) * weight


def without_weight(spec: ModelSpec, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + spec.norm.epsilon).sqrt()


def plain_product(toy: ToyWeights, name: str, x: Tensor) -> Tensor:
    bias = toy.tensors.get(f"{name}.bias")
    y = x @ toy.matrices[name].double().t()
    return y if bias is None else y + bias.double()


def plain_attention(toy: ToyWeights, layer: str, body: Attention, x: Tensor) -> Tensor:
    name, count = f"{layer}.{body.name}", len(x)
    letters = "qkk" if body.values_are_keys else "qkv"
    q, k, v = (plain_product(toy, f"{name}.{letter}_proj", x) for letter in letters)
    if body.qk_norm == "all_heads":
        q, k = plain_norm(toy, f"{name}.q_norm", q), plain_norm(toy, f"{name}.k_norm", k)
    q, k, v = (some.view(count, -1, body.head_size) for some in (q, k, v))
    if body.qk_norm == "head":
        q, k = plain_norm(toy, f"{name}.q_norm", q), plain_norm(toy, f"{name}.k_norm", k)
    if body.value_norm:
        v = without_weight(toy.spec, v)
    if body.rope is not None:
        q, k = plain_rotation(q, body.rope), plain_rotation(k, body.rope)
    positions = torch.arange(count)
    if body.query_growth is not None:
        growth = body.query_growth
        steps = (positions // growth.positions).double()
        q = q * (1 + growth.beta * (1 + steps).log())[:, None, None]
    back = positions[:, None] - positions
    hidden = (back < 0) | (back >= (body.window or count))
    repeats, heads = body.num_heads // body.num_kv_heads, []
    for head in range(body.num_heads):
        scores = q[:, head] @ k[:, head // repeats].t() * body.scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        heads.append(weights @ v[:, head // repeats])
    return plain_product(toy, f"{name}.o_proj", torch.cat(heads, dim=-1))


def plain_rotation(x: Tensor, rope: Rope) -> Tensor:
    """x [T, heads, D]: pairs of features as complex numbers, turned by position times frequency."""
    angles = torch.arange(len(x))[:, None] * rope_frequencies(rope).double()
    turn = torch.polar(torch.full_like(angles, rope.attention_factor), angles)[:, None]
    half = rope.size // 2
    if rope.interleaved:
        first, second = x[..., : rope.size : 2], x[..., 1 : rope.size : 2]
    else:
        first, second = x[..., :half], x[..., half : rope.size]
    turned = torch.complex(first, second) * turn
    parts = torch.stack((turned.real, turned.imag), -1)
    turned = (parts if rope.interleaved else parts.transpose(-1, -2)).flatten(-2)
    return torch.cat((turned, x[..., rope.size :]), dim=-1)


@pytest.mark.parametrize("name", SPECS)
def test_a_pass_is_what_its_spec_says(name: str) -> None:
    """300 rows: more than any loop takes at a time."""
    toy = random_weights(SPECS[name])
    tokens = tokens_of(toy.spec, 300)
    rows = causal_rows(empty_cache(toy.spec, SLOTS), tokens, attend)
    got, hidden = forward_hidden(
        shared_weights(toy, SLOTS), exact_weights(toy), [rows], gemm_ranges([300])
    )
    expected, expected_hidden = plainly(toy, tokens)
    assert got.shape == (300, toy.spec.vocab_size)
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(hidden.double(), expected_hidden, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "positions on some layers, windows on others"])
def test_batch_invariant_attention_computes_the_same_pass(name: str) -> None:
    toy = random_weights(SPECS[name])
    tokens = tokens_of(toy.spec, 70)
    rows = causal_rows(empty_cache(toy.spec, SLOTS), tokens, attend_batch_invariant)
    shared = shared_weights(toy, SLOTS)
    got = forward(shared, exact_weights(toy), [rows], gemm_ranges([70]))
    torch.testing.assert_close(got.double(), plainly(toy, tokens)[0], rtol=2e-4, atol=2e-4)


def test_the_residual_stream_is_what_the_final_norm_and_the_head_read() -> None:
    toy = random_weights(replace(LLAMA, dtype="bfloat16"))
    shared = shared_weights(toy, SLOTS)
    rows = causal_rows(empty_cache(toy.spec, SLOTS), tokens_of(toy.spec, 9), attend)
    logits, x = forward_hidden(shared, exact_weights(toy), [rows], gemm_ranges([9]))
    *_, head = exact_weights(toy)
    assert x.shape == (9, toy.spec.hidden_size)
    assert torch.equal(to_logits(shared, head, x, gemm_ranges([9])), logits)


def test_the_logits_of_some_rows_are_those_of_all_rows() -> None:
    toy = random_weights(LLAMA)
    shared, tokens, calls = shared_weights(toy, SLOTS), tokens_of(toy.spec, 9), gemm_ranges([9])
    caches = [empty_cache(toy.spec, SLOTS) for _ in range(2)]
    every = forward(shared, exact_weights(toy), [causal_rows(caches[0], tokens, attend)], calls)
    rows = [causal_rows(caches[1], tokens, attend)]
    wanted = HeadRows([slice(2, 5), slice(8, 9)], gemm_ranges([3, 1]))
    some, hidden = forward_hidden(shared, exact_weights(toy), rows, calls, wanted)
    assert some.shape == (4, toy.spec.vocab_size) and hidden.shape == (9, toy.spec.hidden_size)
    torch.testing.assert_close(some, every[[2, 3, 4, 8]])


# ---- roundings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds_late", [False, True])
def test_a_norms_weight_is_applied_before_or_after_rounding(rounds_late: bool) -> None:
    spec = replace(LLAMA, dtype="bfloat16", norm=NormStyle(1e-6, rounds_late))
    toy = random_weights(spec)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = toy.tensors[f"{FINAL_NORM}.weight"]
    wide = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    late, early = (wide * weight.double()).bfloat16(), wide.bfloat16() * weight
    got = normalize(shared_weights(toy, 1), FINAL_NORM, x)
    expected, other = (late, early) if rounds_late else (early, late)
    assert (got == expected).float().mean() > 0.999  # f32 decides a few ties otherwise
    assert (got == other).float().mean() < 0.9


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [16, 10])
def test_ropes_in_f32_are_rounded_once(interleaved: bool, size: int) -> None:
    rope = Rope(10_000.0, size, interleaved=interleaved)
    spec = replace(with_layers(rope=rope), dtype="bfloat16", rope_in_f32=True)
    toy = random_weights(spec)
    x = torch.randn(50, 4, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = plain_rotation(x.double(), rope)
    rounded = {}
    for in_f32 in (True, False):
        shared = shared_weights(replace(toy, spec=replace(spec, rope_in_f32=in_f32)), 50)
        tables = shared.tables[rope]
        assert tables[0].dtype == (F32 if in_f32 else BF16) and tables[0].shape == (50, size)
        got = rotate(x.transpose(0, 1), rope, tables, slice(50)).transpose(0, 1)
        assert got.dtype == BF16 and torch.equal(got[..., size:], x[..., size:])
        rounded[in_f32] = (got == expected.bfloat16()).float().mean()
    assert rounded[True] > 0.998 > rounded[False]


def test_a_rope_takes_the_rows_that_it_is_told_of_its_tables() -> None:
    rope = Rope(10_000.0, 16)
    tables = rope_tables(rope, 50)
    x = torch.randn(4, 50, 16, generator=torch.Generator().manual_seed(1))
    whole = rotate(x, rope, tables, slice(50))
    assert torch.equal(rotate(x[:, 20:31], rope, tables, slice(20, 31)), whole[:, 20:31])
    assert rotate(x, None, tables, slice(50)) is x


def test_queries_grow_by_whole_steps_of_their_position() -> None:
    attention = replace(LLAMA.layers[0].attentions[0], query_growth=QueryGrowth(0.1, 8192))
    positions = torch.tensor([0, 8191, 8192, 16383, 16384, 81920])
    got = grown(torch.ones(1, 6, 1), attention, positions).flatten()
    steps = torch.tensor([0.0, 0, 1, 1, 2, 10])
    torch.testing.assert_close(got, 1 + 0.1 * torch.log(1 + steps))
    plain = replace(attention, query_growth=None)
    assert torch.equal(grown(torch.ones(1, 6, 1), plain, positions), torch.ones(1, 6, 1))


# ---- in a batch


def chain(tokens: Tensor, width: int) -> TokenTree:
    """A tree without branches: token i + 1 below token i."""
    tree, count = root_only(tokens[:1], width), len(tokens)
    tree.tokens[:count] = tokens
    tree.parents[1:count] = torch.arange(count - 1)
    tree.depths[:count] = torch.arange(count)
    tree.ancestors[:count, :count] = torch.ones(count, count, dtype=torch.bool).tril()
    return replace(tree, num_nodes=count)


def prompted(toy: ToyWeights, shared: SharedWeights, length: int) -> Cache:
    """A cache with a prompt of so many tokens."""
    cache = empty_cache(toy.spec, SLOTS)
    tokens = tokens_of(toy.spec, length, seed=length)
    rows = [causal_rows(cache, tokens, attend)]
    forward(shared, exact_weights(toy), rows, gemm_ranges([length]))
    cache.commit(tokens.tolist())
    return cache


def verified(toy: ToyWeights, shared: SharedWeights, batch: list[Rows], width: int) -> Tensor:
    return forward(shared, exact_weights(toy), batch, gemm_ranges([width] * len(batch)))


COMPANY = {
    "llama": LLAMA,
    "everything": EVERYTHING,
    "ropes in f32, norms rounded late": SPECS["ropes in f32, norms rounded late"],
    "matrices without a substitute": SPECS["matrices without a substitute"],
}


@pytest.mark.parametrize("width", [1, 24])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", COMPANY)
def test_sequences_in_one_pass_have_the_bits_of_passes_alone(
    name: str, dtype: str, width: int
) -> None:
    """Of trees that have as many nodes as rows, also the last row: vectorised loops end in it."""
    toy = random_weights(replace(COMPANY[name], dtype=dtype))
    shared = shared_weights(toy, SLOTS)
    lengths = (5, 130, 61, 70)
    trees = [chain(tokens_of(toy.spec, width, seed), width) for seed in (1, 2, 3)]
    trees.append(root_only(torch.tensor([7]), width))
    together = [prompted(toy, shared, length) for length in lengths]
    rows = [whole_tree(tree, cache) for tree, cache in zip(trees, together, strict=True)]
    got = verified(toy, shared, rows, width).split(width)
    for length, tree, cache, logits in zip(lengths, trees, together, got, strict=True):
        alone = prompted(toy, shared, length)
        expected = verified(toy, shared, [whole_tree(tree, alone)], width)
        assert torch.equal(logits[: tree.num_nodes], expected[: tree.num_nodes])
        live = length + tree.num_nodes
        for mine, theirs in zip(cache.keys + cache.values, alone.keys + alone.values, strict=True):
            assert torch.equal(mine[:, :live], theirs[:, :live])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", COMPANY)
def test_a_token_deep_in_a_tree_has_the_bits_that_it_has_as_a_root(name: str, dtype: str) -> None:
    toy = random_weights(replace(COMPANY[name], dtype=dtype))
    shared, width = shared_weights(toy, SLOTS), 24
    tokens = tokens_of(toy.spec, width)
    tree = chain(tokens, width)
    cache = prompted(toy, shared, 50)
    deep = verified(toy, shared, [whole_tree(tree, cache)], width)
    plain = prompted(toy, shared, 50)
    for index, token in enumerate(tokens):
        root = root_only(token[None], width)
        logits = verified(toy, shared, [whole_tree(root, plain)], width)
        assert torch.equal(logits[0], deep[index]), f"node {index}"
        plain.commit([int(token)])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_a_rows_feed_forward_depends_neither_on_its_place_nor_on_the_number_of_threads(
    dtype: torch.dtype, num_threads: int
) -> None:
    """Threads share 24 rows of so many numbers at places that no vector ends at."""
    row = torch.randn(1, 18_944, generator=torch.Generator().manual_seed(0)).to(dtype) * 3

    def product(name: str, x: Tensor, calls: GemmRanges, gate: Tensor | None = None) -> Tensor:
        return x.clone() if gate is None else gate

    toy = random_weights(LLAMA)
    now = Pass(shared_weights(toy, 1), [], gemm_ranges([24]), torch.zeros(24, dtype=torch.int64))
    before = torch.get_num_threads()
    expected = feed_forward(now, Dense(18_944), product, row)
    try:
        torch.set_num_threads(num_threads)
        got = feed_forward(now, Dense(18_944), product, row.repeat(24, 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, expected.repeat(24, 1))


# ---- rope tables --------------------------------------------------------------------------------

ROPES = {
    "default": Rope(10_000.0, 64),
    "linear": Rope(10_000.0, 64, "linear", factor=4.0),
    "llama3": Rope(500_000.0, 64, "llama3", factor=8.0, original_max_positions=8192),
    "yarn": Rope(
        10_000.0, 64, "yarn", factor=4.0, original_max_positions=2048, attention_factor=1.2
    ),
    "yarn, whole": Rope(
        10_000.0, 64, "yarn", factor=8.0, original_max_positions=2048, beta_fast=24.0,
        beta_slow=2.0, truncate=False,
    ),
    "longrope": Rope(
        10_000.0, 64, "longrope", attention_factor=1.19,
        divisors=tuple(1 + 0.25 * index for index in range(32)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_rope_tables_equal_transformers(kind: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = ROPES[kind]
    parameters = {
        "rope_type": rope.kind,
        "rope_theta": rope.theta,
        "factor": rope.factor,
        "low_freq_factor": rope.low_frequency_factor,
        "high_freq_factor": rope.high_frequency_factor,
        "original_max_position_embeddings": rope.original_max_positions,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "truncate": rope.truncate,
        "attention_factor": rope.attention_factor,
        "short_factor": list(rope.divisors),
        "long_factor": list(rope.divisors),
    }
    scaled = ("rope_type", "rope_theta", "factor")
    original = "original_max_position_embeddings"
    wanted = {
        "default": scaled[:2],
        "linear": scaled,
        "llama3": (*scaled, "low_freq_factor", "high_freq_factor", original),
        "yarn": (*scaled, "beta_fast", "beta_slow", "truncate", "attention_factor", original),
        "longrope": (*scaled, "short_factor", "long_factor", "attention_factor", original),
    }[rope.kind]
    if rope.kind == "longrope":
        parameters[original] = 4096
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=32_768,
        rope_parameters={name: parameters[name] for name in wanted},
    )
    positions = torch.arange(3000)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float32), positions[None])
    got_cos, got_sin = rope_tables(rope, 3000)
    torch.testing.assert_close(got_cos, cos[0], rtol=0, atol=3e-4)
    torch.testing.assert_close(got_sin, sin[0], rtol=0, atol=3e-4)


def test_an_interleaved_rope_has_each_frequency_twice_in_a_row() -> None:
    (cos, sin), (other_cos, other_sin) = (
        rope_tables(Rope(10_000.0, 8, interleaved=flag), 20) for flag in (True, False)
    )
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(cos, other_cos[:, order]) and torch.equal(sin, other_sin[:, order])
