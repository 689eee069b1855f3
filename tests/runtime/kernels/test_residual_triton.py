"""The CUDA decoder against its plain twin: on the CPU under Triton's interpreter, where a GPU is on
that, and compiled ahead of time.

Whether Triton interprets is settled for a whole process when triton is imported, and kernels that
others run on a GPU must not be interpreted. So the functions here named check_ are for a process of
their own: pytest collects them only in the one that the first test starts.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from residual_parts import aten_layout, gemlite_layout
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.footprint import packed_bytes
from subspec.artifacts.format import residual, tiles
from subspec.artifacts.format.packing import pack_nibbles
from subspec.artifacts.plan import Int4Kernel
from subspec.runtime.kernels import linear
from subspec.runtime.kernels.linear import pack

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
residual_triton = pytest.importorskip("subspec.runtime.kernels.residual_triton")
tiles_triton = pytest.importorskip("subspec.runtime.kernels.tiles_triton")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Layout, ATen's inner tiles, K; fewer inner tiles are for a K that 128 does not divide.
LAYOUTS: list[tuple[Int4Kernel, int, int]] = [
    ("aten", 8, 256),
    ("aten", 4, 192),
    ("aten", 4, 64),
    ("gemlite", 0, 192),
]
ROWS, FIRST_ROW, NUM_ROWS = 192, 64, 64  # of the matrix, and of the part that is decoded


def test_the_kernel_agrees_with_its_plain_twin_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-o", "python_functions=check_*"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("layout", "inner_tiles", "num_columns"), LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def check_decoding_a_part_gives_the_bits_that_were_encoded(
    dtype: torch.dtype, layout: Int4Kernel, inner_tiles: int, num_columns: int
) -> None:
    codes, qparams = random_substitute(num_columns)
    weight = nearby(codes, qparams, dtype)
    got, mismatches = encode_and_decode(weight, codes, qparams, layout, inner_tiles)
    assert same_bits(got, weight[FIRST_ROW : FIRST_ROW + NUM_ROWS])
    assert mismatches == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def check_arbitrary_patterns_come_through_as_escapes(dtype: torch.dtype) -> None:
    codes, qparams = random_substitute(64)
    weight = any_patterns((ROWS, 64), dtype)
    got, mismatches = encode_and_decode(weight, codes, qparams, "aten", 4)
    assert same_bits(got, weight[FIRST_ROW : FIRST_ROW + NUM_ROWS])
    assert mismatches == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def check_extreme_qparams_give_what_the_plain_twin_decodes(dtype: torch.dtype) -> None:
    codes, qparams = random_substitute(64)
    scales = torch.tensor([2.0**-59, 2.0**59, 2.0**-14, 1.0, 3e-3])
    steps = torch.tensor([0.0, -0.0, 0.5, -7.5, 8.5, -8.5, 8.53125, 1e3])  # where zero may lie
    scale = scales.repeat_interleave(len(steps))
    zero_point = scale * steps.repeat(len(scales))
    largest = torch.finfo(torch.bfloat16).max
    for at, extreme in enumerate((largest, -largest, 2.0**-130, -65504.0)):
        zero_point[at * 9] = extreme
    qparams[0, FIRST_ROW : FIRST_ROW + 40] = torch.stack((scale, zero_point), -1).bfloat16()
    weight = nearby(codes, qparams, dtype)
    got, mismatches = encode_and_decode(weight, codes, qparams, "gemlite", 0)
    assert same_bits(got, weight[FIRST_ROW : FIRST_ROW + NUM_ROWS])
    assert mismatches == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def check_a_damaged_stream_is_counted_where_the_twin_refuses_it_and_reads_nothing_else(
    dtype: torch.dtype,
) -> None:
    codes, qparams = random_substitute(64)
    rows = slice(FIRST_ROW, FIRST_ROW + NUM_ROWS)
    stored = residual.encode(
        nearby(codes, qparams, dtype)[rows], pack_nibbles(codes[rows]), qparams[:, rows]
    )
    packed, refused = aten_layout(codes, 4), []
    num_tiles = NUM_ROWS // tiles.TILE_ROWS
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(4 * (num_tiles + 1), 4000, (6,), generator=generator).tolist()
    for place in [3, 4, 7, 9, 11, *places]:  # in the index; in the bits, mostly
        damaged = stored.clone()
        damaged[place] ^= 0x91
        results = []
        for around in (0x00, 0xFF):  # what lies before and after must not matter
            room = torch.full((len(stored) + 8192,), around, dtype=torch.uint8)
            part = room[4096 : 4096 + len(stored)].copy_(damaged)
            results.append(decode(part, packed, qparams, dtype, "aten"))
        assert same_bits(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]
        try:
            expected = residual.decode(damaged, pack_nibbles(codes[rows]), qparams[:, rows], dtype)
        except SubspecError:
            assert results[0][1] > 0
            refused.append(place)
        else:
            assert results[0][1] == 0
            assert same_bits(results[0][0], expected)
    assert refused[:5] == [3, 4, 7, 9, 11]


@pytest.mark.parametrize("ahead", [True, False])
def check_a_word_beside_the_tiles_is_counted_as_the_twin_refuses_it(ahead: bool) -> None:
    codes, qparams = random_substitute(64)
    rows = slice(FIRST_ROW, FIRST_ROW + NUM_ROWS)
    weight = nearby(codes, qparams, torch.bfloat16)
    stored = residual.encode(weight[rows], pack_nibbles(codes[rows]), qparams[:, rows])
    index, tiles = stored.view(torch.int32).split((3, len(stored) // 4 - 3))
    extra = torch.zeros(1, dtype=torch.int32)
    words = torch.cat((index + 1, extra, tiles) if ahead else (index, tiles, extra))
    damaged = words.view(torch.uint8)
    _, mismatches = decode(damaged, aten_layout(codes, 4), qparams, torch.bfloat16, "aten")
    assert mismatches == 1
    with pytest.raises(SubspecError, match="a residual is damaged"):
        residual.decode(damaged, pack_nibbles(codes[rows]), qparams[:, rows], torch.bfloat16)


def check_a_stream_of_an_impossible_length_is_refused() -> None:
    codes, qparams = random_substitute(64)
    stored = torch.zeros(4 * (3 + tiles.GUARD_WORDS), dtype=torch.uint8)
    for length in (0, 4 * 5, len(stored) - 1):
        with pytest.raises(SubspecError, match=f"it is {length} bytes") as caught:
            decode(stored[:length], aten_layout(codes, 4), qparams, torch.bfloat16, "aten")
        assert caught.value.exit_code == Exit.CORRUPT


@triton.jit
def quotients(value, divisor, quotient, remainder, SMALL: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.program_id(0) * 4096 + tl.arange(0, 4096)
    if SMALL:
        q, r = residual_triton._divide_small(
            tl.load(value + lane).to(tl.int32), tl.load(divisor + lane)
        )
    else:
        q, r = residual_triton._divide(tl.load(value + lane), tl.load(divisor + lane))
    tl.store(quotient + lane, q)
    tl.store(remainder + lane, r)


def check_divisions_are_exact() -> None:
    assert_divisions_are_exact("cpu")


def random_substitute(num_columns: int) -> tuple[Tensor, Tensor]:
    """-> codes uint8 [ROWS, K], qparams bf16 [G, ROWS, 2], zeros within and beyond codes."""
    generator = torch.Generator().manual_seed(num_columns)
    codes = torch.randint(16, (ROWS, num_columns), dtype=torch.uint8, generator=generator)
    shape = (num_columns // 64, ROWS)
    scale = torch.rand(shape, generator=generator) * 0.01 + 0.001
    zero_point = torch.randn(shape, generator=generator) * 5 * scale
    return codes, torch.stack((scale, zero_point), -1).bfloat16()


def nearby(codes: Tensor, qparams: Tensor, dtype: torch.dtype) -> Tensor:
    """[ROWS, K] around the values that the codes stand for, with some escapes and the ends."""
    scale, zero_point = qparams.float().transpose(0, 1)[..., None].unbind(2)  # [N, G, 1]
    grouped = codes.view(ROWS, -1, 64)
    generator = torch.Generator().manual_seed(1)
    offset = (torch.rand(grouped.shape, generator=generator) - 0.5) * 1.02
    offset[..., ::7] = 0.5
    offset[..., ::11] = -0.5
    weight = ((grouped.float() - 8 + offset) * scale + zero_point).view(codes.shape).to(dtype)
    weight[:, ::37] = 0
    return weight


def any_patterns(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    num_bytes = dtype.itemsize * shape[1]
    return torch.randint(256, (shape[0], num_bytes), dtype=torch.uint8, generator=generator).view(
        dtype
    )


def encode_and_decode(
    weight: Tensor,
    codes: Tensor,
    qparams: Tensor,
    layout: Int4Kernel,
    inner_tiles: int,
    device: str = "cpu",
) -> tuple[Tensor, int]:
    rows = slice(FIRST_ROW, FIRST_ROW + NUM_ROWS)
    stored = residual.encode(weight[rows], pack_nibbles(codes[rows]), qparams[:, rows])
    room = torch.zeros(len(stored) + 4, dtype=torch.uint8, device=device)
    part = room[4:].copy_(stored)  # at no multiple of 8 bytes
    packed = aten_layout(codes, inner_tiles) if layout == "aten" else gemlite_layout(codes)
    return decode(part, packed.to(device), qparams.to(device), weight.dtype, layout)


def decode(
    stored: Tensor, packed: Tensor, qparams: Tensor, dtype: torch.dtype, layout: Int4Kernel
) -> tuple[Tensor, int]:
    device = stored.device
    out = torch.empty(NUM_ROWS, qparams.shape[0] * 64, dtype=dtype, device=device)
    mismatches = torch.zeros(1, dtype=torch.int32, device=device)
    residual_triton.decode_into(out, stored, packed, qparams, FIRST_ROW, layout, mismatches)
    return out.cpu(), int(mismatches)


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = torch.int16 if a.dtype.itemsize == 2 else torch.int32
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def assert_divisions_are_exact(device: str) -> None:
    """Quotients at, just below and just above every kind of multiple, up to the largest."""
    generator = torch.Generator().manual_seed(3)

    def some(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (1 << 14,), generator=generator)

    def around(quotient: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor]:
        value = quotient * divisor
        values = torch.cat((value, value + divisor - 1, (value - 1).clamp(min=0), value + 1))
        return values, divisor.repeat(4)

    largest = 1537**2
    big = [
        around(some(0, largest - 1), some(4, largest + 1)),
        around(largest - some(2, 300), largest - some(0, 300)),
        around(2 * largest - some(1, 300), some(1 << 20, (1 << 42) // largest)),  # damaged
        around(some(0, 12289), some(2, 12290)),
    ]
    small = [
        around(some(0, 1537), some(2, 1538)),
        around(1537 - some(1, 30), 1538 - some(1, 30)),
        around(some(0, 40), some(2, 1538)),
    ]
    for cases, is_small in ((big, False), (small, True)):
        value = torch.cat([value for value, _ in cases])
        divisor = torch.cat([divisor for _, divisor in cases])
        quotient, remainder = torch.empty(2, len(value), dtype=torch.int32, device=device)
        quotients[len(value) // 4096,](
            value.to(device), divisor.int().to(device), quotient, remainder, SMALL=is_small
        )
        assert torch.equal(quotient.long().cpu(), value // divisor)
        assert torch.equal(remainder.long().cpu(), value % divisor)


@pytest.mark.gpu
@pytest.mark.parametrize("num_columns", [192, 256])
@pytest.mark.parametrize("kernel", ["aten", "gemlite"])
def test_the_4_bit_kernels_keep_their_codes_as_the_plain_layouts_say(
    kernel: Int4Kernel, num_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a matrix is packed in several pieces."""
    monkeypatch.setattr(linear, "PIECE_BYTES", 24 * num_columns // 2)
    if kernel == "gemlite":
        pytest.importorskip("gemlite")
    codes, qparams = random_substitute(num_columns)
    sizes = packed_bytes(*codes.shape, kernel)
    room = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
    packed = pack(pack_nibbles(codes), qparams, kernel, *room).packed
    if kernel == "gemlite":
        assert torch.equal(packed.codes.cpu(), gemlite_layout(codes))
    else:
        assert torch.equal(packed.cpu(), aten_layout(codes, packed.shape[3] * 2))


@pytest.mark.gpu
@pytest.mark.parametrize(("layout", "inner_tiles", "num_columns"), LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [nearby, any_patterns], ids=["nearby", "any"])
def test_decoding_on_cuda_gives_the_bits_that_were_encoded(
    weights: Callable[..., Tensor],
    dtype: torch.dtype,
    layout: Int4Kernel,
    inner_tiles: int,
    num_columns: int,
) -> None:
    codes, qparams = random_substitute(num_columns)
    shape = (ROWS, num_columns)
    weight = nearby(codes, qparams, dtype) if weights is nearby else any_patterns(shape, dtype)
    got, mismatches = encode_and_decode(weight, codes, qparams, layout, inner_tiles, "cuda")
    assert same_bits(got, weight[FIRST_ROW : FIRST_ROW + NUM_ROWS])
    assert mismatches == 0


@pytest.mark.gpu
@pytest.mark.real_gpu
def test_divisions_are_exact_on_cuda() -> None:
    assert_divisions_are_exact("cuda")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_the_kernel_compiles_to_code_that_flushes_and_spills_nothing(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this build of triton has no CUDA tools")
    for bits, is_f32, lane_words in ((7, False, 4), (7, True, 2), (10, False, 4), (10, False, 0)):
        compiled = compile_ahead(capability, bits, is_f32, lane_words)
        assert ".ftz" not in compiled.asm["ptx"]
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        done = subprocess.run(
            [cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True
        )
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
        assert int(usage["REG"]) <= 128  # two blocks of threads more than half fill a processor
        assert (usage["STACK"], usage["LOCAL"]) == ("0", "0")


def compile_ahead(
    capability: int, fraction_bits: int, is_f32: bool, lane_words: int
) -> triton.compiler.CompiledKernel:
    pointers = {"out": "*i64", "words": "*i32", "halves": "*i16", "codes": "*i32"}
    pointers |= {"scales": "*i32", "mismatches": "*i32"}
    numbers = dict.fromkeys(("first_row", "whole_rows", "num_groups", "num_words"), "i32")
    constants = {"FRACTION_BITS": fraction_bits, "IS_F32": is_f32, "LANE_WORDS": lane_words}
    source = triton.compiler.ASTSource(
        residual_triton._decode_tile,
        {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")},
        constants,
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": tiles_triton.NUM_WARPS}
    return triton.compile(source, target=target, options=options)
