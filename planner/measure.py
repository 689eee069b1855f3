"""Times the link, the kernels and one layer of this machine -> Profile, with the runtime's code.

The only file of the planner that imports the runtime: a profile times what will run.
"""

import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts import compiled
from subspec.artifacts.model import (
    PAGE_BYTES,
    PART_ROWS,
    Kind,
    Linear,
    ModelSpec,
    Part,
    is_streamable,
    linears,
)
from subspec.artifacts.plan import Int4Kernel, Tree, cache_slots
from subspec.artifacts.profile import (
    LIVE_TOKENS,
    MORE_TOKENS,
    LinkRate,
    Profile,
    Timing,
    seconds_at,
)
from subspec.artifacts.store import part_digest
from subspec.planner.costs import Shape, ledger, substitutes_bytes
from subspec.planner.excerpt import (
    excerpt,
    fill_with_noise,
    ignores_place,
    random_parts,
    random_resident_tensors,
    random_substitute,
)
from subspec.planner.machine import (
    Stream,
    gpu_overhead_bytes,
    repetitions,
    stream_rate,
    streaming,
    time_each,
    time_widths,
    unnamed_file,
)
from subspec.planner.machine import pick_device as pick_device  # the caller's door is here
from subspec.planner.pinnable import pinnable_bytes
from subspec.planner.problem import staging
from subspec.planner.profiles import SHORTEST, typical_of
from subspec.planner.quantize import quantize
from subspec.planner.storage import raw_storage, usual_storages
from subspec.runtime import int4
from subspec.runtime.attention import attend, attend_exactly
from subspec.runtime.cache import Cache
from subspec.runtime.decode import causal_rows, tree_rows
from subspec.runtime.digests import Digests
from subspec.runtime.draft import TokenTree, grow, root_only
from subspec.runtime.draft_layers import DraftLayers, compiled_layers, run_layers
from subspec.runtime.linear import (
    Int4Weight,
    cpu_tile_rows,
    exact_product,
    exact_product_into,
    pack,
    packed_bytes,
    single_row_kernels,
)
from subspec.runtime.link import DiskLink
from subspec.runtime.load import DRAFT_DTYPE, fixed_weight
from subspec.runtime.memory import FastMemory, bytes_of, free_bytes, host_buffer
from subspec.runtime.sampling import Sampling, choose
from subspec.runtime.session import machine_name as name_of_device
from subspec.runtime.split import Restorer
from subspec.runtime.stream import ExactWeights
from subspec.runtime.substitutes import Substitutes
from subspec.runtime.transformer import (
    Attend,
    Decoder,
    Product,
    Rows,
    attention_block,
    forward,
    make_decoder,
    mlp_block,
)
from subspec.runtime.verify import accept

EXACT_WIDTHS = (8, 16, 32, 64, 104)
CUDA_WIDTHS = (200, 400)  # up to here a GPU may wait for memory: the slope before tells nothing
DRAFT_WIDTHS = (1, 2, 4, 8, 16)
DRAFT_LEVELS = 5  # of the trees that are grown to time one level
ACCEPT_DEPTH = 12
ATTENTION_WIDTHS = (1, 8, 64)
FAST_WIDTHS = (1, 16, 128)  # a token of plain decoding; prompts
LOADED_WIDTH = 32  # of the layers that are timed against a busy link
PADDED_WIDTHS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 104, 128, 160, 200, 256, 304, 400)
USUAL_WIDTH = 128  # wider ones are tried only where that takes no longer than PLACE_SECONDS
PLACE_SECONDS = 5.0
PASSES = 3  # over everything: a shared machine has fast and slow moments
DIGEST_BYTES = 4 << 20  # of one part
LARGEST_BLOCK = 64 << 20  # larger ones are not faster
LEAST_SHARE = 0.2  # of its speed: less is a disturbance, not contention
LINK_TEST_BYTES = (64 << 20, 256 << 20)  # at least and at most, in between the model's size
DECODE_WEIGHTS = 1 << 21  # of one matrix, decoded at a time
DECODED_BYTES = 64 << 20  # that decoding goes round

Progress = Callable[[str, float], None]


def measure(spec: ModelSpec, device: str, folder: Path, progress: Progress) -> Profile:
    """Profile of this machine at the model's shapes. `folder`: where the artifact will lie, on the
    disk whose speed counts. Takes seconds."""
    target = torch.device(device)
    cuda = target.type == "cuda"
    if cuda:
        target = torch.device("cuda", target.index or 0)
        torch.cuda.set_device(target)
    free = torch.cuda.mem_get_info(target)[0] if cuda else free_bytes()
    with slow_tier(spec, target, folder) as open_link, torch.inference_mode():
        progress("measuring", 0.0)
        bench = Bench(spec, target)
        kernel, substitutes = bench.faster_kernel()
        passes = []
        for index in range(PASSES):
            progress(f"measuring, {index + 1} of {PASSES}", (index + 1) / (PASSES + 2))
            passes.append(measured_once(bench, kernel, substitutes, open_link))
        progress("measuring where rows may stand", (PASSES + 1) / (PASSES + 2))
        profile = replace(
            typical_of(passes),
            free_bytes=free,
            pinnable_bytes=pinnable_bytes(device, raw_storage(spec).num_bytes) if cuda else 0,
            overhead_bytes=gpu_overhead_bytes(target) if cuda else 0,
            position_free_widths=bench.position_free_widths(),
        )
    del bench
    if cuda:
        torch.cuda.empty_cache()  # the session that rehearses needs the room
    progress("measured", 1.0)
    return profile


def machine_name(device: str) -> str:
    """The `machine` that a profile of this device would have now."""
    return name_of_device(torch.device(device))


OpenLink = Callable[[int], Stream]  # with two slots of so many bytes


@contextmanager
def slow_tier(spec: ModelSpec, device: torch.device, folder: Path) -> Iterator[OpenLink]:
    """Links to something as large as the model, within limits: a file on the disk of `folder`, or
    host memory."""
    least, most = LINK_TEST_BYTES
    num_bytes = min(max(raw_storage(spec).num_bytes, least), most) >> 20 << 20
    if device.type == "cuda":
        yield lambda block_bytes: HostCopies(device, block_bytes)
        return
    with unnamed_file(folder, num_bytes) as path:
        yield lambda block_bytes: DiskLink(path, [host_buffer(block_bytes) for _ in range(2)], None)


def block_sizes(spec: ModelSpec) -> list[int]:
    """Bytes of the blocks that a plan may stream, ascending."""
    blocks = [b for way in (usual_storages(spec)[0], raw_storage(spec)) for b, _ in staging(way)]
    return sorted({min(max(block, PAGE_BYTES), LARGEST_BLOCK) for block in blocks})


def measure_link(open_link: OpenLink, block_bytes: int) -> LinkRate:
    """Over a file of the least size at least; blocks are read in a circle."""
    link = open_link(block_bytes)
    try:
        return LinkRate(block_bytes, stream_rate(link, LINK_TEST_BYTES[0], block_bytes))
    finally:
        link.close()


def measured_once(
    bench: "Bench", kernel: Int4Kernel, substitutes: Substitutes, open_link: OpenLink
) -> Profile:
    """One pass over everything that is timed; what is not is left for the caller to say."""
    exact_layer, exact_head = bench.exact_timings()
    fast_layer, plain_head = bench.fast_timings()
    draft = bench.draft_timings(substitutes)
    link = tuple(measure_link(open_link, size) for size in block_sizes(bench.full_spec))
    busy_link, busy_compute = bench.contention(open_link, link[-1])
    return Profile(
        device="cuda" if bench.device.type == "cuda" else "cpu",
        machine=name_of_device(bench.device),
        num_threads=torch.get_num_threads(),
        free_bytes=0,
        pinnable_bytes=0,
        overhead_bytes=0,
        link=link,
        busy_link=busy_link,
        busy_compute=busy_compute,
        digest_rate=digest_rate(),
        exact_layer=exact_layer,
        # What took longer than more rows of the same would was disturbed.
        fast_layer=never_longer(fast_layer, exact_layer),
        draft_layer=draft.layer,
        exact_attention=bench.attention_timings(attend_exactly, bench.decoder.dtype),
        fast_attention=bench.attention_timings(attend, bench.decoder.dtype),
        draft_attention=draft.attention,
        exact_head=(Timing(1, min(plain_head, exact_head[0].seconds)), *exact_head),
        draft_head=draft.head,
        round_seconds=bench.round_seconds(),
        decode_rate=bench.decode_rate(kernel),
        int4_kernel=kernel,
        position_free_widths=(),
    )


class HostCopies:
    """cuda: copies of one pinned block on a stream of their own, as HostLink makes them."""

    def __init__(self, device: torch.device, block_bytes: int) -> None:
        self._host = host_buffer(block_bytes)
        torch.cuda.cudart().cudaHostRegister(self._host.data_ptr(), block_bytes, 1)
        self._slots = [torch.empty(block_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._copies = torch.cuda.Stream(device)
        self._filled = [torch.cuda.Event() for _ in range(2)]

    def begin(self, slot: int, offset: int, num_bytes: int) -> None:
        with torch.cuda.stream(self._copies):
            self._slots[slot].copy_(self._host, non_blocking=True)
            self._filled[slot].record(self._copies)

    def wait(self, slot: int) -> None:
        self._filled[slot].synchronize()

    def close(self) -> None:
        self._copies.synchronize()
        torch.cuda.cudart().cudaHostUnregister(self._host.data_ptr())


def digest_rate() -> float:
    """Bytes per second of the check that weights pass when they are first read."""
    num_threads = torch.get_num_threads()
    data = torch.zeros(DIGEST_BYTES, dtype=torch.uint8)
    expected = part_digest([bytes_of(data)], None)
    digests = Digests(num_threads)

    def check() -> None:
        for _ in range(num_threads):
            digests.check_part("a part", data, expected, None)
        digests.finish()

    [(seconds, _)] = time_each([check], torch.device("cpu"))
    digests.close()
    return num_threads * DIGEST_BYTES / seconds


def never_longer(some: tuple[Timing, ...], than: tuple[Timing, ...]) -> tuple[Timing, ...]:
    return tuple(replace(t, seconds=min(t.seconds, seconds_at(than, t.width))) for t in some)


def difference(near: tuple[Timing, ...], far: tuple[Timing, ...]) -> tuple[Timing, ...]:
    return tuple(
        Timing(f.width, max(f.seconds - n.seconds, SHORTEST), f.slowest)
        for n, f in zip(near, far, strict=True)
    )


@dataclass(frozen=True)
class DraftTimings:
    """One level of a draft, by its rows."""

    layer: tuple[Timing, ...]
    attention: tuple[Timing, ...]  # MORE_TOKENS more in the cache, in one layer
    head: tuple[Timing, ...]  # what else it does


class Bench:
    """An excerpt of the model, placed as the session places it; a cache of LIVE_TOKENS tokens."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.full_spec, self.spec, self.device = spec, excerpt(spec), device
        self.head_share = self.spec.vocab_size / spec.vocab_size
        self.exact_widths = EXACT_WIDTHS + (CUDA_WIDTHS if device.type == "cuda" else ())
        # A short call is seldom disturbed; on cuda a long one hides the launch of its kernels.
        self.layers_per_call = self.spec.num_layers if device.type == "cuda" else 1
        dtype: torch.dtype = getattr(torch, spec.dtype)
        held, widest = LIVE_TOKENS + MORE_TOKENS, max(PADDED_WIDTHS)
        stored = raw_storage(self.spec)
        shape = Shape(held, widest, 1, 1, 0, 0, 0, 1)
        purposes = ledger(self.spec, "cuda" if device.type == "cuda" else "cpu", shape, 0, 0)
        purposes |= {"substitutes": 0, "resident": stored.num_bytes}
        self.memory = FastMemory(device, purposes)
        small = random_resident_tensors(self.spec, self.memory)
        self.biases = {n.name: small[f"{n.name}.bias"] for n in linears(self.spec) if n.has_bias}
        self.fixed = {
            linear.name: fixed_weight(self.spec, linear.name, small)
            for linear in linears(self.spec)
            if not is_streamable(self.spec, linear)
        }
        self.resident = random_parts(self.spec, self.memory)
        self.exact = ExactWeights(
            self.spec, stored.parts, self.fixed, self.resident, self.biases, None
        )
        slots = cache_slots(held, widest)
        size = (self.spec.num_layers, 2, spec.num_kv_heads, slots, spec.head_size)
        self.cache = Cache(self.memory.take_tensor("cache", size, dtype))
        self.cache.commit([0] * LIVE_TOKENS)
        self.decoder = make_decoder(self.spec, small, slots, dtype, self._keep)
        self.draft_decoder = self.decoder
        if dtype != DRAFT_DTYPE:
            self.draft_decoder = make_decoder(self.spec, small, slots, DRAFT_DTYPE, self._keep)

    def exact_timings(self) -> tuple[tuple[Timing, ...], tuple[Timing, ...]]:
        """One layer, and what else a verification does: rows, embedding, head, choices."""
        to_logits = self._through_head(self.decoder, self.exact)

        def head(width: int) -> Callable[[], object]:
            return lambda: choose(to_logits(self._tree_rows(width)), [0] * width, Sampling())

        layers = {
            width: self._layers(self.decoder, self.exact, self._tree_rows(width), attend_exactly)
            for width in self.exact_widths
        }
        heads = {width: head(width) for width in self.exact_widths}
        return self._timed(layers, heads, 1, self.layers_per_call)

    def fast_timings(self) -> tuple[tuple[Timing, ...], float]:
        """One layer unpadded: one row as plain decoding has it, more of a prompt. And a head."""
        row = torch.zeros(1, dtype=torch.int64, device=self.device)
        layers = {
            width: self._layers(
                self.decoder, self.exact, causal_rows(self.cache, row.repeat(width)), attend
            )
            for width in FAST_WIDTHS
        }
        to_logits = self._through_head(self.decoder, self.exact)
        actions: list[Callable[[], object]] = [
            layers[1],
            lambda: choose(to_logits(causal_rows(self.cache, row)), [0], Sampling()),
        ]
        with single_row_kernels() if self.device.type == "cpu" else nullcontext():
            (layer, slowest), (head, _) = time_each(actions, self.device)
        calls = self.layers_per_call
        prompts = time_widths({w: layers[w] for w in FAST_WIDTHS[1:]}, self.device, calls)
        return (Timing(1, layer / calls, slowest / calls), *prompts), head / self.head_share

    def attention_timings(self, attention: Attend, dtype: torch.dtype) -> tuple[Timing, ...]:
        """What MORE_TOKENS more in the cache cost, in one layer."""

        def action(width: int, live: int) -> Callable[[], object]:
            query = torch.ones(self.spec.num_heads, width, self.spec.head_size, dtype=dtype)
            query, (keys, values) = query.to(self.device), self.cache.read(0, live)
            visible = torch.ones(width, live, dtype=torch.bool, device=self.device)
            return lambda: attention(query, keys, values, visible)

        near, far = (
            time_widths({w: action(w, live) for w in ATTENTION_WIDTHS}, self.device)
            for live in (LIVE_TOKENS, LIVE_TOKENS + MORE_TOKENS)
        )
        return difference(near, far)

    def contention(self, open_link: OpenLink, idle: LinkRate) -> tuple[float, float]:
        """Shares of their idle speeds that the link and the layers keep while both are busy."""
        action = self._layers(
            self.decoder, self.exact, self._tree_rows(LOADED_WIDTH), attend_exactly
        )
        alone = repetitions(action, self.device)
        link = open_link(idle.block_bytes)
        try:
            with streaming(link, LINK_TEST_BYTES[0], idle.block_bytes) as bytes_per_second:
                loaded = repetitions(action, self.device)
                busy = bytes_per_second()
        finally:
            link.close()
        return share_kept(busy, idle.bytes_per_second), share_kept(loaded, alone)

    def faster_kernel(self) -> tuple[Int4Kernel, Substitutes]:
        """The 4-bit kernel with the faster layer of four rows, and substitutes in its layout."""
        kernels: list[Int4Kernel] = ["aten"]
        if self.device.type == "cpu":
            kernels += ["w4a8"] if int4.unavailable() is None else []
        elif importlib.util.find_spec("gemlite") is not None:
            kernels.append("gemlite")
        packed = {kernel: self._random_substitutes(kernel) for kernel in kernels}
        layers = {kernel: self.draft_timings(packed[kernel]).layer for kernel in kernels}
        fastest = min(kernels, key=lambda kernel: seconds_at(layers[kernel], 4))
        return fastest, packed[fastest]

    def draft_timings(self, substitutes: Substitutes) -> DraftTimings:
        to_logits = self._through_head(self.draft_decoder, substitutes)
        root = torch.zeros(1, dtype=torch.int64, device=self.device)

        def draft_pass(tree: TokenTree, nodes: Tensor, depth: int) -> Tensor:
            return to_logits(tree_rows(self.cache, tree, nodes, (depth,) * len(nodes)))

        def levels(width: int) -> Callable[[], object]:
            return lambda: grow(root, Tree(width, DRAFT_LEVELS), max(EXACT_WIDTHS), draft_pass)

        widths = [width for width in DRAFT_WIDTHS if width <= self.spec.vocab_size]
        heads = {width: levels(width) for width in widths}
        fused = compiled_layers(self.draft_decoder, substitutes, self.cache)
        if fused is not None:  # one call runs all layers
            passes = {width: self._fused(fused, self._tree_rows(width)) for width in widths}
            layer, head = self._timed(passes, heads, DRAFT_LEVELS, self.spec.num_layers)
            self.cache.commit([0] * MORE_TOKENS)
            longer = {width: self._fused(fused, self._tree_rows(width)) for width in widths}
            self.cache.roll_back(LIVE_TOKENS)
            far = time_widths(longer, self.device, self.spec.num_layers)
            return DraftTimings(layer, difference(layer, far), head)
        layers = {
            width: self._layers(self.draft_decoder, substitutes, self._tree_rows(width), attend)
            for width in widths
        }
        layer, head = self._timed(layers, heads, DRAFT_LEVELS, self.layers_per_call)
        return DraftTimings(layer, self.attention_timings(attend, DRAFT_DTYPE), head)

    def round_seconds(self) -> float:
        """Accepting, and moving what was accepted in every layer's cache."""
        tree = root_only(torch.zeros(1, dtype=torch.int64, device=self.device), 32)
        path = accept(tree, tree.tokens, ACCEPT_DEPTH).path
        actions: list[Callable[[], object]] = [
            lambda: accept(tree, tree.tokens, ACCEPT_DEPTH).emitted(),
            lambda: self.cache.compact(path),
        ]
        (accepting, _), (moving, _) = time_each(actions, self.device)
        return accepting + moving / self.spec.num_layers * self.full_spec.num_layers

    def decode_rate(self, kernel: Int4Kernel) -> float:
        """Exact weights per second from residuals, over the matrices of a layer; 0: too slow to be
        thought of (no compiler, no Triton), or in a layout that nobody reads."""
        on_cpu = self.device.type == "cpu"
        if compiled.unavailable() is not None or (
            not on_cpu and importlib.util.find_spec("triton") is None
        ):
            return 0.0
        seconds = num_weights = 0.0
        layer = [linear for linear in linears(self.spec) if linear.layer == 0]
        one_of_a_shape = {(n.out_features, n.in_features): n for n in layer if n.has_substitute}
        for linear in one_of_a_shape.values():
            rows = max(PART_ROWS, min(linear.out_features, DECODE_WEIGHTS // linear.in_features))
            rows = rows // PART_ROWS * PART_ROWS
            if linear.out_features % PART_ROWS or (on_cpu and cpu_tile_rows(rows, kernel) is None):
                continue
            times = sum(
                (n.out_features, n.in_features) == (linear.out_features, linear.in_features)
                for n in layer
            )
            seconds += times * self._decode_seconds(linear, rows, kernel)
            num_weights += times * rows * linear.in_features
        return num_weights / seconds if seconds else 0.0

    def _decode_seconds(self, linear: Linear, rows: int, kernel: Int4Kernel) -> float:
        """Of the matrix's first rows; calls go round copies, which together are larger than a
        cache: what streams has never been read before."""
        dtype: torch.dtype = getattr(torch, self.spec.dtype)
        cut = replace(linear, out_features=rows)
        part = Part(cut, 0, rows, cut.num_weights * self.spec.item_bytes)
        weight = torch.empty(rows, linear.in_features, dtype=dtype)
        fill_with_noise(weight, linear.in_features**-0.5)
        made = quantize(weight, self.device)
        stored = compiled.encode(weight, made.codes, made.grid, torch.get_num_threads())
        scratch = torch.empty(part.num_bytes, dtype=torch.uint8, device=self.device)

        def copy() -> Callable[[], object]:
            room = [torch.empty(n, dtype=torch.uint8, device=self.device)
                    for n in packed_bytes(rows, linear.in_features)]  # fmt: skip
            restorer = Restorer(
                {(linear.layer, linear.kind): pack(made.codes, made.grid, kernel, *room)},
                scratch,
                dtype,
                torch.get_num_threads(),
                torch.zeros(1, dtype=torch.int32, device=self.device),
            )
            own = stored.to(self.device, copy=True)
            return lambda: restorer.restore(part, own)

        read_bytes = len(stored) + sum(packed_bytes(rows, linear.in_features))
        copies = cycle([copy() for _ in range(-(-DECODED_BYTES // read_bytes))])
        [(seconds, _)] = time_each([lambda: next(copies)()], self.device)
        return seconds

    def position_free_widths(self) -> tuple[int, ...]:
        """Widths at which every product gives a row the same bits wherever it stands."""
        every = (*self.resident.values(), *self.fixed.values())
        one_of_a_shape = {weight.shape: weight for weight in every}.values()
        found, until = list[int](), time.perf_counter() + PLACE_SECONDS
        for width in PADDED_WIDTHS:
            if width > USUAL_WIDTH and time.perf_counter() > until:
                break
            if all(
                ignores_place(product, weight, width)
                for product in (exact_product, exact_product_into)
                for weight in one_of_a_shape
            ):
                found.append(width)
        return tuple(found)

    def _timed(
        self,
        layers: Mapping[int, Callable[[], object]],
        heads: Mapping[int, Callable[[], object]],
        heads_per_action: int,
        layers_per_action: int,
    ) -> tuple[tuple[Timing, ...], tuple[Timing, ...]]:
        """Of one layer and of one whole head."""
        return (
            time_widths(layers, self.device, layers_per_action),
            time_widths(heads, self.device, heads_per_action * self.head_share),
        )

    def _tree_rows(self, width: int) -> Rows:
        tree = root_only(torch.zeros(1, dtype=torch.int64, device=self.device), width)
        return tree_rows(self.cache, tree, torch.arange(width, device=self.device), tree.depths)

    def _layers(
        self, decoder: Decoder, products: Iterable[Product], rows: Rows, attention: Attend
    ) -> Callable[[], None]:
        """Calls go round the layers, which together are larger than a cache."""
        layers = cycle(enumerate(list(products)[:-1]))
        x = torch.ones(len(rows.tokens), self.spec.hidden_size, dtype=decoder.dtype).to(self.device)
        cos, sin = decoder.cos[rows.positions], decoder.sin[rows.positions]

        def run() -> None:
            for layer, product in islice(layers, self.layers_per_call):
                attention_block(decoder, layer, product, x, cos, sin, rows, self.cache, attention)
                mlp_block(decoder, layer, product, x)
                x.fill_(1.0)  # random layers would make it grow

        return run

    def _fused(self, layers: DraftLayers, rows: Rows) -> Callable[[], None]:
        x = torch.empty(len(rows.tokens), self.spec.hidden_size, dtype=DRAFT_DTYPE)
        return lambda: run_layers(layers, x.fill_(1.0), rows, self.cache)

    def _through_head(
        self, decoder: Decoder, products: Iterable[Product]
    ) -> Callable[[Rows], Tensor]:
        """What a pass does outside its layers."""
        head = list(products)[-1:]
        short = replace(decoder, spec=replace(decoder.spec, num_layers=0))
        return lambda rows: forward(short, head, rows, self.cache, attend)

    def _keep(self, tensor: Tensor) -> Tensor:
        target = self.memory.take_tensor("tables", tuple(tensor.shape), tensor.dtype)
        return target.copy_(tensor)

    def _random_substitutes(self, kernel: Int4Kernel) -> Substitutes:
        memory = FastMemory(self.device, {"substitutes": substitutes_bytes(self.spec)})
        weights: dict[tuple[int, Kind], Int4Weight | Tensor] = {}
        biases = {}
        for linear in linears(self.spec):
            key, size = (linear.layer, linear.kind), (linear.out_features, linear.in_features)
            if linear.has_bias:
                biases[key] = self.biases[linear.name].to(DRAFT_DTYPE)
            if linear.has_substitute:
                room = [memory.take("substitutes", num_bytes) for num_bytes in packed_bytes(*size)]
                weights[key] = pack(*random_substitute(*size), kernel, *room)
            else:
                weights[key] = self.fixed[linear.name]
        return Substitutes(self.spec.num_layers, weights, biases)


def share_kept(loaded: float, idle: float) -> float:
    return min(1.0, max(LEAST_SHARE, loaded / idle))
