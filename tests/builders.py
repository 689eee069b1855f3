"""Small checkpoints, plans and artifacts that the tests run: made by the project's own code."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from subspec.artifacts.model import ModelSpec, Source, parts
from subspec.artifacts.plan import Acceptance, Placement, Plan, Rate, Tree
from subspec.artifacts.profile import LinkRate, Profile, Timing
from subspec.artifacts.store import Artifact, open_artifact
from subspec.planner.build import build
from subspec.planner.checkpoint import read_checkpoint
from subspec.planner.costs import Shape, exact_bytes, ledger
from subspec.planner.hub import DEMO
from subspec.planner.quantize import quantize
from subspec.planner.search import choose_resident
from subspec.planner.tokenizer_files import read_tokenizer

PROFILE = Profile(
    device="cpu",
    machine="a test machine",
    num_threads=2,
    free_bytes=1 << 33,
    overhead_bytes=0,
    link=(LinkRate(1 << 20, 1e9), LinkRate(64 << 20, 2e9)),
    exact_layer=(Timing(1, 1e-3), Timing(64, 4e-3)),
    plain_layer_seconds=5e-4,
    draft_layer=(Timing(1, 2e-4), Timing(8, 1e-3)),
    exact_head=(Timing(1, 1e-4), Timing(64, 1e-3)),
    draft_head=(Timing(1, 1e-4), Timing(8, 4e-4)),
    prefill_token_seconds=1e-5,
    round_seconds=1e-4,
    int4_kernel="aten",
    position_free_widths=(8, 16, 24, 32, 48, 64),
)


def make_plan(
    spec: ModelSpec,
    width: int = 1,
    depth: int = 7,
    resident_share: float = 0.5,
    context: int = 256,
    verify_width: int | None = None,
    num_slots: int = 2,
    num_threads: int = 1,
    device: str = "cpu",
) -> Plan:
    """A plan made by hand: any tree, any share of the exact weights resident, the smallest ring.

    One thread: with more, a busy machine makes each of many thousand tiny products wait.
    """
    verify_width = verify_width or -(-(1 + width * depth) // 8) * 8
    stay = choose_resident(parts(spec), int(exact_bytes(spec) * resident_share))
    streams = len(stay) < len(parts(spec))
    block = max((part.padded_bytes for part in parts(spec)), default=0) if streams else 0
    slots = num_slots if streams else 0

    def placement(draft_width: int) -> Placement:
        shape = Shape(context, verify_width, draft_width, context, block, slots)
        purposes = ledger(spec, "cuda" if device == "cuda" else "cpu", shape, 0, 0)
        purposes["resident"] = sum(part.padded_bytes for part in stay)
        return Placement(tuple(part.name for part in stay), block, slots, purposes)

    substitute, plain = placement(width), placement(0)
    return Plan(
        device="cuda" if device == "cuda" else "cpu",
        machine=PROFILE.machine,
        budget_bytes=max(substitute.total_bytes, plain.total_bytes),
        context=context,
        method="substitute",
        tree=Tree(width, depth, temperature=1.0 if width == 1 else 0.2),
        verify_width=verify_width,
        num_threads=num_threads,
        int4_kernel="aten",
        prefill_tokens=context,
        substitute=substitute,
        plain=plain,
        predicted={},
        acceptance=Acceptance((Rate(1, 0.9, 0),)),
    )


def replan(artifact: Artifact, **settings: object) -> Artifact:
    """The same weights under another hand-made plan."""
    return replace(artifact, plan=make_plan(artifact.spec, **settings))  # type: ignore[arg-type]


def build_artifact(checkpoint: Path, out: Path, **settings: object) -> Artifact:
    """Quantises and packs a checkpoint folder under a hand-made plan."""
    read = read_checkpoint(checkpoint, Source("test/model"))
    plan = make_plan(read.spec, **settings)  # type: ignore[arg-type]
    tokenizer = read_tokenizer(checkpoint)
    build(read, tokenizer, plan, PROFILE, out, False, quantize, lambda a: a.plan, lambda *_: None)
    return open_artifact(out)


def demo_checkpoint(folder: Path, dtype: torch.dtype) -> Path:
    """The demo model in another dtype."""
    shutil.copytree(DEMO, folder)
    tensors = load_file(DEMO / "model.safetensors")
    save_file({name: t.to(dtype) for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def random_checkpoint(folder: Path, config: object, seed: int = 0) -> Path:
    """A transformers config -> a checkpoint folder of random f32 weights, the demo's tokenizer.

    Biases and norms are random too: zeros and ones would hide mistakes.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / name, folder / name)
    return folder
