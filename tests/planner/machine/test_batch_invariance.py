"""A pass gives a row the same bits at any place, in a batch, with any number of threads; and an
operation that does not is found out.

The products here take a row at a time, so that only the other operations are judged, at any width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy_weights import empty_cache, exact_weights, random_weights, shared_weights
from toys import make_spec

from subspec.artifacts.model import Attention, Block, Dense, LayerSpec, NormStyle, QueryGrowth, Rope
from subspec.planner.machine import batch_invariance
from subspec.planner.machine.batch_invariance import rows_at_any_place
from subspec.planner.machine.excerpt import cancel_columns, cancelling
from subspec.runtime.kernels import linear
from subspec.runtime.kernels.linear import GemmRanges, gemm_ranges
from subspec.runtime.model import transformer
from subspec.runtime.model.transformer import Pass, Product

ATTENTION = Attention(
    num_heads=4, num_kv_heads=2, head_size=16, scale=0.25, rope=Rope(10_000.0, 16)
)
# Numbers of features that are no multiple of a vector, and enough for several threads.
SIZES = replace(
    make_spec(num_layers=1, vocab_size=1_003),
    hidden_size=1_037,
    layers=(LayerSpec((Block(ATTENTION, "before"), Block(Dense(4_999), "between"))),),
)


def attending(**changes: object) -> tuple[LayerSpec, ...]:
    first, second = SIZES.layers[0].blocks
    own = replace(ATTENTION, **changes)  # type: ignore[arg-type]
    return (LayerSpec((replace(first, body=own), second)),)


FORMS = {
    "no multiple of a vector": SIZES,
    "a vocabulary and a feed-forward that many threads share": replace(
        make_spec(num_layers=1, intermediate_size=18_944, hidden_size=64), vocab_size=40_000
    ),
    "norms rounded late, ropes in f32": replace(
        SIZES, norm=NormStyle(1e-5, rounds_late=True), rope_in_f32=True
    ),
    "norms of each head, seven to one": replace(
        SIZES, layers=attending(qk_norm="head", num_heads=7, num_kv_heads=1, head_size=18,
                                rope=Rope(500.0, 10, interleaved=True)),
    ),
    "norms over all heads, queries that grow, windows": replace(
        SIZES,
        layers=attending(qk_norm="all_heads", query_growth=QueryGrowth(0.3, 3), window=9,
                         qkv_bias=True, output_bias=True),
    ),
    "multipliers, norms on both sides": replace(
        SIZES,
        embedding_scale=5.5,
        logits_divisor=3.0,
        layers=tuple(
            LayerSpec(tuple(
                replace(block, after=f"after_{index}", multiplier=0.37)
                for index, block in enumerate(layer.blocks)
            ))
            for layer in SIZES.layers
        ),
    ),
    "gelu, norms around zero, values that are keys, scalars, capped logits": replace(
        SIZES,
        norm=NormStyle(1e-6, rounds_late=True, zero_centered=True),
        embedding_scale=5.5,
        rounds_embedding_scale=True,
        logits_soft_cap=3.0,
        layers=tuple(
            LayerSpec(
                (layer.blocks[0], Block(Dense(4_999, activation="gelu_tanh"), "between")), "scalar"
            )
            for layer in attending(values_are_keys=True, value_norm=True, qk_norm="head",
                                   rope=Rope(500.0, 16, "proportional", turning_pairs=2))
        ),
    ),
    "a feed-forward of gelu that many threads share": replace(
        make_spec(num_layers=1, hidden_size=64),
        layers=(LayerSpec((
            Block(ATTENTION, "before"), Block(Dense(40_007, activation="gelu_tanh"), "between")
        )),),
    ),
    "layers that differ, two attentions in one": replace(
        SIZES,
        layers=(
            *SIZES.layers,
            LayerSpec((*SIZES.layers[0].blocks, Block(replace(ATTENTION, name="other"), "third"))),
            *attending(rope=None),
            *SIZES.layers,
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def a_row_at_a_time(product: Product) -> Product:
    def run(name: str, x: Tensor, calls: GemmRanges, gate: Tensor | None = None) -> Tensor:
        gates = [None] * len(x) if gate is None else [row.clone() for row in gate.split(1)]
        rows = [row.clone() for row in x.split(1)]
        return torch.cat(
            [product(name, r, gemm_ranges([1]), g) for r, g in zip(rows, gates, strict=True)]
        )

    return run


def holds(name: str, dtype: str, num_threads: int, widths: tuple[int, ...]) -> list[int]:
    """The widths at which every operation but the products is batch-invariant."""
    torch.set_num_threads(num_threads)
    toy = random_weights(replace(FORMS[name], dtype=dtype))
    shared, cache = shared_weights(toy, 256), empty_cache(toy.spec, 256)
    cache.commit([0] * 40)
    products = [a_row_at_a_time(product) for product in exact_weights(toy)]
    return [w for w in widths if rows_at_any_place(shared, products, cache, w) is not None]


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", FORMS)
def test_every_operation_is_batch_invariant_with_three_threads(name: str, dtype: str) -> None:
    widths = (1, 7, 24)
    assert holds(name, dtype, 3, widths) == list(widths)


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [2, 4, 12])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", FORMS)
def test_every_operation_is_batch_invariant_with_any_number_of_threads(
    name: str, dtype: str, num_threads: int
) -> None:
    widths = (2, 8, 13, 31, 64)
    assert holds(name, dtype, num_threads, widths) == list(widths)


def last_row_differs(rows: Tensor) -> Tensor:
    rows[-1] += rows[-1].abs().clamp(min=0.01) * 0.01
    return rows


@contextmanager
def disturbed(where: str) -> Iterator[None]:
    """Inside the block an operation of passes looks at the place of a row."""

    def after(name: str, function: Callable[..., Tensor], dim: int = 0) -> Callable[..., Tensor]:
        def run(*given: object) -> Tensor:
            out = function(*given)
            last_row_differs(out.transpose(0, dim))
            return out

        return run

    silu = F.silu

    def gating(gate: Tensor, inplace: bool) -> Tensor:
        return last_row_differs(silu(gate, inplace=inplace))

    def product(x: Tensor, weight: Tensor, out: Tensor, calls: GemmRanges) -> None:
        linear.exact_product(x, weight, out, calls)
        last_row_differs(out)

    with pytest.MonkeyPatch.context() as patch:
        if where == "a norm":
            patch.setattr(transformer, "normalize", after(where, transformer.normalize))
        elif where == "a rope":
            patch.setattr(transformer, "rotate", after(where, transformer.rotate, 1))
        elif where == "queries that grow":
            patch.setattr(transformer, "grown", after(where, transformer.grown, 1))
        elif where == "the attention":
            attend = batch_invariance.attend_batch_invariant
            patch.setattr(batch_invariance, "attend_batch_invariant", after(where, attend, 1))
        elif where == "a gate":
            patch.setattr(F, "silu", gating)
        elif where == "a product":
            patch.setattr("subspec.runtime.stream.exact_weights.exact_product", product)
        yield


@pytest.mark.parametrize(
    "where", ["a norm", "a rope", "queries that grow", "the attention", "a gate", "a product"]
)
@torch.inference_mode()
def test_an_operation_that_looks_at_the_place_of_a_row_is_found_out(where: str) -> None:
    torch.set_num_threads(1)
    toy = random_weights(
        make_spec(num_layers=1, hidden_size=64, intermediate_size=128, head_size=16)
    )
    shared, cache = shared_weights(toy, 256), empty_cache(toy.spec, 256)
    cache.commit([0] * 40)
    found = partial(rows_at_any_place, shared, exact_weights(toy), cache, 16)
    assert found()
    with disturbed(where):
        assert not found()
    assert found()


def test_gates_that_threads_share_are_found_out() -> None:
    """As torch computes them in f32, the last numbers of each thread's share by other code."""
    torch.set_num_threads(3)
    toy = random_weights(replace(make_spec(num_layers=1, intermediate_size=8_960), dtype="float32"))
    shared, cache = shared_weights(toy, 256), empty_cache(toy.spec, 256)
    products = [a_row_at_a_time(product) for product in exact_weights(toy)]
    assert rows_at_any_place(shared, products, cache, 56) is not None
    row = torch.randn(1, 8_960, generator=torch.Generator().manual_seed(0))
    if len(F.silu(row.repeat(56, 1)).unique(dim=0)) == 1:
        pytest.skip("torch computes all numbers alike on this processor")

    def over_all_rows(now: Pass, body: Dense, product: Product, x: Tensor) -> Tensor:
        gate = F.silu(product(f"{body.name}.gate_proj", x, now.calls))
        inner = product(f"{body.name}.up_proj", x, now.calls, gate)
        return product(f"{body.name}.down_proj", inner, now.calls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "feed_forward", over_all_rows)
        assert rows_at_any_place(shared, products, cache, 56) is None


@torch.inference_mode()
def test_widths_at_which_products_add_in_another_order_are_told_apart() -> None:
    """As oneDNN's do on processors with AMX, from 33 rows on: one of ten thousand bf16 results
    differs, so that the rows of a layer often show nothing."""
    torch.set_num_threads(1)
    toy = random_weights(
        make_spec(num_layers=1, hidden_size=512, intermediate_size=1024, vocab_size=64)
    )
    for matrix in toy.matrices.values():
        cancel_columns(matrix)
    shared, cache = shared_weights(toy, 256), empty_cache(toy.spec, 256)

    def product(x: Tensor, weight: Tensor, out: Tensor, calls: GemmRanges) -> None:
        for rows in calls:
            order = -1 if rows.stop - rows.start > 32 else 1
            for row in range(rows.start, rows.stop):
                numbers = x[row].float(), weight.float()
                ours, theirs = (one.flip(-1) if order < 0 else one for one in numbers)
                out[row] = theirs @ ours

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subspec.runtime.stream.exact_weights.exact_product", product)
        few, more, many = (
            rows_at_any_place(shared, exact_weights(toy), cache, width) for width in (8, 24, 40)
        )
    assert few is not None and more is not None and many is not None
    assert all(map(torch.equal, few, more))
    assert not all(map(torch.equal, few, many))


@torch.inference_mode()
def test_sums_that_cancel_are_nothing_but_rounding() -> None:
    matrix = torch.randn(8, 301, generator=torch.Generator().manual_seed(0))
    cancel_columns(matrix)
    x = cancelling(torch.randn(5, 301, generator=torch.Generator().manual_seed(1)))
    left = x.double() @ matrix.double().T
    unpaired = [column for column in range(301) if not (matrix[:, column, None] == -matrix).any()]
    assert len(unpaired) == 1
    alone = x[:, unpaired].double() @ matrix[:, unpaired].double().T
    torch.testing.assert_close(left, alone, rtol=0, atol=1e-12)
