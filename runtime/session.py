"""Opens an artifact: places what is resident, owns caches and links; generate() yields token ids.

It knows ids, not text: text.py does the rest.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import format_size
from subspec.artifacts.format.prebuilt import find_prebuilt
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.native import cpp, residual_cpu
from subspec.artifacts.plan import Method, Plan, cache_slots
from subspec.runtime.clock import Clock, unrecorded
from subspec.runtime.decode import (
    Model,
    Round,
    decode_plainly,
    decode_unpadded,
    prefill,
    speculate,
)
from subspec.runtime.draft import compiled_layers
from subspec.runtime.draft import graphs as draft_graphs
from subspec.runtime.kernels import gemlite_kernel, int4
from subspec.runtime.kernels.linear import single_row_kernels
from subspec.runtime.load import DRAFT_DTYPE, Loader
from subspec.runtime.memory import FastMemory, PeakMeter
from subspec.runtime.model import attention
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.sampling import Sampling
from subspec.runtime.model.transformer import make_decoder

Kernel = tuple[Path, Callable[[], str | None]]  # its source, and why it cannot be used


@dataclass
class Stats:
    """What one generation did; seconds and bytes are its own, not the session's."""

    method: Method
    prompt_tokens: int = 0
    reused_tokens: int = 0
    time_to_first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    generated_tokens: int = 0
    first_of_session: bool = False  # its first token waits for digests too
    accepted: list[int] = field(default_factory=list)  # drafted tokens accepted, by round
    judged: list[int] = field(default_factory=list)  # levels known to be accepted or not, by round
    drafted_levels: int = 0  # of all rounds
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    stream_wait_seconds: float = 0.0
    streamed_bytes: int = 0  # while decoding; the prompt's pass is not counted

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first one over the seconds after the first one."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


class Session:
    """One model in fast memory, one sequence. Close it, or use it as a context manager."""

    def __init__(
        self,
        artifact: Artifact,
        method: Method | None = None,
        padded: bool = True,
        device: str | None = None,
        link_bandwidth: float | None = None,
        progress: Callable[[str, float], None] = lambda stage, share: None,
        trace: bool = False,
        graphs: bool = True,
    ) -> None:
        """method None: the plan's. padded False: plain decoding at one row, the fastest. trace:
        `model.clock.spans` says what ran when. graphs: on cuda, the draft's levels are captured."""
        plan, spec = artifact.plan, artifact.spec
        self.method: Method = method or plan.method
        placement = plan.placement(self.method)
        if placement is None:
            raise SubspecError(
                Exit.INFEASIBLE,
                "the substitutes do not fit this plan's budget of "
                f"{format_size(plan.budget_bytes)}: it decodes plainly",
                "run it with --no-speculation, or plan again with a larger --vram",
            )
        self.artifact = artifact
        self.plan = plan
        self.placement = placement
        # Padding makes plain decoding the draft's exact twin: a plan without a draft needs none.
        self.padded = padded and plan.method == "substitute"
        self.device = open_device(plan, device)
        torch.set_num_threads(plan.num_threads)
        self._kernels = needed_kernels(plan, self.method)
        cpp.build_ahead(source for source, _ in self._kernels)  # while the weights load
        self.memory = FastMemory(self.device, placement.ledger)
        self.peak = PeakMeter(self.memory)
        clock = Clock(self.device, spans=[] if trace else None)
        # On cuda the host would time launches: only whole phases are recorded there.
        record = clock.record if self.device.type == "cpu" else unrecorded
        loader = self._loader = Loader(artifact, placement, self.memory, progress, record)
        small = loader.small_tensors()
        packed = loader.int4_weights()
        drafts = self.method == "substitute"
        substitutes = loader.substitutes(small, packed) if drafts else None
        exact = loader.exact_weights(small, packed, link_bandwidth)
        slots = cache_slots(plan.context, plan.verify_width)
        dtype: torch.dtype = getattr(torch, spec.dtype)
        shape = (spec.num_layers, 2, spec.num_kv_heads, slots, spec.head_size)
        cache = Cache(self.memory.take_tensor("cache", shape, dtype))
        decoder = make_decoder(spec, small, slots, dtype, loader.keep)
        draft_decoder = decoder
        if substitutes is not None and dtype != DRAFT_DTYPE:
            draft_decoder = make_decoder(spec, small, slots, DRAFT_DTYPE, loader.keep)
        fused = None
        if substitutes is not None:
            fused = compiled_layers.compile_layers(draft_decoder, substitutes, cache)
        levels = None
        if drafts and graphs and self.device.type == "cuda":
            capture = draft_graphs.capture_on_gpu(self.device)
            levels = draft_graphs.make_graphs(plan.tree, plan.verify_width, self.device, capture)
        self.model = Model(
            plan=plan,
            decoder=decoder,
            exact=exact,
            cache=cache,
            clock=clock,
            draft_decoder=draft_decoder,
            substitutes=substitutes,
            draft_layers=fused,
            draft_graphs=levels,
        )
        self.stats = Stats(self.method)
        self._watched_length = 0

    @torch.inference_mode()
    def generate(
        self,
        prompt: list[int],
        max_tokens: int,
        sampling: Sampling,
        eos: frozenset[int] = frozenset(),
    ) -> Iterator[list[int]]:
        """Yields new token ids as they are decided; ends after an id in `eos`, which it yields.

        The cache keeps what the prompt shares with the sequence before it.
        """
        room = self.plan.context - len(prompt)
        if not prompt or room < 1:
            raise SubspecError(
                Exit.USAGE,
                f"the prompt has {len(prompt)} tokens, expected 1 to {self.plan.context - 1}",
                f"shorten it, or plan with --context {len(prompt) + 256} or more",
            )
        model, cache, clock = self.model, self.model.cache, self.model.clock
        cache.roll_back(min(cache.common_prefix(prompt), len(prompt) - 1))
        stats = Stats(self.method, len(prompt), cache.length)
        stats.first_of_session = self.stats.prompt_tokens == 0
        self.stats = stats
        clock.seconds.clear()
        with self.peak.watch():
            first = prefill(model, prompt[cache.length :], sampling)
        stats.time_to_first_token_seconds = clock.seconds["prefill"]
        stats.generated_tokens = 1
        left = min(max_tokens, room) - 1
        yield [first]
        if left <= 0 or first in eos:
            return
        waited, streamed = model.exact.wait_seconds, model.exact.streamed_bytes
        rounds = self._rounds(first, sampling, left)
        while left > 0:
            done = next(rounds)
            kept = done.emitted[:left]
            ends = [index for index, token in enumerate(kept) if token in eos]
            kept = kept[: ends[0] + 1] if ends else kept
            stats.drafted_levels += done.num_levels
            judged = done.num_levels + done.ended_early  # the next level was not accepted, that is
            stats.judged.append(min(judged, len(kept)) if ends else judged)
            left -= len(kept)
            stats.accepted.append(len(done.emitted) - 1)
            stats.generated_tokens += len(kept)
            stats.draft_seconds = clock.seconds.get("draft", 0.0)
            stats.verify_seconds = clock.seconds["verify"]
            stats.decode_seconds = stats.draft_seconds + stats.verify_seconds
            stats.stream_wait_seconds = model.exact.wait_seconds - waited
            stats.streamed_bytes = model.exact.streamed_bytes - streamed
            cache.roll_back(len(prompt) + stats.generated_tokens - 1)
            yield kept
            if ends:
                return

    def _rounds(self, first: int, sampling: Sampling, left: int) -> Iterator[Round]:
        if self.method == "substitute":
            rounds = speculate(self.model, first, sampling, left)
        elif self.padded:
            rounds = decode_plainly(self.model, first, sampling)
        else:
            rounds = decode_unpadded(self.model, first, sampling)
        length = self.model.cache.length
        if length >= 2 * self._watched_length:  # temporaries grow with it; watching takes time
            self._watched_length = length
            with self.peak.watch():
                first_round = next(rounds)
            yield first_round
        if self.method == "plain" and not self.padded and self.device.type == "cpu":
            with single_row_kernels():
                yield from rounds
        else:
            yield from rounds

    @property
    def predicted_tokens_per_second(self) -> float | None:
        """The plan's word for this method; it says nothing about the padded twin."""
        if self.method == "plain" and self.padded or self.method not in self.plan.predicted:
            return None
        return self.plan.predicted[self.method].tokens_per_second

    @property
    def missing_kernels(self) -> str | None:
        """Why plain twins do the work of the C++ kernels; None: they do not."""
        problems = (unavailable() for _, unavailable in self._kernels)
        return next((problem for problem in problems if problem is not None), None)

    @property
    def has_prebuilt_kernels(self) -> bool:
        """Whether the artifact has those of this machine that are not trusted yet."""
        return any(find_prebuilt(self.artifact, source) is not None for source, _ in self._kernels)

    @property
    def missing_graphs(self) -> str | None:
        """Why the draft's levels are not captured; None: they are, or nobody asked for it."""
        return self.model.draft_graphs.problem if self.model.draft_graphs else None

    def close(self) -> None:
        """Fast memory is free again then: the next session may need it."""
        self.model.exact.close()
        self._loader.close()
        if self.model.substitutes is not None and self.plan.int4_kernel == "gemlite":
            gemlite_kernel.keep_tuning(self.device)
        if self.model.draft_graphs is not None:
            self.model.draft_graphs.replays.clear()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.memory.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def kernel_sources(plan: Plan) -> list[Path]:
    """What is compiled for decoding by any of the plan's methods."""
    drafts = plan.substitute is not None
    return [source for source, _ in needed_kernels(plan, "substitute" if drafts else "plain")]


def needed_kernels(plan: Plan, method: Method) -> list[Kernel]:
    """What decoding by `method` calls."""
    if plan.device != "cpu":
        return []
    found: list[Kernel] = [(attention.SOURCE, attention.unavailable)]
    if plan.residuals:
        found.append((residual_cpu.SOURCE, residual_cpu.unavailable))
    if plan.int4_kernel == "w4a8" and (plan.residuals or method == "substitute"):
        found.append((int4.SOURCE, int4.unavailable))
    if plan.int4_kernel == "w4a8" and method == "substitute":
        found.append((compiled_layers.SOURCE, compiled_layers.unavailable))
    return found


def machine_name(device: torch.device) -> str:
    """What a plan's costs and a result's bits depend on, the same throughout a process."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        linux = sys.platform == "linux"  # elsewhere a process has no set of its own
        num_cpus = len(os.sched_getaffinity(0)) if linux else os.cpu_count()
        name = f"{torch.backends.cpu.get_cpu_capability()}, {num_cpus} cpus"
    return f"{device.type}: {name}; torch {torch.__version__}"


def open_device(plan: Plan, device: str | None) -> torch.device:
    """The plan's device; `device` may pick one GPU of several. Caps what torch may take of it."""
    chosen = torch.device(device or plan.device)
    if chosen.type != plan.device:
        raise SubspecError(
            Exit.WRONG_MACHINE,
            f"the plan is for {plan.device}, asked was {device}",
            f"plan again with --device {device}",
        )
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise SubspecError(
                Exit.WRONG_MACHINE,
                "the plan is for a CUDA GPU and torch finds none",
                "plan again with --device cpu",
            )
        chosen = torch.device("cuda", chosen.index or 0)
        if chosen.index >= torch.cuda.device_count():
            raise SubspecError(
                Exit.WRONG_MACHINE,
                f"--device {chosen}, but there are {torch.cuda.device_count()} GPUs",
                "count them from 0",
            )
        torch.cuda.set_device(chosen)
        attention.without_cudnn()
        torch.cuda.empty_cache()  # what others of this process cached would count against the cap
        # What torch may allocate: the cap less the context, which torch does not count.
        ours = plan.budget_bytes - plan.plain.ledger.get("overhead", 0)
        total = torch.cuda.get_device_properties(chosen).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, ours / total), chosen)
    return chosen
