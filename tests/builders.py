"""Small checkpoints, plans and artifacts that the tests run: made by the project's own code."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from families import save_random_model
from safetensors.torch import load_file, save_file

from subspec.artifacts.footprint import Ring, Shape, make_ledger
from subspec.artifacts.format.store import Artifact, open_artifact
from subspec.artifacts.model import Encoding, ModelSpec, Source
from subspec.artifacts.plan import (
    WITH_DRAFT_MODEL,
    WITH_SUBSTITUTES,
    DeviceKind,
    Draft,
    Int4Kernel,
    Method,
    Placement,
    Plan,
)
from subspec.artifacts.profile import LinkRate, Profile, Timing
from subspec.planner.build.artifact import build
from subspec.planner.build.quantize import quantize
from subspec.planner.model.checkpoint import read_checkpoint
from subspec.planner.model.draft_head import with_draft_head
from subspec.planner.model.hub import DEMO
from subspec.planner.model.tokenizer_files import read_tokenizer
from subspec.planner.planning import DraftModelRef, read_draft_model
from subspec.planner.solve.problem import make_tree
from subspec.planner.solve.search import PRIOR
from subspec.planner.solve.storage import (
    Storage,
    choose_resident,
    group_bytes,
    raw_storage,
    usual_storages,
)
from subspec.runtime.device import machine_name

METHODS: tuple[Method, ...] = ("substitute", "plain")  # of every plan
PROFILE = Profile(
    device="cpu",
    machine=machine_name(torch.device("cpu")),
    num_threads=2,
    free_bytes=1 << 33,
    pinnable_bytes=0,
    overhead_bytes=0,
    link=(LinkRate(1 << 20, 1e9), LinkRate(64 << 20, 2e9)),
    contended_link=0.8,
    contended_compute=0.9,
    digest_bytes_per_second=1e9,
    exact_layer=(Timing(1, 1e-3), Timing(64, 4e-3)),
    fast_layer=(Timing(1, 5e-4), Timing(128, 2e-3)),
    draft_layer=(Timing(1, 2e-4), Timing(8, 1e-3)),
    exact_attention=(Timing(1, 1e-5), Timing(64, 2e-4)),
    fast_attention=(Timing(1, 1e-5), Timing(64, 1e-4)),
    draft_attention=(Timing(1, 1e-5), Timing(64, 1e-4)),
    exact_head=(Timing(1, 1e-4), Timing(64, 1e-3)),
    draft_head=(Timing(1, 1e-4), Timing(8, 4e-4)),
    round_overhead_seconds=1e-4,
    int4_kernel="aten",
    batch_invariant_widths=((8, 16, 24, 32, 48, 64),),
    residual_weights_per_second=1e9,
    fp8_residual_weights_per_second=1e9,
    fp8_weights_per_second=4e9,
)


def make_plan(
    spec: ModelSpec,
    width: int = 1,
    depth: int = 7,
    resident_share: float = 0.5,
    context: int = 256,
    verify_widths: tuple[int, ...] | None = None,
    num_slots: int = 2,
    num_threads: int = 1,
    num_sequences: int = 1,
    device: str = "cpu",
    storage: Storage | None = None,
    int4_kernel: Int4Kernel = "aten",
    min_path_probability: float = 0.0,
    drafts_with_head: bool = False,
    draft_model: ModelSpec | None = None,
) -> Plan:
    """A plan made by hand: any tree, any share of the stored bytes in fast memory, the smallest
    ring. storage: raw unless it is given. verify_widths: one, the next multiple of 8, unless given.
    draft_model: one that drafts the same tree.

    One thread: with more, a busy machine makes each of many thousand tiny products wait.
    """
    storage = storage or raw_storage(spec)
    verify_widths = verify_widths or (-(-(1 + width * depth) // 8) * 8,)
    prefill_chunk_tokens = max(context, verify_widths[0])
    stay = choose_resident(storage, int(storage.num_bytes * resident_share))
    resident = [part for part in stay if not part.is_residual]
    residuals = [part for part in stay if part.is_residual]
    streams = len(stay) < len(storage.parts)
    ring = Ring(storage.largest_part, num_slots) if streams else None
    kind: DeviceKind = "cuda" if device == "cuda" else "cpu"

    def placement(method: Method) -> Placement:
        shape = Shape(
            context,
            num_sequences,
            verify_widths[-1],
            None if method == "plain" else width,
            prefill_chunk_tokens,
            num_threads,
            verify_widths[0],
            ring,
            storage.scratch_bytes or None,
            storage.coded_weights > 0,
            drafts_with_head and method in WITH_SUBSTITUTES,
            draft_model=draft_model if method in WITH_DRAFT_MODEL else None,
            substitutes_draft=method in WITH_SUBSTITUTES,
        )
        purposes = replace(
            make_ledger(spec, kind, int4_kernel, shape, 0, 0),
            resident=group_bytes(resident),
            residuals=group_bytes(residuals),
        )
        raw, coded = (tuple(part.name for part in some) for some in (resident, residuals))
        block_bytes, slots = (ring.block_bytes, ring.num_slots) if ring else (0, 0)
        return Placement(raw, coded, block_bytes, slots, purposes)

    own = WITH_DRAFT_MODEL if draft_model else ()
    placements = {method: placement(method) for method in METHODS + own}
    tree = make_tree(width, depth, min_path_probability)
    return Plan(
        device=kind,
        machine=PROFILE.machine,
        budget_bytes=max(one.ledger.total_bytes for one in placements.values()),
        context=context,
        num_sequences=num_sequences,
        method="substitute",
        tree=tree,
        verify_widths=verify_widths,
        prompt_widths=verify_widths,
        num_threads=num_threads,
        int4_kernel=int4_kernel,
        prefill_chunk_tokens=prefill_chunk_tokens,
        placements=placements,
        residuals=storage.residuals,
        predicted={},
        acceptance=PRIOR,
        drafts={method: Draft(tree, PRIOR) for method in own},
    )


def replan(artifact: Artifact, **settings: object) -> Artifact:
    """The same weights under another hand-made plan."""
    return replace(artifact, plan=plan_for(artifact, **settings))


def plan_for(artifact: Artifact, **settings: object) -> Plan:
    storage = Storage(tuple(artifact.stored_parts()))
    own = artifact.draft_model
    return make_plan(artifact.spec, storage=storage, draft_model=own, **settings)  # type: ignore[arg-type]


def build_artifact(
    checkpoint: Path,
    out: Path,
    encoding: Encoding = "raw",
    draft_model: DraftModelRef | None = None,
    draft_head: Path | None = None,
    **settings: object,
) -> Artifact:
    """Quantises and packs a checkpoint folder, and a draft head's, under a hand-made plan."""
    read = read_checkpoint(checkpoint, Source("test/model"))
    if draft_head is not None:
        read = with_draft_head(read, draft_head)
    wanted = raw_storage(read.spec) if encoding == "raw" else usual_storages(read.spec)[0]
    plan = make_plan(read.spec, storage=wanted, **settings)  # type: ignore[arg-type]

    def with_real_sizes(artifact: Artifact) -> tuple[Plan, Profile]:
        return plan_for(artifact, **settings), PROFILE

    tokenizer = read_tokenizer(checkpoint)
    build(
        read, tokenizer, plan, PROFILE, out, False, quantize, with_real_sizes, lambda *_: None,
        read_draft_model(draft_model) if draft_model else None,
    )  # fmt: skip
    return open_artifact(out)


def demo_checkpoint(folder: Path, dtype: torch.dtype) -> Path:
    """The demo model in another dtype."""
    return converted(DEMO, folder, dtype)


def converted(checkpoint: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A copy of a checkpoint of one file, in another dtype."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({name: t.to(dtype) for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def random_checkpoint(folder: Path, config: object, seed: int = 0) -> Path:
    """A transformers config -> a checkpoint folder of random f32 weights, the demo's tokenizer."""
    save_random_model(folder, config, seed)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / name, folder / name)
    return folder
