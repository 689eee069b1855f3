"""The CUDA decoders of FP8 weights against their plain twins: on the CPU under Triton's
interpreter, where a GPU is on that, and compiled ahead of time. Processes are as in
test_residual_triton.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fp8_parts import adversarial_part, own_part
from residual_parts import aten_layout, gemlite_layout
from torch import Tensor

from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.format import fp8, fp8_residual
from subspec.artifacts.format.fp8 import Scales
from subspec.artifacts.format.packing import pack_nibbles, unpack_nibbles
from subspec.artifacts.plan import Int4Kernel

triton = pytest.importorskip("triton")
fp8_triton = pytest.importorskip("subspec.runtime.kernels.fp8_triton")
tiles_triton = pytest.importorskip("subspec.runtime.kernels.tiles_triton")

LAYOUTS: list[tuple[Int4Kernel, int, int]] = [
    ("aten", 8, 256),
    ("aten", 4, 192),
    ("gemlite", 0, 192),
]
ROWS, FIRST_ROW, NUM_ROWS = 192, 64, 64  # of the matrix, and of the part that is decoded
PART = slice(FIRST_ROW, FIRST_ROW + NUM_ROWS)


def test_the_kernels_agree_with_their_plain_twins_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-o", "python_functions=check_*"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("layout", "inner_tiles", "num_columns"), LAYOUTS)
def check_a_part_is_decoded_to_the_exact_weights(
    layout: Int4Kernel, inner_tiles: int, num_columns: int
) -> None:
    weight, codes, qparams, scales = own_part(ROWS, num_columns, (64, 64))
    got, mismatches = decoded(weight, unpack_nibbles(codes), qparams, scales, layout, inner_tiles)
    assert torch.equal(got, fp8.dequantize(weight[PART], scales.from_row(FIRST_ROW)))
    assert mismatches == 0


@pytest.mark.parametrize("kind", ["typical", "extreme", "on the qparams"])
def check_any_codes_come_back_as_escapes(kind: str) -> None:
    weight, codes, qparams, scales = adversarial_part(kind, 3e-4, 64)
    weight[(weight & 0x7F) == 0x7F] = 0  # NaN
    got, mismatches = decoded(weight, codes, qparams, scales, "gemlite", 0)
    assert torch.equal(got, fp8.dequantize(weight[PART], scales.from_row(FIRST_ROW)))
    assert mismatches == 0


def check_damage_is_counted_where_the_twin_refuses_it() -> None:
    weight, codes, qparams, scales = own_part(ROWS, 64, (64, 64))
    below = scales.from_row(FIRST_ROW)
    own = codes[PART].contiguous(), qparams[:, PART], below
    stored = fp8_residual.encode(weight[PART], *own)
    packed = gemlite_layout(unpack_nibbles(codes))
    num_refused = 0
    for place in (3, 4, 7, 9, 12, 200, 401, len(stored) - 14):
        damaged = stored.clone()
        damaged[place] ^= 0x91
        out = torch.empty(NUM_ROWS, 64, dtype=torch.bfloat16)
        mismatches = torch.zeros(1, dtype=torch.int32)
        fp8_triton.decode_into(out, damaged, packed, qparams, below, "gemlite", mismatches)
        try:
            expected = fp8_residual.decode(damaged, *own)
        except SubspecError:
            num_refused += 1
            assert int(mismatches) > 0
        else:
            assert int(mismatches) == 0
            numbers = (expected & 0x7F) != 0x7F  # damage can also make NaN of a code
            assert torch.equal(out[numbers], fp8.dequantize(expected, below)[numbers])
    assert num_refused >= 3
    with pytest.raises(SubspecError, match="it is 8 bytes"):
        fp8_triton.decode_into(out, stored[:8], packed, qparams, below, "gemlite", mismatches)


def check_codes_are_multiplied_out_as_the_twin_does() -> None:
    weight, _, _, scales = own_part(ROWS, 192, (64, 64))
    out = torch.empty(NUM_ROWS, 192, dtype=torch.bfloat16)
    below = scales.from_row(FIRST_ROW)
    fp8_triton.dequantize_into(out, weight[PART], below)
    assert torch.equal(out, fp8.dequantize(weight[PART], below))


def decoded(
    weight: Tensor,
    codes: Tensor,
    qparams: Tensor,
    scales: Scales,
    layout: Int4Kernel,
    inner_tiles: int,
    device: str = "cpu",
) -> tuple[Tensor, int]:
    """The part of FP8 codes [ROWS or more, K], encoded over codes uint8 and decoded."""
    below = scales.from_row(FIRST_ROW)
    stored = fp8_residual.encode(
        weight[PART], pack_nibbles(codes[PART]), qparams[:, PART].contiguous(), below
    )
    room = torch.zeros(len(stored) + 4, dtype=torch.uint8, device=device)
    part = room[4:].copy_(stored)  # at no multiple of 8 bytes
    packed = aten_layout(codes, inner_tiles) if layout == "aten" else gemlite_layout(codes)
    out = torch.empty(NUM_ROWS, weight.shape[1], dtype=torch.bfloat16, device=device)
    mismatches = torch.zeros(1, dtype=torch.int32, device=device)
    there = below._replace(values=below.values.to(device))
    fp8_triton.decode_into(
        out, part, packed.to(device), qparams.to(device), there, layout, mismatches
    )
    return out.cpu(), int(mismatches)


@pytest.mark.gpu
@pytest.mark.parametrize(("layout", "inner_tiles", "num_columns"), LAYOUTS)
def test_a_part_is_decoded_on_cuda(layout: Int4Kernel, inner_tiles: int, num_columns: int) -> None:
    weight, codes, qparams, scales = own_part(ROWS, num_columns, (64, 64))
    expected = fp8.dequantize(weight[PART], scales.from_row(FIRST_ROW))
    unpacked = unpack_nibbles(codes)
    got, mismatches = decoded(weight, unpacked, qparams, scales, layout, inner_tiles, "cuda")
    assert torch.equal(got, expected) and mismatches == 0
    out = torch.empty(NUM_ROWS, num_columns, dtype=torch.bfloat16, device="cuda")
    below = scales._replace(values=scales.values.cuda(), first_row=FIRST_ROW)
    fp8_triton.dequantize_into(out, weight[PART].cuda(), below)
    assert torch.equal(out.cpu(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_the_kernels_compile_to_code_that_flushes_and_spills_nothing(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this build of triton has no CUDA tools")
    for lane_words in (None, 4, 0):  # None: of codes alone
        compiled = compile_ahead(capability, lane_words)
        assert ".ftz" not in compiled.asm["ptx"]
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        done = subprocess.run(
            [cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True
        )
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
        assert int(usage["REG"]) <= 128
        assert (usage["STACK"], usage["LOCAL"]) == ("0", "0")


def compile_ahead(capability: int, lane_words: int | None) -> triton.compiler.CompiledKernel:
    kernel = fp8_triton._widen_tile if lane_words is None else fp8_triton._decode_tile
    pointers = {"out": "*i64", "words": "*i32", "bytes_": "*i8", "codes": "*i32"}
    pointers |= {"qparams": "*i32", "scales": "*fp32", "mismatches": "*i32"}
    constants = {} if lane_words is None else {"LANE_WORDS": lane_words}
    kinds = {**pointers, **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": tiles_triton.NUM_WARPS}
    return triton.compile(source, target=target, options=options)
