"""The compiled residual against its plain twin, on streams good and hostile."""

import ctypes
import mmap
from collections.abc import Iterator

import pytest
import torch
from instruction_sets import Build, built
from residual_parts import (
    DTYPES,
    KINDS,
    bits_of,
    every_pattern,
    in_layout,
    random_part,
    random_qparams,
)
from torch import Tensor

from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.format import residual
from subspec.artifacts.format.packing import pack_nibbles
from subspec.artifacts.native import residual_cpu

BF16, FP16, F32 = DTYPES
LAYOUTS = (0, 16, 32, 64)


@pytest.fixture(scope="module", params=[(), ("-DPORTABLE",)], ids=["native", "portable"])
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """The functions of residual_cpu.py, once as they are and once without intrinsics."""
    with built(Build(request.param, ""), tmp_path_factory.mktemp("cache")):
        assert residual_cpu.unavailable() is None
        yield


def decoded(
    stored: Tensor,
    codes: Tensor,
    qparams: Tensor,
    dtype: torch.dtype,
    layout: int,
    threads: int = 1,
) -> Tensor:
    """codes [R, K], one per byte -> [R, K]; nothing around `out` may change."""
    size, edge = codes.numel() * dtype.itemsize, 4096
    around = torch.full((size + 2 * edge,), 0xA5, dtype=torch.uint8)
    around = around[-around.data_ptr() % 64 :]
    out = around[edge : edge + size].view(dtype).view(codes.shape)
    try:
        residual_cpu.decode_into(out, stored, in_layout(codes, layout), qparams, layout, threads)
    finally:
        assert (around[:edge] == 0xA5).all() and (around[edge + size :] == 0xA5).all()
    return out


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_directions_agree_with_the_plain_twin(kind: str, dtype: torch.dtype) -> None:
    for num_rows, num_columns, stray in ((64, 64, 0.03), (128, 192, 0.03), (64, 320, 1.0)):
        weight, codes, qparams = random_part(kind, num_rows, num_columns, dtype, stray)
        stored = residual.encode(weight, pack_nibbles(codes), qparams)
        assert torch.equal(residual_cpu.encode(weight, pack_nibbles(codes), qparams, 1), stored)
        for layout in LAYOUTS:
            back = decoded(stored, codes, qparams, dtype, layout)
            assert torch.equal(bits_of(back), bits_of(weight))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pattern_survives(kind: str, dtype: torch.dtype) -> None:
    weight = every_pattern(dtype)
    _, codes, qparams = random_part(kind, 64, 1024, dtype)
    stored = residual_cpu.encode(weight, pack_nibbles(codes), qparams, 1)
    assert torch.equal(stored, residual.encode(weight, pack_nibbles(codes), qparams))
    assert torch.equal(bits_of(decoded(stored, codes, qparams, dtype, 64)), bits_of(weight))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_rows_of_a_larger_matrix_change_nothing(dtype: torch.dtype) -> None:
    weight, codes, qparams = random_part("typical", 512, 1024, dtype)  # 256 tiles: up to 4 threads
    whole = random_qparams("extreme", 16, 1024, torch.Generator().manual_seed(1))
    whole[:, 192 : 192 + 512] = qparams
    part = whole[:, 192 : 192 + 512]
    stored = residual_cpu.encode(weight, pack_nibbles(codes), qparams, 1)
    for threads in (1, 2, 3, 4, 9):
        assert torch.equal(residual_cpu.encode(weight, pack_nibbles(codes), part, threads), stored)
        for layout in LAYOUTS:
            back = decoded(stored, codes, part, dtype, layout, threads)
            assert torch.equal(bits_of(back), bits_of(weight))


@pytest.mark.usefixtures("library")
def test_parts_at_row_offsets_decode_from_their_slice_of_the_codes() -> None:
    weight, codes, qparams = random_part("typical", 256, 128, BF16)
    for layout in LAYOUTS:
        all_codes = in_layout(codes, layout).view(-1)
        for first, rows in ((0, 64), (64, 64), (128, 128)):
            some = slice(first, first + rows)
            own = residual.encode(weight[some], pack_nibbles(codes[some]), qparams[:, some])
            own_codes = all_codes[first * 64 : (first + rows) * 64]
            out = torch.empty(rows, 128, dtype=BF16)
            residual_cpu.decode_into(out, own, own_codes, qparams[:, some], layout, 1)
            assert torch.equal(bits_of(out), bits_of(weight[some]))


def test_the_packed_layouts_of_these_tests_are_those_of_aten() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    tile_rows = {"AVX512": 64, "AVX2": 32}.get(capability)
    if tile_rows is None:
        pytest.skip(f"ATen packs otherwise with {capability}")
    _, codes, _ = random_part("typical", 128, 192, BF16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert torch.equal(packed.view(-1), in_layout(codes, tile_rows).view(-1))


# ---- hostile streams ----------------------------------------------------------------------------


def before_a_wall(data: Tensor) -> Tensor:
    """A copy of bytes whose end is the end of memory that may be read."""
    page = mmap.PAGESIZE
    size = -(-max(data.numel(), 1) // page) * page
    area = mmap.mmap(-1, size + page)
    memory = torch.frombuffer(area, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(memory.data_ptr() + size), page, 0) == 0
    copy = memory[size - data.numel() : size]
    copy.copy_(data)
    return copy


def agree(stored: Tensor, codes: Tensor, qparams: Tensor, dtype: torch.dtype) -> bool:
    """Both twins refuse the stream (False), or both make the same of it (True)."""
    try:
        expected = residual.decode(stored, pack_nibbles(codes), qparams, dtype)
    except SubspecError as error:
        with pytest.raises(SubspecError) as caught:
            decoded(stored, codes, qparams, dtype, 64)
        assert caught.value.exit_code == error.exit_code
        return False
    assert torch.equal(bits_of(decoded(stored, codes, qparams, dtype, 64)), bits_of(expected))
    return True


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_damaged_streams_do_to_it_what_they_do_to_the_plain_twin(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, codes, qparams = random_part("typical", 64, 128, dtype)
    stored = residual.encode(weight, pack_nibbles(codes), qparams)
    index = residual.sections(stored, 64, 128, dtype).tile_index
    wall = before_a_wall(stored)
    outcomes = []
    for trial in range(150):
        wall.copy_(stored)
        payload = wall[20:]
        if trial < 60:  # a flipped bit anywhere
            at = int(torch.randint(len(wall), (), generator=generator))
            wall[at] ^= 1 << trial % 8
        elif trial < 100:  # garbage, but for the index
            payload.random_(generator=generator)
        elif trial < 110:
            payload.fill_(255)
        else:  # tile boundaries moved
            moved = torch.randint(int(index[-1]) + 1, (3,), generator=generator).sort()[0]
            wall.view(torch.int32)[1:4] = moved.int()
        outcomes.append(agree(wall, codes, qparams, dtype))
    assert {*outcomes} == {True, False}
    for size in (0, 4, 20, 32, len(stored) - 4):
        assert not agree(before_a_wall(stored[:size]), codes, qparams, dtype)
    assert agree(before_a_wall(stored), codes, qparams, dtype)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_codes_and_no_qparams_lead_it_out_of_its_memory(dtype: torch.dtype) -> None:
    """Also such as no artifact holds: NaN, infinities, negative scales."""
    generator = torch.Generator().manual_seed(0)
    weight, codes, qparams = random_part("typical", 64, 128, dtype)
    stored = before_a_wall(residual.encode(weight, pack_nibbles(codes), qparams))
    for _ in range(40):
        wild_codes = torch.randint(0, 16, codes.shape, dtype=torch.uint8, generator=generator)
        bits = torch.randint(-(1 << 15), 1 << 15, qparams.shape, generator=generator)
        wild_qparams = bits.short().view(torch.bfloat16)
        with pytest.raises(SubspecError):
            decoded(stored, wild_codes, wild_qparams, dtype, 64)
        own = residual_cpu.encode(weight, pack_nibbles(wild_codes), wild_qparams, 1)
        assert len(own) <= len(stored) * 4
