"""The CPU kernels against what they replaced and against the memory's own speed, in one run.

    python benchmarks/kernels.py [--layers 24 --hidden 2048 --inner 5632]

4-bit products of one draft step (all matrices of all layers, so that nothing stays in a cache) at
several rows: ours, ATen's, and the time to read the same bytes once. One whole draft step behind
512 tokens, head included: its products alone, compiled, by the plain twin, and what share of either
the products are. Exact attention: ours and its plain twin. Decoding of residuals is in
benchmarks/residual.py. The last line of stdout is one JSON object; milliseconds, lower quartiles.
"""

import json
import sys
from collections.abc import Callable

import click
import torch
from torch import Tensor

from subspec.artifacts.common.command import reported
from subspec.artifacts.model import ModelSpec, Rope, linears, resident_tensors
from subspec.artifacts.plan import Int4Kernel
from subspec.planner.machine.excerpt import fill_with_noise, random_substitute
from subspec.planner.machine.timing import time_each
from subspec.runtime.decode import tree_rows
from subspec.runtime.draft import compiled_layers
from subspec.runtime.draft.beam import root_only
from subspec.runtime.draft.compiled_layers import compile_layers
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.kernels.linear import Int4Weight, int4_product, pack, packed_bytes
from subspec.runtime.memory import host_buffer
from subspec.runtime.model.attention import attend, attend_batch_invariant, attend_in_fp64
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.transformer import forward, make_decoder

CPU = torch.device("cpu")
ROWS = (1, 2, 3, 4, 8, 16)
STEP_ROWS = (1, 2, 3, 4, 8)
TOKENS = 512  # in the cache before a draft step
HEAD_SIZE, VOCABULARY = 128, 32_768
KERNELS: tuple[Int4Kernel, ...] = ("w4a8", "aten")
ATTENTION = (  # query heads, KV heads, rows, slots, head size
    (16, 16, 64, 600, 128),
    (16, 16, 16, 600, 128),
    (28, 4, 64, 2048, 128),
    (28, 4, 8, 2048, 128),
    (14, 2, 64, 600, 64),
)


def draft_weights(kernel: Int4Kernel, layers: int, hidden: int, inner: int) -> list[Int4Weight]:
    shapes = [*[(hidden, hidden)] * 4, (inner, hidden), (inner, hidden), (hidden, inner)]
    made = {shape: random_substitute(*shape) for shape in set(shapes)}
    found = []
    for shape in shapes * layers:
        room = [torch.empty(count, dtype=torch.uint8) for count in packed_bytes(*shape, kernel)]
        found.append(pack(*made[shape], kernel, *room))
    return found


def draft_step(weights: list[Int4Weight], rows: int) -> Callable[[], None]:
    columns = {2 * weight.packed.shape[1] for weight in weights}
    x = {count: torch.randn(rows, count).bfloat16() for count in columns}

    def run() -> None:
        for weight in weights:
            int4_product(x[2 * weight.packed.shape[1]], weight)

    return run


def draft_passes(
    layer_weights: list[Int4Weight], layers: int, hidden: int, inner: int
) -> Callable[[int], dict[str, Callable[[], object]]]:
    """Of a model whose layers have these weights: ways to run so many rows of a draft."""
    heads, slots = hidden // HEAD_SIZE, TOKENS + 64
    spec = ModelSpec(
        family="llama",
        dtype="bfloat16",
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=HEAD_SIZE,
        vocab_size=VOCABULARY,
        norm_epsilon=1e-6,
        max_positions=slots,
        rope=Rope(10_000.0),
        tied_head=False,
    )
    room = [
        torch.empty(count, dtype=torch.uint8) for count in packed_bytes(VOCABULARY, hidden, "w4a8")
    ]
    weights = [*layer_weights, pack(*random_substitute(VOCABULARY, hidden), "w4a8", *room)]
    named = zip(linears(spec), weights, strict=True)
    substitutes = Substitutes(layers, {(n.layer, n.kind): weight for n, weight in named}, {})
    small = {name: torch.ones(*shape).bfloat16() for name, shape in resident_tensors(spec).items()}
    decoder = make_decoder(spec, small, slots, torch.bfloat16, torch.clone)
    shape = (layers, 2, heads, slots, HEAD_SIZE)
    room_of_cache = host_buffer(2 * torch.Size(shape).numel())  # in huge pages, as a session's is
    cache = Cache(room_of_cache.view(torch.bfloat16).view(shape), [0] * TOKENS)
    fill_with_noise(cache.keys_values, 1.0)
    compiled = compile_layers(decoder, substitutes, cache)
    assert compiled is not None

    def passes(num_rows: int) -> dict[str, Callable[[], object]]:
        tree = root_only(torch.zeros(1, dtype=torch.int64), num_rows)
        rows = tree_rows(tree, torch.arange(num_rows), cache.behind(num_rows))
        return {
            "products": draft_step(weights, num_rows),
            "compiled": lambda: compiled_layers.forward(compiled, rows, cache),
            "twin": lambda: forward(decoder, substitutes, rows, cache, attend),
        }

    return passes


def read_once(weights: list[Int4Weight]) -> Callable[[], None]:
    pieces = [w.packed.view(-1).view(torch.int64) for w in weights]
    pieces += [weight.qparams.view(-1).view(torch.int64) for weight in weights]

    def run() -> None:
        for piece in pieces:
            piece.max()

    return run


def attention_inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, kv_heads, rows, slots, size = shape
    q = torch.randn(heads, rows, size).bfloat16()
    keys, values = torch.randn(2, kv_heads, slots, size).bfloat16()
    return q, keys, values, torch.arange(slots) < slots - rows + torch.arange(rows)[:, None]


@click.command()
@click.option("--layers", default=24, show_default=True)
@click.option("--hidden", default=2048, show_default=True)
@click.option("--inner", default=5632, show_default=True)
@reported
def main(layers: int, hidden: int, inner: int) -> None:
    """Time the CPU kernels of this machine."""
    found: dict[str, dict[str, float]] = {}
    shares: dict[str, dict[str, float]] = {}

    def say(name: str, actions: dict[str, Callable[[], object]]) -> None:
        times = time_each(list(actions.values()), CPU)
        found[name] = {what: 1e3 * t for what, (t, _) in zip(actions, times, strict=True)}
        words = "  ".join(f"{what} {ms:8.2f} ms" for what, ms in found[name].items())
        print(f"{name:28} {words}", file=sys.stderr)

    torch.manual_seed(0)
    with torch.inference_mode():
        weights = {kernel: draft_weights(kernel, layers, hidden, inner) for kernel in KERNELS}
        for rows in ROWS:
            steps: dict[str, Callable[[], object]] = {"read": read_once(weights["w4a8"])}
            steps |= {kernel: draft_step(some, rows) for kernel, some in weights.items()}
            say(f"draft products, {rows} rows", steps)
        passes = draft_passes(weights["w4a8"], layers, hidden, inner)
        for rows in STEP_ROWS:
            name = f"one draft step, {rows} rows"
            say(name, passes(rows))
            shares[name] = {
                way: found[name]["products"] / found[name][way] for way in ("compiled", "twin")
            }
            words = ", ".join(f"{share:.0%} of {way}" for way, share in shares[name].items())
            print(f"{'':28} the products are {words}", file=sys.stderr)
        for shape in ATTENTION:
            given = attention_inputs(shape)
            say(
                f"attention {' '.join(map(str, shape))}",
                {
                    "ours": lambda given=given: attend_batch_invariant(*given),  # type: ignore[misc]
                    "twin": lambda given=given: attend_in_fp64(*given),  # type: ignore[misc]
                },
            )
    threads = torch.get_num_threads()
    print(json.dumps({"threads": threads, "milliseconds": found, "products_share": shares}))


if __name__ == "__main__":
    main()
