"""Where Triton cannot start, for want of a compiler, of Python.h or of libcuda, plans store raw
weights and plain twins compute."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import replan
from fp8_parts import own_part
from running import answer
from simcuda.answering import PROMPT, USUAL
from simcuda.device import simulated
from simcuda.simulation import Simulation
from toys import make_fp8_spec, make_spec

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format import fp8
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import Encoding, Part
from subspec.planner.machine.residual_rate import decoded_weights_per_second
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.kernels import gemlite_kernel, triton_driver
from subspec.runtime.stream.residual_decoder import ResidualDecoder

pytest.importorskip("triton")

Demo = Callable[[Encoding], Artifact]
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpus() -> Iterator[Simulation]:
    with simulated() as simulation:
        yield simulation
    assert not simulation.races


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_driver, "unavailable", lambda device: "there is no C compiler")


# ---- whether it can -----------------------------------------------------------------------------


@pytest.fixture
def to_be_started(
    gpus: Simulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Triton, as it is before its first launch, with an empty cache."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime.driver import driver

    monkeypatch.setattr(driver, "_active", None)
    monkeypatch.setattr(driver, "_default", None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    asked = (triton_driver.unavailable, nvidia.libcuda_dirs, nvidia.library_dirs)
    for function in asked:
        function.cache_clear()
    yield
    for function in asked:
        function.cache_clear()


@pytest.mark.usefixtures("to_be_started")
def test_without_a_c_compiler_triton_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = triton_driver.unavailable(GPU)
    assert found is not None and found.startswith("triton cannot start: Failed to find C compiler")


@pytest.mark.usefixtures("to_be_started")
def test_without_the_headers_of_python_triton_cannot_start_and_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, calls = tmp_path / "cc", tmp_path / "calls"
    compiler.write_text(f"#!/bin/sh\necho called >> {calls}\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    found = triton_driver.unavailable(GPU)
    assert found is not None and "\n" not in found
    assert found.startswith("triton cannot start: Command") and found.endswith("exit status 1.")
    assert triton_driver.unavailable(GPU) == found
    assert calls.read_text() == "called\n"


@pytest.mark.usefixtures("to_be_started")
def test_without_libcuda_in_the_linkers_cache_triton_cannot_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_LIBCUDA_PATH")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: b"")
    found = triton_driver.unavailable(GPU)
    assert found is not None and "ldconfig" in found and "\n" not in found


# ---- what is done then --------------------------------------------------------------------------


@pytest.mark.usefixtures("gpus", "no_triton")
def test_answers_are_the_plain_ones_without_triton_and_the_engine_says_why(demo: Demo) -> None:
    chosen, said = replan(demo("raw"), **{**USUAL, "width": 2, "depth": 3}), []
    for how in (OpenOptions("substitute"), OpenOptions("plain")):
        with Engine.open(chosen, how) as engine:
            assert engine.slow_attention_reason == "there is no C compiler"
            said.append(answer(engine, PROMPT, 8))
    assert said[0] == said[1] and len(said[0]) == 8


@pytest.mark.usefixtures("gpus", "no_triton")
def test_a_plan_that_needs_triton_is_refused_with_a_sentence(demo: Demo) -> None:
    residual = replan(demo("residual"), **USUAL)  # type: ignore[arg-type]
    with pytest.raises(SubspecError, match="Triton, which cannot run here: there") as caught:
        Engine.open(residual)
    assert caught.value.exit_code == Exit.WRONG_MACHINE


@pytest.mark.usefixtures("gpus", "no_triton")
def test_planning_without_triton_finds_no_decoder_and_no_gemlite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gemlite_kernel, "is_installed", lambda: True)
    assert decoded_weights_per_second(make_spec(), GPU, "aten", "residual") == 0.0
    assert gemlite_kernel.unavailable(GPU, [256]) == "there is no C compiler"


@pytest.mark.usefixtures("gpus", "no_triton")
def test_fp8_codes_are_multiplied_out_without_triton() -> None:
    """In several pieces, from a row within a block of scales."""
    weight, _, _, scales = own_part(320, 128, (64, 64))
    linear = replace(make_fp8_spec().linears[0], out_features=320, in_features=128)
    part = Part(linear, 96, 224, 224 * 128 * 2)
    there = scales._replace(values=scales.values.cuda())
    scratch = torch.empty(part.num_bytes, dtype=torch.uint8, device=GPU)
    none_bad = torch.zeros(1, dtype=torch.int32, device=GPU)
    decoder = ResidualDecoder({}, {linear.name: there}, scratch, torch.bfloat16, 1, none_bad)
    got = decoder.decode(part, weight[96:].cuda().view(torch.float8_e4m3fn))
    assert torch.equal(got.cpu(), fp8.dequantize(weight, scales)[96:])
