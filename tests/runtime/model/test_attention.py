"""Attention: the fast kernel, the compiled one that verification uses, and its plain twin."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import Build, built
from torch import Tensor

from subspec.artifacts.footprint import attention_scratch_bytes
from subspec.runtime.model import attention
from subspec.runtime.model.attention import (
    attend,
    attend_batch_invariant,
    attend_in_fp64,
    attend_in_order,
)

A, B, T, S, D = 14, 2, 24, 192, 32  # query heads, KV heads, rows, slots, head size
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, float]
BUILDS = {
    "native": Build((), ""),
    "avx512f": Build(("-march=haswell", "-mavx512f"), "avx512f"),
    "avx2": Build(("-march=haswell",), "avx2"),
    "sse2": Build(("-march=x86-64",), "sse2"),
}
SHAPES = [  # A, B, T, S, D
    (14, 2, 24, 192, 32),
    (4, 4, 5, 37, 48),
    (7, 1, 17, 130, 64),
    (3, 3, 1, 64, 128),
    (2, 1, 70, 75, 18),
]


@pytest.fixture(scope="module", params=BUILDS)
def build(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """attend_in_order() as it is, and as built for other instruction sets."""
    with built(BUILDS[request.param], tmp_path_factory.mktemp("cache")):
        assert attention.unavailable() is None
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """A test may change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(dtype: torch.dtype, shape: tuple[int, int, int, int, int] = (A, B, T, S, D)) -> Inputs:
    """Rows that see one slot more each, in a cache that has more slots than are live."""
    a, b, t, s, d = shape
    generator = torch.Generator().manual_seed(a * s)
    q = torch.randn(a, t, d, generator=generator).to(dtype)
    keys, values = torch.randn(2, b, s + 3, d, generator=generator).to(dtype)[:, :, :s]
    visible = torch.arange(s) <= (s - t) * 3 // 5 + torch.arange(t)[:, None]
    return q, keys, values, visible, d**-0.5


def equal_bits(got: Tensor, expected: Tensor) -> bool:
    """Zeros of either sign are not the same."""
    of_size = {4: torch.int32, 2: torch.int16}[got.element_size()]
    return torch.equal(got.contiguous().view(of_size), expected.contiguous().view(of_size))


def with_slots(tensor: Tensor, where: Tensor, count: int, fill: float) -> Tensor:
    """keys or values with slot i at where[i] of `count` slots, and `fill` in all others."""
    wide = torch.full((tensor.shape[0], count, tensor.shape[2]), fill, dtype=tensor.dtype)
    wide[:, where] = tensor
    return wide


# ---- every kernel -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("scale", [D**-0.5, 0.5])
def test_all_agree_with_grouped_query_attention_of_torch(dtype: torch.dtype, scale: float) -> None:
    q, keys, values, visible, _ = inputs(dtype)
    k, v = (t.float().repeat_interleave(A // B, 0) for t in (keys, values))
    expected = F.scaled_dot_product_attention(q.float(), k, v, attn_mask=visible, scale=scale)
    tolerance = 1e-5 if dtype == F32 else 2e-2
    for attention_of in (attend, attend_batch_invariant, attend_in_fp64):
        got = attention_of(q, keys, values, visible, scale).float()
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_a_kernel_may_return_its_rows_outermost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the memory-efficient one does on GPUs."""
    given, real = inputs(torch.bfloat16), F.scaled_dot_product_attention
    expected = attend(*given)

    def rows_outermost(*tensors: Tensor, **settings: Tensor) -> Tensor:
        return real(*tensors, **settings).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", rows_outermost)
    assert equal_bits(attend(*given), expected)


def test_without_a_compiler_the_plain_twin_is_what_verifies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "unavailable", lambda: "there is none")
    assert equal_bits(attend_batch_invariant(*inputs(BF16)), attend_in_fp64(*inputs(BF16)))


# ---- the plain twin -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_plain_twin_gives_the_same_bits_wherever_the_slots_are(
    dtype: torch.dtype,
) -> None:
    q, keys, values, visible, scale = inputs(dtype)
    expected = attend_in_fp64(q, keys, values, visible, scale)
    for seed in range(5):
        order = torch.randperm(S, generator=torch.Generator().manual_seed(seed))
        moved = attend_in_fp64(q, keys[:, order], values[:, order], visible[:, order], scale)
        assert torch.equal(moved, expected)


def test_the_plain_twin_ignores_how_many_hidden_slots_there_are() -> None:
    q, keys, values, visible, scale = inputs(BF16)
    expected = attend_in_fp64(q, keys, values, visible, scale)
    shorter = attend_in_fp64(q, keys[:, :128], values[:, :128], visible[:, :128], scale)
    assert torch.equal(shorter, expected)


# ---- the compiled kernel ------------------------------------------------------------------------


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("shape", SHAPES)
def test_in_f32_it_differs_from_the_plain_twin_by_rounding_only(
    shape: tuple[int, int, int, int, int],
) -> None:
    got, expected = attend_in_order(*inputs(F32, shape)), attend_in_fp64(*inputs(F32, shape))
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_in_16_bits_it_returns_what_the_plain_twin_does_but_for_ties(dtype: torch.dtype) -> None:
    enough, step = (0.997, 2**-7) if dtype == BF16 else (0.98, 2**-10)
    for shape in SHAPES:
        got = attend_in_order(*inputs(dtype, shape))
        expected = attend_in_fp64(*inputs(dtype, shape))
        assert (got == expected).float().mean() >= enough
        torch.testing.assert_close(got, expected, rtol=step, atol=2e-6)


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("dtype", [F32, BF16, FP16])
@pytest.mark.parametrize("fill", [1.0, float("nan"), float("inf")])
def test_hidden_slots_between_or_behind_the_others_change_nothing_whatever_is_in_them(
    dtype: torch.dtype, fill: float
) -> None:
    for shape in SHAPES:
        q, keys, values, visible, scale = inputs(dtype, shape)
        expected = attend_in_order(q, keys, values, visible, scale)
        slots = shape[3]
        for seed, count in enumerate((slots, slots + 1, slots + 13, 2 * slots, 5 * slots)):
            generator = torch.Generator().manual_seed(seed)
            where = torch.randperm(count, generator=generator)[:slots].sort().values
            k, v = (with_slots(tensor, where, count, fill) for tensor in (keys, values))
            mask = torch.zeros(len(visible), count, dtype=torch.bool)
            mask[:, where] = visible
            assert equal_bits(attend_in_order(q, k, v, mask, scale), expected)


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("dtype", [F32, BF16, FP16])
def test_what_only_other_rows_see_changes_nothing_even_if_it_is_not_finite(
    dtype: torch.dtype,
) -> None:
    q, keys, values, visible, scale = inputs(dtype)
    expected = attend_in_order(q, keys, values, visible, scale)
    for broken in (keys, values):
        slot = int(visible[7].sum())  # the first that row 7 does not see
        held = broken[:, slot].clone()
        broken[:, slot] = float("nan")
        got = attend_in_order(q, keys, values, visible, scale)
        broken[:, slot] = held
        assert equal_bits(got[:, :8], expected[:, :8])
        assert got[:, 8:].isnan().all()


@pytest.mark.usefixtures("build", "threads")
@pytest.mark.parametrize("dtype", [F32, BF16, FP16])
@pytest.mark.parametrize("heads", [(2, 2), (7, 1), (14, 2), (3, 3)])
def test_a_row_has_the_same_bits_alone_and_among_others_for_any_number_of_threads(
    dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    q, keys, values, visible, scale = inputs(dtype, (*heads, 70, 96, 48))
    alone = torch.cat(
        [
            attend_in_order(q[:, t : t + 1], keys, values, visible[t : t + 1], scale)
            for t in range(70)
        ],
        1,
    )
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for rows in (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 70):
            some = slice(70 - rows, 70)
            got = attend_in_order(q[:, some], keys, values, visible[some], scale)
            assert equal_bits(got, alone[:, some])
        got = attend_in_order(q.flip(1), keys, values, visible.flip(0), scale)
        assert equal_bits(got, alone.flip(1))


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("size", [32, 48, 64, 128])
def test_a_sliding_window_gives_the_bits_of_a_cache_that_holds_nothing_else(size: int) -> None:
    q, keys, values, visible, scale = inputs(BF16, (14, 2, 24, 160, size))
    ends = visible.sum(1, keepdim=True)
    slots = torch.arange(160)
    got = attend_in_order(q, keys, values, visible & (slots >= ends - 50), scale)
    for row, end in enumerate(ends.flatten().tolist()):
        some = slice(end - 50, end)
        k, v = (tensor[:, some].contiguous() for tensor in (keys, values))
        everything = torch.ones(1, 50, dtype=torch.bool)
        expected = attend_in_order(q[:, row : row + 1], k, v, everything, scale)
        assert equal_bits(got[:, row : row + 1], expected)


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("dtype", [F32, BF16, FP16])
def test_a_node_of_a_tree_has_the_bits_of_its_path_laid_out_as_a_chain(dtype: torch.dtype) -> None:
    committed, nodes = 61, 40
    q, keys, values, _, scale = inputs(dtype, (14, 2, nodes, committed + nodes + 7, 64))
    generator = torch.Generator().manual_seed(5)
    visible = torch.zeros(nodes, keys.shape[1], dtype=torch.bool)
    visible[:, :committed] = True
    for node in range(nodes):
        if node:
            parent = int(torch.randint(node, (1,), generator=generator))
            visible[node] |= visible[parent]
        visible[node, committed + node] = True
    got = attend_in_order(q, keys, values, visible, scale)
    for node in range(nodes):
        path = visible[node].nonzero()[:, 0]
        k, v = (tensor[:, path].contiguous() for tensor in (keys, values))
        rows = q[:, path[path >= committed] - committed]
        causal = torch.ones(rows.shape[1], len(path), dtype=torch.bool).tril(committed)
        assert equal_bits(attend_in_order(rows, k, v, causal, scale)[:, -1], got[:, node])


@pytest.mark.usefixtures("build")
def test_the_sign_of_a_zero_does_not_tell_what_other_rows_see() -> None:
    values = torch.tensor([0, -(2.0**-149), 5]).view(1, 3, 1).repeat(1, 1, 2)  # a third of it: -0
    keys = torch.tensor([2.0, 0, 0]).view(1, 3, 1).repeat(1, 1, 2)
    visible = torch.tensor([[True, True, False], [True, True, True]])
    q = torch.ones(1, 2, 2) / 2
    together = attend_in_order(q, keys, values, visible, 2**-0.5)
    alone = attend_in_order(q[:, :1], keys, values, visible[:1], 2**-0.5)
    assert equal_bits(together[:, :1], alone)


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("dtype", [F32, BF16, FP16])
def test_a_row_that_sees_nothing_becomes_zeros(dtype: torch.dtype) -> None:
    q, keys, values, visible, scale = inputs(dtype)
    expected = attend_in_order(q, keys, values, visible, scale)
    visible[3] = False
    got = attend_in_order(q, keys, values, visible, scale)
    assert equal_bits(got[:, 3], torch.zeros_like(got[:, 3]))
    assert equal_bits(got[:, 4:], expected[:, 4:])
    nothing = attend_in_order(q, keys, values, torch.zeros_like(visible), scale)
    assert equal_bits(nothing, torch.zeros_like(nothing))


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_value_of_16_bits_comes_back_as_it_is(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 1, 64)
    seen = torch.ones(1, 1, dtype=torch.bool)
    got = attend_in_order(torch.ones_like(every), torch.ones_like(every), every, seen, 0.125)
    torch.testing.assert_close(got, every, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_result_is_rounded_to_the_nearest_and_ties_to_even(dtype: torch.dtype) -> None:
    first = (
        torch.arange(2**15 - 1).to(torch.int16).view(dtype)[: 31743 // 64 * 64]
    )  # finite in fp16
    second = (first.view(torch.int16) + 1).view(dtype)
    values = torch.stack((first, second)).view(2, -1, 64).transpose(0, 1).contiguous()
    q = torch.zeros_like(values[:, :1])  # both weigh the same
    got = attend_in_order(q, values, values, torch.ones(1, 2, dtype=torch.bool), 0.125)
    mean = values.double().mean(1, keepdim=True)
    expected = mean.to(dtype)
    usual = mean >= 2.0**-125  # f32 has no exact half of what is smaller
    assert torch.equal(got[usual], expected[usual])


@pytest.mark.usefixtures("build")
def test_large_scores_neither_overflow_nor_hide_what_is_equally_large() -> None:
    q, keys, values, visible, scale = inputs(F32)
    got = attend_in_order(q * 1e4, keys * 1e4, values, visible, scale)
    torch.testing.assert_close(got, attend_in_fp64(q * 1e4, keys * 1e4, values, visible, scale))


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("dtype", [F32, BF16, FP16])
def test_queries_may_lie_row_after_row_as_the_projection_left_them(dtype: torch.dtype) -> None:
    q, keys, values, visible, scale = inputs(dtype)
    expected = attend_in_order(q, keys, values, visible, scale)
    by_row = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert equal_bits(attend_in_order(by_row, keys, values, visible, scale), expected)
    wide = torch.cat((q, q), -1)[..., D:]
    assert equal_bits(attend_in_order(wide, keys, values, visible, scale), expected)


@pytest.mark.usefixtures("build", "threads")
@pytest.mark.parametrize("dtype", [F32, BF16, FP16])
def test_it_stays_within_its_scratch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    edge, allocated, empty = 4096, [], torch.empty

    def with_edges(size: int, dtype: torch.dtype) -> Tensor:
        allocated.append(torch.full((size + 2 * edge,), 0xA5, dtype=dtype))
        return allocated[-1][edge : edge + size]

    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for shape in SHAPES:
            arguments = inputs(dtype, shape)
            expected = attend_in_order(*arguments)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", with_edges)
                got = attend_in_order(*arguments)
            assert torch.empty is empty
            assert equal_bits(got, expected)
            around = torch.cat((allocated[-1][:edge], allocated[-1][-edge:]))
            assert bool((around == 0xA5).all())


def test_scratch_grows_with_each_of_its_arguments() -> None:
    assert attention_scratch_bytes(1, 16, 16) == 4 * (16 + 16 * (32 + 16 + 2) + 256)
    for sizes in ([(n, 600, 128) for n in range(1, 9)], [(2, n, 64) for n in range(1, 99)]):
        assert all(
            attention_scratch_bytes(*a) <= attention_scratch_bytes(*b) for a, b in pairwise(sizes)
        )
    assert all(
        attention_scratch_bytes(2, 64, n) <= attention_scratch_bytes(2, 64, n + 1)
        for n in range(1, 99)
    )
