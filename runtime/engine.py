"""Engine: a model in fast memory, and the sequences that decode with it.

    with Engine.open(artifact) as engine:
        sequence = engine.new_sequence()
        for tokens in sequence.generate(prompt_ids, GenerationParams(max_tokens=64)):
            ...

It knows token ids, not text: runtime/text does the rest.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.footprint import (
    ROWS_IN_COMPANY,
    cache_slots,
    checkpoints_bytes,
    window_slots,
)
from subspec.artifacts.format.prebuilt import find_prebuilt
from subspec.artifacts.format.store import DRAFT_MODEL, Artifact, open_artifact
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.native import cpp
from subspec.artifacts.plan import (
    OF_HEADS,
    WITH_DRAFT_MODEL,
    WITH_SUBSTITUTES,
    DrafterName,
    Method,
    Placement,
    Plan,
    calls_for,
    method_of,
)
from subspec.runtime.clock import Clock, unrecorded
from subspec.runtime.decode import Read, Round, decode_plainly, decode_unpadded, read, speculate
from subspec.runtime.device import open_device
from subspec.runtime.draft import compiled_graphs, compiled_layers
from subspec.runtime.draft.compiled_graphs import CompiledGraphs
from subspec.runtime.draft.compiled_layers import CompiledLayers
from subspec.runtime.draft.draft_head import HeadWeights, make_head, with_head
from subspec.runtime.draft.draft_model import DraftModel, DraftModelDrafter, load_draft_model
from subspec.runtime.draft.drafter import (
    Drafter,
    LookupDrafter,
    Proposals,
    SubstituteDrafter,
    Turn,
    looked_up,
)
from subspec.runtime.draft.graphs import capture_on_gpu
from subspec.runtime.draft.head_drafter import HeadDrafter
from subspec.runtime.exact_pass import Model, Piece, tokens_that_fit
from subspec.runtime.kernels import gemlite_kernel
from subspec.runtime.kernels.linear import single_row_kernels
from subspec.runtime.load import (
    DRAFT_DTYPE,
    ArtifactWeights,
    Progress,
    biases_of,
    check_kernel,
    make_residual_decoder,
    make_substitutes,
    place_resident,
    place_substitutes,
    place_tensors,
    unplaced_weights,
)
from subspec.runtime.memory import FastMemory, PeakMeter, check_host_memory
from subspec.runtime.model import attention
from subspec.runtime.model.cache import Cache, make_cache
from subspec.runtime.model.net_state import make_net_states
from subspec.runtime.model.transformer import make_shared, make_tables
from subspec.runtime.programs import draft_rows, graph_programs, needed_kernels, substitute_shapes
from subspec.runtime.sequence import Sequence
from subspec.runtime.stream.exact_weights import ExactWeights


@dataclass(frozen=True)
class OpenOptions:
    """How a model is opened; the plan says everything else."""

    method: Method | None = None  # None: the plan's
    drafter: DrafterName | None = None  # None: the substitutes, where the method has them
    # Of plain decoding: False for one row, the fastest, which is not the draft's exact twin.
    padded: bool = True
    device: str | None = None  # of several GPUs one, such as cuda:1
    link_bandwidth: float | None = None  # bytes per second that the link is slowed to
    graphs: bool = True  # on cuda: a draft's levels are captured as CUDA graphs
    trace: bool = False  # `engine.model.clock.spans` says what ran when

    def __post_init__(self) -> None:
        if self.link_bandwidth is not None and not self.link_bandwidth > 0:
            message = f"link_bandwidth is {self.link_bandwidth}, expected more than 0"
            raise SubspecError(Exit.USAGE, message)
        if self.drafter is not None and self.method not in (None, method_of(self.drafter)):
            message = f"the drafter {self.drafter!r} does not go with the method {self.method!r}"
            hint = f"leave the method out, or use {method_of(self.drafter)!r}"
            raise SubspecError(Exit.USAGE, message, hint)

    def chosen(self, plan: Plan) -> tuple[Method, DrafterName | None]:
        """The method, and who drafts."""
        if self.drafter is not None:
            return method_of(self.drafter), self.drafter
        method = self.method or plan.method
        return method, None if method == "plain" else method


class Engine:
    """One model in fast memory, under one plan. Close it, or use it as a context manager."""

    def __init__(
        self,
        artifact: Artifact,
        options: OpenOptions,
        method: Method,
        drafter: DrafterName | None,
        device: torch.device,
        memory: FastMemory,
        model: Model,
        caches: list[Cache],
        resources: ExitStack,
    ) -> None:
        """Of parts that `open` made."""
        self.artifact = artifact
        self.plan: Plan = artifact.plan
        self.method: Method = method
        self.drafter: DrafterName | None = drafter
        self.device = device
        self.memory = memory
        self.peak = PeakMeter(memory)
        self.model = model
        # Padding makes plain decoding the draft's exact twin: a plan without a draft needs none.
        plain = drafter is None
        self.padded = not plain or (options.padded and self.plan.method != "plain")
        self.link_bandwidth = options.link_bandwidth
        self.num_reads = 0  # of pieces of prompts; the first one also waits for digests
        self._caches = caches  # that no sequence has
        self._reading: list[Sequence] = []  # their prompts, first come, first served
        self._decoding: list[Sequence] = []
        self._resources = resources
        self._closed = False
        # By the numbers of sequences that decode and that read
        self._watched_lengths = dict[tuple[int, int], int]()

    @classmethod
    def open(
        cls,
        artifact: Artifact | str | Path,
        options: OpenOptions | None = None,
        progress: Progress = lambda stage, share: None,
    ) -> "Engine":
        """Loads the model of an artifact into fast memory, as its plan says.

        progress(stage, share from 0 to 1) is called while weights load. Raises SubspecError:
        INFEASIBLE if the plan has no room for the method, WRONG_MACHINE for a plan of another
        device, RESOURCES if memory is short, CORRUPT for damaged files. An error closes what was
        opened.
        """
        if not isinstance(artifact, Artifact):
            artifact = open_artifact(Path(artifact))
        options = options or OpenOptions()
        plan, spec = artifact.plan, artifact.spec
        method, drafter_name = options.chosen(plan)
        check_drafter(artifact, drafter_name)
        placement = plan.placement(method)
        if drafter_name in OF_HEADS:
            check_head(spec, placement, drafter_name)
        dtype: torch.dtype = getattr(torch, spec.dtype)
        with ExitStack() as stack:
            # The device and its memory
            device = open_device(plan, placement, options.device, stack)
            torch.set_num_threads(plan.num_threads)
            if placement.ledger.substitutes or placement.ledger.drafter:
                check_kernel(artifact, plan)
            if plan.int4_kernel == "gemlite" and method != "plain":
                shapes = set[tuple[int, int]]()
                if method in WITH_SUBSTITUTES:
                    shapes |= substitute_shapes(spec)
                if method in WITH_DRAFT_MODEL and artifact.draft_model is not None:
                    shapes |= substitute_shapes(artifact.draft_model)
                gemlite_kernel.tune(device, shapes, draft_rows(plan, method))
            sources = [source for source, _ in needed_kernels(spec, plan, method)]
            stack.enter_context(cpp.build_ahead(sources))
            memory = FastMemory(device, placement.ledger)
            stack.callback(release, memory)
            clock = Clock(device, spans=[] if options.trace else None)
            # On cuda the host would time launches: only whole phases are recorded there.
            record = clock.record if device.type == "cpu" else unrecorded

            # The weights, each into its arena
            files = ArtifactWeights(artifact)
            stack.callback(files.close)
            embedding = files.open_embedding(device)
            stack.callback(embedding.close)
            files.check_resident()
            tensors = place_tensors(spec, memory, files)
            head_tensors = {}
            if drafter_name in OF_HEADS:
                head_tensors = files.place_draft_head(spec, memory)
            packed = {}
            if placement.ledger.substitutes:
                packed = place_substitutes(spec, plan.int4_kernel, memory, files, progress)
            stored = artifact.stored_parts()
            resident = place_resident(spec, stored, placement, memory, files, progress)
            streamed = files.open_ring(stored, placement, memory, options.link_bandwidth, record)
            if streamed is not None:
                stack.callback(streamed.close)
            files.finish()
            exact = ExactWeights(
                spec,
                stored,
                unplaced_weights(spec, tensors),
                resident,
                biases_of(spec, tensors),
                streamed,
                make_residual_decoder(
                    spec, stored, placement, packed, tensors, memory, plan.num_threads, record
                ),
                record,
            )

            # What passes share, and a cache for each sequence
            slots = cache_slots(plan.context, plan.verify_width)
            few_slots = window_slots(spec, plan.context, plan.verify_width)

            def carved(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
                return memory.take_tensor("cache", shape, kind)

            def moving(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
                return memory.take_tensor("windows", shape, kind)

            def kept(tensor: Tensor) -> Tensor:
                shape = tuple(tensor.shape)
                return memory.take_tensor("tables", shape, tensor.dtype).copy_(tensor)

            def for_drafter(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
                return memory.take_tensor("drafter_cache", shape, kind)

            def empty_cache() -> Cache:
                nets = make_net_states(spec, plan.verify_width, tensors, carved)
                windowed = None
                if placement.ledger.windows and few_slots is not None:
                    windowed = few_slots, moving
                cache = make_cache(spec, slots, carved, nets, windowed)
                if drafter_name in OF_HEADS:
                    cache = with_head(cache, spec, plan.verify_width, for_drafter)
                return cache

            if device.type == "cuda":  # on CPUs they are in the ledger
                check_host_memory(checkpoints_bytes(spec, plan.num_sequences))
            caches = [empty_cache() for _ in range(plan.num_sequences)]
            tables = make_tables(spec, slots, dtype, kept)
            weights = make_shared(spec, embedding, tensors, tables, dtype, kept)

            # The draft
            drafter: Drafter | None = None
            head: HeadWeights | None = None
            if drafter_name == "lookup":
                drafter = LookupDrafter(plan.verify_width)
            trees, draft_model = plan.draft_of(method).trees, None
            if drafter_name in OF_HEADS:
                head = make_head(weights, head_tensors)
                substitutes = make_substitutes(spec, tensors, packed, kept)
                own_trees = (plan.head_draft.tree,) if plan.head_draft else trees
                drafter = HeadDrafter(own_trees, plan.verify_width, head, substitutes)
            if method in WITH_DRAFT_MODEL:
                own = ArtifactWeights(artifact, DRAFT_MODEL)
                stack.callback(own.close)
                rows = own.open_embedding(device)
                stack.callback(rows.close)
                draft_model = load_draft_model(artifact, own, rows, memory, caches, progress)
                drafter = DraftModelDrafter(trees, plan.verify_width, draft_model)
            if method in WITH_SUBSTITUTES and drafter_name not in OF_HEADS:
                draft_weights = weights
                if dtype != DRAFT_DTYPE:
                    if not spec.rope_in_f32:
                        tables = make_tables(spec, slots, DRAFT_DTYPE, kept)
                    draft_weights = make_shared(spec, embedding, tensors, tables, DRAFT_DTYPE, kept)
                substitutes = make_substitutes(spec, tensors, packed, kept)
                compiled: CompiledLayers | CompiledGraphs | None = None
                if device.type == "cpu":
                    compiled = compiled_layers.compile_layers(draft_weights, substitutes)
                    if compiled is None and plan.draft_graphs:
                        compiled = compiled_graphs.load_graphs(draft_weights, substitutes)
                capture = None
                if options.graphs and device.type == "cuda":
                    capture = capture_on_gpu(device)
                drafter = SubstituteDrafter(
                    trees,
                    plan.verify_width,
                    draft_weights,
                    substitutes,
                    compiled,
                    proposals_of(drafter_name, draft_model),
                    capture,
                )
                stack.callback(drafter.captured.clear)
            if plan.int4_kernel == "gemlite" and method != "plain":
                stack.callback(gemlite_kernel.keep_tuning, device)
            model = Model(plan, weights, exact, drafter, clock, head)
            resources = stack.pop_all()
        return cls(
            artifact, options, method, drafter_name, device, memory, model, caches, resources
        )

    def new_sequence(self) -> Sequence:
        """An empty sequence; close it to give its cache to another one. Raises
        SubspecError(RESOURCES) if the plan's sequences are all in use."""
        self.check_open()
        if not self._caches:
            raise SubspecError(
                Exit.RESOURCES,
                f"all {self.plan.num_sequences} sequences of the plan are in use",
                "close one, or plan with more: subspec-plan --sequences N",
            )
        cache = self._caches.pop()
        cache.roll_back(0)
        return Sequence(self, cache)

    @torch.inference_mode()
    def step(self) -> bool:
        """One stream of the exact weights, for every sequence that has begun an answer: those whose
        prompts are not read yet read on, and the others do a round: their drafts grow together, the
        stream verifies all of them, and each commits what it keeps. Returns False if no sequence
        has.

        An error leaves those that have not committed the round where they were: the next step does
        it again.
        """
        self._prepare()
        active = list(self._decoding)
        pieces = self._next_pieces()
        if not active and not pieces:
            return False
        exact, clock = self.model.exact, self.model.clock
        before = dict(clock.seconds), exact.wait_seconds, exact.streamed_bytes
        sizes = [one.cache.length for one in active]
        sizes += [piece.cache.length + len(piece.tokens) for piece in pieces.values()]
        with self._watched((len(active), len(pieces)), max(sizes)):
            rounds, reads = self._passes([one.turn for one in active], list(pieces.values()))
        self.num_reads += len(pieces)
        seconds = {k: v - before[0].get(k, 0.0) for k, v in clock.seconds.items()}
        for (sequence, piece), done in zip(pieces.items(), reads, strict=True):
            sequence.take_read(piece, done, sum(seconds.values()))
        for sequence, round_ in zip(active, rounds, strict=True):
            sequence.take(
                round_,
                draft_seconds=seconds.get("draft", 0.0),
                verify_seconds=seconds["verify"],
                wait_seconds=exact.wait_seconds - before[1],
                streamed_bytes=exact.streamed_bytes - before[2],
            )
        return True

    def _passes(self, turns: list[Turn], pieces: list[Piece]) -> tuple[list[Round], list[Read]]:
        model = self.model
        if not turns:
            return [], read(model, pieces)
        if model.drafter is not None:
            return speculate(model, turns, pieces)
        if self.padded:
            return decode_plainly(model, turns, pieces)
        reads = read(model, pieces) if pieces else []  # of other calls than single rows
        with single_row_kernels() if self.device.type == "cpu" else nullcontext():
            return decode_unpadded(model, turns), reads

    def _next_pieces(self) -> dict[Sequence, Piece]:
        """What the next pass reads of prompts: in company of answers little of them, so that those
        need not wait for long. Where a prompt's own log probabilities are wanted, no more rows have
        logits than a verification of all sequences has."""
        plan, found = self.plan, dict[Sequence, Piece]()
        room = plan.prefill_tokens
        if self._decoding:
            room = min(room, ROWS_IN_COMPANY)
        room_of_head = (plan.num_sequences - len(self._decoding)) * plan.verify_width
        for sequence in self._reading:
            rows = min(room, room_of_head) if sequence.wants_prompt_logprobs else room
            count = tokens_that_fit(plan, len(sequence.unread), rows)
            if not count:
                break
            found[sequence] = sequence.piece(count)
            num_rows = sum(calls_for(plan.prompt_widths, count))
            room -= num_rows
            room_of_head -= num_rows if sequence.wants_prompt_logprobs else plan.prompt_widths[0]
        return found

    def join(self, sequence: Sequence) -> None:
        """From the next step on it reads its prompt and decodes with the others."""
        self._reading.append(sequence)

    def begin_to_decode(self, sequence: Sequence) -> None:
        """Its prompt is read."""
        self._reading.remove(sequence)
        self._decoding.append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It reads and decodes no more."""
        for some in (self._reading, self._decoding):
            if sequence in some:
                some.remove(sequence)

    def is_active(self, sequence: Sequence) -> bool:
        """Whether the next step does something for it."""
        return sequence in self._reading or sequence in self._decoding

    def give_back(self, cache: Cache) -> None:
        self._caches.append(cache)

    def check_open(self) -> None:
        """Raises SubspecError(USAGE) after `close`."""
        if self._closed:
            raise SubspecError(Exit.USAGE, "the engine is closed", "open the artifact again")

    def _prepare(self) -> None:
        """Before a pass: others of this process may have set other threads, and a result's bits
        depend on their number."""
        self.check_open()
        torch.set_num_threads(self.plan.num_threads)

    @contextmanager
    def _watched(self, company: tuple[int, int], length: int) -> Iterator[None]:
        """Temporaries grow with the numbers of sequences and the longest text, and watching them
        takes time: each time that it is longer by a quarter."""
        if 4 * length < 5 * self._watched_lengths.get(company, 0):
            yield
            return
        self._watched_lengths[company] = length
        with self.peak.watch():
            yield

    @property
    def drafts_as_planned(self) -> bool:
        """Whether the plan's predictions are of what drafts here."""
        return self.drafter in (None, self.method)

    @property
    def placement(self) -> Placement:
        return self.plan.placement(self.method)

    @property
    def predicted_tokens_per_second(self) -> float | None:
        """The plan's prediction for this method, or what a draft head was measured at; None for the
        padded twin and for other drafters, which have none."""
        if self.drafter in OF_HEADS and self.plan.head_draft is not None:
            return self.plan.head_draft.tokens_per_second
        unknown = self.method == "plain" and self.padded or not self.drafts_as_planned
        if unknown or self.method not in self.plan.predicted:
            return None
        return self.plan.predicted[self.method].tokens_per_second

    @property
    def missing_kernels(self) -> str | None:
        """Why plain twins do the work of the C++ kernels; None: they do not."""
        kernels = needed_kernels(self.artifact.spec, self.plan, self.method)
        problems = (unavailable() for _, unavailable in kernels)
        return next((problem for problem in problems if problem is not None), None)

    @property
    def plain_attention(self) -> str | None:
        """Why exact attention on a GPU is its plain twin; None: it is not."""
        on_cuda = self.device.type == "cuda"
        return attention.unavailable_on_cuda(self.device) if on_cuda else None

    @property
    def has_prebuilt_kernels(self) -> bool:
        """Whether the artifact has kernels for this machine that are not trusted yet."""
        kernels = needed_kernels(self.artifact.spec, self.plan, self.method)
        programs = (cpp.program(source) for source, _ in kernels)
        return any(find_prebuilt(self.artifact, program) is not None for program in programs)

    @property
    def plain_draft(self) -> str | None:
        """Why the draft's layers run one by one; None: they are compiled, or nothing is drafted."""
        drafter, spec, plan = self.model.drafter, self.artifact.spec, self.plan
        if isinstance(drafter, DraftModelDrafter):
            compilable = self.device.type == "cpu" and plan.int4_kernel == "w4a8"
            if not compilable or compiled_layers.known_form(drafter.model.weights.spec) is not None:
                return None
            return "the draft model has layers that the compiled draft does not compute"
        if not isinstance(drafter, SubstituteDrafter) or drafter.compiled is not None:
            return None
        if plan.draft_graphs:
            programs = graph_programs(plan, spec)
            if all(find_prebuilt(self.artifact, program) for program in programs):
                return "--trust-kernels would load the artifact's compiled graphs"
            return (
                "its compiled graphs are of another torch or processor, or of an artifact "
                "elsewhere; subspec-plan --model compiles new ones"
            )
        compilable = self.device.type == "cpu" and plan.int4_kernel == "w4a8"
        if not compilable or compiled_layers.known_form(spec) is not None:
            return None
        return "this model has layers that the compiled draft does not compute"

    @property
    def missing_graphs(self) -> str | None:
        """Why the draft's levels are not captured; None: they are, or need not be."""
        drafter = self.model.drafter
        return drafter.graph_problem if isinstance(drafter, SubstituteDrafter) else None

    def close(self) -> None:
        """Gives fast memory back. Its sequences cannot be used any more."""
        self._closed = True
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:  # also after an error of the GPU
            self._resources.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_head(spec: ModelSpec, placement: Placement, drafter: DrafterName) -> None:
    """Raises SubspecError if no draft head of this kind can draft."""
    layout = spec.draft_head.layout if spec.draft_head else None
    if layout != drafter:
        has = "has none" if layout is None else f"has one for {layout!r}"
        message = f"the drafter {drafter!r} needs a draft head, and this artifact {has}"
        raise SubspecError(Exit.UNSUPPORTED, message, f"use {layout or 'substitute'!r}")
    if not placement.ledger.drafter:
        message = f"the plan has no memory for the drafter {drafter!r}"
        hint = "plan again with subspec-plan --from ARTIFACT --draft-head own"
        raise SubspecError(Exit.INFEASIBLE, message, hint)


def check_drafter(artifact: Artifact, drafter: DrafterName | None) -> None:
    """Raises SubspecError: USAGE for a draft model that is not there, UNSUPPORTED where proposed
    tokens cannot be checked."""
    other = artifact.draft_model if drafter in WITH_DRAFT_MODEL else None
    if drafter in WITH_DRAFT_MODEL and other is None:
        raise SubspecError(
            Exit.USAGE,
            f"the drafter {drafter!r} needs a draft model, and {artifact.path} has none",
            "plan with one: subspec-plan --model REF --draft-model REF --vram SIZE",
        )
    if drafter not in ("substitute+lookup", "substitute+draft-model"):
        return
    if artifact.spec.delta_nets or (other is not None and other.delta_nets):
        whose = "this model's" if artifact.spec.delta_nets else "the draft model's"
        one = "lookup" if drafter == "substitute+lookup" else "draft-model"
        message = f"the drafter {drafter!r} does not know {whose} delta nets"
        raise SubspecError(Exit.UNSUPPORTED, message, f"use 'substitute' or {one!r}")


def proposals_of(drafter: DrafterName | None, draft_model: DraftModel | None) -> Proposals | None:
    """What the substitutes check for a drafter; None: nothing."""
    if drafter == "substitute+lookup":
        return looked_up
    return draft_model.proposals if draft_model is not None else None


def release(memory: FastMemory) -> None:
    memory.release()
    if memory.device.type == "cuda":
        torch.cuda.empty_cache()
