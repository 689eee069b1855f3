"""Batch-invariant attention on CUDA: on the CPU under Triton's interpreter, where a GPU is on that,
and compiled ahead of time.

Whether Triton interprets is settled for a whole process when triton is imported: functions named
check_ are for the process of their own that the first tests start.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreter import needs_interpreter
from torch import Tensor

from subspec.artifacts import footprint
from subspec.artifacts.footprint import attention_blocks_bytes
from subspec.runtime.model.attention import attend_in_fp64

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
attention_triton = pytest.importorskip("subspec.runtime.kernels.attention_triton")

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, FP16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Shape = tuple[int, int, int, int, int]  # A, B, T, S, D
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, float]
SHAPES: list[Shape] = [
    (10, 2, 9, 150, 32),
    (4, 4, 5, 37, 48),
    (7, 1, 6, 130, 64),
    (3, 3, 1, 64, 128),
    (34, 2, 3, 75, 18),
]
LARGE: list[Shape] = [
    (5, 1, 3, 1100, 80),
    (2, 1, 40, 200, 96),
    (8, 2, 20, 260, 128),
    (3, 1, 7, 300, 160),
    (4, 2, 5, 140, 256),
    (2, 2, 18, 70, 512),
    (64, 4, 5, 129, 64),
]


def properties(names: str) -> int:
    """Exit status of pytest, for the functions so named in a process that interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-o", f"python_functions={names}"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr)
    return done.returncode


@pytest.mark.slow  # minutes; `make test-slow`
@needs_interpreter
def test_a_row_sees_what_it_sees_and_nothing_else_under_the_interpreter() -> None:
    assert properties("check_*") == 0


@pytest.mark.slow
def test_larger_shapes_agree_with_the_plain_twin_under_the_interpreter() -> None:
    assert properties("slow_check_*") == 0


@pytest.fixture(autouse=True)
def bf16_in_the_interpreter() -> Iterator[None]:
    """Triton's interpreter multiplies the patterns of bf16 numbers as integers, and converts to
    bf16 by cutting off. Compiled code does neither."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert = InterpreterBuilder.cast_impl

    def numbers(x: TensorHandle) -> np.ndarray:
        is_bf16 = x.dtype.scalar == tl.bfloat16
        return (x.data.astype(np.uint32) << 16).view(np.float32) if is_bf16 else x.data

    def dot(_, a, b, sums, precision, imprecise):  # type: ignore[no-untyped-def]
        product = np.matmul(numbers(a), numbers(b), dtype=np.float32)
        return TensorHandle(product + sums.data, sums.dtype.scalar)

    def cast(builder, source, target):  # type: ignore[no-untyped-def]
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return convert(builder, source, target)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        patch.setattr(InterpreterBuilder, "create_fp_trunc", cast)
        yield


def inputs(dtype: torch.dtype, shape: Shape, device: str) -> Inputs:
    """Rows that see one slot more each, in a cache that has more slots than are live."""
    a, b, t, s, d = shape
    generator = torch.Generator().manual_seed(a * s)
    q = torch.randn(a, t, d, generator=generator).to(dtype)
    kept = torch.randn(2, b, s + 3, d, generator=generator).to(dtype)
    visible = torch.arange(s) <= (s - t) * 3 // 5 + torch.arange(t)[:, None]
    keys, values = kept.to(device)[:, :, :s]
    return q.to(device), keys, values, visible.to(device), d**-0.5


def attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    got: Tensor = attention_triton.attend_in_blocks(q, keys, values, visible, scale)
    return got


def equal_bits(got: Tensor, expected: Tensor) -> bool:
    """Zeros of either sign are not the same."""
    of_size = {4: torch.int32, 2: torch.int16}[got.element_size()]
    return torch.equal(got.contiguous().view(of_size), expected.contiguous().view(of_size))


def agrees_with_the_twin(dtype: torch.dtype, shape: Shape, device: str) -> None:
    given = inputs(dtype, shape, device)
    got, expected = attend(*given), attend_in_fp64(*given)
    if dtype == F32:
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
        return
    enough, step = (0.997, 2**-7) if dtype == BF16 else (0.98, 2**-10)
    assert (got == expected).float().mean() >= enough
    torch.testing.assert_close(got, expected, rtol=step, atol=2e-6)


# ---- properties, on any device ------------------------------------------------------------------


def it_differs_from_the_plain_twin_by_rounding_only(dtype: torch.dtype, device: str) -> None:
    for shape in SHAPES:
        agrees_with_the_twin(dtype, shape, device)


def hidden_slots_anywhere_change_nothing_whatever_is_in_them(
    dtype: torch.dtype, device: str
) -> None:
    for shape in SHAPES[:3]:
        q, keys, values, visible, scale = inputs(dtype, shape, device)
        expected = attend(q, keys, values, visible, scale)
        slots = shape[3]
        for fill, count in ((1.0, slots + 1), (float("nan"), slots + 13), (float("inf"), 700)):
            generator = torch.Generator().manual_seed(count)
            where = torch.randperm(count, generator=generator)[:slots].sort().values.to(device)
            wide = [t.new_full((t.shape[0], count, t.shape[2]), fill) for t in (keys, values)]
            wide[0][:, where], wide[1][:, where] = keys, values
            mask = visible.new_zeros(len(visible), count)
            mask[:, where] = visible
            assert equal_bits(attend(q, *wide, mask, scale), expected)


def what_only_other_rows_see_changes_nothing_even_if_it_is_not_finite(
    dtype: torch.dtype, device: str
) -> None:
    q, keys, values, visible, scale = inputs(dtype, SHAPES[0], device)
    expected = attend(q, keys, values, visible, scale)
    for broken in (keys, values):
        slot = int(visible[4].sum())  # the first that row 4 does not see
        held = broken[:, slot].clone()
        broken[:, slot] = float("nan")
        got = attend(q, keys, values, visible, scale)
        broken[:, slot] = held
        assert equal_bits(got[:, :5], expected[:, :5])
        assert got[:, 5:].isnan().all()


def a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype, device: str) -> None:
    for heads in ((2, 2), (7, 1), (10, 2)):
        q, keys, values, visible, scale = inputs(dtype, (*heads, 19, 96, 48), device)
        expected = attend(q, keys, values, visible, scale)
        for first, end in ((0, 1), (7, 8), (3, 6), (2, 19), (18, 19)):
            some = slice(first, end)
            got = attend(q[:, some], keys, values, visible[some], scale)
            assert equal_bits(got, expected[:, some])
        got = attend(q.flip(1), keys, values, visible.flip(0), scale)
        assert equal_bits(got, expected.flip(1))


def a_sliding_window_gives_the_bits_of_a_cache_that_holds_nothing_else(
    dtype: torch.dtype, device: str
) -> None:
    q, keys, values, visible, scale = inputs(dtype, (6, 2, 7, 160, 48), device)
    ends = visible.sum(1, keepdim=True)
    window = visible & (torch.arange(160, device=device) >= ends - 70)
    got = attend(q, keys, values, window, scale)
    for row, end in enumerate(ends.flatten().tolist()):
        k, v = (tensor[:, end - 70 : end].contiguous() for tensor in (keys, values))
        everything = visible.new_ones(1, 70)
        expected = attend(q[:, row : row + 1], k, v, everything, scale)
        assert equal_bits(got[:, row : row + 1], expected)


def a_node_of_a_tree_has_the_bits_of_its_path_laid_out_as_a_chain(
    dtype: torch.dtype, device: str
) -> None:
    for committed, nodes in ((61, 12), (507, 9)):  # the path crosses a block, and a section
        q, keys, values, _, scale = inputs(dtype, (10, 2, nodes, committed + nodes + 7, 32), device)
        generator = torch.Generator().manual_seed(5)
        visible = torch.zeros(nodes, keys.shape[1], dtype=torch.bool, device=device)
        visible[:, :committed] = True
        for node in range(nodes):
            if node:
                parent = int(torch.randint(max(0, node - 2), node, (1,), generator=generator))
                visible[node] |= visible[parent]
            visible[node, committed + node] = True
        got = attend(q, keys, values, visible, scale)
        for node in range(nodes):
            path = visible[node].nonzero()[:, 0]
            k, v = (tensor[:, path].contiguous() for tensor in (keys, values))
            rows = q[:, path[path >= committed] - committed]
            causal = visible.new_ones(rows.shape[1], len(path)).tril(committed)
            assert equal_bits(attend(rows, k, v, causal, scale)[:, -1], got[:, node])


def a_row_that_sees_nothing_becomes_zeros(dtype: torch.dtype, device: str) -> None:
    q, keys, values, visible, scale = inputs(dtype, SHAPES[2], device)
    expected = attend(q, keys, values, visible, scale)
    visible[3] = False
    got = attend(q, keys, values, visible, scale)
    assert equal_bits(got[:, 3], torch.zeros_like(got[:, 3]))
    assert equal_bits(got[:, 4:], expected[:, 4:])
    nothing = attend(q, keys, values, torch.zeros_like(visible), scale)
    assert equal_bits(nothing, torch.zeros_like(nothing))


def the_sections_computed_at_a_time_change_nothing(dtype: torch.dtype, device: str) -> None:
    """Three of them, whose rows end in different ones, and the leading run of one is short."""
    q, keys, values, _, scale = inputs(dtype, (3, 1, 4, 1100, 18), device)
    visible = torch.arange(1100, device=device) < torch.tensor([[900], [1100], [60], [513]]).to(
        q.device
    )
    visible[1, 3:40:7] = False
    found = []
    for at_once in (1, 2, 8):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(footprint, "ATTENTION_SECTIONS", at_once)
            found.append(attend(q, keys, values, visible, scale))
    assert equal_bits(found[0], found[1]) and equal_bits(found[0], found[2])
    expected = attend_in_fp64(q, keys, values, visible, scale).float()
    step = {F32: 2e-6, BF16: 2**-7, FP16: 2**-10}[dtype]
    torch.testing.assert_close(found[0].float(), expected, rtol=step, atol=2e-6)


def every_finite_value_comes_back_as_it_is(dtype: torch.dtype, device: str) -> None:
    if dtype == F32:
        return
    every = torch.arange(-(2**15), 2**15, 23).to(torch.int16).view(dtype)[: 2816 // 64 * 64]
    every = every.view(-1, 1, 64).where(every.view(-1, 1, 64).isfinite(), 0.0).to(device)
    seen = torch.ones(1, 1, dtype=torch.bool, device=device)
    got = attend(torch.ones_like(every), torch.ones_like(every), every, seen, 0.125)
    usual = every.float().abs() >= 2.0**-110  # products below the smallest f32 may be cut off
    assert torch.equal(got[usual], every[usual])


def large_scores_neither_overflow_nor_hide_what_is_equally_large(
    dtype: torch.dtype, device: str
) -> None:
    if dtype == F32:
        q, keys, values, visible, scale = inputs(F32, SHAPES[2], device)
        given = (q * 1e4, keys * 1e4, values, visible, scale)
        torch.testing.assert_close(attend(*given), attend_in_fp64(*given))


def queries_may_lie_row_after_row_as_the_projection_left_them(
    dtype: torch.dtype, device: str
) -> None:
    q, keys, values, visible, scale = inputs(dtype, SHAPES[1], device)
    expected = attend(q, keys, values, visible, scale)
    by_row = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert equal_bits(attend(by_row, keys, values, visible, scale), expected)
    wide = torch.cat((q, q), -1)[..., q.shape[2] :]
    assert equal_bits(attend(wide, keys, values, visible, scale), expected)


def it_stays_within_its_scratch(dtype: torch.dtype, device: str) -> None:
    edge, allocated, empty = 1024, list[Tensor](), torch.empty

    def with_edges(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        allocated.append(torch.full((size + 2 * edge,), 0x5A5A5A5A, dtype=dtype, device=device))
        return allocated[-1][edge : edge + size]

    for shape in SHAPES[1:]:
        given = inputs(dtype, shape, device)
        expected = attend(*given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", with_edges)
            got = attend(*given)
        assert torch.empty is empty and equal_bits(got, expected)
        around = torch.cat((allocated[-1][:edge], allocated[-1][-edge:]))
        assert bool((around == 0x5A5A5A5A).all())


PROPERTIES: list[Callable[[torch.dtype, str], None]] = [
    it_differs_from_the_plain_twin_by_rounding_only,
    hidden_slots_anywhere_change_nothing_whatever_is_in_them,
    what_only_other_rows_see_changes_nothing_even_if_it_is_not_finite,
    a_row_has_the_same_bits_alone_and_among_others,
    a_sliding_window_gives_the_bits_of_a_cache_that_holds_nothing_else,
    a_node_of_a_tree_has_the_bits_of_its_path_laid_out_as_a_chain,
    a_row_that_sees_nothing_becomes_zeros,
    the_sections_computed_at_a_time_change_nothing,
    every_finite_value_comes_back_as_it_is,
    large_scores_neither_overflow_nor_hide_what_is_equally_large,
    queries_may_lie_row_after_row_as_the_projection_left_them,
    it_stays_within_its_scratch,
]
holds = pytest.mark.parametrize("holds", PROPERTIES, ids=lambda one: one.__name__)


@holds
def check_bf16(holds: Callable[[torch.dtype, str], None]) -> None:
    holds(BF16, "cpu")


@holds
@pytest.mark.parametrize("dtype", [F32, FP16], ids=str)
def slow_check_others(holds: Callable[[torch.dtype, str], None], dtype: torch.dtype) -> None:
    holds(dtype, "cpu")


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def slow_check_larger_shapes(dtype: torch.dtype, shape: Shape) -> None:
    agrees_with_the_twin(dtype, shape, "cpu")


@pytest.mark.gpu
@pytest.mark.real_gpu  # the simulated one has the plain twin
@holds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda(dtype: torch.dtype, holds: Callable[[torch.dtype, str], None]) -> None:
    holds(dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.real_gpu  # the simulated one has the plain twin
@pytest.mark.parametrize("shape", [*LARGE, (40, 8, 64, 4096, 128), (40, 8, 1, 9000, 128)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_larger_shapes_agree_with_the_plain_twin_on_cuda(dtype: torch.dtype, shape: Shape) -> None:
    agrees_with_the_twin(dtype, shape, "cuda")


def test_scratch_grows_with_each_of_its_arguments() -> None:
    assert attention_blocks_bytes(3, 2, 513, 16) == 4 * 2 * (513 + 2 + 2 * 3 * 18)
    assert attention_blocks_bytes(3, 2, 4097, 16) == 4 * 2 * (4097 + 2 + 9 * 3 * 18)
    for sizes in (
        [(n, 5, 600, 64) for n in range(1, 9)],
        [(8, n, 600, 64) for n in range(1, 9)],
        [(8, 5, n, 64) for n in range(1, 5000, 61)],
        [(8, 5, 600, n) for n in range(1, 99)],
    ):
        assert all(
            attention_blocks_bytes(*a) < attention_blocks_bytes(*b) for a, b in pairwise(sizes)
        )


# ---- compiled ahead of time ---------------------------------------------------------------------


def test_the_kernel_of_most_models_compiles_without_spills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert usage(89, BF16, 128, 5, tmp_path) <= 128  # two blocks of 256 threads on a processor


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_it_compiles_without_spills_for_every_gpu(
    capability: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for head_size, repeats in ((64, 7), (80, 1), (96, 4), (128, 5), (256, 2), (512, 8)):
        most = 255 if dtype == F32 else 168
        assert usage(capability, dtype, head_size, repeats, tmp_path) <= most


def usage(capability: int, dtype: torch.dtype, head_size: int, repeats: int, folder: Path) -> int:
    """Registers a thread; asserts that nothing spills and that shared memory suffices."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this build of triton has no CUDA tools")
    compiled = compile_ahead(capability, dtype, head_size, repeats)
    # Of one kind, whatever the tile: those of Hopper for 64 rows would round differently.
    assert "mma.sync" in compiled.asm["ptx"] and "wgmma" not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 << 10
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    done = subprocess.run(
        [cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True
    )
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
    assert (found["STACK"], found["LOCAL"]) == ("0", "0"), found
    return int(found["REG"])


def compile_ahead(
    capability: int, dtype: torch.dtype, head_size: int, repeats: int
) -> triton.compiler.CompiledKernel:
    element = {F32: "*fp32", BF16: "*bf16", FP16: "*fp16"}[dtype]
    dims = triton.next_power_of_2(head_size)
    form = attention_triton.tiling(dims, dtype)
    types = dict.fromkeys(("q", "keys", "values"), element)
    types |= {"slots": "*i32", "counts": "*i32", "weights": "*fp32", "sums": "*fp32"}
    strides = ("q_head_stride", "q_row_stride", "keys_stride", "values_stride")
    types |= dict.fromkeys((*strides, "num_rows", "num_slots", "first_section"), "i32")
    types |= {"scale": "fp32"}
    constants = {
        "REPEATS": repeats,
        "HEAD_SIZE": head_size,
        "DIMS": dims,
        "CHUNK": form.chunk,
        "TILE": attention_triton.ROWS,
        "BLOCK": form.block,
        "SECTION": footprint.ATTENTION_SECTION,
    }
    aligned = ("keys", "values", *strides[1:])
    attributes = {(list(types).index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(
        attention_triton._attend_section,
        {**types, **dict.fromkeys(constants, "constexpr")},
        constants,
        attributes,
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": form.num_warps, "num_stages": form.num_stages}
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize("capability", [80, 120])
def test_the_small_kernels_compile(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    listed = {"visible": "*i8", "slots": "*i32", "counts": "*i32", "num_slots": "i32"}
    sizes = {"BLOCK": attention_triton.LIST_BLOCK}
    compiled = [(attention_triton._list_slots, listed, sizes)]
    for out in ("*bf16", "*fp16", "*fp32"):
        types = {"out": out, "counts": "*i32", "weights": "*fp32", "sums": "*fp32"}
        numbers = ("out_head_stride", "out_row_stride", "first_section", "num_sections")
        types |= dict.fromkeys((*numbers, "all_sections"), "i32")
        sizes = {"HEAD_SIZE": 80, "DIMS": 128, "SECTION": footprint.ATTENTION_SECTION}
        compiled.append((attention_triton._combine, types, sizes))
    for kernel, types, constants in compiled:
        every = {**types, **dict.fromkeys(constants, "constexpr")}
        source = triton.compiler.ASTSource(kernel, every, constants)
        assert "fma.rn" in triton.compile(source, target=target).asm["ptx"] or types is listed
