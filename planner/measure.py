"""Times the link, the kernels and one layer of this machine -> Profile, with the runtime's code.

The only file of the planner that imports the runtime: a profile times what will run.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.model import (
    EMBEDDING,
    PAGE_BYTES,
    Kind,
    ModelSpec,
    Part,
    is_streamable,
    linears,
    parts,
    resident_tensors,
)
from subspec.artifacts.plan import Int4Kernel, Plan, Rate, Tree
from subspec.artifacts.profile import LinkRate, Profile, Timing
from subspec.artifacts.store import Artifact
from subspec.planner.costs import Shape, exact_bytes, ledger, substitutes_bytes
from subspec.planner.excerpt import excerpt, fill_with_noise, random_substitute
from subspec.planner.machine import gpu_overhead_bytes, stream_rate, time_each, unnamed_file
from subspec.planner.machine import pick_device as pick_device  # the caller's door is here
from subspec.planner.problem import staging
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
from subspec.runtime.transformer import Attend, Decoder, Product, Rows, forward, make_decoder
from subspec.runtime.verify import accept

EXACT_WIDTHS = (8, 16, 32, 64, 104)
DRAFT_WIDTHS = (1, 2, 4, 8, 16)
DRAFT_LEVELS = 5
PADDED_WIDTHS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 104, 128, 160, 200, 256, 304, 400)
USUAL_WIDTH = 128  # wider ones are tried only where that takes no longer than PLACE_SECONDS
PLACE_SECONDS = 5.0
PREFILL_ROWS = 128
LARGEST_BLOCK = 64 << 20  # larger ones are not faster
LINK_TEST_BYTES = (64 << 20, 256 << 20)  # at least and at most, in between the model's size
CALIBRATION_SECONDS = 60.0  # per tree
CALIBRATION_TOKENS = 40
CALIBRATION_CHATS = (
    "Write a Python function that reads a file and returns its lines.",
    "Explain in a few sentences how a bicycle stays upright.",
)
CALIBRATION_TEXTS = ("import os\n\n\nclass Cache:\n", "The history of the steam engine")

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
        exact_layer, exact_head = bench.exact_timings()
        plain_layer, plain_head, prefill = bench.plain_seconds()
        progress("measuring draft steps", 0.6)
        kernel, draft_layer, draft_head = bench.faster_draft()
        progress("measuring where rows may stand", 0.8)
        profile = Profile(
            device="cuda" if cuda else "cpu",
            machine=machine_name(target),
            num_threads=torch.get_num_threads(),
            free_bytes=free,
            overhead_bytes=gpu_overhead_bytes(target) if cuda else 0,
            link=link,
            exact_layer=exact_layer,
            plain_layer_seconds=plain_layer,
            draft_layer=draft_layer,
            exact_head=(Timing(1, plain_head, plain_head), *exact_head),
            draft_head=draft_head,
            prefill_token_seconds=prefill / PREFILL_ROWS,
            round_seconds=bench.round_seconds(),
            int4_kernel=kernel,
            position_free_widths=bench.position_free_widths(),
        )
    progress("measured", 1.0)
    return profile


def measure_link(spec: ModelSpec, device: torch.device, folder: Path) -> tuple[LinkRate, ...]:
    """Bytes per second from the slow tier, at the block sizes that a plan may stream."""
    sizes = sorted({min(max(block, PAGE_BYTES), LARGEST_BLOCK) for block, _ in staging(spec)})
    if device.type == "cuda":
        return tuple(LinkRate(size, host_rate(device, size)) for size in sizes)
    least, most = LINK_TEST_BYTES
    num_bytes = min(max(exact_bytes(spec), least), most) >> 20 << 20
    with unnamed_file(folder, num_bytes) as path:
        return tuple(LinkRate(size, disk_rate(path, num_bytes, size)) for size in sizes)


def disk_rate(path: Path, num_bytes: int, block_bytes: int) -> float:
    slots = [host_buffer(block_bytes) for _ in range(2)]
    link = DiskLink(path, slots, None)
    try:
        return stream_rate(link, num_bytes, block_bytes)
    finally:
        link.close()


def host_rate(device: torch.device, block_bytes: int) -> float:
    host = host_buffer(block_bytes)
    torch.cuda.cudart().cudaHostRegister(host.data_ptr(), block_bytes, 1)
    target = torch.empty(block_bytes, dtype=torch.uint8, device=device)
    [(seconds, _)] = time_each([lambda: target.copy_(host, non_blocking=True)], device)
    torch.cuda.cudart().cudaHostUnregister(host.data_ptr())
    return block_bytes / seconds


class Bench:
    """An excerpt of the model, placed as the session places it; a cache half full of `context`
    tokens."""

    def __init__(self, spec: ModelSpec, device: torch.device, context: int) -> None:
        self.full_spec, self.spec, self.device = spec, excerpt(spec), device
        # Of a cut head every second counts for the whole head's.
        self.head_share = self.spec.vocab_size / spec.vocab_size
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        held, widest = context // 2, max(PADDED_WIDTHS)
        shape = Shape(held + PREFILL_ROWS, widest, 1, 1, 0, 0)
        purposes = ledger(self.spec, "cuda" if device.type == "cuda" else "cpu", shape, 0, 0)
        purposes |= {"substitutes": 0, "resident": exact_bytes(self.spec)}
        self._memory = FastMemory(device, purposes)
        small = self._small_tensors()
        self.biases = {n.name: small[f"{n.name}.bias"] for n in linears(self.spec) if n.has_bias}
        self.fixed = {
            linear.name: fixed_weight(self.spec, linear.name, small)
            for linear in linears(self.spec)
            if not (linear.has_substitute and is_streamable(self.spec, linear))
        }
        self.resident = {part.name: self._random_part(part) for part in parts(self.spec)}
        self.exact = ExactWeights(self.spec, self.fixed, self.resident, self.biases, None)
        slots = num_slots(held + PREFILL_ROWS, widest)
        size = (self.spec.num_layers, 2, spec.num_kv_heads, slots, spec.head_size)
        self.cache = Cache(self._memory.take_tensor("cache", size, self.dtype))
        self.cache.commit([0] * held)
        self.decoder = make_decoder(self.spec, small, slots, self.dtype, self._keep)
        self.draft_decoder = self.decoder
        if self.dtype != DRAFT_DTYPE:
            self.draft_decoder = make_decoder(self.spec, small, slots, DRAFT_DTYPE, self._keep)

    def exact_timings(self) -> tuple[tuple[Timing, ...], tuple[Timing, ...]]:
        """One layer, and what else a verification does: rows, embedding, head, choices."""
        to_logits = self._through_head(self.decoder, self.exact)

        def head(width: int) -> Callable[[], object]:
            return lambda: choose(to_logits(self._tree_rows(width)), [0] * width, Sampling())

        layers = [
            self._through_layers(self.decoder, self.exact, self._tree_rows(w), attend_order_free)
            for w in EXACT_WIDTHS
        ]
        return self._timings(EXACT_WIDTHS, layers, [head(width) for width in EXACT_WIDTHS])

    def plain_seconds(self) -> tuple[float, float, float]:
        """One row: a layer, the head. PREFILL_ROWS of a prompt: a layer."""
        token, prompt = (
            torch.zeros(count, dtype=torch.int64, device=self.device) for count in (1, PREFILL_ROWS)
        )
        to_logits = self._through_head(self.decoder, self.exact)
        row, rows = causal_rows(self.cache, token), causal_rows(self.cache, prompt)
        single = [
            self._through_layers(self.decoder, self.exact, row, attend),
            lambda: choose(to_logits(causal_rows(self.cache, token)), [0], Sampling()),
        ]
        with single_row_kernels() if self.device.type == "cpu" else nullcontext():
            (layer, _), (head, _) = time_each(single, self.device)
        many = [self._through_layers(self.decoder, self.exact, rows, attend)]
        [(prefill, _)] = time_each(many, self.device)
        num_layers = self.spec.num_layers
        return layer / num_layers, head / self.head_share, prefill / num_layers

    def faster_draft(self) -> tuple[Int4Kernel, tuple[Timing, ...], tuple[Timing, ...]]:
        """The 4-bit kernel with the faster step of four rows; its layer, and what else a level of
        the tree does."""
        aten = self.draft_timings("aten")
        if self.device.type == "cpu":
            return "aten", *aten
        try:
            gemlite = self.draft_timings("gemlite")
        except ImportError:
            return "aten", *aten
        at_four = DRAFT_WIDTHS.index(4)
        if gemlite[0][at_four].seconds < aten[0][at_four].seconds:
            return "gemlite", *gemlite
        return "aten", *aten

    def draft_timings(self, kernel: Int4Kernel) -> tuple[tuple[Timing, ...], tuple[Timing, ...]]:
        substitutes = self._random_substitutes(kernel)
        to_logits = self._through_head(self.draft_decoder, substitutes)
        root = torch.zeros(1, dtype=torch.int64, device=self.device)

        def draft_pass(tree: TokenTree, nodes: Tensor, depth: int) -> Tensor:
            return to_logits(tree_rows(self.cache, tree, nodes, (depth,) * len(nodes)))

        def levels(width: int) -> Callable[[], object]:
            return lambda: grow(root, Tree(width, DRAFT_LEVELS), max(EXACT_WIDTHS), draft_pass)

        widths = tuple(width for width in DRAFT_WIDTHS if width <= self.spec.vocab_size)
        layers = [
            self._through_layers(self.draft_decoder, substitutes, self._tree_rows(w), attend)
            for w in widths
        ]
        return self._timings(widths, layers, [levels(width) for width in widths], DRAFT_LEVELS)

    def round_seconds(self) -> float:
        """Accepting and moving what was accepted in every layer's cache."""
        depth, width = 12, 32
        tree = root_only(torch.zeros(1, dtype=torch.int64, device=self.device), width)
        verdict = accept(tree, tree.tokens, depth)
        (accepting, _), (moving, _) = time_each(
            [
                lambda: accept(tree, tree.tokens, depth).emitted(),
                lambda: self.cache.compact(verdict.path),
            ],
            self.device,
        )
        return accepting + moving / self.spec.num_layers * self.full_spec.num_layers

    def position_free_widths(self) -> tuple[int, ...]:
        """Widths at which every product gives a row the same bits wherever it stands."""
        every = (*self.resident.values(), *self.fixed.values())
        one_of_a_shape = {weight.shape: weight for weight in every}.values()
        found, until = list[int](), time.perf_counter() + PLACE_SECONDS
        for width in PADDED_WIDTHS:
            if width > USUAL_WIDTH and time.perf_counter() > until:
                break
            if all(ignores_place(weight, width) for weight in one_of_a_shape):
                found.append(width)
        return tuple(found)

    def _tree_rows(self, width: int) -> Rows:
        root = torch.zeros(1, dtype=torch.int64, device=self.device)
        tree = root_only(root, width)
        return tree_rows(self.cache, tree, torch.arange(width, device=self.device), tree.depths)

    def _through_layers(
        self, decoder: Decoder, products: Iterable[Product], rows: Rows, attention: Attend
    ) -> Callable[[], Tensor]:
        layers = list(products)[:-1]
        return lambda: forward(decoder, layers, rows, self.cache, attention)

    def _through_head(
        self, decoder: Decoder, products: Iterable[Product]
    ) -> Callable[[Rows], Tensor]:
        """What a pass does outside its layers."""
        head = list(products)[-1:]
        short = replace(decoder, spec=replace(decoder.spec, num_layers=0))
        return lambda rows: forward(short, head, rows, self.cache, attend)

    def _timings(
        self,
        widths: tuple[int, ...],
        layers: Sequence[Callable[[], object]],
        heads: Sequence[Callable[[], object]],
        heads_per_action: int = 1,
    ) -> tuple[tuple[Timing, ...], tuple[Timing, ...]]:
        """Seconds of one layer and of one whole head at each width."""
        timed = time_each([*layers, *heads], self.device)
        shares = [float(self.spec.num_layers)] * len(widths)
        shares += [heads_per_action * self.head_share] * len(widths)
        found = [
            Timing(width, median / share, slowest / share)
            for width, share, (median, slowest) in zip(widths * 2, shares, timed, strict=True)
        ]
        return tuple(found[: len(widths)]), tuple(found[len(widths) :])

    def _small_tensors(self) -> dict[str, Tensor]:
        found = {}
        for name, shape in resident_tensors(self.spec).items():
            purpose = "embedding" if name.startswith(EMBEDDING) else "norms"
            found[name] = self._memory.take_tensor(purpose, shape, self.dtype)
            fill_with_noise(found[name], shape[-1] ** -0.5)
        return found

    def _random_part(self, part: Part) -> Tensor:
        raw = self._memory.take("resident", part.padded_bytes, PAGE_BYTES)[: part.num_bytes]
        weight = raw.view(self.dtype).view(part.num_rows, -1)
        fill_with_noise(weight, part.linear.in_features**-0.5)
        return weight

    def _keep(self, tensor: Tensor) -> Tensor:
        target = self._memory.take_tensor("tables", tuple(tensor.shape), tensor.dtype)
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


def ignores_place(weight: Tensor, width: int) -> bool:
    """Whether a row's products are the same bits wherever it stands among `width`."""
    x = weight.new_empty(width, weight.shape[1])
    fill_with_noise(x, 1.0)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(width)).to(x.device)
    for product in (exact_product, exact_product_into):
        here, there = (x.new_ones(width, len(weight)) for _ in range(2))
        product(x, weight, here)
        product(x[order], weight, there)
        if not torch.equal(here[order], there):
            return False
    return True


def measure_acceptance(artifact: Artifact, plan: Plan, progress: Progress) -> Rate:
    """Acceptance per level of `plan`'s tree, from rounds of real decoding on the built artifact.

    Every tree is grown to its full depth: of a draft that stopped early nobody knows whether it
    would have been accepted.
    """
    plan = replace(plan, tree=replace(plan.tree, stop_below=0.0))
    text = load_text(artifact.path / "tokenizer")
    prompts = [text.chat_ids([{"role": "user", "content": chat}]) for chat in CALIBRATION_CHATS]
    prompts += [text.plain_ids(beginning) for beginning in CALIBRATION_TEXTS]
    eos = frozenset(artifact.spec.eos_token_ids)
    accepted = rejected = 0
    until = time.perf_counter() + CALIBRATION_SECONDS
    with Session(replace(artifact, plan=plan), method="substitute") as session:
        for index, prompt in enumerate(prompts):
            progress("measuring acceptance", index / len(prompts))
            ids = prompt[: plan.context // 2]
            for _ in session.generate(ids, CALIBRATION_TOKENS, Sampling(), eos):
                if time.perf_counter() > until and session.stats.accepted:
                    break
            for count in session.stats.accepted:
                accepted += count
                rejected += count < plan.tree.depth
            if time.perf_counter() > until:
                break
    total = accepted + rejected
    # Laplace's rule: a short clean run does not promise that nothing is ever rejected.
    return Rate(plan.tree.width, (accepted + 1) / (total + 2), total)
