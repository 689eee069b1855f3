"""gemlite's 4-bit products on GPUs, with tensors in the ledger's arenas.

gemlite cannot be imported without a GPU, so it is imported where it is called. The tuning of its
kernels takes minutes, so it is kept in the user's cache.
N = output features, K = input features, G = K / GROUP_SIZE
"""

import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.common.user_cache import user_cache_dir
from subspec.artifacts.footprint import packed_bytes
from subspec.artifacts.format.packing import ZERO_POINT_CODE
from subspec.artifacts.model import GROUP_SIZE
from subspec.runtime.kernels import triton_driver

# One kernel takes so many columns at a time, and beyond the last ones it reads what lies behind the
# grid: there a NaN would make every result one.
WHOLE_COLUMNS = 256


@dataclass(frozen=True)
class GemliteWeight:
    codes: Tensor  # int32 [K / 8, N]; nibble j of row r is column 8 r + j
    scales: Tensor  # bf16 [G, N]
    offsets: Tensor  # bf16 [G, N]; a weight is code * scale + offset


def empty(num_rows: int, num_columns: int, codes_out: Tensor, qparams_out: Tensor) -> GemliteWeight:
    """Weight [N, K] to be filled, in fast memory uint8 [N * K / 2] and uint8 [G * N * 4]."""
    shape = (2, num_columns // GROUP_SIZE, num_rows)
    scales, offsets = qparams_out.view(torch.bfloat16).view(shape)
    return GemliteWeight(codes_out.view(torch.int32).view(-1, num_rows), scales, offsets)


def pack_rows(weight: GemliteWeight, first_row: int, codes: Tensor) -> None:
    """Pack stored codes uint8 [R, K / 2], on the host, into the rows from `first_row`."""
    weight.codes[:, first_row : first_row + len(codes)] = codes.view(torch.int32).t()


def pack_qparams(weight: GemliteWeight, qparams: Tensor) -> None:
    """Pack stored qparams bf16 [G, N, 2], on the host."""
    scale, zero_point = qparams.float().unbind(-1)
    weight.scales.copy_(scale)
    weight.offsets.copy_(zero_point - ZERO_POINT_CODE * scale)


def unavailable(device: torch.device, all_num_columns: Iterable[int]) -> str | None:
    """Why matrices with these numbers of columns cannot be multiplied there, or None if they
    can."""
    if not is_installed():
        return "gemlite is not installed"
    if (problem := triton_driver.unavailable(device)) is not None:
        return problem
    odd = next((n for n in all_num_columns if n % WHOLE_COLUMNS), None)
    return None if odd is None else f"it takes whole {WHOLE_COLUMNS} columns, and one has {odd}"


def is_installed() -> bool:
    return importlib.util.find_spec("gemlite") is not None


def tune(device: torch.device, most_rows: Mapping[tuple[int, int], int]) -> None:
    """Compute products of all numbers of rows that are tuned separately, while fast memory is still
    free. most_rows: largest number for a matrix, by its rows and columns.

    Triton times a kernel at the first call of a shape in every process, even if one configuration
    is known, and takes 256 MiB for it beside copies of the weight.
    """
    with torch.inference_mode():
        # cuBLAS keeps its workspace: it may not come to lie in what timing takes, and hold that.
        square = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
        torch.mm(square, square)
        for (num_rows, num_columns), most in sorted(most_rows.items()):
            room = [
                torch.zeros(size, dtype=torch.uint8, device=device)
                for size in packed_bytes(num_rows, num_columns, "gemlite")
            ]
            weight = empty(num_rows, num_columns, room[0], room[2])
            for count in tuned_rows(most):
                x = torch.zeros(count, num_columns, dtype=torch.bfloat16, device=device)
                product(x, weight)
    torch.cuda.synchronize(device)
    del room, weight, x
    torch.cuda.empty_cache()


def tuned_rows(most: int) -> list[int]:
    """Numbers of rows that stand for all up to `most`.

    gemlite tunes for each number up to 4 and then for 8, 16, 24, 32, 48, 64, 96, ..., to which it
    rounds others up. Two stand for each of these, as Triton compiles a kernel for multiples of 16
    and for other numbers, and from 64 rows on gemlite takes another kernel than for 63.
    """
    found, last = {1, 2, 3, 4}, 4
    for bound in sorted(times << power for times in (1, 3) for power in range(3, 12)):
        if last < most:
            found |= {bound - 1, bound}
            last = bound
    return sorted(found)


def product(x: Tensor, weight: GemliteWeight) -> Tensor:
    """x bf16 [T, K] -> bf16 [T, N] = x @ weight^T."""
    from gemlite import forward_functional

    more_tensors, meta = _form(x.device)
    tensors = [weight.codes, weight.scales, weight.offsets, *more_tensors]
    return forward_functional(x, None, tensors, meta)  # type: ignore[no-any-return]


@functools.cache
def _form(device: torch.device) -> tuple[list[Tensor], list[int]]:
    """gemlite's other arguments for a weight (types, group size, layout), taken from a small weight
    that gemlite packed itself."""
    from gemlite.helper import A16W4_HQQ_INT

    _load_tuning(device)
    codes = torch.zeros(64, 2 * GROUP_SIZE, dtype=torch.uint8, device=device)
    ones = torch.ones(codes.numel() // GROUP_SIZE, 1, dtype=torch.bfloat16, device=device)
    small = A16W4_HQQ_INT(device=str(device), dtype=torch.bfloat16).from_weights(codes, ones, ones)
    return small.get_tensor_args()[3:], small.get_meta_args()


# The tuning: JSON written by gemlite, without the versions and the GPU that it is for.


def _load_tuning(device: torch.device) -> None:
    import gemlite

    path = tuning_file(torch.cuda.get_device_name(device))
    if path is not None and path.exists():
        gemlite.load_config(str(path), print_error=False)


def keep_tuning(device: torch.device) -> None:
    """Add the tuning of this process to the file. Ignores errors: the next start then tunes
    again."""
    import gemlite

    path = tuning_file(torch.cuda.get_device_name(device))
    if path is None:
        return
    with suppress(OSError):
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".new")
        os.close(descriptor)
        try:
            if path.exists():
                shutil.copyfile(path, unfinished)
            gemlite.cache_config(unfinished)  # adds to the existing content
            os.replace(unfinished, path)
        finally:
            Path(unfinished).unlink(missing_ok=True)


def tuning_file(gpu: str) -> Path | None:
    """File for a GPU and the installed versions, or None without a cache folder."""
    folder = user_cache_dir("kernels")
    known = (gpu, *(version(name) for name in ("gemlite", "triton", "torch")))
    digest = hashlib.sha256("\0".join(known).encode()).hexdigest()
    return folder / f"gemlite-{digest[:32]}.json" if folder else None
