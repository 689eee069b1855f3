"""Opens a model under its plan: the device, the weights in their arenas, tensors that passes share,
a cache for each sequence, and the drafters. engine.py runs it."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.progress import Progress
from subspec.artifacts.footprint import cache_slots, make_host_ledger, window_slots
from subspec.artifacts.format.store import DRAFT_MODEL, Artifact
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.native import cpp
from subspec.artifacts.plan import (
    PROPOSER_OF,
    WITH_DRAFT_MODEL,
    WITH_SUBSTITUTES,
    DrafterName,
    Method,
    Placement,
    Plan,
    Tree,
    head_of,
    make_blocks,
    method_of,
)
from subspec.runtime.clock import Clock, Record, unrecorded
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
    looked_up,
)
from subspec.runtime.draft.graphs import capture_on_gpu
from subspec.runtime.draft.head_drafter import HeadDrafter
from subspec.runtime.draft.substitutes import Substitutes
from subspec.runtime.exact_pass import Model
from subspec.runtime.kernels import gemlite_kernel
from subspec.runtime.kernels.linear import Int4Weight
from subspec.runtime.load import (
    DRAFT_DTYPE,
    ArtifactWeights,
    biases_of,
    check_decoder,
    check_kernel,
    make_residual_decoder,
    make_substitutes,
    place_resident,
    place_substitutes,
    place_tensors,
    unplaced_weights,
)
from subspec.runtime.memory import FastMemory, check_host_memory
from subspec.runtime.model.cache import Cache, make_cache
from subspec.runtime.model.embedding import EmbeddingRows
from subspec.runtime.model.net_state import make_net_states
from subspec.runtime.model.transformer import SharedWeights, make_shared, make_tables
from subspec.runtime.programs import draft_products, needed_kernels
from subspec.runtime.stream.exact_weights import ExactWeights


@dataclass(frozen=True)
class OpenOptions:
    """Options of opening a model; all else is in the plan."""

    method: Method | None = None  # None: the plan's
    drafter: DrafterName | None = None  # None: the plan's, or that of `method`
    # Plain decoding: False for one row, the fastest, which is not the draft's exact twin.
    padded: bool = True
    device: str | None = None  # one of several GPUs, such as cuda:1
    link_bandwidth: float | None = None  # limit of the link, bytes per second
    graphs: bool = True  # on cuda: a draft's levels are captured as CUDA graphs
    trace: bool = False  # record `engine.model.clock.spans`
    draft_temperature: float | None = None  # instead of that of the plan's trees

    def __post_init__(self) -> None:
        if self.link_bandwidth is not None and not self.link_bandwidth > 0:
            message = f"link_bandwidth is {self.link_bandwidth}, expected more than 0"
            raise SubspecError(Exit.USAGE, message)
        if self.draft_temperature is not None and not self.draft_temperature > 0:
            message = f"draft_temperature is {self.draft_temperature}, expected more than 0"
            raise SubspecError(Exit.USAGE, message)
        if self.drafter is not None and self.method not in (None, method_of(self.drafter)):
            message = f"the drafter {self.drafter!r} does not go with the method {self.method!r}"
            hint = f"leave the method out, or use {method_of(self.drafter)!r}"
            raise SubspecError(Exit.USAGE, message, hint)

    def chosen(self, plan: Plan) -> tuple[Method, DrafterName | None]:
        """Return the method and the drafter."""
        if self.drafter is not None:
            return method_of(self.drafter), self.drafter
        if self.method is None and plan.drafter is not None:
            return plan.method, plan.drafter
        method = self.method or plan.method
        return method, None if method == "plain" else method

    def pads(self, plan: Plan) -> bool:
        """Padding makes plain decoding the draft's exact twin, which only plans of a draft need."""
        _, drafter = self.chosen(plan)
        return drafter is not None or (self.padded and plan.method != "plain")


@dataclass(frozen=True)
class OpenedModel:
    artifact: Artifact
    options: OpenOptions
    method: Method
    drafter: DrafterName | None
    device: torch.device
    memory: FastMemory
    model: Model
    caches: list[Cache]  # one for each sequence
    drafters: Mapping[DrafterName, Drafter]  # that fit the memory
    resources: ExitStack  # closes all of it


@dataclass(frozen=True)
class Opening:
    """Arguments that the steps below share."""

    artifact: Artifact
    options: OpenOptions
    method: Method
    drafter: DrafterName | None
    device: torch.device
    memory: FastMemory
    stack: ExitStack  # undoes earlier steps if one fails
    clock: Clock
    progress: Progress

    @property
    def placement(self) -> Placement:
        return self.artifact.plan.placement(self.method)

    @property
    def trees(self) -> tuple[Tree, ...]:
        """Trees that the method drafts for 1, 2, 4, ... sequences."""
        return tuple(map(self.sharpened, self.artifact.plan.draft_of(self.method).trees))

    def sharpened(self, tree: Tree) -> Tree:
        temperature = self.options.draft_temperature
        return tree if temperature is None else replace(tree, temperature=temperature)

    @property
    def reads_hidden_states(self) -> bool:
        return head_of(self.drafter) is not None

    @property
    def record(self) -> Record:
        # On cuda the host would time launches: only whole phases are recorded there.
        return self.clock.record if self.device.type == "cpu" else unrecorded

    def kept(self, tensor: Tensor) -> Tensor:
        """Copy a small tensor into fast memory."""
        shape = tuple(tensor.shape)
        return self.memory.take_tensor("tables", shape, tensor.dtype).copy_(tensor)


@dataclass(frozen=True)
class Loaded:
    """Weights, each in its arena."""

    embedding: EmbeddingRows
    tensors: dict[str, Tensor]  # norms, biases and other small tensors
    of_head: dict[str, Tensor]  # a draft head's
    packed: dict[str, Int4Weight]  # substitutes
    exact: ExactWeights


def open_model(artifact: Artifact, options: OpenOptions, progress: Progress) -> OpenedModel:
    """See Engine.open."""
    plan, spec = artifact.plan, artifact.spec
    method, drafter_name = options.chosen(plan)
    check_drafter(artifact, drafter_name)
    placement = plan.placement(method)
    check_head(spec, placement, drafter_name)
    with ExitStack() as stack:
        device = open_device(plan, placement, options.device, stack)
        torch.set_num_threads(plan.num_threads)
        prepare_kernels(artifact, method, device, stack)
        memory = FastMemory(device, placement.ledger)
        stack.callback(release, memory)
        clock = Clock(device, spans=[] if options.trace else None)
        opening = Opening(
            artifact, options, method, drafter_name, device, memory, stack, clock, progress
        )
        check_host_ledger(opening)
        loaded = load_weights(opening)
        caches = make_caches(opening, loaded)
        slots, dtype = caches[0].num_slots, getattr(torch, spec.dtype)
        tables = make_tables(spec, slots, dtype, opening.kept)
        weights = make_shared(spec, loaded.embedding, loaded.tensors, tables, dtype, opening.kept)
        head = make_head(weights, loaded.of_head) if opening.reads_hidden_states else None
        drafters = make_drafters(opening, loaded, weights, head, caches)
        drafter = drafters[drafter_name] if drafter_name is not None else None
        if plan.int4_kernel == "gemlite" and method != "plain":
            stack.callback(gemlite_kernel.keep_tuning, device)
        model = Model(plan, weights, loaded.exact, drafter, clock, head)
        resources = stack.pop_all()
    return OpenedModel(
        artifact, options, method, drafter_name, device, memory, model, caches, drafters, resources
    )


def prepare_kernels(
    artifact: Artifact, method: Method, device: torch.device, stack: ExitStack
) -> None:
    """Tune and compile kernels, before fast memory is taken."""
    plan, spec, placement = artifact.plan, artifact.spec, artifact.plan.placement(method)
    if placement.ledger.substitutes or placement.ledger.drafter:
        check_kernel(artifact, plan, device)
    check_decoder(artifact, placement, device)
    if plan.int4_kernel == "gemlite" and method != "plain":
        gemlite_kernel.tune(device, draft_products(artifact, method))
    sources = [source for source, _ in needed_kernels(spec, plan, method)]
    stack.enter_context(cpp.build_ahead(sources))


def check_host_ledger(opening: Opening) -> None:
    """Raise SubspecError(RESOURCES) if the host has no room for its memory beside a GPU, including
    the checkpoints of sequences, whose pages are touched only when they are first needed."""
    if opening.device.type == "cpu":  # all of it is in the ledger of fast memory
        return
    artifact, plan, specs = opening.artifact, opening.artifact.plan, [opening.artifact.spec]
    if opening.method in WITH_DRAFT_MODEL and artifact.draft_model is not None:
        specs.append(artifact.draft_model)
    blocks = make_blocks(artifact.stored_parts(), opening.placement)
    streamed = sum(block.num_bytes for block in blocks)
    needed = make_host_ledger(specs, streamed, plan.num_sequences)
    less = needed.how_to_take_less(plan.num_sequences)
    check_host_memory(needed.total_bytes, needed.parts, less)


def load_weights(opening: Opening) -> Loaded:
    artifact, memory, progress = opening.artifact, opening.memory, opening.progress
    plan, spec, placement, record = artifact.plan, artifact.spec, opening.placement, opening.record
    files = ArtifactWeights(artifact)
    opening.stack.callback(files.close)
    embedding = files.open_embedding(opening.device)
    opening.stack.callback(embedding.close)
    files.check_resident()
    tensors = place_tensors(spec, memory, files)
    of_head = files.place_draft_head(spec, memory) if opening.reads_hidden_states else {}
    packed = {}
    if placement.ledger.substitutes:
        packed = place_substitutes(spec, plan.int4_kernel, memory, files, progress)
    stored = artifact.stored_parts()
    resident = place_resident(spec, stored, placement, memory, files, progress)
    bandwidth = opening.options.link_bandwidth
    streamed = files.open_ring(stored, placement, memory, bandwidth, record)
    if streamed is not None:
        opening.stack.callback(streamed.close)
    files.finish()
    decoder = make_residual_decoder(
        spec, stored, placement, packed, tensors, memory, plan.num_threads, record
    )
    unplaced, biases = unplaced_weights(spec, tensors), biases_of(spec, tensors)
    exact = ExactWeights(spec, stored, unplaced, resident, biases, streamed, decoder, record)
    return Loaded(embedding, tensors, of_head, packed, exact)


def make_caches(opening: Opening, loaded: Loaded) -> list[Cache]:
    """Return an empty cache for each sequence."""
    plan, spec, memory = opening.artifact.plan, opening.artifact.spec, opening.memory
    slots = cache_slots(plan.context, plan.verify_width)
    few_slots = window_slots(spec, plan.context, plan.verify_width)
    take = partial(memory.take_tensor, "cache")
    windowed = None
    if opening.placement.ledger.windows and few_slots is not None:
        windowed = few_slots, partial(memory.take_tensor, "windows")
    caches = []
    for _ in range(plan.num_sequences):
        nets = make_net_states(spec, plan.verify_width, loaded.tensors, take)
        cache = make_cache(spec, slots, take, nets, windowed)
        if opening.reads_hidden_states:
            of_head = partial(memory.take_tensor, "drafter_cache")
            cache = with_head(cache, spec, plan.verify_width, of_head)
        caches.append(cache)
    return caches


def make_drafters(
    opening: Opening,
    loaded: Loaded,
    weights: SharedWeights,
    head: HeadWeights | None,
    caches: Sequence[Cache],
) -> dict[DrafterName, Drafter]:
    """Return the drafters that fit this memory, the requested one among them."""
    plan, spec, method = opening.artifact.plan, opening.artifact.spec, opening.method
    trees, width = opening.trees, plan.verify_width
    if method == "plain":
        return {"lookup": LookupDrafter(width)}
    draft_model = open_draft_model(opening, caches) if method in WITH_DRAFT_MODEL else None
    if draft_model is not None and method not in WITH_SUBSTITUTES:
        return {"draft-model": DraftModelDrafter(trees, width, draft_model)}
    substitutes = make_substitutes(spec, loaded.tensors, loaded.packed, opening.kept)
    alone = substitute_drafter(opening, loaded, weights, substitutes, caches)
    if draft_model is not None:
        return {"substitute+draft-model": replace(alone, proposals=draft_model.proposals)}
    found: dict[DrafterName, Drafter] = {"substitute": alone}
    proposals: dict[DrafterName, Proposals] = {"lookup": looked_up}
    if head is not None:
        own_trees = (
            (opening.sharpened(plan.draft_head_result.tree),) if plan.draft_head_result else trees
        )
        of_head = HeadDrafter(own_trees, width, head, substitutes)
        found[head.head.layout], proposals[head.head.layout] = of_head, of_head.proposals
    for name, proposer in PROPOSER_OF.items():
        if proposer in proposals:
            found[name] = replace(alone, proposals=proposals[proposer])
    return found


def open_draft_model(opening: Opening, caches: Sequence[Cache]) -> DraftModel:
    files = ArtifactWeights(opening.artifact, DRAFT_MODEL)
    opening.stack.callback(files.close)
    rows = files.open_embedding(opening.device)
    opening.stack.callback(rows.close)
    return load_draft_model(opening.artifact, files, rows, opening.memory, caches, opening.progress)


def substitute_drafter(
    opening: Opening,
    loaded: Loaded,
    weights: SharedWeights,
    substitutes: Substitutes,
    caches: Sequence[Cache],
) -> SubstituteDrafter:
    """Return a substitute drafter without proposals."""
    plan, spec, on_cpu = opening.artifact.plan, opening.artifact.spec, opening.device.type == "cpu"
    if weights.dtype != DRAFT_DTYPE:
        tables = weights.tables
        if not spec.rope_in_f32:
            tables = make_tables(spec, caches[0].num_slots, DRAFT_DTYPE, opening.kept)
        weights = make_shared(
            spec, loaded.embedding, loaded.tensors, tables, DRAFT_DTYPE, opening.kept
        )
    compiled: CompiledLayers | CompiledGraphs | None = None
    if on_cpu:
        compiled = compiled_layers.compile_layers(weights, substitutes)
        if compiled is None and plan.draft_graphs:
            compiled = compiled_graphs.load_graphs(weights, substitutes)
    capture = capture_on_gpu(opening.device) if opening.options.graphs and not on_cpu else None
    drafter = SubstituteDrafter(
        opening.trees,
        plan.verify_width,
        weights,
        substitutes,
        compiled,
        capture=capture,
        num_captured=len(caches),
    )
    opening.stack.callback(drafter.captured.clear)
    return drafter


def check_head(spec: ModelSpec, placement: Placement, drafter: DrafterName | None) -> None:
    """Raise SubspecError if the drafter needs a draft head that the artifact or the plan does not
    have."""
    asked, layout = head_of(drafter), spec.draft_head.layout if spec.draft_head else None
    if asked is None:
        return
    if layout != asked:
        has = "has none" if layout is None else f"has one for {layout!r}"
        message = f"the drafter {drafter!r} needs a draft head, and this artifact {has}"
        raise SubspecError(Exit.UNSUPPORTED, message, f"use {layout or 'substitute'!r}")
    if not placement.ledger.drafter:
        message = f"the plan has no memory for the drafter {drafter!r}"
        hint = "plan again with subspec-plan --from ARTIFACT --draft-head own"
        raise SubspecError(Exit.INFEASIBLE, message, hint)


def check_drafter(artifact: Artifact, drafter: DrafterName | None) -> None:
    """Raise SubspecError: USAGE for a draft model that the artifact does not have, UNSUPPORTED for
    one whose states cannot roll back when its tokens are rejected."""
    other = artifact.draft_model if drafter in WITH_DRAFT_MODEL else None
    if drafter in WITH_DRAFT_MODEL and other is None:
        raise SubspecError(
            Exit.USAGE,
            f"the drafter {drafter!r} needs a draft model, and {artifact.path} has none",
            "plan with one: subspec-plan --model REF --draft-model REF --vram SIZE",
        )
    if drafter == "substitute+draft-model" and other is not None and other.delta_nets:
        message = f"the drafter {drafter!r} does not support a draft model with delta nets"
        raise SubspecError(Exit.UNSUPPORTED, message, "use 'substitute' or 'draft-model'")


def release(memory: FastMemory) -> None:
    memory.release()
    if memory.device.type == "cuda":
        torch.cuda.empty_cache()
