"""The gated delta rule on CUDA: on the CPU under Triton's interpreter, where a GPU is on that, and
compiled ahead of time.

Whether Triton interprets is settled for a whole process when triton is imported: functions named
check_ are for the process of their own that the first test starts.
"""

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from interpreter import needs_interpreter
from torch import Tensor

from subspec.artifacts.footprint import delta_net_slots_bytes
from subspec.runtime.model.delta_net import walk
from subspec.runtime.model.paths import Paths, chain_paths, steps_of, tree_paths, uploaded

triton = pytest.importorskip("triton")
delta_net_triton = pytest.importorskip("subspec.runtime.kernels.delta_net_triton")

Shape = tuple[int, int, int]  # J, E, F
SHAPES: list[Shape] = [(3, 16, 24), (2, 12, 70), (1, 128, 33)]


@needs_interpreter
def test_rows_have_bits_of_their_own_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-o", "python_functions=check_*"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0


def rows_of(shape: Shape, count: int, device: str) -> tuple[Tensor, list[Tensor]]:
    """A memory, and q, k, v, decay and beta."""
    heads, keys, values = shape
    generator = torch.Generator().manual_seed(count)

    def some(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    q, k = (torch.nn.functional.normalize(some(count, heads, keys), dim=2) for _ in range(2))
    decay, beta = (some(count, heads).sigmoid() for _ in range(2))
    rows = [q * keys**-0.5, k, some(count, heads, values), decay, beta]
    return some(heads, keys, values).to(device), [one.to(device) for one in rows]


def walked(
    memory: Tensor, paths: Paths, rows: Sequence[Tensor], end_rows: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """What is read, and the memories behind some rows."""
    steps = steps_of(paths.sources.tolist(), paths.slots.tolist(), end_rows)
    ends = memory.new_empty(len(end_rows), *memory.shape)
    return delta_net_triton.walk(memory, uploaded(steps, memory.device), rows, ends), ends


def random_tree(count: int, seed: int) -> list[int]:
    choose = random.Random(seed)
    return [choose.randrange(-1, row) for row in range(count)]


def path_to(parents: Sequence[int], row: int) -> list[int]:
    return [*path_to(parents, parents[row]), row] if row >= 0 else []


# ---- properties, on any device ------------------------------------------------------------------


def it_differs_from_the_plain_twin_by_rounding_only(device: str) -> None:
    for shape in SHAPES:
        memory, rows = rows_of(shape, 9, device)
        for paths in (chain_paths(9, 1), tree_paths(random_tree(9, 2), 1)):
            got, _ = walked(memory, paths, rows)
            torch.testing.assert_close(got, walk(memory, paths, rows, ()), rtol=1e-5, atol=1e-5)


def a_row_of_a_tree_has_the_bits_that_its_path_has_row_by_row(device: str) -> None:
    shape = SHAPES[0]
    for seed, count in enumerate((1, 4, 11)):
        memory, rows = rows_of(shape, count, device)
        before, parents = memory.clone(), random_tree(count, seed)
        every = range(count)
        got, states = walked(memory, tree_paths(parents, 1), rows, every)
        assert torch.equal(memory, before)
        for row in every:
            state = memory
            for node in path_to(parents, row):
                alone = [some[node : node + 1] for some in rows]
                read, [state] = walked(state, chain_paths(1, 1), alone, [0])
            assert torch.equal(read[0], got[row]) and torch.equal(state, states[row])


def a_chain_may_leave_its_end_where_it_began(device: str) -> None:
    memory, rows = rows_of(SHAPES[1], 7, device)
    expected, [state] = walked(memory, chain_paths(7, 1), rows, [6])
    steps = steps_of(*(x.tolist() for x in chain_ends(7)), [6])
    got = delta_net_triton.walk(memory, uploaded(steps, memory.device), rows, memory[None])
    assert torch.equal(got, expected) and torch.equal(memory, state)


def chain_ends(count: int) -> tuple[Tensor, Tensor]:
    paths = chain_paths(count, 1)
    return paths.sources, paths.slots


PROPERTIES: list[Callable[[str], None]] = [
    it_differs_from_the_plain_twin_by_rounding_only,
    a_row_of_a_tree_has_the_bits_that_its_path_has_row_by_row,
    a_chain_may_leave_its_end_where_it_began,
]
holds = pytest.mark.parametrize("holds", PROPERTIES, ids=lambda one: one.__name__)


@holds
def check_interpreted(holds: Callable[[str], None]) -> None:
    holds("cpu")


@pytest.mark.gpu
@pytest.mark.real_gpu  # the simulated one has the plain twin
@holds
def test_on_cuda(holds: Callable[[str], None]) -> None:
    holds("cuda")


def test_a_chain_needs_no_slot_and_a_beam_one_for_each_row_but_the_last() -> None:
    def slots_of(parents: Sequence[int]) -> set[int]:
        paths = tree_paths(parents, 1)
        steps = steps_of(paths.sources.tolist(), paths.slots.tolist(), [])
        return {slot for _, slot, _ in steps} - {-1}

    assert not slots_of([-1, 0, 1, 2]) and not slots_of([-1])
    assert len(slots_of([-1, 0, 0, 0, 1, 2, 3])) <= 4
    assert delta_net_slots_bytes(0, 8, 128, 128) == 0
    assert delta_net_slots_bytes(3, 48, 128, 64) == 3 * 48 * 128 * 64 * 4


# ---- compiled ahead of time ---------------------------------------------------------------------


def test_it_compiles_without_spills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert registers(89, 128, 128, tmp_path) <= 255


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_it_compiles_without_spills_for_every_gpu(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for keys, values in ((64, 64), (96, 128), (128, 128), (192, 128), (256, 256), (512, 64)):
        assert registers(capability, keys, values, tmp_path) <= 255


def registers(capability: int, keys: int, values: int, folder: Path) -> int:
    """Registers a thread; asserts that nothing spills, and that nothing is fused."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this build of triton has no CUDA tools")
    names = ("memory", "slots", "q", "k", "v", "decay", "beta", "ends", "out")
    types = {"memory": "*fp32", "steps": "*i32", **dict.fromkeys(names[1:], "*fp32")}
    types["num_rows"] = "i32"
    constants = {
        "HEADS": 48,
        "KEYS": keys,
        "VALUES": values,
        "PADDED": delta_net_triton.padded_keys(keys),
        "COLUMNS": delta_net_triton.columns_of(keys),
    }
    attributes = {(list(types).index(name),): [["tt.divisibility", 16]] for name in names}
    source = triton.compiler.ASTSource(
        delta_net_triton._walk,
        {**types, **dict.fromkeys(constants, "constexpr")},
        constants,
        attributes,
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=target, options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    done = subprocess.run(
        [cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True
    )
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
    assert (found["STACK"], found["LOCAL"]) == ("0", "0"), found
    listed = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True)
    assert "FFMA" not in listed.stdout
    return int(found["REG"])
