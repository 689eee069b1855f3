"""A model and a machine small enough to check a plan by hand; no torch, no files."""

from dataclasses import replace
from typing import Any

from subspec.artifacts.acceptance import Acceptance, Curve
from subspec.artifacts.model import ModelSpec, Rope, Source
from subspec.artifacts.profile import LinkRate, Profile, Timing

# Most levels are accepted, as often deep in a tree as at its root.
ACCEPTANCE = Acceptance(
    (Curve(1, "code", (500,), (400,)), Curve(3, "code", (500,), (450,))), measured=True
)


def make_spec(**changes: Any) -> ModelSpec:
    """8 layers of 1 MB, 11 MB in all, bf16."""
    spec = ModelSpec(
        family="qwen2",
        dtype="bfloat16",
        hidden_size=256,
        intermediate_size=512,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_size=64,
        vocab_size=2048,
        norm_epsilon=1e-6,
        max_positions=4096,
        rope=Rope(10_000.0),
        tied_head=False,
        qkv_bias=True,
        source=Source("org/toy", "0" * 40, "apache-2.0"),
    )
    return replace(spec, **changes)


def make_profile(**changes: Any) -> Profile:
    """A slow link, on which speculation pays well; no decoder for residuals."""
    profile = Profile(
        device="cpu",
        machine="cpu: a toy, 2 threads",
        num_threads=2,
        free_bytes=1 << 33,
        pinnable_bytes=0,
        overhead_bytes=0,
        link=(LinkRate(64 << 10, 50e6), LinkRate(1 << 20, 100e6)),
        contended_link=0.8,
        contended_compute=0.9,
        digest_rate=1e9,
        exact_layer=(Timing(1, 1e-4, 1.5e-4), Timing(8, 2e-4, 3e-4), Timing(64, 8e-4, 9e-4)),
        fast_layer=(Timing(1, 8e-5), Timing(128, 1.28e-3)),
        draft_layer=(Timing(1, 5e-5, 6e-5), Timing(8, 2e-4, 3e-4)),
        exact_attention=(Timing(1, 1e-5), Timing(64, 2e-4)),
        fast_attention=(Timing(1, 1e-5), Timing(64, 1e-4)),
        draft_attention=(Timing(1, 1e-5), Timing(64, 1e-4)),
        exact_head=(Timing(1, 1e-4, 1e-4), Timing(64, 4e-4, 5e-4)),
        draft_head=(Timing(1, 5e-5, 5e-5), Timing(8, 1e-4, 1e-4)),
        round_seconds=1e-4,
        int4_kernel="aten",
        batch_invariant_widths=(8, 16, 32, 64),
        residual_weights_per_second=0.0,
    )
    return replace(profile, **changes)
