"""What can be pinned is found out in a child, whatever becomes of it."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from subspec.planner.machine.pinnable import (
    MAX_PIECE,
    MIN_PIECE,
    last_total,
    less_reserve,
    output_of,
    pinnable_bytes,
    spare_bytes,
    totals,
)

GIB = 1 << 30
PIECE = MIN_PIECE
CHILD = [sys.executable, "-m", "subspec.planner.machine.pinnable"]
# CHILD under a limit. Root may lock more than its own by CAP_IPC_LOCK (14), which exec does not
# give back if PR_CAPBSET_DROP (24) took it away.
LIMITED = """
import ctypes, os, resource, sys
name, limit = sys.argv[1], int(sys.argv[2])
resource.setrlimit(getattr(resource, name), (limit, limit))
if name == "RLIMIT_MEMLOCK":
    ctypes.CDLL(None).prctl(24, 14, 0, 0, 0)
os.execv(sys.argv[3], sys.argv[3:])
"""


def output_under(name: str, limit: int) -> bytes:
    command = [sys.executable, "-c", LIMITED, name, str(limit), *CHILD, "cpu", str(8 * GIB)]
    return subprocess.run(command, capture_output=True, timeout=30, check=True).stdout


def has_capability(number: int) -> bool:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    effective = next(line.split()[1] for line in lines if line.startswith("CapEff"))
    return bool(int(effective, 16) >> number & 1)


def can_lock(num_bytes: int) -> bool:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return soft == resource.RLIM_INFINITY or soft >= num_bytes or has_capability(14)


def can_set_limit(num_bytes: int) -> bool:
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return hard == resource.RLIM_INFINITY or hard >= num_bytes or has_capability(24)


needs_memory = pytest.mark.skipif(spare_bytes() < 2 * PIECE, reason="too little memory is free")
needs_locks = pytest.mark.skipif(
    not can_lock(2 * PIECE), reason="RLIMIT_MEMLOCK is smaller than two pieces"
)


@needs_memory
@needs_locks
def test_what_is_wanted_is_reached_in_whole_pieces() -> None:
    assert pinnable_bytes("cpu", PIECE + 1) == 2 * PIECE


@pytest.mark.gpu
@pytest.mark.real_gpu
@needs_memory
def test_what_is_wanted_is_reached_on_cuda() -> None:
    assert pinnable_bytes("cuda", PIECE + 1) == 2 * PIECE


def test_nothing_wanted_is_nothing() -> None:
    assert pinnable_bytes("cpu", 0) == 0


def test_a_device_that_is_not_there_is_unknown() -> None:
    assert pinnable_bytes("cuda:99", GIB) == 0


@needs_memory
@pytest.mark.skipif(not can_set_limit(3 * PIECE - 1), reason="the hard RLIMIT_MEMLOCK is too small")
def test_a_lock_that_is_refused_ends_it() -> None:
    assert output_under("RLIMIT_MEMLOCK", 3 * PIECE - 1) == b"268435456\n536870912\n"


def test_where_nothing_may_be_locked_no_line_is_printed() -> None:
    assert output_under("RLIMIT_MEMLOCK", 1 << 20) == b""


@needs_memory
@needs_locks
def test_a_reservation_that_is_refused_ends_it() -> None:
    # Two pieces and Python itself fit, three pieces do not.
    assert output_under("RLIMIT_AS", 3 * PIECE - 1) == b"268435456\n536870912\n"


def test_the_last_line_of_a_killed_child_counts() -> None:
    child = "import os; print(268435456); print(536870912, flush=True); os.kill(os.getpid(), 9)"
    output = output_of([sys.executable, "-c", child], 30)
    assert last_total(output, GIB) == 2 * PIECE


def test_what_was_reached_until_the_time_limit_counts() -> None:
    output = output_of(["sh", "-c", "echo 268435456; exec sleep 60"], 5)
    assert last_total(output, GIB) == PIECE
    assert output_of(["sleep", "60"], 0.1) == b""


def test_a_child_that_cannot_be_started_prints_nothing(tmp_path: Path) -> None:
    assert output_of([str(tmp_path / "no-such-program")], 30) == b""


@pytest.mark.parametrize(
    ("output", "total"),
    [
        (b"", 0),
        (b"268435456", 0),  # cut off: more digits may have followed
        (b"268435456\n5368", PIECE),
        (b"a warning of a library\n268435456\nKilled\n", PIECE),
        (b"-268435456\n+1\n1e9\n 7\n0x10\n\n", 0),
        (b"268435456\n1073741825\n", PIECE),  # more than it was to reach
        (b"268435456\n" + b"9" * 5000 + b"\n", PIECE),
        (b"\xff\x00\n\xd9\xa3\n", 0),
        (b"805306368\n1073741824\n", GIB),  # wanted is rounded up to a piece
    ],
)
def test_only_whole_lines_with_a_possible_number_count(output: bytes, total: int) -> None:
    assert last_total(output, GIB - 1) == total


def reached(wanted: int, limit: int, spare: int = 1 << 60) -> list[int]:
    """The totals where `limit` bytes can be pinned and `spare` are free at the start."""
    taken = [0]

    def pin(num_bytes: int) -> bool:
        if taken[0] + num_bytes > limit:
            return False
        taken[0] += num_bytes
        return True

    return list(totals(wanted, pin, lambda: spare - taken[0]))


def test_pieces_grow_with_what_is_reached() -> None:
    found = reached(100 * GIB, 1 << 60)
    steps = [after - before for before, after in zip([0, *found], found, strict=False)]
    assert found[-1] == 100 * GIB and len(found) < 50
    assert steps[:8] == [PIECE] * 8 and max(steps) == MAX_PIECE
    assert all(step <= max(PIECE, total / 5) for step, total in zip(steps, found, strict=True))


@pytest.mark.parametrize("limit", [0, PIECE - 1, PIECE, 9 * GIB - 1, 40 * GIB + 5])
def test_a_limit_is_found_to_a_piece(limit: int) -> None:
    assert [0, *reached(64 * GIB, limit)][-1] == limit // PIECE * PIECE
    assert [0, *reached(64 * GIB, 1 << 60, limit)][-1] == limit // PIECE * PIECE


def test_no_piece_is_tried_that_is_not_to_spare() -> None:
    def pin(num_bytes: int) -> bool:
        raise AssertionError(f"{num_bytes} bytes")

    assert list(totals(GIB, pin, lambda: PIECE - 1)) == []


@pytest.mark.parametrize(
    ("total", "available", "spare"),
    [(8 * GIB, 5 * GIB, 4 * GIB), (100 * GIB, 60 * GIB, 55 * GIB), (GIB, GIB // 2, -GIB // 2)],
)
def test_one_gib_or_a_twentieth_stays_free(total: int, available: int, spare: int) -> None:
    assert less_reserve(total, available) == spare


def test_the_child_for_the_cpu_imports_no_torch() -> None:
    assert said_after_main("import sys; print('torch' in sys.modules)") == "False"


def test_the_kernel_is_told_to_choose_the_child_first() -> None:
    assert said_after_main("print(open('/proc/self/oom_score_adj').read())") == "1000"


def said_after_main(code: str) -> str:
    code = f"from subspec.planner.machine.pinnable import main; main('cpu', 0); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()
