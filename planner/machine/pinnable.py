"""Amount of host memory that can be pinned, tried by a child process that may be killed.

Free memory does not tell: cgroups, WSL2, RLIMIT_MEMLOCK and the driver have limits of their own.
This file is also the child's program, which imports torch only for a GPU.
"""

import ctypes
import mmap
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from subspec.artifacts.common.child import run_child
from subspec.artifacts.common.host_memory import memories

TIME_LIMIT_SECONDS = 60.0
MIN_PIECE = 256 << 20
MAX_PIECE = 4 << 30
RESERVE_BYTES = 1 << 30  # always left free, or a 20th of the memory if that is more
PORTABLE = 1  # cudaHostRegister: pinned for every GPU's context


def pinnable_bytes(device: str, wanted_bytes: int) -> int:
    """Host bytes that can be pinned for `device` in addition to what is pinned already.

    At least `wanted_bytes` if possible; 0 if unknown or less than MIN_PIECE. The child stops
    after TIME_LIMIT_SECONDS: on a slow machine more may be possible.
    """
    child = [
        sys.executable,
        "-P",
        "-m",
        "subspec.planner.machine.pinnable",
        device,
        str(wanted_bytes),
    ]
    return last_total(output_of(child, TIME_LIMIT_SECONDS), wanted_bytes)


def output_of(command: Sequence[str], seconds: float) -> bytes:
    """Output of a command until it ended, was killed, or `seconds` had passed. Afterwards its
    memory is free again."""
    try:
        return run_child(command, seconds=seconds).stdout
    except subprocess.TimeoutExpired as error:
        return error.stdout or b""
    except OSError:
        return b""


def last_total(output: bytes, wanted_bytes: int) -> int:
    """Largest valid total in the complete lines of the output; 0 if there is none."""
    lines = output.split(b"\n")[:-1]
    found = [int(line) for line in lines if re.fullmatch(rb"[0-9]{1,18}", line)]
    most = whole_pieces(wanted_bytes + MIN_PIECE - 1)
    return max((total for total in found if total <= most), default=0)


def whole_pieces(num_bytes: int) -> int:
    return num_bytes // MIN_PIECE * MIN_PIECE


# The child


def totals(
    wanted_bytes: int, pin: Callable[[int], bool], spare: Callable[[], int]
) -> Iterator[int]:
    """The bytes pinned after each piece.

    A piece is at most a quarter of the total so far, which bounds what a killed child cannot
    report. A piece that is refused, or that would not leave the reserve, is halved and tried again.
    """
    wanted = whole_pieces(wanted_bytes + MIN_PIECE - 1)
    reached, largest = 0, MAX_PIECE
    while reached < wanted and largest:
        piece = max(MIN_PIECE, whole_pieces(reached // 4))
        piece = min(piece, largest, wanted - reached)
        if piece <= spare() and pin(piece):
            reached += piece
            yield reached
        else:
            largest = whole_pieces(piece // 2)


def pin_function(device: str) -> Callable[[int], bool]:
    """Function that allocates, pins and keeps a number of bytes; it returns False if refused."""
    lock = mlock() if device == "cpu" else host_register(device)
    held: list[mmap.mmap] = []

    def pin(num_bytes: int) -> bool:
        try:
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            return False
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        if not lock(ctypes.addressof(ctypes.c_char.from_buffer(memory)), num_bytes):
            memory.close()
            return False
        held.append(memory)
        return True

    return pin


def mlock() -> Callable[[int, int], bool]:
    call = ctypes.CDLL(None).mlock
    return lambda address, size: call(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0


def host_register(device: str) -> Callable[[int, int], bool]:
    import torch

    torch.cuda.set_device(torch.device(device).index or 0)
    cudart = torch.cuda.cudart()
    return lambda address, size: int(cudart.cudaHostRegister(address, size, PORTABLE)) == 0


def spare_bytes() -> int:
    """Bytes that the machine and this process's control groups can spare for the next piece."""
    return min(less_reserve(*both) for both in memories())


def less_reserve(total: int, available: int) -> int:
    return available - max(RESERVE_BYTES, total // 20)


def main(device: str, wanted_bytes: int) -> None:
    with suppress(OSError):  # if memory runs out, the kernel is to choose this process
        Path("/proc/self/oom_score_adj").write_text("1000")
    for total in totals(wanted_bytes, pin_function(device), spare_bytes):
        print(total, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
