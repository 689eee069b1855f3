"""Times the link, the kernels and one layer of this machine -> Profile, with the runtime's code.

The only file of the planner that imports the runtime: a profile times what will run.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.folder import DISK_IS_FULL
from subspec.artifacts.model import (
    GROUP_SIZE,
    PAGE_BYTES,
    Kind,
    ModelSpec,
    linears,
    parts,
    resident_tensors,
)
from subspec.artifacts.plan import Int4Kernel, Plan, Rate, Tree
from subspec.artifacts.profile import LinkRate, Profile, Timing
from subspec.artifacts.store import Artifact
from subspec.planner.costs import Shape, exact_bytes, ledger
from subspec.planner.machine import gpu_overhead_bytes, synchronize, time_each
from subspec.planner.machine import pick_device as pick_device  # the caller's door is here
from subspec.runtime.attention import attend, attend_order_free
from subspec.runtime.cache import Cache, num_slots
from subspec.runtime.decode import causal_rows, tree_rows
from subspec.runtime.draft import TokenTree, grow, root_only
from subspec.runtime.linear import (
    Int4Weight,
    exact_product,
    exact_product_into,
    pack,
    packed_bytes,
    single_row_kernels,
)
from subspec.runtime.link import DiskLink
from subspec.runtime.memory import FastMemory, free_bytes, host_buffer
from subspec.runtime.sampling import Sampling, choose
from subspec.runtime.session import DRAFT_DTYPE, Session, fixed_weight, machine_name
from subspec.runtime.stream import ExactWeights
from subspec.runtime.substitutes import Substitutes
from subspec.runtime.text import load_text
from subspec.runtime.transformer import Rows, forward, make_decoder
from subspec.runtime.verify import accept

EXACT_WIDTHS = (8, 16, 32, 64, 104)
DRAFT_WIDTHS = (1, 2, 4, 8, 16)
DRAFT_LEVELS = 5
PADDED_WIDTHS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 104, 128, 160, 200, 256, 304, 400)
PREFILL_ROWS = 128
CYCLED_BYTES = 96 << 20  # weights are cycled through this much, so that caches do not flatter
MOST_LAYERS = 24
LARGEST_BLOCK = 64 << 20  # larger ones are not faster
LINK_TEST_BYTES = (64 << 20, 256 << 20)  # at least and at most, in between the model's size
LINK_SECONDS = 0.4  # per block size
CALIBRATION_SECONDS = 60.0  # per tree
CALIBRATION_TOKENS = 48
CALIBRATION_PROMPTS = (
    "Write a Python function that reads a file and returns its lines.",
    "Explain in a few sentences how a bicycle stays upright.",
    "Write the Python function join_paths: Join two or more path components.",
)

Progress = Callable[[str, float], None]


def measure(
    spec: ModelSpec, device: str, folder: Path, context: int, progress: Progress
) -> Profile:
    """Profile of this machine at the model's shapes. `folder`: where the artifact will lie, on the
    disk whose speed counts. Takes seconds."""
    target = torch.device(device)
    cuda = target.type == "cuda"
    free = torch.cuda.mem_get_info(target)[0] if cuda else free_bytes()
    progress("measuring the link", 0.0)
    link = measure_link(spec, target, folder)
    with torch.inference_mode():
        bench = Bench(spec, target, context)
        progress("measuring exact layers", 0.3)
        exact = bench.exact_layer()
        plain, plain_head = bench.plain_layer_and_head()
        progress("measuring draft steps", 0.6)
        kernel, draft, draft_head = bench.faster_draft()
        progress("measuring the head", 0.8)
        exact_head = (Timing(1, *plain_head), *bench.exact_head())
        profile = Profile(
            device="cuda" if cuda else "cpu",
            machine=machine_name(target),
            num_threads=torch.get_num_threads(),
            free_bytes=free,
            overhead_bytes=gpu_overhead_bytes(target) if cuda else 0,
            link=link,
            exact_layer=exact,
            plain_layer_seconds=plain,
            draft_layer=draft,
            exact_head=exact_head,
            draft_head=draft_head,
            prefill_token_seconds=bench.prefill_layer() / PREFILL_ROWS,
            round_seconds=bench.round_overhead(),
            int4_kernel=kernel,
            position_free_widths=bench.position_free_widths(),
        )
    progress("measured", 1.0)
    return profile


def measure_link(spec: ModelSpec, device: torch.device, folder: Path) -> tuple[LinkRate, ...]:
    """Bytes per second from the slow tier at the block sizes that a plan may stream."""
    sizes = block_sizes(spec)
    if device.type == "cuda":
        return tuple(LinkRate(size, host_rate(device, size)) for size in sizes)
    least, most = LINK_TEST_BYTES
    num_bytes = min(max(exact_bytes(spec), least), most)
    try:
        # Without a name, or at once without it: whatever ends this process, no file is left.
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            piece = torch.randint(256, (1 << 20,), dtype=torch.uint8).numpy().data
            for _ in range(-(-num_bytes // len(piece))):
                file.write(piece)
            torch.accelerator  # noqa
            return tuple(disk_rates(Path(f"/proc/self/fd/{file.fileno()}"), num_bytes, sizes))
    except OSError as error:
        raise SubspecError(
            Exit.RESOURCES if error.errno in DISK_IS_FULL else Exit.USAGE,
            f"cannot write a test file of {num_bytes >> 20} MiB in {folder}: {error.strerror}",
            "make room or choose another --out",
        ) from None
