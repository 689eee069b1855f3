"""Times the link, the kernels and one layer of this machine -> Profile, with the runtime's code.

The only file of the planner that imports the runtime: a profile times what will run.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.model import (
    EMBEDDING,
    GROUP_SIZE,
    Kind,
    ModelSpec,
    linears,
    parts,
    resident_tensors,
)
from subspec.artifacts.plan import Int4Kernel, Plan, Rate, aligned
from subspec.artifacts.profile import LinkRate, Profile, Timing
from subspec.artifacts.store import Artifact
from subspec.runtime.attention import attend, attend_order_free
from subspec.runtime.cache import Cache, num_slots
from subspec.runtime.decode import tree_rows
from subspec.runtime.draft import TokenTree, root_only
from subspec.runtime.linear import Int4Weight, pack, packed_bytes, single_row_kernels
from subspec.runtime.link import DiskLink
from subspec.runtime.memory import HUGE_PAGE_BYTES, free_bytes, host_buffer
from subspec.runtime.sampling import Sampling
from subspec.runtime.session import Session, machine_name
from subspec.runtime.stream import ExactWeights
from subspec.runtime.substitutes import Substitutes
from subspec.runtime.text import load_text
from subspec.runtime.transformer import Decoder, Product, Rows, attention_block, make_decoder, mlp_block

EXACT_WIDTHS = (1, 8, 16, 32, 64, 104)
DRAFT_WIDTHS = (1, 2, 4, 8, 16)
PADDED_WIDTHS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 104, 128, 160, 200, 256, 304, 400)
LINK_BLOCKS = (1 << 20, 4 << 20, 16 << 20, 64 << 20)
LINK_TEST_BYTES = 256 << 20
PREFILL_ROWS = 128
RING_BYTES = 96 << 20  # layers are cycled through this much, so that caches do not flatter
MOST_LAYERS = 24
REPEATS = 5

Progress = Callable[[str, float], None]


def measure(
    spec: ModelSpec, device: str, folder: Path, context: int, progress: Progress
) -> Profile:
    """Profile of this machine at the model's shapes. `folder`: where the artifact will lie, on the
    disk whose speed counts. Takes seconds."""
    target = torch.device(device)
    overhead, free = fast_memory_state(target)
    progress("measuring the link", 0.0)
    link = measure_link(target, folder)
    bench = Bench(spec, target, context, "aten")
    with torch.inference_mode():
        progress("measuring layers", 0.3)
        exact = [bench.exact_layer(width) for width in EXACT_WIDTHS]
        plain = bench.plain_layer()
        progress("measuring draft steps", 0.6)
        kernel, draft = faster_kernel(spec, bench, target, context)
        progress("measuring the head", 0.8)
        profile = Profile(
            device="cuda" if target.type == "cuda" else "cpu",
            machine=machine_name(target),
            num_threads=torch.get_num_threads(),
            free_bytes=free,
            overhead_bytes=overhead,
            link=link,
            exact_layer=tuple(exact),
            plain_layer_seconds=plain.seconds,
            draft_layer=tuple(draft),
            exact_head=tuple(bench.head(bench.exact, width) for width in EXACT_WIDTHS),
            draft_head=tuple(bench.head(bench.substitutes, width) for width in DRAFT_WIDTHS),
            prefill_token_seconds=bench.prefill_layer().seconds / PREFILL_ROWS,
            round_seconds=bench.round_overhead(),
            int4_kernel=kernel,
            position_free_widths=bench.position_free_widths(),
        )
    progress("measured", 1.0)
    return profile


def fast_memory_state(device: torch.device) -> tuple[int, int]:
    """(bytes that the process takes before any weight, bytes free now).

    cpu: the interpreter and torch are not counted against the cap.
    """
    if device.type == "cuda":
        before, _ = torch.cuda.mem_get_info(device)
        torch.mm(torch.ones(64, 64, device=device), torch.ones(64, 64, device=device))
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        # The context exists by the time mem_get_info answers: ask the driver what is ours.
        return own_gpu_bytes(device, fallback=max(512 << 20, before - free)), free
    return 0, free_bytes()


def own_gpu_bytes(device: torch.device, fallback: int) -> int:
    """What NVML says this process occupies, less what torch's allocator holds."""
    try:
        import pynvml
    except ImportError:
        return fallback
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    used = [
        process.usedGpuMemory
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        if process.pid == os.getpid() and process.usedGpuMemory
    ]
    return max(used[0] - torch.cuda.memory_reserved(device), 0) if used else fallback


def measure_link(device: torch.device, folder: Path) -> tuple[LinkRate, ...]:
    """Bytes per second from the slow tier at several block sizes."""
    if device.type == "cuda":
        return tuple(LinkRate(size, host_rate(device, size)) for size in LINK_BLOCKS)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".subspec-link-", buffering=0) as file:
            piece = os.urandom(1 << 20)
            for _ in range(LINK_TEST_BYTES // len(piece)):
                file.write(piece)
            os.fsync(file.fileno())
            return tuple(LinkRate(size, disk_rate(Path(file.name), size)) for size in LINK_BLOCKS)
    except OSError as error:
        raise SubspecError(
            Exit.RESOURCES,
            f"cannot write a {LINK_TEST_BYTES >> 20} MiB test file in {folder}: {error.strerror}",
            "free some disk space or choose another --out",
        ) from None


def disk_rate(path: Path, block_bytes: int) -> float:
    slots = [host_buffer(max(block_bytes, 4 * HUGE_PAGE_BYTES))[:block_bytes] for _ in range(2)]
    num_blocks = LINK_TEST_BYTES // block_bytes
    rates = []
    for _ in range(3):
        link = DiskLink(path, slots, None)
        started = time.perf_counter()
        for index in range(num_blocks):
            link.begin(index % 2, index * block_bytes, block_bytes)
            if index:
                link.wait((index - 1) % 2)
        link.wait((num_blocks - 1) % 2)
        rates.append(LINK_TEST_BYTES / (time.perf_counter() - started))
        link.close()
    return statistics.median(rates)


def host_rate(device: torch.device, block_bytes: int) -> float:
    host = host_buffer(block_bytes)
    torch.cuda.cudart().cudaHostRegister(host.data_ptr(), block_bytes, 1)
    target = torch.empty(block_bytes, dtype=torch.uint8, device=device)
    seconds = median_seconds(lambda: target.copy_(host, non_blocking=True), device)
    torch.cuda.cudart().cudaHostUnregister(host.data_ptr())
    return block_bytes / seconds[0]


def faster_kernel(
    spec: ModelSpec, bench: "Bench", device: torch.device, context: int
) -> tuple[Int4Kernel, list[Timing]]:
    """The 4-bit kernel with the shorter chain step, and its timings."""
    aten = [bench.draft_layer(width) for width in DRAFT_WIDTHS]
    if device.type == "cpu":
        return "aten", aten
    try:
        rival = Bench(spec, device, context, "gemlite")
    except ImportError:
        return "aten", aten
    gemlite = [rival.draft_layer(width) for width in DRAFT_WIDTHS]
    return ("gemlite", gemlite) if gemlite[2].seconds < aten[2].seconds else ("aten", aten)


class Bench:
    """A few layers of random weights of the model's shapes, on the device."""

    def __init__(
        self, spec: ModelSpec, device: torch.device, context: int, kernel: Int4Kernel
    ) -> None:
        layer_bytes = sum(n.num_weights for n in linears(spec) if n.layer == 0) // 2
        num_layers = max(1, min(spec.num_layers, MOST_LAYERS, RING_BYTES // layer_bytes))
        self.spec = replace(
            spec,
            num_layers=num_layers,
            windowed_layers=tuple(n for n in spec.windowed_layers if n < num_layers),
        )
        self.device = device
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.exact = exact_products(self.spec, device, self.dtype)
        self.substitutes = random_substitutes(self.spec, device, kernel, self.exact)
        small = {
            name: torch.ones(shape, dtype=self.dtype, device=device)
            for name, shape in resident_tensors(self.spec).items()
            if not name.startswith(EMBEDDING)
        }
        small[f"{EMBEDDING}.weight"] = torch.ones(64, spec.hidden_size, dtype=self.dtype)
        slots = num_slots(context, max(PADDED_WIDTHS))
        shape = (num_layers, 2, spec.num_kv_heads, slots, spec.head_size)
        self.cache = Cache(torch.zeros(shape, dtype=self.dtype, device=device))
        self.cache.commit([0] * (context // 2))
        self.decoder = make_decoder(self.spec, small, slots, self.dtype, Tensor.clone)
        self.draft_decoder = make_decoder(self.spec, small, slots, torch.bfloat16, Tensor.clone)

    def exact_layer(self, width: int) -> Timing:
        rows = self._tree_rows(width)
        return self._layer(self.decoder, self.exact, rows, width, attend_order_free)

    def draft_layer(self, width: int) -> Timing:
        rows = self._tree_rows(width)
        return self._layer(self.draft_decoder, self.substitutes, rows, width, attend)

    def prefill_layer(self) -> Timing:
        rows = self._tree_rows(PREFILL_ROWS)
        return self._layer(self.decoder, self.exact, rows, PREFILL_ROWS, attend)

    def plain_layer(self) -> Timing:
        rows = self._tree_rows(1)
        if self.device.type == "cuda":
            return self._layer(self.decoder, self.exact, rows, 1, attend)
        with single_row_kernels():
            return self._layer(self.decoder, self.exact, rows, 1, attend)

    def head(self, products: "ExactWeights | Substitutes", width: int) -> Timing:
        head = list(products)[-1]
        dtype = self.dtype if products is self.exact else torch.bfloat16
        x = torch.ones(width, self.spec.hidden_size, dtype=dtype, device=self.device)
        return Timing(width, *median_seconds(lambda: head("head", x).argmax(-1), self.device))

    def round_overhead(self) -> float:
        """Tree bookkeeping outside layers: what a pass over no layer costs."""

        def bookkeeping() -> None:
            self._tree_rows(16)

        return 2 * median_seconds(bookkeeping, self.device)[0]

    def position_free_widths(self) -> tuple[int, ...]:
        """Widths at which every product gives a row the same bits wherever it stands."""
        return tuple(width for width in PADDED_WIDTHS if self._is_position_free(width))

    def _is_position_free(self, width: int) -> bool:
        generator = torch.Generator().manual_seed(width)
        for layer, product in enumerate(self.exact):
            if 0 < layer < self.spec.num_layers:
                continue
            for linear in (n for n in linears(self.spec) if n.layer == layer):
                x = torch.randn(width, linear.in_features, generator=generator)
                x = x.to(self.device, self.dtype)
                expected = product(linear.kind, x)
                for shift in {1, width // 2, width - 1}:
                    if not torch.equal(product(linear.kind, x.roll(shift, 0)), expected.roll(shift, 0)):
                        return False
        return True

    def _tree_rows(self, width: int) -> Rows:
        root = torch.zeros(1, dtype=torch.int64, device=self.device)
        tree: TokenTree = root_only(root, width)
        nodes = torch.arange(width, device=self.device)
        return tree_rows(self.cache, tree, nodes, tree.depths)

    def _layer(
        self,
        decoder: Decoder,
        products: "ExactWeights | Substitutes",
        rows: Rows,
        width: int,
        attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    ) -> Timing:
        x = torch.ones(width, self.spec.hidden_size, dtype=decoder.dtype, device=self.device)
        cos, sin = decoder.cos[rows.positions], decoder.sin[rows.positions]
        layers: Sequence[Product] = list(products)[:-1]

        def all_layers() -> None:
            for layer, product in enumerate(layers):
                attention_block(
                    decoder, layer, product, x, cos, sin, rows, self.cache, attention
                )
                mlp_block(decoder, layer, product, x)
                x.fill_(1.0)  # random layers would make it grow

        median, slowest = median_seconds(all_layers, self.device)
        return Timing(width, median / len(layers), slowest / len(layers))


def exact_products(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> ExactWeights:
    resident = {
        part.name: random_tensor((part.num_rows, part.linear.in_features), device, dtype)
        for part in parts(spec)
    }
    streamed = {part.linear.name for part in parts(spec)}
    fixed = {
        linear.name: random_tensor((linear.out_features, linear.in_features), device, dtype)
        for linear in linears(spec)
        if linear.name not in streamed
    }
    return ExactWeights(spec, fixed, resident, {}, None)


def random_substitutes(
    spec: ModelSpec, device: torch.device, kernel: Int4Kernel, exact: ExactWeights
) -> Substitutes:
    weights: dict[tuple[int, Kind], Int4Weight | Tensor] = {}
    for linear in linears(spec):
        n, k = linear.out_features, linear.in_features
        if not linear.has_substitute:
            weights[linear.layer, linear.kind] = random_tensor((n, k), device, torch.bfloat16)
            continue
        codes_bytes, scale_bytes = packed_bytes(n, k)
        room = [
            torch.empty(aligned(size), dtype=torch.uint8, device=device)[:size]
            for size in (codes_bytes, scale_bytes)
        ]
        codes = torch.randint(256, (1 << 12,), dtype=torch.uint8)
        codes = codes.repeat(-(-codes_bytes // len(codes)))[:codes_bytes].view(n, k // 2)
        scale = torch.full((n, k // GROUP_SIZE), 0.001, dtype=torch.float16)
        zero = torch.full((n, k // GROUP_SIZE), 7.5, dtype=torch.float16)
        weights[linear.layer, linear.kind] = pack(codes, scale, zero, kernel, *room)
    return Substitutes(spec.num_layers, weights, {})


def random_tensor(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A block of normal numbers, repeated: fast to make, no denormals, no special values."""
    count = shape[0] * shape[1]
    block = torch.randn(min(count, 1 << 16), generator=torch.Generator().manual_seed(0))
    block = (block * shape[1] ** -0.5).to(dtype)
    whole: Tensor = block.repeat(-(-count // len(block)))[:count].view(shape)
    return whole.to(device)


def median_seconds(action: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(median, slowest) wall seconds of `action`, after one unmeasured call."""
    action()
    samples = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples), max(samples)


CALIBRATION_PROMPTS = (
    "Write a Python function that reads a file and returns its lines.",
    "Explain in a few sentences how a bicycle stays upright.",
    "Write the Python function join_paths: Join two or more path components.",
)
CALIBRATION_TOKENS = 64


def measure_acceptance(artifact: Artifact, plan: Plan, progress: Progress) -> Rate:
    """Acceptance per level of `plan`'s tree, from rounds of real decoding on the built artifact."""
    text = load_text(artifact.path / "tokenizer")
    accepted = rejected = 0
    with Session(replace(artifact, plan=plan), method="substitute") as session:
        for index, prompt in enumerate(CALIBRATION_PROMPTS):
            progress("measuring acceptance", index / len(CALIBRATION_PROMPTS))
            ids = text.chat_ids([{"role": "user", "content": prompt}])[: plan.context // 2]
            tokens = min(CALIBRATION_TOKENS, plan.context - len(ids))
            eos = frozenset(artifact.spec.eos_token_ids)
            for _ in session.generate(ids, tokens, Sampling(), eos):
                pass
            for count in session.stats.accepted:
                accepted += count
                rejected += count < plan.tree.depth
    total = accepted + rejected
    # Laplace's rule: a short clean run does not promise that nothing is ever rejected.
    return Rate(plan.tree.width, (accepted + 1) / (total + 2), total)


def pick_device(name: str | None) -> str:
    """The device asked for, or the GPU if there is one."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda") or not (kind == name or name[5:].isdigit()):
        raise SubspecError(
            Exit.USAGE, f"--device {name} is not known", "use cuda, cuda:N or cpu"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise SubspecError(
            Exit.WRONG_MACHINE, f"--device {name}, but torch finds no CUDA GPU", "use --device cpu"
        )
    return name
