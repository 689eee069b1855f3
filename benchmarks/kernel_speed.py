"""The CPU kernels against what they replaced and against the memory's own speed, in one run.

    python benchmarks/kernel_speed.py [--layers 24 --hidden 2048 --inner 5632 --heads 16
        --kv-heads 16 --vocabulary 32768 --hybrid]
        [--only levels|draft|graphs|exact|attention ...]

4-bit products of one draft step (all matrices of all layers and the head, so that nothing stays in
a cache) at several rows: ours, ATen's, and the time to read the same bytes once. One whole draft
step behind 512 tokens: compiled, its products alone, and by the plain twin. One whole level of a
draft, the 13th, with all that is beside the layers, against the time to read its bytes (weights,
and states of delta nets) at the rate of a large sum. The same draft step by graphs that torch
compiles (a minute, the first time), as layers have that the C++ does not know, and by the plain
twin. Exact products of bf16, hidden x inner: ours,
which take torch's place on CPUs without instructions for bf16, torch's, and torch's in f32. Exact
attention: ours and its plain twin. Each beside its ratio to ours. Decoding of residuals is in
benchmarks/residual.py. The last line of stdout is one JSON object; milliseconds, medians.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle

import click
import torch
from torch import Tensor

from subspec.artifacts.common.command import reported
from subspec.artifacts.footprint import (
    Shape,
    cache_slots,
    make_ledger,
    memory_bytes,
    substitutes_bytes,
)
from subspec.artifacts.model import (
    Attention,
    Block,
    DeltaNet,
    Dense,
    LayerSpec,
    ModelSpec,
    NormStyle,
    Rope,
    layer_name,
)
from subspec.artifacts.plan import Int4Kernel, Ledger, Tree
from subspec.planner.machine.compile_graphs import compile_graphs
from subspec.planner.machine.excerpt import RandomWeights, fill_with_noise, random_rows
from subspec.planner.machine.timing import USUAL_EFFORT, Effort, time_each
from subspec.runtime.draft import compiled_graphs, compiled_layers
from subspec.runtime.draft.beam import Level, PartialTree, add_level, root_only
from subspec.runtime.draft.compiled_graphs import load_graphs
from subspec.runtime.draft.compiled_layers import compile_layers
from subspec.runtime.draft.drafter import DecodeState, SubstituteDrafter, drafted_rows
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.kernels import bf16
from subspec.runtime.kernels.linear import Int4Weight, gemm_ranges
from subspec.runtime.load import make_substitutes, place_substitutes, place_tensors
from subspec.runtime.memory import FastMemory
from subspec.runtime.model.attention import attend_batch_invariant, attend_in_fp64
from subspec.runtime.model.cache import make_cache
from subspec.runtime.model.net_state import make_net_states
from subspec.runtime.model.transformer import Rows, forward, make_shared, make_tables

CPU = torch.device("cpu")
GROUPS = ("levels", "draft", "graphs", "exact", "attention")
ROWS = (1, 2, 3, 4, 8, 16)
EXACT_ROWS = (1, 8, 16, 32, 64, 256)
STEP_ROWS = (1, 2, 3, 4, 8)
LEVEL_WIDTHS = (1, 2, 4)
LEVELS_BEFORE = 12  # the level that is timed; delta nets read the nodes above
LONG_EFFORT = replace(USUAL_EFFORT, action_seconds=1.0)  # of levels
INTERVAL = 4  # of a hybrid's layers every fourth attends
NET_HEAD_SIZE = 128
TOKENS = 512  # in the cache before a draft step
TREE_ROWS = 63  # that the cache has room for behind them
SUMMED_BYTES = 256 << 20  # of the sum; larger than caches
ATTENTION = (  # query heads, KV heads, rows, slots, head size
    (16, 16, 64, 600, 128),
    (16, 16, 16, 600, 128),
    (28, 4, 64, 2048, 128),
    (28, 4, 8, 2048, 128),
    (14, 2, 64, 600, 64),
)

Actions = dict[str, Callable[[], object]]


def model_of(
    layers: int,
    hidden: int,
    inner: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    hybrid: bool = False,
) -> ModelSpec:
    """A Llama; or a hybrid, as Qwen3.5 is."""
    size = hidden // heads
    rope = Rope(10_000.0, size // 4 if hybrid else size)
    attention = Attention(heads, kv_heads, size, scale=size**-0.5, rope=rope)
    if hybrid:
        attention = replace(attention, output_gate=True, qk_norm="head")
    net_heads = hidden // NET_HEAD_SIZE
    net = DeltaNet(
        max(1, net_heads // 2), net_heads, NET_HEAD_SIZE, NET_HEAD_SIZE, conv_kernel_size=4
    )

    def layer(index: int) -> LayerSpec:
        mixer = net if hybrid and (index + 1) % INTERVAL else attention
        return LayerSpec(
            (Block(mixer, "input_layernorm"), Block(Dense(inner), "post_attention_layernorm"))
        )

    return ModelSpec(
        family="hybrid" if hybrid else "llama",
        dtype="bfloat16",
        hidden_size=hidden,
        vocab_size=vocabulary,
        max_positions=cache_slots(TOKENS, TREE_ROWS),
        layers=tuple(layer(index) for index in range(layers)),
        norm=NormStyle(1e-6, rounds_late=hybrid, zero_centered=hybrid),
        tie_word_embeddings=False,
    )


def random_substitutes(spec: ModelSpec, kernel: Int4Kernel) -> Substitutes:
    memory = FastMemory(CPU, Ledger(substitutes=substitutes_bytes(spec, kernel)))
    packed = place_substitutes(spec, kernel, memory, RandomWeights(torch.bfloat16))
    exact = {
        f"{one.name}.weight": torch.randn(one.out_features, one.in_features).bfloat16()
        for one in spec.linears
        if not one.has_substitute
    }
    return make_substitutes(spec, exact, packed, torch.clone)


def draft_products(spec: ModelSpec, substitutes: Substitutes, rows: int) -> Callable[[], None]:
    """All products of one draft step, and nothing else."""
    products = list(substitutes)
    sizes = {linear.in_features for linear in spec.linears}
    x = {size: torch.randn(rows, size).bfloat16() for size in sizes}
    calls = [
        (products[n.layer], n.name.removeprefix(f"{layer_name(n.layer)}."), x[n.in_features])
        for n in spec.linears
    ]

    def run() -> None:
        for product, name, inputs in calls:
            product(name, inputs, rows)

    return run


def draft_steps(
    spec: ModelSpec, substitutes: Substitutes
) -> tuple[Callable[[int], Actions], Callable[[int], Actions], Callable[[int], Actions]]:
    """Rows of a draft -> the ways to run so many; a whole level beside the reading of its bytes;
    compiled graphs and what they replace."""
    slots = cache_slots(TOKENS, TREE_ROWS)
    shape = Shape(TOKENS, 1, TREE_ROWS, 1, prefill_chunk_tokens=1, num_threads=1, head_rows=1)
    purposes = make_ledger(spec, "cpu", "w4a8", shape, 0, 0)
    memory = FastMemory(CPU, replace(purposes, substitutes=0))
    tensors = place_tensors(spec, memory, RandomWeights(torch.bfloat16))
    embedding = random_rows(spec, CPU)
    tables = make_tables(spec, slots, torch.bfloat16, torch.clone)
    weights = make_shared(spec, embedding, tensors, tables, torch.bfloat16, torch.clone)

    def take(size: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return memory.take_tensor("cache", size, kind)

    cache = make_cache(spec, slots, take, make_net_states(spec, TREE_ROWS, tensors, take))
    cache.commit([0] * TOKENS)
    states = [state for net in cache.nets for state in vars(net.committed).values()]
    for kept in (*cache.keys, *cache.values, *states):
        fill_with_noise(kept, 1.0)
    compiled = compile_layers(weights, substitutes)
    assert compiled is not None

    def batch_of(num_rows: int) -> list[Rows]:
        tree = root_only(torch.zeros(1, dtype=torch.int64), num_rows)
        level = Level(torch.arange(num_rows), torch.zeros(num_rows))
        return [drafted_rows(tree, level, cache, cache.tree_slots(num_rows))]

    def graphs(num_rows: int) -> Actions:
        problem, rows = compile_graphs(spec), batch_of(num_rows)
        loaded = load_graphs(weights, substitutes)
        assert loaded is not None, problem
        return {
            "graphs": lambda: compiled_graphs.forward(loaded, rows),
            "twin": lambda: forward(weights, substitutes, rows, gemm_ranges([num_rows])),
        }

    def steps(num_rows: int) -> Actions:
        rows = batch_of(num_rows)
        return {
            "compiled": lambda: compiled_layers.forward(compiled, rows),
            "products": draft_products(spec, substitutes, num_rows),
            "twin": lambda: forward(weights, substitutes, rows, gemm_ranges([num_rows])),
        }

    def levels(width: int) -> Actions:
        tree, num_rows = Tree(width, LEVELS_BEFORE + 1), 1 + (LEVELS_BEFORE + 1) * width
        drafter = SubstituteDrafter((tree,), num_rows, weights, substitutes, compiled)
        [grown] = drafter.draft([DecodeState(cache, 0, LEVELS_BEFORE + 1)])  # and another's token
        children = torch.arange(grown.num_nodes, num_rows)
        nodes = children - width
        last = Level(nodes, torch.zeros(width))

        def level() -> None:
            draft_pass = drafter.pass_over([cache], [cache.tree_slots(num_rows)])
            add_level(grown, last, children, tree, draft_pass([PartialTree(0, grown, last)]))

        num_bytes = sum(memory_bytes(spec, net) for net in spec.delta_nets)
        num_bytes += substitutes_bytes(spec, "w4a8")
        num_bytes += sum(
            n.num_weights * spec.item_bytes for n in spec.linears if not n.has_substitute
        )
        return {"level": level, "reading": sum_of(num_bytes)}

    return steps, levels, graphs


def sum_of(num_bytes: int) -> Callable[[], object]:
    """Sums over so many bytes, each time others, which no cache has."""
    count = num_bytes // 4
    memory = torch.ones(max(count, SUMMED_BYTES // 4))
    pieces = cycle(memory[: len(memory) // count * count].split(count))
    return lambda: next(pieces).sum()


def read_once(substitutes: Substitutes) -> Callable[[], None]:
    weights = [one for one in substitutes.weights.values() if isinstance(one, Int4Weight)]
    pieces = [one.packed.view(-1).view(torch.int64) for one in weights]
    pieces += [one.qparams.view(-1).view(torch.int64) for one in weights]

    def run() -> None:
        for piece in pieces:
            piece.max()

    return run


def exact_products(columns: int, weight_rows: int, rows: int) -> Actions:
    x, weight = torch.randn(rows, columns).bfloat16(), torch.randn(weight_rows, columns).bfloat16()
    out, wide_x, wide_weight = x.new_empty(rows, weight_rows), x.float(), weight.float()
    return {
        "ours": lambda: bf16.product(x, weight, out, torch.get_num_threads()),
        "torch": lambda: torch.mm(x, weight.t(), out=out),
        "torch, f32": lambda: torch.mm(wide_x, wide_weight.t()),
    }


def exact_attention(shape: tuple[int, ...]) -> Actions:
    heads, kv_heads, rows, slots, size = shape
    q = torch.randn(heads, rows, size).bfloat16()
    keys, values = torch.randn(2, kv_heads, slots, size).bfloat16()
    visible = torch.arange(slots) < slots - rows + torch.arange(rows)[:, None]
    given: tuple[Tensor, Tensor, Tensor, Tensor, float] = (q, keys, values, visible, size**-0.5)
    return {
        "ours": lambda: attend_batch_invariant(*given),
        "twin": lambda: attend_in_fp64(*given),
    }


@click.command()
@click.option("--layers", default=24, show_default=True)
@click.option("--hidden", default=2048, show_default=True)
@click.option("--inner", default=5632, show_default=True)
@click.option("--heads", default=16, show_default=True)
@click.option("--kv-heads", default=16, show_default=True)
@click.option("--vocabulary", default=32_768, show_default=True)
@click.option("--hybrid", is_flag=True, help="Of four layers three are gated delta nets.")
@click.option("--only", multiple=True, type=click.Choice(GROUPS), help="Of these.  [default: all]")
@reported
def main(
    layers: int,
    hidden: int,
    inner: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    hybrid: bool,
    only: tuple[str, ...],
) -> None:
    """Time the CPU kernels of this machine."""
    found: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    of_reading: dict[str, float] = {}  # a level over the reading of its bytes, by its width

    def compare(name: str, actions: Actions, effort: Effort = USUAL_EFFORT) -> None:
        """The first one is ours."""
        times = time_each(list(actions.values()), CPU, effort)
        found[name] = {what: 1e3 * t for what, (t, _) in zip(actions, times, strict=True)}
        (ours, first), *others = found[name].items()
        ratios[name] = {what: ms / first for what, ms in others}
        words = [f"{what} {ms:8.2f} ms ({ms / first:.2f}x)" for what, ms in others]
        print(f"{name:28} {ours} {first:8.2f} ms  {'  '.join(words)}", file=sys.stderr)

    torch.manual_seed(0)
    spec = model_of(layers, hidden, inner, heads, kv_heads, vocabulary, hybrid)
    with torch.inference_mode():
        wanted = only or GROUPS
        if "exact" in wanted and bf16.unavailable() is None:
            for rows in EXACT_ROWS:
                compare(f"exact products, {rows} rows", exact_products(hidden, inner, rows))
        drafts = {"levels", "draft", "graphs"} & {*wanted}
        w4a8 = random_substitutes(spec, "w4a8") if drafts else None
        if w4a8 is not None:
            steps, levels, graphs = draft_steps(spec, w4a8)
        if "levels" in wanted:
            for width in LEVEL_WIDTHS:
                compare(name := f"one draft level, {width} wide", levels(width), LONG_EFFORT)
                of_reading[str(width)] = 1 / ratios[name]["reading"]
        if w4a8 is not None and "draft" in wanted:
            both: dict[Int4Kernel, Substitutes] = {
                "w4a8": w4a8,
                "aten": random_substitutes(spec, "aten"),
            }
            for rows in ROWS:
                products: Actions = {
                    kernel: draft_products(spec, some, rows) for kernel, some in both.items()
                }
                products["read"] = read_once(w4a8)
                compare(f"draft products, {rows} rows", products)
            for rows in STEP_ROWS:
                compare(f"one draft step, {rows} rows", steps(rows))
        if "graphs" in wanted and w4a8 is not None and compiled_graphs.serves(spec):
            for rows in STEP_ROWS:
                compare(f"compiled graphs, {rows} rows", graphs(rows), LONG_EFFORT)
        if "attention" in wanted:
            for shape in ATTENTION:
                compare(f"attention {' '.join(map(str, shape))}", exact_attention(shape))
    threads = torch.get_num_threads()
    result = {"threads": threads, "milliseconds": found, "ratios": ratios}
    print(json.dumps(result | {"level_over_reading": of_reading}))


if __name__ == "__main__":
    main()
